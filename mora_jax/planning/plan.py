"""A plan: does this run fit these chips, and what does a step cost, by a roofline with its assumptions in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mora_jax.errors import InputError
from mora_jax.planning.collectives import Collective
from mora_jax.planning.memory_model import Step, estimate_memory
from mora_jax.planning.topology import Topology
from mora_jax.planning.tpu_compile import Compiled, compile_elsewhere
from mora_jax.training.config.schema import Config
from mora_jax.training.sharding.mesh import AXES, mesh_shape

#: What the two ends of the range assume. Published runs reach 41 to 67 % of peak in FLOPs that count (MaxText's table
#: of TPU v5e, v5p and v6e runs; NeMo's of LoRA on H100); here repeated ones (remat) count too.
FAST, SLOW = 0.70, 0.40
ASSUMPTION = (
    f"fast end: matrix products at {FAST:.0%} of peak or their operands at the full memory bandwidth, whichever takes "
    f"longer, collectives over all links and behind the products; slow end: {SLOW:.0%} of peak or twice those bytes, "
    "and collectives at half the links' bandwidth after them"
)


@dataclass(frozen=True)
class StepTime:
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

    def tokens_per_second(self, tokens: float) -> tuple[float, float]:
        """(slowest, fastest), for a step of so many tokens over all chips, padding included."""
        return tokens / self.slowest, tokens / self.fastest


def estimate(flops: float, bytes_moved: float, collectives: Iterable[Collective], topology: Topology) -> StepTime:
    """The range of step times on `topology` (see `ASSUMPTION`).

    Args:
        flops, bytes_moved: FLOPs and bytes of matrix products on each chip.
        collectives: of a step.
    """
    chip, sent, linked = topology.chip, 0.0, 0.0
    for entry in collectives:
        sent, linked = sent + entry.bytes, linked + entry.bytes * entry.beside
    fast = {
        "compute": flops / (FAST * chip.bf16_flops),
        "memory": bytes_moved / chip.memory_bandwidth,
        "network": linked / topology.link_bandwidth,
    }
    bound = max(fast, key=lambda name: fast[name])
    slow = max(flops / (SLOW * chip.bf16_flops), 2 * bytes_moved / chip.memory_bandwidth)
    slow += 2 * linked / topology.link_bandwidth
    return StepTime(flops, bytes_moved, sent, fast[bound], slow, bound)


@dataclass(frozen=True)
class Plan(Step):
    """One way to run a step, looked at.

    Attributes:
        config: of the run.
        topology: the chips.
        mesh: devices along each axis of `AXES`.
        needed: bytes on each chip, all in all; the compiler's figure where it was asked.
        fits: whether that is there.
        source: `compiled` or `formula`; of memory and collectives.
        estimate: what a step costs.
        compile_seconds: of the compiler here; None by formula.
    """

    config: Config
    topology: Topology
    mesh: tuple[int, ...]
    needed: float
    fits: bool
    source: str
    estimate: StepTime
    compile_seconds: float | None = None

    @property
    def tokens(self) -> int:
        """Places for tokens in one step, over all chips."""
        sequences = 1 if self.config.loss.preference is None else 2
        return self.config.train.batch_size * sequences * self.config.data.max_length

    @property
    def hours(self) -> tuple[float, float] | None:
        """Shortest and longest of the run; None where its steps aren't set."""
        steps = self.config.train.steps
        if steps is None:
            return None
        return steps * self.estimate.fastest / 3600, steps * self.estimate.slowest / 3600

    def settings(self) -> dict[str, Any]:
        """The keys of the configuration that make this plan what it is."""
        train, model = self.config.train, self.config.model
        return {
            **{f"mesh.{axis}": size for axis, size in zip(AXES, self.mesh, strict=True)},
            "train.batch_size": train.batch_size,
            "train.micro_batch_size": train.micro_batch,
            "model.remat": model.remat,
            "model.quantize": model.quantize,
        }


def check_plannable(config: Config) -> None:
    """Refuses what a plan can't know.

    Raises:
        InputError: naming the key.
    """
    if config.mesh.pmap:
        raise InputError("config: mesh.pmap is not planned; plan with mesh.pmap=false, which needs no more memory")
    if config.adapter.path is not None:
        raise InputError("config: adapter.path is not read here; leave it out and set the adapter's rank and targets")


def by_formula(config: Config, values: dict[str, Any], topology: Topology) -> Plan:
    """The plan of a configuration by formula.

    Args:
        config: of the run, on these chips.
        values: the model's HuggingFace config.
        topology: the chips.

    Raises:
        InputError: the mesh doesn't fit the chips or the rows, or the adapter doesn't fit the model.
    """
    mesh = mesh_shape(config.mesh, config.train.micro_batch, topology.chips)
    step = estimate_memory(config, values, mesh, "tpu" if topology.tpu else "gpu")
    return Plan(
        **vars(step),
        config=config,
        topology=topology,
        mesh=mesh,
        needed=step.memory.total,
        fits=step.memory.total <= topology.usable_bytes,
        source="formula",
        estimate=estimate(step.flops, step.bytes, step.collectives, topology),
    )


def compiled(plan: Plan, values: dict[str, Any]) -> Plan:
    """The same plan with the compiler's figures for memory and collectives.

    Raises:
        CompilerError: the compiler failed.
    """
    return with_figures(plan, compile_elsewhere(plan.config, values, plan.topology, plan.mesh))


def with_figures(plan: Plan, answer: Compiled) -> Plan:
    """The plan with what the compiler said in place of the formula's memory and collectives."""
    common: dict[str, Any] = {"source": "compiled", "compile_seconds": answer.seconds, "fits": answer.fits}
    if not answer.fits:
        needed = plan.needed if answer.total is None else answer.total
        return dataclasses.replace(plan, needed=needed, **common)
    formula = plan.memory
    memory = dataclasses.replace(
        formula,
        padding=answer.arguments - formula.arguments,
        activations=min(formula.activations, answer.temp),
        temp=answer.outputs + answer.code + max(0.0, answer.temp - formula.activations),
    )
    sent = plan.collectives if answer.collectives is None else answer.collectives
    cost = estimate(plan.flops, plan.bytes, sent, plan.topology)
    return dataclasses.replace(plan, memory=memory, needed=memory.total, collectives=sent, estimate=cost, **common)
