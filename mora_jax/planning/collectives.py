"""Which collectives a compiled step runs, read from its HLO text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OP = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})(-start)?\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+\d+\w*)\[(?P<sizes>[\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}
_CALLS = re.compile(r"calls=%?([\w.<>-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.<>-]+) \(.*\{$|^(ENTRY )?%?(?P<plain>[\w.<>-]+) .*\{$")


@dataclass(frozen=True)
class Loops:
    """How often the loops of a step run: HLO doesn't always say.

    Attributes:
        layers: turns of the loop over the model's layers.
        micro_batches: of a step; 1 for no such loop.
        chunks: of the vocabulary loss, where every token carries loss.
        turns: of the ring in which devices pass on keys and values, inside a layer; 1 where rows are whole.
    """

    layers: int
    micro_batches: int
    chunks: int
    turns: int = 1

    def trips(self, op_name: str) -> int:
        """How often an operation runs in a step, by the loops that its name says it is in.

        A loop inside that over the loss's chunks doesn't run: it mends a loss that isn't finite. Those inside a layer's
        ring go over attention's tiles, where no device sends anything.
        """
        *loops, _ = op_name.split("/while/body")
        total, outer, inside = 1, self.micro_batches > 1, ""
        for loop in loops:
            if "hidden_states" in loop:
                total, outer, inside = total * self.layers, False, "layer"
            elif outer:
                total, outer = total * self.micro_batches, False
            elif inside == "loss":
                return 0
            elif inside:
                total, inside = total * (self.turns if inside == "layer" else 1), "ring"
            else:
                total, inside = total * self.chunks, "loss"
        return total


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step.

    Attributes:
        kind: as HLO calls it.
        count: how often one runs.
        bytes: that a device sends, over all of them, by the ring algorithm.
        beside: groups that send through the same host's network cards at the same time.
    """

    kind: str
    count: int
    bytes: float
    beside: int = 1


def collectives(hlo: str, devices: int, loops: Loops) -> list[Collective]:
    """The collectives of a step by kind.

    The compiler may write one operation several times, for the parts of an asynchronous one; its channel and name tell
    which are the same. Permutations are written once, and those of a `shard_map` share one channel. One inside a fused
    computation may have no name: then it is in the loops of who calls that. A sum of which everyone keeps a share is an
    all-reduce in a computation of its own. Products that are split into windows run their permutations in a loop of
    their own, forwards and backwards and two at a time: a quarter of the devices' number of trips.

    Args:
        hlo: the compiled program's text.
        devices: in the mesh.
        loops: of the step.
    """
    operations: dict[tuple[Any, ...], tuple[str, int, float]] = {}
    inside, lines = "", hlo.splitlines()
    callers = {called[1]: _name(line) for line in lines if (called := _CALLS.search(line))}
    for number, line in enumerate(lines):
        if head := _COMPUTATION.match(line):
            inside = head["name"] or head["plain"]
            continue
        op = _OP.search(line)
        if op is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        name = _name(line) or callers.get(inside, "")
        trips = loops.trips(name)
        if "windowed" in inside:
            trips *= max(1, devices // 4)
        kind, size = op["kind"], _sent(op["kind"], op["shape"], _group(op["rest"], devices))
        if inside.startswith("all-reduce-scatter"):
            kind, size = "reduce-scatter", size / 2
        same = (channel[1], kind, name) if channel and kind != "collective-permute" else (number,)
        operations.setdefault(same, (kind, trips, trips * size))
    sums = []
    for kind in _KINDS:
        entries = [entry for entry in operations.values() if entry[0] == kind and entry[2] > 0]
        if entries:
            sums.append(Collective(kind, sum(entry[1] for entry in entries), sum(entry[2] for entry in entries)))
    return sums


def _name(line: str) -> str:
    """The name that an operation has from the program that was compiled; nothing where it has none."""
    name = re.search(r'op_name="([^"]*)"', line)
    return name[1] if name else ""


def _sent(kind: str, shape: str, group: int) -> float:
    """Bytes that each device of a group sends in one collective, given the shape of its result."""
    sizes = [_bytes(array) for array in _ARRAY.finditer(shape)]
    share = (group - 1) / group
    if kind == "collective-permute":
        return max(sizes, default=0)
    if kind == "reduce-scatter":
        return sum(sizes) * (group - 1)
    return sum(sizes) * share * (2 if kind == "all-reduce" else 1)


def _bytes(array: re.Match[str]) -> float:
    numbers = [int(size) for size in array["sizes"].split(",") if size]
    bits = _BITS.get(array["type"]) or int(re.sub(r"\D", "", array["type"][:3]) or 32)
    return math.prod(numbers) * bits / 8


def _group(rest: str, devices: int) -> int:
    """Devices that take part together: those of one replica group, written in one of HLO's three ways."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return max(1, len(listed[1].split(",")))
    return devices
