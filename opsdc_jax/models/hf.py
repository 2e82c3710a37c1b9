"""Hugging Face model folders: where they are, their config.json, their tokenizer."""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

# transformers would advise to install torch, of which its tokenizers need nothing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
import transformers

from opsdc_jax import tiny
from opsdc_jax.config import InputError
from opsdc_jax.files import read_json, write_json
from opsdc_jax.models import weights
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.models.rope import Yarn

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Weights, configuration and tokenizer; no code, and none of the pickled formats.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
_PLAIN_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)
_MOST_LAYERS = 1000  # each is named, one by one, where the weights are checked
_LARGEST = 2**31 - 1  # of every other size
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_GENERATION = "generation_config.json"
_YARN_FIELDS = tuple(field.name for field in dataclasses.fields(Yarn))


def resolve_folder(path: str) -> pathlib.Path:
    """The local folder of `config.model.path`.

    Args:
      path: a folder; a hub id such as "Qwen/Qwen3-8B" or "Qwen/Qwen3-8B@REVISION", which is
        downloaded or found in the local cache (HF_HUB_OFFLINE=1 forbids the download); or "tiny" or
        "tiny_hard", the base models shipped with the package.

    Raises:
      InputError: neither a folder nor a hub id that can be had.
    """
    folder = tiny.BASE_FOLDERS.get(path) or pathlib.Path(path)
    if path and os.path.isdir(folder):  # which no name upsets, however long
        return folder
    if not _HUB_ID.fullmatch(path):
        raise InputError(
            f"model.path={path[:200]!r} is neither a folder nor a hub id: give the folder of a "
            "model, OWNER/NAME, or tiny"
        )
    repository, _, revision = path.partition("@")
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_HUB_FILES
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"model.path={path!r} is no folder here and cannot be had from the hub: "
            f"{_reason(error)}"
        ) from None
    return pathlib.Path(snapshot)


def _reason(error: Exception) -> str:
    """The first line of a library's message, cut."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def load_config(
    folder: str | pathlib.Path,
    compute_dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
) -> Qwen3Config:
    """Reads the architecture from `folder`/config.json.

    Args:
      compute_dtype, remat, attention: how to compute it, see `Qwen3Config`.

    Raises:
      InputError: the file is missing or damaged, or describes another model.
    """
    path = pathlib.Path(folder) / "config.json"
    raw = read_json(path)
    # transformers 5 writes rope_parameters; published folders say rope_theta and rope_scaling,
    # which wins where a folder holds both.
    rope: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key) or {}, dict):
            raise InputError(f"{path} holds {key}={raw[key]!r}, which is no object")
        given = dict(raw.get(key) or {})
        if "type" in given:  # the old word: beside rope_parameters it must win all the same
            given.setdefault("rope_type", given.pop("type"))
        rope |= given
    _refuse_unsupported(raw, rope, path)
    missing = [name for name in _PLAIN_FIELDS if name not in raw]
    if rope["rope_theta"] is None:
        missing.append("rope_theta")
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}")
    wrong = [f"{n}={raw[n]!r}" for n in _PLAIN_FIELDS if not _is_possible(n, raw[n])]
    if not _is_positive(rope["rope_theta"]):
        wrong.append(f"rope_theta={rope['rope_theta']!r}")
    if wrong:
        raise InputError(f"{path} holds {', '.join(wrong)}: no such model can be")
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    if heads % kv_heads:
        raise InputError(f"{path}: num_key_value_heads={kv_heads} does not divide {heads} heads")
    yarn = None
    if _rope_type(rope) == "yarn":
        given = {name: rope[name] for name in _YARN_FIELDS if rope.get(name) is not None}
        wrong = [f"{name}={value!r}" for name, value in given.items() if not _is_positive(value)]
        if wrong:
            raise InputError(f"{path}: yarn needs positive numbers, not {', '.join(wrong)}")
        try:
            yarn = Yarn(**given)
        except TypeError:
            raise InputError(
                f"{path}: yarn needs factor and original_max_position_embeddings"
            ) from None
    return Qwen3Config(
        rope_theta=float(rope["rope_theta"]),
        yarn=yarn,
        compute_dtype=compute_dtype,
        remat=remat,
        attention=attention,
        **{name: raw[name] for name in _PLAIN_FIELDS},
    )


def _is_possible(name: str, value: Any) -> bool:
    """Whether a field of config.json can have this value."""
    if name == "tie_word_embeddings":
        return isinstance(value, bool)
    if name == "rms_norm_eps":
        return isinstance(value, float) and 0 < value < 1
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    most = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
    return 0 < value <= most and not (name == "head_dim" and value % 2)  # rotated in pairs


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", "default")


def _refuse_unsupported(
    raw: Mapping[str, Any], rope: Mapping[str, Any], path: pathlib.Path
) -> None:
    """Names whatever would make the dense Qwen3 forward pass a different model."""
    problems = []
    if raw.get("model_type") != "qwen3":
        problems.append(f"model_type is {raw.get('model_type')!r}, supported is 'qwen3' (dense)")
    if _rope_type(rope) not in ("default", "yarn"):
        problems.append(f"rope type {_rope_type(rope)!r} is not supported: default and yarn are")
    unknown = rope.keys() - {"rope_theta", "rope_type", "truncate", *_YARN_FIELDS}
    if unknown or rope.get("truncate") is False:
        problems.append(f"rope settings {sorted(unknown) or 'truncate=false'} are not supported")
    if raw.get("quantization_config"):
        problems.append("the weights are quantised: use the bf16 or fp32 folder")
    for flag in ("use_sliding_window", "attention_bias"):
        if raw.get(flag):
            problems.append(f"{flag} is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {raw['hidden_act']!r}, supported is 'silu'")
    if problems:
        raise InputError(f"{path}: " + "; ".join(problems))


def check_vocabulary(tokenizer: Any, config: Qwen3Config) -> None:
    """Refuses a tokenizer with more entries than the model has embedding rows."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} entries, the embedding {config.vocab_size} rows: "
            "take both from the same model"
        )
    if hasattr(tokenizer, "get_vocab"):
        largest = max(tokenizer.get_vocab().values())
        if largest >= len(tokenizer):  # sampling and loss would leave the last ones out
            raise InputError(
                f"the tokenizer has {len(tokenizer)} entries, but ids up to {largest}: use one "
                "without gaps"
            )


def load_tokenizer(folder: str | pathlib.Path) -> Any:
    """The folder's fast tokenizer.

    Raises:
      InputError: there is none, or it names no end-of-sequence or padding token.
    """
    if not any((pathlib.Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make up an empty one from config.json.
        raise InputError(f"{folder} holds no {_TOKENIZER_FILES[0]}: take a folder with a tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exceptions on bad files
        raise InputError(
            f"{folder}: the tokenizer cannot be loaded ({_reason(error)}): download it again"
        ) from None
    for role in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, role) is None:
            raise InputError(f"{folder}: the tokenizer has no {role}")
    return tokenizer


def generation_settings(folder: str | pathlib.Path) -> dict[str, Any]:
    """What the folder's generation_config.json holds; nothing if there is none.

    Raises:
      InputError: it is damaged.
    """
    path = pathlib.Path(folder) / _GENERATION
    return read_json(path) if path.exists() else {}


def stop_token_ids(folder: str | pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids at which a response ends: the tokenizer's EOS and those of generation_config.json.

    Raises:
      InputError: the folder's files disagree, so that one side would never see the other's end.
    """
    path = pathlib.Path(folder) / _GENERATION
    listed = generation_settings(folder).get("eos_token_id")
    eos = int(tokenizer.eos_token_id)
    ids = [eos] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(token) is int and 0 <= token <= _LARGEST for token in ids):
        raise InputError(
            f"{path} holds eos_token_id={listed!r}: give one token id or a list of them"
        )
    if eos not in ids:
        raise InputError(
            f"{path} ends responses at {ids}, the tokenizer at {eos} ({tokenizer.eos_token}): take "
            "both from the same model"
        )
    return tuple(dict.fromkeys([eos, *ids]))


def save_folder(
    folder: str | pathlib.Path,
    params: Params,
    config: Qwen3Config,
    *,
    eos_token_ids: list[int],
    pad_token_id: int,
    dtype: str = "float32",
    shard_bytes: int = weights.SHARD_BYTES,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, generation_config.json and the safetensors files.

    Args:
      eos_token_ids: ids at which generation stops, the tokenizer's own EOS first.
      dtype: of the tensors in the files, "float32" or "bfloat16".
      shard_bytes: size at which the weights are cut into several files.
      generation: further settings for generation_config.json, such as temperature and top_p.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save_params(folder, params, config, dtype=dtype, shard_bytes=shard_bytes)
    write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **{name: getattr(config, name) for name in _PLAIN_FIELDS},
            **_rope_json(config),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "dtype": dtype,
            "eos_token_id": eos_token_ids[0],
            "pad_token_id": pad_token_id,
        },
    )
    write_json(
        folder / _GENERATION,
        {
            "do_sample": True,
            **(generation or {}),
            "eos_token_id": eos_token_ids,
            "pad_token_id": pad_token_id,
        },
    )


def _rope_json(config: Qwen3Config) -> dict[str, Any]:
    """RoPE in the words of published folders and in those of transformers 5, side by side."""
    scaling = None
    if config.yarn is not None:
        given = dataclasses.asdict(config.yarn).items()
        scaling = {"rope_type": "yarn"} | {k: v for k, v in given if v is not None}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": config.rope_theta,
        },
    }
