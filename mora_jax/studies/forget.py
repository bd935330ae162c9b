"""Does LoRA learn less and forget less? After arXiv 2405.09673, with the spectra and intruders of what was changed.

A new domain is learned while texts of the old one are watched. *Learning* is the loss on rows of the new domain that
were not trained on, *forgetting* the rise of the loss on the old one. Both are compared at equal steps, and forgetting
at equal learning too.
"""

import dataclasses
import itertools
import math
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mora_jax import demo
from mora_jax.data import Conversation, load_rows
from mora_jax.demo.answers import mean_scores
from mora_jax.errors import InputError
from mora_jax.interop.load import load_pretrained
from mora_jax.studies import figures as draw, rows as row_files, spectrum, study
from mora_jax.studies.conclusion import table
from mora_jax.studies.intervals import differences, interval, paired
from mora_jax.studies.results import Curve, Results
from mora_jax.studies.rows import HELD_OUT, TEST, TRAIN, Rows
from mora_jax.studies.spectrum import COUNTS, EPSILON, EPSILONS, FACTORS, Change
from mora_jax.studies.study import FULL

#: Spectra are measured at so many of the evaluations, the last one included.
_SPECTRA = 4
_ANSWER_TOKENS = 16
LEARNED = study.Metric("loss", "loss on the new domain, nats a token")
KNOWN = study.Metric("base_text_loss", "loss on the old domain, nats a token")
_MATCHED = study.Metric("forgetting at equal learning", "rise of the old domain's loss at equal learning, nats a token")
#: (loss on what is learned, loss on what was known), evaluation by evaluation.
Course = Sequence[tuple[float, float]]


def _arms(low: int, high: int, *, full: float, lora: float, mora: float) -> tuple[study.Arm, ...]:
    """The arms at a low and a high rank, around rates of full fine-tuning, of LoRA and MoRA by rotation at the low."""

    def control(arm: study.Arm, note: str, **settings: Any) -> study.Arm:
        return study.Arm(f"{arm.name}, {note}", {**arm.settings, **settings}, arm.rates, control_of=arm.name)

    everything, large = study.full(full), study.adapter("LoRA", high, 0.4 * lora, alpha=2.0 * high)
    return (
        everything,
        study.adapter("LoRA", low, lora, alpha=2.0 * low),
        large,
        study.adapter("MoRA sharing", low, 0.5 * mora, "mora", kind="sharing"),
        study.adapter("MoRA rotation", low, mora, "mora", kind="rotation"),
        control(everything, "weight decay", **{"optimizer.weight_decay": 1.0}),
        control(large, "dropout", **{"adapter.dropout": 0.1}),
        control(large, "KL", **{"loss.kl_weight": 1.0, "loss.kl_tokens": "prompt"}),
    )


def _rank_arms() -> tuple[study.Arm, ...]:
    """Full fine-tuning, and LoRA and both forms of MoRA at three ranks, with the parameters of LoRA's rank."""
    arms = [study.full(6e-4)]
    arms += [study.adapter("LoRA", rank, rate, alpha=2.0 * rank) for rank, rate in ((2, 5e-3), (8, 3e-3), (32, 1.5e-3))]
    for kind, rate in (("sharing", 2.5e-3), ("rotation", 1e-2)):
        arms += [study.adapter(f"MoRA {kind}", rank, rate, "mora", kind=kind) for rank in (2, 8, 32)]
    return tuple(arms)


def _settings(*, steps: int, batch_size: int, max_length: int, evaluations: int, **others: Any) -> dict[str, Any]:
    every = {"eval_every": steps // evaluations, "log_every": steps}
    warmup = min(20, steps // 2)
    return study.budget(steps, batch_size, warmup_steps=warmup, **every, **{"data.max_length": max_length, **others})


def _data(source: str, **others: Any) -> dict[str, Any]:
    """Of the study.

    `rows`: to train on at most; `scored`: to report on at most, of rows and of texts, half as many to choose rates by;
    `text_length`: of the texts of what was known, in tokens; `layers`: whose spectra are measured, every so many;
    `top`: leading singular vectors that are looked at; `characters`: a row of code; `epochs`: at most so many.
    """
    return {"source": source, "scored": 240, "text_length": 128, "layers": 1, "top": 10, "epochs": 50, **others}


_FLOAT32 = {"model.dtype": "float32"}
_QUICK = _arms(2, 16, full=6e-4, lora=1e-2, mora=1e-2)
_QUICK_SETTINGS = _settings(steps=96, batch_size=16, max_length=32, evaluations=8, **_FLOAT32)


class Forget(study.Study):
    """A new domain is learned while texts of the old one are watched."""

    name = "forget"
    question = "does LoRA learn less and forget less?"
    paper = "LoRA Learns Less and Forgets Less (arXiv 2405.09673) and LoRA vs Full Fine-tuning (arXiv 2410.21228)"
    chosen_by = "loss"
    metrics = (
        LEARNED,
        KNOWN,
        study.Metric("accuracy", "token accuracy on the new domain", 1),
        study.Metric("exact_match", "exact match on the new domain", 1),
        study.Metric("rank90", "rank of the change at 90 % of its energy", 0),
        study.Metric("rank90_attention", "the same of attention", 0),
        study.Metric("rank90_MLP", "the same of MLP", 0),
        study.Metric("stable_rank", "stable rank of the change", 0),
        study.Metric("delta_norm", "Frobenius norm of the change", 0),
        study.Metric(f"intruders_{EPSILON}", f"intruders a matrix at ε = {EPSILON}", 0),
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
        "tiny": study.Preset(
            "seconds; shows the form of the results, and no more",
            study.tiny(_QUICK[:2]),
            _settings(steps=4, batch_size=4, max_length=32, evaluations=2, **_FLOAT32),
            _data("instructions", rows=64, scored=16),
            seeds=2,
        ),
        "quick": study.Preset(
            "the embedded model, minutes on two cores",
            _QUICK,
            _QUICK_SETTINGS,
            _data("instructions", rows=2000),
            reason="96 steps of 16 rows are less than an epoch, so that no row is learned by heart; all test rows are "
            "scored.",
        ),
        "ranks": study.Preset(
            "the embedded model, adapters at three ranks, less than an hour on two cores",
            _rank_arms(),
            _QUICK_SETTINGS,
            _data("instructions", rows=2000),
            seeds=5,
            reason="As quick; ranks 2 to 32 have 2 to 36 % of the model's parameters.",
        ),
        "small": study.Preset(
            "a model of about 100 M parameters, a day on two cores",
            _arms(8, 64, full=1e-4, lora=1e-3, mora=1e-3),
            _settings(steps=200, batch_size=8, max_length=256, evaluations=8, **_FLOAT32),
            _data("code", rows=4000, scored=100, text_length=256, layers=5, characters=800),
            reason="200 steps of 8 pieces of code are what two cores do in minutes a run.",
        ),
        "paper": study.Preset(
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

    def check(self, preset: study.Preset, sources: study.Sources) -> None:
        """Needs texts, and as much data as the preset's steps are worth."""
        if sources.base_texts is None:
            raise InputError("study forget watches texts like those that the base was pretrained on: give --texts FILE")
        rows = len(_parts(preset, sources)[TRAIN])
        sizes = preset.settings
        epochs = sizes["train.steps"] * sizes["train.batch_size"] / max(1, min(rows, preset.data["rows"]))
        if epochs > preset.data["epochs"]:
            raise InputError(
                f"there are {rows:,} rows to train on, which this preset would see {epochs:,.0f} times; give more by "
                "--data FILE, or choose a smaller preset"
            )

    def settings(self, cell: study.Cell, preset: study.Preset) -> dict[str, Any]:
        """Rates need half the evaluations."""
        return {"train.eval_every": 2 * preset.settings["train.eval_every"]} if cell.chooses else {}

    def write_data(
        self, preset: study.Preset, level: study.Level, seed: int, folder: Path, sources: study.Sources
    ) -> dict[str, Any]:
        """The rows of the new domain in three parts: to train on, to choose rates by, to report; texts of the old."""
        train, test = folder / f"train_{seed}.jsonl", folder / f"{TEST}.jsonl"
        if not train.exists() or not test.exists():
            limit, parts = preset.data["scored"], _parts(preset, sources)
            texts = row_files.sample(_rows([sources.base_texts or ""], "--texts"), limit)
            row_files.write_rows(folder / "texts.jsonl", texts)
            row_files.write_rows(folder / "some_texts.jsonl", row_files.sample(texts, limit // 4))
            row_files.write_rows(folder / f"{HELD_OUT}.jsonl", row_files.sample(parts[HELD_OUT], limit // 2))
            rows = parts[TRAIN]
            row_files.write_rows(train, random.Random(seed).sample(rows, min(len(rows), preset.data["rows"])))
            row_files.write_rows(test, row_files.sample(parts[TEST], limit))
        return {"data.train": (str(train),)}

    def measure(self, at: study.Evaluation) -> dict[str, float]:
        """Losses on both domains; at some steps the spectrum of the change; at the end of reported cells the rest."""
        values, cell = _losses(at), at.cell
        last, due = at.step == at.steps, at.step % max(1, at.steps // _SPECTRA) == 0
        if cell.chooses or cell.perturbed or not at.step or not (last or due):
            return values
        spectra = spectrum.Spectrum.of(_changes(at))
        values |= spectra.figures()
        if last:
            values |= spectra.details(COUNTS, noise=cell.seed == 1 and cell.arm is at.preset.arms[0])
            values |= _intruders(at, spectra.changes)
            values |= _exact_match(at)
        return values

    def explore(self, results: Results) -> Iterable[study.Cell]:
        """Lower rates on the seeds that choose, until at equal learning the least forgetting lies inside.

        A rate at which an arm no longer learns as much ends the search too.
        """
        mark = _choosing_mark(results)
        for level, arm in results.preset.pairs():
            if mark is None or len(arm.rates) < 2 or arm.control_of:
                continue
            least = least_forgetting(results, arm.name, mark)
            rates = results.by_rate(LEARNED.name, arm.name)
            if not least or min(least, key=lambda rate: (least[rate], rate)) != min(rates) or len(rates) > 9:
                continue
            lower = study.rounded(min(rates) / (arm.rates[1] / arm.rates[0]))
            for seed in study.CHOOSING_SEEDS:
                yield study.Cell(level, arm, lower, seed, study.EXPLORATORY)

    def pairs(self, results: Results, level: str) -> list[tuple[str, str]]:
        """Every method against full fine-tuning, MoRA against LoRA of its rank, controls against what they control."""
        mains, controls = _mains(results), _controls(results)
        pairs = [(arm, FULL) for arm in mains if arm != FULL and FULL in mains]
        moras, loras = ([arm for arm in mains if arm.startswith(kind)] for kind in ("MoRA", "LoRA"))
        ranks = {lora.split()[-1]: lora for lora in loras}
        pairs += [(mora, ranks[rank]) for mora in moras if (rank := mora.split()[-1]) in ranks]
        return pairs + list(controls.items())

    def contrasts(self, results: Results) -> Iterable[study.Contrast]:
        """Forgetting at equal learning."""
        known = matched(results)
        for arm in results.arms:
            if arm != FULL and FULL in known:
                cells = results.cells(arm) + results.cells(FULL)
                yield study.Contrast(f"{arm} − {FULL}", _MATCHED, "", differences(known[arm], known[FULL]), cells)

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
            rows.append(row_files.as_row(row))
    return rows


def _parts(preset: study.Preset, sources: study.Sources) -> dict[str, Rows]:
    """Rows by part: the user's own, the embedded instructions with their tasks, or code."""
    if sources.data is not None:
        return row_files.split_by_prompt(_rows(sources.data, "--data"), 0.1, f"--data {sources.data[0]}")
    if preset.data["source"] == "code":
        return code_texts(preset.data["characters"])
    return {part: row_files.read_rows(demo.data_path(part)) for part in demo.PARTS}


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


def _losses(at: study.Evaluation) -> dict[str, float]:
    """On both domains: rates are not chosen on what is reported."""
    new, old = (HELD_OUT, "some_texts") if at.cell.chooses else (TEST, "texts")
    learned = at.score(at.folder / f"{new}.jsonl", part=new)
    length = at.preset.data["text_length"]
    known = at.score(at.folder / f"{old}.jsonl", mode="full", max_length=length, part=old)
    return {"loss": learned.nll, "accuracy": learned.accuracy, "base_text_loss": known.nll}


def _changes(at: study.Evaluation) -> list[Change]:
    """Of the layers whose spectra are measured."""
    every, base = at.preset.data["layers"], None
    if at.cell.arm.settings["adapter.method"] == "full":
        if "kernels" not in at.cache:
            # Read on the host: the devices hold the model that is trained.
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                model, _ = load_pretrained(at.sources.model, dtype=at.preset.settings.get("model.dtype"))
                at.cache["kernels"] = spectrum.kernels(model, every)
        base = at.cache["kernels"]
    return list(spectrum.changes(at.model, base, every))


def _intruders(at: study.Evaluation, changes: Sequence[Change]) -> dict[str, float]:
    """How many there are, and both losses with them scaled."""
    cache, top = at.cache, at.preset.data["top"]
    if "vectors" not in cache:
        cache["vectors"] = {one.path: spectrum.output_side(one.base) for one in changes}
    leading = [spectrum.Leading.of(one, top, cache["vectors"][one.path]) for one in changes]
    values: dict[str, float] = {
        f"intruders_{below}": float(np.mean([one.count(below) for one in leading])) for below in EPSILONS
    }
    for factor in FACTORS:
        model = spectrum.scaled(at.model, leading, EPSILON, factor)
        losses = _losses(dataclasses.replace(at, model=model, items=None))
        values |= {f"{name}_scaled_{factor}": losses[name] for name in ("loss", "base_text_loss")}
    return values


def _exact_match(at: study.Evaluation) -> dict[str, float]:
    """The share of answers that are right, where each row of the new domain is a question and its answer."""
    if at.preset.data["source"] != "instructions" or at.sources.data is not None:
        return {}
    rows = row_files.read_rows(at.folder / f"{TEST}.jsonl")
    questions, truths = ([row["messages"][turn]["content"] for row in rows] for turn in (0, 1))
    return {"exact_match": mean_scores(at.answers(questions, _ANSWER_TOKENS), truths)[0]}


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


def paths(
    results: Results, arm: str, stages: Iterable[str] = (study.CHOOSING, study.EXPLORATORY)
) -> dict[float, dict[int, Course]]:
    """Learning and forgetting in the course of each seed by learning rate; by default on the seeds that choose."""
    known = results.by_rate(KNOWN.name, arm, stages=stages)

    def joined(curve: Curve, rate: float, seed: int) -> Course:
        others = dict(known.get(rate, {}).get(seed, []))
        return [(value, others[step]) for step, value in curve if step in others]

    learned = results.by_rate(LEARNED.name, arm, stages=stages)
    return {
        rate: {seed: joined(curve, rate, seed) for seed, curve in curves.items()} for rate, curves in learned.items()
    }


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
        for seed, value in results.values(LEARNED, arm).items():
            if math.isfinite(value):
                ends.setdefault(seed, []).append(value)
    return {
        arm: {
            seed: known_at(path, max(ends[seed])) - path[0][1]
            for by_seed in paths(results, arm, [study.REPORTED]).values()
            for seed, path in by_seed.items()
            if seed in ends and path
        }
        for arm in results.arms
    }


def _choosing_mark(results: Results) -> float | None:
    """On the seeds that choose: the mean loss of the weakest arm at the end, at its chosen rate."""
    ends = []
    for arm in _mains(results):
        if by_seed := paths(results, arm).get(results.rate(arm) or math.nan):
            ends.append(interval(path[-1][0] for path in by_seed.values()).mean)
    return max(ends, default=None)


def least_forgetting(results: Results, arm: str, mark: float) -> dict[float, float]:
    """By rate, over the seeds that choose, the mean rise of the old domain's loss where `mark` is reached by all."""
    rises = {
        rate: [known_at(path, mark) - path[0][1] for path in by_seed.values()]
        for rate, by_seed in paths(results, arm).items()
    }
    return {rate: sum(rise) / len(rise) for rate, rise in rises.items() if all(map(math.isfinite, rise))}


def _matched_table(results: Results) -> str:
    rise, mark = matched(results), _choosing_mark(results)
    rows = []
    for arm in results.arms:
        mean, least = interval(rise[arm].values()), ["", "", ""]
        if mark is not None and (rates := least_forgetting(results, arm, mark)):
            rate = min(rates, key=lambda rate: rates[rate])
            least = [f"{rates[rate]:.3f}", f"{rate:g}", str(len(results.by_rate(LEARNED.name, arm)[rate]))]
        rows.append([arm, mean.text(), str(mean.n), *least])
    heads = ["arm", "forgetting", "seeds that got there", "least over rates", "at rate", "seeds that choose"]
    return table(heads, rows)


def _intruders_table(results: Results) -> str:
    heads, rows = ["arm", "n", "intruders a matrix"], []
    heads += [f"{domain} domain, λ = {factor:g} minus 1" for factor in FACTORS for domain in ("old", "new")]
    for arm in results.arms:
        count = results.mean(f"intruders_{EPSILON}", arm)
        changes = [
            paired(results.values(f"{metric.name}_scaled_{factor}", arm), results.values(metric, arm))
            for factor in FACTORS
            for metric in (KNOWN, LEARNED)
        ]
        if count.n:
            rows.append([arm, count.seeds, count.text(2), *(one.text(sign=True) for one in changes)])
    return table(heads, rows)


# Figures.


def _draw_plane(results: Results) -> Any:
    """Forgetting against learning: arms at their chosen rates, the envelope over rates behind them."""
    figure, [panel] = draw.new_figure(height=4.6)
    old, new = _start(results, KNOWN.name), _start(results, LEARNED.name)
    far, low = list[float](), list[float]()
    for arm in results.arms:
        learned = interval(new - value for value in results.values(LEARNED, arm).values())
        rise = interval(value - old for value in results.values(KNOWN, arm).values())
        look = draw.style(arm, results.arms)
        if ends := sorted(_ends_by_rate(results, arm)):
            panel.plot(*zip(*ends, strict=True), color=look["color"], alpha=0.35, linewidth=1)
        if learned.n:
            bars = rise.half or 0.0, learned.half or 0.0
            far.append(rise.mean + bars[0])
            low.append(learned.mean - bars[1])
            look |= {"linestyle": "none", "markersize": 7}
            panel.errorbar(rise.mean, learned.mean, bars[1], bars[0], capsize=3, label=arm, **look)
    if far:
        panel.set_xlim(right=1.1 * max(far))
        # Rates at which next to nothing is learned lie below.
        panel.set_ylim(bottom=min(low) - 0.05 * abs(min(low)))
    panel.set(
        xlabel="forgetting: rise of the old domain's loss, nats a token", ylabel="learning: fall of the new one's"
    )
    text = (
        "Marks: chosen rates, bars of 95 % over seeds. Thin lines: all rates that were tried, on the choosing seeds "
        "and the validation rows."
    )
    return draw.finish(figure, results, text)


def _ends_by_rate(results: Results, arm: str) -> Iterator[tuple[float, float]]:
    """Forgetting and learning at the end, by rate, where both are finite."""
    for by_seed in paths(results, arm).values():
        rise = interval(path[-1][1] - path[0][1] for path in by_seed.values())
        learned = interval(path[0][0] - path[-1][0] for path in by_seed.values())
        if rise.n and learned.n:
            yield rise.mean, learned.mean


def _draw_curves(results: Results) -> Any:
    figure, panels = draw.new_figure(2)
    for panel, metric in zip(panels, (LEARNED, KNOWN), strict=True):
        draw.draw_curves(panel, results, metric.name)
        panel.set_ylabel(metric.head)
    draw.plain_log(panels[0], "y")
    return draw.finish(figure, results, "Chosen rates; bands: 95 % intervals over seeds.")


def _draw_spectrum(results: Results) -> Any:
    figure, panels = draw.new_figure(2, 2)
    mains = _mains(results)
    for panel, kind in zip(panels, ("attention", "MLP"), strict=False):
        for arm in mains:
            _draw_energy(panel, results, f"energy_{kind}", [arm], label=arm, **draw.style(arm, mains))
        noise = {"label": "independent noise", "color": "0.5", "linestyle": "--"}
        _draw_energy(panel, results, f"energy_noise_{kind}", results.arms, **noise)
        panel.axhline(0.9, **draw.DOTTED)
        draw.plain_log(panel, "x", ticks=[4**power for power in range(6)])
        panel.set(xlabel=f"singular values of the change, {kind}", ylabel="share of its energy", ylim=(0, 1.03))
    draw.draw_curves(panels[2], results, "rank90", arms=mains)
    draw.plain_log(panels[2], "y")
    panels[2].set_ylabel("rank at 90 % of the energy")
    _draw_layers(panels[3], results)
    text = (
        "Means over matrices; bands: 95 % intervals over seeds. Noise: normal numbers in matrices of the same shapes."
    )
    return draw.finish(figure, results, text)


def _draw_energy(panel: Any, results: Results, metric: str, arms: Iterable[str], **look: Any) -> None:
    """The mean share of energy in the first singular values, over those cells of the arms that have it."""
    means = {count: [results.mean(f"{metric}_{count}", arm) for arm in arms] for count in COUNTS}
    energies = {count: interval(mean.mean for mean in means[count]) for count in COUNTS}
    if counts := [count for count in COUNTS if energies[count].n]:
        panel.plot(counts, [energies[count].mean for count in counts], **look)


def _draw_layers(panel: Any, results: Results) -> None:
    """The rank by layer and module, in numbers on shades."""
    arm = FULL if FULL in results.arms else results.arms[0]
    names = results.frame["metric"].drop_duplicates().str.extract(r"^rank90_(?P<module>\w+)_(?P<layer>\d+)$").dropna()
    panel.grid(False)
    if names.empty:
        return
    ranks = [results.mean(f"rank90_{module}_{layer}", arm).mean for module, layer in names.itertuples(index=False)]
    shades = names.assign(layer=names["layer"].astype(int), rank=ranks).pivot_table("rank", "module", "layer")
    shades = shades.reindex(names["module"].unique())
    panel.imshow(shades, cmap="Blues", aspect="auto", vmin=0)
    for (row, column), rank in np.ndenumerate(shades.to_numpy()):
        colour = "white" if rank > shades.max(axis=None) / 2 else "black"
        text = "" if math.isnan(rank) else f"{rank:.0f}"
        panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    panel.set_yticks(range(len(shades.index)), shades.index)
    panel.set_xticks(range(len(shades.columns)), shades.columns)
    panel.set_xlabel(f"layer; rank at 90 % of the energy, {arm}")


def _draw_intruders(results: Results) -> Any:
    figure, panels = draw.new_figure(3)
    factors, mains = sorted({*FACTORS, 1.0}), _mains(results)
    columns: dict[str, dict[float, str]] = {"": {below: f"intruders_{below}" for below in EPSILONS}}
    for domain, metric in (("old", KNOWN.name), ("new", LEARNED.name)):
        columns[domain] = {factor: metric if factor == 1 else f"{metric}_scaled_{factor}" for factor in factors}
    for panel, (domain, names) in zip(panels, columns.items(), strict=True):
        for arm in mains:
            means = [results.mean(name, arm) for name in names.values()]
            draw.draw_means(panel, list(names), means, arm, **draw.style(arm, mains))
        panel.set(xlabel="λ", ylabel=f"loss, {domain} domain, nats")
    panels[0].set(xlabel="ε", ylabel=f"intruders a matrix, of {results.preset.data['top']} vectors")
    text = f"Bars: 95 % intervals over seeds. λ: factor on intruders at ε = {EPSILON} (1: as trained, 0: taken away)."
    return draw.finish(figure, results, text)
