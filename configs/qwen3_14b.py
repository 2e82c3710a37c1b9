"""Qwen3-14B on DAPO-Math-17k, the paper's settings.

Command:   python scripts/train.py --config configs/qwen3_14b.py --workdir runs/qwen3_14b
Hardware:  a TPU slice v5e:4x8, of whose 15.75 GiB a chip it takes 14.77 at the peak, if the
           command goes on with --config.mesh.tensor=2 --config.eval.batch_size=16
           --config.train.micro_batch_size=16. `python scripts/plan.py --config
           configs/qwen3_14b.py --topology v5e:4x8` and the same shows it without a TPU. Other
           slices and what they take: docs/hardware.md. Not yet run on any.
Time:      at least 53 s a step there, if every rollout uses its budget: the bound of
           docs/hardware.md. Not measured.
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
