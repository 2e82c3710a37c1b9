"""The model against transformers' and against itself."""

import dataclasses
import functools

import hf_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsdc_jax.config import REMAT_POLICIES
from opsdc_jax.models import attention, decode, layers, qwen3
from opsdc_jax.models.layers import KVCache
from opsdc_jax.models.rope import Yarn

NAMES = tuple(hf_reference.CASES)


@functools.partial(jax.jit, static_argnames="config")
def all_logits(params, config, tokens, positions=None, valid=None):
    """Logits of every embedding row, also of those beyond the tokenizer's entries."""
    hidden = qwen3.forward(params, config, tokens, positions_BxT=positions, valid_BxT=valid)
    return qwen3.logits(hidden, qwen3.unembedding(params), config.vocab_size)


def relative_gap(got, expected) -> float:
    """Largest absolute difference over the largest absolute value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("source", hf_reference.SOURCES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["positions", "stretched"])
def test_logits_are_those_of_transformers(name, source, spacing):
    """Left-padded rows, at consecutive positions and at positions with gaps; real tokens only."""
    model = hf_reference.load(name)
    given = model.inputs
    expected = hf_reference.reference(name, source)[
        "logits" if spacing == "positions" else "stretched_logits"
    ]
    got = all_logits(model.params, model.config, given.tokens, getattr(given, spacing), given.valid)
    gap = relative_gap(np.asarray(got)[given.valid], expected[given.valid])
    assert gap <= 2e-5


@pytest.fixture(params=["dense", "blockwise"])
def implementation(request, monkeypatch):
    """Of attention; blocks are small enough for several of them."""
    monkeypatch.setattr(attention, "BLOCK", 6)
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_blockwise_logits_are_those_of_transformers(name, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 6)
    model = hf_reference.load(name)
    given = model.inputs
    config = dataclasses.replace(model.config, attention="blockwise")
    got = all_logits(model.params, config, given.tokens, given.stretched, given.valid)
    expected = hf_reference.reference(name, "golden")["stretched_logits"][given.valid]
    assert relative_gap(np.asarray(got)[given.valid], expected) <= 2e-5


@pytest.mark.parametrize("source", hf_reference.SOURCES)
@pytest.mark.parametrize("name", NAMES)
def test_yarn_logits_are_those_of_transformers(name, source):
    model = hf_reference.load(name)
    given = model.inputs
    settings = hf_reference.CASES[name].yarn.items()
    yarn = Yarn(**{key: value for key, value in settings if key != "rope_type"})
    config = dataclasses.replace(model.config, yarn=yarn)
    expected = hf_reference.reference(name, source)["yarn_logits"][given.valid]
    got = all_logits(model.params, config, given.tokens, given.stretched, given.valid)
    assert relative_gap(np.asarray(got)[given.valid], expected) <= 2e-5


def test_positions_matter():
    """The three references above answer three different questions."""
    stored = hf_reference.reference("tied", "golden")
    valid = hf_reference.inputs("tied").valid
    plain, stretched, yarn = (
        stored[key][valid] for key in ("logits", "stretched_logits", "yarn_logits")
    )
    assert relative_gap(stretched, plain) > 0.1
    assert relative_gap(yarn, stretched) > 0.1


@pytest.mark.parametrize(("name", "prefilled"), [("tied", 13), ("untied", 1)])
def test_prefill_and_decode_equal_forward(name, prefilled, implementation):
    """At every real position; the cache slots not yet written hold garbage."""
    model = hf_reference.load(name)
    config, given = dataclasses.replace(model.config, attention=implementation), model.inputs
    expected = all_logits(model.params, model.config, given.tokens, given.stretched, given.valid)
    hidden, stacked = jax.jit(qwen3.prefill, static_argnames="config")(
        model.params,
        config,
        given.tokens[:, :prefilled],
        positions_BxT=given.stretched[:, :prefilled],
        valid_BxT=given.valid[:, :prefilled],
    )
    rows, width = given.tokens.shape
    same, more = (0, 0), (0, width - prefilled)
    keys = np.pad(stacked.keys, (same, same, same, same, more), constant_values=7.0)
    values = np.pad(stacked.values, (same, same, same, more, same), constant_values=7.0)
    caches = [KVCache(*layer) for layer in zip(keys, values, strict=True)]
    layers = decode.unstack_layers(jax.tree.map(np.asarray, model.params), config)

    @jax.jit
    def step(params, token, position, caches, slot, visible):
        rotary = decode.token_tables(config, position)
        return decode.decode_step(params, layers, config, token, rotary, caches, slot, visible)

    columns = list(np.moveaxis(np.asarray(hidden), 1, 0))
    for slot in range(prefilled, width):
        visible = given.valid & (np.arange(width) <= slot)
        token, position = given.tokens[:, slot], given.stretched[:, slot]
        out, caches = step(model.params, token, position, caches, np.int32(slot), visible)
        assert out.shape == (rows, config.hidden_size)
        columns.append(np.asarray(out))
    got = np.stack(columns, axis=1) @ np.asarray(qwen3.unembedding(model.params)).T
    assert relative_gap(got[given.valid], np.asarray(expected)[given.valid]) <= 1e-5


def test_no_logit_depends_on_a_later_token_or_on_padding(implementation):
    """By gradient, exactly zero; and every visible token does have an influence."""
    model = hf_reference.load("tied")
    config = dataclasses.replace(model.config, attention=implementation)
    width, padding = 9, 2
    tokens = np.arange(10, 10 + width)[None]  # all different: one embedding row a position
    valid = np.arange(width)[None] >= padding
    head = qwen3.unembedding(model.params)
    direction = np.random.default_rng(0).normal(size=model.config.vocab_size).astype(np.float32)

    def projected_logits(embedding):
        params = model.params | {"embedding": embedding}
        hidden = qwen3.forward(params, config, tokens, valid_BxT=valid)
        return (qwen3.logits(hidden, head, model.config.vocab_size) @ direction)[0]

    slopes = np.asarray(jax.jit(jax.jacrev(projected_logits))(model.params["embedding"]))
    influence = np.abs(slopes[:, tokens[0]]).max(axis=-1)  # of the token at s on logits at t
    t, s = np.indices((width, width))
    visible = (s <= t) & (s >= padding)
    assert np.all(influence[(t >= padding) & ~visible] == 0)
    assert influence[visible].min() > 1e-4


def test_padding_changes_nothing():
    """Neither side, nor the ids in it, nor how much there is."""
    model = hf_reference.load("untied")
    tokens, valid = model.inputs.tokens, model.inputs.valid
    lengths = valid.sum(axis=1)
    aligned = np.stack([np.roll(row, n) for row, n in zip(tokens, lengths, strict=True)])
    behind = np.arange(20) >= lengths[:, None]

    def real_logits(tokens, real, *where):
        return np.asarray(all_logits(model.params, model.config, tokens, *where))[real]

    left = real_logits(tokens, valid, model.inputs.positions, valid)
    left_other = real_logits(np.where(valid, tokens, 50), valid, model.inputs.positions, valid)
    right = real_logits(aligned, ~behind)
    right_other = real_logits(np.where(behind, 50, aligned), ~behind)
    wider = real_logits(np.pad(aligned, ((0, 0), (0, 7))), np.pad(~behind, ((0, 0), (0, 7))))
    np.testing.assert_array_equal(left, left_other)
    np.testing.assert_array_equal(right, right_other)
    assert relative_gap(right, left) <= 5e-6
    assert relative_gap(wider, right) <= 5e-6


def test_a_row_of_padding_alone_is_finite():
    model = hf_reference.load("tied")
    given = model.inputs
    nothing = np.zeros_like(given.valid)
    got = all_logits(model.params, model.config, given.tokens, given.positions, nothing)
    assert np.isfinite(np.asarray(got)).all()


def test_remat_gives_the_same_gradient_and_keeps_less():
    """Each policy less than the one before it, and what its description says."""
    model = hf_reference.load("tied")
    tokens = model.inputs.tokens
    direction = np.random.default_rng(1).normal(size=(*tokens.shape, model.config.hidden_size))

    def loss(params, config):
        return jnp.mean(qwen3.forward(params, config, tokens) * direction.astype(np.float32))

    def kept(config):
        residuals = jax.eval_shape(
            lambda params: jax.vjp(lambda p: loss(p, config), params)[1], model.params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    configs = {
        remat: dataclasses.replace(model.config, remat=remat, attention="blockwise")
        for remat in REMAT_POLICIES
    }
    sizes = {remat: kept(config) for remat, config in configs.items()}
    of_attention = model.config.num_attention_heads * (model.config.head_dim + 1)
    assert sizes["none"] > 1.2 * sizes["dots"] > 1.2 * sizes["attention"]
    assert sizes["attention"] - sizes["full"] == pytest.approx(
        of_attention * model.config.num_hidden_layers * tokens.size, rel=1e-3
    )
    gradient = jax.jit(jax.grad(loss), static_argnames="config")
    expected = jax.tree.leaves(gradient(model.params, configs["none"]))
    for remat in ("attention", "full"):
        got = jax.tree.leaves(gradient(model.params, configs[remat]))
        for plain, again in zip(expected, got, strict=True):
            assert np.abs(plain).max() > 0
            assert relative_gap(again, plain) <= 1e-5


def test_bfloat16_compute_is_close_to_float32():
    model = hf_reference.load("untied")
    given = model.inputs
    config = dataclasses.replace(model.config, compute_dtype="bfloat16")
    got = all_logits(model.params, config, given.tokens, given.positions, given.valid)
    assert got.dtype == jnp.float32
    exact = hf_reference.reference("untied", "golden")["logits"][given.valid]
    distance = np.linalg.norm(np.asarray(got)[given.valid] - exact) / np.linalg.norm(exact)
    assert 1e-4 < distance < 4e-2


def test_dtypes_are_cast_on_purpose_only():
    """Forward, prefill and decode in bfloat16 on float32 parameters promote nothing implicitly."""
    model = hf_reference.load("untied")
    config = dataclasses.replace(model.config, compute_dtype="bfloat16")
    given = model.inputs
    with jax.numpy_dtype_promotion("strict"):
        _, caches = jax.eval_shape(
            functools.partial(qwen3.prefill, config=config),
            model.params,
            tokens_BxT=given.tokens,
            positions_BxT=given.positions,
            valid_BxT=given.valid,
        )
        assert caches.keys.dtype == caches.values.dtype == jnp.bfloat16
        layer = KVCache(*(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in caches))
        hidden, updated = jax.eval_shape(
            lambda params, caches: decode.decode_step(
                params,
                decode.unstack_layers(params, config),
                config,
                given.tokens[:, 0],
                decode.token_tables(config, given.positions[:, 0]),
                caches,
                jnp.int32(3),
                given.valid,
            ),
            model.params,
            [layer] * config.num_hidden_layers,
        )
    assert hidden.dtype == jnp.bfloat16
    assert updated == [layer] * config.num_hidden_layers


@pytest.mark.parametrize("name", NAMES)
def test_parameter_views_agree(name):
    """Arrays, shapes and axis names are one tree; stacked leaves lead with the layers."""
    config = hf_reference.load(name).config
    params = jax.eval_shape(lambda: qwen3.init_params(config, jax.random.key(0)))
    abstract = qwen3.abstract_params(config)
    axes = qwen3.logical_axes(config)
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    structure = jax.tree.structure(params)
    assert jax.tree.structure(abstract) == structure
    assert jax.tree.structure(axes, is_leaf=is_names) == structure
    assert ("head" in params) == (not config.tie_word_embeddings)
    sizes = {
        "layers": config.num_hidden_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }
    for (path, leaf), described, names in zip(
        jax.tree.leaves_with_path(params),
        jax.tree.leaves(abstract),
        jax.tree.leaves(axes, is_leaf=is_names),
        strict=True,
    ):
        assert leaf.shape == described.shape == tuple(sizes[axis] for axis in names), path
        assert leaf.dtype == described.dtype == jnp.float32, path
        assert (names[0] == "layers") == (path[0].key == "layers"), path


def test_initial_values():
    """Norms at one, every matrix N(0, 0.02), no two layers alike, another key another model."""
    config = hf_reference.load("tied").config
    init = jax.jit(qwen3.init_params, static_argnums=0)
    params, other = (
        jax.tree.map(np.asarray, init(config, jax.random.key(seed))) for seed in (0, 1)
    )
    for (path, leaf), leaf_of_other in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(other), strict=True
    ):
        if path[-1].key == "scale":
            assert np.all(leaf == 1), path
            continue
        assert 0.018 < np.std(leaf) < 0.022, path
        assert abs(np.mean(leaf)) < 0.002, path
        assert not np.any(leaf == leaf_of_other), path
        if path[0].key == "layers":
            assert not np.any(leaf[0] == leaf[1]), path


def test_equal_configs_and_shapes_share_one_trace():
    model = hf_reference.load("tied")
    given = model.inputs
    where = (given.positions, given.valid)
    all_logits(model.params, model.config, given.tokens, *where)
    traces = all_logits._cache_size()
    all_logits(model.params, dataclasses.replace(model.config), given.tokens[::-1].copy(), *where)
    assert all_logits._cache_size() == traces


def test_every_configurable_remat_policy_exists():
    assert {"none", *qwen3.REMAT_POLICIES} == set(REMAT_POLICIES)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_program_size_does_not_grow_with_depth(remat):
    """Of the forward and the backward pass: the layers are scanned, from some depth on."""

    def operations(layers: int) -> int:
        config = dataclasses.replace(
            hf_reference.load("untied").config, num_hidden_layers=layers, remat=remat
        )
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        loss = lambda params, tokens: jnp.sum(  # noqa: E731
            qwen3.forward(params, config, tokens).astype(jnp.float32)
        )
        text = jax.jit(jax.grad(loss)).lower(qwen3.abstract_params(config), tokens).as_text()
        return text.count(" = stablehlo.")

    shallow = qwen3.UNROLLED_LAYERS + 1 if remat == "none" else 2
    assert operations(shallow) == operations(shallow + 5) > 100
    assert (operations(2) == operations(3)) == (remat != "none"), "unrolled without remat only"


def test_unrolled_layers_compute_what_scanned_ones_do(monkeypatch):
    """And the backward pass of the MLP's own product is that of its formula."""
    model = hf_reference.load("tied")
    tokens = model.inputs.tokens

    def value_and_gradient():
        loss = lambda params: jnp.sum(jnp.sin(qwen3.forward(params, model.config, tokens)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(model.params)

    unrolled = value_and_gradient()
    monkeypatch.setattr(qwen3, "UNROLLED_LAYERS", 0)
    monkeypatch.setattr(layers, "_gated", lambda gate, up: jax.nn.silu(gate) * up)
    scanned = value_and_gradient()
    for got, expected in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
        assert np.abs(expected).max() > 0
        assert relative_gap(got, expected) <= 1e-5


def test_logits_beyond_the_tokenizer_are_no_part_of_the_distribution():
    model = hf_reference.load("untied")
    head = qwen3.unembedding(model.params)
    hidden = np.random.default_rng(0).normal(size=(3, model.config.hidden_size))
    cut = np.asarray(qwen3.logits(jnp.float32(hidden), head, model.entries))
    np.testing.assert_allclose(
        cut[:, : model.entries], (hidden @ head.T)[:, : model.entries], rtol=1e-4, atol=1e-5
    )
    assert cut.shape == (3, model.config.vocab_size)
    assert np.all(np.asarray(jax.nn.softmax(cut))[:, model.entries :] == 0)
    assert np.isfinite(np.asarray(jax.nn.log_softmax(cut))).all()


def test_the_output_head_is_the_embedding_only_where_they_are_tied():
    tied, untied = (hf_reference.load(name).params for name in NAMES)
    assert qwen3.unembedding(tied) is tied["embedding"]
    assert qwen3.unembedding(untied) is untied["head"]
