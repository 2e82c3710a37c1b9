"""Architectures by name, for plans, benchmarks and tests: no download, random weights."""

from collections.abc import Mapping

from opsdc_jax.models.layers import Qwen3Config


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool) -> Qwen3Config:
    """A published dense Qwen3: 8 key/value heads of width 128 and 151,936 embedding rows."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


SHAPES: Mapping[str, Qwen3Config] = {
    "qwen3_0p6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3_1p7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3_8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3_14b": _qwen3(5120, 17_408, 40, 40, tied=False),
    "qwen3_32b": _qwen3(5120, 25_600, 64, 64, tied=False),
}


def _small(
    layers: int, hidden: int, heads: int, head_dim: int, mlp: int, vocab: int
) -> Qwen3Config:
    """Two query heads to a key/value head, tied embeddings."""
    return Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        tie_word_embeddings=True,
    )


BENCHMARK_SHAPES: Mapping[str, Qwen3Config] = {
    "tiny": _small(4, 128, 4, 32, 384, 256),
    "small": _small(8, 512, 8, 64, 1536, 8192),
    "v152k": _small(4, 512, 8, 64, 1536, 151_936),
    "q06": SHAPES["qwen3_0p6b"],
}
"""What scripts/bench_sampler.py and bench_train.py measure, small enough for a CPU."""
