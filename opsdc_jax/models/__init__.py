"""Qwen3 in Flax NNX, and its weights in Hugging Face folders."""
