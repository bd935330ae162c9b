"""Rates: positions of minima, what is read from the table, rows in three parts, and the study end to end."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from mora_jax import demo
from mora_jax.cli.main import main
from mora_jax.errors import InputError
from mora_jax.studies.intervals import interval
from mora_jax.studies.rates import readings
from mora_jax.studies.rates.minima import best_rate, factor
from mora_jax.studies.rates.rows import take, write_parts
from mora_jax.studies.rates.study import Rates
from mora_jax.studies.results import Results
from mora_jax.studies.study import Arm, Level, Preset, Sources, choosing_cells, reported_cells


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({1e-3: 2.0, 1e-2: 1.0, 1e-1: 2.0}, 1e-2),
        # Half a step times (1 - 3) / (1 - 0 + 3): a quarter of a decade below the middle.
        ({1e-3: 1.0, 1e-2: 0.0, 1e-1: 3.0}, 10**-2.25),
        ({1e-5: 9.0, 1e-3: 1.0, 1e-2: 0.0, 1e-1: 3.0, 1.0: math.inf}, 10**-2.25),
        # The lowest is the first of three, and still the parabola's lowest point lies between them.
        ({1e-3: 1.0, 1e-2: 1.1, 1e-1: 2.0}, 10**-2.625),
        ({1e-3: 0.0, 1e-2: 1.0, 1e-1: 2.0}, None),  # a line
        ({1e-3: 0.0, 1e-2: 1.0, 1e-1: 3.0}, None),  # lowest outside
        ({1e-3: 0.0, 1e-2: 1.0, 1e-1: 0.5}, None),  # a highest point
        ({1e-3: 1.0, 1e-2: 0.0, 1e-1: math.nan}, None),
    ],
)
def test_the_best_rate_is_the_lowest_point_of_a_parabola(losses, best):
    assert best_rate(losses) == (best if best is None else pytest.approx(best, rel=1e-9))


def test_rates_need_not_be_evenly_spaced():
    losses = {rate: 0.4 + 0.2 * math.log(rate / 2.5e-3) ** 2 for rate in (1e-3, 3e-3, 1e-2)}
    assert best_rate(losses) == pytest.approx(2.5e-3)


def test_factors_are_in_words():
    assert factor(interval(map(math.log, (2.0, 8.0)))).startswith("4 (")
    assert factor(interval([math.log(4.0)])) == "4"
    assert factor(interval([])) == "not found"


LEVEL = Level("8 rows", {"examples": 8, "batch_size": 4}, neighbours=True)
LORA, FULL = Arm("LoRA r4", {}, (1e-3, 3e-3, 1e-2)), Arm("full", {}, (3e-4, 1e-3, 3e-3))


def made_up() -> Results:
    """A table whose losses are parabolas: lowest at 4e-3 for LoRA, at 8e-4 for full, whatever the seed."""
    preset = Preset("", (), {}, levels=(Level(LEVEL.name, LEVEL.values, arms=(LORA, FULL), neighbours=True),), seeds=2)
    cells = [*choosing_cells(preset)]
    cells += reported_cells(preset, {(LEVEL.name, "LoRA r4"): 3e-3, (LEVEL.name, "full"): 1e-3})
    rows = []
    for cell in cells:
        lowest = 4e-3 if cell.arm is LORA else 8e-4
        stage = "choosing" if cell.chooses else "neighbour" if cell.neighbour else "reported"
        values = {"loss": 0.1 * cell.seed + math.log(cell.rate / lowest) ** 2, "trained_tokens": 100.0}
        common = {"stage": stage, "level": cell.level.name, "arm": cell.arm.name, "seed": cell.seed, "step": 2}
        common |= {"learning_rate": cell.rate, "parameters": 400}
        rows += [common | {"metric": metric, "value": value} for metric, value in values.items()]
    return Results(pd.DataFrame(rows), Rates(), preset)


def test_what_is_read_from_the_table():
    results = made_up()
    assert math.exp(readings.position(results, "LoRA r4", LEVEL.name).mean) == pytest.approx(4e-3)
    assert factor(readings.ratio(results, "LoRA r4", "full", LEVEL.name)) == "5 (5 to 5)"
    rate, cost = readings.beside(results, "full", LEVEL.name, above=True)
    assert rate == 3e-3
    assert cost.mean == pytest.approx(math.log(3e-3 / 8e-4) ** 2 - math.log(1e-3 / 8e-4) ** 2)
    # 400 parameters of 2 bits for 100 tokens of 1 bit.
    assert readings.capacity(results, "full", LEVEL.name) == 8.0
    assert not results.at_edge("full", LEVEL.name)


def test_rates_beside_the_chosen_one_are_trained_on_reported_seeds():
    preset = Preset("", (), {}, levels=(LEVEL, Level("other", arms=(FULL,))), seeds=2)
    preset = Preset("", (LORA,), {}, levels=preset.levels, seeds=2)
    found = [*reported_cells(preset, {("8 rows", "LoRA r4"): 1e-2, ("other", "full"): 1e-3})]
    assert [(cell.level.name, cell.rate, cell.seed, cell.neighbour) for cell in found] == [
        ("8 rows", 3e-3, 1, True),
        ("8 rows", 3e-3, 2, True),
        ("8 rows", 1e-2, 1, False),
        ("8 rows", 1e-2, 2, False),
        ("other", 1e-3, 1, False),
        ("other", 1e-3, 2, False),
    ]


def test_a_users_rows_are_parted_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"say {number}", "input": "", "output": f"{number}."} for number in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = Sources(demo.model_path(), (str(file),))
    parts = write_parts(sources, tmp_path)
    read = {name: set(path.read_text(encoding="utf-8").splitlines()) for name, path in parts.items()}
    assert {name: len(lines) for name, lines in read.items()} == {"train": 24, "held_out": 3, "test": 3}
    assert len(set.union(*read.values())) == 30
    assert write_parts(sources, tmp_path) == parts
    drawn = [take(parts["train"], 8, seed, tmp_path) for seed in (1, 2)]
    assert len({*map(str, drawn)}) == 2
    with pytest.raises(InputError, match="trains on 25 rows, and there are 24"):
        take(parts["train"], 25, 1, tmp_path)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]), encoding="utf-8")
    with pytest.raises(InputError, match="5 rows with an answer, which are too few"):
        write_parts(sources, tmp_path / "other")


def test_the_conclusion_is_made_of_the_table():
    """Of losses in which each thing that the text says is put by hand."""
    preset = Rates.presets["quick"]
    chosen = {(level.name, arm.name): arm.rates[1] for level, arm in preset.pairs()}
    rows = []
    for cell in [*choosing_cells(preset), *reported_cells(preset, chosen)]:
        level, arm = cell.level.name, cell.arm.name
        lowest = chosen[level, arm]
        loss = 1.0 + 0.1 * cell.seed + 0.5 * math.log(cell.rate / lowest) ** 2
        loss += 0.25 * (arm == "DoRA r4") + 0.5 * (level == "batch 64" and arm == "LoRA r1")
        stage = "choosing" if cell.chooses else "neighbour" if cell.neighbour else "reported"
        values = {"loss": loss, "trained_rows_loss": loss, "held_out_loss": loss, "trained_tokens": 4000.0}
        common = {"stage": stage, "level": level, "arm": arm, "seed": cell.seed, "step": 64, "parameters": 8000}
        common |= {"learning_rate": cell.rate}
        rows += [common | {"metric": metric, "value": value} for metric, value in values.items()]
    study, results = Rates(), Results(pd.DataFrame(rows), Rates(), preset)
    text = "\n".join(study.conclude(results))
    for line in (
        "- LoRA r4 over full: 3.3 (3.3 to 3.3)",
        "- DoRA r4 against LoRA r4: worse, +0.250 ± 0.000 in loss (+21%)",
        "- PiSSA r4 against LoRA r4: no difference shown, +0.000 ± 0.000 in loss (+0%)",
        "- LoRA r1 − full: loses more at the large batch, by +0.500 ± 0.000",
        "- LoRA r16 − full: no difference shown, by +0.000 ± 0.000",
        "| 1,024 | LoRA r1 | 4 | +0.000 ± 0.000 | +0.000 ± 0.000 | no difference shown |",
    ):
        assert line in text.splitlines()
    [row] = [line for line in text.splitlines() if line.startswith("| LoRA r4 | 8,000 |")]
    below, above = (0.5 * math.log(factor) ** 2 for factor in (0.3, 3.0))
    assert row.endswith(f"| {below:+.3f} ± 0.000 | {above:+.3f} ± 0.000 |")
    assert set(study.figures(results)) == {"rates", "best_rates", "capacity", "batch"}


@pytest.mark.slow
def test_the_study_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["study", "rates", "--preset", "tiny", "--out", str(out)]) == 0
    frame = pd.read_csv(out / "cells.csv")
    assert frame.groupby("stage")["cell"].nunique().to_dict() == {"choosing": 4, "neighbour": 4, "reported": 4}
    assert not frame["value"].isna().any()
    for arm, rows in frame[frame["metric"] == "held_out_loss"].groupby("arm"):
        assert set(rows["seed"]) == {0}
        best = rows.sort_values("value")["learning_rate"].iloc[0]
        assert set(frame[(frame["arm"] == arm) & (frame["stage"] == "reported")]["learning_rate"]) == {best}
    # A cell's loss on new rows is what eval says of its adapter.
    run = next((out / "runs").glob("*LoRA*seed1"))
    scored = ["eval", "--model", demo.model_path(), "--adapter", str(run / "adapter"), "--data", demo.data_path("test")]
    capsys.readouterr()
    assert main([*scored, "--max-length", "25", "--json"]) == 0
    [value] = frame[(frame["cell"] == run.name) & (frame["metric"] == "loss")]["value"]
    assert json.loads(capsys.readouterr().out)["nll"] == pytest.approx(value, rel=1e-4)
    assert {path.name for path in (out / "figures").glob("*.png")} == {"rates.png", "best_rates.png"}
