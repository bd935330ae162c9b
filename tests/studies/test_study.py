"""Studies: what is run, chosen, resumed, written and refused; memorize stands for all of them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mora_jax import demo
from mora_jax.cli.main import main
from mora_jax.cli.study import NAMES
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.errors import InputError
from mora_jax.evaluation.perplexity import score
from mora_jax.interop import load_adapter, load_pretrained
from mora_jax.studies import run as run_module
from mora_jax.studies.cells import cell_config, reported_cells, search
from mora_jax.studies.claims import claims
from mora_jax.studies.folder import StudyFolder
from mora_jax.studies.instruct import Instruct
from mora_jax.studies.intervals import interval, paired
from mora_jax.studies.memorize import SYMBOLS, Memorize, bits_stored, make_pairs, right_symbols, share_of_right
from mora_jax.studies.results import Results, observations
from mora_jax.studies.rows import sample, split_by_prompt, write_rows
from mora_jax.studies.run import STUDIES, guide, run_study
from mora_jax.studies.study import CHOOSING_SEEDS, Arm, Cell, Evaluation, Level, Preset, Sources
from mora_jax.sweeps.board import Board
from mora_jax.sweeps.results import RunResult

SETTINGS = {
    "data.max_length": 16,
    "loss.end_of_turn": "none",
    "train.steps": 2,
    "train.batch_size": 4,
    "train.eval_every": 1,
}
LORA = {"adapter.method": "lora", "adapter.rank": 1, "adapter.targets": ("q_proj",)}
ARMS = (Arm("LoRA", LORA, (1e-3, 1e-2)), Arm("no layer", LORA | {"adapter.targets": ("w_proj",)}, (1e-3,)))
SOURCES = Sources(demo.model_path())
LEVELS = (Level("6 pairs", {"pairs": 6}),)


class Small(Memorize):
    """Two arms, one of which can't begin."""

    presets = {"test": Preset("a test", ARMS, SETTINGS, {"length": 2}, LEVELS, seeds=2)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    return run_study(Small(), "test", str(out), SOURCES, board=Board()), out


def test_intervals_are_students():
    found = interval([0.10, 0.14, 0.06])
    assert found.n == 3
    assert found.mean == pytest.approx(0.10)
    assert found.low == pytest.approx(0.0006, abs=1e-4)
    assert interval([2.0]).half is None
    assert interval([2.0]).p is None
    assert interval([]).text() == "missing"
    lost = interval([math.nan, 1.0, math.inf, 2.0])
    assert (lost.n, lost.lost, lost.mean, lost.seeds) == (2, 2, 1.5, "2 (2 diverged)")
    assert interval([math.nan]).text() == "diverged"


def test_differences_are_paired_by_seed():
    first, second = {1: 1.0, 2: 2.0, 3: 4.0}, {1: 0.5, 2: 1.0, 4: 9.0}
    found = paired(first, second)
    assert (found.n, found.mean) == (2, 0.75)
    assert found.half == pytest.approx(12.706 * math.sqrt(0.125 / 2), rel=1e-3)


def test_pairs_are_uniform_and_keys_unique():
    rows = make_pairs(2000, 4, 3)
    assert rows == make_pairs(2000, 4, 3) != make_pairs(2000, 4, 4)
    assert len({row["prompt"] for row in rows}) == 2000
    counts = collections.Counter(symbol for row in rows for symbol in row["completion"].split())
    assert set(counts) == set(SYMBOLS)
    assert max(abs(count - 500) for count in counts.values()) < 5 * math.sqrt(500)


def test_symbols_count_by_position():
    assert right_symbols("a b c", "a c c d") == (2, 4)
    assert right_symbols("", "a b") == (0, 2)
    assert right_symbols("a b c d e", "a b") == (2, 2)
    assert share_of_right(["a b", "c"], ["a b", "c d"]) == (0.75, 0.5)


def test_bits_are_what_a_guess_lacks():
    assert bits_stored(10, math.log(16)) == pytest.approx(0)
    assert bits_stored(10, 0.0) == 40
    assert bits_stored(10, 5.0) == 0


@pytest.mark.slow
def test_a_rate_is_chosen_on_seeds_that_are_not_reported(done):
    result, out = done
    frame = pd.read_csv(out / "cells.csv")
    lora = frame[(frame["arm"] == "LoRA") & (frame["metric"] == "teacher_forced_accuracy") & (frame["step"] == 2)]
    choosing = lora[lora["stage"] == "choosing"]
    assert set(choosing["seed"]) == set(CHOOSING_SEEDS)
    means = choosing.groupby("learning_rate")["value"].agg(["mean", "count"])
    best = means[means["count"] == 3].sort_values("mean", ascending=False).index[0]
    reported = lora[lora["stage"] == "reported"]
    assert list(reported["seed"]) == [1, 2]
    assert set(reported["learning_rate"]) == {best} == {result.results.rate("LoRA", "6 pairs")}
    assert set(frame[frame["arm"] == "LoRA"]["parameters"]) == {4 * (128 + 128)}
    steps = frame[frame["metric"] == "loss"].groupby(["stage", "cell"])["step"].apply(list)
    assert list(steps["reported"]) == [[0, 1, 2]] * 2
    assert "mora-jax" in frame["versions"][0]


def losses_of(rates, curve, seeds=CHOOSING_SEEDS):
    return {rate: {seed: curve(rate, seed) for seed in seeds} for rate in rates}


def searched(grid, curve):
    """A search from its beginning to its end: the chosen rate, and what was trained."""
    losses: dict[float, dict[int, float]] = {}
    while True:
        state = search(grid, losses)
        if not state.wanted:
            return state, losses
        for rate, seed in state.wanted:
            assert seed not in losses.get(rate, {})
            losses.setdefault(rate, {})[seed] = curve(rate, seed)


@pytest.mark.parametrize("best", [1e-4, 2e-3, 6e-2])
def test_a_grid_grows_until_the_best_rate_lies_inside(best):
    state, losses = searched((1e-3, 2e-3, 4e-3), lambda rate, seed: math.log(rate / best) ** 2)
    assert state.inside and min(losses) < state.rate < max(losses)
    assert abs(math.log2(state.rate / best)) <= 0.5 + 1e-2
    # One seed at every rate, all three at two of them.
    assert sorted(map(len, losses.values())) == [1] * (len(losses) - 2) + [3, 3]


def test_the_best_mean_is_chosen_and_not_the_best_seed():
    def curve(rate, seed):
        lucky = -0.2 if (rate, seed) == (2e-3, CHOOSING_SEEDS[0]) else 0.0
        return math.log(rate / 1e-3) ** 2 * 0.2 + lucky

    state, losses = searched((1e-3, 2e-3), curve)
    assert min(losses, key=lambda rate: losses[rate][CHOOSING_SEEDS[0]]) == 2e-3
    assert state.rate == 1e-3


def test_diverged_runs_lower_the_rates():
    state, losses = searched((1e-2, 2e-2), lambda rate, seed: math.inf if rate > 2e-3 else -math.log(rate))
    assert state.rate == 1.25e-3
    state, losses = searched((1e-2, 2e-2), lambda rate, seed: math.inf)
    assert state.rate is None and len(losses) < 10


@pytest.mark.slow
def test_what_is_measured_is_what_the_adapter_does(done):
    _, out = done
    run = next((out / "runs").glob("6-pairs_LoRA_*seed1"))
    model, tokenizer = load_pretrained(demo.model_path(), dtype="float32")
    load_adapter(model, run / "adapter")
    losses, right = [], []
    for row in map(json.loads, (out / "data" / "pairs_6_1.jsonl").read_text().splitlines()):
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
        logits = np.asarray(model(np.array([ids])), np.float64)[0]
        logs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        for place in (-3, -2):  # two symbols, then the end of the turn
            losses.append(-logs[place - 1, ids[place]])
            right.append(logs[place - 1].argmax() == ids[place])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert last["eval_teacher_forced_accuracy"] == pytest.approx(np.mean(right))


def test_a_cell_that_cannot_begin_is_named_and_the_others_go_on(done):
    result, out = done
    assert result.exit_code == 0
    text = (out / "conclusion.md").read_text()
    assert "- 6-pairs_no-layer_lr0.001_seed1: failed: adapter: " in text
    assert "did you mean 'v_proj'" in text
    arm, *_, steps = [line for line in text.splitlines() if line.startswith("| no layer")]
    assert "| 0 (2 diverged) | diverged |" in arm
    assert steps == "| no layer | missing |"


def test_levels_that_did_not_run_are_named_once():
    frame = pd.read_csv(Path(__file__).parents[2] / "docs/studies/memorize/small/cells.csv", keep_default_na=False)
    frame["value"] = pd.to_numeric(frame["value"], errors="coerce")
    more = frame.drop_duplicates("cell").assign(level="96 pairs", metric="not ended", step=math.nan, value=math.nan)
    whole, part = (Results(each, Memorize(), Memorize.presets["small"]) for each in (frame, pd.concat([frame, more])))
    assert part.levels == whole.levels == [""]
    assert claims(part) == claims(whole)
    assert part.missing() == [*whole.missing(), ("96 pairs", "no cell ended")]
    failed = pd.concat([frame, more.assign(metric="failed", note="why")])
    assert Results(failed, Memorize(), Memorize.presets["small"]).levels == ["", "96 pairs"]


def test_figures_are_there_in_both_forms(done):
    _, out = done
    assert {path.name for path in (out / "figures").iterdir()} == {"curves.png", "curves.svg", "rates.png", "rates.svg"}


def test_rows_are_scored_in_the_template_of_the_study(tmp_path):
    rows = [{"prompt": "say a", "completion": "a"}, {"prompt": "say b", "completion": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    model, tokenizer = load_pretrained(demo.model_path(), dtype="float32")
    found = {}
    for template in ("plain", None):
        preset = Preset("a test", (), {"data.max_length": 32, "data.template": template})
        cell = Cell(Level(), ARMS[0], 1e-3, 1)
        found[template] = Evaluation(cell, preset, SOURCES, tmp_path, {}, 0, 1, tokenizer, model).score(path).nll
        encoded = EncodedDataset.build(load_rows(rows), tokenizer, template, max_length=32)
        assert found[template] == pytest.approx(score(model, encoded, batch_size=2).nll, rel=1e-5)
    assert found["plain"] != pytest.approx(found[None], rel=1e-2)


def test_the_embedded_model_is_known_by_any_path_and_computes_in_float32():
    preset = Small().presets["test"]
    cell = Cell(next(preset.pairs())[0], ARMS[0], 1e-3, 1)
    for path, dtype in (
        (demo.model_path(), "float32"),
        (os.path.relpath(demo.model_path()), "float32"),
        ("other", None),
    ):
        assert cell_config(cell, preset, path, {"data.train": ("a",)}, "out").model.dtype == dtype


@pytest.mark.slow
def test_answers_are_generated_in_the_template_of_the_study(tmp_path, monkeypatch):
    seen = []

    def answers(model, tokenizer, prompts, *, template, **options):
        seen.append(template)
        return ["" for _ in prompts]

    monkeypatch.setattr("mora_jax.evaluation.chat.generate_batch", answers)
    model, tokenizer = load_pretrained(demo.model_path(), dtype="float32")
    for study in (Memorize(), Instruct()):
        tiny = study.presets["tiny"]
        level, arm = next(tiny.pairs())
        settings = tiny.settings | {"data.template": "chatml", "data.max_length": 96}
        preset = dataclasses.replace(tiny, settings=settings, data={**tiny.data, "lengths": (96,)})
        data = study.write_data(preset, level, 1, tmp_path, SOURCES)
        cell = Cell(level, arm, 1e-3, 1)
        study.measure(Evaluation(cell, preset, SOURCES, tmp_path, data, 0, 1, tokenizer, model))
    assert seen == ["chatml", "chatml"]


def test_rows_are_drawn_from_all_tasks_alike():
    rows = [{"task": task, "number": number} for task in "abc" for number in range(40)]
    for count in (30, 31, 200):
        drawn = sample(rows, count)
        counts = collections.Counter(row["task"] for row in drawn)
        assert len(drawn) == min(count, 120) and max(counts.values()) - min(counts.values()) <= 1
        assert drawn == sample(rows, count) and (count > 120 or drawn != sample(rows, count, "other"))
        assert len({(row["task"], row["number"]) for row in drawn}) == len(drawn)
    untasked = sample([{"number": number} for number in range(100)], 50)
    assert max(row["number"] for row in untasked) > 60


def test_prompts_are_in_one_part_alone():
    rows = [
        {"messages": [{"role": "user", "content": f"say {n % 30}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(90)
    ]
    parts = split_by_prompt(rows, 0.1, "rows")
    prompts = {name: {row["messages"][0]["content"] for row in part} for name, part in parts.items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 72, "held_out": 9, "test": 9}
    assert sum(map(len, prompts.values())) == 30
    with pytest.raises(InputError, match="6 rows with 2 prompts are too few"):
        split_by_prompt(rows[:2] * 3, 0.1, "rows")


def test_controls_are_trained_at_equal_rates_and_what_is_reported_from_perturbed_weights():
    arms = (Arm("full", {}, (1e-3, 2e-3)), Arm("full, decay", {}, (1e-3, 2e-3), control_of="full"))
    preset = Preset("a test", arms, SETTINGS, seeds=1)
    cells = list(reported_cells(preset, {("", "full"): 1e-3, ("", "full, decay"): 2e-3}, perturbed=True))
    assert [(cell.name, cell.stage) for cell in cells] == [
        ("full_lr0.001_seed1", "reported"),
        ("full_lr0.001_seed1_perturbed", "exploratory"),
        ("full-decay_lr0.002_seed1", "reported"),
        ("full-decay_lr0.002_seed1_perturbed", "exploratory"),
        ("full-decay_lr0.001_seed1", "equal_rate"),
    ]
    equal = list(reported_cells(preset, {("", "full"): 1e-3, ("", "full, decay"): 1e-3}))
    assert [cell.stage for cell in equal] == ["reported"] * 2


@pytest.mark.slow
def test_what_is_done_stays_and_what_is_missing_is_trained(done, monkeypatch, tmp_path):
    _, out = done
    before = pd.read_csv(out / "cells.csv")
    [gone] = (out / "runs").glob("6-pairs_LoRA_*seed2")
    shutil.rmtree(gone)
    trained = []
    measure = run_module._Running._measure
    monkeypatch.setattr(
        run_module._Running, "_measure", lambda self, name, *rest: trained.append(name) or measure(self, name, *rest)
    )
    run_study(Small(), "test", str(out), SOURCES, board=Board())
    assert set(trained) == {gone.name}
    pd.testing.assert_frame_equal(pd.read_csv(out / "cells.csv"), before, rtol=1e-6)


def test_a_folder_is_of_one_study(done, tmp_path):
    _, out = done

    class Other(Small):
        name = "other"

    with pytest.raises(InputError, match="holds another study .its study is memorize, here it is other.*--overwrite"):
        run_study(Other(), "test", str(out), SOURCES, board=Board())
    with pytest.raises(InputError, match="holds no study to resume"):
        run_study(Small(), "test", str(tmp_path / "none"), SOURCES, resume=True, board=Board())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds a run"):
        run_study(Small(), "test", str(tmp_path / "run"), SOURCES, board=Board())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--cells", "nothing"], "--cells nothing fits no cell; they are called such as 128-pairs_LoRA"),
        (["--cells", "("], "is no regular expression"),
        (["--preset", "small"], "give --model MODEL"),
        (["--data", "rows.jsonl"], "makes its own pairs"),
        (["--resume", "--overwrite"], "leave out one of them"),
        (["--model", "models/none"], "models/none"),
        (["--seeds", "1"], "--seeds must be an integer, at least 2"),
    ],
)
def test_bad_input_is_one_line(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "memorize", "--out", "out", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not list(tmp_path.iterdir())


def test_a_study_goes_on_from_another_folder_and_bad_input_replaces_nothing(done, monkeypatch, tmp_path):
    _, out = done
    model = Path(demo.model_path())
    monkeypatch.chdir(model.parent)
    before = {path.name for path in out.iterdir()}
    run_study(Small(), "test", os.path.relpath(out), Sources(model.name), board=Board())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="none"):
        run_study(Small(), "test", str(out), Sources("none"), overwrite=True, board=Board())
    assert {path.name for path in out.iterdir()} == before
    run_study(Small(), "test", str(out), SOURCES, board=Board())


class Stop(BaseException):
    """As a signal is raised in the main thread."""


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stop, OSError])
def test_what_ends_a_study_before_its_first_cell_replaces_nothing(stop, tmp_path, monkeypatch):
    folder = StudyFolder(str(tmp_path / "out"))
    with folder.opened({"study": "old"}, resume=False, overwrite=False):
        folder.files.write("cells.csv", "old")
        (folder.path / "runs" / "cell").mkdir(parents=True)
    before = {path.relative_to(folder.path) for path in folder.path.rglob("*")}
    with pytest.raises(stop), folder.opened({"study": "new"}, resume=False, overwrite=True):
        raise stop
    assert {path.relative_to(folder.path) for path in folder.path.rglob("*")} == before
    assert folder._read()["asked"] == {"study": "old"}
    with contextlib.suppress(stop), folder.opened({"study": "new"}, resume=False, overwrite=True):
        (folder.path / "runs").mkdir()
        raise stop
    assert folder._read()["asked"] == {"study": "new"} and not (folder.path / "cells.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lines", range(0, 20, 3))
def test_a_process_that_is_killed_loses_no_study(lines, tmp_path):
    """Killed after any number of changes to the folder; the next process finds the old study."""
    out = tmp_path / "out"
    folder = StudyFolder(str(out))
    with folder.opened({"study": "old"}, resume=False, overwrite=False):
        folder.files.write("cells.csv", "old")
        (out / "runs" / "cell").mkdir(parents=True)
    code = f"""
import os, pathlib
from mora_jax.studies.folder import StudyFolder
left = {lines}
def dying(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*arguments, **options)
    return call
for name in ("rename", "mkdir", "rmdir"):
    setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
with StudyFolder({str(out)!r}).opened({{"study": "new"}}, resume=False, overwrite=True):
    raise KeyboardInterrupt
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True)
    with folder.opened({"study": "old"}, resume=True, overwrite=False):
        assert folder._read()["asked"] == {"study": "old"}
        assert (out / "runs" / "cell").is_dir() and (out / "cells.csv").read_text() == "old"


def test_a_loss_that_is_not_finite_is_a_result_and_no_error():
    arm = Arm("LoRA", LORA, (1e-3, 1e-2, 1e-1))
    preset, runs, cells = Preset("a test", (arm,), SETTINGS), [], {}
    for rate, values in ((1e-3, (0.1, 0.2)), (1e-2, (0.3, None)), (1e-1, (None, 0.15))):
        cell = Cell(preset.levels[0], arm, rate, 1)
        cells[cell.name] = cell
        metrics = [
            {"step": step, "loss": None, "eval_teacher_forced_accuracy": value} for step, value in enumerate(values, 1)
        ]
        config = cell_config(cell, preset, demo.model_path(), {"data.train": ("a",)}, "out")
        runs.append(RunResult(cell.name, {}, {"steps": 2}, metrics, None, None, config))
    assert [guide(Memorize(), run) for run in runs] == [-0.2, math.inf, -0.15]
    frame = observations(Memorize(), "test", cells, runs)
    assert frame[(frame["metric"] == "train_loss")]["value"].isna().all()
    assert frame[frame["learning_rate"] == 1e-2]["value"].isna().tolist() == [True, False, True, True]
    results = Results(frame[frame["learning_rate"] == 1e-2], Memorize(), preset)
    assert results.mean("teacher_forced_accuracy", "LoRA").seeds == "0 (1 diverged)"
    assert results.missing() == []


def test_a_study_goes_on_that_was_begun_before_a_key_was_there(done):
    _, out = done
    known = json.loads((out / "study.json").read_text())
    for run in known["runs"]:
        del run["config"]["optimizer"]["eps"]
    (out / "study.json").write_text(json.dumps(known))
    run_study(Small(), "test", str(out), SOURCES, board=Board())
    known["runs"][0]["config"]["optimizer"]["eps"] = 0.1
    (out / "study.json").write_text(json.dumps(known))
    with pytest.raises(InputError, match="another cell of the name"):
        run_study(Small(), "test", str(out), SOURCES, board=Board())
    del known["runs"][0]["config"]["optimizer"]["eps"]
    (out / "study.json").write_text(json.dumps(known))


def test_the_command_knows_every_study():
    assert set(NAMES) == set(STUDIES)


def test_a_preset_of_another_study_is_refused(capsys):
    assert main(["study", "rates", "--preset", "saturation", "--out", "none"]) == 2
    assert "study rates has no preset saturation; choose one of tiny, quick" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_cells_are_listed_and_presets_hold(name, capsys):
    study = STUDIES[name]
    assert set(study.presets) - {"ranks", "saturation"} == {"tiny", "quick", "small", "paper"}
    for preset in study.presets:
        assert main(["study", name, "--preset", preset, "--out", "none", "--list"]) == 0
        names = capsys.readouterr().out.split("\n")[:-1]
        assert len(names) == len(set(names)) >= 2
        for _, arm in study.presets[preset].pairs():
            factors = [above / below for below, above in itertools.pairwise(arm.rates)]
            assert factors == pytest.approx([2.0] * len(factors), rel=2e-2), arm.name


@pytest.mark.slow
def test_cells_may_share_their_weights_over_devices(tmp_path):
    class Sharded(Memorize):
        sizes = SETTINGS | {"mesh.fsdp": 2, "train.steps": 1}
        presets = {"test": Preset("a test", (Arm("LoRA", LORA, (1e-2,)),), sizes, {"length": 2}, LEVELS, seeds=1)}

    class Alone(Memorize):
        presets = {
            "test": Preset(
                "a test",
                (Arm("LoRA", LORA, (1e-2,)),),
                SETTINGS | {"train.steps": 1},
                {"length": 2},
                LEVELS,
                seeds=1,
            )
        }

    found = [
        run_study(study(), "test", str(tmp_path / study.__name__), SOURCES, board=Board()).results.frame
        for study in (Sharded, Alone)
    ]
    assert all((frame["metric"] != "failed").all() for frame in found)
    losses = [frame[frame["metric"] == "loss"]["value"].to_numpy() for frame in found]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STUDIES))
def test_the_smallest_preset(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", name, "--preset", "tiny", "--out", "studies/tiny"]) == 0
    assert "## Missing" not in capsys.readouterr().out


def test_a_plan_prices_every_cell(capsys):
    assert main(["study", "memorize", "--preset", "tiny", "--plan", "v5e-1", "--price", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Seven for the rate, two that are reported.
    assert [line.split(" | ")[1] for line in lines if line.startswith(("| LoRA", "| MoRA", "| all"))] == [
        "9",
        "9",
        "18",
    ]
    assert "At 2 a chip and hour: " in lines[-1]
