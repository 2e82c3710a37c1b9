"""Generation against transformers', against the trainer, and against the rules of sampling."""

import functools
from collections import Counter

import hf_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hf_reference import NEW_TOKENS, PAD_ID, PROMPT_WIDTH

from opsdc_jax import objective, rollout, sampler, sampling, sharding
from opsdc_jax.config import InputError
from opsdc_jax.models import decode, qwen3
from opsdc_jax.sampler import Request, generate
from opsdc_jax.sampling import SamplingParams, keep_top

NAMES = tuple(hf_reference.CASES)
NEVER = (-1, -1)  # stop ids that no token has: two, so that nothing is compiled anew
GREEDY = SamplingParams(temperature=0.0)
ROWS = 16


def host_sampler(model, stop=NEVER, prompt_width=PROMPT_WIDTH):
    """The package's Sampler on one device, whatever the number of devices."""
    device = np.array(jax.devices()[:1]).reshape([1] * len(sharding.MESH_AXES))
    mesh = jax.sharding.Mesh(device, sharding.MESH_AXES)
    return sampler.Sampler(
        model=model.config,
        mesh=sampler.decode_mesh(model.config, mesh, -1),
        prompt_buckets=(prompt_width,),
        response_width=NEW_TOKENS,
        vocab_size=model.entries,
        stop_ids=stop,
        pad_id=PAD_ID,
    )


def training_keys(rows, seed=0):
    return sampling.sequence_keys(seed, sampling.TRAIN_STREAM, 0, rows)


def sample(model, sampling=GREEDY, *, params=None, stop=NEVER, rows=None, seed=0):
    """A Rollout as numpy: 64 tokens after the model's 16 prompts, or after those listed in `rows`.

    A prompt keeps its key wherever it stands.
    """
    rows = np.arange(ROWS) if rows is None else np.asarray(rows)
    out = host_sampler(model, stop)(
        model.params if params is None else params,
        [model.inputs.prompts[row] for row in rows],
        training_keys(rows, seed),
        sampling,
    )
    return jax.tree.map(np.asarray, out)


@functools.cache
def sampled(name):
    """Temperature 1, nothing stops."""
    return sample(hf_reference.load(name), SamplingParams())


def assert_same(got, expected):
    for field in ("tokens_BxR", "lengths_B", "stopped_B"):
        np.testing.assert_array_equal(getattr(got, field), getattr(expected, field), field)
    np.testing.assert_allclose(got.logprobs_BxR, expected.logprobs_BxR, rtol=0, atol=1e-4)


# --- against transformers and against the trainer -----------------------------------------------


@pytest.mark.parametrize("source", hf_reference.SOURCES)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_decoding_is_that_of_transformers(name, source):
    """Token for token, with nothing to stop it and with two stop ids."""
    model = hf_reference.load(name)
    expected = hf_reference.reference(name, source)
    free = sample(model)
    np.testing.assert_array_equal(free.tokens_BxR, expected["greedy"])
    assert np.all(free.lengths_B == NEW_TOKENS)
    assert not free.stopped_B.any()
    np.testing.assert_array_equal(
        sample(model, stop=model.stop_ids).tokens_BxR, expected["stopped"]
    )


@functools.partial(jax.jit, static_argnames=("config", "entries"))
def trainers_logprobs(params, config, batch, entries):
    """Log-probabilities of the response ids by the trainer's own path, [B, R]."""
    hidden = objective.response_hidden(
        params,
        config,
        None,
        qwen3.embed(params, batch.student_BxT),
        batch.student_prompt_B,
        batch.lengths_B,
        batch.response_BxR.shape[1],
    )
    logprobs = jax.nn.log_softmax(qwen3.logits(hidden, qwen3.unembedding(params), entries))
    return jnp.take_along_axis(logprobs, batch.response_BxR[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(2.0, 0.9, 9), GREEDY],
    ids=["temperature 1", "tempered and filtered", "greedy"],
)
def test_logprobs_are_the_trainers(name, sampling):
    """At temperature 1 and before top-k and top-p, however the tokens were drawn."""
    model = hf_reference.load(name)
    out = sample(model, sampling)
    batch = rollout.pair(
        out,
        model.inputs.prompts,
        model.inputs.prompts,
        student_width=PROMPT_WIDTH + NEW_TOKENS,
        teacher_width=PROMPT_WIDTH + NEW_TOKENS,
        response_width=NEW_TOKENS,
        pad_id=PAD_ID,
    )
    trained = np.asarray(trainers_logprobs(model.params, model.config, batch, model.entries))
    assert np.abs(trained - out.logprobs_BxR).max() <= 1e-4
    assert np.ptp(trained) > 1  # not all tokens were certain


# --- rows are independent -----------------------------------------------------------------------


def test_a_response_depends_on_neither_neighbours_nor_place_nor_batch_size():
    model = hf_reference.load("untied")
    whole = sampled("untied")
    order = np.random.default_rng(0).permutation(ROWS)
    for rows in (order, np.full(ROWS, 11), [11, 3, 7], [7, 11, 14]):
        got = sample(model, SamplingParams(), rows=rows)
        assert_same(got, jax.tree.map(lambda leaf, rows=rows: leaf[rows], whole))


def test_a_mesh_that_cannot_hold_the_heads_is_refused_for_decoding_too():
    mesh = jax.sharding.AbstractMesh((1, 1, 4), sharding.MESH_AXES)
    with pytest.raises(InputError, match=r"'kv_heads' of size 2 cannot be split.*sizes that work"):
        sampler.decode_mesh(hf_reference.load("tied").config, mesh, -1)


def test_different_seeds_and_examples_give_different_responses():
    model = hf_reference.load("untied")
    one, other = (sample(model, SamplingParams(), seed=seed).tokens_BxR for seed in (0, 1))
    assert np.all((one != other).any(axis=1))
    assert_same(sample(model, SamplingParams()), sampled("untied"))


def test_sequence_keys_are_a_pure_function_of_all_four_numbers():
    examples = np.array([0, 1, 2, 5, 2**20], np.int32)

    def keys(seed, stream, step, examples):
        return jax.random.key_data(sampling.sequence_keys(seed, stream, step, examples))

    every = np.concatenate(
        [
            keys(seed, stream, step, examples)
            for seed in (0, 1, 2)
            for stream in (sampling.TRAIN_STREAM, sampling.EVAL_STREAM)
            for step in (0, 1, 2, 100)
        ]
    )
    assert len(np.unique(every, axis=0)) == len(every) == 3 * 2 * 4 * 5
    np.testing.assert_array_equal(
        keys(1, sampling.EVAL_STREAM, 2, examples[::-1].copy()),
        keys(1, sampling.EVAL_STREAM, 2, examples)[::-1],
    )


# --- the end of a response ----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(5, 9), (PAD_ID, 9)], ids=["plain", "the padding id too"])
def test_stop_ids_end_a_response_and_are_kept(stop):
    """The response is the unstopped one up to the first stop id; after it, padding."""
    model = hf_reference.load("untied")
    free = sampled("untied").tokens_BxR
    out = sample(model, SamplingParams(), stop=stop)
    hits = np.isin(free, stop)
    stopped = hits.any(axis=1)
    lengths = np.where(stopped, hits.argmax(axis=1) + 1, NEW_TOKENS)
    assert 3 <= stopped.sum() <= ROWS - 3
    np.testing.assert_array_equal(out.stopped_B, stopped)
    np.testing.assert_array_equal(out.lengths_B, lengths)
    response = np.arange(NEW_TOKENS) < lengths[:, None]
    np.testing.assert_array_equal(out.tokens_BxR, np.where(response, free, PAD_ID))
    assert np.all(out.logprobs_BxR[~response] == 0)
    np.testing.assert_allclose(
        out.logprobs_BxR[response], sampled("untied").logprobs_BxR[response], atol=1e-5
    )


@pytest.mark.parametrize("budget", [1, 20])
def test_a_budget_below_the_width_cuts_the_response(budget):
    model = hf_reference.load("untied")
    free = sample(model, SamplingParams(), stop=(5, 9))
    out = sample(model, SamplingParams(max_tokens=budget), stop=(5, 9))
    np.testing.assert_array_equal(out.lengths_B, np.minimum(free.lengths_B, budget))
    np.testing.assert_array_equal(out.stopped_B, free.stopped_B & (free.lengths_B <= budget))
    np.testing.assert_array_equal(out.tokens_BxR[:, :budget], free.tokens_BxR[:, :budget])
    assert np.all(out.tokens_BxR[:, budget:] == PAD_ID)
    assert np.all(out.logprobs_BxR[:, budget:] == 0)


def test_decoding_ends_with_the_last_response(monkeypatch):
    """Counts the decode steps that run: one fewer than the longest response has tokens."""
    model = hf_reference.load("tied")
    steps = Counter()
    decode_step = decode.decode_step

    def counted(*args):
        jax.debug.callback(lambda: steps.update(["run"]))
        return decode_step(*args)

    monkeypatch.setattr(decode, "decode_step", counted)
    prompts = model.inputs.prompts[:3]
    request = Request(
        rollout.left_pad(prompts, PROMPT_WIDTH, PAD_ID),
        np.array([len(prompt) for prompt in prompts], np.int32),
        sampling.sequence_keys(0, 0, 0, np.arange(3)),
        SamplingParams(),
        stop_ids=np.arange(0, model.entries, 6, dtype=np.int32),
        pad_id=PAD_ID,
    )
    out = jax.jit(
        lambda params, request: generate.__wrapped__(
            params,
            model.config,
            request,
            mesh=host_sampler(model).mesh,
            vocab_size=model.entries,
            response_width=200,
        )
    )(model.params, request)
    longest = int(out.lengths_B.max())
    jax.effects_barrier()
    assert np.all(out.stopped_B)
    assert 1 < longest < 150
    assert steps["run"] == longest - 1


# --- which tokens, how often --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(0.7, 0.95, 20), SamplingParams(3.0), GREEDY],
    ids=["plain", "filtered", "hot", "greedy"],
)
def test_rows_beyond_the_tokenizer_are_never_sampled(name, sampling):
    """Not even where their logits are by far the largest."""
    model = hf_reference.load(name)
    key = "embedding" if model.config.tie_word_embeddings else "head"
    head = model.params[key].copy()
    head[model.entries :] *= 1000
    out = sample(model, sampling, params=model.params | {key: head})
    assert out.tokens_BxR.max() < model.entries
    assert out.tokens_BxR.min() >= 0
    # Nor do they take part in the normalisation.
    plain = sample(model, sampling)
    np.testing.assert_array_equal(out.tokens_BxR, plain.tokens_BxR)
    np.testing.assert_array_equal(out.logprobs_BxR, plain.logprobs_BxR)


@functools.cache
def constant_model():
    """The untied model with one embedding row for all ids: every token has one distribution.

    Returns:
      parameters, and the float64 logits of the tokenizer's entries.
    """
    model = hf_reference.load("untied")
    embedding = np.tile(model.params["embedding"][3], (model.config.vocab_size, 1))
    params = model.params | {"embedding": embedding}
    params["head"] = model.params["head"] / 2  # flatter: more ids are common enough to count
    hidden = jax.jit(qwen3.forward, static_argnums=1)(params, model.config, np.zeros((1, 1), int))
    logits = params["head"].astype(np.float64) @ np.asarray(hidden, np.float64)[0, 0]
    return params, logits[: model.entries]


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def drawn(sampling):
    """4 x 16 x 64 draws from the constant model, as [64, 64] rows."""
    model = hf_reference.load("untied")
    params, _ = constant_model()
    return np.concatenate(
        [sample(model, sampling, params=params, seed=seed).tokens_BxR for seed in range(4)]
    )


def p_value(tokens, probabilities):
    """Of Pearson's test that `tokens` are drawn from `probabilities`; rare ids make one class."""
    counts = np.bincount(tokens.ravel(), minlength=len(probabilities))
    expected = probabilities * tokens.size
    rare = expected < 5
    assert counts[expected == 0].sum() == 0
    merged = [np.append(values[~rare], values[rare].sum()) for values in (counts, expected)]
    merged = [values[merged[1] > 0] for values in merged]
    return scipy.stats.chisquare(*merged).pvalue


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_follow_the_temperature(temperature):
    _, logits = constant_model()
    tokens = drawn(SamplingParams(temperature=temperature))
    assert p_value(tokens, softmax(logits / temperature)) > 1e-3
    assert p_value(tokens, softmax(logits / (temperature * 1.25))) < 1e-9


def test_frequencies_within_top_k_and_top_p():
    """The kept ids share the whole probability: top-k first, top-p of what is left."""
    _, logits = constant_model()
    kept = reference_keep(logits / 0.7, 12, 0.8)
    assert 3 < len(kept) < 12
    probabilities = np.zeros(len(logits))
    probabilities[list(kept)] = softmax(logits[list(kept)] / 0.7)
    tokens = drawn(SamplingParams(temperature=0.7, top_k=12, top_p=0.8))
    assert p_value(tokens, probabilities) > 1e-3


def test_successive_and_neighbouring_draws_are_independent():
    """Equal pairs are as frequent as the distribution makes them, along rows and across them."""
    _, logits = constant_model()
    tokens = drawn(SamplingParams())
    chance = np.sum(softmax(logits) ** 2)
    for one, other in (
        (tokens[:, 1:], tokens[:, :-1]),
        (tokens[1:], tokens[:-1]),
        (tokens[1:, 1:], tokens[:-1, :-1]),
        (tokens[ROWS:], tokens[:-ROWS]),
    ):
        deviation = np.sqrt(chance * (1 - chance) / one.size)
        assert abs(np.mean(one == other) - chance) < 5 * deviation
    assert chance < 0.2


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(temperature=1e-4)],
    ids=["top_k=1", "tiny top_p", "tiny temperature"],
)
def test_limits_of_sampling_are_greedy(sampling):
    expected = hf_reference.reference("untied", "golden")["greedy"]
    model = hf_reference.load("untied")
    np.testing.assert_array_equal(sample(model, sampling).tokens_BxR, expected)


def test_changing_sampling_parameters_compiles_nothing():
    model = hf_reference.load("untied")
    sample(model, SamplingParams())
    compiled = generate._cache_size()
    for params in (GREEDY, SamplingParams(0.6, 0.95, 20, 7), SamplingParams(1.5, 0.3, 0, 3)):
        sample(model, params, stop=(3, 4), seed=5)
    assert generate._cache_size() == compiled


# --- top-k and top-p ----------------------------------------------------------------------------


def reference_keep(logits, top_k, top_p):
    """Ids kept, one token at a time: the k best, then until they hold `top_p` of that mass."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        ranked = ranked[:top_k]
    mass = sum(np.exp(float(logits[i]) - float(logits[ranked[0]])) for i in ranked)
    kept, held = [], 0.0
    for i in ranked:
        kept.append(i)
        held += np.exp(float(logits[i]) - float(logits[ranked[0]])) / mass
        if top_p < 1 and held >= top_p:
            break
    return {i for i in range(len(logits)) if logits[i] >= logits[kept[-1]]}


FILTERS = [(0, 0.5), (0, 0.95), (5, 1.0), (20, 0.9), (3, 0.99), (1, 1.0), (200, 0.7), (0, 1.0)]


def random_logits():
    return np.random.default_rng(0).normal(size=(24, 60), scale=2).astype(np.float32)


keep_top_jit = jax.jit(keep_top)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_keep_top(top_k, top_p):
    """What is kept is kept as it is, and is what one-by-one accumulation keeps."""
    logits = random_logits()
    got = np.asarray(keep_top_jit(logits, top_k, top_p))
    for row, out in zip(logits, got, strict=True):
        kept = sorted(reference_keep(row, top_k, top_p))
        assert np.flatnonzero(out > -np.inf).tolist() == kept
        np.testing.assert_array_equal(out[kept], row[kept])


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_keep_top_is_that_of_transformers(top_k, top_p):
    """Live only: transformers' two warpers, top-k first."""
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits()
    expected = torch.from_numpy(logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(keep_top_jit(logits, top_k, top_p), expected.numpy())


@pytest.mark.parametrize(
    ("row", "top_k", "top_p", "kept"),
    [
        ([1, 3, 3, 0, 3], 1, 1.0, {1, 2, 4}),
        ([1, 3, 3, 0, 3], 2, 1.0, {1, 2, 4}),
        ([1, 3, 3, 0, 3], 0, 0.1, {1, 2, 4}),
        ([1, 1, 1, 1, 1], 2, 0.5, {0, 1, 2, 3, 4}),
        ([2, 1, 1, 0, 0], 3, 0.5, {0}),  # 0.58 of the best three, though 0.51 of all five
        ([2, 1, 1, 0, 0], 3, 0.55, {0}),
        ([2, 1, 1, 0, 0], 0, 0.55, {0, 1, 2}),
        ([0, -30, -31, -40, -50], 3, 1.0, {0, 1, 2}),  # top_p = 1 keeps however small the rest
        ([0, -1e30, 4, -1e30, 2], 4, 0.999, {0, 2, 4}),
        ([-0.0, 0.0, -1, -0.0, -2], 1, 1.0, {0, 1, 3}),  # equal, though not in their bits
    ],
)
def test_keep_top_by_hand(row, top_k, top_p, kept):
    """Ties with the last kept logit stay; the best always stays; order of the two filters."""
    out = np.asarray(keep_top_jit(np.array([row], np.float32), top_k, top_p))[0]
    assert set(np.flatnonzero(out > -np.inf)) == kept


@pytest.mark.parametrize(("top_k", "top_p"), [(20, 0.9), (0, 0.95), (7, 1.0)])
def test_keep_top_of_many_with_ties_and_extremes(top_k, top_p):
    """Halves, so that most logits tie; and logits far out on both sides."""
    rng = np.random.default_rng(1)
    logits = (np.round(rng.normal(size=(4, 3000), scale=2) * 2) / 2).astype(np.float32)
    logits[1] -= 1e4
    logits[2, :50] = -1e30
    logits[3] *= 30
    got = np.asarray(keep_top_jit(logits, top_k, top_p))
    for row, out in zip(logits, got, strict=True):
        assert set(np.flatnonzero(out > -np.inf)) == reference_keep(row, top_k, top_p)


def test_a_draw_is_the_categorical_of_its_rows_key_and_step():
    logits = jnp.asarray(random_logits())
    keys, steps = training_keys(np.arange(24)), jnp.arange(24) % 5
    got = jax.jit(sampling.draw)(logits, keys, steps, SamplingParams(0.7))
    expected = [
        jax.random.categorical(jax.random.fold_in(key, step), row / jnp.float32(0.7))
        for key, step, row in zip(keys, steps, logits, strict=True)
    ]
    np.testing.assert_array_equal(got, expected)
    logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(24), got]
    np.testing.assert_allclose(sampling.log_probability(logits, got), logprobs, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_drawn_from_what_is_no_number_is_still_a_token(temperature):
    logits = jnp.full((2, 60), jnp.nan).at[0, 3].set(1)
    keys, params = training_keys(np.arange(2)), SamplingParams(temperature)
    got = jax.jit(sampling.draw)(logits, keys, 0, params)
    assert np.all((np.asarray(got) >= 0) & (np.asarray(got) < 60))


# --- the host side ------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_refused():
    """It is never cut."""
    model = hf_reference.load("untied")
    narrow = host_sampler(model, prompt_width=PROMPT_WIDTH - 1)
    with pytest.raises(ValueError, match="12 tokens do not fit into 11"):
        narrow(model.params, model.inputs.prompts, training_keys(np.arange(ROWS)), GREEDY)
