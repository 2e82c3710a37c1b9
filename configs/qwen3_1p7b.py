"""Qwen3-1.7B on DAPO-Math-17k, the paper's settings for 8B and 14B.

Command:   python scripts/train.py --config configs/qwen3_1p7b.py --workdir runs/qwen3_1p7b
Hardware:  a TPU slice v5e:2x2, of whose 15.75 GiB a chip it takes 14.36 at the peak, if the
           command goes on with --config.eval.batch_size=8. `python scripts/plan.py --config
           configs/qwen3_1p7b.py --topology v5e:2x2` and the same shows it without a TPU. Other
           slices and what they take: docs/hardware.md. Not yet run on any.
Time:      at least 64 s a step there, if every rollout uses its budget: the bound of
           docs/hardware.md. Not measured.
Expected:  the paper has no result for this size.
"""

from ml_collections import ConfigDict

from opsdc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.path = "Qwen/Qwen3-1.7B"
    return config
