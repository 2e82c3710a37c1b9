"""Writes tests/golden: what transformers computes with the models of hf_reference.py. Needs torch.

Run `python tests/make_golden.py` after a change of weights or inputs, and only then: the tests
compare a new version of torch or transformers by themselves.
"""

import json

import numpy as np
import torch
import transformers
from hf_reference import CASES, GOLDEN, PROVENANCE, digest, live


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    provenance = {
        "made_by": "tests/make_golden.py",
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "cases": {},
    }
    for name, case in CASES.items():
        outputs = dict(live(name))
        margin = float(outputs.pop("smallest_margin"))
        rows_stopped = int(np.isin(outputs["stopped"], case.stop_ids).any(axis=1).sum())
        rows = len(outputs["stopped"])
        # A near-tie would make greedy decoding a matter of rounding; the seeds are chosen so
        # that there is none, and that some rows stop early and others do not.
        assert margin > 1e-3, f"{name}: near-tie of {margin}"
        assert rows // 4 <= rows_stopped <= rows - rows // 4, f"{name}: {rows_stopped} rows stop"
        np.savez_compressed(GOLDEN / f"{name}.npz", **outputs)
        provenance["cases"][name] = {
            "digest": digest(name),
            "largest_logit": round(float(np.abs(outputs["logits"]).max()), 3),
            "smallest_greedy_margin": round(margin, 5),
            "rows_stopped": rows_stopped,
        }
    PROVENANCE.write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
