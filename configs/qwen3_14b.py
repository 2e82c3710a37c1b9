"""Qwen3-14B on DAPO-Math-17k, the paper's settings.

Command:   python scripts/train.py --config configs/qwen3_14b.py --workdir runs/qwen3_14b
Hardware:  about 325 GB of accelerator memory over all devices for the float32 student, its AdamW
           moments and gradients, and the bf16 teacher (22 bytes a parameter), and room for
           activations and the KV cache of 32 rollouts of 1,024 + 8,192 tokens. Not yet run on any.
           Attention is dense: where it does not fit, lower train.micro_batch_size and
           sampler.max_response_tokens (the paper still saw -29.8% with rollouts of 1,024 tokens).
Time:      not measured; most of it is sampling.
Expected:  the paper reports, at a budget of 30,000 tokens, 56.3% fewer tokens on MATH-500 at
           96.3% (base 93.0%), and 37.5% fewer on AIME 2024 at 73.8% (base 75.0%). Not yet
           reproduced with this code.
"""

from ml_collections import ConfigDict

from opsdc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.path = "Qwen/Qwen3-14B"
    return config
