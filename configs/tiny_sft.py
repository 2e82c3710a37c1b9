"""A baseline that OPSDC argues against: fine-tuning on the concise teacher's own samples.

The base model answers under the conciseness instruction, and the student learns to say the same at
the plain prompt: off-policy, -log q of the sampled tokens, a teacher that never changes. All else
is as in configs/tiny.py.

Command:   python scripts/train.py --config configs/tiny_sft.py --workdir runs/tiny_sft
Hardware:  2 CPU cores, 3 GiB of memory.
Time:      as configs/tiny.py, at most 5 minutes.
Expected:  about length and accuracy of the concise prompt, which is all there is to imitate. One
           run (--config.eval.samples_per_level=128): 82.3 ± 3.8% at 55.9 tokens, against 83.6 ±
           3.7% at 55.6. The base: 74.0 ± 4.4% at 86.6.
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
