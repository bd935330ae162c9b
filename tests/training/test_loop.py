"""The loop: what a run leaves behind, and that a run which was cut short ends as if it had not been."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mora_jax.errors import InputError
from mora_jax.evaluation.perplexity import score
from mora_jax.interop import load_pretrained
from mora_jax.training import build_step, loop
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display import Display
from mora_jax.training.step import make_step
from tests.evaluation import tiny

WORDS = ("red", "blue", "green", "black", "grey")
ROWS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS]
SUMMARY = {
    "method",
    "trainable_parameters",
    "total_parameters",
    "compilations",
    "compile_seconds",
    "tokens_per_second",
    "final_loss",
    "eval_perplexity",
    "wall_seconds",
    "peak_memory_bytes",
    "step_seconds",
    "data_wait_seconds",
    "host_seconds",
    "device_seconds",
    "mfu",
    "mfu_convention",
    "flops_per_token",
    "step_memory_bytes",
}
MEASURED = {
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "data_wait_seconds",
    "host_seconds",
    "device_seconds",
    "device_bytes",
    "device_peak_bytes",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    (folder / "rows.json").write_text(json.dumps(ROWS * 2))
    return folder


def config(inputs: Path, out: Path, **settings) -> Config:
    values = {
        "model.path": str(inputs / "model"),
        "model.dtype": "float32",
        "data.train": str(inputs / "rows.json"),
        "out": str(out),
        "train.steps": 6,
        "train.save_every": 2,
        "adapter.rank": 2,
        "adapter.dropout": 0.1,
        "adapter.targets": ("q_proj", "down_proj"),
        "train.eval_on_start": False,
        "mesh.data": 1,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return lay_over(Config(), [(name, value, "test") for name, value in values.items()])


class Interrupting(Display):
    """Raises a signal, or an error, when a step is shown."""

    def __init__(self, step: int, action):
        super().__init__(io.StringIO())
        self.at, self.action = step, action

    def step(self, row):
        super().step(row)
        if row["step"] == self.at:
            self.action()


def metrics(out: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def quiet() -> Display:
    return Display(io.StringIO())


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert loop.train(config(inputs, out), quiet()) == 0
    return out


def test_a_run_leaves_what_it_promises(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "compile.jsonl",
        "summary.json",
        "adapter",
        "checkpoints",
    }
    summary = json.loads((unbroken / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert summary["compilations"] == 1 and summary["method"] == "lora"
    assert summary["peak_memory_bytes"] > 10**7 and summary["compile_seconds"] > 0
    rows = metrics(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(rows[0]) == {"step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "skipped"}
    assert summary["final_loss"] == rows[-1]["loss"]
    weights = load_file(unbroken / "adapter" / "adapter_model.safetensors")
    assert sum(value.size for value in weights.values()) == summary["trainable_parameters"]
    assert any(np.abs(value).max() > 0 for name, value in weights.items() if "lora_B" in name)
    fields = json.loads((unbroken / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"].endswith("model")
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == ["4", "6"]


def same_as(unbroken: Path, out: Path) -> None:
    assert metrics(out) == metrics(unbroken)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (unbroken / name).read_bytes()


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2)), 5])
def test_a_killed_run_resumes_bit_for_bit(inputs, unbroken, tmp_path, step):
    def die():
        raise MemoryError("as good as a kill: nothing after this line runs")

    with pytest.raises(MemoryError):
        loop.train(config(inputs, tmp_path / "run"), Interrupting(step, die))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert loop.resume(str(tmp_path / "run"), quiet()) == 0
    same_as(unbroken, tmp_path / "run")


def test_a_run_goes_on_where_paths_and_devices_are_others(inputs, unbroken, tmp_path):
    def die():
        raise MemoryError("as good as a kill")

    shutil.copytree(inputs, tmp_path / "old")
    with pytest.raises(MemoryError):
        loop.train(config(tmp_path / "old", tmp_path / "run"), Interrupting(3, die))
    (tmp_path / "old").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="old/model"):
        loop.resume(str(tmp_path / "run"), quiet())
    changes = {"model.path": tmp_path / "moved" / "model", "data.train": tmp_path / "moved" / "rows.json"}
    changes |= {"mesh.data": 2, "mesh.fsdp": -1, "optimizer.offload": "true"}
    given = [(name, str(value)) for name, value in changes.items()]
    assert loop.resume(str(tmp_path / "run"), quiet(), changes=given) == 0
    rows, expected = metrics(tmp_path / "run"), metrics(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["mesh"]["data"], kept["mesh"]["fsdp"]) == (2, -1)
    assert kept["model"]["path"] == str(tmp_path / "moved" / "model")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_border_of_the_step(inputs, unbroken, tmp_path, number, code):
    display = Interrupting(3, lambda: os.kill(os.getpid(), number))
    assert loop.train(config(inputs, tmp_path / "run", train__save_every=0), display) == code
    assert "--resume" in display.stream.getvalue()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]
    resumed = quiet()
    assert loop.resume(str(tmp_path / "run"), resumed) == 0
    assert "step 4/6" not in resumed.stream.getvalue() and "step 5/6" in resumed.stream.getvalue()
    same_as(unbroken, tmp_path / "run")
    again = quiet()
    assert loop.resume(str(tmp_path / "run"), again) == 0
    assert "finished" in again.stream.getvalue()


class InterruptingEvaluation(Display):
    """Raises a signal in the evaluation that comes first, after its first batch."""

    def __init__(self, number: int, at: int):
        super().__init__(io.StringIO())
        self.number, self.at, self.seen = number, at, 0

    def progress(self, words, done, total):
        super().progress(words, done, total)
        self.seen += done <= 4
        if self.seen == self.at and done <= 4:
            os.kill(os.getpid(), self.number)


EVALUATED = {"train__save_every": 0, "train__eval_every": 3, "data__eval_fraction": 0.5, "train__keep_best": 1}


@pytest.fixture(scope="module")
def evaluated(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "evaluated"
    assert loop.train(config(inputs, out, **EVALUATED), quiet()) == 0
    return out


@pytest.mark.parametrize(("at", "step"), [pytest.param(1, 3, marks=pytest.mark.slow), (2, 6)])
def test_a_signal_ends_an_evaluation_which_is_made_up_for(inputs, evaluated, tmp_path, at, step):
    out = tmp_path / "run"
    display = InterruptingEvaluation(signal.SIGTERM, at)
    assert loop.train(config(inputs, out, **EVALUATED), display) == 143
    said = display.stream.getvalue()
    assert f"stopped after step {step}, before its evaluation; continue with --resume {out}" in said
    assert [row["step"] for row in metrics(out) if "eval_loss" in row] == [3, 6][: at - 1]
    assert str(step) in [path.name for path in (out / "checkpoints").iterdir()]
    assert loop.resume(str(out), quiet()) == 0
    same_as(evaluated, out)
    names = "best", "best_step", "best_eval_loss", "eval_loss"
    ended, whole = (json.loads((run / "summary.json").read_text()) for run in (out, evaluated))
    assert [ended[name] for name in names] == [whole[name] for name in names]


def test_a_signal_in_the_last_step_lets_the_run_finish(inputs, unbroken, tmp_path):
    display = Interrupting(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert loop.train(config(inputs, tmp_path / "run"), display) == 130
    assert "writing the result, then stopping; again to stop at once\n" in display.stream.getvalue()
    assert "\ndone: " in display.stream.getvalue()
    same_as(unbroken, tmp_path / "run")


def test_compiling_is_no_part_of_the_time_that_is_left(inputs, tmp_path):
    class Timed(Display):
        def __init__(self):
            super().__init__(io.StringIO())
            self.left = []

        def step(self, row):
            self.left.append(row["seconds_left"])

    display, out = Timed(), tmp_path / "run"
    assert loop.train(config(inputs, out, train__save_every=0), display) == 0
    seconds = [json.loads(line)["step_seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = [(6 - step) * np.mean(seconds[:step]) for step in range(1, 7)]
    np.testing.assert_allclose(display.left, expected, rtol=1e-6)
    assert display.left[0] < 5 * json.loads((out / "summary.json").read_text())["compile_seconds"]


def test_full_fine_tuning_leaves_a_model(inputs, tmp_path):
    settings = {"adapter__method": "full", "train__save_every": 0, "data__eval_fraction": 0.2, "train__eval_every": 3}
    out = tmp_path / "run"
    assert loop.train(config(inputs, out, **settings), quiet()) == 0
    assert (out / "model" / "config.json").is_file() and (out / "model" / "tokenizer.json").is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trainable_parameters"] == summary["total_parameters"]
    evaluations = [row for row in metrics(out) if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert evaluations[-1]["eval_perplexity"] == summary["eval_perplexity"]
    np.testing.assert_allclose(np.exp(evaluations[-1]["eval_loss"]), evaluations[-1]["eval_perplexity"], rtol=1e-6)


def test_epochs_end_with_a_short_batch_and_one_compilation(inputs, tmp_path):
    settings = {"train__steps": None, "train__epochs": 2, "train__save_every": 0, "train__log_every": 2}
    out = tmp_path / "run"
    assert loop.train(config(inputs, out, **settings), quiet()) == 0
    assert [row["step"] for row in metrics(out)] == [2, 4, 6]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["compilations"] == 1  # 10 rows in batches of 4, twice
    tokens = [row["tokens"] for row in metrics(out)]
    assert tokens[-1] < tokens[0]


def test_starting_from_an_adapter(inputs, unbroken, tmp_path):
    settings = {"adapter__path": str(unbroken / "adapter"), "train__save_every": 0}
    out = tmp_path / "run"
    assert loop.train(config(inputs, out, **settings), quiet()) == 0
    assert metrics(out)[0]["loss"] != metrics(unbroken)[0]["loss"]
    with pytest.raises(InputError, match=r"holds a lora adapter, but adapter\.method is mora"):
        loop.train(config(inputs, tmp_path / "x", **settings, adapter__method="mora"), quiet())
    assert not (tmp_path / "x").exists()


def test_a_used_directory_is_refused_or_replaced(inputs, unbroken, tmp_path):
    with pytest.raises(InputError, match="holds a run already .* --resume"):
        loop.train(config(inputs, unbroken), quiet())
    out = tmp_path / "run"
    out.mkdir()
    (out / "summary.json").write_text("{}")
    (out / "mine.txt").write_text("kept")
    assert loop.train(config(inputs, out, train__steps=1), quiet(), overwrite=True) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 1
    assert (out / "mine.txt").read_text() == "kept"


def test_nothing_is_written_when_the_input_is_bad(inputs, tmp_path):
    out = tmp_path / "run"
    for settings, words in [
        ({"adapter__targets": ("nope",)}, "match no layer"),
        ({"data__train": str(tmp_path / "absent.json")}, "absent.json"),
        ({"mesh__data": 3}, "3 devices can't share 4 rows"),
        ({"train__steps": None, "optimizer__warmup_steps": 50}, "warmup_steps=50 must be at most the run's 3 steps"),
    ]:
        with pytest.raises(InputError, match=words):
            loop.train(config(inputs, out, **settings), quiet())
        assert not out.exists()
    with pytest.raises(InputError, match="holds no run"):
        loop.resume(str(out), quiet())


def test_a_diverging_run_says_so(inputs, tmp_path, monkeypatch):
    def broken(*args, **settings):
        step = make_step(*args, **settings)

        def diverging(state, frozen, batch):
            state, metrics = step(state, frozen, batch)
            bad = jnp.maximum(state.step - 2, 0)
            metrics = metrics._replace(loss=jnp.where(bad > 0, jnp.nan, metrics.loss))
            return state, metrics._replace(skipped=bad, skipped_in_row=bad)

        return diverging

    monkeypatch.setattr(build_step, "make_step", broken)
    shown = quiet()
    with pytest.raises(InputError, match="the loss is nan at step 5, number 3 in a row .*: lower optimizer.learning_r"):
        loop.train(config(inputs, tmp_path / "run"), shown)
    assert (
        "step 4: the loss is nan; the update is skipped (2 in a row of at most 3, 2 in all)" in shown.stream.getvalue()
    )
    assert [(row["loss"], row["skipped"]) for row in metrics(tmp_path / "run")][2:] == [(None, 1), (None, 2)]


def test_pmap_gives_the_same_losses(inputs, tmp_path):
    losses = []
    for name, settings in {"jit": {}, "pmap": {"mesh__pmap": True}}.items():
        settings |= {"mesh__data": 2, "adapter__dropout": 0.0, "train__steps": 3}
        assert loop.train(config(inputs, tmp_path / name, **settings), quiet()) == 0
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_the_first_example_is_shown_with_its_weights(inputs, tmp_path):
    setup = loop.prepare(config(inputs, tmp_path / "run"))
    info = setup.info(3, "runs/a", "xla")
    trained = "".join(text for text, weight in info.first_example if weight > 0)
    assert any(trained.startswith(row["output"]) for row in ROWS)
    attached, share = setup.attached, setup.train.report.trained_fraction
    assert info.facts["model"].endswith("(float32, attention by xla)") and info.facts["out"] == "runs/a"
    assert info.facts["method"] == "lora, rank 2, alpha 16 on 2 layers"
    assert info.facts["trained"].startswith(f"{attached.trainable:,} of {attached.total:,} parameters (")
    assert info.facts["loss"] == f"masked, divided by the sum of weights: {share:.1%} of the tokens carry loss"
    assert info.facts["data"].endswith(", continuing after step 3") and (info.first_step, info.steps) == (3, 6)


def test_a_run_says_what_its_base_scores_where_that_is_cheap(inputs, tmp_path):
    """1 of 10 rows is held out: at most a quarter of 6 steps of 4 rows, and more than a quarter of one step of 2."""
    settings = {
        "data__eval_fraction": 0.1,
        "train__save_every": 0,
        "adapter__dropout": 0.0,
        "train__eval_on_start": None,
    }
    out = tmp_path / "run"
    assert loop.train(config(inputs, out, **settings), quiet()) == 0
    first, *others = metrics(out)
    assert first["step"] == 0 and "loss" not in first
    model, _ = load_pretrained(inputs / "model", dtype="float32")
    held_out = loop.prepare(config(inputs, out, **settings)).evaluation
    np.testing.assert_allclose(first["eval_loss"], score(model, held_out, batch_size=1).nll, rtol=1e-5)
    assert [row["step"] for row in others if "eval_loss" in row] == [6]
    few = {"train__steps": 1, "train__batch_size": 2}
    for asked, steps in ((None, [1]), (True, [0, 1])):
        out = tmp_path / f"{asked}"
        assert loop.train(config(inputs, out, **settings | few | {"train__eval_on_start": asked}), quiet()) == 0
        assert [row["step"] for row in metrics(out) if "eval_loss" in row] == steps


def test_a_resumed_run_says_of_which_steps_its_figures_are(inputs, tmp_path, monkeypatch):
    out, shown = tmp_path / "run", quiet()
    assert loop.train(config(inputs, out), Interrupting(4, lambda: os.kill(os.getpid(), signal.SIGTERM))) == 143
    assert loop.resume(str(out), shown) == 0
    assert json.loads((out / "summary.json").read_text())["resumed_after"] == 5
    assert " from step 5 on (" in shown.stream.getvalue()
    # A process that has no step to do says nothing of its speed.
    (out / "summary.json").unlink()
    again = quiet()
    assert loop.resume(str(out), again) == 0
    assert json.loads((out / "summary.json").read_text())["tokens_per_second"] is None
    done = again.stream.getvalue().partition("done: ")[2]
    assert done and "tokens/s" not in done and "FLOP/s" not in done and " from step 6 on (" in done


def test_another_evaluation_set_in_mid_run_is_refused(inputs, tmp_path):
    """The same rows may lie elsewhere; others would make two sets of one curve, and of the best checkpoint."""
    held_out, moved, other = (tmp_path / f"{name}.json" for name in ("held_out", "moved", "other"))
    for path, rows in ((held_out, ROWS[:2]), (moved, ROWS[:2]), (other, ROWS[2:4])):
        path.write_text(json.dumps(rows))
    out = tmp_path / "run"
    begun = Interrupting(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert loop.train(config(inputs, out, data__eval=str(held_out)), begun) == 143
    before = (out / "config.json").read_text(), (out / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="the checkpoint was written with evaluation data"):
        loop.resume(str(out), quiet(), changes=[("data.eval", str(other))])
    assert ((out / "config.json").read_text(), (out / "metrics.jsonl").read_text()) == before
    assert loop.resume(str(out), quiet(), changes=[("data.eval", str(moved))]) == 0
