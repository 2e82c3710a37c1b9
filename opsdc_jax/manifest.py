"""manifest.json of a checkpoint: what it is, and the size and digest of each of its files.

A data file that was cut short restores without an error, as zeros or old values. So nothing is
restored before its files were compared with the manifest.
"""

import concurrent.futures
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from opsdc_jax.config import InputError
from opsdc_jax.files import read_json, write_json

NAME = "manifest.json"
# Orbax writes this one again when it commits, after the manifest; nothing in it is restored.
_REWRITTEN = "_CHECKPOINT_METADATA"


def write(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder whose files are all there.

    Args:
      about: what else it says of the checkpoint.

    Raises:
      InputError: it cannot be written.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = sorted(name for name in names if name not in (NAME, _REWRITTEN))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing holds no lock
        digests = list(pool.map(lambda name: _digest(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    write_json(folder / NAME, {**about, "files": files})


def problem(folder: pathlib.Path) -> str | None:
    """What differs from the manifest, in a few words; None where all is as it was written.

    Raises:
      InputError: this user may not read a file, which says nothing about the file.
    """
    try:
        files = read_json(folder / NAME)["files"]
        for name, written in files.items():  # sizes first: most damage shows there
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size:,} of {written['bytes']:,} bytes"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            digests = pool.map(lambda name: _digest(folder / name), files)
            for (name, written), digest in zip(files.items(), digests, strict=True):
                if digest != written["sha256"]:
                    return f"{name} has other contents than were written"
    except PermissionError as error:
        raise InputError(f"{error.filename} may not be read: give the permission") from None
    except FileNotFoundError as error:
        return f"{pathlib.Path(error.filename).relative_to(folder).as_posix()} is missing"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    except (InputError, KeyError, TypeError, AttributeError):
        return f"{NAME} is missing or damaged"
    return None


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
