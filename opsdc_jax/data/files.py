"""Raw rows with their place, from local files."""

import codecs
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from opsdc_jax.config import InputError
from opsdc_jax.files import LONGEST_LINE, check_regular

ROWS_AT_A_TIME = 1024  # of what Arrow stores


class RawRow(NamedTuple):
    """A row as it is stored.

    Attributes:
      place: "FILE:LINE" (row, where the format has no lines), counted from 1.
      value: what is there; an object with columns, if the row is good.
    """

    place: str
    value: Any


def extension(path: str) -> str:
    """Ending of a path with its dot, in lower case."""
    return os.path.splitext(path)[1].lower()


def file_rows(path: str) -> Iterator[RawRow]:
    """The rows of a file with one of the `EXTENSIONS`, in their order.

    Raises:
      InputError: the file cannot be read, or is damaged; names the line where there are lines.
    """
    check_regular(path)
    try:
        yield from _READERS[extension(path)](path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _jsonl_rows(path: str) -> Iterator[RawRow]:
    """One row a line; blank lines count but hold no row."""
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{place} is longer than {LONGEST_LINE // 2**20} MiB, and no problem is: give "
                    "one object a line, or in a .json file one array of objects"
                )
            text = _decoded(line, place).rstrip()  # or an error at the end is one line too low
            if text:
                yield RawRow(place, _parsed(text, path, number))


def _json_rows(path: str) -> Iterator[RawRow]:
    """An array of rows; or what a .jsonl file holds, which often goes by this name."""
    with open(path, "rb") as file:
        parts = iter(lambda: file.readline(LONGEST_LINE), b"")
        texts = (part.removeprefix(codecs.BOM_UTF8).strip() for part in parts)
        if not next(filter(None, texts), b"").startswith(b"["):
            yield from _jsonl_rows(path)
            return
        file.seek(0)
        text = _decoded(file.read(), path)
    for number, value in enumerate(_parsed(text, path), start=1):
        yield RawRow(f"{path}:{number}", value)


def _parquet_rows(path: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_A_TIME):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:{number}", value)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(
            f"{path} is no parquet, or damaged after row {number}: {message}"
        ) from None


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
EXTENSIONS = tuple(_READERS)


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8: {error.reason}, byte {error.start + 1}") from None


def _parsed(text: str, path: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{first_line + error.lineno - 1} holds broken JSON: {error.msg}, column "
            f"{error.colno}; give one object a line, or in a .json file one array of objects"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; deep nesting
        raise InputError(f"{path}:{first_line} holds JSON that cannot be read: {error}") from None
