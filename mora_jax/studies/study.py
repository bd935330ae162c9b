"""What a study is: the arms that it compares, the levels at which it does, and the cells that follow from both.

Learning rates are searched on seeds of their own (see `search`); what is reported comes from seeds 1, 2, 3, …, whose
data, order and start are others.
"""

import abc
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mora_jax import demo
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.data.loss_weights import LossWeights
from mora_jax.evaluation import chat, perplexity
from mora_jax.studies.rows import is_embedded

#: The seeds on which learning rates are chosen, and which are never reported.
CHOOSING_SEEDS = (0, 1001, 1002)
CHOOSING, NEIGHBOUR, EQUAL_RATE = "choosing", "neighbour", "equal_rate"
EXPLORATORY, REPORTED = "exploratory", "reported"
FULL = "full"
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.+-]+")
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: in tables and figures.
        settings: configuration keys by dotted name.
        rates: the learning rates that the search begins with, rising by a factor; a single one is taken as it is.
        rate_of: another arm of the level, whose chosen rate it takes in place of `rates`; see `Study.learning_rate`.
        control_of: another arm, which this one is a variation of: they are compared at equal rates too.
    """

    name: str
    settings: Mapping[str, Any]
    rates: tuple[float, ...] = ()
    rate_of: str = ""
    control_of: str = ""


@dataclass(frozen=True)
class Level:
    """A setting at which all arms are compared, such as a number of examples.

    Attributes:
        name: in tables and figures; empty where there is one level.
        values: the columns of the table that say which it is.
        settings: configuration keys that differ from the preset's.
        arms: those that are compared at it, where they aren't the preset's.
        neighbours: whether the reported seeds are trained at the rates next to the chosen one too.
    """

    name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[Arm, ...] = ()
    neighbours: bool = False


@dataclass(frozen=True)
class Preset:
    """A size of a study, fixed before its seeds run.

    Attributes:
        doc: in one line, for what machine it is.
        arms: are compared at every level that has none of its own.
        settings: the configuration keys of all cells.
        data: numbers that the study's data are made by.
        levels: where arms are compared.
        seeds: how many are reported.
        reason: why the sizes are these.
    """

    doc: str
    arms: tuple[Arm, ...]
    settings: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[Level, ...] = (Level(),)
    seeds: int = 3
    reason: str = ""

    def pairs(self) -> Iterator[tuple[Level, Arm]]:
        """Every level with each of its arms."""
        for level in self.levels:
            for arm in level.arms or self.arms:
                yield level, arm


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        level, arm, rate, seed: of the run.
        stage: what it is for, as in the table.
        perturbed: whether it starts from a base with noise of one bfloat16 step in its weights.
    """

    level: Level
    arm: Arm
    rate: float
    seed: int
    stage: str = REPORTED
    perturbed: bool = False

    @property
    def name(self) -> str:
        """Of its folder: level, arm, rate and seed."""
        parts = [self.level.name, self.arm.name, f"lr{self.rate:g}", f"seed{self.seed}", "perturbed" * self.perturbed]
        return "_".join(_NOT_PLAIN.sub("-", part.replace("α", "alpha")).strip("-") for part in parts if part)

    @property
    def chooses(self) -> bool:
        """Whether its seed is one of those for the choice of a learning rate."""
        return self.seed in CHOOSING_SEEDS


@dataclass(frozen=True)
class Sources:
    """What a study works on.

    Attributes:
        model: the base model's folder.
        data: files of rows given by the user; None for the study's own.
        texts: a file of texts like those that the base was pretrained on; None for the study's own.
    """

    model: str
    data: tuple[str, ...] | None = None
    texts: str | None = None

    @property
    def base_texts(self) -> str | None:
        """The file of such texts, of the embedded model its own; None where none is known."""
        return self.texts or (demo.TEXTS if is_embedded(self.model) else None)


@dataclass(frozen=True)
class Metric:
    """A measurement that arms are compared by.

    Attributes:
        name: in the table of cells.
        head: in tables and figures, with its unit.
        better: 1 where more of it is better, -1 where less is, 0 where neither.
        best_by: the metric whose lowest evaluation is taken; empty for the last evaluation.
    """

    name: str
    head: str
    better: int = -1
    best_by: str = ""


@dataclass(frozen=True)
class Contrast:
    """One difference that is looked at.

    Attributes:
        claim: what it is of, such as `MoRA r2 − LoRA r2`.
        metric: that is compared.
        level: where.
        values: the difference by seed.
        cells: that it comes from.
        halfway: the difference by seed after half of the steps; empty where that is not known.
    """

    claim: str
    metric: Metric
    level: str
    values: Mapping[int, float]
    cells: Sequence[str]
    halfway: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The model of a cell at one of its evaluations, with what a measurement may need.

    Attributes:
        cell, preset, sources: of the study.
        folder: of the study's data.
        data: the configuration keys that `write_data` gave for the cell.
        step, steps: done, and of the cell.
        tokenizer, model: of the cell.
        cache: of the whole study, for what is made once.
        items: the file for scores of single rows, at the last evaluation of a reported cell; else None.
    """

    cell: Cell
    preset: Preset
    sources: Sources
    folder: Path
    data: Mapping[str, Any]
    step: int
    steps: int
    tokenizer: Any = field(repr=False)
    model: Any = field(repr=False)
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    items: Path | None = None

    def score(
        self,
        path: str | Path,
        *,
        mode: str = "masked",
        end_of_turn: str | None = None,
        max_length: int | None = None,
        part: str = "",
    ) -> perplexity.DatasetScores:
        """The scores on a file of rows or texts; the file is read and encoded once.

        Args:
            path: the file.
            mode: which tokens count, as `loss.mode`.
            end_of_turn: as `loss.end_of_turn`.
            max_length: tokens at which rows are cut; None for the cell's own.
            part: what the rows are called in the cell's file of single rows; empty to leave them out of it.
        """
        settings = {**self.preset.settings, **self.data}
        length = max_length or settings["data.max_length"]
        key = str(path), mode, end_of_turn, length
        if key not in self.cache:
            template = settings.get("data.template")
            encoded = EncodedDataset.build(load_rows(str(path)), self.tokenizer, template, max_length=length)
            self.cache[key] = encoded.with_loss(LossWeights(mode, end_of_turn=end_of_turn))
        rows = self.cache[key]

        def write_items(numbers: np.ndarray, sums: np.ndarray) -> None:
            """A line a row: its loss summed over tokens, their number, and how many were the likeliest."""
            if self.items is None or not part:
                return
            with self.items.open("a", encoding="utf-8") as lines:
                for row, (loss, _, right, tokens) in zip(numbers.tolist(), sums[0].T.tolist(), strict=True):
                    values = {"part": part, "row": row, "loss": loss, "tokens": int(tokens), "right": int(right)}
                    lines.write(json.dumps(values) + "\n")

        return perplexity.score(self.model, rows, batch_size=min(_BATCH_SIZE, len(rows)), each=write_items)

    def answers(self, prompts: Sequence[Any], max_new_tokens: int) -> list[str]:
        """What the model answers to prompts, greedily."""
        template, size = self.preset.settings.get("data.template"), min(len(prompts), 4 * _BATCH_SIZE)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": size, "template": template}
        return chat.generate_batch(self.model, self.tokenizer, prompts, **options)


class Study(abc.ABC):
    """A question, the runs that answer it, and what is read from them.

    The text of its conclusion is `text/NAME.md`, a template for `string.Template`.

    Attributes:
        name: of the command.
        question: in one sentence.
        paper: where the question comes from.
        chosen_by: the metric by which a learning rate is chosen.
        chosen_at_best: whether the best evaluation of a rate counts in place of its last.
        higher: whether more of it is better.
        presets: the sizes, by name.
        metrics: what arms are compared by; the first is what the question is about.
        notes: what a reader of the conclusion has to know, a sentence each.

    Methods read a table of results, a `mora_jax.studies.results.Results`.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    paper: ClassVar[str]
    chosen_by: ClassVar[str]
    chosen_at_best: ClassVar[bool] = False
    higher: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Preset]]
    metrics: ClassVar[tuple[Metric, ...]]
    notes: ClassVar[tuple[str, ...]] = ()

    def check(self, preset: Preset, sources: Sources) -> None:  # noqa: B027  # most take anything
        """Refuses sources that the preset can't work on, before anything is written.

        Raises:
            InputError: what the user has to mend.
        """

    @abc.abstractmethod
    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """Writes the data of the cells at a level with a seed, unless they are there.

        Returns:
            The configuration keys that name them: `data.train`, `data.eval`.
        """

    @abc.abstractmethod
    def measure(self, at: Evaluation) -> dict[str, float]:
        """What is measured at an evaluation; by name."""

    def settings(self, cell: Cell, preset: Preset) -> dict[str, Any]:
        """Configuration keys of a cell that differ from those of its arm, level and preset."""
        return {}

    def learning_rate(self, cell: Cell, data: Mapping[str, Any]) -> float:
        """What a cell is trained with, given the keys that `write_data` returned for it: its rate."""
        return cell.rate

    def explore(self, results: Any) -> Iterable[Cell]:
        """Further cells, given what the cells so far have shown; called until there are none that are new."""
        return ()

    @abc.abstractmethod
    def pairs(self, results: Any, level: str) -> list[tuple[str, str]]:
        """The arms that are compared at a level, each with the one that it is compared with."""

    def contrasts(self, results: Any) -> Iterable[Contrast]:
        """Comparisons beside those of `pairs` and `metrics`."""
        return ()

    @abc.abstractmethod
    def sections(self, results: Any) -> dict[str, str]:
        """The study's own parts of its text, by the names in the template, from the table alone."""

    @abc.abstractmethod
    def figures(self, results: Any) -> dict[str, Any]:
        """The figures by name, each a `matplotlib.figure.Figure`."""


def rounded(rate: float) -> float:
    """A learning rate of three digits, so that one that is reached in two ways has one name."""
    return float(f"{rate:.3g}")


def grid(rate: float) -> tuple[float, ...]:
    """The learning rates that a search begins with, a factor of 2 apart around `rate`."""
    return rounded(rate / 2), rounded(rate), rounded(2 * rate)


def adapter(name: str, rank: int, rate: float, method: str = "lora", note: str = "", **settings: Any) -> Arm:
    """An arm that trains an adapter of a rank; its learning rates are searched around `rate`.

    Args:
        name: of the method, in tables and figures.
        rank: of the adapter.
        rate: in the middle of the grid.
        method: as `adapter.method`.
        note: behind the name.
        settings: further keys of `adapter`.
    """
    keys = {"method": method, "rank": rank, **settings}
    return Arm(f"{name} r{rank}{note}", {f"adapter.{key}": value for key, value in keys.items()}, grid(rate))


def full(rate: float) -> Arm:
    """The arm that trains all parameters; its learning rates are searched around `rate`."""
    return Arm(FULL, {"adapter.method": "full"}, grid(rate))


def tiny(arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """Arms with two learning rates, which is enough to show the form of the results."""
    return tuple(replace(arm, rates=arm.rates[:2]) for arm in arms)


def budget(
    steps: int, batch_size: int, *, eval_every: int, log_every: int, warmup_steps: int, **others: Any
) -> dict[str, Any]:
    """The configuration keys of a training at a constant rate, and `others`."""
    return {
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": warmup_steps,
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.eval_every": max(1, eval_every),
        "train.log_every": max(1, log_every),
        **others,
    }
