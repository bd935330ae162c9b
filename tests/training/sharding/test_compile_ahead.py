"""With buckets the step is compiled for lengths to come while it runs for those that are there."""

import io
import json
import threading
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.demo import model_path
from mora_jax.training import loop
from mora_jax.training.config.load import config_from_dict
from mora_jax.training.display import Display
from mora_jax.training.sharding.runner import Runner


class Product(Runner):
    """The product of a batch with the state, which stays; compiling waits until it may, and notes its thread."""

    devices: ClassVar[list] = jax.devices()[:1]

    def __init__(self):
        super().__init__()
        self.may, self.threads = threading.Event(), dict[str, str]()

    def lower(self, state, frozen, batch):
        return jax.jit(lambda state, frozen, batch: (state, state @ batch["input_ids"])).lower(state, frozen, batch)

    def _compile(self, lowered, seconds, shapes):
        self.threads[shapes["input_ids"]] = threading.current_thread().name
        if threading.current_thread() is not threading.main_thread():
            assert self.may.wait(60)
        if shapes["input_ids"] == "float32[4,13]":
            raise MemoryError("thirteen columns")
        return super()._compile(lowered, seconds, shapes)


def batches(*lengths):
    return iter([{"input_ids": jnp.full((4, length), length, jnp.float32)} for length in lengths])


def test_lengths_to_come_are_compiled_beside_the_steps_in_their_order():
    runner, state = Product(), jnp.eye(4)
    runner._compilers = 1
    to_come = batches(5, 7, 5, 8)
    for length in (5, 6):
        _, result = runner(state, {}, *batches(length))
        runner.compile_ahead(state, {}, to_come)
        np.testing.assert_array_equal(result, np.full((4, length), length))
    # The first two were needed at once; beside them 7 was begun, so that nothing is for 8.
    assert [runner.threads[f"float32[4,{length}]"] for length in (5, 6)] == ["MainThread"] * 2
    assert [shape for ((_, shape),) in runner._ahead] == [(4, 7)]
    assert [batch["input_ids"].shape[1] for batch in to_come] == [5, 8]
    runner.may.set()
    np.testing.assert_array_equal(runner(state, {}, *batches(7))[1], np.full((4, 7), 7))
    assert "MainThread" not in runner.threads["float32[4,7]"]
    assert [one.shapes["input_ids"] for one in runner.compilation_log] == [f"float32[4,{n}]" for n in (5, 6, 7)]
    assert [list(one.changed) for one in runner.compilation_log[1:]] == [
        ["input_ids: float32[4,5] -> float32[4,6]"],
        ["input_ids: float32[4,6] -> float32[4,7]"],
    ]
    said = []
    runner.close(said.append)
    assert said == []


def test_the_callers_settings_of_jax_hold_for_what_a_thread_compiles():
    runner, state = Product(), jnp.eye(4)
    runner.may.set()
    with jax.default_matmul_precision("highest"):
        runner.compile_ahead(state, {}, batches(9))
        runner(state, {}, *batches(9))
    assert "MainThread" not in runner.threads["float32[4,9]"]
    assert "operand_precision={highest,highest}" in runner.compiled[0].as_text()


def test_what_fails_in_a_thread_fails_where_it_is_needed():
    runner, state = Product(), jnp.eye(4)
    runner.compile_ahead(state, {}, batches(13))
    runner(state, {}, *batches(5))
    said = []
    threading.Timer(0.2, runner.may.set).start()
    runner.close(said.append)
    assert said == ["waiting for the compiler"]
    with pytest.raises(MemoryError, match="thirteen columns"):
        runner(state, {}, *batches(13))


@pytest.mark.parametrize(
    "mesh", [{}, pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow), {"data": 2, "pmap": True}]
)
def test_a_run_with_buckets_ends_the_same(tmp_path, monkeypatch, mesh):
    rows = [{"instruction": f"Say {i}", "output": "so " * (1 + 20 * i)} for i in range(12)]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    threads = []
    compile_step = Runner._compile

    def noted(runner, *arguments):
        threads.append(threading.current_thread() is threading.main_thread())
        return compile_step(runner, *arguments)

    def run(name):
        settings = {
            "model": {"path": str(model_path())},
            "data": {"train": str(data), "bucketing": True, "max_length": 256},
            "train": {"steps": 8, "batch_size": 2},
            "mesh": mesh,
            "log": {"compilation_cache": "off"},
            "out": str(tmp_path / name),
        }
        display = Display(io.StringIO())
        assert loop.train(config_from_dict(settings), display) == 0
        read = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in read]
        weights = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        compiled = [json.loads(line) for line in (tmp_path / name / "compile.jsonl").read_text().splitlines()]
        return losses, weights, compiled, json.loads((tmp_path / name / "summary.json").read_text()), display

    monkeypatch.setattr(Runner, "_compile", noted)
    *beside, compiled, summary, display = run("beside")
    assert threads[0] and threads.count(False) >= 1
    steps = [row for row in compiled if row["what"] == "training step"]
    # No program of a thread is taken for another than the step.
    assert len(steps) == len(threads) == summary["compilations"] >= 3
    assert not [row for row in compiled if "step" in row["what"] and row["what"] != "training step"]
    assert summary["compile_seconds"] == pytest.approx(sum(row["waited_seconds"] for row in steps))
    monkeypatch.setattr(Runner, "compile_ahead", lambda *arguments: None)
    threads.clear()
    alone = run("alone")
    assert all(threads) and list(alone[:2]) == beside
