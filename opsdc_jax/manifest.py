"""manifest.json of a checkpoint: what it is, and the size and digest of each of its files.

A data file that was cut short restores without an error, as zeros or old values. So nothing is
restored before its files were compared with the manifest.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from opsdc_jax.config import InputError
from opsdc_jax.files import check_regular, write_json

NAME = "manifest.json"
# Orbax writes this one again when it commits, after the manifest; nothing in it is restored.
_REWRITTEN = "_CHECKPOINT_METADATA"


def write(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder whose files are all there, and which then are on the disk.

    Args:
      about: what else it says of the checkpoint.

    Raises:
      InputError: it cannot be written.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = sorted(name for name in names if name not in (NAME, _REWRITTEN))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing holds no lock
        digests = list(pool.map(lambda name: _digest(folder / name, on_disk=True), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    write_json(folder / NAME, {**about, "files": files})


def problem(folder: pathlib.Path) -> str | None:
    """What differs from the manifest, in a few words; None where all is as it was written.

    Args:
      folder: of a checkpoint, named by its step.

    Raises:
      InputError: a file cannot be read just now, which says nothing about the file: whoever finds
        a problem may delete the checkpoint.
    """
    try:
        check_regular(folder / NAME)
        return _difference(folder, json.loads((folder / NAME).read_bytes()))
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{os.path.relpath(error.filename, folder)} is missing"
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} cannot be read ({error.strerror}): try again, or remove "
            "that checkpoint"
        ) from None
    # ValueError: JSON, Unicode or a path that is none.
    except (InputError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return f"{NAME} is damaged"


def _difference(folder: pathlib.Path, about: Any) -> str | None:
    files = about["files"]
    if about["step"] != int(folder.name) or not files or not isinstance(about["made_by"], dict):
        return f"{NAME} is damaged"
    for name, written in files.items():  # sizes first: most damage shows there
        size = (folder / name).stat().st_size
        if size != written["bytes"]:
            return f"{name} has {size:,} of {written['bytes']:,} bytes"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _digest(folder / name), files)
        for (name, written), digest in zip(files.items(), digests, strict=True):
            if digest != written["sha256"]:
                return f"{name} has other contents than were written"
    return None


def _digest(path: pathlib.Path, on_disk: bool = False) -> str:
    with path.open("rb") as file:
        if on_disk:  # the folder's final name must not outlive a power failure that they do not
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of a folder of checkpoints: those that have their final name, good or not."""
    found = folder.iterdir() if folder.is_dir() else []
    return [int(path.name) for path in found if path.name.isdecimal()]
