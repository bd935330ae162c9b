"""train on a tiny model: the run directory, refusals that leave nothing behind, resuming, signals."""

import json
import os
import signal

import pytest

from tests.cli.conftest import start

SMALL = ["--config.train.steps=2", "--config.train.batch_size=2", "--config.data.max_length=64"]


@pytest.fixture
def options(model_dir, data_file, tmp_path, monkeypatch):
    """Everything that a run needs, by key, with paths as one types them."""
    monkeypatch.chdir(tmp_path)
    return [
        f"--config.model.path={os.path.relpath(model_dir)}",
        f"--config.data.train={os.path.relpath(data_file)}",
        "--config.out=run",
        "--config.model.dtype=float32",
        *SMALL,
    ]


def test_a_run_writes_its_directory_and_nothing_to_stdout(run, fails, options, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "import ml_collections\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'adapter': {'method': 'mora', 'rank': 2}})\n"
    )
    command = [
        "train",
        "--config",
        file,
        *options,
        "--config.adapter.alpha=3",
        "--config.data.eval_fraction=0.2",
    ]
    code, out, err = run(*command)
    assert (code, out) == (0, "")
    assert "warning: ignored: adapter.alpha (not used with adapter.method=mora)" in err.splitlines()
    assert "step 2/2" in err
    assert "eval loss" in err
    directory = tmp_path / "run"
    config = json.loads((directory / "config.json").read_text())
    assert (config["adapter"]["method"], config["adapter"]["rank"]) == ("mora", 2)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert json.loads((directory / "summary.json").read_text())["compilations"] == 1
    assert (directory / "adapter" / "adapter_model.safetensors").is_file()

    assert "--resume" in fails(*command)
    assert "finished" in run("train", "--resume", directory)[2]
    assert "would make another run of it" in fails("train", "--resume", directory, "--config.train.steps=3")
    (directory / "summary.json").unlink()
    before = (directory / "config.json").read_text()
    assert "would make another run of it: with --resume only mesh.*" in fails(
        "train", "--resume", directory, "--config.seed=1"
    )
    assert "bogus" in fails("train", "--resume", directory, "--config.bogus=1")
    assert "must divide" in fails("train", "--resume", directory, "--config.train.micro_batch_size=3")
    assert "mesh.data=64" in fails("train", "--resume", directory, "--config.mesh.data=64")
    assert (directory / "config.json").read_text() == before
    assert run(*command, "--overwrite", "--config.train.steps=1")[0] == 0


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--config.model.path=/nowhere/model"], "/nowhere/model"),
        (["--config.data.train=/nowhere/rows.json"], "/nowhere/rows.json"),
        (["--config.data.eval=/nowhere/rows.json"], "/nowhere/rows.json"),
        (["--config.data.format=messages"], "messages"),
        (["--config.data.template=nope"], "nope"),
        (["--config.data.max_length=2"], "max_length"),
        (["--config.data.eval_fraction=0.99"], "eval_fraction"),
        (["--config.adapter.targets=nothing_like_this"], "nothing_like_this"),
        (["--config.adapter.targets=*["], "*["),
        (["--config.adapter.path=/nowhere/adapter"], "/nowhere/adapter"),
        (["--config.optimizer.warmup_steps=3"], "warmup_steps"),
        (["--config.mesh.data=64"], "mesh.data=64"),
        (["--config.mesh.tensor=64"], "mesh.tensor=64"),
        (["--config.train.steps=many"], "--config.train.steps must be an integer"),
        (["--config.bogus=1"], "bogus"),
        (["--config=/nowhere/config.py"], "/nowhere/config.py"),
        (["--config.out="], "--config.out"),
        (["--profile", "5:4"], "--profile must be FIRST:LAST"),
        (["--profile", "9:10"], "log.profile_first=9 must be at most the run's 2 steps"),
        (["--resume=/nowhere"], "/nowhere holds no run"),
    ],
)
def test_refusals_leave_no_directory(fails, options, tmp_path, changes, words):
    assert words in fails("train", *options, *changes)
    assert not (tmp_path / "run").exists()


def test_out_that_is_a_file_or_below_one(fails, options, tmp_path):
    (tmp_path / "file").write_text("precious")
    fails("train", *options, f"--config.out={tmp_path / 'file'}")
    fails("train", *options, f"--config.out={tmp_path / 'file' / 'below'}")
    assert (tmp_path / "file").read_text() == "precious"


def test_resuming_what_is_no_run(fails, tmp_path):
    assert "holds no run" in fails("train", "--resume", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "damaged" in fails("train", "--resume", tmp_path)
    (tmp_path / "config.json").write_text('{"seed": -1}')
    assert "seed" in fails("train", "--resume", tmp_path)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_state_at_a_step(options, tmp_path, number, code):
    process = start("train", *options, "--config.train.steps=100000", "--config.seed=1")
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"--resume {tmp_path / 'run'}" in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "summary.json").exists()
