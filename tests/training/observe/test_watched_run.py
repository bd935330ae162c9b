"""A run with every writer and a trace, killed and resumed: each place holds each step once."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import jax
import pytest

from mora_jax.errors import InputError
from mora_jax.training import loop
from mora_jax.training.config.schema import Config
from mora_jax.training.observe import writers
from tests.evaluation import tiny
from tests.training.test_loop import ROWS, Interrupting, config, quiet

STEPS = [1, 2, 3, 4, 5, 6]
LOGGED = {"log__tensorboard": True, "log__wandb": "tests", "log__profile_first": 2, "log__profile_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    (folder / "rows.json").write_text(json.dumps(ROWS * 2))
    return folder


@pytest.fixture(scope="module")
def watched(inputs, tmp_path_factory) -> tuple[Path, str]:
    """The run's directory, and what its first process said."""
    out = tmp_path_factory.mktemp("runs") / "watched"

    def die():
        raise MemoryError("as good as a kill")

    display = Interrupting(4, die)  # step 4's checkpoint is not there yet, that of step 2 is
    settings = config(inputs, out, **LOGGED, data__eval_fraction=0.2)
    with pytest.raises(MemoryError):
        loop.train(settings, display)
    assert len(list((out / "wandb").glob("offline-run-*"))) == 1
    time.sleep(1 - time.time() % 1)  # jax names traces by the second
    assert loop.resume(str(out), quiet()) == 0
    return out, display.stream.getvalue()


def rows(out: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / file).read_text().splitlines()]


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = watched
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert [event.step for event in found.Scalars("train/loss")] == STEPS
    trained = {row["step"]: row["loss"] for row in rows(out) if "loss" in row}
    assert losses == pytest.approx(trained, rel=1e-6)
    tags = set(found.Tags()["scalars"])
    assert {"eval/loss", "speed/tokens_per_second", "speed/device_seconds"} <= tags
    assert "speed/mfu" not in tags  # unknown here, and no number stands for that
    assert {"config/text_summary", "summary/text_summary"} <= set(found.Tags()["tensors"])


def wandb_records(file: Path):
    """The records of a `.wandb` file: a header of 7 bytes, then LevelDB's log format (blocks of 32 kB, each piece
    behind 4 bytes of checksum, 2 of length and 1 of kind: whole, first, middle, last)."""
    from wandb.proto import wandb_internal_pb2 as proto

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = proto.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_has_one_run_with_each_step_once(watched):
    out, _ = watched
    (folder,) = (out / "wandb").glob("offline-run-*")
    run_id = json.loads((out / "wandb.json").read_text())["id"]
    records = list(wandb_records(folder / f"run-{run_id}.wandb"))
    (run,) = {record.run.run_id for record in records if record.HasField("run")}
    assert run == run_id
    losses = {}
    for record in records:
        items = {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            step = record.history.step.num
            assert step not in losses
            losses[step] = items["train/loss"]
    assert losses == {row["step"]: row["loss"] for row in rows(out) if "loss" in row}
    summary = {item.key for record in records for item in record.summary.update}
    assert {"final_loss", "host_seconds"} <= summary


def traced_steps(file: Path) -> set[int]:
    """The numbers of the steps in a trace. Its reader makes classes at the first use, of which newer Pythons warn, and
    aborts the process where that warning is an error."""
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    return {dict(event.stats)["step_num"] for event in events if event.name == "train"}


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_the_trace_holds_the_steps_that_were_asked_for(watched):
    out, said = watched
    first, resumed = sorted((out / "profile").rglob("*.xplane.pb"))
    assert traced_steps(first) == {2, 3}
    assert traced_steps(resumed) == {3}  # step 2 was done already
    assert f"trace of steps 2 to 3 written; open it with: xprof --logdir {out / 'profile'}" in said


def test_the_parts_of_a_step_make_up_its_time(watched):
    out, _ = watched
    for row in rows(out):
        if "loss" not in row:
            continue
        parts = [row[f"{part}_seconds"] for part in ("data_wait", "host", "device")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(row["step_seconds"])
        assert row["tokens"] / row["step_seconds"] == pytest.approx(row["tokens_per_second"])
        assert row["mfu"] is None and row["device_bytes"] is None  # a CPU tells neither
    summary = json.loads((out / "summary.json").read_text())
    resumed = sum(row["step_seconds"] for row in rows(out) if "loss" in row and row["step"] > 2)
    assert summary["step_seconds"] == pytest.approx(resumed)
    assert summary["flops_per_token"] > summary["trainable_parameters"] * 6
    assert set(summary["open"]) == {"TensorBoard", "Weights & Biases", "XProf"}


def test_the_compile_log_tells_what_and_for_what_shapes(watched):
    out, said = watched
    steps = [row for row in rows(out, "compile.jsonl") if row["what"] == "training step"]
    assert len(steps) == 2  # one in each process
    for row in steps:
        assert row["seconds"] > row["lower_seconds"] > 0 and row["changed"] == []
        assert row["shapes"]["input_ids"].startswith("int32[1,4,")
        assert row["memory_bytes"]["total"] > row["memory_bytes"]["temporary"] > 0
    assert "compiled the training step in" in said and "a device" in said


def test_a_missing_package_is_named_before_anything_is_written(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    for setting, words in [
        ({"log__tensorboard": True}, r"log.tensorboard needs the package tensorboardX: pip install 'mora-jax\[tens"),
        ({"log__wandb": "p"}, r"log.wandb needs the package wandb: pip install 'mora-jax\[wandb\]'"),
    ]:
        with pytest.raises(InputError, match=words):
            loop.train(config(inputs, tmp_path / "run", **setting), quiet())
    with pytest.raises(InputError, match="profile_first=7 must be at most the run's 6 steps"):
        loop.train(config(inputs, tmp_path / "run", log__profile_first=7, log__profile_steps=1), quiet())
    assert not (tmp_path / "run").exists()
    writers.check_writers(Config())  # no writer, nothing missing


def test_going_online_needs_a_login(inputs, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "login", lambda **settings: False)
    with pytest.raises(InputError, match=r"nobody is logged in.*log\.wandb_mode=offline"):
        loop.train(config(inputs, tmp_path / "run", log__wandb="p", log__wandb_mode="online"), quiet())
    assert not (tmp_path / "run").exists()
