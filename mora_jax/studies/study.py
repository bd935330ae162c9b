"""What a study is: the arms that it compares, the levels at which it does, and the cells that follow from both.

The learning rate of every arm is chosen at every level on seed 0 alone; what is reported comes from the other seeds,
whose data, order and start are others.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

#: The seed on which learning rates are chosen, and which is never reported.
CHOOSING_SEED = 0
_PLAIN = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: in tables and figures.
        settings: configuration keys by dotted name.
        rates: the learning rates that are tried; a single one is taken as it is.
        rate_of: another arm of the level, whose chosen rate it takes in place of `rates`; see `Study.learning_rate`.
    """

    name: str
    settings: Mapping[str, Any]
    rates: tuple[float, ...] = ()
    rate_of: str = ""


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
    """A size of a study.

    Attributes:
        doc: in one line, for what machine it is.
        arms: are compared at every level that has none of its own.
        levels: where they are.
        settings: the configuration keys of all cells.
        data: numbers that the study's data are made by.
        seeds: how many are reported.
    """

    doc: str
    arms: tuple[Arm, ...]
    settings: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[Level, ...] = (Level(),)
    seeds: int = 3

    @property
    def template(self) -> str | None:
        """The chat template of rows and of prompts, as `data.template`."""
        return self.settings.get("data.template")

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
        neighbour: whether its rate is one beside the chosen one.
    """

    level: Level
    arm: Arm
    rate: float
    seed: int
    neighbour: bool = False

    @property
    def name(self) -> str:
        """Of its folder: level, arm, rate and seed."""
        words = [self.level.name, self.arm.name, f"lr{self.rate:g}", f"seed{self.seed}"]
        return "_".join(_PLAIN.sub("-", word.replace("α", "alpha")).strip("-") for word in words if word)

    @property
    def chooses(self) -> bool:
        """Whether it is there for the choice of a learning rate."""
        return self.seed == CHOOSING_SEED


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


class Study(abc.ABC):
    """A question, the runs that answer it, and what is read from them.

    Attributes:
        name: of the command.
        question: in one sentence.
        paper: where the question comes from.
        chosen_by: the metric of the last evaluation on seed 0 by which a learning rate is chosen.
        chosen_at_best: whether the best evaluation of a rate counts in place of its last.
        higher: whether more of it is better.
        presets: the sizes, by name.
        notes: what a reader of the conclusion has to know, a sentence each.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    paper: ClassVar[str]
    chosen_by: ClassVar[str]
    chosen_at_best: ClassVar[bool] = False
    higher: ClassVar[bool]
    presets: ClassVar[Mapping[str, Preset]]
    notes: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """Writes the data of the cells at a level with a seed, unless they are there.

        Returns:
            The configuration keys that name them: `data.train`, `data.eval`.
        """

    def measure(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        """What is measured at every evaluation beside the loss and the accuracy on `data.eval`; by name."""
        return {}

    def learning_rate(self, cell: Cell, data: Mapping[str, Any]) -> float:
        """What a cell is trained with, given the keys that `write_data` returned for it: its rate."""
        return cell.rate

    @abc.abstractmethod
    def conclude(self, results: Any) -> list[str]:
        """The conclusion, in paragraphs of Markdown, from the table alone (see `Results`)."""

    @abc.abstractmethod
    def figures(self, results: Any) -> dict[str, Any]:
        """The figures by name, each a `matplotlib.figure.Figure`."""


@dataclass(frozen=True)
class Measuring:
    """What a measurement may need.

    Attributes:
        preset: of the study.
        sources: what it works on.
        folder: of the study's data.
        data: the configuration keys that `write_data` gave for the cell.
        steps: of the cell.
        cache: of the whole study, for what is made once.
    """

    preset: Preset
    sources: Sources
    folder: Path
    data: Mapping[str, Any]
    steps: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)


def choosing_cells(preset: Preset) -> Iterator[Cell]:
    """The cells by which learning rates are chosen: none for an arm with a single one, or with another arm's."""
    for level, arm in preset.pairs():
        if len(arm.rates) > 1:
            for rate in arm.rates:
                yield Cell(level, arm, rate, CHOOSING_SEED)


def reported_cells(preset: Preset, chosen: Mapping[tuple[str, str], float]) -> Iterator[Cell]:
    """The cells that are reported.

    Args:
        preset: of the study.
        chosen: the rate of each arm at each level, by the names of level and arm; pairs without one are left out.
    """
    single = {(level.name, arm.name): arm.rates[0] for level, arm in preset.pairs() if len(arm.rates) == 1}
    for level, arm in preset.pairs():
        rate = {**chosen, **single}.get((level.name, arm.rate_of or arm.name))
        if rate is None:
            continue
        rates = sorted(arm.rates or (rate,))
        place = rates.index(rate)
        for other in rates[max(0, place - 1) : place + 2] if level.neighbours else (rate,):
            for seed in range(1, preset.seeds + 1):
                yield Cell(level, arm, other, seed, neighbour=other != rate)
