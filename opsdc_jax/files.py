"""JSON files: read with a clear error, written in one go."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from opsdc_jax.config import InputError

LONGEST_LINE = 2**24  # bytes: no problem and no response is that long
_PROBE_BYTES, _PROBES = 4096, 64  # of each file that is fingerprinted


def user_cache() -> pathlib.Path:
    """Where what can be made again is kept between runs: opsdc_jax/ in the user's cache folder."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        home = tempfile.gettempdir()
    return pathlib.Path(home) / "opsdc_jax"


def check_regular(path: str | pathlib.Path) -> None:
    """Refuses what would never end, or never begin: a pipe, a device, a folder.

    Raises:
      InputError: the path exists and is no ordinary file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise InputError(f"{path} cannot be read: it is {kind}, give an ordinary file")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Raises:
      InputError: the file is missing, damaged, or holds something else than an object.
    """
    check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    # ValueError: JSON or Unicode that is none, numbers of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Inside, what the system refuses to write becomes one sentence.

    Raises:
      InputError: naming `path` and the reason.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room, give permission, or choose "
            "another place"
        ) from None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file in one go: readers see the old file or the whole new one.

    Raises:
      InputError: it cannot be written.
    """
    _replace(path, [json.dumps(value, indent=2).encode() + b"\n"])


Fields = Mapping[str, type | tuple[type, ...]]
"""Name -> the type(s) of its value."""
NO_FIELDS: Fields = MappingProxyType({})


def check_fields(place: str | pathlib.Path, value: Mapping[str, Any], fields: Fields) -> None:
    """Refuses an object that lacks a field, or whose field is of another type.

    Args:
      place: "FILE" or "FILE:LINE", for the message.

    Raises:
      InputError: naming the field.
    """
    for name, kind in fields.items():
        if name not in value:
            raise InputError(f"{place} lacks {name!r}: it is damaged, or of another version")
        given, kinds = value[name], kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
            raise InputError(
                f"{place} holds {name!r} of type {type(given).__name__}: it is damaged, or of "
                "another version"
            )


def read_json_lines(path: pathlib.Path, fields: Fields = NO_FIELDS) -> Iterator[dict[str, Any]]:
    """The objects of a file that holds one a line, one after the other.

    Args:
      fields: that every object must have.

    Raises:
      InputError: the file is missing, or a line is damaged.
    """
    check_regular(path)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if not isinstance(value, dict):
                    raise InputError(f"{path}:{number} does not hold a JSON object")
                check_fields(f"{path}:{number}", value, fields)
                yield value
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def write_json_lines(path: pathlib.Path, values: Iterable[Any]) -> None:
    """Writes one object a line, in one go.

    Raises:
      InputError: the file cannot be written.
    """
    _replace(path, (json.dumps(value).encode() + b"\n" for value in values))


def _replace(path: pathlib.Path, parts: Iterable[bytes]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())  # or a power failure leaves the new name without contents
            temporary.replace(path)
    except InputError:
        with contextlib.suppress(OSError):  # where there is no room, none is to be taken
            temporary.unlink()
        raise


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file in one go: readers see the old file or the whole new one.

    Raises:
      InputError: it cannot be read, or not be written.
    """
    check_regular(source)
    try:
        file = source.open("rb")
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error}") from None
    with file:
        _replace(target, file)


def source_digest(*sources: str) -> str:
    """A digest of the package's Python files.

    Args:
      sources: files and folders of the package, relative to it; none: all of it.
    """
    package = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for source in sources or (".",):
        path = package / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def fingerprint(paths: Iterable[pathlib.Path]) -> str:
    """A digest of large files: of their sizes, and of parts spread evenly over each of them.

    Enough to tell the weights of two training steps apart without reading them.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for probe in range(_PROBES):
                file.seek(max(size - _PROBE_BYTES, 0) * probe // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()[:12]
