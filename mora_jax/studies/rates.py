"""What rank and learning rate does a method need? After LoRA Without Regret and later comparisons with swept rates.

One task, all methods, and around each chosen rate the rates beside it on every reported seed. The best rate is a point
of the grid: which of these has the lowest mean, and which others have it when seeds are drawn anew.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax import demo
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.data.inspect.advice import BITS_A_PARAMETER, bits_to_learn
from mora_jax.errors import InputError
from mora_jax.studies.claims import between_levels
from mora_jax.studies.conclusion import table
from mora_jax.studies.figures import FILLINGS, finish, new_figure, plain_log, style
from mora_jax.studies.intervals import differences, interval, paired
from mora_jax.studies.results import Results
from mora_jax.studies.rows import (
    HELD_OUT,
    TEST,
    TRAIN,
    as_row,
    is_answered,
    read_rows,
    sample,
    score_rows,
    split_by_prompt,
    write_rows,
)
from mora_jax.studies.study import Arm, Cell, Contrast, Level, Measuring, Metric, Preset, Sources, Study, grid

VARIANTS, BATCH, FULL = "variants", "batch", "full"
#: Of all ranks, as in LoRA Without Regret: with alpha / rank the first steps then move the kernel alike at any rank.
ALPHA = 32.0
#: The loss on trained rows is of so many, and so many of a user's rows are held out at most.
_TRAINED_ROWS, _HELD_OUT_ROWS = 128, 240
LOSS = Metric("loss", "loss on new rows, nats a token")
_GAP = Metric("gap", "how much further from full at the large batch, nats a token")


def _arm(name: str, method: str, rank: int, rate: float, **others: Any) -> Arm:
    settings = {"method": method, "rank": rank, **others}
    return Arm(f"{name} r{rank}", {f"adapter.{key}": value for key, value in settings.items()}, grid(rate))


def _lora(rank: int, rate: float, method: str = "lora", name: str = "LoRA") -> Arm:
    return _arm(name, method, rank, rate, alpha=ALPHA)


def _full(rate: float) -> Arm:
    return Arm(FULL, {"adapter.method": "full"}, grid(rate))


def _preset(
    doc: str,
    *,
    scale: float,
    full: float,
    ranks: tuple[int, int, int],
    rows: tuple[int, ...],
    batch_size: int,
    large: int,
    steps: int,
    settings: Mapping[str, Any],
    reason: str,
) -> Preset:
    """A size of the study.

    Args:
        doc: of the preset.
        scale: of the rates of adapters, which are those of a narrow model.
        full: a rate of full fine-tuning.
        ranks: low, middle, high.
        rows: numbers of examples, the largest first.
        batch_size, large: rows of a step, in general and at the level of large batches.
        steps: in general.
        settings: further configuration keys.
        reason: of the sizes.
    """
    low, middle, high = ranks
    rate = 3e-3 * scale
    attention = _arm("LoRA", "lora", low, 2 * rate, alpha=ALPHA, targets=("q_proj", "v_proj"))
    attention = Arm(f"{attention.name}, q and v", attention.settings, attention.rates)
    sweep = (
        attention,
        *(_lora(rank, rate) for rank in ranks),
        *(_arm("MoRA sharing", "mora", rank, rate, kind="sharing") for rank in (middle, high)),
        *(_arm("MoRA rotation", "mora", rank, 2 * rate, kind="rotation") for rank in (middle, high)),
        _full(full),
    )
    variants = (
        _lora(middle, rate, "dora", "DoRA"),
        _lora(middle, rate / 3, "lora_plus", "LoRA+"),
        _lora(middle, rate / 3, "pissa", "PiSSA"),
    )
    few = (attention, _lora(low, rate), _lora(high, rate), sweep[4], _full(full))
    batch = {"batch_size": batch_size}
    most, *fewer = rows
    fewer_steps = steps * batch_size // large
    of_large = {
        "train.batch_size": large,
        "train.steps": fewer_steps,
        "train.eval_every": fewer_steps,
        "train.log_every": max(1, fewer_steps // 4),
        "optimizer.warmup_steps": max(1, fewer_steps // 10),
    }
    return Preset(
        doc,
        (),
        {
            "loss.mode": "masked",
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": max(1, steps // 10),
            "train.steps": steps,
            "train.batch_size": batch_size,
            "train.eval_every": max(1, steps // 2),
            "train.eval_on_start": False,
            "train.log_every": max(1, steps // 6),
            **settings,
        },
        levels=(
            Level(f"{most} rows", {"examples": most, **batch}, arms=sweep, neighbours=True),
            *(Level(f"{count} rows", {"examples": count, **batch}, arms=few) for count in fewer),
            Level(VARIANTS, {"examples": most, **batch}, arms=variants),
            Level(
                f"{BATCH} {large}",
                {"examples": most, "batch_size": large},
                of_large,
                (_lora(low, rate), _lora(high, rate), _full(full)),
            ),
        ),
        reason=reason,
    )


class Rates(Study):
    """One task, all methods, every learning rate."""

    name = "rates"
    question = "what rank and learning rate does a method need?"
    paper = "LoRA Without Regret (Thinking Machines, 2025) and arXiv 2602.04998"
    chosen_by = "held_out_loss"
    metrics = (LOSS, Metric("trained_rows_loss", "loss on rows trained on, nats a token"))
    notes = (
        "Ranks are of the base's width: rank 16 of 128 is another thing than rank 16 of 4,096.",
        "Runs are short, and the learning rate is constant; longer ones and other schedules may want other rates.",
        "That variants tie once their rates are tuned is found elsewhere too (arXiv 2602.04998, 2601.22708).",
    )
    presets = {
        "tiny": Preset(
            "seconds; shows the form of the results, and no more",
            (),
            {
                "data.max_length": 25,
                "optimizer.schedule": "constant",
                "train.steps": 4,
                "train.batch_size": 4,
                "train.eval_every": 4,
                "train.eval_on_start": False,
            },
            levels=(
                Level(
                    "16 rows",
                    {"examples": 16, "batch_size": 4},
                    arms=(_lora(4, 2e-3), _arm("MoRA sharing", "mora", 4, 2e-3, kind="sharing")),
                    neighbours=True,
                ),
            ),
            seeds=2,
        ),
        "quick": _preset(
            "the embedded model and instructions, minutes on two cores",
            scale=1.0,
            full=1e-3,
            ranks=(1, 4, 16),
            rows=(1024, 128),
            batch_size=16,
            large=64,
            steps=64,
            settings={"data.max_length": 25},
            reason="64 steps of 16 see 1,024 rows once.",
        ),
        "small": _preset(
            "a model of about 100 M parameters, a day on two cores",
            scale=0.3,
            full=1e-4,
            ranks=(1, 8, 64),
            rows=(256, 64),
            batch_size=8,
            large=32,
            steps=32,
            settings={"data.max_length": 128},
            reason="32 steps of 8 see 256 rows once, in a minute or two a run.",
        ),
        "paper": _preset(
            "a model of 7 B parameters on eight accelerators",
            scale=0.1,
            full=3e-5,
            ranks=(1, 16, 256),
            rows=(50_000, 5_000, 500),
            batch_size=40,
            large=400,
            steps=1_250,
            settings={"data.max_length": 1024, "mesh.fsdp": -1},
            reason="1,250 steps of 40 see 50,000 rows once.",
        ),
    }

    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """As many rows as the level says, drawn by the seed from the part that is trained on."""
        parts = write_parts(sources, folder)
        return {"data.train": (take(parts[TRAIN], level.values["examples"], seed, folder),)}

    def measure(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        """The losses on answers: of the reported part, where a rate is chosen of that part, else of trained rows."""
        parts = write_parts(settings.sources, settings.folder)
        if cell.chooses:
            return {"held_out_loss": score_rows(settings, tokenizer, model, parts[HELD_OUT]).nll}
        (path,) = settings.data["data.train"]
        length = settings.preset.settings["data.max_length"]
        if path not in settings.cache:
            settings.cache[path] = EncodedDataset.build(load_rows(path), tokenizer, max_length=length).report
        some = take(Path(path), min(_TRAINED_ROWS, cell.level.values["examples"]), cell.seed, settings.folder)
        return {
            "loss": score_rows(settings, tokenizer, model, parts[TEST], part=TEST).nll,
            "trained_rows_loss": score_rows(settings, tokenizer, model, some).nll,
            "trained_tokens": settings.cache[path].trained_tokens,
        }

    def pairs(self, results: Results, level: str) -> list[tuple[str, str]]:
        """Every arm against full fine-tuning, and MoRA against LoRA of its rank."""
        there = results.arms_at(level)
        pairs = [(arm, FULL) for arm in there if arm != FULL and FULL in there]
        loras = [arm for arm in there if arm.startswith("LoRA r") and "," not in arm]
        return pairs + [(a, b) for a in there if a.startswith("MoRA") for b in loras if a.split()[-1] == b.split()[-1]]

    def contrasts(self, results: Results) -> Iterable[Contrast]:
        """Variants against LoRA of their rank, and how the distance to full fine-tuning goes with the batch."""
        level, large = _sweep_level(results), _large_batch(results)
        for arm in results.arms_at(VARIANTS):
            yield between_levels(results, LOSS, arm, VARIANTS, f"LoRA {arm.split()[-1]}", level)
        for arm in results.arms_at(large):
            if arm != FULL and arm in results.arms_at(level):
                values = differences(_behind_full(results, arm, large), _behind_full(results, arm, level))
                cells = tuple(results.cells(arm, large) + results.cells(arm, level))
                yield Contrast(f"{arm} − {FULL}, {large} − {level}", _GAP, "", values, cells, {})

    def sections(self, results: Results) -> dict[str, str]:
        """Best rates, their ratios, what another's rate costs, and capacity."""
        level, settings = _sweep_level(results), results.preset.settings
        learn = ", ".join(f"{_tokens(results, one) or 0:,.0f} tokens in {one}" for one in _row_levels(results))
        return {
            "level": level,
            "steps": str(settings["train.steps"]),
            "batch_size": str(settings["train.batch_size"]),
            "best": _best_table(results, level),
            "ratios": _ratios_table(results, level),
            "learn": learn,
        }

    def figures(self, results: Results) -> dict[str, Any]:
        """The best rates, and capacity."""
        drawn = {"best_rates": _draw_best(results)}
        if len(_row_levels(results)) > 1:
            drawn["capacity"] = _draw_capacity(results)
        return drawn


# Rows.


def write_parts(sources: Sources, folder: Path) -> dict[str, Path]:
    """The files of the three parts, by name; those of a user's rows are written unless they are there.

    Raises:
        InputError: the user's files hold no questions with answers, or too few.
    """
    if sources.data is None:
        return {part: Path(demo.data_path(part)) for part in demo.PARTS}
    files = {part: folder / f"{part}.jsonl" for part in demo.PARTS}
    if not all(path.exists() for path in files.values()):
        rows = [as_row(row) for row in load_rows(list(sources.data)) if is_answered(row)]
        parts = split_by_prompt(rows, 0.1, ", ".join(sources.data))
        for part, path in files.items():
            write_rows(path, parts[part] if part == TRAIN else sample(parts[part], _HELD_OUT_ROWS))
    return files


def take(path: Path, count: int, seed: int, folder: Path) -> str:
    """A file of that many rows of another, drawn by the seed.

    Raises:
        InputError: there are not so many.
    """
    rows = read_rows(path)
    if count > len(rows):
        raise InputError(f"the study trains on {count} rows, and there are {len(rows)}; give more by --data")
    return write_rows(folder / f"rows_{count}_{seed}.jsonl", random.Random(f"rows {seed}").sample(rows, count))


# What is read from the table.


def _sweep_level(results: Results) -> str:
    """The level of the whole grid."""
    return next(level.name for level in results.preset.levels if level.neighbours)


def _row_levels(results: Results) -> dict[str, int]:
    """The levels that differ in the number of examples alone, most first."""
    levels = [one for one in results.preset.levels if not one.name.startswith((VARIANTS, BATCH))]
    return {level.name: level.values["examples"] for level in levels if level.name in results.levels}


def _large_batch(results: Results) -> str:
    """The level of large batches; empty where there is none."""
    return next((level for level in results.levels if level.startswith(BATCH)), "")


def _behind_full(results: Results, arm: str, level: str) -> dict[int, float]:
    return differences(results.last("loss", arm, level), results.last("loss", FULL, level))


def best_rates(results: Results, arm: str, level: str, draws: int = 2000) -> tuple[float, ...]:
    """The rate with the lowest mean loss over reported seeds, of the chosen one and those beside it, with a range.

    The range holds those that are the best in 95 % of the draws when seeds are drawn anew, with replacement, and half a
    step of the grid on both sides, since the best rate of all need be no point of it.

    Returns:
        The rate, and the ends of its range; nothing where no seed has a loss at each rate, or all are infinite.
    """
    losses = results.by_rate("loss", arm, level)
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in losses.values()))) if losses else []
    means = np.array([[by_seed[seed] for seed in seeds] for by_seed in losses.values()])
    means = np.where(np.isfinite(means), means, np.inf)
    if not seeds or not np.isfinite(means).any():
        return ()
    rates = np.array(list(losses))
    drawn = np.random.default_rng(0).integers(len(seeds), size=(draws, len(seeds)))
    best = np.sort(rates[means[:, drawn].mean(axis=2).argmin(axis=0)])
    middle = rates[means.mean(axis=1).argmin()]
    half_step = math.sqrt(rates[1] / rates[0]) if len(rates) > 1 else 1.0
    return float(middle), float(best[int(0.025 * draws)] / half_step), float(best[int(0.975 * draws) - 1] * half_step)


def _range(rates: tuple[float, ...]) -> str:
    if not rates:
        return "missing"
    middle, low, high = rates
    return f"{middle:g} ({low:.2g} to {high:.2g})"


def _best_table(results: Results, level: str) -> str:
    rows = []
    for arm in results.arms_at(level):
        losses, rate = results.by_rate("loss", arm, level), results.rate(arm, level)
        chosen = losses.get(rate or math.nan, {})
        costs = [(other, paired(by_seed, chosen)) for other, by_seed in losses.items() if other != rate]
        below = [cost.text(sign=True) for other, cost in costs if rate and other < rate]
        above = [cost.text(sign=True) for other, cost in costs if rate and other > rate]
        loss = interval(chosen.values())
        parts = [f"{rate:g}" if rate else "missing", _range(best_rates(results, arm, level)), loss.seeds, loss.text()]
        rows.append([arm, *parts, *(below or ["not tried"]), *(above or ["not tried"])])
    heads = ["arm", "chosen rate", "best rate", "n", "loss", "at the rate below", "at the rate above"]
    return table(heads, rows)


def _ratios_table(results: Results, level: str) -> str:
    rows = []
    for arm, other in results.study.pairs(results, level):
        first, second = best_rates(results, arm, level), best_rates(results, other, level)
        if first and second:
            low, high = first[1] / second[2], first[2] / second[1]
            rows.append([f"{arm} over {other}", f"{first[0] / second[0]:.2g}", f"{low:.2g} to {high:.2g}"])
    return table(["best rates", "ratio", "of any two in their ranges"], rows)


def _tokens(results: Results, level: str) -> float | None:
    """The trained tokens of a level's data, each once; the mean over cells."""
    frame = results.frame[(results.frame["metric"] == "trained_tokens") & (results.frame["level"] == level)]
    return None if frame.empty else float(frame["value"].mean())


def capacity(results: Results, arm: str, level: str) -> float | None:
    """Bits that an arm's parameters hold for each bit that there is to learn at a level, by the rule of thumb."""
    parameters, count = results.parameters(arm), _tokens(results, level)
    return BITS_A_PARAMETER * parameters / bits_to_learn(count) if parameters and count else None


# Figures.


def _draw_best(results: Results) -> Any:
    """The best rate of each arm with its range, one arm below the other."""
    level = _sweep_level(results)
    arms = results.arms_at(level)
    figure, [[panel]] = new_figure(height=3.2)
    for place, arm in enumerate(arms):
        if rates := best_rates(results, arm, level):
            middle, low, high = rates
            ends = [[middle - low], [high - middle]]
            panel.errorbar(middle, -place, xerr=ends, capsize=3, **style(arm) | {"linestyle": "none"})
    panel.set_yticks([-place for place in range(len(arms))], arms)
    plain_log(panel, "x")
    panel.set_xlabel("best learning rate")
    text = f"{level}. Points of the grid; bars: those that are best in 95 % of draws of the seeds."
    return finish(figure, results, text)


def _draw_capacity(results: Results) -> Any:
    """What an arm loses to full fine-tuning against the bits that it holds for each that there is to learn."""
    figure, [panels] = new_figure(2)
    for panel, metric in zip(panels, results.study.metrics, strict=True):
        for place, (level, count) in enumerate(_row_levels(results).items()):
            for arm in results.arms_at(level):
                held = capacity(results, arm, level)
                gap = paired(results.last(metric.name, arm, level), results.last(metric.name, FULL, level))
                if arm != FULL and held is not None and gap.n:
                    method = " ".join(arm.split()[:-1]) if "," not in arm else "LoRA"
                    look = style(method) | {"linestyle": "none", "fillstyle": FILLINGS[place]}
                    label = f"{method}, {count:,} rows"
                    panel.errorbar(held, gap.mean, yerr=gap.half or 0.0, capsize=3, label=label, **look)
        panel.axhline(0, color="0.5", linewidth=1, zorder=0)
        panel.axvline(1, color="0.5", linewidth=1, linestyle=":", zorder=0)
        plain_log(panel, "x", (1.0,))
        panel.set(xlabel="bits held for each bit to learn", ylabel=f"{metric.head.split(',')[0]}, minus full")
    return finish(
        figure, results, "Nats a token; bars: 95 % intervals over seeds. Dotted: one bit held a bit.", *panels
    )
