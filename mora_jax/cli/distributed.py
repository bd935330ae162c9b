"""A command in one process or in several that work together."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from mora_jax.cli.errors import report

if TYPE_CHECKING:
    from mora_jax.training.display import Display
    from mora_jax.training.distributed.peer_monitor import Watch

# What collectives say when another process no longer answers, on CPU, GPU and TPU.
_LOST = re.compile(r"gloo|nccl|connection|socket|unavailable|deadline|heartbeat|barrier|coordination", re.IGNORECASE)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the processes of a run."""
    about = "found without these on TPU VMs, under SLURM and Open MPI 4; else start the same command N times"
    group = parser.add_argument_group("several processes", about)
    group.add_argument("--coordinator", metavar="HOST:PORT", help="host of process 0, and a port that is free there")
    group.add_argument("--process-id", metavar="I", type=int, help="number of this process, from 0")
    group.add_argument("--process-count", metavar="N", type=int, help="how many processes there are")


def together(args: argparse.Namespace, again: str, work: Callable[[Display], int], *, silent: bool = False) -> int:
    """Does `work` with the display that suits this process, after it has joined the others, if there are any.

    Args:
        args: with the options that name the processes.
        again: the command that goes on where a process is lost, for messages.
        work: given the display, returns the exit code.
        silent: the work shows for itself how far it is.
    """
    from mora_jax.training.distributed.processes import find_cluster, read_flags

    cluster = read_flags(args.coordinator, args.process_id, args.process_count)
    if cluster is None and args.coordinator is None:
        cluster = find_cluster()
    from mora_jax.training.display import Silent, make_display

    choose = Silent if silent else make_display
    if cluster is None:
        with choose() as display:
            return work(display)
    from mora_jax.training.distributed.processes import start

    watch = start(cluster)
    watch.resume = again
    try:
        with choose() if watch.index == 0 else Silent() as display:
            code = work(display)
    except BaseException as error:  # also a signal's SystemExit
        _leave(watch, error)
        raise  # not reached: leaving ends the process
    watch.close()
    return code


def _leave(watch: Watch, error: BaseException) -> NoReturn:
    """Ends this process as `main` would, and the others with it; JAX's own shutdown would wait for them."""
    import jax

    if isinstance(error, SystemExit):
        watch.fail("was stopped", error.code if isinstance(error.code, int) else 1)
    if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
        watch.lost(" ".join(str(error).split())[:200])
    code = report(error)
    if code is None:
        traceback.print_exception(error)
        sys.stderr.flush()
    first = (str(error).splitlines() or [""])[0]
    watch.fail(f"failed: {first or type(error).__name__}", 1 if code is None else code)
