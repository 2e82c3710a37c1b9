"""The embedded world: a synthetic reasoning task, its tokenizer, and the tiny base model."""

import pathlib

BASE_FOLDER = pathlib.Path(__file__).parent / "base"
"""Hugging Face folder of the base model, made by scripts/pretrain_tiny.py."""
