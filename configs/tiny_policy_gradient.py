"""A baseline that OPSDC argues against: a policy gradient whose reward is a right, short answer.

Answers are graded; a right one's reward is 1 - 0.5 * tokens / budget, a wrong one's is 0. Each
response is weighted by its advantage over the step's others: REINFORCE with the batch as baseline,
on one response a problem as everywhere here. All else is as in configs/tiny.py.

Command:   python scripts/train.py --config configs/tiny_policy_gradient.py --workdir runs/tiny_pg
Hardware:  2 CPU cores, 3 GiB of memory.
Time:      as configs/tiny.py, at most 5 minutes.
Expected:  right and short answers, 66.5 ± 0.8% fewer tokens at 96.3 ± 2.4%, at the price of
           entropy, which falls to 26% (docs/reproduction.md) and whose guard only warns here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))
    config = tiny["get_config"]()
    config.loss.divergence = "nll"
    config.loss.weights = "advantages"
    config.loss.length_penalty = 0.5
    config.guards.action = "warn"  # the collapse of entropy is what there is to see
    return config
