"""A baseline that OPSDC argues against: fine-tuning on the concise teacher's own samples.

The base model answers under the conciseness instruction, and the student learns to say the same at
the plain prompt: off-policy, -log q of the sampled tokens, a teacher that never changes. All else
is as in configs/tiny.py.

Command:   python scripts/train.py --config configs/tiny_sft.py --workdir runs/tiny_sft
Hardware:  2 CPU cores, 3 GiB of memory.
Time:      as configs/tiny.py, at most 5 minutes.
Expected:  about length and accuracy of the concise prompt, which is all there is to imitate: 37.1 ±
           6.6% fewer tokens at 83.6 ± 6.0%, the prompt 37.4% at 82.9% (docs/reproduction.md).
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))
    config = tiny["get_config"]()
    config.sampler.policy = "teacher"
    config.teacher.every = 0
    config.loss.divergence = "nll"
    # Its gradients are noisier than a whole distribution's; other rates: docs/LOG.md.
    config.optim.lr = 5e-5
    return config
