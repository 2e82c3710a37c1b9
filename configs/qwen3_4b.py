"""Qwen3-4B on DAPO-Math-17k, the paper's settings for 8B and 14B.

Command:   python scripts/train.py --config configs/qwen3_4b.py --workdir runs/qwen3_4b
Hardware:  about 88 GB of accelerator memory over all devices for the float32 student, its AdamW
           moments and gradients, and the bf16 teacher (22 bytes a parameter), and room for
           activations and the KV cache of 32 rollouts of 1,024 + 8,192 tokens. Not yet run on any.
           Attention is dense: where it does not fit, lower train.micro_batch_size and
           sampler.max_response_tokens (the paper still saw -29.8% with rollouts of 1,024 tokens).
Time:      not measured; most of it is sampling.
Expected:  the paper has no result for this size.
"""

from ml_collections import ConfigDict

from opsdc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.path = "Qwen/Qwen3-4B"
    return config
