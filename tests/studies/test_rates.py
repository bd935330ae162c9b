"""Rates: positions of minima, what is read from the table, rows in three parts, and the study end to end."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from mora_jax import demo
from mora_jax.cli.main import main
from mora_jax.errors import InputError
from mora_jax.studies import rates
from mora_jax.studies.cells import reported_cells
from mora_jax.studies.claims import claims
from mora_jax.studies.rates import Rates, best_rates, take, write_parts
from mora_jax.studies.results import Results
from mora_jax.studies.study import CHOOSING, Arm, Cell, Level, Preset, Sources

LEVEL = Level("8 rows", {"examples": 8, "batch_size": 4}, neighbours=True)
LORA, FULL = Arm("LoRA r4", {}, (1e-3, 2e-3, 4e-3)), Arm("full", {}, (4e-4, 8e-4, 1.6e-3))


def choosing_cells(preset):
    return [Cell(level, arm, rate, 0, CHOOSING) for level, arm in preset.pairs() for rate in arm.rates]


def made_up() -> Results:
    """A table whose losses are parabolas: lowest at 2.2e-3 for LoRA, at 8e-4 for full, on seed 2 at 1.6e-3."""
    preset = Preset("", (), {}, levels=(Level(LEVEL.name, LEVEL.values, arms=(LORA, FULL), neighbours=True),), seeds=2)
    cells = choosing_cells(preset)
    cells += reported_cells(preset, {(LEVEL.name, "LoRA r4"): 2e-3, (LEVEL.name, "full"): 8e-4})
    rows = []
    for cell in cells:
        lowest = 2.2e-3 if cell.arm is LORA else 1.6e-3 if cell.seed == 2 else 8e-4
        curvature = 3.0 if cell.seed == 1 else 1.0
        values = {"loss": 0.1 * cell.seed + curvature * math.log(cell.rate / lowest) ** 2, "trained_tokens": 100.0}
        common = {"stage": cell.stage, "level": cell.level.name, "arm": cell.arm.name, "seed": cell.seed, "step": 2}
        common |= {"learning_rate": cell.rate, "parameters": 400, "note": None, "cell": cell.name}
        rows += [common | {"metric": metric, "value": value} for metric, value in values.items()]
    return Results(pd.DataFrame(rows), Rates(), preset)


def test_the_best_rate_is_a_point_of_the_grid_with_what_other_seeds_could_have_said():
    results = made_up()
    half_step = math.sqrt(2.0)
    assert best_rates(results, "LoRA r4", LEVEL.name) == pytest.approx((2e-3, 2e-3 / half_step, 2e-3 * half_step))
    # Means over seeds at 8e-4 and 1.6e-3: seed 1 has 0 and 3 log² 2, seed 2 has log² 2 and 0. Drawn alone, seed 2 is
    # for 1.6e-3; it is in a quarter of the draws of two.
    assert best_rates(results, "full", LEVEL.name) == pytest.approx((8e-4, 8e-4 / half_step, 1.6e-3 * half_step))
    assert best_rates(results, "none", LEVEL.name) == ()
    # 400 parameters of 2 bits for 100 tokens of 1 bit.
    assert rates.capacity(results, "full", LEVEL.name) == 8.0
    assert not results.at_edge("full", LEVEL.name)


def test_rates_beside_the_chosen_one_are_trained_on_reported_seeds():
    preset = Preset("", (), {}, levels=(LEVEL, Level("other", arms=(FULL,))), seeds=2)
    preset = Preset("", (LORA,), {}, levels=preset.levels, seeds=2)
    cells = [*reported_cells(preset, {("8 rows", "LoRA r4"): 4e-3, ("other", "full"): 1e-3})]
    assert [(cell.level.name, cell.rate, cell.seed, cell.stage) for cell in cells] == [
        ("8 rows", 2e-3, 1, "neighbour"),
        ("8 rows", 2e-3, 2, "neighbour"),
        ("8 rows", 4e-3, 1, "reported"),
        ("8 rows", 4e-3, 2, "reported"),
        ("8 rows", 8e-3, 1, "neighbour"),
        ("8 rows", 8e-3, 2, "neighbour"),
        ("other", 1e-3, 1, "reported"),
        ("other", 1e-3, 2, "reported"),
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
    with pytest.raises(InputError, match="5 rows with 5 prompts are too few"):
        write_parts(sources, tmp_path / "other")


def test_the_conclusion_is_made_of_the_table():
    """Of losses in which each thing that the text says is put by hand."""
    preset = Rates.presets["quick"]
    chosen = {(level.name, arm.name): arm.rates[1] for level, arm in preset.pairs()}
    rows = []
    for cell in [*choosing_cells(preset), *reported_cells(preset, chosen)]:
        level, arm = cell.level.name, cell.arm.name
        lowest = chosen[level, arm]
        loss = 1.0 + 0.1 * cell.seed + 0.5 * math.log(cell.rate / lowest) ** 2 + 1e-3 * (cell.seed == 1) * len(arm)
        loss += 0.25 * (arm == "DoRA r4") + 0.5 * (level == "batch 64" and arm == "LoRA r1")
        values = {"loss": loss, "trained_rows_loss": loss, "held_out_loss": loss, "trained_tokens": 4000.0}
        common = {"stage": cell.stage, "level": level, "arm": arm, "seed": cell.seed, "step": 64, "parameters": 8000}
        common |= {"learning_rate": cell.rate, "note": None, "cell": cell.name}
        rows += [common | {"metric": metric, "value": value} for metric, value in values.items()]
    study, results = Rates(), Results(pd.DataFrame(rows), Rates(), preset)
    sections = study.sections(results)
    [row] = [line for line in sections["best"].splitlines() if line.startswith("| LoRA r4 |")]
    cost = 0.5 * math.log(2.0) ** 2
    assert row.startswith("| LoRA r4 | 0.003 | 0.003 (0.0021 to 0.0042) | 3 |")
    assert row.endswith(f"| {cost:+.3f} ± 0.000 | {cost:+.3f} ± 0.000 |")
    assert "| LoRA r4 over full | 3 | 1.5 to 6 |" in sections["ratios"]
    assert rates.capacity(results, "LoRA r1", "1024 rows") == 4
    stated = {claim.claim: claim for claim in claims(results)}
    assert stated["DoRA r4 − LoRA r4 (1024 rows)"].effect == pytest.approx(0.25)
    assert stated["DoRA r4 − LoRA r4 (1024 rows)"].verdict == "worse"
    assert stated["PiSSA r4 − LoRA r4 (1024 rows)"].verdict == "no difference shown"
    assert stated["LoRA r1 − full, batch 64 − 1024 rows"].effect == pytest.approx(0.5)
    assert stated["LoRA r16 − full, batch 64 − 1024 rows"].effect == pytest.approx(0.0)
    assert set(study.figures(results)) == {"best_rates", "capacity"}


@pytest.mark.slow
def test_the_study_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["study", "rates", "--preset", "tiny", "--out", str(out)]) == 0
    frame = pd.read_csv(out / "cells.csv")
    counts = frame.groupby("stage")["cell"].nunique().to_dict()
    assert counts.pop("choosing") >= 12 and counts == {"neighbour": 8, "reported": 4}
    assert not frame["value"].isna().any()
    for arm, rows in frame[frame["metric"] == "held_out_loss"].groupby("arm"):
        assert set(rows["seed"]) == {0, 1001, 1002}
        means = rows.groupby("learning_rate")["value"].agg(["mean", "count"])
        best = means[means["count"] == 3].sort_values("mean").index[0]
        assert set(frame[(frame["arm"] == arm) & (frame["stage"] == "reported")]["learning_rate"]) == {best}
    # A cell's loss on new rows is what eval says of its adapter, and what its file of rows adds up to.
    [file] = (out / "items").glob("*LoRA*seed1.jsonl")
    run = out / "runs" / file.stem
    # Studies of the embedded model are in float32; eval takes the dtype of the machine.
    scored = ["eval", "--model", demo.model_path(), "--adapter", str(run / "adapter"), "--data", demo.data_path("test")]
    capsys.readouterr()
    assert main([*scored, "--max-length", "25", "--dtype", "float32", "--json"]) == 0
    [value] = frame[(frame["cell"] == run.name) & (frame["metric"] == "loss")]["value"]
    assert json.loads(capsys.readouterr().out)["nll"] == pytest.approx(value, rel=1e-4)
    items = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(item["row"] for item in items) == list(range(240))
    assert sum(item["loss"] for item in items) / sum(item["tokens"] for item in items) == pytest.approx(value, rel=1e-5)
    assert {path.name for path in (out / "figures").glob("*.png")} == {"rates.png", "best_rates.png"}
