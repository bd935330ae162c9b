"""A run's files and checkpoints in a bucket, against an emulator of Google Cloud Storage on the loopback."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from mora_jax.errors import InputError
from mora_jax.training.run import storage
from mora_jax.training.run.directory import RunDirectory
from tests.training.run.test_checkpoint import newest, same, state, write

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
create_server = pytest.importorskip("gcp_storage_emulator.server", reason="the emulator is not installed").create_server
ADAPTER = "adapter/adapter_model.safetensors"
# Clients of the emulator hang up while it answers, and their event loops are closed while others still call them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def bucket():
    """The address of an emulator with one bucket; clients of this process and of its children use it."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
    server.start()
    host, port = server._api._httpd.socket.getsockname()[:2]
    settings = dict.fromkeys(("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST"), f"http://{host}:{port}")
    settings["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks the real service what kind of bucket it is
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


def test_a_file_that_grows_is_written_anew_now_and_then(bucket, monkeypatch):
    directory = RunDirectory("gs://runs/files")
    directory.files.make()
    directory.append_metrics([{"step": 1, "loss": 2.0}])
    assert directory.read_metrics() == []
    directory.files.flush()
    assert directory.read_metrics() == [{"step": 1, "loss": 2.0}]
    # Another process goes on after step 1 and forgets the rest.
    directory.append_metrics([{"step": 2, "loss": float("nan")}])
    directory.files.flush()
    again = RunDirectory("gs://runs/files")
    assert again.read_metrics()[1] == {"step": 2, "loss": None}
    assert again.rewind_metrics(1) == [{"step": 1, "loss": 2.0}]
    monkeypatch.setattr(storage.BucketFiles, "interval", 0.0)
    again.append_metrics([{"step": 2, "loss": 1.0}])
    assert [row["loss"] for row in directory.read_metrics()] == [2.0, 1.0]
    with again.files.folder("adapter") as local:
        (local / "deep").mkdir(parents=True)
        (local / "deep" / "weights").write_bytes(b"\x00\xff" * 1000)
    assert (again.files.path / "adapter" / "deep" / "weights").read_bytes() == b"\x00\xff" * 1000
    assert again.files.present(("adapter", "metrics.jsonl", "summary.json")) == ["adapter", "metrics.jsonl"]
    again.files.remove("adapter")
    again.files.remove("metrics.jsonl")
    assert RunDirectory("gs://runs/files").files.present(("adapter", "metrics.jsonl")) == []


def test_a_folder_on_the_disk_is_copied_as_it_grows(bucket):
    directory = RunDirectory("gs://runs/growing")
    local = directory.files.on_disk("tensorboard")
    assert local == directory.files.on_disk("tensorboard") and directory.files.names("tensorboard") == []
    (local / "deep").mkdir(parents=True)
    (local / "deep" / "events").write_bytes(b"one")
    (local / "link").symlink_to(local / "deep" / "events")
    directory.files.flush()
    assert directory.files.names("tensorboard") == ["deep"]
    shown = directory.path / "tensorboard" / "deep"
    assert (shown / "events").read_bytes() == b"one"
    (shown / "events").write_bytes(b"changed there")
    directory.files.flush()
    assert (shown / "events").read_bytes() == b"changed there"  # what hasn't grown isn't sent again
    (local / "deep" / "events").write_bytes(b"one, two")
    (local / "more").write_bytes(b"3")
    directory.files.close()
    assert (shown / "events").read_bytes() == b"one, two"
    assert directory.files.names("tensorboard") == ["deep", "more"] and not local.exists()


@pytest.mark.slow
def test_checkpoints_fall_back_and_keep_the_best_there_too(bucket):
    from etils import epath

    folder = epath.Path("gs://runs/checkpointed/checkpoints")
    assert write(folder, {1: None, 2: 1.0, 3: 2.0, 4: 3.0}, keep_best=1) == (2, 1.0)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]
    same(newest(folder, keep_best=1).state, state(4))
    (folder / "4" / "state" / "manifest.ocdbt").unlink()
    notes = []
    found = newest(folder, notes, keep_best=1)
    assert found.step == 3 and len(notes) == 1 and "damaged-4; continuing from step 3" in notes[0]
    same(found.state, state(3))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "damaged-4"]


def test_what_can_not_be_reached_is_said_in_one_line(bucket, monkeypatch):
    with pytest.raises(
        InputError, match=r"gs://none/run/config\.json can't be written: it isn't there; see that the b"
    ):
        RunDirectory("gs://none/run").write_json("config.json", {})
    with pytest.raises(InputError, match="runs can be kept in a local folder or on gs://, not on ftp://"):
        RunDirectory("ftp://runs/run")
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gs:// needs the package gcsfs: pip install 'mora-jax\[gcs\]'"):
        RunDirectory("gs://runs/run")


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on(bucket, tmp_path):
    from tests.evaluation import tiny
    from tests.training.test_loop import ROWS

    tiny.save_folder(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS * 2))
    settings = {
        "model.path": tmp_path / "model",
        "model.dtype": "float32",
        "data.train": tmp_path / "rows.json",
        "mesh.data": 1,
    }
    settings |= {"train.steps": 60, "train.save_every": 3, "adapter.dropout": 0.1}
    given = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "mora_jax", "train"]
    subprocess.run([*command, *given, f"--config.out={tmp_path / 'local'}"], check=True, capture_output=True)
    logged = {"tensorboard": True, "wandb": "tests", "profile_first": 4, "profile_steps": 2}
    given += [f"--config.log.{name}={value}" for name, value in logged.items()]
    process = subprocess.Popen([*command, *given, "--config.out=gs://runs/cut"], stderr=subprocess.PIPE, text=True)
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("step 20/"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    again = subprocess.run([*command, "--resume", "gs://runs/cut"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "continuing after step" in again.stderr and "Traceback" not in again.stderr
    with urllib.request.urlopen(f"{os.environ['STORAGE_EMULATOR_HOST']}/runs/cut/{ADAPTER}") as answer:
        assert answer.read() == (tmp_path / "local" / ADAPTER).read_bytes()
    rows = [RunDirectory(folder).read_metrics() for folder in ("gs://runs/cut", tmp_path / "local")]
    assert [row["step"] for row in rows[0]] == list(range(1, 61))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    files = RunDirectory("gs://runs/cut").files
    assert len(files.names("tensorboard")) == 2  # one of each process
    (synced,) = (name for name in files.names("wandb") if name.startswith("offline-run-"))
    assert any(name.endswith(".wandb") for name in files.names(f"wandb/{synced}"))
    (trace,) = files.names("profile/plugins/profile")
    assert any(name.endswith(".xplane.pb") for name in files.names(f"profile/plugins/profile/{trace}"))
    assert "open it with: xprof --logdir gs://runs/cut/profile" in said
