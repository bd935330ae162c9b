"""What rank and learning rate does a method need? After LoRA Without Regret and later comparisons with swept rates.

One task, all methods, and around each chosen rate the rates beside it on every reported seed. The best rate is a point
of the grid: which of these has the lowest mean, and which others have it when seeds are drawn anew.
"""

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
from mora_jax.studies import figures as draw, rows as row_files, study
from mora_jax.studies.claims import contrast
from mora_jax.studies.conclusion import table
from mora_jax.studies.intervals import differences, interval, paired
from mora_jax.studies.results import Results
from mora_jax.studies.rows import HELD_OUT, TEST, TRAIN
from mora_jax.studies.study import FULL

VARIANTS, BATCH = "variants", "batch"
#: Of all ranks, as in LoRA Without Regret: with alpha / rank the first steps then move the kernel alike at any rank.
ALPHA = 32.0
#: The loss on trained rows is of so many, and so many of a user's rows are held out at most.
_TRAINED_ROWS, _HELD_OUT_ROWS = 128, 240
LOSS = study.Metric("loss", "loss on new rows, nats a token")
_GAP = study.Metric("gap", "how much further from full at the large batch, nats a token")


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
) -> study.Preset:
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
    attention = study.adapter("LoRA", low, 2 * rate, note=", q and v", alpha=ALPHA, targets=("q_proj", "v_proj"))
    loras = [study.adapter("LoRA", rank, rate, alpha=ALPHA) for rank in ranks]
    sharing = [study.adapter("MoRA sharing", rank, rate, "mora", kind="sharing") for rank in (middle, high)]
    rotation = [study.adapter("MoRA rotation", rank, 2 * rate, "mora", kind="rotation") for rank in (middle, high)]
    everything = study.full(full)
    variants = (
        study.adapter("DoRA", middle, rate, "dora", alpha=ALPHA),
        study.adapter("LoRA+", middle, rate / 3, "lora_plus", alpha=ALPHA),
        study.adapter("PiSSA", middle, rate / 3, "pissa", alpha=ALPHA),
    )
    few = (attention, loras[0], loras[2], sharing[0], everything)

    def budget(size: int, evaluations: int, logged: int) -> dict[str, Any]:
        """As many rows in steps of this size."""
        count = steps * batch_size // size
        every = {"eval_every": count // evaluations, "log_every": count // logged}
        return study.budget(count, size, warmup_steps=max(1, count // 10), **every)

    most, *fewer = rows
    batch = {"batch_size": batch_size}
    common = {"loss.mode": "masked", "train.eval_on_start": False}
    sweep = (attention, *loras, *sharing, *rotation, everything)
    levels = (
        study.Level(f"{most} rows", {"examples": most, **batch}, arms=sweep, neighbours=True),
        *(study.Level(f"{count} rows", {"examples": count, **batch}, arms=few) for count in fewer),
        study.Level(VARIANTS, {"examples": most, **batch}, arms=variants),
        study.Level(
            f"{BATCH} {large}",
            {"examples": most, "batch_size": large},
            budget(large, 1, 4),
            (loras[0], loras[2], everything),
        ),
    )
    return study.Preset(doc, (), {**common, **budget(batch_size, 2, 6), **settings}, levels=levels, reason=reason)


class Rates(study.Study):
    """One task, all methods, every learning rate."""

    name = "rates"
    question = "what rank and learning rate does a method need?"
    paper = "LoRA Without Regret (Thinking Machines, 2025) and arXiv 2602.04998"
    chosen_by = "held_out_loss"
    metrics = (LOSS, study.Metric("trained_rows_loss", "loss on rows trained on, nats a token"))
    notes = (
        "Ranks are of the base's width: rank 16 of 128 is another thing than rank 16 of 4,096.",
        "Runs are short, and the learning rate is constant; longer ones and other schedules may want other rates.",
        "That variants tie once their rates are tuned is found elsewhere too (arXiv 2602.04998, 2601.22708).",
    )
    presets = {
        "tiny": study.Preset(
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
                study.Level(
                    "16 rows",
                    {"examples": 16, "batch_size": 4},
                    arms=(
                        study.adapter("LoRA", 4, 2e-3, alpha=ALPHA),
                        study.adapter("MoRA sharing", 4, 2e-3, "mora", kind="sharing"),
                    ),
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

    def write_data(
        self, preset: study.Preset, level: study.Level, seed: int, folder: Path, sources: study.Sources
    ) -> dict[str, Any]:
        """As many rows as the level says, drawn by the seed from the part that is trained on."""
        parts = write_parts(sources, folder)
        return {"data.train": (take(parts[TRAIN], level.values["examples"], seed, folder),)}

    def measure(self, at: study.Evaluation) -> dict[str, float]:
        """The losses on answers: of the reported part, where a rate is chosen of that part, else of trained rows."""
        parts, cell = write_parts(at.sources, at.folder), at.cell
        if cell.chooses:
            return {"held_out_loss": at.score(parts[HELD_OUT]).nll}
        (path,) = at.data["data.train"]
        if path not in at.cache:
            length = at.preset.settings["data.max_length"]
            at.cache[path] = EncodedDataset.build(load_rows(path), at.tokenizer, max_length=length).report
        some = take(Path(path), min(_TRAINED_ROWS, cell.level.values["examples"]), cell.seed, at.folder)
        return {
            "loss": at.score(parts[TEST], part=TEST).nll,
            "trained_rows_loss": at.score(some).nll,
            "trained_tokens": at.cache[path].trained_tokens,
        }

    def pairs(self, results: Results, level: str) -> list[tuple[str, str]]:
        """Every arm against full fine-tuning, and MoRA against LoRA of its rank."""
        there = results.arms_at(level)
        pairs = [(arm, FULL) for arm in there if arm != FULL and FULL in there]
        loras = [arm for arm in there if arm.startswith("LoRA r") and "," not in arm]
        return pairs + [(a, b) for a in there if a.startswith("MoRA") for b in loras if a.split()[-1] == b.split()[-1]]

    def contrasts(self, results: Results) -> Iterable[study.Contrast]:
        """Variants against LoRA of their rank, and how the distance to full fine-tuning goes with the batch."""
        level = _sweep_level(results)
        large = next((level for level in results.levels if level.startswith(BATCH)), "")
        for arm in results.arms_at(VARIANTS):
            lora = f"LoRA {arm.split()[-1]}"
            yield contrast(results, LOSS, (arm, VARIANTS), (lora, level), f"{arm} − {lora} ({level})")

        def behind_full(arm: str, level: str) -> dict[int, float]:
            return differences(results.values(LOSS, arm, level), results.values(LOSS, FULL, level))

        for arm in results.arms_at(large):
            if arm != FULL and arm in results.arms_at(level):
                values = differences(behind_full(arm, large), behind_full(arm, level))
                cells = results.cells(arm, large) + results.cells(arm, level)
                yield study.Contrast(f"{arm} − {FULL}, {large} − {level}", _GAP, "", values, cells)

    def sections(self, results: Results) -> dict[str, str]:
        """Best rates, their ratios, what another's rate costs, and capacity."""
        level, settings = _sweep_level(results), results.preset.settings
        return {
            "level": level,
            "steps": str(settings["train.steps"]),
            "batch_size": str(settings["train.batch_size"]),
            "best": _best_table(results, level),
            "ratios": _ratios_table(results, level),
            "learn": ", ".join(f"{_tokens(results, one) or 0:,.0f} tokens in {one}" for one in _row_levels(results)),
        }

    def figures(self, results: Results) -> dict[str, Any]:
        """The best rates, and capacity."""
        drawn = {"best_rates": _draw_best(results)}
        if len(_row_levels(results)) > 1:
            drawn["capacity"] = _draw_capacity(results)
        return drawn


# Rows.


def write_parts(sources: study.Sources, folder: Path) -> dict[str, Path]:
    """The files of the three parts, by name; those of a user's rows are written unless they are there.

    Raises:
        InputError: the user's files hold no questions with answers, or too few.
    """
    if sources.data is None:
        return {part: Path(demo.data_path(part)) for part in demo.PARTS}
    files = {part: folder / f"{part}.jsonl" for part in demo.PARTS}
    if not all(path.exists() for path in files.values()):
        rows = [row_files.as_row(row) for row in load_rows(list(sources.data)) if row_files.is_answered(row)]
        parts = row_files.split_by_prompt(rows, 0.1, ", ".join(sources.data))
        for part, path in files.items():
            row_files.write_rows(path, parts[part] if part == TRAIN else row_files.sample(parts[part], _HELD_OUT_ROWS))
    return files


def take(path: Path, count: int, seed: int, folder: Path) -> str:
    """A file of that many rows of another, drawn by the seed.

    Raises:
        InputError: there are not so many.
    """
    rows = row_files.read_rows(path)
    if count > len(rows):
        raise InputError(f"the study trains on {count} rows, and there are {len(rows)}; give more by --data")
    return row_files.write_rows(
        folder / f"rows_{count}_{seed}.jsonl", random.Random(f"rows {seed}").sample(rows, count)
    )


# What is read from the table.


def _sweep_level(results: Results) -> str:
    """The level of the whole grid."""
    return next(level.name for level in results.preset.levels if level.neighbours)


def _row_levels(results: Results) -> dict[str, int]:
    """The levels that differ in the number of examples alone, most first."""
    levels = [one for one in results.preset.levels if not one.name.startswith((VARIANTS, BATCH))]
    return {level.name: level.values["examples"] for level in levels if level.name in results.levels}


def _losses_by_rate(results: Results, arm: str, level: str) -> dict[float, dict[int, float]]:
    """The last loss of each reported seed by learning rate: the chosen one, and those beside it where trained."""
    by_rate = results.by_rate(LOSS.name, arm, level, (study.REPORTED, study.NEIGHBOUR))
    return {rate: {seed: curve[-1][1] for seed, curve in curves.items()} for rate, curves in by_rate.items()}


def best_rates(results: Results, arm: str, level: str, draws: int = 2000) -> tuple[float, ...]:
    """The rate with the lowest mean loss over reported seeds, of the chosen one and those beside it, with a range.

    The range holds those that are the best in 95 % of the draws when seeds are drawn anew, with replacement, and half a
    step of the grid on both sides, since the best rate of all need be no point of it.

    Returns:
        The rate, and the ends of its range; nothing where no seed has a loss at each rate, or all are infinite.
    """
    losses = _losses_by_rate(results, arm, level)
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


def _best_table(results: Results, level: str) -> str:
    rows = []
    for arm in results.arms_at(level):
        losses, rate = _losses_by_rate(results, arm, level), results.rate(arm, level) or math.nan
        chosen = losses.get(rate, {})
        costs = {other: paired(by_seed, chosen).text(sign=True) for other, by_seed in losses.items()}
        below = [cost for other, cost in costs.items() if other < rate]
        above = [cost for other, cost in costs.items() if other > rate]
        loss, best = interval(chosen.values()), "missing"
        if rates := best_rates(results, arm, level):
            best = f"{rates[0]:g} ({rates[1]:.2g} to {rates[2]:.2g})"
        parts = ["missing" if math.isnan(rate) else f"{rate:g}", best, loss.seeds, loss.text()]
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
    figure, [panel] = draw.new_figure(height=3.2)
    for place, arm in enumerate(arms):
        if rates := best_rates(results, arm, level):
            middle, low, high = rates
            ends = [[middle - low], [high - middle]]
            panel.errorbar(middle, -place, xerr=ends, capsize=3, **draw.style(arm) | {"linestyle": "none"})
    panel.set_yticks([-place for place in range(len(arms))], arms)
    draw.plain_log(panel, "x")
    panel.set_xlabel("best learning rate")
    text = f"{level}. Points of the grid; bars: those that are best in 95 % of draws of the seeds."
    return draw.finish(figure, results, text)


def _draw_capacity(results: Results) -> Any:
    """What an arm loses to full fine-tuning against the bits that it holds for each that there is to learn."""
    figure, panels = draw.new_figure(2)
    for panel, metric in zip(panels, results.study.metrics, strict=True):
        for place, (level, count) in enumerate(_row_levels(results).items()):
            for arm in results.arms_at(level):
                held = capacity(results, arm, level)
                gap = paired(results.values(metric, arm, level), results.values(metric, FULL, level))
                if arm != FULL and held is not None and gap.n:
                    method = " ".join(arm.split()[:-1]) if "," not in arm else "LoRA"
                    look = draw.style(method) | {"linestyle": "none", "fillstyle": draw.FILLINGS[place]}
                    draw.draw_means(panel, [held], [gap], f"{method}, {count:,} rows", **look)
        panel.axhline(0, **draw.ZERO)
        panel.axvline(1, **draw.DOTTED)
        draw.plain_log(panel, "x", (1.0,))
        panel.set(xlabel="bits held for each bit to learn", ylabel=f"{metric.head.split(',')[0]}, minus full")
    text = "Nats a token; bars: 95 % intervals over seeds. Dotted: one bit held a bit."
    return draw.finish(figure, results, text)
