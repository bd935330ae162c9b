"""An advice as something to print, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mora_jax.planning.advice import Advice
from mora_jax.planning.plan import Plan
from mora_jax.planning.roofline import ASSUMPTION

_GB = 1e9
QUANTISATION = {
    "none": "none, weights are model.dtype",
    "int8": "int8, layers at 8.5 bits a number; embedding, head and norms are model.dtype",
    "nf4": "nf4, layers at 4.5 bits a number; embedding, head and norms are model.dtype",
}
_PARTS = {
    "weights": "frozen weights",
    "adapters": "what is trained (float32)",
    "optimizer": "optimizer state",
    "batch": "batch",
    "padding": "padding of layouts",
    "activations": "activations kept for the backward pass",
    "temp": "temporary: gradients, one layer, gathered weights",
}


def view(advice: Advice, model: str, price: float | None) -> Group:
    """The report for a terminal.

    Args:
        advice: what was found.
        model: the model's name.
        price: of one chip for one hour; None for no cost.
    """
    plans = {"as configured": advice.asked}
    if advice.advised is not None and advice.advised is not advice.asked:
        plans["recommended"] = advice.advised
    topology = advice.asked.topology
    chip = topology.chip
    head = (
        f"{model} on {topology.name}: {topology.chips} × {chip.name}, each {chip.memory_bytes / _GB:.1f} GB, "
        f"{chip.bf16_flops / 1e12:.0f} TFLOP/s bfloat16, {chip.memory_bandwidth / _GB:.0f} GB/s\n"
        f"{advice.asked.trainable:,} of {advice.asked.parameters:,} parameters are trained "
        f"({advice.asked.config.adapter.method}), {advice.asked.config.data.max_length} tokens a row"
    )
    parts: list[RenderableType] = [Text(head), _settings(plans), _memory(plans), _work(plans), _cost(plans, price)]
    parts.append(Text(f"\nAssumed: {ASSUMPTION}."))
    parts += [Text(f"quantisation, {name}: {quantisation(plan)}") for name, plan in plans.items()]
    if any(plan.source == "compiled" and not plan.fits for plan in plans.values()):
        parts.append(Text("note: of what doesn't fit the compiler says the total alone; the parts are by formula"))
    parts += [Text(f"note: {words}") for words in advice.notes]
    parts += [Text(words) for words in advice.hints]
    parts.append(Text(f"\n{verdict(advice)}", style="bold"))
    return Group(*parts)


def verdict(advice: Advice) -> str:
    """What to do, in a sentence or two."""
    asked, advised = advice.asked, advice.advised
    own = "The configuration fits" if asked.fits else "The configuration doesn't fit"
    if advised is asked:
        return f"{own}, and no other way looks faster."
    if advised is None:
        larger = (
            "" if advice.smallest is None else f" The smallest {asked.topology.chip.name} that would: {advice.smallest}"
        )
        if advice.tried:
            return f"{own}; the ways that should fit by formula don't by the compiler. Try more with --tries."
        other = "" if not asked.fits else " with room to spare"
        return f"{own}; no mesh, micro-batch and remat fit here{other}.{larger}"
    changed = [f"--config.{name}={value}" for name, value in _changes(asked, advised).items()]
    return f"{own}. Recommended: {' '.join(changed)}"


def quantisation(plan: Plan) -> str:
    """How a plan holds the base, in words."""
    return QUANTISATION[plan.config.model.quantize]


def _changes(asked: Plan, advised: Plan) -> dict[str, Any]:
    before = asked.settings()
    return {name: value for name, value in advised.settings().items() if before[name] != value}


def _table(title: str, plans: dict[str, Plan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", title_justify="left")
    table.add_column(f"\n{title}")
    for name in plans:
        table.add_column(f"\n{name}", justify="right")
    return table


def _settings(plans: dict[str, Plan]) -> Table:
    table = _table("Settings", plans)
    for name in next(iter(plans.values())).settings():
        table.add_row(name, *(str(plan.settings()[name]) for plan in plans.values()))
    table.add_row("attention by", *(plan.attention for plan in plans.values()))
    return table


def _memory(plans: dict[str, Plan]) -> Table:
    table = _table("GB on each chip", plans)
    for name, words in _PARTS.items():
        table.add_row(words, *(f"{getattr(plan.memory, name) / _GB:.2f}" for plan in plans.values()))
    table.add_row("total", *(f"{plan.needed / _GB:.2f}" for plan in plans.values()), style="bold")
    table.add_row("usable", *(f"{plan.topology.usable_bytes / _GB:.2f}" for plan in plans.values()))
    table.add_row("fits", *("yes" if plan.fits else "no" for plan in plans.values()), style="bold")
    table.add_row("figures by", *(_source(plan) for plan in plans.values()))
    return table


def _source(plan: Plan) -> str:
    return plan.source if plan.compile_seconds is None else f"compiler ({plan.compile_seconds:.0f} s)"


def _work(plans: dict[str, Plan]) -> Table:
    table = _table("Each chip, each step", plans)
    table.add_row("TFLOP", *(f"{plan.estimate.flops / 1e12:.1f}" for plan in plans.values()))
    table.add_row("GB to and from memory", *(f"{plan.estimate.bytes / _GB:.0f}" for plan in plans.values()))
    table.add_row("FLOP per byte", *(f"{plan.estimate.intensity:.0f}" for plan in plans.values()))
    kinds = dict.fromkeys(entry.kind for plan in plans.values() for entry in plan.collectives)
    for kind in kinds:
        table.add_row(f"{kind}: times, GB sent", *(_collective(plan, kind) for plan in plans.values()))
    return table


def _collective(plan: Plan, kind: str) -> str:
    found = [entry for entry in plan.collectives if entry.kind == kind]
    return (
        f"{sum(entry.count for entry in found)}, {sum(entry.bytes for entry in found) / _GB:.2f}" if found else "none"
    )


def _cost(plans: dict[str, Plan], price: float | None) -> Table:
    table = _table("Estimated", plans)
    every = list(plans.values())
    table.add_row("seconds a step", *(_range(plan.estimate.fastest, plan.estimate.slowest) for plan in every))
    table.add_row("bound by", *(plan.estimate.bound for plan in every))
    table.add_row("tokens/s, padding too", *(_range(*plan.estimate.tokens_per_second(plan.tokens)) for plan in every))
    chips = [plan.estimate.tokens_per_second(plan.tokens) for plan in every]
    shares = [tuple(rate / plan.topology.chips for rate in rates) for rates, plan in zip(chips, every, strict=True)]
    table.add_row("tokens/s a chip", *(_range(*share) for share in shares))
    if every[0].hours is None:
        table.add_row("hours", *("set train.steps" for _ in every))
    else:
        table.add_row(f"hours for {every[0].config.train.steps} steps", *(_range(*(p.hours or (0, 0))) for p in every))
        if price is not None:
            table.add_row("cost", *(_range(*_costs(plan, price)) for plan in every))
    return table


def _costs(plan: Plan, price: float) -> tuple[float, float]:
    low, high = plan.hours or (0.0, 0.0)
    return low * plan.topology.chips * price, high * plan.topology.chips * price


def _range(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_json(advice: Advice, model: str, price: float | None) -> dict[str, Any]:
    """The report as plain values; bytes and seconds, not rounded."""
    return {
        "model": model,
        "accelerator": advice.asked.topology.name,
        "chips": advice.asked.topology.chips,
        "chip": dataclasses.asdict(advice.asked.topology.chip),
        "method": advice.asked.config.adapter.method,
        "trainable_parameters": advice.asked.trainable,
        "parameters": advice.asked.parameters,
        "assumption": ASSUMPTION,
        "configured": plan_json(advice.asked, price),
        "recommended": None if advice.advised is None else plan_json(advice.advised, price),
        "ways_that_fit_by_formula": advice.tried,
        "smallest_that_fits": advice.smallest,
        "notes": list(advice.notes),
        "hints": list(advice.hints),
        "verdict": verdict(advice),
    }


def plan_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """One plan as plain values."""
    cost = plan.estimate
    slow, fast = cost.tokens_per_second(plan.tokens)
    found: dict[str, Any] = {
        "settings": plan.settings(),
        "attention": plan.attention,
        "quantisation": quantisation(plan),
        "figures_by": plan.source,
        "fits": plan.fits,
        "usable_bytes": plan.topology.usable_bytes,
        "total_bytes": plan.needed,
        "bytes": dataclasses.asdict(plan.memory),
        "flops": cost.flops,
        "memory_traffic_bytes": cost.bytes,
        "arithmetic_intensity": cost.intensity,
        "collectives": [dataclasses.asdict(entry) for entry in plan.collectives],
        "step_seconds": [cost.fastest, cost.slowest],
        "bound": cost.bound,
        "tokens_per_second": [slow, fast],
        "hours": None if plan.hours is None else list(plan.hours),
    }
    if price is not None:
        found["cost"] = None if plan.hours is None else list(_costs(plan, price))
    return found
