"""`finetune`: the loop of the command on rows and models in memory."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import datasets
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.errors import InputError
from mora_jax.training import loop
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display import Display
from mora_jax.training.run.publish import model_card
from tests.evaluation import tiny

ROWS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in ("red", "blue", "green", "black")] * 2
# A schedule that does not depend on the number of steps: runs of any length share a compiled step.
COMMON = {"mesh.data": 1, "optimizer.schedule": "constant"}
KEYS = {"model.dtype": "float32", **COMMON}
CONFIG = mj.LoRAConfig(rank=2, dropout=0.1, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    tiny.save_folder(path)
    return path


def quiet() -> Display:
    return Display(io.StringIO())


def tune(model, rows=ROWS, adapter=CONFIG, keys=None, **settings):
    loaded = KEYS if isinstance(model, str | os.PathLike) else COMMON
    settings = {"display": quiet(), "steps": 4, "config": loaded | (keys or {})} | settings
    return mj.finetune(model, rows, adapter, **settings)


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def result(model_path):
    return tune(model_path, eval_rows=ROWS[:2], keys={"train.eval_every": 2})


def test_the_same_losses_as_the_command(model_path, result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("held_out.json").write_text(json.dumps(ROWS[:2]))
    values = {
        **KEYS,
        "model.path": str(model_path),
        "data.train": "rows.json",
        "data.eval": "held_out.json",
        "train.eval_every": 2,
        "out": "runs/a",
        "train.steps": 4,
        "adapter.rank": 2,
        "adapter.dropout": 0.1,
        "adapter.targets": ("q_proj", "down_proj"),
    }
    config = lay_over(Config(), [(name, value, "test") for name, value in values.items()])
    assert loop.train(config, quiet()) == 0
    rows = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert losses(rows) == losses(result.metrics)
    scores = [[row["eval_loss"] for row in of if "eval_loss" in row] for of in (rows, result.metrics)]
    assert scores[0] == scores[1] and len(scores[0]) == 3  # the base is scored too
    summary = json.loads(Path("runs/a/summary.json").read_text())
    assert summary["final_loss"] == result.summary["final_loss"]
    saved = mj.load_pretrained(model_path, dtype="float32")[0]
    mj.load_adapter(saved, "runs/a/adapter")
    ids = np.array([[1, 2, 3, 4]])
    result.model.eval()
    np.testing.assert_allclose(saved(ids), result.model(ids), atol=1e-5)


def test_writes_nothing_without_out(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path / "cache"))
    found = tune(model_path, rows=[*ROWS, ROWS[0]], steps=1)
    assert found.out is None and found.summary["result"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_trained_in_place_and_trained_on(model_path, result):
    model, tokenizer = mj.load_pretrained(model_path, dtype="float32")
    base = np.array(model.embed_tokens.embedding[...])
    found = tune(model, tokenizer=tokenizer)
    assert found.model is model
    assert losses(found.metrics) == losses(result.metrics)
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(nnx.state(model, mj.AdapterParam)))
    np.testing.assert_array_equal(model.embed_tokens.embedding[...], base)
    again = tune(model, adapter=None, steps=2)
    assert again.config.adapter.rank == 2
    assert again.metrics[0]["loss"] != found.metrics[0]["loss"]
    with pytest.raises(InputError, match="the model carries adapters already"):
        tune(model)


def test_what_is_said_of_an_adapter_that_a_run_starts_from_is_its_own(model_path, tmp_path):
    model = mj.load_pretrained(model_path, dtype="float32")[0]
    mj.attach(model, mj.LoRAConfig(rank=3, alpha=9, targets=("q_proj", "down_proj")), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "start")
    shown = io.StringIO()
    keys = {"adapter.path": str(tmp_path / "start")}
    found = tune(model_path, adapter=None, keys=keys, steps=1, display=Display(shown))
    words = "lora, rank 3, alpha 9"
    assert f"{words} on " in shown.getvalue() and found.summary["method_settings"] == words
    assert f"| method | {words} |" in model_card(found.config, found.summary, "me/tuned")


def test_full_fine_tuning_goes_on(model_path):
    model, _ = mj.load_pretrained(model_path, dtype="float32")
    first = tune(model, adapter=mj.FullConfig(), steps=2)
    again = tune(model, adapter=mj.FullConfig(), steps=1)
    assert again.summary["trainable_parameters"] == first.summary["trainable_parameters"]
    assert again.metrics[0]["loss"] < first.metrics[0]["loss"]
    assert tune(model, adapter=None, steps=1).config.adapter.method == "full"


def test_saves_what_was_trained(result, model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result.save("adapter")
    with pytest.raises(InputError, match="overwrite"):
        result.save("adapter")
    result.save("adapter", overwrite=True)
    model = mj.load_pretrained(model_path, dtype="float32")[0]
    mj.load_adapter(model, "adapter")
    full = tune(model_path, adapter=mj.FullConfig(), steps=1)
    full.save("whole")
    ids = np.array([[1, 2, 3, 4]])
    np.testing.assert_allclose(mj.load_pretrained("whole", dtype="float32")[0](ids), full.model(ids), atol=1e-5)


def test_plots(result, tmp_path):
    figure = result.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for that hasn't imported pyplot
    training, held_out = figure.axes[0].lines
    assert list(training.get_ydata()) == losses(result.metrics)
    assert list(held_out.get_xdata()) == [0, 2, 4]
    with pytest.raises(InputError, match="cannot be written"):
        result.plot(tmp_path / "missing" / "loss.png")


def test_callbacks_see_every_row_and_can_end_the_training(model_path):
    seen = []
    found = tune(model_path, steps=50, eval_rows=ROWS[:2], callbacks=[seen.append, lambda row: row["step"] >= 2])
    assert found.summary["steps"] < 5 and not found.interrupted
    assert seen == found.metrics
    assert "eval_loss" in seen[-1]
    # The last step is logged, whatever log_every says.
    found = tune(model_path, steps=50, callbacks=[lambda row: row["step"] >= 3], keys={"train.log_every": 3})
    assert [row["step"] for row in found.metrics] == [3, found.summary["steps"]]


def test_an_interrupt_gives_back_what_was_trained(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupt(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    found = tune(model_path, steps=50, callbacks=[interrupt], out="runs/b", keys={"train.save_every": 100})
    assert found.interrupted and found.summary == {}
    assert 2 <= len(found.metrics) < 6
    assert list(Path("runs/b/checkpoints").iterdir())
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(nnx.state(found.model, mj.AdapterParam)))


def test_the_model_given_back_is_that_of_the_last_step(model_path, tmp_path):
    """Also where an earlier checkpoint is the best one: `best` holds that."""
    keys = {"train.eval_every": 1, "train.keep_best": 1, "optimizer.learning_rate": 0.3, "train.save_every": 1}
    eval_rows = [{"instruction": "Say grey", "input": "", "output": "zzz"}]
    found = tune(model_path, keys=keys, eval_rows=eval_rows, out=tmp_path / "run", steps=3)
    assert found.summary["best_step"] < 3 and found.summary["best"] == "best"
    last, best = (mj.load_pretrained(model_path, dtype="float32")[0] for _ in range(2))
    mj.load_adapter(last, tmp_path / "run" / "adapter")
    mj.load_adapter(best, tmp_path / "run" / "best")
    ids = np.array([[1, 2, 3, 4]])
    np.testing.assert_allclose(found.model(ids), last(ids), atol=1e-5)
    assert np.abs(found.model(ids) - best(ids)).max() > 1e-3


def test_a_run_that_fails_leaves_the_model_that_was_given_in_order(model_path):
    """The steps took over its arrays."""
    model, tokenizer = mj.load_pretrained(model_path, dtype="float32")
    keys = {"train.max_skipped": 1, "optimizer.learning_rate": 10.0, "optimizer.weight_decay": 1e38}
    with pytest.raises(InputError, match="lower optimizer.learning_rate"):
        tune(model, keys=keys, tokenizer=tokenizer, steps=8)
    assert model(np.array([[1, 2, 3, 4]])).shape == (1, 4, 261)


def test_restarts_end_in_a_plain_model(model_path):
    found = tune(model_path, adapter=mj.ReLoRAConfig(rank=2, restart_every=2, restart_warmup=1, targets=("down_proj",)))
    assert found.summary["restarts"] == 1
    with pytest.raises(ValueError, match="nothing to train"):
        mj.partition(found.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": None}, "adapter_config is missing"),
        ({"adapter": 3}, "should be one of a method, such as LoRAConfig"),
        ({"rows": []}, "rows is empty"),
        ({"rows": [3]}, "one is int"),
        ({"rows": {"instruction": "a"}}, "put it into a list"),
        ({"rows": datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}]))}, "take a split, 'train'"),
        ({"callbacks": print}, "a list of functions"),
        ({"learning_rate": optax.constant_schedule(1e-3)}, r"optimizer=optax.adamw\(schedule\)"),
        ({"rows": [{"colour": "red"}]}, "rows in memory, row 1"),
        ({"rows": "absent.json"}, "no such data file: .*absent.json"),
        ({"learning_rate": "1e-3"}, "^optimizer.learning_rate must be a number"),
        ({"model": 3}, "model should be a path"),
        ({"adapter": mj.LoRAConfig(rank=2, init="eva")}, "init"),
    ],
)
def test_bad_input_is_refused_in_one_line(model_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        tune(change.pop("model", model_path), **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train.stepz": 3}, "did you mean 'train.steps'"),
        ({"train.steps": 3}, "train.steps is given as an argument too"),
        ({"train.save_every": 3}, "train.save_every writes files"),
        ({"log.tensorboard": True}, "log.tensorboard writes files"),
    ],
)
def test_keys_are_those_of_the_command(model_path, keys, message):
    with pytest.raises(InputError, match=message):
        mj.finetune(model_path, ROWS, CONFIG, steps=1, config=keys, display=quiet())


def test_tables_and_iterators_of_rows(model_path, result):
    class Table:
        columns = ("instruction", "input", "output")

        def to_dict(self, orient):
            assert orient == "records"
            return ROWS

    found = tune(model_path, rows=Table(), steps=1)
    assert found.metrics[0]["loss"] == pytest.approx(losses(result.metrics)[0])
    assert tune(model_path, rows=iter(ROWS), steps=1).metrics[0]["loss"] == found.metrics[0]["loss"]


def chain():
    """What `optimizer.name=adamw` is with a constant rate, its rate in its state."""
    rate = optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(2e-4), weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), rate)


def test_an_optax_object_trains_as_the_optimizer_that_it_is(model_path, result):
    keys = {name: value for name, value in KEYS.items() if not name.startswith("optimizer.")}
    ours = mj.finetune(model_path, ROWS, CONFIG, optimizer=chain(), steps=4, config=keys, display=quiet())
    np.testing.assert_allclose(losses(ours.metrics), losses(result.metrics), rtol=1e-5)
    assert ours.metrics[0]["learning_rate"] == pytest.approx(2e-4)
    assert ours.config.optimizer.name == "object"


def test_optimizers_get_the_loss_and_the_gradients(model_path):
    def scaled(updates, state, params=None, *, value, grad, **_):
        return jax.tree.map(lambda u, g: -(u + value * g), updates, grad), state

    rule = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scaled)
    keys = {name: value for name, value in KEYS.items() if not name.startswith("optimizer.")}

    def losses_of(optimizer):
        found = mj.finetune(model_path, ROWS, CONFIG, optimizer=optimizer, steps=2, config=keys, display=quiet())
        return losses(found.metrics)

    ours = losses_of(optax.chain(rule, optax.scale(1e-2)))
    np.testing.assert_allclose(ours, losses_of(optax.sgd(1e-2 * (1 + ours[0]))), rtol=1e-5)
    assert ours[1] != pytest.approx(losses_of(optax.sgd(1e-2))[1], rel=1e-4)


def test_an_optimizer_that_keeps_the_parameters_themselves(model_path):
    keys = {name: value for name, value in KEYS.items() if not name.startswith("optimizer.")}
    keep = optax.GradientTransformation(
        lambda params: (params, params), lambda updates, state, params=None: (updates, state)
    )
    plain, found = (
        mj.finetune(model_path, ROWS, CONFIG, optimizer=optimizer, steps=2, config=keys, display=quiet())
        for optimizer in (optax.sgd(1e-2), optax.chain(keep, optax.sgd(1e-2)))
    )
    np.testing.assert_allclose(losses(found.metrics), losses(plain.metrics), rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "words"), [(optax.lbfgs(), "'value_fn'"), (optax.lookahead(optax.sgd(0.1), 2, 0.5), "'fast'")]
)
def test_optimizers_that_need_more_are_refused(optimizer, words, model_path):
    with pytest.raises(mj.InputError, match=f"the optimizer doesn't work on a dictionary of arrays .*{words}"):
        mj.finetune(model_path, ROWS, CONFIG, optimizer=optimizer, steps=2, config={}, display=quiet())


def test_a_run_with_an_optax_object_goes_on_bit_for_bit(model_path, tmp_path):
    keys = {name: value for name, value in KEYS.items() if not name.startswith("optimizer.")}
    rate = optax.linear_schedule(1e-2, 0.0, 4)
    settings = {"steps": 4, "config": keys | {"train.save_every": 2}, "display": quiet()}
    adapter = mj.LoRAPlusConfig(rank=2, lr_ratio=4.0, dropout=0.1, targets=("q_proj",))

    def tune_into(name, **options):
        options |= {"optimizer": optax.chain(optax.scale_by_lion(), optax.scale_by_learning_rate(rate))} | options
        return mj.finetune(model_path, ROWS, adapter, out=tmp_path / name, **settings | options)

    whole = tune_into("whole", resume=True)

    def die(row):
        if row["step"] == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        tune_into("cut", callbacks=[die])
    with pytest.raises(InputError, match="finetune"):
        loop.resume(str(tmp_path / "cut"), quiet())
    with pytest.raises(InputError, match="optimizer's state"):
        tune_into("cut", resume=True, optimizer=optax.adam(rate))
    with pytest.raises(InputError, match="seed=1 would make another run"):
        tune_into("cut", resume=True, config=settings["config"] | {"seed": 1})
    rest = tune_into("cut", resume=True)
    assert [row["step"] for row in rest.metrics if "loss" in row] == [1, 2, 3, 4]
    for one, other in zip(
        jax.tree.leaves(mj.partition(whole.model)[1]), jax.tree.leaves(mj.partition(rest.model)[1]), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match="finished"):
        tune_into("cut", resume=True)


@pytest.mark.parametrize(
    "adapter, options, words",
    [
        (CONFIG, {"learning_rate": 1e-3}, "own settings"),
        (CONFIG, {"config": {"optimizer.clip_norm": 2.0}}, "own settings"),
        (mj.ReLoRAConfig(rank=2, restart_every=2, restart_warmup=0), {}, "rise again"),
        (CONFIG, {"optimizer": "adamw"}, "an object of optax, not 'adamw'; .*optimizer.name"),
    ],
)
def test_what_an_optax_object_cannot_be_beside_is_refused(model_path, adapter, options, words):
    with pytest.raises(InputError, match=words):
        mj.finetune(model_path, ROWS, adapter, **{"optimizer": chain(), "steps": 4, "display": quiet()} | options)
