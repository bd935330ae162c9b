"""The one exception that stands for bad input from a user."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Input that the user has to fix: a path, a file's content, a setting.

    The message is one line that says what is wrong, where, and how to fix it. The command line prints it
    as `error: <message>` and exits with status 2. Code that is called with arguments it cannot work with,
    such as a pure function, raises a plain `ValueError` instead.

    Examples:
        >>> import mora_jax as mj
        >>> try:
        ...     mj.load_pretrained("./no-model")
        ... except mj.InputError as error:
        ...     print(error)
        ./no-model is not a folder (a hub id looks like owner/name)
    """


@contextlib.contextmanager
def refused(what: str = "") -> Iterator[None]:
    """Makes bad input of a plain `ValueError`, said of `what`."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{what}: {error}" if what else str(error)) from None
