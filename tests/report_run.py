"""A run's folder without a run: every file that the report reads, small and made up."""

import json
import pathlib

import numpy as np

from opsdc_jax import summary
from opsdc_jax.config import default_config
from opsdc_jax.files import write_json, write_json_lines
from opsdc_jax.results import SystemFiles

HOSTILE = "</script><script>document.title='hacked'</script> <b>bold</b> & \u2028 \"quoted\""
BUDGET = 400
SYSTEMS = ("base", "concise_prompt", "student-000002", "student-000004")
TOKENS = dict(zip((*SYSTEMS, "student"), (200, 120, 110, 80, 80), strict=True))  # mean, about


def make_run(
    path: pathlib.Path,
    *,
    steps: int = 4,
    done: int | None = None,
    teacher_every: int = 2,
    evaluated: tuple[str, ...] = SYSTEMS,
    finished: bool = True,
    views: tuple[int, ...] = (1, 4),
    text: str = HOSTILE,
) -> pathlib.Path:
    """Writes the folder.

    Args:
      done: steps that were done; all by default.
      evaluated: systems with responses.
      finished: whether there is a summary.json.
      views: steps with a tokens-*.jsonl.
      text: is part of every text a model could have written.
    """
    config = default_config()
    config.train.steps, config.teacher.every = steps, teacher_every
    config.eval.source = "made-up" if evaluated else "none"
    for folder in ("eval", "samples"):
        (path / folder).mkdir(parents=True)
    write_json(path / "config.json", json.loads(config.to_json()))
    rows = [metrics_row(step) for step in range(1, (steps if done is None else done) + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for system in evaluated:
        answer(SystemFiles(path / "eval" / "made-up", system), text)
    if finished:
        write_json(path / "eval" / "summary.json", summary.summarise(path / "eval"))
    for step in views:
        rollouts = [rollout(index, text) for index in range(4)]
        write_json_lines(path / "samples" / f"tokens-{step:06d}.jsonl", rollouts)
    return path


def metrics_row(step):
    return {
        "step": step,
        "loss": 0.1 / step,
        "response_tokens": 200.0 - 20 * step,
        "student_entropy": 0.3,
        "teacher_entropy": 0.25,
        "truncated": 0.0,
        "logprob_gap_mean": 1e-6,
        "logprob_gap_max": 1e-5,
        "grad_norm": 0.5,
    }


def answer(files: SystemFiles, text: str) -> None:
    """Two responses to each of 20 problems on two levels; longer ones to the hard problems."""
    draw = np.random.default_rng(len(files.system))
    files.open(
        {
            **{"benchmark": "made-up", "source": "made-up", "problems": 20, "fingerprint": "0"},
            **{"system": files.system, "model": "none", "template": "dapo", "samples": 2},
            **{"max_response_tokens": BUDGET, "temperature": 0.6, "top_p": 1.0, "top_k": 0},
            "seed": 0,
        }
    )
    responses, grades = [], []
    for index in range(20):
        for sample in range(2):
            level = ("easy", "hard")[index % 2]
            tokens = int(TOKENS[files.system] * (1 + index % 2) * draw.uniform(0.5, 1.5)) // 2
            correct = bool(draw.random() < 0.7)
            key = {"index": index, "sample": sample, "level": level}
            responses.append(
                {
                    **key,
                    "problem": f"Problem {index} {text}",
                    "gold": str(index),
                    "ids": [1] * tokens,
                    "text": f"<think> {files.system} {index} {text} </think> Answer: {index}",
                    "stopped": True,
                    "prompt_tokens": 10,
                }
            )
            scores = dict.fromkeys(("committed", "answer_line", "boxed", "either"), correct)
            grades.append(
                {
                    **key,
                    "scores": scores,
                    "tokens": tokens,
                    "thinking_tokens": tokens - 5,
                    "answer_tokens": 5,
                    "doubt_words": tokens // 50,
                    **dict.fromkeys(("timed_out", "truncated", "unparsed", "repetitive"), False),
                }
            )
    files.append(responses)
    files.write_grades(grades)


def rollout(index, text):
    tokens = ["<think>", " Wait", ",", " 33", " +", " 9", "\n\n", "", text, " super", "fluous", "."]
    count = len(tokens)
    kl = [0.0, 0.7, 0.002, 0.05, 0.0, 0.2, 0.0, -1e-7, 1.5, 0.3, 0.1, 0.0]
    return {
        "problem": f"Problem {index} {text}",
        "answer": "42",
        "level": "easy",
        "stopped": index != 1,
        "tokens": tokens,
        "kl": kl,
        "student_entropy": [0.5] * count,
        "teacher_entropy": [0.25] * count,
        "student_prob": [0.5] * count,
        "teacher_prob": [0.125] * count,
        "student_top": [[[token, 0.5], [" So", 0.25], [text, 0.01]] for token in tokens],
        "teacher_top": [[[" </think>", 0.75], [" Hmm", 0.0001]]] * count,
    }
