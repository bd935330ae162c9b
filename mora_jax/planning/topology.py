"""From the name that one rents (`v5e-8`, `v5p-64`, `h100x8`) to chips and how they are connected."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mora_jax.errors import InputError
from mora_jax.training.config.key import nearest
from mora_jax.training.observe.flops import ACCELERATORS, Accelerator

# Shapes of slices in chips, from Cloud TPU's page of each version. The number in the name of a v4 or v5p slice counts
# TensorCores, of which a chip has two; that of a v5e or v6e slice counts chips.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
}
_SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
_CORES = {"v4": 2, "v5p": 2}
_ALIASES = {"v5litepod": "v5e"}

# Bytes/s that a chip sends to its neighbours over all links, one direction. TPUs: half of "bidirectional ICI bandwidth
# per chip" (v5e 400, v6e 800, v5p 1200 GB/s; v4 from its 2400 Gbit/s). GPUs: half of NVLink's total (A100 600, H100 and
# H200 900 GB/s), or of PCIe 4.0 x16's 64 GB/s; PCIe cards have no NVLink between eight of them.
_LINKS = {
    "v4": 300e9,
    "v5e": 200e9,
    "v5p": 600e9,
    "v6e": 400e9,
    "a100": 300e9,
    "a100-40gb": 300e9,
    "h100": 450e9,
    "h200": 450e9,
    "h100-pcie": 64e9,
    "l4": 32e9,
    "l40s": 32e9,
}
# Bytes/s that a GPU sends to other hosts by its own network card, one direction: 200 Gbit/s in a DGX A100, 400 in a
# DGX H100 and H200 and in what clouds build of them.
_CARDS = {"a100": 25e9, "h100": 50e9, "h200": 50e9}
_GPUS = (1, 2, 4, 8)  # of one host
_SEVERAL_HOSTS = (16, 32, 64, 128, 256)  # of hosts of eight


@dataclass(frozen=True)
class Topology:
    """Chips that are rented together.

    Attributes:
        name: as it was given, in its usual form.
        chip: what one can do.
        chips: how many; JAX counts each as a device.
        tpu: libtpu's name of the slice, such as `v5e:2x4`; None for GPUs.
        link_bandwidth: bytes/s that a chip sends to the others at best, one direction. Of GPUs on several hosts: around
            rings that all eight cards of a host are in, as those of collectives over all GPUs. Those between GPUs that
            share no host have one card.
    """

    name: str
    chip: Accelerator
    chips: int
    tpu: str | None
    link_bandwidth: float

    @property
    def usable_bytes(self) -> float:
        """Memory of a chip that a program can have: a quarter of a GiB of a TPU is the runtime's; of a GPU a share
        goes to CUDA's context, NCCL and fragments (and XLA takes three quarters unless it is told otherwise)."""
        return self.chip.memory_bytes - 2**28 if self.tpu else 0.92 * self.chip.memory_bytes


def read_topology(text: str) -> Topology:
    """The chips that `text` names.

    Raises:
        InputError: there are none of that name; says the nearest.
    """
    name = text.strip().lower()
    if match := re.fullmatch(r"(v\d\w*)-(\d+)", name):
        version, number = _ALIASES.get(match[1], match[1]), int(match[2])
        if version in _SLICES:
            return _slice(version, number)
    if match := re.fullmatch(r"([a-z][\w-]*?)(?:x(\d+))?", name):
        kind, number = match[1], int(match[2] or 1)
        if kind in ACCELERATORS and kind not in _SLICES:
            if number not in _counts(kind):
                raise InputError(f"--accelerator {text}: there are {_listed(_counts(kind))} of {kind}, eight a host")
            link = min(_LINKS[kind], 8 * _CARDS[kind]) if number > 8 else _LINKS[kind]
            return Topology(f"{kind}x{number}", ACCELERATORS[kind], number, None, link)
    hint = nearest(name, names())
    raise InputError(
        f"--accelerator {text}: unknown; did you mean {hint}?"
        if hint
        else f"--accelerator {text}: unknown; give a TPU slice such as v5e-8, v5p-64, v6e-16, or GPUs such as h100x8"
    )


def _slice(version: str, number: int) -> Topology:
    cores, shapes = _CORES.get(version, 1), _SLICES[version]
    if number % cores or number // cores not in shapes:
        sizes = [size * cores for size in shapes]
        closest = min(sizes, key=lambda size: abs(size - number))
        counted = "TensorCores, two a chip" if cores == 2 else "chips"
        raise InputError(
            f"--accelerator {version}-{number}: no such slice (the number counts {counted}); "
            f"did you mean {version}-{closest}? There are {_listed(sizes)}"
        )
    chips = number // cores
    return Topology(f"{version}-{number}", ACCELERATORS[version], chips, f"{version}:{shapes[chips]}", _LINKS[version])


def names() -> list[str]:
    """Every name there is."""
    tpus = [f"{version}-{size * _CORES.get(version, 1)}" for version, shapes in _SLICES.items() for size in shapes]
    gpus = [name for name in ACCELERATORS if name not in _SLICES]
    return [*tpus, *(f"{name}x{count}" for name in gpus for count in _counts(name))]


def _counts(kind: str) -> tuple[int, ...]:
    """How many GPUs of a kind are rented together."""
    return _GPUS + (_SEVERAL_HOSTS if kind in _CARDS else ())


def _listed(numbers) -> str:
    return ", ".join(str(number) for number in numbers)


def larger(topology: Topology) -> list[Topology]:
    """The slices (or hosts) of the same kind with more chips, the smallest first."""
    kind = topology.chip.name
    same = (read_topology(name) for name in names() if re.split(r"-(?=\d+$)|x(?=\d+$)", name)[0] == kind)
    return sorted((other for other in same if other.chips > topology.chips), key=lambda other: other.chips)
