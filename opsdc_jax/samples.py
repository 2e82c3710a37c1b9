"""The rollouts that a run keeps to be read: samples/ of its folder."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from opsdc_jax import distributed, sharding, token_view
from opsdc_jax.data import Example
from opsdc_jax.files import write_json, write_json_lines, writing
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.parts import Batch, Parts
from opsdc_jax.rollout import Rollout
from opsdc_jax.token_view import Compared, TokenViewer


class Kept(NamedTuple):
    """Rollouts of a step that are on their way to the disk."""

    step: int
    examples: Sequence[Example]
    sampled: Rollout
    compared: list[Compared]


_FILE = re.compile(r"(?:step-(\d+)\.json|tokens-(\d+)\.jsonl)")


def remove_later(folder: pathlib.Path, step: int) -> None:
    """Deletes the rollouts of steps after `step`: a run that continues there samples them anew.

    Raises:
      InputError: one cannot be deleted.
    """
    with writing(folder):
        for path in folder.iterdir():
            found = _FILE.fullmatch(path.name)
            if found and int(found[1] or found[2]) > step:
                path.unlink()


@dataclasses.dataclass(frozen=True)
class SampleWriter:
    """Writes rollouts of a step: text to step-N.json, comparisons by token to tokens-N.jsonl.

    Attributes:
      count: rollouts of a step whose text is written.
      views: rollouts of a step that are compared with the teacher, token by token.
    """

    folder: pathlib.Path
    tokenizer: Any
    viewer: TokenViewer
    count: int
    views: int

    @classmethod
    def of_run(cls, settings: ConfigDict, parts: Parts, folder: pathlib.Path) -> "SampleWriter":
        """Compares at the widths of the budgets: one program for all steps."""
        viewer = TokenViewer(
            compare=token_view.make_compare(
                parts.model, vocab_size=len(parts.tokenizer), shardings=parts.shardings
            ),
            tokenizer=parts.tokenizer,
            rows=sharding.batch_sharding(parts.mesh),
            rows_at_a_time=settings.train.micro_batch_size,
            prompt_width=settings.sampler.max_prompt_tokens,
            response_width=settings.sampler.max_response_tokens,
            pad_id=parts.tokenizer.pad_token_id,
        )
        return cls(folder, parts.tokenizer, viewer, settings.log.samples, settings.log.token_views)

    def start(
        self, step: int, student: Params, teacher: Params, batch: Batch, sampled: Rollout
    ) -> Kept:
        """Called by all processes before the step's update, which takes the parameters away.

        Args:
          student, teacher: the parameters that sampled, and those that will teach.
          sampled: on the host.
        """
        prompts = batch.student_prompts, batch.teacher_prompts
        compared = self.viewer.start(student, teacher, sampled, *prompts, self.views)
        return Kept(step, batch.examples, sampled, compared)

    def finish(self, kept: Kept) -> None:
        """Writes what was started, while the device works on the update; in the first process."""
        if not distributed.is_first():
            return
        step, examples, sampled, compared = kept
        stopped = sampled.stopped_B.tolist()
        texts = []
        for row, example in enumerate(examples[: self.count]):
            ids = sampled.tokens_BxR[row, : sampled.lengths_B[row]].tolist()
            text = self.tokenizer.decode(ids)
            texts.append({**example._asdict(), "stopped": stopped[row], "text": text, "ids": ids})
        write_json(self.folder / f"step-{step:06d}.json", texts)
        if views := self.viewer.finish(compared):
            rows = [
                {**example._asdict(), "stopped": stopped[row], **view}
                for row, (example, view) in enumerate(zip(examples, views, strict=False))
            ]
            write_json_lines(self.folder / f"tokens-{step:06d}.jsonl", rows)
