"""A tiny world closer to the real one: long traces that check themselves, rare instructions.

Its base model is another (docs/tiny_hard.md says how it was trained), and merging steps costs it
answers: a refreshed teacher merges more each time, and accuracy goes to 0. So the teacher stays
frozen here, and steps are smaller. All else is as in configs/tiny.py.

Command:   python scripts/train.py --config configs/tiny_hard.py --workdir runs/tiny_hard
Hardware:  2 CPU cores, 3 GiB of memory.
Time:      at most 5 minutes.
Expected:  59.3% at 32 tokens after 80 steps, 54.7% at 34 after 120, good to +- 2.5 points. The
           base: 65.2% at 125 tokens, under the instruction 54.6% at 37 (docs/tiny_hard.md).
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))
    config = tiny["get_config"]()
    config.model.path = "tiny_hard"
    config.train.steps = 80
    config.teacher.every = 0
    config.optim.lr = 5e-5
    # As pretrain_tiny.py measures: what the world's longest response needs.
    config.sampler.max_response_tokens = 256
    config.eval.max_response_tokens = 256
    return config
