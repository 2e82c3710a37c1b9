"""What the scripts share: flags, configuration overrides, exit codes."""

import io
import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from opsdc_jax import distributed
from opsdc_jax.config import InputError, default_config, flatten, unknown_key
from opsdc_jax.files import user_cache

EXIT_DONE = 0
EXIT_FAILED = 1  # an error that is ours, with a traceback
EXIT_BAD_INPUT = 2  # one sentence on standard error says what to change
EXIT_STOPPED = 3  # asked to stop; started again, it continues
EXIT_GUARD = 4  # a guard stopped the run: one sentence on standard error says why

_HELP = {"--help", "-help", "-h"}
_OVERRIDE = re.compile(r"--?config\.([^=]+)")


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, where JAX_COMPILATION_CACHE_DIR says.

    By default that is opsdc_jax/ in the user's cache folder, if that can be written.

    Raises:
      InputError: JAX_COMPILATION_CACHE_DIR cannot be written.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given and "://" in given:  # a bucket
        return
    folder = pathlib.Path(given) if given else user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if given:
            raise InputError(
                f"JAX_COMPILATION_CACHE_DIR={given} cannot be written ({error.strerror}): choose "
                "another folder, or unset it"
            ) from None
        print(f"compiled programs are not kept: {folder} cannot be written ({error.strerror})")
        return
    if not given:
        jax.config.update("jax_compilation_cache_dir", str(folder))


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
    _define_debug(values)
    if _HELP & set(argv[1:]):
        print(values.get_help())
        raise SystemExit(EXIT_DONE)
    known = flatten(default_config())
    for argument in argv[1:]:
        override = _OVERRIDE.match(argument)
        if override and override[1] not in known:
            raise InputError(unknown_key(override[1]))
    path = config_path(argv) if "config" in values else None
    if path is not None:
        _check_is_file(path)
    try:
        rest = values(list(argv))
        if path is not None:
            values.config  # noqa: B018 (a file that could not be loaded only complains when used)
    except flags.Error as error:
        if path is None or not _comes_from_a_file(error):
            raise InputError(_sentence(error)) from None
        raise InputError(_not_loaded(path, error)) from error
    # Whatever a configuration file of the user's may do, leaving the process included.
    except (Exception, SystemExit) as error:
        raise InputError(_not_loaded(path, error)) from error
    if "config" in values and not isinstance(values.config, ConfigDict):
        if path is None:
            raise InputError("--config FILE is required, for instance --config configs/tiny.py")
        raise InputError(
            f"--config={path}: get_config() returned {type(values.config).__name__}, not a "
            "ConfigDict: let it return what default_config() gave, changed"
        )
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: options start with --")
    return values


def _define_debug(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("debug", False, "show the traceback of bad input too", flag_values=values)


def _check_is_file(path: str) -> None:
    if not os.path.isfile(path):
        reason = (
            "is no Python file" if os.path.exists(path) else "does not exist: there is no such file"
        )
        raise InputError(f"--config={path} {reason}; give one such as configs/tiny.py")


def _comes_from_a_file(error: BaseException) -> bool:
    return "File " in str(error)  # a line of a traceback, which absl puts into its message


def _not_loaded(path: str | None, error: BaseException) -> str:
    """What to tell about a configuration file that raised."""
    message = _sentence(error)
    kind = "" if isinstance(error, flags.Error) else f"{type(error).__name__}: "
    return f"--config={path} cannot be loaded: {kind}{message}"


def _sentence(error: BaseException) -> str:
    """An error's message on one line; of a traceback in it, only the end."""
    message = str(error).rpartition("Traceback (most recent call last)")[2].strip()
    return (
        " ".join(message.splitlines()[-1].split())
        if _comes_from_a_file(error)
        else " ".join(message.split())
    )


def config_path(argv: Sequence[str]) -> str | None:
    """The configuration file named in `argv`, the last one as for every flag; None without."""
    found = None
    for index, argument in enumerate(argv):
        if argument in ("--config", "-config"):
            found = argv[index + 1] if index + 1 < len(argv) else None
        elif argument.startswith(("--config=", "-config=")):
            found = argument.partition("=")[2]
    return found


def config_name(argv: Sequence[str]) -> str:
    """The stem of the configuration file named in `argv`."""
    path = config_path(argv)
    return "run" if path is None else pathlib.Path(path).stem


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Calls a script's main and turns bad input into one sentence and exit code 2.

    Of several processes, one that fails ends at once, and those that wait for it with it.

    With --help, the script's docstring and its flags are printed instead; with --debug, bad input
    shows where it was found as well.
    """
    argv = sys.argv if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the character ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    if _HELP & set(argv[1:]):
        print(main.__globals__["__doc__"])
    try:
        return main(argv)
    except InputError as error:
        if _is_debug(argv):
            error.__suppress_context__ = False  # the error that it was made of, too
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(EXIT_BAD_INPUT)
        return EXIT_BAD_INPUT
    except Exception:
        if distributed.is_one_of_several():
            traceback.print_exc()
            distributed.leave(EXIT_FAILED)
        raise


def _is_debug(argv: Sequence[str]) -> bool:
    """Whether --debug is switched on, in whatever spelling; the other flags may be wrong."""
    values = flags.FlagValues()
    _define_debug(values)
    try:
        values(["", *(argument for argument in argv if "debug" in argument)], known_only=True)
    except flags.Error:
        return False
    return values.debug
