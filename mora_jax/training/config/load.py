"""From a config file and command-line overrides to a checked `Config`.

The file has `get_config()` returning an `ml_collections.ConfigDict` that holds only what it changes.
It is laid over the defaults, and the overrides over both, so any documented key can be set whether or not the
file names it.
"""

import contextlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from mora_jax.errors import InputError
from mora_jax.paths import expanded
from mora_jax.training.config.checks import check_together
from mora_jax.training.config.schema import Config, find_key, flatten, lay_over, unused
from mora_jax.training.distributed.signals import Stopped

MODULE_NAME = "mora_jax_config_file"


def load_config(
    path: str | None, overrides: Sequence[tuple[str, str]] = (), defaults: Mapping[str, Any] | None = None
) -> tuple[Config, str | None]:
    """Reads a configuration.

    Args:
        path: the config file, or None for the defaults alone.
        overrides: (dotted key, text) pairs from the command line; later ones win.
        defaults: values of dotted keys where neither sets them, instead of the usual ones.

    Returns:
        The checked configuration, and one line about keys that this run ignores (None when there are none).

    Raises:
        InputError: on a file that can't be read or run, unknown keys, wrong types, values out of range.
    """
    settings = read_settings(path, overrides)
    first = [(name, value, "defaults") for name, value in (defaults or {}).items()]
    config = lay_over(Config(), first + settings)
    check_together(config)
    return config, unused(config, {name for name, _, _ in settings})


def read_settings(path: str | None, overrides: Sequence[tuple[str, str]] = ()) -> list[tuple[str, Any, str]]:
    """The (dotted key, value, origin) settings of a config file, if any, and of the command line after it."""
    settings = [] if path is None else read_config_file(path)
    for name, text in overrides:
        origin = f"--config.{name}"
        settings.append((name, find_key(name, origin).parse(text, origin), origin))
    return settings


def read_config_file(path: str) -> list[tuple[str, Any, str]]:
    """Runs a config file and returns its (dotted key, value, origin) settings.

    What the file prints goes to stderr: stdout is for results. A required placeholder counts as not set.

    Raises:
        InputError: when the file can't be read, doesn't compile, raises, exits, or returns no ConfigDict.
    """
    try:
        source = expanded(path).read_bytes()
    except OSError as error:
        raise InputError(f"config file {path}: can't be read ({error.strerror}); give --config a Python file") from None
    module = types.ModuleType(MODULE_NAME)
    module.__file__ = path
    sys.modules[MODULE_NAME] = module  # dataclasses and pickling in the file look their module up there
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(source, path, "exec"), module.__dict__)
            get_config = module.__dict__.get("get_config")
            if not callable(get_config):
                raise InputError(f"config file {path}: defines no get_config(); it must return a ConfigDict")
            values = get_config()
            if not isinstance(values, config_dict.ConfigDict):
                raise InputError(
                    f"config file {path}: get_config() returned {type(values).__name__}; "
                    "it must return an ml_collections.ConfigDict"
                )
            return [(name, value, path) for name, value in flatten(_plain(values))]
    except (InputError, KeyboardInterrupt, Stopped):
        raise
    # The file is a stranger's program: whatever it raises is bad input, not a bug of this one.
    except BaseException as error:  # noqa: BLE001
        raise InputError(f"config file {path}{_line_of(error, path)}: {_words(error)}") from None
    finally:
        sys.modules.pop(MODULE_NAME, None)


def _plain(values: config_dict.ConfigDict) -> dict[str, Any]:
    plain = {}
    for name in values:
        try:
            value = values[name]
        except config_dict.RequiredValueError:
            continue
        plain[str(name)] = _plain(value) if isinstance(value, config_dict.ConfigDict) else value
    return plain


def _line_of(error: BaseException, path: str) -> str:
    """Returns ", line N" for the deepest line of the file that took part in the error, or nothing."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f", line {error.lineno}"
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    return f", line {line}" if line is not None else ""


def _words(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"calls exit ({error.code}); it must only return a ConfigDict"
    if isinstance(error, SyntaxError):
        return f"syntax error ({error.msg})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
