"""Raw rows with their place, from files, Hugging Face data sets and TFDS.

What a source is called decides how it is read:

- `tfds:FOLDER` (one that holds dataset_info.json) or `tfds:NAME[/CONFIG][:VERSION]`;
- an existing path, a path ending in .jsonl, .json or .parquet, or a glob of such paths: files, in
  the order of their names;
- `OWNER/NAME[@REVISION]`: a data set of the Hugging Face hub, or of its local cache.

Nothing here looks into a row. The libraries are imported when they are needed, not before.
"""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opsdc_jax.config import InputError
from opsdc_jax.data.files import EXTENSIONS, ROWS_AT_A_TIME, RawRow, extension, file_rows

TFDS_PREFIX = "tfds:"
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?")
# Read where no subset is given, of data sets that have several and none marked as default.
_SUBSETS = {"openai/gsm8k": "main", "opencompass/AIME2025": "AIME2025-I,AIME2025-II"}


@dataclass(frozen=True)
class TableName:
    """What to read.

    Attributes:
      source: see the top of this file.
      split: of a data set of the hub or of TFDS, slices like "train[:80%]" included.
      default_split: read where `split` is empty.
      subset: of a data set of the hub (there also called its configuration); several, separated
        by commas, are read one after the other.
      section: of the configuration that names all this, for messages: "data" or "eval".
    """

    source: str
    split: str = ""
    default_split: str = "train"
    subset: str = ""
    section: str = "data"

    def __str__(self) -> str:
        return f"{self.section}.source={self.source!r}"


def read_rows(name: TableName) -> Iterator[RawRow]:
    """The rows of a table, in the order in which they are stored.

    Raises:
      InputError: there is no such table, or it cannot be read.
    """
    if name.source.startswith(TFDS_PREFIX):
        _refuse(name, "subset", name.subset, "write tfds:NAME/CONFIG instead")
        return _tfds_rows(name)
    paths = _paths(name)
    if paths:
        for option, value in (("split", name.split), ("subset", name.subset)):
            _refuse(name, option, value, "a file is read as a whole: leave it empty")
        return (row for path in paths for row in file_rows(path))
    match = _HUB_ID.fullmatch(name.source)
    if not match:
        raise InputError(
            f"{name} is not known: give a .jsonl, .json or .parquet file or a glob of them, a "
            "Hugging Face data set as OWNER/NAME, tfds:NAME, or tiny"
        )
    return _hub_rows(name, repository=match[1], revision=match[2])


def _refuse(name: TableName, option: str, value: str, advice: str) -> None:
    if value:
        raise InputError(f"{name.section}.{option}={value!r} does not fit {name}: {advice}")


def _paths(name: TableName) -> list[str]:
    """Files that a source names, sorted; none if it does not look like a file."""
    path = os.path.expanduser(name.source)
    if os.path.exists(path):
        paths = [path]
    elif glob.has_magic(path):
        # Sorted: the order of a listing differs between machines, and the order of rows decides
        # which examples belong to a step.
        paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not paths:
            raise InputError(f"{name} matches no file")
    elif extension(path) in EXTENSIONS:
        raise InputError(f"{name}: there is no such file")
    else:
        return []
    for path in paths:
        if os.path.isdir(path):
            raise InputError(
                f"{name} is a folder: give a glob of its files, or tfds:FOLDER if TFDS wrote it"
            )
        if extension(path) not in EXTENSIONS:
            raise InputError(
                f"{name}: {path} ends in none of {', '.join(EXTENSIONS)}, which can be read"
            )
    return paths


def _hub_rows(name: TableName, *, repository: str, revision: str | None) -> Iterator[RawRow]:
    import datasets

    split = name.split or name.default_split
    for subset in (name.subset or _SUBSETS.get(repository, "")).split(","):
        subset = subset.strip()
        label = " ".join(filter(None, (name.source, subset, split)))
        try:
            table = datasets.load_dataset(
                repository, subset or None, split=split, revision=revision
            )
        # The library lets errors of every layer through, its HTTP client's own among them.
        except Exception as error:
            raise InputError(
                f"{name} cannot be loaded (split {split!r}, subset {subset!r}): {_brief(error)}; "
                f"check the name, {name.section}.split and {name.section}.subset; without a "
                "network use a local file, or fill the cache beforehand and set HF_HUB_OFFLINE=1"
            ) from error
        number = 0
        # Rows as Arrow stores them: decoding features (images, class names) has no use here.
        for batch in table.with_format("arrow").iter(ROWS_AT_A_TIME):
            for value in batch.to_pylist():
                number += 1
                yield RawRow(f"{label}:{number}", value)


def _tfds_rows(name: TableName) -> Iterator[RawRow]:
    """Random access to array_record files, the one format that TFDS reads without TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"{name} needs TFDS ({error}): pip install opsdc-jax[tfds]") from None
    wanted = name.source.removeprefix(TFDS_PREFIX)
    split = name.split or name.default_split
    folder = os.path.expanduser(wanted)
    try:
        if os.path.isdir(folder):
            table = tfds.builder_from_directory(folder).as_data_source(split=split)
        else:
            table = tfds.data_source(wanted, split=split)
        for index in range(len(table)):
            yield RawRow(f"{wanted} {split}:{index + 1}", _plain(table[index]))
    # As above; and a data set that TFDS cannot prepare without TensorFlow raises ImportError.
    except Exception as error:
        raise InputError(
            f"{name} cannot be read (split {split!r}): {_brief(error)}; check the name and "
            f"{name.section}.split, and give a folder that TFDS wrote with "
            "file_format='array_record', which needs no TensorFlow"
        ) from error


def _plain(value: Any) -> Any:
    """NumPy arrays and scalars as Python values."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _brief(error: Exception, limit: int = 300) -> str:
    """A library's error on one line, cut: TFDS lists every data set there is."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:limit]}"
