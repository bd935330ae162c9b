"""The command line `mora-jax`: one file a command, without logic of its own."""

import gc
import signal


def start() -> int:
    """Runs `mora-jax`: what the installed script calls; returns the exit code."""
    # A Ctrl-C while Python still imports ends the process without a traceback; `main` has handlers of its own.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mora_jax.cli.main import main

    code = main()
    gc.freeze()  # or the interpreter's end looks through a million objects for a second
    return code
