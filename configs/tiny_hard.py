"""A tiny world closer to the real one: long traces that check themselves, rare instructions.

Its base model is another (docs/tiny_hard.md says how it was trained); all else is as in
configs/tiny.py.

Command:   python scripts/train.py --config configs/tiny_hard.py --workdir runs/tiny_hard
Hardware:  2 CPU cores, 3 GiB of memory.
Time:      not measured; responses are longer than in configs/tiny.py, and there are as many steps.
Expected:  not measured. The base alone: 66.8% at 124 tokens, under the instruction 52.2% at 37.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))
    config = tiny["get_config"]()
    config.model.path = "tiny_hard"
    # As pretrain_tiny.py measures: what the world's longest response needs.
    config.sampler.max_response_tokens = 256
    config.eval.max_response_tokens = 256
    return config
