"""A plan: does this run fit these chips, and what does a step cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mora_jax.errors import InputError
from mora_jax.planning.collectives import Collective
from mora_jax.planning.memory_model import Memory, estimate_memory
from mora_jax.planning.roofline import Estimate, estimate
from mora_jax.planning.topology import Topology
from mora_jax.planning.tpu_compile import Compiled, compile_elsewhere
from mora_jax.training.config.schema import Config
from mora_jax.training.sharding.mesh import AXES, mesh_shape


@dataclass(frozen=True)
class Plan:
    """One way to run a step, looked at.

    Attributes:
        config: of the run.
        topology: the chips.
        mesh: devices along each axis of `AXES`.
        memory: on each chip.
        needed: bytes on each chip, all in all; the compiler's figure where it was asked.
        fits: whether that is there.
        source: `compiled` or `formula`.
        collectives: of a step.
        estimate: what a step costs.
        trainable, parameters: numbers that are trained, and of the whole model.
        attention: what computes it.
        compile_seconds: of the compiler here; None by formula.
    """

    config: Config
    topology: Topology
    mesh: tuple[int, ...]
    memory: Memory
    needed: float
    fits: bool
    source: str
    collectives: tuple[Collective, ...]
    estimate: Estimate
    trainable: int
    parameters: int
    attention: str
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
        train = self.config.train
        found: dict[str, Any] = {f"mesh.{axis}": size for axis, size in zip(AXES, self.mesh, strict=True)}
        found["train.batch_size"], found["train.micro_batch_size"] = train.batch_size, train.micro_batch
        found["model.remat"] = self.config.model.remat
        found["model.quantize"] = self.config.model.quantize
        return found


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
    found = estimate_memory(config, values, mesh, "tpu" if topology.tpu else "gpu")
    cost = estimate(found.flops, found.bytes, found.collectives, topology)
    needed = found.memory.total
    fits = needed <= topology.usable_bytes
    counts = found.trainable, found.parameters, found.attention
    return Plan(config, topology, mesh, found.memory, needed, fits, "formula", found.collectives, cost, *counts)


def compiled(plan: Plan, values: dict[str, Any]) -> Plan:
    """The same plan with the compiler's figures for memory and collectives.

    Raises:
        CompilerError: the compiler failed.
    """
    answer = compile_elsewhere(plan.config, values, plan.topology, plan.mesh)
    return with_figures(plan, answer)


def with_figures(plan: Plan, answer: Compiled) -> Plan:
    """The plan with what the compiler said in place of the formula's memory and collectives."""
    common: dict[str, Any] = {"source": "compiled", "compile_seconds": answer.seconds, "fits": answer.fits}
    if not answer.fits:
        needed = plan.needed if answer.total is None else answer.total
        return dataclasses.replace(plan, needed=needed, **common)
    own = plan.memory
    memory = dataclasses.replace(
        own,
        padding=answer.arguments - own.arguments,
        activations=min(own.activations, answer.temp),
        temp=answer.outputs + answer.code + max(0.0, answer.temp - own.activations),
    )
    found = plan.collectives if answer.collectives is None else answer.collectives
    cost = estimate(plan.estimate.flops, plan.estimate.bytes, found, plan.topology)
    return dataclasses.replace(plan, memory=memory, needed=memory.total, collectives=found, estimate=cost, **common)
