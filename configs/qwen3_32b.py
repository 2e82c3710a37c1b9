"""Qwen3-32B on DAPO-Math-17k, the paper's settings for 8B and 14B.

Command:   python scripts/train.py --config configs/qwen3_32b.py --workdir runs/qwen3_32b
Hardware:  a TPU slice v6e:4x8, of whose 31.24 GiB a chip it takes 29.55 at the peak, if the
           command goes on with --config.mesh.tensor=2 --config.eval.batch_size=16
           --config.train.micro_batch_size=16. `python scripts/plan.py --config
           configs/qwen3_32b.py --topology v6e:4x8` and the same shows it without a TPU. Other
           slices and what they take: docs/hardware.md. Not yet run on any.
Time:      at least 51 s a step there, if every rollout uses its budget: the bound of
           docs/hardware.md. Not measured.
Expected:  the paper has no result for this size.
"""

from ml_collections import ConfigDict

from opsdc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.path = "Qwen/Qwen3-32B"
    return config
