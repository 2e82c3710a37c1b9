"""Two tiny Qwen3 models made from seeded numpy, and what transformers + torch compute with them.

Weights and inputs are never stored: `weights` and `inputs` rebuild them bit for bit anywhere. What
transformers makes of them is stored in tests/golden (by make_golden.py) and, where torch is
installed, computed anew: `reference` gives either. Only `live` and `torch_model` import torch.
"""

import copy
import functools
import hashlib
import json
import pathlib
import tempfile
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from opsdc_jax.models import hf
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.models.weights import load_params

GOLDEN = pathlib.Path(__file__).parent / "golden"
PROVENANCE = GOLDEN / "provenance.json"
SOURCES = ("golden", "live")
PAD_ID = 0
NEW_TOKENS = 64
PROMPT_WIDTH = 12

COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "max_position_embeddings": 512,
}


class Case(NamedTuple):
    """A tiny model.

    Attributes:
      architecture: its config.json.
      entries: of its tokenizer; the embedding has more rows.
      stop_ids: met by some of the greedy responses.
      yarn: rope_scaling of a second reading of the same weights.
    """

    architecture: dict[str, Any]
    entries: int
    stop_ids: tuple[int, int]
    yarn: dict[str, Any]


# No two widths of a model are equal, and no product of heads and head width equals another width.
CASES = {
    "tied": Case(
        COMMON
        | {
            "vocab_size": 80,
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
        entries=73,
        stop_ids=(5, 6),
        yarn={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    ),
    "untied": Case(
        COMMON
        | {
            "vocab_size": 96,
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": False,
        },
        entries=89,
        stop_ids=(5, 6),
        yarn={
            "rope_type": "yarn",
            "factor": 2.5,
            "original_max_position_embeddings": 200,
            "beta_fast": 20.0,
            "beta_slow": 0.5,
            "attention_factor": 1.3,
        },
    ),
}


def weights(name: str) -> dict[str, np.ndarray]:
    """All tensors under their names in the file, [out, in], float32, each from a seed of its own.

    Norm scales are U(0.5, 1.5). Matrices are uniform with a gain of 2.5, embedding and head have a
    standard deviation of 0.5: logits are of order 1 to 10 and every tensor shows in them.
    """
    architecture = CASES[name].architecture
    D, F, V, H, N, K = (
        architecture[key]
        for key in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
    }
    if not architecture["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(architecture["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (D,),
            f"{prefix}.self_attn.q_proj.weight": (H * K, D),
            f"{prefix}.self_attn.k_proj.weight": (N * K, D),
            f"{prefix}.self_attn.v_proj.weight": (N * K, D),
            f"{prefix}.self_attn.o_proj.weight": (D, H * K),
            f"{prefix}.self_attn.q_norm.weight": (K,),
            f"{prefix}.self_attn.k_norm.weight": (K,),
            f"{prefix}.post_attention_layernorm.weight": (D,),
            f"{prefix}.mlp.gate_proj.weight": (F, D),
            f"{prefix}.mlp.up_proj.weight": (F, D),
            f"{prefix}.mlp.down_proj.weight": (D, F),
        }
    tensors = {}
    for tensor, shape in shapes.items():
        uniform = _random(f"{name} {tensor}").random_sample(shape)
        if len(shape) == 1:
            value = 0.5 + uniform
        else:
            deviation = 0.5 if shape[0] == V else 2.5 / np.sqrt(shape[1])
            value = (2 * uniform - 1) * deviation * np.sqrt(3)
        tensors[tensor] = value.astype(np.float32)
    return tensors


class Inputs(NamedTuple):
    """What the models are asked.

    Attributes:
      tokens, valid: [4, 20], padded on the left; ids beyond the tokenizer's entries occur.
      positions: 0, 1, 2, ... at each row's real tokens.
      stretched: rising by 1 to 4 from token to token, so that rotary positions must be obeyed.
      prompts: 16 lists of 1 to 12 ids for decoding.
    """

    tokens: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    stretched: np.ndarray
    prompts: list[list[int]]


def inputs(name: str) -> Inputs:
    case, random = CASES[name], _random(f"{name} inputs")
    rows, width = 4, 20
    tokens = random.randint(0, case.architecture["vocab_size"], (rows, width))
    valid = np.arange(width) >= np.array([0, 3, 9, 19])[:, None]
    steps = random.randint(1, 5, (rows, width))
    prompts = [
        random.randint(0, case.entries, 1 + row % PROMPT_WIDTH).tolist() for row in range(16)
    ]
    return Inputs(
        tokens=np.where(valid, tokens, PAD_ID).astype(np.int32),
        valid=valid,
        positions=np.maximum(np.cumsum(valid, 1) - 1, 0).astype(np.int32),
        stretched=np.cumsum(steps * valid, 1).astype(np.int32),
        prompts=prompts,
    )


def _random(name: str) -> np.random.RandomState:
    """numpy's frozen generator, of which only integers and uniform doubles are used."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def digest(name: str) -> str:
    """Fingerprint of weights and inputs: a golden file belongs to one of them."""
    case, given = CASES[name], inputs(name)
    sha = hashlib.sha256(
        json.dumps(case.architecture | case.yarn | {"prompts": given.prompts}).encode()
    )
    for array in (*given[:-1], *weights(name).values()):
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def write_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A folder as published Qwen3 models have it, written without the package's help."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[name].architecture))
    safetensors.numpy.save_file(weights(name), folder / "model.safetensors")
    return folder


class Model(NamedTuple):
    """A tiny model as the package loads it; the parameters as numpy."""

    config: Qwen3Config
    params: Params
    entries: int
    inputs: Inputs
    stop_ids: tuple[int, int]


@functools.cache
def load(name: str) -> Model:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(pathlib.Path(folder), name)
        config = hf.load_config(path)
        params = jax.tree.map(np.asarray, load_params(path, config))
    return Model(config, params, case.entries, inputs(name), case.stop_ids)


def reference(name: str, source: str) -> dict[str, np.ndarray]:
    """What transformers computes: stored ("golden"), or now ("live", skips where torch is absent).

    Returns:
      logits, stretched_logits: [4, 20, V] float32 of `Inputs.tokens` at both kinds of positions.
      yarn_logits: at the stretched positions, with the case's rope_scaling.
      greedy: [16, 64] ids of greedy decoding that nothing stops.
      stopped: the same with the case's stop ids; PAD_ID after a stop.
    """
    if source == "live":
        pytest.importorskip("torch")
        return live(name)
    made_for = json.loads(PROVENANCE.read_text())["cases"][name]["digest"]
    assert made_for == digest(name), "weights or inputs changed: run tests/make_golden.py again"
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return dict(stored)


@functools.cache
def live(name: str) -> dict[str, np.ndarray]:
    model, given = torch_model(name), inputs(name)
    greedy, margin = torch_greedy(model, name, stop=False)
    stopped, _ = torch_greedy(model, name, stop=True)
    return {
        "logits": torch_logits(model, given.tokens, given.valid, given.positions),
        "stretched_logits": torch_logits(model, given.tokens, given.valid, given.stretched),
        "yarn_logits": torch_logits(
            torch_model(name, rope_scaling=CASES[name].yarn),
            given.tokens,
            given.valid,
            given.stretched,
        ),
        "greedy": greedy,
        "stopped": stopped,
        "smallest_margin": np.float32(margin),
    }


def torch_model(name: str, **changes: Any) -> Any:
    """transformers' model with our weights, float32, eager attention.

    Args:
      changes: of config.json.
    """
    import torch
    from transformers import Qwen3Config as TransformersConfig
    from transformers import Qwen3ForCausalLM

    config = TransformersConfig(**(CASES[name].architecture | copy.deepcopy(changes)))
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager")
    model = model.to(torch.float32).eval()
    tensors = {key: torch.from_numpy(value) for key, value in weights(name).items()}
    result = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    assert not result.unexpected_keys
    assert result.missing_keys == ["lm_head.weight"] * config.tie_word_embeddings
    return model


def torch_logits(
    model: Any, tokens: np.ndarray, valid: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(valid).long(),
            position_ids=torch.from_numpy(positions).long(),
        )
    return out.logits.numpy()


def torch_greedy(model: Any, name: str, *, stop: bool) -> tuple[np.ndarray, float]:
    """Greedy ids [16, 64], and the smallest distance between the best two logits on the way."""
    import torch

    case, prompts = CASES[name], inputs(name).prompts
    padded = torch.full((len(prompts), PROMPT_WIDTH), PAD_ID)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    out = model.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(case.stop_ids) if stop else None,
        pad_token_id=PAD_ID,
        suppress_tokens=list(range(case.entries, case.architecture["vocab_size"])),
        output_scores=True,
        return_dict_in_generate=True,
    )
    best, second = torch.stack(out.scores).topk(2).values.unbind(-1)
    generated = out.sequences[:, PROMPT_WIDTH:].numpy().astype(np.int32)
    return generated, float((best - second).min())
