"""The embedded worlds: a synthetic reasoning task, its tokenizer, and the tiny base models."""

import pathlib
from collections.abc import Mapping

BASE_FOLDER = pathlib.Path(__file__).parent / "base"
"""Hugging Face folder of the base model, made by scripts/pretrain_tiny.py."""

BASE_FOLDERS: Mapping[str, pathlib.Path] = {
    "tiny": BASE_FOLDER,
    "tiny_hard": pathlib.Path(__file__).parent / "base_hard",
}
"""The shipped base models, by what `config.model.path` calls them."""
