"""Hugging Face folders: what is written, what is read back, and what is refused."""

import dataclasses
import json
import re
import types

import hf_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from opsdc_jax.config import InputError
from opsdc_jax.models import hf, qwen3, weights
from opsdc_jax.models.rope import Yarn
from opsdc_jax.tiny.tokenizer import build_tokenizer

NAMES = tuple(hf_reference.CASES)
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
YARN = hf_reference.CASES["untied"].yarn
MLP_NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """The untied model, as a published folder."""
    return hf_reference.write_folder(tmp_path / "model", "untied")


def save(folder, name, **overrides):
    model = hf_reference.load(name)
    options = {"eos_token_ids": [7, 5], "pad_token_id": 5} | overrides
    hf.save_folder(folder, model.params, model.config, **options)
    return folder


def assert_same_params(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


def rewrite_config(folder, changes=None, without=()):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | (changes or {})
    path.write_text(json.dumps({key: raw[key] for key in raw if key not in without}))


def rewrite_tensors(folder, change):
    """Applies `change` to the dict of tensors in the folder's file."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def shard(folder):
    """Splits the folder's file in two, with an index; the layers are cut in the middle."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder):
    return weights.load_params(folder, hf.load_config(folder))


# --- reading and writing ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_is_read_by_transformers(tmp_path, name):
    read = transformers.AutoConfig.from_pretrained(save(tmp_path, name))
    assert isinstance(read, transformers.Qwen3Config)
    for field, value in hf_reference.CASES[name].architecture.items():
        if field != "rope_theta":
            assert getattr(read, field) == value, field
    theta = hf_reference.CASES[name].architecture["rope_theta"]
    assert read.rope_parameters["rope_theta"] == theta
    assert read.rope_parameters["rope_type"] == "default"
    assert (read.eos_token_id, read.pad_token_id) == (7, 5)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.pad_token_id) == ([7, 5], 5)


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(tmp_path, name):
    """Both places of rope_theta: published folders and ours."""
    published = hf.load_config(hf_reference.write_folder(tmp_path / "published", name))
    assert (
        dataclasses.asdict(published).items()
        >= {
            field: value
            for field, value in hf_reference.CASES[name].architecture.items()
            if field in {one.name for one in dataclasses.fields(published)}
        }.items()
    )
    assert hf.load_config(save(tmp_path / "ours", name)) == published


def test_how_to_compute_is_no_part_of_a_folder(tmp_path):
    """A model trained in bfloat16 with remat is saved as the architecture it is."""
    model = hf_reference.load("tied")
    config = dataclasses.replace(model.config, compute_dtype="bfloat16", remat="full")
    hf.save_folder(tmp_path, model.params, config, eos_token_ids=[7], pad_token_id=5)
    assert (
        not {"compute_dtype", "remat"} & json.loads((tmp_path / "config.json").read_text()).keys()
    )
    assert hf.load_config(tmp_path) == model.config


def test_config_written_by_transformers_is_read(tmp_path):
    transformers.Qwen3Config(**hf_reference.CASES["tied"].architecture).save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert hf.load_config(tmp_path) == hf_reference.load("tied").config


@pytest.mark.parametrize("name", NAMES)
def test_yarn_is_read_and_saved(tmp_path, name):
    """In both places where folders have it; transformers reads ours as the original."""
    plain = hf_reference.load(name)
    settings = hf_reference.CASES[name].yarn
    theta = {"rope_theta": plain.config.rope_theta}
    fields = {key: value for key, value in settings.items() if key != "rope_type"}
    expected = dataclasses.replace(plain.config, yarn=Yarn(**fields))
    folder = hf_reference.write_folder(tmp_path / "published", name)
    rewrite_config(folder, {"rope_scaling": settings})
    assert hf.load_config(folder) == expected
    rewrite_config(
        folder, {"rope_parameters": settings | theta}, without=["rope_theta", "rope_scaling"]
    )
    assert hf.load_config(folder) == expected
    hf.save_folder(tmp_path, plain.params, expected, eos_token_ids=[7], pad_token_id=5)
    assert hf.load_config(tmp_path) == expected
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters.items() >= (settings | theta).items()
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["rope_theta"] == plain.config.rope_theta  # what older readers look for
    assert raw["rope_scaling"].items() >= settings.items()


@pytest.mark.parametrize("name", NAMES)
def test_float32_round_trip_is_exact(tmp_path, name):
    model = hf_reference.load(name)
    assert_same_params(weights.load_params(save(tmp_path, name), model.config), model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_are_the_original_ones(tmp_path, name):
    """Names, shapes and values of the file, with the package having read another file."""
    saved = safetensors.numpy.load_file(save(tmp_path, name) / "model.safetensors")
    original = hf_reference.weights(name)
    assert saved.keys() == original.keys()
    for tensor, value in original.items():
        np.testing.assert_array_equal(saved[tensor], value, err_msg=tensor)


def test_save_takes_jax_arrays(tmp_path):
    """As training holds them."""
    model = hf_reference.load("tied")
    on_device = jax.tree.map(jnp.asarray, model.params)
    hf.save_folder(tmp_path, on_device, model.config, eos_token_ids=[7], pad_token_id=5)
    assert_same_params(load(tmp_path), model.params)


def test_bfloat16_save_rounds_once(tmp_path):
    model = hf_reference.load("untied")
    save(tmp_path, "untied", dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), model.params)
    assert_same_params(load(tmp_path), rounded)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.6 * (save(tmp_path / "f32", "untied") / "model.safetensors").stat().st_size
    assert str(transformers.AutoConfig.from_pretrained(tmp_path).dtype).endswith("bfloat16")


def test_sharded_folder_is_read(folder):
    shard(folder)
    assert_same_params(load(folder), hf_reference.load("untied").params)


def test_saving_over_a_sharded_folder_replaces_its_weights(folder):
    """What is read afterwards is what was saved, not the shards that lay there."""
    shard(folder)
    model = hf_reference.load("untied")
    halved = jax.tree.map(lambda leaf: leaf / 2, model.params)
    hf.save_folder(folder, halved, model.config, eos_token_ids=[7], pad_token_id=5)
    assert_same_params(load(folder), halved)


def test_a_tied_folder_may_repeat_the_head(tmp_path):
    folder = hf_reference.write_folder(tmp_path, "tied")
    rewrite_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].copy()})
    )
    assert_same_params(load(folder), hf_reference.load("tied").params)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_our_folder(tmp_path, name):
    """Live only: from_pretrained finds every weight, and computes our logits."""
    pytest.importorskip("torch")
    model = hf_reference.load(name)
    torch_model, report = transformers.Qwen3ForCausalLM.from_pretrained(
        save(tmp_path, name),
        attn_implementation="eager",
        dtype="float32",
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    given = model.inputs
    theirs = hf_reference.torch_logits(
        torch_model.eval(), given.tokens, given.valid, given.positions
    )[given.valid]
    hidden = qwen3.forward(
        model.params,
        model.config,
        given.tokens,
        positions_BxT=given.positions,
        valid_BxT=given.valid,
    )
    ours = np.asarray(hidden @ qwen3.unembedding(model.params).T)[given.valid]
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shard_size", [None, "20KB"], ids=["one file", "several"])
def test_folders_written_by_transformers_are_read(tmp_path, name, shard_size):
    """Live only: one file, and several."""
    pytest.importorskip("torch")
    options = {"max_shard_size": shard_size} if shard_size else {}
    hf_reference.torch_model(name).save_pretrained(tmp_path, **options)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 if shard_size else len(files) == 1
    assert hf.load_config(tmp_path) == hf_reference.load(name).config
    assert_same_params(load(tmp_path), hf_reference.load(name).params)


# --- refusals: one sentence that names the culprit ----------------------------------------------


def refused(message):
    return pytest.raises(InputError, match=re.escape(message))


@pytest.mark.parametrize("sharded", [False, True])
def test_missing_tensor(folder, sharded):
    rewrite_tensors(folder, lambda tensors: tensors.pop(MLP_NAME))
    if sharded:
        shard(folder)
    with refused(f"missing tensor {MLP_NAME}"):
        load(folder)


def test_missing_head_of_an_untied_model(folder):
    """It is never replaced by the embedding."""
    rewrite_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with refused("missing tensor lm_head.weight"):
        load(folder)


@pytest.mark.parametrize(
    "extra", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_unexpected_tensor(folder, extra):
    rewrite_tensors(folder, lambda tensors: tensors.update({extra: np.ones(3, np.float32)}))
    with refused(f"unexpected tensor {extra}"):
        load(folder)


@pytest.mark.parametrize("change", [lambda x: x.T, lambda x: x[:-1], lambda x: x.reshape(-1)])
def test_wrong_shape(folder, change):
    """A transposed matrix holds as many numbers, and is refused all the same."""

    def reshape(tensors):
        tensors[MLP_NAME] = np.ascontiguousarray(change(tensors[MLP_NAME]))

    rewrite_tensors(folder, reshape)
    with refused(MLP_NAME):
        load(folder)


def test_all_problems_are_named_at_once(folder):
    def spoil(tensors):
        tensors["model.extra"] = tensors.pop(MLP_NAME)
        tensors["model.norm.weight"] = np.ones(3, np.float32)

    rewrite_tensors(folder, spoil)
    with pytest.raises(InputError) as raised:
        load(folder)
    for name in ("model.extra", MLP_NAME, "model.norm.weight"):
        assert name in str(raised.value)


@pytest.mark.parametrize("keep", [0.5, 0.0], ids=["half", "nothing"])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with refused("model.safetensors cannot be read"):
        load(folder)


def test_missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with refused("model-00002-of-00002.safetensors"):
        load(folder)


@pytest.mark.parametrize("content", ["{}", "[]", "not json"])
def test_damaged_index(folder, content):
    shard(folder)
    (folder / INDEX).write_text(content)
    with refused(INDEX):
        load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with refused("model.safetensors"):
        load(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with refused("config.json does not exist"):
        hf.load_config(folder)


@pytest.mark.parametrize("content", [b"", b"{'a': 1}", b"[1, 2]", b"\xff\xfe\x00"])
def test_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with refused("config.json"):
        hf.load_config(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        (  # where both are given, transformers obeys rope_scaling
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "longrope", "factor": 4.0},
            },
            "longrope",
        ),
        (  # it would have to be guessed from max_position_embeddings
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "mscale"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_other_architectures_are_refused(folder, changes, named):
    rewrite_config(folder, changes)
    with refused(named):
        hf.load_config(folder)


def test_model_type_missing(folder):
    rewrite_config(folder, without=["model_type"])
    with refused("model_type"):
        hf.load_config(folder)


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",  # transformers' default is not that of the published models
    ],
)
def test_missing_architecture_field(folder, field):
    rewrite_config(folder, without=[field])
    with refused(field):
        hf.load_config(folder)


def test_heads_must_share_keys_evenly(folder):
    rewrite_config(folder, {"num_key_value_heads": 4})
    with refused("num_key_value_heads"):
        hf.load_config(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_parameters": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 3, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ],
    ids=repr,
)
def test_every_spelling_of_default_rope(folder, changes):
    rewrite_config(folder, changes)
    assert hf.load_config(folder) == hf_reference.load("untied").config


def test_a_2507_variant_is_read(folder):
    """Qwen3-*-2507: a longer context and another base of the rotary angles, nothing else."""
    rewrite_config(
        folder, {"rope_theta": 5_000_000, "rope_scaling": None, "max_position_embeddings": 262_144}
    )
    config = hf.load_config(folder)
    assert config.rope_theta == 5e6
    assert config.max_position_embeddings == 262_144
    assert config.yarn is None


def test_missing_folder(tmp_path):
    with refused("nowhere"):
        hf.resolve_folder(str(tmp_path / "nowhere"))
    assert hf.resolve_folder(str(tmp_path)) == tmp_path


# --- tokenizer and stop ids ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"eos_token_id": 9}, (9,)),
        ({"eos_token_id": [9, 4]}, (9, 4)),
        ({"eos_token_id": [4, 9, 3]}, (9, 4, 3)),
        ({"eos_token_id": None}, (9,)),
        ({"eos_token_id": [0, 9]}, (9, 0)),
        ({}, (9,)),
        (None, (9,)),
    ],
)
def test_stop_token_ids(tmp_path, listed, expected):
    """The tokenizer's own EOS first, then what generation_config.json adds, each once."""
    if listed is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(listed))
    tokenizer = types.SimpleNamespace(eos_token_id=9)
    assert hf.stop_token_ids(tmp_path, tokenizer) == expected


def test_generation_settings_are_kept(tmp_path):
    model = hf_reference.load("tied")
    given = {"temperature": 0.6, "top_k": 20, "eos_token_id": 1}
    hf.save_folder(
        tmp_path, model.params, model.config, eos_token_ids=[7, 3], pad_token_id=5, generation=given
    )
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "eos_token_id": [7, 3],
        "pad_token_id": 5,
    }


def test_files_that_disagree_on_the_end_are_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    tokenizer = types.SimpleNamespace(eos_token_id=9, eos_token="<end>")
    with refused("ends responses at [1, 2], the tokenizer at 9 (<end>)"):
        hf.stop_token_ids(tmp_path, tokenizer)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer = build_tokenizer()
    config = hf_reference.load("tied").config
    with refused(f"has {len(tokenizer)} entries, the embedding {config.vocab_size} rows"):
        hf.check_vocabulary(tokenizer, config)
    hf.check_vocabulary(tokenizer, dataclasses.replace(config, vocab_size=len(tokenizer)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 0},
        {"hidden_size": "40"},
        {"num_hidden_layers": None},
        {"head_dim": -8},
    ],
)
def test_impossible_architectures_are_refused(folder, changes):
    rewrite_config(folder, changes)
    with refused(next(iter(changes))):
        hf.load_config(folder)


def test_duplicate_and_misplaced_tensors_are_named(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first, second = sorted(set(listed["weight_map"].values()))
    tensors = safetensors.numpy.load_file(folder / second)
    moved = next(iter(safetensors.numpy.load_file(folder / first)))
    tensors[moved] = safetensors.numpy.load_file(folder / first)[moved]
    safetensors.numpy.save_file(tensors, folder / second)
    with refused(f"duplicate tensor {moved} in {first} and {second}"):
        load(folder)


def test_an_index_that_leaves_the_folder_is_refused(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = next(iter(listed["weight_map"]))
    listed["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(listed))
    with refused("outside the folder"):
        load(folder)


def test_float16_files_are_read_exactly(folder):
    half = {}

    def to_half(tensors):
        half.update({name: value.astype(np.float16) for name, value in tensors.items()})
        tensors.update(half)

    rewrite_tensors(folder, to_half)
    params = load(folder)
    expected = np.float32(half[EMBEDDING])
    assert params["embedding"].dtype == np.float32
    np.testing.assert_array_equal(params["embedding"], expected)
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"][1], np.float32(half[MLP_NAME]).T)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_files_come_back_bit_for_bit(tmp_path, name):
    """File -> parameters -> file, in the dtype of the file, also in several shards."""
    model = hf_reference.load(name)
    options = {"eos_token_ids": [7], "pad_token_id": 5, "dtype": "bfloat16"}
    hf.save_folder(tmp_path / "a", model.params, model.config, **options)
    params = weights.load_params(tmp_path / "a", model.config, dtype="bfloat16")
    hf.save_folder(tmp_path / "b", params, model.config, **options, shard_bytes=5000)
    again = weights.load_params(tmp_path / "b", model.config, dtype="bfloat16")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert left.dtype == right.dtype == "bfloat16"
        np.testing.assert_array_equal(
            np.asarray(left).view(np.uint16), np.asarray(right).view(np.uint16)
        )


def test_stop_token_ids_of_a_saved_folder(tmp_path):
    tokenizer = types.SimpleNamespace(eos_token_id=7)
    assert hf.stop_token_ids(save(tmp_path, "tied"), tokenizer) == (7, 5)


def test_load_tokenizer(tmp_path):
    with refused(str(tmp_path)):
        hf.load_tokenizer(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = hf.load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_tokenizer_without_a_role_is_refused(tmp_path, role):
    tokenizer = build_tokenizer()
    setattr(tokenizer, role, None)
    tokenizer.save_pretrained(tmp_path)
    with refused(f"{role}_id"):
        hf.load_tokenizer(tmp_path)
