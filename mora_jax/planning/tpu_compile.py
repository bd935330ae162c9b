"""Asks the TPU's own compiler, in another process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from mora_jax.planning.collectives import Collective
from mora_jax.planning.topology import Topology
from mora_jax.training.config.schema import Config


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step, per chip.

    Attributes:
        fits: whether the program fits the chip's memory.
        seconds: that compiling took here.
        total: bytes of memory it needs; None where it doesn't fit and the compiler doesn't say.
        arguments, outputs, temp, code: the parts of it where it fits: weights, state and batch; results that don't
            take their place; everything in between; the program.
        host: bytes in the host's memory.
        collectives: of a step; None where the program can't be read.
    """

    fits: bool
    seconds: float
    total: float | None
    arguments: int = 0
    outputs: int = 0
    temp: int = 0
    code: int = 0
    host: int = 0
    collectives: tuple[Collective, ...] | None = None

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Compiled:
        """From what the other process said."""
        if not answer["fits"]:
            return cls(False, answer["seconds"], answer.get("total"))
        parts = {name: answer[name] for name in ("arguments", "outputs", "temp", "code")}
        listed = answer["collectives"]
        sent = None if listed is None else tuple(Collective(**entry) for entry in listed)
        return cls(True, answer["seconds"], sum(parts.values()), **parts, host=answer["host"], collectives=sent)


class CompilerError(Exception):
    """The compiler failed for another reason than memory; the message is its last line."""


def compile_elsewhere(config: Config, decoder: dict[str, Any], topology: Topology, mesh: tuple[int, ...]) -> Compiled:
    """Compiles the step of `config` for a model and a mesh of TPUs.

    Args:
        config: of the run.
        decoder: the model's HuggingFace config.
        topology: TPUs; all of their chips make up the mesh.
        mesh: devices along each of its axes.

    Raises:
        CompilerError: it failed, and not for want of memory.
    """
    return Compiled.read(ask(config, decoder, topology, mesh))


def ask(config: Config, decoder: dict[str, Any], topology: Topology, mesh: tuple[int, ...]) -> dict[str, Any]:
    """The other process's answer as it is (see compile_worker.py)."""
    task = {"config": config.to_dict(), "decoder": decoder, "topology": topology.tpu, "mesh": mesh}
    command = [sys.executable, "-m", "mora_jax.planning.compile_worker"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CompilerError(lines[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


_SIZE = r"([\d.]+)([KMGT]?)"
_WORDS = (  # of newer and of older versions
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_shortage(message: str) -> dict[str, Any]:
    """`total`, the bytes that it needs, and `limit`, what a program can have; else the message's first line."""
    sizes = next(filter(None, (pattern.search(message) for pattern in _WORDS)), None)
    if sizes is None:
        return {"message": message.splitlines()[0][:300]}
    total, limit = (float(sizes[i]) * _UNITS[sizes[i + 1]] for i in (1, 3))
    return {"total": total, "limit": limit}
