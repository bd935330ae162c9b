"""`mj.sweep`: lists of settings, runs that a callback ends, interrupts, and losses that say nothing."""

import io
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.cli.main import main
from mora_jax.data.read import validate
from mora_jax.errors import InputError
from mora_jax.sweeps.board import Board
from mora_jax.sweeps.grid import combinations, expand
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display import Display
from tests.evaluation import tiny

WORDS = ("red", "blue", "green", "black")
ROWS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS] * 2
LORA = mj.LoRAConfig(rank=2, targets=("q_proj",))
KEYS = {"model.dtype": "float32", "optimizer.schedule": "constant"}
IDS = np.array([[1, 2, 3, 4, 5, 6]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(path / "model")
    (path / "rows.json").write_text(json.dumps(ROWS))
    return path


def sweep(model, grid, adapter=LORA, **settings):
    keys = KEYS if isinstance(model, str) else {"optimizer.schedule": "constant"}
    settings = {"steps": 3, "board": Board(io.StringIO()), "config": keys} | settings
    return mj.sweep(model, settings.pop("rows", ROWS), adapter, grid=grid, **settings)


def tune(model, keys, **settings):
    return mj.finetune(model, ROWS, LORA, steps=3, config=KEYS | keys, display=Display(io.StringIO()), **settings)


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


def adapter_norm(model):
    return sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(nnx.state(model, mj.AdapterParam)))


def test_each_dictionary_of_a_list_stands_for_itself(folder, tmp_path):
    model = str(folder / "model")
    first = {"optimizer.learning_rate": 0.1, "train.batch_size": 2, "adapter.rank": 1}
    result = sweep(model, [first, {"seed": 2}], out=tmp_path / "out")
    one, two = result.runs
    assert (one.config.optimizer.learning_rate, one.config.train.batch_size, one.config.adapter.rank) == (0.1, 2, 1)
    usual = Config()
    assert two.config.optimizer.learning_rate == usual.optimizer.learning_rate
    assert two.config.train.batch_size == usual.train.batch_size and two.config.adapter.rank == LORA.rank
    np.testing.assert_allclose(losses(two.metrics), losses(tune(model, {"seed": 2}).metrics), rtol=1e-5)
    # A run that names no rate stands in the picture at the rate that it has.
    assert (tmp_path / "out" / "sweep.png").is_file()
    marks = {tuple(line.get_xdata()) for line in result.plot().axes[0].lines}
    assert any(usual.optimizer.learning_rate in xs for xs in marks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.train": "other.json"}, "data.train is given as an argument too"),
        ({"train.steps": 2}, "train.steps is given as an argument too"),
        ({"model.path": "other"}, "model.path"),
        ({"model.quantize": "int8"}, "model.quantize says how a model is loaded"),
        ({"optimizer.schedule": "linear"}, "optimizer.schedule is in config and in grid"),
        ({"adapter.rnak": 2}, "did you mean 'adapter.rank'"),
    ],
)
def test_every_dictionary_is_looked_through(folder, settings, message):
    model, tokenizer = mj.load_pretrained(str(folder / "model"), dtype="float32")
    with pytest.raises(InputError, match=message):
        sweep(model, [{"seed": 1}, {"seed": 2, **settings}], tokenizer=tokenizer)


@pytest.mark.slow
def test_a_key_that_one_of_the_runs_reads_is_not_called_ignored(folder, tmp_path, capsys):
    common = [
        f"--config.model.path={folder / 'model'}",
        f"--config.data.train={folder / 'rows.json'}",
        f"--config.out={tmp_path / 'out'}",
        "--config.train.steps=1",
        "--config.adapter.rank=2",
        "--config.loss.prompt_weight=0.5",
        "--config.loss.constant=2",
    ]
    assert main(["sweep", *common, "--sweep", "loss.mode=masked,weighted"]) == 0
    said = capsys.readouterr().err
    assert "prompt_weight" not in said
    assert "ignored: loss.constant" in said


def test_no_two_runs_have_one_name():
    base = lay_over(Config(), [("model.path", "m", "test"), ("data.train", ("d",), "test"), ("out", "out", "test")])
    paths = [("p1/x",), ("p2/x",), ("x_2",), ("X",), ("p3/x",)]
    settings = combinations({"data.train": paths})
    runs = expand(settings, lambda values: lay_over(base, [(*item, "test") for item in values.items()]), "out")
    names = [run.name for run in runs]
    assert len({name.casefold() for name in names}) == len(paths), names
    assert [run.config.data.train for run in runs] == paths


def test_a_run_that_a_callback_ends_keeps_its_own_weights(folder):
    model = str(folder / "model")

    def stop(row):
        return row.get("run", "seed=1") == "seed=1" and np.bool_(row["step"] >= 2)

    grid = {"seed": [1, 2]}
    settings = {"steps": 8, "config": KEYS | {"optimizer.learning_rate": 0.01}}
    ended, other = sweep(model, grid, callbacks=[stop], **settings).runs
    alone = mj.finetune(model, ROWS, LORA, callbacks=[stop], display=Display(io.StringIO()), **_seed(settings, 1))
    assert ended.summary["steps"] == alone.summary["steps"] < 8 == other.summary["steps"]
    np.testing.assert_allclose(losses(ended.metrics), losses(alone.metrics), rtol=1e-5)
    np.testing.assert_allclose(ended.model(IDS), alone.model(IDS), rtol=1e-4, atol=1e-5)
    whole = mj.finetune(model, ROWS, LORA, display=Display(io.StringIO()), **_seed(settings, 2))
    np.testing.assert_allclose(other.model(IDS), whole.model(IDS), rtol=1e-4, atol=1e-5)


def _seed(settings, seed):
    return settings | {"config": settings["config"] | {"seed": seed}}


@pytest.mark.slow
@pytest.mark.parametrize("written", [False, True])
def test_an_interrupt_gives_back_what_the_runs_have(folder, tmp_path, written):
    def interrupt(row):
        if row["run"] == "learning_rate=0.02" and row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    grid = {"optimizer.learning_rate": [0.01, 0.02], "adapter.rank": [2, 3]}
    out = tmp_path / "out" if written else None
    grid = [{"optimizer.learning_rate": 0.01}, {"optimizer.learning_rate": 0.02}, {"adapter.rank": 3}]
    result = sweep(str(folder / "model"), grid, steps=50, callbacks=[interrupt], out=out)
    assert result.exit_code == 130 and result.best is None
    *under_way, waiting = result.runs
    for run in under_way:
        assert run.summary == {} and run.failed is None
        assert 2 <= len(run.metrics) < 6 and run.metrics[0]["step"] == 1
        if written:
            assert run.model is None and (out / "runs" / run.name / "checkpoints").is_dir()
        else:
            assert adapter_norm(run.model) > 0
    assert waiting.metrics == [] and waiting.model is None
    if written:  # asked for again, but nothing is trained: what is in the folder is still given
        again = sweep(str(folder / "model"), grid, steps=50, out=out, callbacks=[lambda row: True], at_once=1)
        assert [row["step"] for row in again.runs[0].metrics][0] == 1


def test_weights_beyond_float32_are_no_loss_of_zero(folder, monkeypatch):
    heavy = [row | {"weight": 5e37} for row in ROWS]
    board = Board(io.StringIO())
    keys = KEYS | {"train.max_skipped": 9}
    with pytest.raises(InputError, match=r"row 1: `weight` is 5e\+37; expected a weight, a number from 0 to 1e\+15"):
        sweep(str(folder / "model"), {"seed": [1, 2]}, rows=heavy, board=board, config=keys)
    monkeypatch.setattr(validate, "MAX_WEIGHT", 3.4e38)
    result = sweep(str(folder / "model"), {"seed": [1, 2]}, rows=heavy, board=board, config=keys)
    for run in result.runs:
        assert all(loss is None or np.isnan(loss) for loss in losses(run.metrics))
        assert run.summary["final_loss"] is None
    assert result.best is None
    assert "the update is skipped" in board.stream.getvalue()
