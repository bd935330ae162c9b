"""Does MoRA store more than LoRA at equal parameters? After the UUID pairs of MoRA (arXiv 2405.12130, section 3).

Random pairs of keys and values are memorised; the loss is on the values alone. A UUID has fixed digits, which any
method learns at once; here all symbols are uniform. They are sixteen letters set apart by spaces, four bits each, so
that most tokenizers make one token of each.

At a budget of steps that ends before all is stored the accuracy says who learns sooner. How much is stored is another
question: the preset `saturation` trains until nothing more is learned, on more and more pairs.
"""

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.errors import InputError
from mora_jax.studies import figures as draw, study
from mora_jax.studies.conclusion import table
from mora_jax.studies.intervals import differences, interval
from mora_jax.studies.results import Results
from mora_jax.studies.rows import read_rows, write_rows

SYMBOLS = "abcdefghijklmnop"
BITS = 4
#: Answers are generated at so many of the evaluations, the last one included.
_GENERATIONS = 4
#: Of eight accelerators.
_EIGHT: dict[str, Any] = {"train.micro_batch_size": 200, "model.remat": "full", "mesh.fsdp": -1}
_SOONER = study.Metric("teacher_forced_accuracy", "teacher-forced accuracy, mean over the run", 1)


def make_pairs(count: int, length: int, seed: int) -> list[dict[str, str]]:
    """Rows with a `prompt`, the key, and a `completion`, the value.

    Args:
        count: pairs; no key occurs twice.
        length: symbols of a key, and of a value.
        seed: of the draw.
    """
    draw = random.Random(f"pairs {seed}")
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[" ".join(draw.choices(SYMBOLS, k=length))] = None
    return [{"prompt": key, "completion": " ".join(draw.choices(SYMBOLS, k=length))} for key in keys]


def right_symbols(answer: str, truth: str) -> tuple[int, int]:
    """How many symbols of a value an answer has right, position by position, of how many; missing ones are wrong.

    >>> right_symbols("a b c", "a c c d")
    (2, 4)
    """
    value = truth.split()
    return sum(symbol == right for symbol, right in zip(answer.split(), value, strict=False)), len(value)


def share_of_right(answers: Sequence[str], truths: Sequence[str]) -> tuple[float, float]:
    """The share of right symbols over all pairs, and of pairs that are right whole."""
    right, symbols = np.array([right_symbols(*pair) for pair in zip(answers, truths, strict=True)]).T
    return float(right.sum() / symbols.sum()), float(np.mean(right == symbols))


def bits_stored(symbols: int, loss: float) -> float:
    """At least so many bits of values are in the weights: what a guess at random lacks and the model knows.

    Args:
        symbols: of all values.
        loss: in nats a symbol, with those before it given.

    >>> bits_stored(100, math.log(16) / 2)
    200.0
    """
    return symbols * max(0.0, BITS - loss / math.log(2))


def _arms(rank: int, high: int, full: float, scale: float = 1.0, **others: Any) -> tuple[study.Arm, ...]:
    """The arms at a rank; `scale` times the learning rates of a narrow model."""

    def arm(name: str, rate: float, method: str, rank: int = rank, note: str = "", **settings: Any) -> study.Arm:
        return study.adapter(name, rank, rate * scale, method, note, **settings, **others)

    return (
        arm("LoRA", 5e-3, "lora", alpha=2.0 * rank),
        arm("LoRA", 4e-3, "lora", note=", α = 8r", alpha=8.0 * rank),
        arm("MoRA sharing", 3e-3, "mora", kind="sharing"),
        arm("MoRA rotation", 1e-2, "mora", kind="rotation"),
        arm("HiRA", 2e-2, "hira"),
        arm("LoRA", 3e-3, "lora", high, alpha=2.0 * high),
        study.full(full),
    )


def _settings(steps: int, batch_size: int, max_length: int, evaluations: int = 16, **others: Any) -> dict[str, Any]:
    others |= {"data.max_length": max_length, "loss.end_of_turn": "none"}
    every: dict[str, Any] = {"eval_every": steps // evaluations, "log_every": steps // 40}
    return study.budget(steps, batch_size, warmup_steps=min(20, steps), **every, **others)


def _pairs(count: int) -> study.Level:
    return study.Level(f"{count} pairs", {"pairs": count})


class Memorize(study.Study):
    """Random pairs of keys and values; the loss is on the values alone."""

    name = "memorize"
    question = "does MoRA learn pairs by heart sooner than LoRA at equal parameters, and does it store more?"
    paper = "MoRA (arXiv 2405.12130), section 3"
    chosen_by = "teacher_forced_accuracy"
    higher = True
    metrics = (
        study.Metric("generated_accuracy", "generated accuracy", 1),
        study.Metric("teacher_forced_accuracy", "teacher-forced accuracy", 1),
        study.Metric("pairs_right", "pairs right", 1),
        study.Metric("loss", "loss, nats a symbol"),
        study.Metric("bits_stored", "bits stored", 1),
        study.Metric("base_text_loss", "loss on base texts, nats a token"),
    )
    notes = (
        "Accuracy at a fixed number of steps says who learns sooner; bits stored are a measure of capacity only where "
        "the curve has become flat.",
        "LoRA as a memory has been measured elsewhere too (arXiv 2603.01097, 2605.30260): its capacity grows with the "
        "rank. Neither has MoRA.",
    )
    presets = {
        "tiny": study.Preset(
            "seconds; shows the form of the results, and no more",
            study.tiny(_arms(2, 8, 1e-3)[:3:2]),
            _settings(4, 4, 16),
            {"length": 2},
            (_pairs(8),),
            seeds=2,
        ),
        "quick": study.Preset(
            "the embedded model, minutes on two cores",
            _arms(2, 8, 1e-3),
            _settings(320, 32, 20),
            {"length": 8},
            (_pairs(128),),
            reason="320 steps of 32 pairs are 80 epochs, near the 100 of the paper; an earlier preset had 400 steps.",
        ),
        "saturation": study.Preset(
            "the embedded model with adapters on q and v alone, hours on two cores: bits stored against pairs",
            _arms(1, 2, 1e-3, targets=("q_proj", "v_proj"))[:5],
            _settings(2400, 32, 20, evaluations=24),
            {"length": 8},
            tuple(map(_pairs, (16, 32, 64, 128, 256))),
            reason="Few parameters are full soon; at 256 pairs they have a quarter of a parameter for each bit.",
        ),
        "small": study.Preset(
            "a model of about 100 M parameters, hours on two cores",
            _arms(2, 16, 1e-4, scale=0.7),
            # ChatML, because the model's own template may put a system message before every key.
            _settings(48, 12, 28, evaluations=6, **{"data.template": "chatml"}),
            {"length": 8},
            (_pairs(48),),
            reason="48 steps of 12 pairs are what two cores do in half a minute a run.",
        ),
        "paper": study.Preset(
            "a model of 7 B parameters on eight accelerators",
            _arms(8, 256, 3e-5, scale=0.03),
            _settings(1000, 1000, 128, **_EIGHT),
            {"length": 32},
            (_pairs(10_000),),
            reason="The paper's numbers.",
        ),
    }

    def check(self, preset: study.Preset, sources: study.Sources) -> None:
        """Takes no rows."""
        if sources.data is not None:
            raise InputError("study memorize makes its own pairs; leave out --data")

    def settings(self, cell: study.Cell, preset: study.Preset) -> dict[str, Any]:
        """Rates are chosen by the last evaluation."""
        if not cell.chooses:
            return {}
        return {"train.eval_every": preset.settings["train.steps"], "train.eval_on_start": False}

    def write_data(
        self, preset: study.Preset, level: study.Level, seed: int, folder: Path, sources: study.Sources
    ) -> dict[str, Any]:
        """A file of pairs."""
        count = level.values["pairs"]
        rows = make_pairs(count, preset.data["length"], seed)
        return {"data.train": (write_rows(folder / f"pairs_{count}_{seed}.jsonl", rows),)}

    def measure(self, at: study.Evaluation) -> dict[str, float]:
        """Loss and accuracy given the right symbols before; at some steps what is generated, and the base's texts."""
        (path,), length = at.data["data.train"], at.preset.data["length"]
        scores = at.score(path, end_of_turn="none", part="pairs")
        values = {
            "loss": scores.nll,
            "teacher_forced_accuracy": scores.accuracy,
            "bits_stored": bits_stored(at.cell.level.values["pairs"] * length, scores.nll),
        }
        every = at.steps // _GENERATIONS or 1
        if at.cell.chooses or (at.step % every and at.step != at.steps):
            return values
        rows = read_rows(path)
        answers = at.answers([row["prompt"] for row in rows], length + 1)
        symbols_right, pairs_right = share_of_right(answers, [row["completion"] for row in rows])
        values |= {"generated_accuracy": symbols_right, "pairs_right": pairs_right}
        if at.sources.base_texts is not None:
            values["base_text_loss"] = at.score(at.sources.base_texts, mode="full").nll
        return values

    def pairs(self, results: Results, level: str) -> list[tuple[str, str]]:
        """Every arm against LoRA, and MoRA against LoRA with a larger factor."""
        arms = results.arms_at(level)
        lora = next((arm for arm in arms if arm.startswith("LoRA")), "")
        strong = [arm for arm in arms if arm.startswith(f"{lora}, ")]
        pairs = [(arm, lora) for arm in arms if arm != lora and lora]
        return pairs + [(arm, other) for arm in arms if arm.startswith("MoRA") for other in strong]

    def contrasts(self, results: Results) -> Iterable[study.Contrast]:
        """Who learns sooner: the mean accuracy of all evaluations behind the first step, since arms that end at 1
        differ."""

        def over_the_run(arm: str, level: str) -> dict[int, float]:
            curves = results.curves(_SOONER.name, arm, level)
            return {seed: interval(value for step, value in curve if step).mean for seed, curve in curves.items()}

        for level in results.levels:
            for arm, other in self.pairs(results, level):
                values = differences(over_the_run(arm, level), over_the_run(other, level))
                cells = results.cells(arm, level) + results.cells(other, level)
                yield study.Contrast(f"{arm} − {other}", _SOONER, level, values, cells)

    def sections(self, results: Results) -> dict[str, str]:
        """The setting, steps to half of the symbols, and parameters a bit."""
        heads = ["arm", "parameters", "bits to store", "bits stored", "parameters a bit", "last quarter adds"]
        return {
            "length": str(results.preset.data["length"]),
            "chance": f"{1 / len(SYMBOLS):.4f}",
            "steps": table(["arm", "step (teacher-forced)"], _steps_to_half(results)),
            "stored": table(heads, _stored(results)),
        }

    def figures(self, results: Results) -> dict[str, Any]:
        """Accuracy against steps; bits stored against pairs."""
        level, chance = results.levels[-1], 1 / len(SYMBOLS)
        curves, panels = draw.new_figure(2)
        for panel, metric in zip(panels, self.metrics[:2], strict=True):
            draw.draw_curves(panel, results, metric.name, level)
            panel.set_ylabel(metric.head)
            panel.axhline(chance, **draw.DOTTED)
            panel.annotate("chance", (1, chance), (-2, 2), ("axes fraction", "data"), "offset points",
                           ha="right", fontsize=7, color="0.4")  # fmt: skip
        text = "Bands: 95 % intervals over seeds; dotted: chance."
        drawn = {"curves": draw.finish(curves, results, f"{level}. {text}" if level else text)}
        if len(results.levels) > 1:
            drawn["stored"] = _draw_stored(results)
        return drawn


def _steps_to_half(results: Results) -> Iterable[list[str]]:
    """By the mean over seeds at the evaluations."""
    for arm, level in results.pairs():
        by_step = results.by_step(_SOONER.name, arm, level)
        reached = [step for step, mean in by_step.items() if mean.mean >= 0.5]
        name = f"{arm}, {level}" if len(results.levels) > 1 else arm
        yield [name, str(reached[0]) if reached else "not reached" if by_step else "missing"]


def _stored(results: Results) -> Iterable[list[str]]:
    """Bits stored at the end, and by how much they grew in the last quarter of the steps: nothing at saturation."""
    for arm, level in results.pairs():
        count, stored = results.parameters(arm), results.mean("bits_stored", arm, level)
        if not stored.n or not count:
            continue
        before = results.mean("bits_stored", arm, level, share=0.75)
        pairs = int(results.frame[results.frame["level"] == level]["pairs"].iloc[0])
        yield [
            f"{arm}, {level}",
            f"{count:,}",
            f"{pairs * results.preset.data['length'] * BITS:,}",
            stored.text(0),
            f"{count / stored.mean:.2f}" if stored.mean else "none stored",
            f"{stored.mean - before.mean:+.0f}" if before.n else "",
        ]


def _draw_stored(results: Results) -> Any:
    figure, [panel] = draw.new_figure(height=3.4)
    size = results.preset.data["length"] * BITS
    counts = [int(level.split()[0]) for level in results.levels]
    for arm in results.arms:
        means = [results.mean("bits_stored", arm, level) for level in results.levels]
        draw.draw_means(panel, counts, means, arm, **draw.style(arm, results.arms))
    panel.plot(counts, [size * count for count in counts], color="0.6", linewidth=1, linestyle=":", label="all bits")
    draw.plain_log(panel, "x", ticks=counts)
    draw.plain_log(panel, "y")
    panel.set(xlabel="pairs", ylabel="bits stored")
    return draw.finish(figure, results, "Bars: 95 % intervals over seeds.")
