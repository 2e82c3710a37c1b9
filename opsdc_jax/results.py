"""Files of an evaluation: settings, responses and grades of each system (docs/formats.md)."""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from opsdc_jax.config import InputError, differing_keys
from opsdc_jax.files import (
    Fields,
    check_fields,
    copy_file,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
    writing,
)
from opsdc_jax.grading import SCORERS

BASE, CONCISE, STUDENT = "base", "concise_prompt", "student"
SUMMARY = "summary.json"
_TEXT_FIELDS = dict.fromkeys(("problem", "gold", "level", "text"), str)
_RESPONSE: Fields = {"index": int, "sample": int, "ids": list, "stopped": bool, **_TEXT_FIELDS}
_SCORES: Fields = dict.fromkeys(SCORERS, bool)
_GRADE: Fields = {
    **{"level": str, "scores": dict},
    **dict.fromkeys(("index", "sample", "tokens", "thinking_tokens", "answer_tokens"), int),
    "doubt_words": int,
    **dict.fromkeys(("truncated", "repetitive", "unparsed", "timed_out"), bool),
}
_SUMMARY: Fields = {
    **dict.fromkeys(("settings", "systems"), dict),
    **dict.fromkeys(("comparisons", "curve", "warnings"), list),
}
_FOLDER = re.compile(r"\w[\w.-]*")
_STUDENT_STEP = re.compile(rf"{STUDENT}-(\d+)")


def student_name(step: int) -> str:
    """Name of the system that is a run's student after a step."""
    return f"{STUDENT}-{step:06d}"


def student_step(system: str) -> int | None:
    """The step of a `student_name`; None for every other system."""
    found = _STUDENT_STEP.fullmatch(system)
    return int(found[1]) if found else None


class SystemFiles(NamedTuple):
    """The files of one system on one benchmark.

    Attributes:
      folder: the benchmark's.
      system: name of the system.
    """

    folder: pathlib.Path
    system: str

    @property
    def settings(self) -> pathlib.Path:
        return self.folder / f"{self.system}.settings.json"

    @property
    def responses(self) -> pathlib.Path:
        return self.folder / f"{self.system}.jsonl"

    @property
    def grades(self) -> pathlib.Path:
        return self.folder / f"{self.system}.grades.jsonl"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings, or checks that what is there was sampled with the same.

        The `code` may be another: who goes on after an upgrade keeps what there is.

        Raises:
          InputError: it was not (the keys that differ are named), or nothing can be written.
        """
        if self.settings.exists():
            ours, theirs = (
                {key: value for key, value in of.items() if key != "code"}
                for of in (settings, read_json(self.settings))
            )
            changed = differing_keys(ours, theirs)
            if changed:
                raise InputError(
                    f"{self.responses} holds responses sampled with other settings "
                    f"({'; '.join(changed)}): choose another folder, or the same settings to go on"
                )
            return
        if self.responses.exists():
            raise InputError(
                f"{self.responses} lies there without {self.settings.name}, so nobody knows how it "
                "was sampled: choose another folder"
            )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.settings, settings)

    def take_over(self, other: "SystemFiles") -> bool:
        """Copies the responses of another folder, if they were sampled as these are to be.

        By the same code, too: who changes the sampler wants to see what it does.

        Does nothing where responses are already, or where the other folder has none that fit. A
        file that another run still writes may end in a torn line, which `resume` drops.

        Returns:
          whether it copied them.

        Raises:
          InputError: the other folder's settings are damaged, or nothing can be written.
        """
        if self.responses.exists() or not (other.settings.exists() and other.responses.exists()):
            return False
        if read_json(other.settings) != read_json(self.settings):
            return False
        copy_file(other.responses, self.responses)
        return True

    def resume(self) -> dict[tuple[int, int], int]:
        """Drops a line that a crash left torn.

        Returns:
          (index, sample) of each response that stays -> where its line begins, in bytes.

        Raises:
          InputError: a line is damaged, or the file cannot be written.
        """
        places: dict[tuple[int, int], int] = {}
        if not self.responses.exists():
            return places
        end = 0
        with writing(self.responses), self.responses.open("r+b") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                try:
                    row = json.loads(line)
                    places[row["index"], row["sample"]] = end
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise InputError(
                        f"{self.responses}:{number} is damaged: delete this line"
                    ) from None
                end += len(line)
        return places

    def sort(self, places: Mapping[tuple[int, int], int]) -> None:
        """Orders the responses by problem and sample: they were written as they ended.

        Args:
          places: what `resume` found.

        Raises:
          InputError: the file cannot be written.
        """
        if list(places) != sorted(places):
            write_json_lines(self.responses, self._rows_at(places[key] for key in sorted(places)))

    def _rows_at(self, places: Iterable[int]) -> Iterator[dict[str, Any]]:
        with self.responses.open("rb") as file:
            for place in places:
                file.seek(place)
                yield json.loads(file.readline())

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds responses to the file.

        Raises:
          InputError: they cannot be written.
        """
        with writing(self.responses), self.responses.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The responses in the file's order: a whole file can be larger than memory likes."""
        return read_json_lines(self.responses, _RESPONSE)

    def read_grades(self) -> list[dict[str, Any]]:
        """At least one.

        Raises:
          InputError: the file is missing, empty or damaged.
        """
        rows = list(read_json_lines(self.grades, _GRADE))
        for number, row in enumerate(rows, start=1):
            check_fields(f"{self.grades}:{number}", row["scores"], _SCORES)
        if not rows:
            raise InputError(f"{self.grades} is empty: finish the evaluation first")
        return rows

    def write_grades(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_json_lines(self.grades, rows)

    def remove(self) -> None:
        """Deletes all three."""
        for path in (self.grades, self.responses, self.settings):
            path.unlink(missing_ok=True)


def check_summary(path: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Refuses what cannot be the contents of a summary.json.

    Args:
      path: for the message.

    Raises:
      InputError: it is damaged, or was written by an older version.
    """
    check_fields(path, summary, {"benchmarks": dict})
    for name, benchmark in summary["benchmarks"].items():
        if not _FOLDER.fullmatch(name):  # it becomes part of the names of the report's files
            raise InputError(f"{path} holds a benchmark {name!r}, which is no name of a folder")
        check_fields(path, {name: benchmark}, {name: dict})
        check_fields(path, benchmark, _SUMMARY)


def systems(folder: pathlib.Path) -> list[SystemFiles]:
    """All systems of a benchmark's folder, by name."""
    ending = ".settings.json"
    names = sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
    return [SystemFiles(folder, name) for name in names]


def benchmark_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The benchmarks' folders in an eval folder, by name."""
    return sorted({path.parent for path in folder.glob("*/*.settings.json")})


def remove_later_students(folder: pathlib.Path, step: int) -> None:
    """Deletes what students after `step` answered: a run that continues there trains them anew.

    Raises:
      InputError: something cannot be deleted.
    """
    for benchmark in benchmark_folders(folder):
        for files in systems(benchmark):
            if (student_step(files.system) or 0) > step:
                with writing(benchmark):
                    files.remove()
