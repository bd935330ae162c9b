"""Sweeps: each run is that of a run alone, what is left behind, going on after a stop, runs that fail, refusals."""

import csv
import dataclasses
import functools
import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.cli.main import main
from mora_jax.errors import InputError
from mora_jax.sweeps.board import Board, LiveBoard
from mora_jax.sweeps.folder import SweepFolder
from mora_jax.sweeps.grid import SweepRun, combinations, expand, parse_grid
from mora_jax.sweeps.results import RunResult, SweepResult
from mora_jax.sweeps.stack import groups_of
from mora_jax.sweeps.train import train_runs
from mora_jax.training import loop
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display import Display
from tests.evaluation import tiny

WORDS = ("red", "blue", "green", "black", "grey")
ROWS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS] * 2
COMPARED = ("loss", "grad_norm", "learning_rate", "eval_loss", "tokens", "trained_tokens")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


def base(inputs, out, **settings) -> Config:
    values = {
        "model.path": str(inputs / "model"),
        "model.dtype": "float32",
        "data.train": str(inputs / "rows.json"),
        "data.eval": str(inputs / "rows.json"),
        "out": str(out),
        "train.steps": 3,
        "train.batch_size": 2,
        "train.save_every": 2,
        "adapter.method": "mora",
        "adapter.rank": 2,
        "adapter.dropout": 0.1,
        "adapter.targets": ("q_proj", "down_proj"),
        "train.neftune_alpha": 5.0,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return lay_over(Config(), [(name, value, "test") for name, value in values.items()])


def runs_of(inputs, out, *sweeps: str, **settings):
    return runs_with(base(inputs, out, **settings), combinations(parse_grid(sweeps)), str(out))


def runs_with(config, settings, out):
    return expand(settings, lambda values: lay_over(config, [(*item, "test") for item in values.items()]), out)


def quiet() -> Board:
    return Board(io.StringIO())


SETTINGS = [{"optimizer.learning_rate": rate, "seed": seed} for rate, seed in ((1e-3, 0), (0.1, 1))]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A sweep of two runs, with its board's lines."""
    out = str(tmp_path_factory.mktemp("sweeps") / "whole")
    board = quiet()
    result = train_runs(runs_with(base(inputs, out), SETTINGS, out), SweepFolder(out), board)
    return result, board.stream.getvalue()


def test_a_sweep_leaves_a_row_and_a_run_directory_a_run(whole):
    result, lines = whole
    out = SweepFolder(result.out).path
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "run",
        "optimizer.learning_rate",
        "seed",
        "final_loss",
        "eval_loss",
        "eval_perplexity",
        "best",
    ]
    assert len(rows) == 2
    (best,) = (row for row in rows if row["best"] == "true")
    assert float(best["eval_loss"]) == min(float(row["eval_loss"]) for row in rows)
    assert best["run"] == result.best.name
    for row in rows:
        folder = out / "runs" / row["run"]
        assert {path.name for path in folder.iterdir()} == {
            "adapter",
            "checkpoints",
            "compile.jsonl",
            "config.json",
            "metrics.jsonl",
            "summary.json",
        }
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["final_loss"] == float(row["final_loss"])
        assert summary["compilations"] == 1
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert "2 runs train together" in lines
    assert f"* {best['run']}".replace(" ", "") in result.table().replace(" ", "")


def test_a_run_is_what_it_would_be_alone(whole, tmp_path):
    run = whole[0].runs[1]
    alone = dataclasses.replace(run.config, out=str(tmp_path / "alone"))
    assert loop.train(alone, Display(io.StringIO())) == 0
    expected = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in run.metrics] == [row["step"] for row in expected]
    for mine, its in zip(run.metrics, expected, strict=True):
        for name in COMPARED:
            if name in its:
                np.testing.assert_allclose(mine[name], its[name], rtol=1e-5, err_msg=f"{name} of step {its['step']}")


def test_a_step_takes_as_long_for_all_runs(whole):
    first, second = (run.metrics for run in whole[0].runs)
    # The checkpoint at the second step has each run read two steps at once, when the device has long done both.
    assert second[1]["step_seconds"] == first[1]["step_seconds"]


def test_other_commands_read_its_runs(whole, capsys):
    run = whole[0].runs[0]
    assert main(["train", "--resume", run.out]) == 0
    assert "finished" in capsys.readouterr().err
    model, _ = mj.load_pretrained(run.config.model.path, dtype="float32")
    mj.load_adapter(model, f"{run.out}/adapter")
    assert adapters_of(model)


def test_the_command_prints_the_table_of_a_sweep_that_is_done(whole, capsys):
    result = whole[0]
    assert main(["sweep", "--resume", result.out]) == 0
    out, err = capsys.readouterr()
    assert out == result.table() + "\n"
    assert f"the best of 2 runs is {result.best.name}" in err


def test_a_sweep_from_before_a_configuration_key_goes_on(whole, tmp_path):
    runs = [SweepRun(run.name, run.values, run.config) for run in whole[0].runs]
    folder = SweepFolder(str(tmp_path / "sweep"))
    with folder.claimed():
        folder.create(runs, overwrite=False)
    assert folder.check_free(runs, overwrite=False)
    file = tmp_path / "sweep" / "sweep.json"
    described = json.loads(file.read_text())
    for run in described["runs"]:
        del run["config"]["optimizer"]["eps"]
    file.write_text(json.dumps(described))
    assert folder.check_free(runs, overwrite=False)
    described["runs"][0]["config"]["optimizer"]["eps"] = 1e-3
    file.write_text(json.dumps(described))
    with pytest.raises(InputError, match="another sweep"):
        folder.check_free(runs, overwrite=False)


def test_a_terminal_shows_a_table_of_all_runs():
    text = io.StringIO()
    board = LiveBoard(Console(file=text, force_terminal=True, width=100))
    board.begin(["rate=1", "rate=2", "rate=3"])
    with board:
        board.group(["rate=1", "rate=2"])
        for name, loss in (("rate=1", 1.25), ("rate=2", float("nan"))):
            board.of(name).step({"step": 5, "loss": loss, "tokens_per_second": 10.0, "seconds_left": 3.0})
            board.of(name).note("the same for both")
        board.of("rate=1").evaluation({"eval_loss": 1.5})
        board.of("rate=2").note("loss is nan")
        board.ended("rate=2", "failed")
        board.round()
        board.close()
    shown = text.getvalue()
    for words in ("0 of 3 runs done, 1 training", "1.2500", "1.5000", "waiting", "failed", "rate=2: loss is nan"):
        assert words in shown
    assert shown.count("the same for both") == 1


def test_a_sweep_that_was_stopped_goes_on_to_the_same_end(inputs, tmp_path, whole):
    out = str(tmp_path / "out")
    runs = runs_with(base(inputs, out), SETTINGS, out)
    folder = SweepFolder(out)

    def stop(row):
        if row["run"] == runs[-1].name and row["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train_runs(runs, folder, quiet(), callbacks=[stop])
    assert stopped.exit_code == 143
    assert stopped.best is None
    assert not (tmp_path / "out" / "sweep.csv").exists()
    # As if it had been killed before this run's checkpoint was written: the runs go on from different steps.
    newest = max((tmp_path / "out" / "runs" / runs[0].name / "checkpoints").glob("[0-9]*"))
    shutil.rmtree(newest)
    result = train_runs(folder.runs(), folder, quiet())
    assert result.exit_code == 0
    for mine, its in zip(result.runs, whole[0].runs, strict=True):
        assert [row["step"] for row in mine.metrics] == [row["step"] for row in its.metrics]
        np.testing.assert_allclose(mine.score, its.score, rtol=1e-5)
    # Asked for again it is all done, and trains nothing.
    board = quiet()
    again = train_runs(runs, folder, board)
    assert again.rows == result.rows
    assert "train together" not in board.stream.getvalue()


def test_a_run_that_fails_is_named_and_the_others_go_on(inputs, tmp_path):
    model, tokenizer = mj.load_pretrained(str(inputs / "model"), dtype="float32")
    result = mj.sweep(
        model,
        ROWS,
        mj.MoRAConfig(rank=2, dropout=0.1, targets=("q_proj", "down_proj")),
        grid=[{"optimizer.weight_decay": 0.0}, {"optimizer.weight_decay": 1e38}],
        tokenizer=tokenizer,
        steps=3,
        batch_size=2,
        config={"optimizer.learning_rate": 10.0, "train.max_skipped": 1, "train.neftune_alpha": 5.0},
        board=quiet(),
    )
    good, bad = result.runs
    assert bad.failed is not None
    assert "nan" in bad.failed or "inf" in bad.failed
    assert bad.failed in result.table()
    assert np.isnan(result.rows[1]["final_loss"])
    assert result.best is good
    assert isinstance(good.model, mj.models.Decoder)
    assert not list(adapters_of(model)), "the base is as it was"


def scored(name, config, **summary):
    return RunResult(name, {}, {"final_loss": 1.0} | summary, [], None, None, config)


def test_no_run_is_the_best_where_losses_are_of_different_data(inputs, tmp_path):
    config, other = base(inputs, tmp_path), base(inputs, tmp_path, data__train="other.json")
    low = scored("low", config, eval_loss=0.5, eval_data="a")
    same = SweepResult([scored("high", config, eval_loss=0.7, eval_data="a"), low], None)
    assert same.best is low and "of different data" not in same.table()
    for runs in (
        [low, scored("elsewhere", config, eval_loss=0.7, eval_data="b")],
        [low, scored("unscored", config)],
        [scored("unscored", config), scored("other rows", other)],
        [scored("unscored", config), scored("other tokens", base(inputs, tmp_path, loss__mode="unmasked"))],
    ):
        result = SweepResult(runs, None)
        assert result.best is None and not any(row["best"] for row in result.rows)
        assert result.table().endswith("the losses are of different data or objectives: they don't compare")
        assert result.plot().axes
    # What failed has no loss that could be of anything.
    failed = RunResult("failed", {}, {}, [], "it failed", None, other)
    assert SweepResult([low, failed], None).best is low


@pytest.mark.slow
def test_a_sweep_over_evaluation_data_names_no_best_run(inputs, tmp_path, capsys):
    (tmp_path / "few.json").write_text(json.dumps(ROWS[:2]))
    settings = {
        "model.path": inputs / "model",
        "data.train": inputs / "rows.json",
        "train.steps": 1,
        "train.batch_size": 2,
    }
    keys = [f"--config.{key}={value}" for key, value in (settings | {"out": tmp_path / "out"}).items()]
    assert main(["sweep", *keys, "--sweep", f"data.eval={inputs / 'rows.json'},{tmp_path / 'few.json'}"]) == 0
    out, err = capsys.readouterr()
    assert "they don't compare" in out and "no run is called the best" in err
    with open(tmp_path / "out" / "sweep.csv") as file:
        assert [row["best"] for row in csv.DictReader(file)] == ["false", "false"]


def test_groups_are_what_shares_a_compiled_step(inputs, tmp_path):
    swept = ("adapter.rank=2,4", "optimizer.schedule=linear,cosine", "loss.mode=masked,unmasked")
    groups = groups_of(runs_of(inputs, tmp_path, *swept, adapter__dropout=0.0))
    assert [len(group) for group in groups] == [4, 4]
    assert [len(group) for group in groups_of(groups[0], at_once=3)] == [3, 1]
    # With dropout a run's own batches count; a base that changes is no common one.
    assert [len(group) for group in groups_of(runs_of(inputs, tmp_path, *swept))] == [2, 2, 2, 2]
    alone = runs_of(
        inputs, tmp_path, "adapter.method=relora,lora", "seed=0,1", adapter__restart_every=2, adapter__restart_warmup=0
    )
    assert sorted(len(group) for group in groups_of(alone)) == [1, 1, 2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to sweep"),
        (["--sweep", "optimizer.learning_rat=1"], "optimizer.learning_rate"),
        (["--sweep", "seed"], "KEY=VALUE"),
        (["--sweep", "seed="], "empty"),
        (["--sweep", "seed=1,"], "empty"),
        (["--sweep", "seed=1,one"], "one"),
        (["--sweep", "optimizer.learning_rate=1e-3,0.001"], "0.001 twice"),
        (["--sweep", "seed=1", "--sweep", "seed=2"], "given twice"),
        (["--sweep", "seed=1", "--config.seed=2"], "both given"),
        (["--sweep", "mesh.fsdp=1,2"], "mesh.fsdp: this key can't be swept"),
        (["--sweep", "seed=1,2", "--config.mesh.fsdp=2"], "side by side on one device"),
        (["--sweep", "adapter.rank=2,4", "--config.adapter.method=full"], "are the same"),
        (["--sweep", "adapter.targets=all-linear,nothing"], "run targets=nothing: "),
        (["--sweep", "seed=1", "--config.out=full"], "another sweep"),
        (["--sweep", "seed=1", "--config.out=single"], "holds a run"),
        (["--resume", "full", "--sweep", "seed=1"], "--resume"),
        (["--resume", "nowhere"], "holds no sweep"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(inputs, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "runs").mkdir(parents=True)
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "config.json").write_text("{}")
    common = [f"--config.model.path={inputs / 'model'}", f"--config.data.train={inputs / 'rows.json'}"]
    out = [] if any(word.startswith("--config.out") for word in arguments) else ["--config.out=out"]
    given = arguments if "--resume" in arguments else [*common, *out, *arguments]
    assert main(["sweep", *given]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert words in err[-1]
    assert not (tmp_path / "out").exists()


def test_one_loop_over_the_vocabulary_serves_all_runs():
    """The loss of several runs under `jax.vmap` is one loop whose product has the tokens of all of them."""
    from mora_jax.losses.cross_entropy import weighted_loss

    runs, rows, length, width, vocabulary = 3, 2, 8, 4, 11
    random = np.random.default_rng(0)
    hidden = random.normal(size=(runs, rows, length, width)).astype(np.float32)
    kernel = random.normal(size=(vocabulary, width)).astype(np.float32)
    targets = random.integers(0, vocabulary, (runs, rows, length))
    weights = (random.random((runs, rows, length)) < 0.4).astype(np.float32)

    def loss(hidden, targets, weights, mapped=True):
        return weighted_loss(hidden, kernel, targets, weights, mapped=mapped)

    grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))
    alone = jax.jit(jax.value_and_grad(functools.partial(loss, mapped=False)))
    value, slope = grads(hidden, targets, weights)
    for run in range(runs):
        expected = alone(hidden[run], targets[run], weights[run])
        np.testing.assert_allclose(value[run], expected[0], rtol=1e-6)
        np.testing.assert_allclose(slope[run], expected[1], rtol=1e-5, atol=1e-7)
    text = str(jax.make_jaxpr(grads)(hidden, targets, weights))
    assert f"f32[{runs},{rows * length},{vocabulary}]" in text
    assert f"f32[{runs},1,{rows * length},{vocabulary}]" not in text


def test_a_value_may_be_a_list():
    grid = parse_grid(["adapter.targets=all-linear,[q_proj,v_proj]"])
    assert grid == {"adapter.targets": ["all-linear", ("q_proj", "v_proj")]}


def test_an_unknown_key_of_a_grid_is_refused():
    with pytest.raises(InputError, match=r"did you mean 'optimizer\.learning_rate'"):
        combinations({"learning_rate": [1.0]})
