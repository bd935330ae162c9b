"""Runs of `mora-jax train` in several real processes on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys; from mora_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Ended(NamedTuple):
    """How one process ended."""

    code: int
    stderr: str


def free_port() -> int:
    """A port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Variables of a process that sees so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def started(
    arguments: Sequence[Sequence[str]], *, devices: int = 2, join: bool = True, cwd: Sequence[Path] = ()
) -> Iterator[list[subprocess.Popen]]:
    """One process for each list of arguments; those that still run at the end are killed.

    Args:
        arguments: of `mora-jax train`, by process.
        devices: that each process has.
        join: whether they are processes of one run.
        cwd: where each runs; the repository by default.
    """
    count, port = len(arguments), free_port()
    processes = []
    try:
        for index, given in enumerate(arguments):
            flags = ["--coordinator", f"127.0.0.1:{port}", "--process-id", str(index), "--process-count", str(count)]
            command = [sys.executable, "-c", COMMAND, "train", *given, *(flags if join else [])]
            where: Any = cwd[index] if cwd else ROOT
            pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, cwd=where, env=environment(devices), **pipes))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()


def ended(processes: Sequence[subprocess.Popen], seconds: float = 900) -> list[Ended]:
    """Waits for all."""
    texts = [process.communicate(timeout=seconds)[1] for process in processes]
    return [Ended(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def run(arguments: Sequence[str], processes: int, devices: int = 2) -> list[Ended]:
    """Runs the same command in so many processes of one run."""
    with started([arguments] * processes, devices=devices, join=processes > 1) as found:
        return ended(found)


def wait_for(path: Path, text: str, process: subprocess.Popen, seconds: float = 900) -> None:
    """Waits until a file holds a text while a process runs."""
    deadline = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{path} does not hold {text}"
        time.sleep(0.05)
