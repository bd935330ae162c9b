"""The study of the loss over instructions: its rows, its control, what it reads off its table, and two identities."""

from __future__ import annotations

import collections
import json
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from mora_jax import demo
from mora_jax.adapters.base import AdapterParam
from mora_jax.cli.main import main
from mora_jax.data import EncodedDataset, Segment, load_rows, load_tokenizer
from mora_jax.errors import InputError
from mora_jax.studies.cells import cell_names, reported_cells
from mora_jax.studies.claims import claims
from mora_jax.studies.instruct import (
    LOSSES,
    Instruct,
    arms,
    base_texts,
    embedded_parts,
    fact,
    facts_of,
    gain,
    levels,
    parts_of_files,
)
from mora_jax.studies.intervals import interval
from mora_jax.studies.results import Results
from mora_jax.studies.rows import read_rows
from mora_jax.studies.run import STUDIES, guide, run_study
from mora_jax.studies.study import Arm, Preset, Sources
from mora_jax.sweeps.board import Board
from mora_jax.sweeps.grid import SweepRun
from mora_jax.sweeps.train import train_runs
from mora_jax.training.config.schema import Config, lay_over

LORA = {"adapter.method": "lora", "adapter.rank": 1, "adapter.targets": ("q_proj",)}
ARMS = [
    Arm("LoRA masked", LORA, (1e-2,)),
    Arm("LoRA unmasked", {**LORA, **LOSSES["unmasked"]}, (1e-2,)),
    Arm("LoRA lr_share", LORA, rate_of="LoRA masked"),
]


class Small(Instruct):
    """Three arms, the rates given."""

    presets = {
        "test": Preset(
            "a test",
            (),
            {"data.max_length": 64},
            {"sentences": (0,), "lengths": (26,), "scored": 4, "new_tokens": 2},
            levels(1, 1, 2, {4: ARMS}),
            seeds=2,
        )
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.model_path())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    [texts] = write(folder / "texts.jsonl", base_texts()[:3])
    sources = Sources(demo.model_path(), texts=texts)
    return run_study(Small(), "test", str(folder / "out"), sources, board=Board()), folder / "out"


def prompts(rows):
    return [row["messages"][0]["content"] for row in rows]


def test_passages_change_prompts_and_no_answers():
    alone, behind = embedded_parts(0, 20, 1), embedded_parts(3, 20, 1)
    texts = [row["text"] for row in base_texts()]
    for part in ("train", "validation", "test"):
        pairs = list(zip(getattr(alone, part), getattr(behind, part), strict=True))
        assert pairs and all(one["messages"][1] == other["messages"][1] for one, other in pairs)
        for one, other in pairs:
            passage = other["messages"][0]["content"].removesuffix(one["messages"][0]["content"])
            assert passage.count(". ") == 3
            assert not any(passage.strip() in text for text in texts)
    again = embedded_parts(3, 20, 2)
    assert (again.validation, again.test) == (behind.validation, behind.test)
    assert prompts(again.train)[:9] != prompts(behind.train)[:9]
    passages = [{". ".join(text.split(". ")[:3]) for text in prompts(rows)} for rows in (again.train, again.test)]
    assert len(passages[0]) > 40 and not passages[0] & passages[1]
    assert (alone.rows, alone.duplicates, alone.dropped) == (2550, 0.0, 0)


def test_all_tasks_are_scored_alike():
    tasks = {json.dumps(row["messages"]): row["task"] for row in read_rows(demo.data_path("test"))}
    test = embedded_parts(0, 24, 1).test
    assert collections.Counter(tasks[json.dumps(row["messages"])] for row in test) == dict.fromkeys(tasks.values(), 2)


def test_facts_are_those_of_the_tokens(tokenizer):
    rows = embedded_parts(3, 8, 1).train[:5]
    asked, answered, shares = 0, 0, []
    for one in EncodedDataset.build(load_rows(rows), tokenizer):
        user = sum(segment == Segment.USER for segment in one.segments)
        words = sum(segment == Segment.ASSISTANT for segment in one.segments)
        asked, answered = asked + user, answered + words
        shares.append((words + 1) / (words + 1 + user))
    found = facts_of(rows, tokenizer, 64)
    assert found["ratio"] == pytest.approx(asked / answered)
    assert found["share"] == pytest.approx(sum(shares) / 5)


@pytest.fixture
def dolly(tmp_path):
    """Sixty prompts, a third of which come twice, with answers of one to five words."""
    rows = [
        {"instruction": f"Say {word} now and then.", "input": "", "output": " ".join(["egg"] * (1 + number % 5))}
        for number, word in enumerate(f"{a}{b}" for a in "abcdef" for b in "ghijklmnop")
    ]
    return write(tmp_path / "dolly.jsonl", rows + rows[:20])


def test_a_users_rows_are_split_by_prompt_and_grouped_by_ratio(dolly, tokenizer):
    groups = [parts_of_files(dolly, tokenizer, 64, group, 2, 100, 1) for group in (1, 2)]
    held_out: set[str] = set()
    for parts in groups:
        assert (parts.rows, parts.dropped, parts.duplicates) == (80, 0, pytest.approx(20 / 80))
        held_out |= {*prompts(parts.validation), *prompts(parts.test)}
        assert not {*prompts(parts.validation)} & {*prompts(parts.test)}
    trained = [row for parts in groups for row in parts.train]
    assert not held_out & set(prompts(trained))
    assert len(trained) + sum(len(parts.validation) + len(parts.test) for parts in groups) == 80
    words = [[len(row["messages"][1]["content"].split()) for row in parts.train] for parts in groups]
    assert min(words[0]) >= max(words[1])  # long answers make low ratios


def test_rows_that_are_left_out_are_counted(dolly, tokenizer):
    lengths = EncodedDataset.build(load_rows(list(dolly)), tokenizer, max_length=64).report.lengths
    longest = sorted(lengths)[39]
    parts = parts_of_files(dolly, tokenizer, longest, 1, 1, 100, 1)
    assert parts.dropped == sum(length > longest for length in lengths) > 0
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 80 - parts.dropped


def test_files_without_what_the_study_needs(dolly, tokenizer, tmp_path, capsys):
    texts = write(tmp_path / "texts.jsonl", [{"text": "no prompt"}])
    with pytest.raises(InputError, match=r"texts\.jsonl: no row with an instruction and an answer"):
        parts_of_files(texts, tokenizer, 64, 1, 2, 100, 1)
    with pytest.raises(InputError, match="are too few for 60 groups"):
        parts_of_files(dolly, tokenizer, 64, 1, 60, 100, 1)
    for data in (texts, dolly):
        command = ["study", "instruct", "--out", str(tmp_path / "out"), "--data", *data]
        assert main(command) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")


@pytest.mark.slow
def test_end_to_end(done):
    result, out = done
    assert result.exit_code == 0 and result.results.missing() == []
    frame = pd.read_csv(out / "cells.csv")
    measured = {
        "validation_loss",
        "test_loss",
        "trained_rows_loss",
        "instruction_loss",
        "base_text_loss",
        "exact_match",
    }
    assert measured <= set(frame["metric"])
    tested = frame[(frame["metric"] == "test_loss") & (frame["seed"] == 1)]
    start = tested[tested["step"] == 0]["value"]
    assert len(start) == 3 and start.nunique() == 1
    assert tested[tested["step"] == 2]["value"].nunique() == 3
    [level] = result.results.levels
    share = result.results.curves("share", "LoRA masked", level)
    rates = frame[frame["arm"] == "LoRA lr_share"].groupby("seed")["learning_rate"].first()
    for seed, [(_, mean)] in share.items():
        assert rates[seed] == pytest.approx(1e-2 * mean, rel=1e-2)
    assert "| LoRA unmasked − LoRA masked, ratio 1 of 1, 4 rows |" in result.conclusion
    assert "Of 2,550 rows 0.0% repeat the prompt of another, and 0 are left out" in result.conclusion
    assert {path.stem for path in (out / "figures").iterdir()} == {"crossing", "epochs", "rates"}


def table_of(values):
    """Results of a table with (level, arm, seed, step, validation loss, test loss) rows, at two ratios."""
    preset = Preset("a test", (), {"data.max_length": 64}, {}, levels(2, 2, 4, {8: ARMS[:2], 16: ARMS[:2]}), seeds=3)
    rows = [
        {"level": level, "arm": arm, "seed": seed, "step": step, "metric": metric, "value": value}
        for level, arm, seed, step, *pair in values
        for metric, value in zip(("validation_loss", "test_loss"), pair, strict=True)
    ]
    ratios = {level.name: 2.0 * level.values["ratio_level"] for level in preset.levels}
    rows += [
        {"level": level, "arm": "LoRA masked", "seed": seed, "step": 0, "metric": metric, "value": value}
        for level, known in ratios.items()
        for seed in (1, 2, 3)
        for metric, value in (
            ("ratio", known),
            ("share", 1 / (1 + known)),
            ("duplicate_prompts", 0.25),
            ("dropped_rows", 7),
            ("all_rows", 1080),
        )
    ]
    frame = pd.DataFrame(rows).assign(stage="reported", learning_rate=1e-2, note=None, parameters=1, cell="a cell")
    return Results(frame, STUDIES["instruct"], preset)


@pytest.fixture(scope="module")
def known():
    values = []
    for level, gained in (
        ("ratio 1 of 2, 8 rows", (0.1, 0.0, -0.1)),
        ("ratio 2 of 2, 8 rows", (0.5, 0.6, 0.7)),
        ("ratio 1 of 2, 16 rows", (-0.5, -0.5, -0.6)),
        ("ratio 2 of 2, 16 rows", (0.2, 0.3, 0.4)),
    ):
        for seed, one in enumerate(gained, start=1):
            # The masked arm is best on validation at step 2, although its test loss is lower at step 4.
            values += [(level, "LoRA masked", seed, 2, 1.0, 2.0), (level, "LoRA masked", seed, 4, 1.5, 0.5)]
            values += [(level, "LoRA unmasked", seed, 2, 1.0, 9.0), (level, "LoRA unmasked", seed, 4, 0.9, 2.0 - one)]
    return table_of(values)


def test_gains_are_of_the_epoch_that_validation_chooses(known):
    mean = interval(gain(known, "LoRA", "ratio 2 of 2, 8 rows").values())
    assert mean.mean == pytest.approx(0.6)
    assert mean.half == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-5)
    assert fact(known, "ratio", "ratio 2 of 2, 8 rows") == 4.0
    stated = {(claim.claim, claim.level, claim.metric.split(",")[0]): claim for claim in claims(known)}
    arms = "LoRA unmasked − LoRA masked"
    best = stated[arms, "ratio 2 of 2, 8 rows", "test loss at the best epoch"]
    assert best.effect == pytest.approx(-0.6) and best.halfway is None
    last = stated[arms, "ratio 2 of 2, 8 rows", "test loss after the last epoch"]
    assert last.effect == pytest.approx(1.4 - 0.5)
    grows = stated[
        "LoRA unmasked, ratio 2 of 2, 8 rows − ratio 1 of 2, 8 rows",
        "",
        "gain of unmasked loss in test loss at the best epoch",
    ]
    assert grows.effect == pytest.approx(0.6)
    assert grows.high - grows.effect == pytest.approx(4.302653 * np.std([0.4, 0.6, 0.8], ddof=1) / np.sqrt(3), rel=1e-5)
    rows = stated[
        "LoRA unmasked, ratio 2 of 2, 16 rows − ratio 2 of 2, 8 rows",
        "",
        "gain of unmasked loss in test loss at the best epoch",
    ]
    assert rows.effect == pytest.approx(-0.3)


def test_verdicts_stand_level_by_level_and_are_corrected(known):
    verdicts = {
        claim.level: claim.verdict for claim in claims(known) if claim.metric.startswith("test loss at the best epoch")
    }
    assert verdicts == {
        "ratio 1 of 2, 8 rows": "no difference shown",
        "ratio 2 of 2, 8 rows": "better",
        "ratio 1 of 2, 16 rows": "worse",
        # Its interval leaves 0 out, by itself.
        "ratio 2 of 2, 16 rows": "no difference shown",
    }
    text = Instruct().sections(known)
    assert (text["duplicates"], text["dropped"], text["rows"]) == ("25.0%", "7", "1,080")


def test_a_rate_is_chosen_by_its_best_evaluation():
    metrics = [{"step": 2 * place, "eval_validation_loss": loss} for place, loss in enumerate((3.0, 1.5, 4.0))]
    run = SimpleNamespace(metrics=metrics, failed=None)
    assert guide(STUDIES["instruct"], run) == 1.5
    assert guide(STUDIES["memorize"], run) == float("inf")


def test_an_arm_takes_another_ones_rate():
    compared = arms("LoRA", 2e-3, "masked", "lr_share")
    preset = Preset("a test", (), {}, {}, levels(1, 2, 4, {8: compared}), seeds=1)
    [level] = preset.levels
    cells = list(reported_cells(preset, {(level.name, "LoRA masked"): 1e-2}))
    assert [(cell.arm.name, cell.rate) for cell in cells] == [("LoRA masked", 1e-2), ("LoRA lr_share", 1e-2)]
    assert len(cell_names(preset)) == 3 + 2 * 3


def test_identities(tmp_path):
    """A prompt weight that goes to nothing is masked loss; a factor on the loss is nothing to AdamW."""
    rows = embedded_parts(0, 8, 1).train[:8]
    once = write(tmp_path / "rows.jsonl", rows)
    heavy = write(tmp_path / "heavy.jsonl", [row | {"weight": 8.0} for row in rows])
    given = {
        "masked": {"data.train": once},
        "weighted": {"data.train": once, "loss.mode": "weighted", "loss.prompt_weight": 1e-8},
        "times eight": {"data.train": heavy},
        "unmasked": {"data.train": once, "loss.mode": "unmasked"},
    }
    usual = LORA | {
        "model.path": demo.model_path(),
        "model.dtype": "float32",
        "mesh.data": 1,
        "data.max_length": 26,
        "loss.normalize": "response",
        "optimizer.learning_rate": 1e-2,
        "optimizer.clip_norm": None,
        "train.steps": 20,
        "train.batch_size": 4,
    }
    runs = [
        SweepRun(name, {}, lay_over(Config(), [(key, value, key) for key, value in {**usual, **own}.items()]))
        for name, own in given.items()
    ]
    ended = {run.name: run for run in train_runs(runs, None, Board()).runs}
    found = {name: jax.tree.leaves(nnx.state(run.model, AdapterParam)) for name, run in ended.items()}

    def apart(name):
        return max(
            np.abs(one - other).max() / np.abs(one).max()
            for one, other in zip(found["masked"], found[name], strict=True)
        )

    # Sums in another order differ in their last digits, and twenty steps make more of it.
    assert apart("weighted") < 1e-4
    assert apart("times eight") < 1e-4
    assert apart("unmasked") > 0.1
    first = {name: run.metrics[0]["loss"] for name, run in ended.items()}
    assert first["weighted"] == pytest.approx(first["masked"], rel=1e-6)
    assert first["times eight"] == pytest.approx(8 * first["masked"], rel=1e-5)
