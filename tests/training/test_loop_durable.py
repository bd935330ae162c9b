"""What a run does about the best of its states, a step that hangs, and a folder that takes no more."""

import dataclasses
import errno
import io
import json
import os
import shutil
import tempfile
import time

import pytest

from mora_jax.errors import InputError
from mora_jax.interop.peft import save
from mora_jax.training import evaluator, loop
from mora_jax.training.display import Display
from mora_jax.training.run import storage
from tests.evaluation import tiny
from tests.training.test_loop import ROWS, Interrupting, config, metrics, quiet

SETTINGS = {
    "data__eval_fraction": 0.2,
    "train__eval_every": 2,
    "train__save_every": 0,
    "train__keep_best": 1,
    "optimizer__schedule": "constant",
}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    (folder / "rows.json").write_text(json.dumps(ROWS * 2))
    return folder


@pytest.fixture
def losses(monkeypatch):
    """Evaluation losses to come, in place of real ones."""
    given = []

    def score(*args, **settings):
        return dataclasses.replace(real(*args, **settings), nll=given.pop(0))

    real = evaluator.score
    monkeypatch.setattr(evaluator, "score", score)
    return given


def wait_for(file, words):
    for _ in range(300):
        if file.exists() and words in file.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{words!r} never came to be in {file}")


def test_the_best_state_is_kept_and_written(inputs, tmp_path, losses):
    losses += [3.0, 1.0, 2.0]
    out = tmp_path / "run"
    # Step 3 is shown in the midst of step 4, which therefore hangs.
    display = Interrupting(3, lambda: wait_for(out / "hangs.txt", "step 4 has not ended"))
    assert loop.train(config(inputs, out, **SETTINGS, train__watchdog_seconds=2.0), display) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [summary[name] for name in ("best_step", "best_eval_loss", "best", "eval_loss")] == [4, 1.0, "best", 2.0]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "4"]
    # A run of so many steps has learnt just that.
    losses += [3.0, 1.0]
    short = tmp_path / "short"
    assert loop.train(config(inputs, short, **SETTINGS, train__steps=4), quiet()) == 0
    assert (out / "best" / ADAPTER).read_bytes() == (short / "adapter" / ADAPTER).read_bytes()
    assert (out / "best" / ADAPTER).read_bytes() != (out / "adapter" / ADAPTER).read_bytes()
    assert json.loads((short / "summary.json").read_text())["best"] == "adapter" and not (short / "best").exists()
    # The hang stands on stderr and in the folder, with what the threads were doing.
    report = (out / "hangs.txt").read_text()
    assert report.count("step 4 has not ended after") == 1 and "in run" in report
    assert report.split("\n\n")[0] in display.stream.getvalue()
    assert not (short / "hangs.txt").exists()


def test_a_run_killed_at_its_very_end_knows_what_came_before(inputs, tmp_path, losses, monkeypatch):
    losses += [3.0, 1.0]
    out = tmp_path / "run"
    settings = SETTINGS | {"train__steps": 4, "adapter__method": "full"}
    real = loop.RunDirectory.write_json

    def die(self, name, values):
        if name == "summary.json":
            raise MemoryError("as good as a kill")
        real(self, name, values)

    monkeypatch.setattr(loop.RunDirectory, "write_json", die)
    with pytest.raises(MemoryError):
        loop.train(config(inputs, out, **settings), quiet())
    monkeypatch.setattr(loop.RunDirectory, "write_json", real)
    assert (out / "model" / "model.safetensors").is_file() and not (out / "summary.json").exists()
    assert loop.resume(str(out), quiet()) == 0
    summary = json.loads((out / "summary.json").read_text())
    rows = [row for row in metrics(out) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (summary["final_loss"], summary["eval_loss"], summary["best_step"]) == (rows[-1]["loss"], 1.0, 4)


def test_a_disk_that_takes_no_metrics_ends_the_run_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "sleep", lambda seconds: None)
    directory = loop.RunDirectory(tmp_path)
    directory.append_metrics([{"step": 1, "loss": 2.0}])
    before = (directory.path / "metrics.jsonl").read_text()
    shown = Display(io.StringIO())
    directory.files.note = shown.note
    # The one device that is always full.
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"full can't be written: No space left on device \(4 tries\); make room"):
        directory.files.append("full", "a line\n")
    assert shown.stream.getvalue().count("No space left on device; trying again in") == 3
    assert (directory.path / "metrics.jsonl").read_text() == before


@pytest.fixture
def full_disk(monkeypatch, tmp_path):
    """Folders below any of these paths take no adapter, as often as it says."""
    full, real = {}, save.write_tensors

    def write_tensors(path, *args, **settings):
        for folder in full:
            if path.is_relative_to(folder) and full[folder]:
                full[folder] -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *args, **settings)

    monkeypatch.setattr(save, "write_tensors", write_tensors)
    monkeypatch.setattr(storage, "sleep", lambda seconds: None)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return full


def test_a_full_disk_at_the_end_does_not_lose_the_adapter(inputs, tmp_path, full_disk):
    out, settings = tmp_path / "run", {"train__steps": 2, "train__save_every": 0, "optimizer__schedule": "constant"}
    full_disk[out] = 2
    shown = Display(io.StringIO())
    assert loop.train(config(inputs, out, **settings), shown) == 0
    assert shown.stream.getvalue().count(f"{out}/adapter can't be written: No space left on device; trying again") == 2
    expected = (out / "adapter" / ADAPTER).read_bytes()

    other = tmp_path / "other"
    full_disk[other] = 99
    with pytest.raises(
        InputError, match=r"adapter can't be written: No space left on device \(4 tries\); what was"
    ) as e:
        loop.train(config(inputs, other, **settings), quiet())
    (rescued,) = (tmp_path / "tmp").iterdir()
    assert f"what was trained is in {rescued}/adapter: make room, and move it there" in str(e.value)
    assert (rescued / "adapter" / ADAPTER).read_bytes() == expected
    assert not (other / "adapter").exists() and not (other / "summary.json").exists()

    shutil.rmtree(rescued)
    full_disk[tmp_path / "tmp"] = 99
    with pytest.raises(InputError, match=f"nor in {tmp_path}/tmp, so what was trained is lost: make room"):
        loop.train(config(inputs, other, **settings), quiet(), overwrite=True)
    assert not list((tmp_path / "tmp").iterdir())


def test_with_a_checkpoint_a_full_disk_is_resumed_from(inputs, tmp_path, full_disk):
    out = tmp_path / "run"
    full_disk[out] = 4
    with pytest.raises(InputError, match=r"\(4 tries\); make room there .* continue with --resume"):
        loop.train(config(inputs, out, train__steps=2, train__save_every=1, optimizer__schedule="constant"), quiet())
    assert not list((tmp_path / "tmp").iterdir()) and not (out / "adapter").exists()
    assert loop.resume(str(out), quiet()) == 0
    assert (out / "adapter" / ADAPTER).is_file() and (out / "summary.json").is_file()


def test_two_runs_at_once_do_not_share_a_folder(inputs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    taken = pytest.raises(InputError, match=f"another run is writing to {out} at this moment")
    with loop.RunDirectory(out).claimed():
        with taken:
            loop.train(config(inputs, out), quiet(), overwrite=True)
        assert list(out.iterdir()) == []
    real = loop.prepare

    def slow(wanted, objects):
        loop.RunDirectory(out).create(dataclasses.replace(wanted, seed=5), overwrite=False)  # the other one is quicker
        return real(wanted, objects)

    monkeypatch.setattr(loop, "prepare", slow)
    with pytest.raises(InputError, match=r"holds a run already \(config.json\)"):
        loop.train(config(inputs, out), quiet())
    monkeypatch.setattr(loop, "prepare", real)
    assert json.loads((out / "config.json").read_text())["seed"] == 5
    with loop.RunDirectory(out).claimed(), taken:
        loop.resume(str(out), quiet())
    assert [path.name for path in out.iterdir()] == ["config.json"]
    # A process that is gone holds nothing.
    with loop.RunDirectory(out).claimed():
        pass
