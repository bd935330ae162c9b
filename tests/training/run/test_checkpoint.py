"""Checkpoints: what is kept, what is refused, and what is done about damage and about storage that fails."""

import contextlib
import json
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mora_jax.errors import InputError
from mora_jax.training.run import storage
from mora_jax.training.run.checkpoint import Checkpoints
from mora_jax.training.state import Skips, TrainState, initial_state

IDENTITY = {"base": "xxh3:00", "base_path": "models/a", "method": "lora", "rank": 8, "targets": ["k_proj", "q_proj"]}


def state(step: int) -> TrainState:
    arrays = {"lora_a": step + jnp.arange(5000.0), "lora_b": jnp.full((3, 4), float(step))}
    first = initial_state(arrays, optax.adam(1e-3), seed=step)
    return first._replace(step=jnp.asarray(step, jnp.int32), skips=Skips(jnp.asarray(step), jnp.asarray(1)))


def same(left: TrainState, right: TrainState) -> None:
    plain = (tree._replace(key=jax.random.key_data(tree.key)) for tree in (left, right))
    jax.tree.map(np.testing.assert_array_equal, *plain)


def write(folder, steps, **settings):
    with Checkpoints(folder, 2, IDENTITY, **settings) as checkpoints:
        for step, loss in steps.items():
            checkpoints.save(state(step), eval_loss=loss)
        return checkpoints.best()


def steps_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder, notes=None, identity=IDENTITY, **settings):
    note = (lambda text: None) if notes is None else notes.append
    with Checkpoints(folder, 2, identity, note=note, **settings) as checkpoints:
        return checkpoints.newest(state(0), lambda step: {})


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {1: None, 2: 3.0, 3: 1.0, 4: float("nan"), 5: 2.5, 6: 2.0, 7: None}
    assert write(tmp_path / "plain", losses) is None
    assert steps_in(tmp_path / "plain") == ["6", "7"]
    folder = tmp_path / "best"
    assert write(folder, losses, keep_best=2) == (3, 1.0)
    assert steps_in(folder) == ["3", "6", "7"]
    assert json.loads((folder / "3" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["eval_loss"] == 1.0
    # Scores are known again when the run goes on.
    with Checkpoints(folder, 1, IDENTITY, keep_best=1) as checkpoints:
        assert checkpoints.best() == (3, 1.0) and not checkpoints.is_best(1.5) and checkpoints.is_best(0.5)
        checkpoints.save(state(8), eval_loss=1.5)
        same(checkpoints.restore(3, state(0)).state, state(3))
    assert steps_in(folder) == ["3", "8"]
    found = newest(folder)
    assert found.step == 8 and int(found.state.skips.total) == 8
    same(found.state, state(8))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"base": "xxh3:11", "base_path": "models/b"},
            "with base models/a (xxh3:00), this run has models/b (xxh3:11)",
        ),
        ({"method": "mora"}, "with adapter.method 'lora', this run has 'mora'"),
        ({"rank": 4}, "with adapter.rank 8, this run has 4"),
        (
            {"targets": ["k_proj", "v_proj"]},
            "with adapted layers q_proj beside 1 others, this run has v_proj beside 1 others",
        ),
    ],
    ids=["base", "method", "rank", "targets"],
)
def test_another_run_is_refused_with_both_values(tmp_path_factory, changes, words):
    folder = tmp_path_factory.getbasetemp() / "refused"
    if not folder.exists():
        write(folder, {1: None})
    with pytest.raises(InputError) as error:
        newest(folder, identity=IDENTITY | changes)
    assert words in str(error.value)
    assert newest(folder, identity=IDENTITY | {"base_path": "moved/a"}).step == 1
    assert newest(folder, identity=IDENTITY | {"added_later": "something"}).step == 1
    assert steps_in(folder) == ["1"]


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def biggest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "truncated-data": lambda folder: halve(biggest(folder)),
    "missing-data": lambda folder: biggest(folder).unlink(),
    "garbage-metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("{garbage"),
    "missing-manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "garbage-tree": lambda folder: (folder / "state" / "_METADATA").write_text("[1"),
    "empty-folder": empty,
}


OFTEN = {"truncated-data", "garbage-metadata", "empty-folder"}


@pytest.mark.parametrize(
    "damage", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, capfd):
    folder = tmp_path / "run"
    write(folder, {3: None, 6: None})
    DAMAGES[damage](folder / "6")
    notes = []
    found = newest(folder, notes)
    assert found.step == 3
    same(found.state, state(3))
    assert len(notes) == 1 and notes[0].startswith("the checkpoint of step 6 is damaged (")
    assert notes[0].endswith(f"kept as {folder / 'damaged-6'}; continuing from step 3") and "\n" not in notes[0]
    # The step is written again, and nothing but the note was said.
    write(folder, {6: None})
    assert newest(folder).step == 6
    assert steps_in(folder) == ["3", "6", "damaged-6"]
    assert capfd.readouterr().err == ""


def test_where_all_are_damaged_nothing_is_thrown_away(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    write(folder, {3: None, 6: None})
    halve(biggest(folder / "3"))
    empty(folder / "6")
    with pytest.raises(InputError, match=r"\(step 6: .*; step 3: .*\); to start again from step 0, move that folder"):
        newest(folder)
    assert steps_in(folder) == ["3", "6"]
    assert newest(tmp_path / "none") is None


def test_where_all_fail_alike_they_may_be_whole(tmp_path, monkeypatch):
    folder = tmp_path / "run-136" / "6"
    write(folder, {3: None, 6: None})
    with Checkpoints(folder, 2, IDENTITY) as checkpoints:

        def load(step, **settings):
            raise ValueError(f"{folder}/{step} was refused")

        monkeypatch.setattr(checkpoints._inner, "load", load)
        with pytest.raises(
            InputError, match=r"one reason \(step 6: .*/6/6 was refused\): .* leave them there"
        ) as error:
            checkpoints.newest(state(0), lambda step: {})
    assert "remove" not in str(error.value)
    assert newest(folder).step == 6


def test_a_folder_named_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("run/checkpoints", {3: None, 6: None})
    assert steps_in(tmp_path / "run" / "checkpoints") == ["3", "6"]
    assert newest("run/checkpoints").step == 6


def test_what_fails_is_tried_again_and_then_reported(monkeypatch):
    waits, notes = [], []
    monkeypatch.setattr(storage, "sleep", waits.append)
    failures = [OSError(28, "No space left on device"), OSError(5, "Input/output error")]

    def action():
        if failures:
            raise failures.pop(0)
        return 7

    what = "x can't be written", "make room", notes.append
    assert storage.with_retries(action, *what) == 7
    assert waits == [1.0, 2.0]
    assert notes[0] == "x can't be written: No space left on device; trying again in 1 s"
    failures.extend([OSError(28, "No space left on device")] * 9)
    with pytest.raises(InputError, match=r"x can't be written: No space left on device \(4 tries\); make room"):
        storage.with_retries(action, *what)
    failures[:] = [OSError(30, "Read-only file system")]
    with pytest.raises(InputError, match="x can't be written: Read-only file system; make room"):
        storage.with_retries(action, *what)
    text = "RESOURCE_EXHAUSTED: Failed writing: \"/a\": Failed to write 9 bytes: No space left [os_error_code='28']"
    assert storage.reason(ValueError(text)) == "No space left"


@contextlib.contextmanager
def small_files():
    """No file may be longer than 4 KiB: writes of more fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
def test_a_disk_that_takes_no_more_keeps_the_checkpoints_that_are_there(tmp_path, monkeypatch, capfd):
    folder, notes = tmp_path / "checkpoints", []
    with Checkpoints(folder, 3, IDENTITY, note=notes.append) as checkpoints:
        checkpoints.save(state(1), wait=True)
        with small_files() as make_room:
            # The write in the background fails; it or the next save hears of it, fails too, waits, and works.
            monkeypatch.setattr(storage, "sleep", lambda seconds: make_room())
            checkpoints.save(state(2))
            checkpoints.save(state(3))
        assert len(notes) == 2 and re.search("was not written: File too large; writing step [23] now$", notes[0])
        assert notes[1].endswith("File too large; trying again in 1 s")
        with small_files():
            monkeypatch.setattr(storage, "sleep", lambda seconds: None)
            with pytest.raises(
                InputError, match=r"step 4 can't be .*: File too large \(4 tries\); the checkpoint of st"
            ):
                checkpoints.save(state(4), wait=True)
            assert not list(folder.glob("*tmp*"))
    found = newest(folder)
    assert found.step == 3 and set(steps_in(folder)) <= {"1", "2", "3"}
    same(found.state, state(3))
    assert capfd.readouterr().err == ""
