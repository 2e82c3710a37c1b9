"""What the scripts share: flags, configuration overrides, exit codes."""

import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import config_flags

from opsdc_jax import distributed
from opsdc_jax.config import InputError, default_config, flatten, unknown_key

EXIT_DONE = 0
EXIT_FAILED = 1  # an error that is ours, with a traceback
EXIT_BAD_INPUT = 2  # one sentence on standard error says what to change
EXIT_STOPPED = 3  # asked to stop; started again, it continues
EXIT_GUARD = 4  # a guard stopped the run: one sentence on standard error says why

_HELP = {"--help", "-help", "-h"}
_OVERRIDE = re.compile(r"--?config\.([^=]+)")


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, where JAX_COMPILATION_CACHE_DIR says.

    By default that is opsdc_jax/ in the user's cache folder.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "opsdc_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def config_flag_values(argv: Sequence[str]) -> flags.FlagValues:
    """New flags with `--config FILE` and its `--config.key=value` overrides.

    Flags are not global: a script's main() can be called any number of times in one process.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "configuration file, e.g. configs/tiny.py", values, sys_argv=list(argv)
    )
    return values


def parse(values: flags.FlagValues, argv: Sequence[str]) -> flags.FlagValues:
    """Parses `argv` (program name first).

    Raises:
      SystemExit: after printing the flags, where --help is among them.
      InputError: unknown flag or configuration key (the nearest known one is named), a value of
        the wrong type, or a configuration file that cannot be loaded.
    """
    if _HELP & set(argv[1:]):
        print(values.get_help())
        raise SystemExit(EXIT_DONE)
    known = flatten(default_config())
    for argument in argv[1:]:
        override = _OVERRIDE.match(argument)
        if override and override[1] not in known:
            raise InputError(unknown_key(override[1]))
    try:
        rest = values(list(argv))
        if "config" in values:
            if values.config is None:
                raise InputError("--config FILE is required, for instance --config configs/tiny.py")
            flatten(values.config)  # a file that could not be loaded only complains when it is used
    except InputError:
        raise
    except flags.Error as error:
        raise InputError(_sentence(error)) from None
    except Exception as error:  # whatever a configuration file of the user's may do
        raise InputError(
            f"the configuration file cannot be loaded: {type(error).__name__}: {_sentence(error)}"
        ) from None
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: options start with --")
    return values


def _sentence(error: Exception) -> str:
    """An error's message on one line; of a traceback in it, only the end."""
    message = str(error).rpartition("Traceback (most recent call last)")[2].strip()
    return (
        " ".join(message.splitlines()[-1].split())
        if "File " in message
        else " ".join(message.split())
    )


def config_name(argv: Sequence[str]) -> str:
    """The stem of the configuration file named in `argv`."""
    for index, argument in enumerate(argv):
        if argument in ("--config", "-config"):
            return pathlib.Path(argv[index + 1]).stem
        if argument.startswith(("--config=", "-config=")):
            return pathlib.Path(argument.partition("=")[2]).stem
    return "run"


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Calls a script's main and turns bad input into one sentence and exit code 2.

    Of several processes, one that fails ends at once, and those that wait for it with it.

    With --help, the script's docstring and its flags are printed instead.
    """
    argv = sys.argv if argv is None else argv
    if _HELP & set(argv[1:]):
        print(main.__globals__["__doc__"])
    try:
        return main(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(EXIT_BAD_INPUT)
        return EXIT_BAD_INPUT
    except Exception:
        if distributed.is_one_of_several():
            traceback.print_exc()
            distributed.leave(EXIT_FAILED)
        raise
