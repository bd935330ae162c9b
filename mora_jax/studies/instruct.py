"""Loss over the instruction or not? After Instruction Modelling (arXiv 2405.14394), with the control that it lacks.

Under unmasked loss an answer also weighs less: its share of its example. The arm `share` is masked loss with that
weight, row by row, so that what it doesn't explain is the instruction's own doing. A factor on the whole loss would be
no control, because AdamW cancels it; `lr_share` lowers the learning rate instead.

The embedded questions come alone or with a passage in front of them, so that prompts change and answers don't. A user's
rows are sorted into groups by the ratio that they have.
"""

import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax import demo
from mora_jax.data import EncodedDataset, load_rows, load_tokenizer
from mora_jax.data.loss_weights import normalize
from mora_jax.demo.answers import mean_scores
from mora_jax.errors import InputError
from mora_jax.studies import figures as draw, rows as row_files, study
from mora_jax.studies.conclusion import table
from mora_jax.studies.intervals import differences, interval
from mora_jax.studies.results import Results
from mora_jax.studies.rows import Rows

#: What is compared at a level.
Arms = tuple[study.Arm, ...]
#: Answers of so many words at most are generated and compared with the right ones.
_CHECKED_WORDS = 8
#: Parts of a user's prompts for validation and for the test.
_HELD_OUT = 0.15
_GUIDE = "validation_loss"
_BEST = study.Metric("test_loss", "test loss at the best epoch, nats a token", best_by=_GUIDE)
_GAIN = study.Metric("gain", "gain of unmasked loss in test loss at the best epoch, nats a token", 0)
#: Shi et al., tables 2 and 5: ratio of instruction to output length, AlpacaEval 1.0 of masked and of unmasked loss.
_PUBLISHED = {
    "LIMA": (0.094, 33.06, 32.94),
    "Dolly 9k": (0.297, 21.54, 30.77),
    "Alpaca 5k": (0.567, 16.29, 19.52),
    "Dolly 3k": (0.644, 13.42, 15.11),
    "BBH-ICL": (3.27, 36.20, 44.15),
    "TyDiQA": (5.86, 5.12, 10.10),
    "MMLU-Chat": (26.3, 4.42, 9.78),
}

LOSSES: dict[str, dict[str, Any]] = {
    "masked": {},
    "unmasked": {"loss.mode": "unmasked"},
    "full sequence": {"loss.mode": "full"},
    "im_paper": {"loss.mode": "im_paper"},
    **{f"weighted {weight:g}": {"loss.mode": "weighted", "loss.prompt_weight": weight} for weight in (0.01, 0.1, 0.5)},
    "wit 0.5": {"loss.mode": "wit", "loss.prompt_weight": 0.5},
    "share": {"loss.normalize": "share"},
    "lr_share": {},
    **{
        f"{loss}, by {of}": {"loss.mode": loss, "loss.normalize": of}
        for of in ("response", "example")
        for loss in ("masked", "unmasked")
    },
}
_METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter.method": "lora", "adapter.rank": 8, "adapter.alpha": 16.0},
    "MoRA": {"adapter.method": "mora", "adapter.rank": 8, "adapter.kind": "rotation"},
    "full": {"adapter.method": "full"},
}


def arms(method: str, rate: float, *losses: str) -> Arms:
    """A method under several losses, keys of `LOSSES`, whose learning rates are searched around `rate`."""
    compared = []
    for loss in losses:
        search = {"rate_of": f"{method} masked"} if loss == "lr_share" else {"rates": study.grid(rate)}
        compared.append(study.Arm(f"{method} {loss}", {**_METHODS[method], **LOSSES[loss]}, **search))
    return tuple(compared)


def levels(
    ratios: int, epochs: int, batch_size: int, arms_by_rows: Mapping[int, Arms], which: tuple[int, ...] = ()
) -> tuple[study.Level, ...]:
    """Ratios with every number of rows and its arms.

    Args:
        ratios: how many of them, from the lowest.
        epochs: of training.
        batch_size: rows of a step.
        arms_by_rows: what is compared at each number of rows.
        which: the numbers of the ratios, from 1; empty for all.
    """
    compared: list[study.Level] = []
    for rows, of_rows in arms_by_rows.items():
        steps = -(-rows // batch_size)
        settings = study.budget(
            steps * epochs, batch_size, eval_every=steps, log_every=steps, warmup_steps=min(5, steps)
        )
        for ratio in which or range(1, ratios + 1):
            values = {"ratio_level": ratio, "rows": rows}
            compared.append(study.Level(f"ratio {ratio} of {ratios}, {rows} rows", values, settings, of_rows))
    return tuple(compared)


_TWO = ("masked", "unmasked")


class Instruct(study.Study):
    """Masked, unmasked and weighted loss, by how long prompts are beside answers, and by the number of rows."""

    name = "instruct"
    question = "should the instruction carry loss?"
    paper = "Instruction Tuning With Loss Over Instructions (arXiv 2405.14394)"
    chosen_by = _GUIDE
    chosen_at_best = True
    metrics = (
        _BEST,
        study.Metric("test_loss", "test loss after the last epoch, nats a token"),
        study.Metric("exact_match", "exact match", 1),
        study.Metric("f1", "F1", 1),
        study.Metric("trained_rows_loss", "loss on rows trained on, nats a token", 0),
        study.Metric("instruction_loss", "loss on instructions, nats a token"),
        study.Metric("base_text_loss", "loss on base texts, nats a token"),
    )
    notes = (
        "A difference says what happens at that ratio, that number of rows and that method; no two of them are pooled.",
        "The study's own questions get a passage in front of them for a higher ratio: it is no part of what is asked, "
        "and it is of the kind of text that forgetting is measured on, so that training on it may also rehearse that "
        "text, which was not tested by itself. Groups of rows given by --data differ in more than their ratio.",
    )
    presets = {
        "tiny": study.Preset(
            "seconds; shows the form of the results, and no more",
            (),
            {"data.max_length": 64},
            {"sentences": (0,), "lengths": (26,), "scored": 16, "new_tokens": 4},
            levels(1, 2, 8, {16: study.tiny(arms("LoRA", 2e-3, *_TWO))}),
            seeds=2,
        ),
        "quick": study.Preset(
            "the embedded model, minutes on two cores",
            (),
            {"data.max_length": 64},
            {"sentences": (0, 3), "lengths": (26, 56), "scored": 240, "new_tokens": 12},
            levels(
                2,
                8,
                8,
                {
                    64: arms("LoRA", 3e-3, *_TWO, "weighted 0.1", "share")
                    + arms("MoRA", 3e-3, *_TWO)
                    + arms("full", 1e-3, *_TWO),
                    256: arms("LoRA", 3e-3, *_TWO, "share"),
                },
            ),
            reason="64 and 256 rows for eight epochs; all test rows are scored. An earlier preset had 32 and 128 rows: "
            "there unmasked loss was worse once, for full fine-tuning at ratio 3.8 (by 0.23 ± 0.08).",
        ),
        "small": study.Preset(
            "a model of about 100 M parameters, a day on two cores",
            (),
            # ChatML, because the model's own template may put a system message before every question.
            {"data.max_length": 80, "data.template": "chatml"},
            {"sentences": (0, 2, 4, 6), "scored": 150, "new_tokens": 16},
            levels(
                4,
                4,
                4,
                {
                    32: arms("LoRA", 6e-4, *_TWO, "share", *(f"{loss}, by response" for loss in _TWO))
                    + arms("MoRA", 2e-3, *_TWO)
                    + arms("full", 5e-5, *_TWO)
                },
                which=(1, 4),
            ),
            reason="The lowest and the highest of four ratios; 32 rows are where the paper's effect should be largest.",
        ),
        "paper": study.Preset(
            "a model of 7 B parameters on eight accelerators",
            (),
            {"data.max_length": 2048, "train.micro_batch_size": 16, "mesh.data": 1, "mesh.fsdp": -1},
            {"sentences": (0, 3, 8), "scored": 480, "new_tokens": 32},
            levels(
                3,
                8,
                128,
                {
                    rows: arms("LoRA", 1.5e-4, *LOSSES)
                    + arms("MoRA", 1.5e-4, *_TWO, "share")
                    + arms("full", 2e-5, *_TWO, "share")
                    for rows in (256, 4096)
                },
            ),
            reason="Two of the paper's numbers of rows.",
        ),
    }

    def write_data(
        self, preset: study.Preset, level: study.Level, seed: int, folder: Path, sources: study.Sources
    ) -> dict[str, Any]:
        """Files of rows: to train on by level and seed, for validation and the test by ratio."""
        group, count = level.values["ratio_level"], level.values["rows"]
        length = preset.settings["data.max_length"]
        if sources.data is None and "lengths" in preset.data:
            length = preset.data["lengths"][group - 1]
        train = folder / f"train_{group}_{count}_{seed}.jsonl"
        if not _facts_file(train).exists():
            tokenizer, template = load_tokenizer(sources.model), preset.settings.get("data.template")
            sentences, scored = preset.data["sentences"], preset.data["scored"]
            if sources.data is None:
                parts = embedded_parts(sentences[group - 1], scored, seed)
            else:
                groups = len(sentences)
                parts = parts_of_files(sources.data, tokenizer, length, group, groups, scored, seed, template)
            if len(parts.train) < count:
                raise InputError(f"{level.name}: {len(parts.train)} rows are left to train on; give more data")
            rows = parts.train[:count]
            row_files.write_rows(train, rows)
            row_files.write_rows(folder / f"validation_{group}.jsonl", parts.validation)
            row_files.write_rows(folder / f"test_{group}.jsonl", parts.test)
            facts = facts_of(rows, tokenizer, length, template)
            facts |= dict(zip(_FACTS, (parts.duplicates, parts.dropped, parts.rows), strict=True))
            row_files.write_rows(_facts_file(train), [facts])
        if sources.texts is None:
            row_files.write_rows(folder / "base_texts.jsonl", base_texts())
        return {"data.train": (str(train),), "data.max_length": length}

    def learning_rate(self, cell: study.Cell, data: Mapping[str, Any]) -> float:
        """The cell's, or for `lr_share` that of masked loss times the share of answers."""
        return study.rounded(cell.rate * _facts(data)["share"]) if cell.arm.rate_of else cell.rate

    def measure(self, at: study.Evaluation) -> dict[str, float]:
        """Losses after 1, 2, 4, 8, … epochs; at the end, and once at the start, also answers and the base's texts."""
        epoch, rest = divmod(at.step, at.cell.level.settings["train.eval_every"])
        if rest or (epoch & (epoch - 1) and at.step != at.steps):
            return {}
        if at.step or at.cell.perturbed:
            return self._scores(at, everything=at.step == at.steps)
        # Adapters begin as nothing, so that all arms begin as the base.
        key = "before", at.cell.level.name, at.cell.seed
        if key not in at.cache:
            at.cache[key] = self._scores(at, everything=True)
        return {**at.cache[key], **_facts(at.data)}

    def _scores(self, at: study.Evaluation, *, everything: bool) -> dict[str, float]:
        group = at.cell.level.values["ratio_level"]
        values = {_GUIDE: at.score(at.folder / f"validation_{group}.jsonl").nll}
        if at.cell.chooses:
            return values
        test = at.folder / f"test_{group}.jsonl"
        scores = at.score(test, part="test")
        (train,) = at.data["data.train"]
        values |= {"test_loss": scores.nll, "test_accuracy": scores.accuracy, "trained_rows_loss": at.score(train).nll}
        if scores.prompt_nll is not None:
            values["instruction_loss"] = scores.prompt_nll
        if not everything:
            return values
        if at.sources.base_texts is not None:
            texts, length = at.sources.texts or at.folder / "base_texts.jsonl", at.preset.settings["data.max_length"]
            values["base_text_loss"] = at.score(texts, mode="full", max_length=length).nll
        # Short answers can be checked.
        turns = [row["messages"] for row in row_files.read_rows(test)]
        turns = [row for row in turns if len(row[-1]["content"].split()) <= _CHECKED_WORDS]
        if turns:
            answers = at.answers([row[:-1] for row in turns], at.preset.data["new_tokens"])
            truths = [row[-1]["content"] for row in turns]
            values["exact_match"], values["f1"] = mean_scores([answer.strip() for answer in answers], truths)
        return values

    def pairs(self, results: Results, level: str) -> list[tuple[str, str]]:
        """Each loss against masked loss of its method (and normaliser), and unmasked loss against the controls."""
        there = results.arms_at(level)
        pairs = []
        for arm in there:
            method, _, loss = arm.partition(" ")
            kind = loss.partition(", ")[2]
            other = f"{method} masked, {kind}" if kind else f"{method} masked"
            if arm != other and other in there:
                pairs.append((arm, other))
            if loss == "unmasked":
                pairs += [(arm, control) for control in (f"{method} share", f"{method} lr_share") if control in there]
        return pairs

    def contrasts(self, results: Results) -> Iterable[study.Contrast]:
        """How the gain of unmasked loss goes with the ratio, and with the number of rows."""
        by_place = {(level.values["ratio_level"], level.values["rows"]): level.name for level in results.preset.levels}
        ratios, counts = (sorted(set(numbers)) for numbers in zip(*by_place, strict=True))
        changes: list[tuple[tuple[int, int], tuple[int, int]]] = []
        if len(ratios) > 1:
            changes += [((ratios[0], rows), (ratios[-1], rows)) for rows in dict.fromkeys((counts[0], counts[-1]))]
        if len(counts) > 1:
            changes += [((one, counts[0]), (one, counts[-1])) for one in dict.fromkeys((ratios[0], ratios[-1]))]
        for method in _METHODS:
            for change in changes:
                before, after = (by_place.get(place, "") for place in change)
                gains = [gain(results, method, name) for name in (before, after)]
                if all(gains):
                    compared = itertools.product((before, after), _TWO)
                    cells = [cell for name, loss in compared for cell in results.cells(f"{method} {loss}", name)]
                    claim = f"{method} unmasked, {after} − {before}"
                    yield study.Contrast(claim, _GAIN, "", differences(gains[1], gains[0]), cells)

    def sections(self, results: Results) -> dict[str, str]:
        """What the rows of each level are like."""
        rows, dropped = [], [0.0, 0.0, 0.0]
        for level in results.levels:
            arm = results.arms_at(level)[0]
            facts = {name: fact(results, name, level) for name in ("ratio", "share", *_FACTS)}
            before = interval(curve[0][1] for curve in results.curves("test_loss", arm, level).values())
            dropped = [facts[name] for name in _FACTS] if not math.isnan(facts["all_rows"]) else dropped
            base = "missing" if math.isnan(before.mean) else f"{before.mean:.3f}"
            rows.append([level, f"{facts['ratio']:.2f}", f"{facts['share']:.2f}", base])
        heads = ["level", "instruction tokens an answer token", "mean share of the answer", "test loss of the base"]
        settings = results.preset.levels[0].settings
        return {
            "levels": table(heads, rows),
            "epochs": str(settings["train.steps"] // settings["train.eval_every"]),
            "duplicates": f"{dropped[0]:.1%}",
            "dropped": f"{dropped[1]:,.0f}",
            "rows": f"{dropped[2]:,.0f}",
            "max_length": str(results.preset.settings["data.max_length"]),
        }

    def figures(self, results: Results) -> dict[str, Any]:
        """Differences against the ratio; losses over epochs."""
        return {"crossing": _draw_gains(results), "epochs": _draw_epochs(results)}


# Rows.


@dataclass(frozen=True)
class Parts:
    """Rows to train on, to choose by and to report.

    Attributes:
        train, validation, test: rows of messages; no prompt is in two of them.
        rows: of all groups, before any was left out.
        duplicates: share of these whose prompt an earlier row has too.
        dropped: how many of these are longer than the longest that is taken.
    """

    train: Rows
    validation: Rows
    test: Rows
    rows: int
    duplicates: float
    dropped: int = 0


def base_texts() -> Rows:
    """Texts like those of the base's pretraining that are no passages: the second half of `demo.TEXTS`."""
    rows = row_files.read_rows(demo.TEXTS)
    return rows[len(rows) // 2 :]


def embedded_parts(sentences: int, scored: int, seed: int) -> Parts:
    """The embedded questions, each behind a passage.

    Args:
        sentences: of a passage, in the order of their text; 0 for the question alone.
        scored: questions for validation, and for the test; the same for all seeds.
        seed: of the order of the training rows and of their passages. Questions are the same for any passage.
    """
    texts = [row["text"] for row in row_files.read_rows(demo.TEXTS)]
    passages = texts[: len(texts) // 2]
    # Passages of training come in no test, so that knowing them by heart is of no use there.
    first = len(passages) * 2 // 3

    def part(name: str, texts: Sequence[str], rows: Rows, seed: int) -> Rows:
        draw = random.Random(f"{name} {seed} passages")
        return [_behind(row, _passage(draw, texts, sentences)) for row in rows]

    train = row_files.read_rows(demo.data_path("train"))
    prompts = [row_files.prompt_of(row) for row in train]
    random.Random(f"train {seed}").shuffle(train)
    validation, test = (
        row_files.sample(row_files.read_rows(demo.data_path(name)), scored) for name in ("held_out", "test")
    )
    held_out = passages[first:]
    return Parts(
        part("train", passages[:first], train, seed),
        part("held_out", held_out, validation, 0),
        part("test", held_out, test, 0),
        len(prompts),
        1 - len(set(prompts)) / len(prompts),
    )


def _passage(draw: random.Random, texts: Sequence[str], sentences: int) -> str:
    if not sentences:
        return ""
    text = draw.choice(texts).rstrip(".").split(". ")
    start = draw.randrange(max(1, len(text) - sentences + 1))
    return ". ".join(text[start : start + sentences]) + ". "


def _behind(row: dict[str, Any], passage: str) -> dict[str, Any]:
    question, answer = row["messages"]
    return {"messages": [{**question, "content": passage + question["content"]}, answer]}


def parts_of_files(
    files: Sequence[str],
    tokenizer: Any,
    max_length: int,
    group: int,
    groups: int,
    scored: int,
    seed: int,
    template: str | None = None,
) -> Parts:
    """A user's rows in groups of equal size by their ratio of instruction to answer tokens, of which one is taken.

    Args:
        files: in any format that is recognised.
        tokenizer: of the model.
        max_length: longer rows are left out.
        group: from 1, the lowest ratios.
        groups: how many there are.
        scored: the most rows for validation, and for the test; the same for all seeds.
        seed: of the order of the training rows.
        template: as for `EncodedDataset.build`.

    Raises:
        InputError: the files hold too few rows with an instruction and an answer.
    """
    rows = [row for row in load_rows(files) if row_files.is_answered(row)]
    if not rows:
        raise InputError(f"{', '.join(files)}: no row with an instruction and an answer, which study instruct needs")
    report = EncodedDataset.build(rows, tokenizer, template, max_length=max_length).report
    ratios, prompts = np.asarray(report.ratios), report.prompts
    fits = np.flatnonzero(np.asarray(report.lengths) <= max_length)
    of_group = np.array_split(fits[np.argsort(ratios[fits], kind="stable")], groups)[group - 1]
    # Whole prompts are held out; in the order of the draw, which is the same for all groups and seeds.
    known = np.unique(prompts)
    order = dict(zip(known.tolist(), np.random.default_rng(0).permutation(len(known)) / len(known), strict=True))
    at = np.array([order[prompt] for prompt in prompts[of_group].tolist()])
    validation, test, train = (
        [row_files.as_row(rows[index]) for index in of_group[(at >= low) & (at < high)].tolist()]
        for low, high in ((0, _HELD_OUT), (_HELD_OUT, 2 * _HELD_OUT), (2 * _HELD_OUT, 1))
    )
    random.Random(f"rows {seed}").shuffle(train)
    if not (train and validation and test):
        raise InputError(
            f"{', '.join(files)}: {len(fits)} rows with an instruction and an answer in {max_length} tokens are too "
            f"few for {groups} groups with a part for training, one for validation and one for the test "
            f"({len(rows) - len(fits)} rows are longer)"
        )
    longer = len(rows) - len(fits)
    return Parts(
        train,
        row_files.sample(validation, scored),
        row_files.sample(test, scored),
        len(rows),
        report.duplicated_share,
        longer,
    )


def facts_of(rows: Rows, tokenizer: Any, max_length: int, template: str | None = None) -> dict[str, float]:
    """What the rows of a cell are like.

    Returns:
        `ratio`: instruction tokens an answer token, of the sums; `share`: mean over rows of the part of the answer
        and its end in the tokens of answer and instruction.
    """
    encoded = EncodedDataset.build(load_rows(rows), tokenizer, template, max_length=max_length)
    assert encoded.report.ratio is not None, "rows have answers"
    shares = [normalize(one.weights, one.segments, 1.0, "share")[1] / one.weights.sum() for one in encoded]
    return {"ratio": encoded.report.ratio, "share": float(np.mean(shares))}


def _facts_file(train: str | Path) -> Path:
    return Path(train).with_suffix(".facts.json")


def _facts(data: Mapping[str, Any]) -> dict[str, float]:
    facts: dict[str, float] = json.loads(_facts_file(data["data.train"][0]).read_text(encoding="utf-8"))
    return facts


# What is read from the table.

_FACTS = ("duplicate_prompts", "dropped_rows", "all_rows")


def fact(results: Results, name: str, level: str) -> float:
    """What the rows of a level are like: the mean over the reported seeds."""
    means = [results.mean(name, arm, level) for arm in results.arms_at(level)]
    return next((mean.mean for mean in means if mean.n), math.nan)


def gain(results: Results, method: str, level: str) -> dict[int, float]:
    """The test loss under masked minus that under unmasked loss, each at its best epoch, by seed."""
    masked, unmasked = (results.values(_BEST, f"{method} {loss}", level) for loss in _TWO)
    return differences(masked, unmasked)


# Figures.


def _draw_gains(results: Results) -> Any:
    """What unmasked loss gains, a panel a method, a line a number of rows, and what the paper published."""
    methods = list(dict.fromkeys(arm.split(" ", 1)[0] for arm in results.arms))
    figure, panels = draw.new_figure(2, (len(methods) + 2) // 2, height=2.8)
    published, *empty = panels[len(methods) :]
    for panel in empty:
        panel.set_axis_off()
    counts = sorted({level.values["rows"] for level in results.preset.levels})
    for panel, method in zip(panels, methods, strict=False):
        for place, rows in enumerate(counts):
            levels_of_rows = [level.name for level in results.preset.levels if level.values["rows"] == rows]
            gains = {name: interval(gain(results, method, name).values()) for name in levels_of_rows}
            gains = {name: mean for name, mean in gains.items() if mean.n}
            # A little apart, so that no bar hides another.
            ratios = [fact(results, "ratio", name) * 1.03**place for name in gains]
            look = draw.style(method) | {"linestyle": draw.DASHES[place], "fillstyle": draw.FILLINGS[place]}
            if gains:
                draw.draw_means(panel, ratios, list(gains.values()), f"{method}, {rows} rows", **look)
        draw.plain_log(panel, "x", ticks=[0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20])
        panel.set(xlabel="instruction tokens an answer token", ylabel="gain in test loss, nats a token")
    _equal_scales(panels[: len(methods)])
    ratios, before, after = np.array(list(_PUBLISHED.values())).T
    look = {"color": "0.35", "markersize": 4}
    published.plot(ratios, 100 * (after / before - 1), "s", label="Shi et al., data sets", **look)
    line = np.geomspace(0.05, 40, 50)
    published.plot(line, 18.85 * np.log(line) + 25.83, "--", label="Shi et al., fit", **look)
    draw.plain_log(published, "x", ticks=[0.1, 1, 10])
    published.set(xlabel="instruction / output length, words", ylabel="relative gain in AlpacaEval, %")
    for panel in panels[: len(methods) + 1]:
        panel.axhline(0, **draw.ZERO)
    text = (
        "Masked minus unmasked loss at best epochs: above 0 unmasked is better. Bars: 95 % intervals over seeds. Last "
        "panel: Llama-2-7B, full fine-tuning, one run each."
    )
    return draw.finish(figure, results, text)


def _equal_scales(panels: Sequence[Any]) -> None:
    lows, highs = zip(*(panel.get_ylim() for panel in panels), strict=True)
    for panel in panels:
        panel.set_ylim(min(lows), max(highs))


def _draw_epochs(results: Results) -> Any:
    """Losses on rows trained on (pale) and on test rows, a line a loss, a panel a level of the first method."""
    method = results.arms[0].split(" ", 1)[0]
    figure, panels = draw.new_figure(2, (len(results.levels) + 1) // 2, height=2.6)
    settings = {level.name: level.settings for level in results.preset.levels}
    for panel, level in zip(panels, results.levels, strict=False):
        every = settings[level]["train.eval_every"]
        compared = [f"{method} {loss}" for loss in (*_TWO, "share") if f"{method} {loss}" in results.arms_at(level)]
        draw.draw_curves(panel, results, "test_loss", level, compared, label="{}, test", epoch=every)
        pale: dict[str, Any] = {"label": "{}, rows trained on", "epoch": every, "alpha": 0.5, "linewidth": 0.8}
        draw.draw_curves(panel, results, "trained_rows_loss", level, compared, **pale)
        epochs = [step / every for step in results.by_step("test_loss", compared[0], level) if step] if compared else []
        draw.plain_log(panel, "x", ticks=epochs or [1])
        panel.set_title(level, fontsize=8)
        panel.set(ylabel="loss on answers, nats a token", ylim=(0, None))
    _equal_scales(panels[: len(results.levels)])
    return draw.finish(figure, results, "Bands: 95 % intervals over seeds; pale: rows trained on.", columns=2)
