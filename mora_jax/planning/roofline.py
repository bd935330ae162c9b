"""From FLOPs, bytes and collectives to a range of step times: a roofline with its assumptions in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mora_jax.planning.collectives import Collective
from mora_jax.planning.topology import Topology

#: What the two ends of the range assume. Published runs reach 41 to 67 % of peak in FLOPs that count (MaxText's table
#: of TPU v5e, v5p and v6e runs; NeMo's of LoRA on H100); here repeated ones (remat) count too.
FAST, SLOW = 0.70, 0.40
ASSUMPTION = (
    f"fast end: matrix products at {FAST:.0%} of peak or their operands at the full memory bandwidth, whichever takes "
    f"longer, collectives over all links and behind the products; slow end: {SLOW:.0%} of peak or twice those bytes, "
    "and collectives at half the links' bandwidth after them"
)


@dataclass(frozen=True)
class Estimate:
    """What a step costs.

    Attributes:
        flops, bytes: of matrix products on each chip; bytes are their operands and results, once each.
        sent: bytes that each chip sends in collectives.
        fastest, slowest: seconds a step.
        bound: what takes longest at the fast end: `compute`, `memory` or `network`.
    """

    flops: float
    bytes: float
    sent: float
    fastest: float
    slowest: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of memory traffic."""
        return self.flops / self.bytes

    def tokens_per_second(self, tokens: int) -> tuple[float, float]:
        """(slowest, fastest), for a step of so many tokens over all chips, padding included."""
        return tokens / self.slowest, tokens / self.fastest


def estimate(flops: float, moved: float, collectives: Iterable[Collective], topology: Topology) -> Estimate:
    """The range of step times on `topology` (see `ASSUMPTION`).

    Args:
        flops, moved: FLOPs and bytes of matrix products on each chip.
        collectives: of a step.
    """
    chip, sent = topology.chip, sum(entry.bytes for entry in collectives)
    fast = {
        "compute": flops / (FAST * chip.bf16_flops),
        "memory": moved / chip.memory_bandwidth,
        "network": sent / topology.link_bandwidth,
    }
    bound = max(fast, key=lambda name: fast[name])
    slow = max(flops / (SLOW * chip.bf16_flops), 2 * moved / chip.memory_bandwidth)
    slow += 2 * sent / topology.link_bandwidth
    return Estimate(flops, moved, sent, fast[bound], slow, bound)
