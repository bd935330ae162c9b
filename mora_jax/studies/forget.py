"""Does LoRA learn less and forget less? After arXiv 2405.09673, with the spectra and intruders of what was changed.

A new domain is learned while texts of the old one are watched. *Learning* is the loss on rows of the new domain that
were not trained on, *forgetting* the rise of the loss on the old one. Both are compared at equal steps, and forgetting
at equal learning too.
"""

from __future__ import annotations

import itertools
import math
import random
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mora_jax import demo
from mora_jax.data import Conversation, load_rows
from mora_jax.demo.answers import mean_scores
from mora_jax.errors import InputError
from mora_jax.evaluation.chat import generate_batch
from mora_jax.interop.load import load_pretrained
from mora_jax.studies.conclusion import table
from mora_jax.studies.figures import bars, draw_curves, finish, new_figure, plain_log, style
from mora_jax.studies.intervals import differences, interval, paired
from mora_jax.studies.results import Curve, Results
from mora_jax.studies.rows import (
    HELD_OUT,
    TEST,
    TRAIN,
    Rows,
    as_row,
    read_rows,
    sample,
    score_rows,
    split_by_prompt,
    texts_of,
    write_rows,
)
from mora_jax.studies.spectrum import (
    COUNTS,
    EPSILON,
    EPSILONS,
    FACTORS,
    Change,
    Leading,
    Spectrum,
    changes,
    kernels,
    output_side,
    scaled,
)
from mora_jax.studies.study import (
    CHOOSING_SEEDS,
    EXPLORATORY,
    Arm,
    Cell,
    Contrast,
    Level,
    Measuring,
    Metric,
    Preset,
    Sources,
    Study,
    grid,
    rounded,
)

FULL = "full"
#: Spectra are measured at so many of the evaluations, the last one included.
_SPECTRA = 4
_ANSWER_TOKENS = 16
LEARNED = Metric("loss", "loss on the new domain, nats a token")
KNOWN = Metric("base_text_loss", "loss on the old domain, nats a token")
_MATCHED = Metric("forgetting at equal learning", "rise of the old domain's loss at equal learning, nats a token")
#: (loss on what is learned, loss on what was known), evaluation by evaluation.
Course = Sequence[tuple[float, float]]


def _arms(low: int, high: int, *, full: float, lora: float, mora: float) -> tuple[Arm, ...]:
    """The arms at a low and a high rank, around rates of full fine-tuning, of LoRA and MoRA by rotation at the low."""

    def of_lora(rank: int, **others: Any) -> dict[str, Any]:
        return {"adapter.method": "lora", "adapter.rank": rank, "adapter.alpha": 2.0 * rank, **others}

    def of_mora(kind: str) -> dict[str, Any]:
        return {"adapter.method": "mora", "adapter.rank": low, "adapter.kind": kind}

    name, of_full, of_high = f"LoRA r{high}", grid(full), grid(0.4 * lora)
    everything: dict[str, Any] = {"adapter.method": "full"}
    divergence = {"loss.kl_weight": 1.0, "loss.kl_tokens": "prompt"}
    return (
        Arm(FULL, everything, of_full),
        Arm(f"LoRA r{low}", of_lora(low), grid(lora)),
        Arm(name, of_lora(high), of_high),
        Arm(f"MoRA sharing r{low}", of_mora("sharing"), grid(0.5 * mora)),
        Arm(f"MoRA rotation r{low}", of_mora("rotation"), grid(mora)),
        Arm(f"{FULL}, weight decay", everything | {"optimizer.weight_decay": 1.0}, of_full, control_of=FULL),
        Arm(f"{name}, dropout", of_lora(high, **{"adapter.dropout": 0.1}), of_high, control_of=name),
        Arm(f"{name}, KL", of_lora(high, **divergence), of_high, control_of=name),
    )


def _settings(*, steps: int, batch_size: int, max_length: int, evaluations: int, **others: Any) -> dict[str, Any]:
    return {
        "data.max_length": max_length,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": min(20, steps // 2),
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.eval_every": max(1, steps // evaluations),
        "train.log_every": steps,
        **others,
    }


def _data(source: str, **others: Any) -> dict[str, Any]:
    """Of the study.

    `rows`: to train on at most; `scored`: to report on at most, of rows and of texts, half as many to choose rates by;
    `text_length`: of the texts of what was known, in tokens; `layers`: whose spectra are measured, every so many;
    `top`: leading singular vectors that are looked at; `characters`: a row of code; `epochs`: at most so many.
    """
    return {"source": source, "scored": 240, "text_length": 128, "layers": 1, "top": 10, "epochs": 50, **others}


_FLOAT32 = {"model.dtype": "float32"}
_QUICK = _arms(2, 16, full=6e-4, lora=1e-2, mora=1e-2)


class Forget(Study):
    """A new domain is learned while texts of the old one are watched."""

    name = "forget"
    question = "does LoRA learn less and forget less?"
    paper = "LoRA Learns Less and Forgets Less (arXiv 2405.09673) and LoRA vs Full Fine-tuning (arXiv 2410.21228)"
    chosen_by = "loss"
    metrics = (
        LEARNED,
        KNOWN,
        Metric("accuracy", "token accuracy on the new domain", 1),
        Metric("exact_match", "exact match on the new domain", 1),
        Metric("rank90", "rank of the change at 90 % of its energy", 0),
        Metric("rank90_attention", "the same of attention", 0),
        Metric("rank90_MLP", "the same of MLP", 0),
        Metric("stable_rank", "stable rank of the change", 0),
        Metric("delta_norm", "Frobenius norm of the change", 0),
        Metric(f"intruders_{EPSILON}", f"intruders a matrix at ε = {EPSILON}", 0),
    )
    notes = (
        "*full* is this library's full fine-tuning, of all parameters, embeddings and norms included; adapters are on "
        "the linear layers alone. The paper's full fine-tuning trains all parameters too.",
        "Learning rates were chosen by the loss on the new domain alone, as somebody would who does not watch the old "
        "one. That the rate governs forgetting is found elsewhere too (arXiv 2509.20758, 2604.13627); in sequences of "
        "tasks LoRA forgets far less (arXiv 2603.27707).",
        "Weight decay is AdamW's: it pulls towards zero, not towards the base, by the rate times 1.0 a step.",
        "A change of high rank does not show that a high rank was needed: independent noise has one too.",
    )
    presets = {
        "tiny": Preset(
            "seconds; shows the form of the results, and no more",
            tuple(Arm(arm.name, arm.settings, arm.rates[:2]) for arm in _QUICK[:2]),
            _settings(steps=4, batch_size=4, max_length=32, evaluations=2, **_FLOAT32),
            _data("instructions", rows=64, scored=16),
            seeds=2,
        ),
        "quick": Preset(
            "the embedded model, minutes on two cores",
            _QUICK,
            _settings(steps=96, batch_size=16, max_length=32, evaluations=8, **_FLOAT32),
            _data("instructions", rows=2000),
            reason="96 steps of 16 rows are less than an epoch, so that no row is learned by heart; all test rows are "
            "scored.",
        ),
        "small": Preset(
            "a model of about 100 M parameters, a day on two cores",
            _arms(8, 64, full=1e-4, lora=1e-3, mora=1e-3),
            _settings(steps=200, batch_size=8, max_length=256, evaluations=8, **_FLOAT32),
            _data("code", rows=4000, scored=100, text_length=256, layers=5, characters=800),
            reason="200 steps of 8 pieces of code are what two cores do in minutes a run.",
        ),
        "paper": Preset(
            "a model of 7 B parameters on eight accelerators",
            _arms(16, 256, full=1e-5, lora=2e-4, mora=2e-4),
            _settings(
                steps=2000,
                batch_size=192,
                max_length=4096,
                evaluations=8,
                **{"train.micro_batch_size": 8, "model.remat": "full", "mesh.data": 1, "mesh.fsdp": -1},
            ),
            _data("code", rows=400_000, scored=500, text_length=4096, layers=8, characters=12_000),
            reason="The paper's batch and length; 1.6 B tokens, where it had up to 20 B.",
        ),
    }

    def check(self, preset: Preset, sources: Sources) -> None:
        """Needs texts, and as much data as the preset's steps are worth."""
        if texts_of(sources) is None:
            raise InputError("study forget watches texts like those that the base was pretrained on: give --texts FILE")
        rows = len(_parts(preset, sources)[TRAIN])
        sizes = preset.settings
        epochs = sizes["train.steps"] * sizes["train.batch_size"] / max(1, min(rows, preset.data["rows"]))
        if epochs > preset.data["epochs"]:
            raise InputError(
                f"there are {rows:,} rows to train on, which this preset would see {epochs:,.0f} times; give more by "
                "--data FILE, or choose a smaller preset"
            )

    def settings(self, cell: Cell, preset: Preset) -> dict[str, Any]:
        """Rates need half the evaluations."""
        return {"train.eval_every": 2 * preset.settings["train.eval_every"]} if cell.chooses else {}

    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """The rows of the new domain in three parts: to train on, to choose rates by, to report; texts of the old."""
        train, test = folder / f"train_{seed}.jsonl", folder / f"{TEST}.jsonl"
        if not train.exists() or not test.exists():
            limit, parts = preset.data["scored"], _parts(preset, sources)
            texts = sample(_rows([texts_of(sources) or ""], "--texts"), limit)
            write_rows(folder / "texts.jsonl", texts)
            write_rows(folder / "some_texts.jsonl", sample(texts, limit // 4))
            write_rows(folder / f"{HELD_OUT}.jsonl", sample(parts[HELD_OUT], limit // 2))
            rows = parts[TRAIN]
            write_rows(train, random.Random(seed).sample(rows, min(len(rows), preset.data["rows"])))
            write_rows(test, sample(parts[TEST], limit))
        return {"data.train": (str(train),)}

    def measure(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        """Losses on both domains; at some steps the spectrum of the change; at the end of reported cells the rest."""
        values = _losses(cell, settings, tokenizer, model, items=True)
        last = step == settings.steps
        if cell.chooses or cell.perturbed or not step or not (last or step % max(1, settings.steps // _SPECTRA) == 0):
            return values
        spectrum = Spectrum.of(_changes(cell, settings, model))
        values |= spectrum.figures()
        if last:
            values |= spectrum.details(COUNTS, noise=cell.seed == 1 and cell.arm is settings.preset.arms[0])
            values |= _intruders(cell, settings, tokenizer, model, spectrum.changes)
            values |= _answers(cell, settings, tokenizer, model)
        return values

    def explore(self, results: Results) -> Iterable[Cell]:
        """Lower rates on the seeds that choose, until at equal learning the least forgetting lies inside.

        A rate at which an arm no longer learns as much ends the search too.
        """
        mark = _choosing_mark(results)
        for level, arm in results.preset.pairs():
            if mark is None or len(arm.rates) < 2 or arm.control_of:
                continue
            least = least_forgetting(results, arm.name, mark)
            rates = results.curves_by_rate(LEARNED.name, arm.name)
            if not least or min(least, key=lambda rate: (least[rate], rate)) != min(rates) or len(rates) > 9:
                continue
            lower = rounded(min(rates) / (arm.rates[1] / arm.rates[0]))
            for seed in CHOOSING_SEEDS:
                yield Cell(level, arm, lower, seed, EXPLORATORY)

    def pairs(self, results: Results, level: str) -> list[tuple[str, str]]:
        """Every method against full fine-tuning, LoRA against LoRA by rank, and controls against what they control."""
        mains, controls = _mains(results), _controls(results)
        pairs = [(arm, FULL) for arm in mains if arm != FULL and FULL in mains]
        moras, loras = ([arm for arm in mains if arm.startswith(kind)] for kind in ("MoRA", "LoRA"))
        return pairs + [(mora, loras[0]) for mora in moras if loras] + list(controls.items())

    def contrasts(self, results: Results) -> Iterable[Contrast]:
        """Forgetting at equal learning."""
        known = matched(results)
        for arm in results.arms:
            if arm != FULL and FULL in known:
                cells = tuple(results.cells(arm) + results.cells(FULL))
                yield Contrast(f"{arm} − {FULL}", _MATCHED, "", differences(known[arm], known[FULL]), cells, {})

    def sections(self, results: Results) -> dict[str, str]:
        """Both domains at the start, equal learning, rates, spectra and intruders."""
        return {
            "new": f"{_start(results, LEARNED.name):.3f}",
            "old": f"{_start(results, KNOWN.name):.3f}",
            "matched": _matched_table(results),
            "top": str(results.preset.data["top"]),
            "epsilon": str(EPSILON),
            "intruders": _intruders_table(results),
        }

    def figures(self, results: Results) -> dict[str, Any]:
        """The plane of learning and forgetting, both against steps, spectra, and intruders."""
        drawn = {"plane": _draw_plane(results), "curves": _draw_curves(results)}
        if results.has("rank90"):
            drawn["spectrum"] = _draw_spectrum(results)
        if results.has(f"intruders_{EPSILON}"):
            drawn["intruders"] = _draw_intruders(results)
        return drawn


# What is trained on and scored.


def _rows(files: Sequence[str], option: str) -> Rows:
    """The rows of files in forms that every loss mode takes."""
    rows: Rows = []
    for file in files:
        for row in load_rows(file):
            if not isinstance(row, Conversation):
                raise InputError(f"{option} {file}: study forget takes chats or plain texts, and no rows of tokens")
            rows.append(as_row(row))
    return rows


def _parts(preset: Preset, sources: Sources) -> dict[str, Rows]:
    """Rows by part: the user's own, the embedded instructions with their tasks, or code."""
    if sources.data is not None:
        return split_by_prompt(_rows(sources.data, "--data"), 0.1, f"--data {sources.data[0]}")
    if preset.data["source"] == "code":
        return code_texts(preset.data["characters"])
    return {part: read_rows(demo.data_path(part)) for part in demo.PARTS}


def code_texts(characters: int) -> dict[str, Rows]:
    """The standard library of the Python that runs, which changes with its version, as rows of plain text by part.

    Every tenth file is held out, every tenth other one for the test; files are cut between lines.

    Args:
        characters: about as many a row.

    Raises:
        InputError: this Python has no standard library in files.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(files) < 10:
        raise InputError("this Python has no standard library in files; give --data FILE")
    parts: dict[str, Rows] = {TRAIN: [], HELD_OUT: [], TEST: []}
    for number, file in enumerate(files):
        part = {8: HELD_OUT, 9: TEST}.get(number % 10, TRAIN)
        parts[part] += [{"text": text, "task": file.name} for text in pieces(file.read_text("utf-8"), characters)]
    return parts


def pieces(text: str, characters: int) -> list[str]:
    """A text in pieces of whole lines, each at least so many characters long but for the last."""
    texts, lines = [], list[str]()
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= characters:
            texts.append("".join(lines))
            lines = []
    return [*texts, "".join(lines)] if "".join(lines).strip() else texts


def _losses(cell: Cell, settings: Measuring, tokenizer: Any, model: Any, *, items: bool = False) -> dict[str, float]:
    """On both domains: rates are not chosen on what is reported."""
    new, old = (HELD_OUT, "some_texts") if cell.chooses else (TEST, "texts")
    length = settings.preset.data["text_length"]
    learned = score_rows(settings, tokenizer, model, settings.folder / f"{new}.jsonl", part=new * items)
    texts = settings.folder / f"{old}.jsonl"
    known = score_rows(settings, tokenizer, model, texts, mode="full", max_length=length, part=old * items)
    return {"loss": learned.nll, "accuracy": learned.accuracy, "base_text_loss": known.nll}


def _changes(cell: Cell, settings: Measuring, model: Any) -> list[Change]:
    """Of the layers whose spectra are measured."""
    every, base = settings.preset.data["layers"], None
    if cell.arm.settings["adapter.method"] == "full":
        if "kernels" not in settings.cache:
            # Read on the host: the devices hold the model that is trained.
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                loaded, _ = load_pretrained(settings.sources.model, dtype=settings.preset.settings.get("model.dtype"))
                settings.cache["kernels"] = kernels(loaded, every)
        base = settings.cache["kernels"]
    return list(changes(model, base, every))


def _intruders(
    cell: Cell, settings: Measuring, tokenizer: Any, model: Any, changed: Sequence[Change]
) -> dict[str, float]:
    """How many there are, and both losses with them scaled."""
    cache, top = settings.cache, settings.preset.data["top"]
    if "vectors" not in cache:
        cache["vectors"] = {one.path: output_side(one.base) for one in changed}
    leading = [Leading.of(one, top, cache["vectors"][one.path]) for one in changed]
    values: dict[str, float] = {
        f"intruders_{below}": float(np.mean([one.count(below) for one in leading])) for below in EPSILONS
    }
    for factor in FACTORS:
        losses = _losses(cell, settings, tokenizer, scaled(model, leading, EPSILON, factor))
        values |= {f"{name}_scaled_{factor}": losses[name] for name in ("loss", "base_text_loss")}
    return values


def _answers(cell: Cell, settings: Measuring, tokenizer: Any, model: Any) -> dict[str, float]:
    """The share of answers that are right, where each row of the new domain is a question and its answer."""
    if settings.preset.data["source"] != "instructions" or settings.sources.data is not None:
        return {}
    rows = read_rows(settings.folder / f"{TEST}.jsonl")
    questions, truths = ([row["messages"][turn]["content"] for row in rows] for turn in (0, 1))
    answers = generate_batch(model, tokenizer, questions, max_new_tokens=_ANSWER_TOKENS, batch_size=len(questions))
    return {"exact_match": mean_scores(answers, truths)[0]}


# What is read from the table.


def _controls(results: Results) -> dict[str, str]:
    """The controls with the arms that they control."""
    return {
        arm.name: arm.control_of for _, arm in results.preset.pairs() if arm.control_of and arm.name in results.arms
    }


def _mains(results: Results) -> list[str]:
    return [arm for arm in results.arms if arm not in _controls(results)]


def _start(results: Results, metric: str) -> float:
    """The value of the base, which all reported cells start from."""
    return interval(c[0][1] for arm in results.arms for c in results.curves(metric, arm).values()).mean


def _joined(learned: Curve, known: Curve) -> Course:
    others = dict(known)
    return [(value, others[step]) for step, value in learned if step in others]


def paths(results: Results, arm: str) -> dict[int, Course]:
    """Learning and forgetting in the course of each reported seed."""
    known = results.curves(KNOWN.name, arm)
    return {seed: _joined(curve, known.get(seed, [])) for seed, curve in results.curves(LEARNED.name, arm).items()}


def paths_by_rate(results: Results, arm: str) -> dict[float, dict[int, Course]]:
    """The same by learning rate, on the seeds that choose."""
    known = results.curves_by_rate(KNOWN.name, arm)
    learned = results.curves_by_rate(LEARNED.name, arm)
    return {rate: {seed: _joined(c, known[rate][seed]) for seed, c in by.items()} for rate, by in learned.items()}


def known_at(path: Course, target: float) -> float:
    """The loss on what was known where that on what is learned first falls to `target`; by a line between points.

    NaN where it never does.

    >>> known_at([(4.0, 1.0), (2.0, 1.4), (1.0, 2.0)], 1.5)
    1.7
    """
    if path and path[0][0] <= target:
        return path[0][1]
    for (before, there), (after, then) in itertools.pairwise(path):
        if after <= target < before:
            return there + (before - target) / (before - after) * (then - there)
    return math.nan


def matched(results: Results) -> dict[str, dict[int, float]]:
    """By arm and seed how far the old domain's loss rose where the arm has learned what the weakest arm ends with."""
    ends: dict[int, list[float]] = {}
    for arm in _mains(results):
        for seed, value in results.last(LEARNED.name, arm).items():
            if math.isfinite(value):
                ends.setdefault(seed, []).append(value)
    return {
        arm: {
            seed: known_at(path, max(ends[seed])) - path[0][1]
            for seed, path in paths(results, arm).items()
            if seed in ends and path
        }
        for arm in results.arms
    }


def _choosing_mark(results: Results) -> float | None:
    """On the seeds that choose: the mean loss of the weakest arm at the end, at its chosen rate."""
    ends = []
    for arm in _mains(results):
        by_seed = paths_by_rate(results, arm).get(results.rate(arm) or math.nan, {})
        if by_seed:
            ends.append(interval(path[-1][0] for path in by_seed.values()).mean)
    return max(ends, default=None)


def least_forgetting(results: Results, arm: str, mark: float) -> dict[float, float]:
    """By rate, over the seeds that choose, the mean rise of the old domain's loss where `mark` is reached by all."""
    rises = {}
    for rate, by_seed in paths_by_rate(results, arm).items():
        rise = [known_at(path, mark) - path[0][1] for path in by_seed.values()]
        if all(map(math.isfinite, rise)):
            rises[rate] = sum(rise) / len(rise)
    return rises


def _matched_table(results: Results) -> str:
    rise, mark = matched(results), _choosing_mark(results)
    rows = []
    for arm in results.arms:
        mean = interval(rise[arm].values())
        envelope = {} if mark is None else least_forgetting(results, arm, mark)
        rate = min(envelope, key=lambda rate: envelope[rate], default=None)
        seeds = 0 if rate is None else len(results.curves_by_rate(LEARNED.name, arm)[rate])
        least = ("", "", "") if rate is None else (f"{envelope[rate]:.3f}", f"{rate:g}", str(seeds))
        rows.append([arm, mean.text(), str(mean.n), *least])
    heads = ["arm", "forgetting", "seeds that got there", "least over rates", "at rate", "seeds that choose"]
    return table(heads, rows)


def _intruders_table(results: Results) -> str:
    heads = ["arm", "n", "intruders a matrix"]
    heads += [f"{domain} domain, λ = {factor:g} minus 1" for factor in FACTORS for domain in ("old", "new")]
    rows = []
    for arm in results.arms:
        count = results.mean(f"intruders_{EPSILON}", arm)
        moved = [
            paired(results.last(f"{metric.name}_scaled_{factor}", arm), results.last(metric.name, arm))
            for factor in FACTORS
            for metric in (KNOWN, LEARNED)
        ]
        if count.n:
            rows.append([arm, count.seeds, count.text(2), *(one.text(sign=True) for one in moved)])
    return table(heads, rows)


# Figures.


def _draw_plane(results: Results) -> Any:
    """Forgetting against learning: arms at their chosen rates, the envelope over rates behind them."""
    figure, [[panel]] = new_figure(height=4.6)
    old, new = _start(results, KNOWN.name), _start(results, LEARNED.name)
    far, low = list[float](), list[float]()
    for arm in results.arms:
        learned = interval(new - value for value in results.last(LEARNED.name, arm).values())
        rise = interval(value - old for value in results.last(KNOWN.name, arm).values())
        look = style(arm, results.arms)
        ends = sorted(_ends_by_rate(results, arm))
        panel.plot(*zip(*ends, strict=True), color=look["color"], alpha=0.35, linewidth=1) if ends else None
        if learned.n:
            far, low = [*far, rise.mean + (rise.half or 0.0)], [*low, learned.mean - (learned.half or 0.0)]
            panel.errorbar(
                rise.mean,
                learned.mean,
                xerr=rise.half or 0.0,
                yerr=learned.half or 0.0,
                capsize=3,
                label=arm,
                **look | {"linestyle": "none", "markersize": 7},
            )
    if far:
        panel.set_xlim(right=1.1 * max(far))
        # Rates at which next to nothing is learned lie below.
        panel.set_ylim(bottom=min(low) - 0.05 * abs(min(low)))
    panel.set(
        xlabel="forgetting: rise of the old domain's loss, nats a token", ylabel="learning: fall of the new one's"
    )
    text = "Marks: chosen rates, bars of 95 % over seeds. Thin lines: all rates that were tried, on the choosing seeds."
    return finish(figure, results, text, panel)


def _ends_by_rate(results: Results, arm: str) -> Iterator[tuple[float, float]]:
    """Forgetting and learning at the end, by rate, where both are finite."""
    for by_seed in paths_by_rate(results, arm).values():
        rise = interval(path[-1][1] - path[0][1] for path in by_seed.values())
        learned = interval(path[0][0] - path[-1][0] for path in by_seed.values())
        if rise.n and learned.n:
            yield rise.mean, learned.mean


def _draw_curves(results: Results) -> Any:
    figure, [panels] = new_figure(2)
    for panel, metric in zip(panels, (LEARNED, KNOWN), strict=True):
        draw_curves(panel, results, metric.name)
        panel.set_ylabel(metric.head)
    plain_log(panels[0], "y")
    return finish(figure, results, "Chosen rates; bands: 95 % intervals over seeds.", panels[0])


def _draw_spectrum(results: Results) -> Any:
    figure, panels = new_figure(2, 2)
    first, second, third, fourth = panels.flat
    mains = _mains(results)
    for panel, kind in ((first, "attention"), (second, "MLP")):
        for arm, name in [*((arm, f"energy_{kind}") for arm in mains), ("", f"energy_noise_{kind}")]:
            means = {count: _over(results, f"{name}_{count}", arm) for count in COUNTS}
            points = [(count, mean) for count, mean in means.items() if not math.isnan(mean)]
            look = style(arm, mains) if arm else {"color": "0.5", "linestyle": "--"}
            if points:
                panel.plot(*zip(*points, strict=True), label=arm or "independent noise", **look)
        panel.axhline(0.9, color="0.5", linewidth=1, linestyle=":", zorder=0)
        plain_log(panel, "x", ticks=[4**power for power in range(6)])
        panel.set(xlabel=f"singular values of the change, {kind}", ylabel="share of its energy", ylim=(0, 1.03))
    draw_curves(third, results, "rank90", arms=mains)
    plain_log(third, "y")
    third.set_ylabel("rank at 90 % of the energy")
    _draw_layers(fourth, results)
    text = (
        "Means over matrices; bands: 95 % intervals over seeds. Noise: normal numbers in matrices of the same shapes."
    )
    return finish(figure, results, text, first)


def _over(results: Results, metric: str, arm: str) -> float:
    return interval(value for name in [arm] * bool(arm) or results.arms for value in results.last(metric, name).values()
                    if math.isfinite(value)).mean  # fmt: skip


def _draw_layers(panel: Any, results: Results) -> None:
    """The rank by layer and module, in numbers on shades."""
    arm = FULL if FULL in results.arms else results.arms[0]
    means: Mapping[tuple[str, int], float] = {
        (module, int(layer)): results.mean(f"rank90_{module}_{layer}", arm).mean
        for name in dict.fromkeys(results.frame["metric"])
        for module, _, layer in [name.removeprefix("rank90_").rpartition("_")]
        if name.startswith("rank90_") and layer.isdecimal()
    }
    modules, layers = list(dict.fromkeys(module for module, _ in means)), sorted({layer for _, layer in means})
    grid = np.array([[means.get((module, layer), math.nan) for layer in layers] for module in modules])
    panel.grid(False)
    if not grid.size:
        return
    panel.imshow(grid, cmap="Blues", aspect="auto", vmin=0)
    half = np.nanmax(grid) / 2 if np.isfinite(grid).any() else 0.0
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            colour = "white" if value > half else "black"
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    panel.set_yticks(range(len(modules)), modules)
    panel.set_xticks(range(len(layers)), layers)
    panel.set_xlabel(f"layer; rank at 90 % of the energy, {arm}")


def _draw_intruders(results: Results) -> Any:
    figure, [panels] = new_figure(3)
    factors, mains = sorted({*FACTORS, 1.0}), _mains(results)
    curves = {panel: (factors, metric) for panel, metric in zip(panels[1:], (KNOWN, LEARNED), strict=True)}
    for arm in mains:
        means = [results.mean(f"intruders_{below}", arm) for below in EPSILONS]
        panels[0].errorbar(EPSILONS, [mean.mean for mean in means], yerr=bars(means), label=arm, **style(arm, mains))
        for panel, (places, metric) in curves.items():
            names = [metric.name if factor == 1 else f"{metric.name}_scaled_{factor}" for factor in places]
            means = [results.mean(name, arm) for name in names]
            panel.errorbar(places, [mean.mean for mean in means], yerr=bars(means), **style(arm, mains))
    panels[0].set(xlabel="ε", ylabel=f"intruders a matrix, of {results.preset.data['top']} vectors")
    for panel, domain in zip(panels[1:], ("old", "new"), strict=True):
        panel.set(xlabel="λ", ylabel=f"loss, {domain} domain, nats")
    text = f"Bars: 95 % intervals over seeds. λ: factor on intruders at ε = {EPSILON} (1: as trained, 0: taken away)."
    return finish(figure, results, text, panels[0])
