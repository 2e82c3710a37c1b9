"""Samples the responses of systems to benchmarks, into files that survive a kill; grades them.

Responses are written as they end; what a kill interrupts is only what was under way.

The training loop and scripts/evaluate.py both evaluate through `Evaluator`. The files are described
in docs/formats.md; opsdc_jax/summary.py makes statistics of them, without a model.
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from opsdc_jax import distributed, results, summary
from opsdc_jax.benchmarks import Benchmark
from opsdc_jax.data import Example
from opsdc_jax.files import source_digest
from opsdc_jax.measures import is_thought_open, mark_ids
from opsdc_jax.models.qwen3 import Params
from opsdc_jax.progress import seconds
from opsdc_jax.prompts import Prompts
from opsdc_jax.results import SystemFiles
from opsdc_jax.sampler import Response, Sampler
from opsdc_jax.sampling import EVAL_STREAM, SamplingParams, sequence_keys

_PROGRESS_SECONDS = 30  # between two lines of progress


class System(NamedTuple):
    """What is evaluated.

    Attributes:
      name: of its files.
      model: folder or hub id as the user gave it; of a run's student, its base.
      weights: what tells these weights from others: a digest, or the step of a run.
      concise: whether it is asked under the conciseness instruction.
    """

    name: str
    model: str
    weights: str
    concise: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates systems side by side: on the same problems, with the same sampling and budget.

    Of several processes all sample, and the first reads and writes the files.

    Attributes:
      settings: the whole configuration.
      prompts, tokenizer, sampler: of the systems' model; the sampler holds the budget.
      folder: eval/ of a run or of an --out folder.
    """

    settings: ConfigDict
    benchmarks: Sequence[Benchmark]
    prompts: Prompts
    tokenizer: Any
    sampler: Sampler
    folder: pathlib.Path

    def open(self, system: System) -> bool:
        """Makes a system's files, or finds them; whether all its responses are there already.

        Raises:
          InputError: files of the same name were sampled with other settings.
        """
        return all(there_N.all() for there_N in self._open(system))

    def _open(self, system: System) -> list[np.ndarray]:
        """Of each benchmark, which of its responses are there, [problems * samples]."""
        opened = []
        for benchmark in self.benchmarks:
            files = self._files(system, benchmark)
            described = self._describe(system, benchmark)
            distributed.first_does(functools.partial(files.open, described))
            # A run's own student is described by its step alone: it is never another run's.
            if self.settings.eval.reuse and results.student_step(system.name) is None:
                folder = pathlib.Path(self.settings.eval.reuse) / "eval" / benchmark.name
                other = SystemFiles(folder, system.name)
                distributed.first_does(functools.partial(_take_over, files, other))
            opened.append(self._sampled(files, benchmark))
        return opened

    def run(
        self,
        system: System,
        params: Params | None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Samples what is not there yet, grades it, and prints a line for each benchmark.

        Args:
          params: of the system's model; not needed if all its responses are there.
          stop_asked: asked after every segment of decoding, by all processes together.

        Returns:
          False if it was asked to stop before all was there: another call goes on.
        """
        for benchmark, there_N in zip(self.benchmarks, self._open(system), strict=True):
            files = self._files(system, benchmark)
            # Grades of an incomplete file are of --regrade.
            if there_N.all() and distributed.from_first(files.grades.exists()):
                continue
            began = time.perf_counter()
            if not there_N.all():
                assert params is not None
                if not self._sample(files, system, benchmark, params, there_N, stop_asked):
                    return False
            if distributed.is_first():
                summary.grade(files)
                print(
                    f"evaluated {system.name} on {benchmark.name}: {summary.headline(files)} "
                    f"({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
        return True

    def _files(self, system: System, benchmark: Benchmark) -> SystemFiles:
        return SystemFiles(self.folder / benchmark.name, system.name)

    def _sampled(self, files: SystemFiles, benchmark: Benchmark) -> np.ndarray:
        """Which responses are there; what a crash left unfinished is dropped."""
        samples = self.settings.eval.samples
        total = len(benchmark.examples) * samples
        there_N = np.zeros(total, bool)

        def look() -> None:
            places = files.resume()
            numbers = [index * samples + sample for index, sample in places]
            there_N[:] = np.isin(np.arange(total), numbers)
            if there_N.all():
                files.sort(places)  # a kill came between the last response and this

        distributed.first_does(look)
        return distributed.array_from_first(there_N.astype(np.int32)).astype(bool)

    def _render(self, system: System) -> Callable[[str], list[int]]:
        return self.prompts.teacher if system.concise else self.prompts.student

    def _sample(
        self,
        files: SystemFiles,
        system: System,
        benchmark: Benchmark,
        params: Params,
        there_N: np.ndarray,
        stop_asked: Callable[[], bool],
    ) -> bool:
        """Samples those of a system's responses that are not there; whether all are in the end."""
        options, render = self.settings.eval, self._render(system)
        total, first = there_N.size, int(there_N.sum())
        began = printed = time.perf_counter()
        done = first
        for rows in responses(
            params,
            self.sampler,
            self.tokenizer,
            benchmark.examples,
            [render(example.problem) for example in benchmark.examples],
            sampling=SamplingParams(options.temperature, options.top_p, options.top_k),
            seed=self.settings.seed,
            samples=options.samples,
            numbers_N=np.flatnonzero(~there_N),
        ):
            if rows and distributed.is_first():
                files.append(rows)
            done += len(rows)
            if done < total and stop_asked():
                return False
            now = time.perf_counter()
            if first < done < total and now - printed > _PROGRESS_SECONDS:
                printed = now
                left = (now - began) / (done - first) * (total - done)
                print(
                    f"{benchmark.name}/{system.name}: {done:,} of {total:,} responses, "
                    f"{seconds(left)} left",
                    flush=True,
                )
        distributed.first_does(lambda: files.sort(files.resume()))
        return True

    def _describe(self, system: System, benchmark: Benchmark) -> dict[str, Any]:
        """All that the responses depend on, and what measuring them without a model needs."""
        prompts, options = self.settings.prompts, self.settings.eval
        think_id, end_think_id = mark_ids(self.tokenizer)
        prompt = self._render(system)(benchmark.examples[0].problem)
        return {
            "benchmark": benchmark.name,
            "source": benchmark.source,
            "problems": len(benchmark.examples),
            "fingerprint": benchmark.fingerprint,
            "system": system.name,
            "model": system.model,
            "weights": system.weights,
            "prompt": "concise" if system.concise else "plain",
            "instruction": prompts.instruction if system.concise else None,
            "template": prompts.template,
            "thinking": prompts.teacher_thinking if system.concise else prompts.student_thinking,
            "samples": options.samples,
            "max_response_tokens": options.max_response_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "seed": self.settings.seed,
            "dtype": self.settings.model.compute_dtype,
            "code": _code(),
            "think_id": think_id,
            "end_think_id": end_think_id,
            "thought_open": is_thought_open(prompt, think_id, end_think_id),
        }


@functools.cache
def _code() -> str:
    """What tells this code from other code: JAX's version, and a digest of our own."""
    return f"jax {importlib.metadata.version('jax')}, {source_digest()[:12]}"


def _take_over(files: SystemFiles, other: SystemFiles) -> None:
    """Takes over what another run has sampled, and says so."""
    if files.take_over(other):
        print(f"{files.responses}: taken over from {other.folder}", flush=True)


def responses(
    params: Params,
    sampler: Sampler,
    tokenizer: Any,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingParams,
    seed: int,
    samples: int,
    numbers_N: np.ndarray | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Samples responses as rows of `<system>.jsonl`, which come as they end.

    After every segment of decoding it yields those that ended, which may be none.

    The samples of one problem stand side by side, so that its prompt is prefilled once. The key of
    a response depends on the seed, its problem's index and its number alone, so systems compared on
    the same problems share their random numbers.

    Args:
      prompts: token ids, one prompt for each example.
      samples: responses to each prompt (k).
      numbers_N: of the responses that are wanted, index * samples + sample; None: all.
    """
    if numbers_N is None:
        numbers_N = np.arange(len(examples) * samples)
    indices_N, samples_N = np.divmod(numbers_N, samples)
    keys_N = sequence_keys(seed, EVAL_STREAM, samples_N, indices_N)

    def row(response: Response) -> dict[str, Any]:
        index, ids = int(indices_N[response.number]), response.tokens.tolist()
        example = examples[index]
        return {
            "index": index,
            "sample": int(samples_N[response.number]),
            "problem": example.problem,
            "gold": example.answer,
            "level": example.level,
            "ids": ids,
            "text": tokenizer.decode(ids[: len(ids) - response.stopped]),
            "stopped": response.stopped,
            "prompt_tokens": len(prompts[index]),
        }

    wanted = [prompts[index] for index in indices_N]
    for ended in sampler.responses(params, wanted, keys_N, sampling):
        yield [row(response) for response in ended]
