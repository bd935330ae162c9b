"""An advice as something to print, and as JSON."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mora_jax.planning.advice import Advice
from mora_jax.planning.plan import ASSUMPTION, Plan
from mora_jax.training.display import duration

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
    parts: list[RenderableType] = [Text(head), *_tables(plans, price)]
    parts.append(Text(f"\nAssumed: {ASSUMPTION}."))
    parts += [Text(f"quantisation, {name}: {QUANTISATION[plan.config.model.quantize]}") for name, plan in plans.items()]
    if any(plan.source == "compiled" and not plan.fits for plan in plans.values()):
        parts.append(Text("note: of what doesn't fit the compiler says the total alone; the parts are by formula"))
    parts += [Text(f"note: {note}") for note in advice.notes]
    parts += [Text(hint) for hint in advice.hints]
    parts.append(Text(f"\n{verdict(advice)}", style="bold"))
    return Group(*parts)


def verdict(advice: Advice) -> str:
    """What to do, in a sentence or two."""
    asked, advised = advice.asked, advice.advised
    fits = "The configuration fits" if asked.fits else "The configuration doesn't fit"
    if advised is asked:
        return f"{fits}, and no other way looks faster."
    if advised is not None:
        before, after = asked.settings(), advised.settings()
        changes = [f"--config.{name}={after[name]}" for name in after if before[name] != after[name]]
        return f"{fits}. Recommended: {' '.join(changes)}"
    if advice.tried:
        return f"{fits}; the ways that should fit by formula don't by the compiler. Try more with --tries."
    larger = advice.smallest and f" The smallest {asked.topology.chip.name} that would: {advice.smallest}"
    room = " with room to spare" if asked.fits else ""
    return f"{fits}; no mesh, micro-batch and remat fit here{room}.{larger or ''}"


def _tables(plans: dict[str, Plan], price: float | None) -> Iterator[Table]:
    """Settings, memory, work and cost: a row a figure, a column a plan."""

    def table(title: str, rows: Mapping[str, Callable[[Plan], str]], bold: Sequence[str] = ()) -> Table:
        view = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", title_justify="left")
        view.add_column(f"\n{title}")
        for name in plans:
            view.add_column(f"\n{name}", justify="right")
        for name, text in rows.items():
            view.add_row(name, *map(text, plans.values()), style="bold" if name in bold else None)
        return view

    asked, *_ = plans.values()
    settings = {name: lambda plan, name=name: str(plan.settings()[name]) for name in asked.settings()}
    yield table("Settings", {**settings, "attention by": lambda plan: plan.attention})
    memory = {title: lambda plan, part=part: _gb(getattr(plan.memory, part)) for part, title in _PARTS.items()}
    totals: dict[str, Callable[[Plan], str]] = {
        "total": lambda plan: _gb(plan.needed),
        "usable": lambda plan: _gb(plan.topology.usable_bytes),
        "fits": lambda plan: "yes" if plan.fits else "no",
        "figures by": _source,
    }
    yield table("GB on each chip", memory | totals, bold=("total", "fits"))
    work: dict[str, Callable[[Plan], str]] = {
        "TFLOP": lambda plan: f"{plan.estimate.flops / 1e12:.1f}",
        "GB to and from memory": lambda plan: f"{plan.estimate.bytes / _GB:.0f}",
        "FLOP per byte": lambda plan: f"{plan.estimate.intensity:.0f}",
    }
    for kind in dict.fromkeys(entry.kind for plan in plans.values() for entry in plan.collectives):
        work[f"{kind}: times, GB sent"] = functools.partial(_collective, kind=kind)
    yield table("Each chip, each step", work)
    cost: dict[str, Callable[[Plan], str]] = {
        "seconds a step": lambda plan: _range(plan.estimate.fastest, plan.estimate.slowest),
        "bound by": lambda plan: plan.estimate.bound,
        "tokens/s, padding too": lambda plan: _range(*plan.estimate.tokens_per_second(plan.tokens)),
        "tokens/s a chip": lambda plan: _range(*plan.estimate.tokens_per_second(plan.tokens / plan.topology.chips)),
    }
    if asked.hours is None:
        cost["time"] = lambda plan: "set train.steps"
    else:
        cost[f"time for {asked.config.train.steps} steps"] = lambda plan: " to ".join(
            duration(3600 * hours) for hours in plan.hours or (0, 0)
        )
        if price is not None:
            cost["cost"] = lambda plan: _range(*_costs(plan, price))
    yield table("Estimated", cost)


def _gb(size: float) -> str:
    return f"{size / _GB:.2f}"


def _source(plan: Plan) -> str:
    return plan.source if plan.compile_seconds is None else f"compiler ({plan.compile_seconds:.0f} s)"


def _collective(plan: Plan, kind: str) -> str:
    entries = [entry for entry in plan.collectives if entry.kind == kind]
    if not entries:
        return "none"
    return f"{sum(entry.count for entry in entries)}, {_gb(sum(entry.bytes for entry in entries))}"


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
    values: dict[str, Any] = {
        "settings": plan.settings(),
        "attention": plan.attention,
        "quantisation": QUANTISATION[plan.config.model.quantize],
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
        values["cost"] = None if plan.hours is None else list(_costs(plan, price))
    return values
