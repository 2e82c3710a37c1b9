"""Qwen3-8B on DAPO-Math-17k, the paper's settings.

Command:   python scripts/train.py --config configs/qwen3_8b.py --workdir runs/qwen3_8b
Hardware:  a TPU slice v5e:4x4, of whose 15.75 GiB a chip it takes 13.75 at the peak, if the
           command goes on with --config.optim.offload=True --config.train.micro_batch_size=16.
           `python scripts/plan.py --config configs/qwen3_8b.py --topology v5e:4x4` and the same
           shows it without a TPU. Other slices and what they take: docs/hardware.md. Not yet run
           on any.
Time:      at least 44 s a step there, if every rollout uses its budget: the bound of
           docs/hardware.md. Not measured.
Expected:  the paper reports, at a budget of 30,000 tokens, 56.9% fewer tokens on MATH-500 at an
           unchanged accuracy of 95.7%, and 32.9% fewer on AIME 2024 at 72.9% (base 76.2%). Not yet
           reproduced with this code.
"""

from ml_collections import ConfigDict

from opsdc_jax.config import default_config


def get_config() -> ConfigDict:
    return default_config()
