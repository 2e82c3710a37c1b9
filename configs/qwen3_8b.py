"""Qwen3-8B on DAPO-Math-17k, the paper's settings.

Command:   python scripts/train.py --config configs/qwen3_8b.py --workdir runs/qwen3_8b
Hardware:  about 181 GB of accelerator memory over all devices for the float32 student, its AdamW
           moments and gradients, and the bf16 teacher (22 bytes a parameter), and room for
           activations and the KV cache of 32 rollouts of 1,024 + 8,192 tokens. Not yet run on any.
           Attention is dense: where it does not fit, lower train.micro_batch_size and
           sampler.max_response_tokens (the paper still saw -29.8% with rollouts of 1,024 tokens).
Time:      not measured; most of it is sampling.
Expected:  the paper reports, at a budget of 30,000 tokens, 56.9% fewer tokens on MATH-500 at an
           unchanged accuracy of 95.7%, and 32.9% fewer on AIME 2024 at 72.9% (base 76.2%). Not yet
           reproduced with this code.
"""

from ml_collections import ConfigDict

from opsdc_jax.config import default_config


def get_config() -> ConfigDict:
    return default_config()
