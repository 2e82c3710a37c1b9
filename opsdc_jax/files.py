"""JSON files: read with a clear error, written in one go."""

import json
import pathlib
from typing import Any

from opsdc_jax.config import InputError


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Raises:
      InputError: the file is missing, damaged, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file in one go: readers see the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
