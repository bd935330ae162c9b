"""Paths as people type them: from wherever they are, with `~`, through links, in folders with odd names."""

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--config.train.steps=4", "--config.train.batch_size=2", "--config.data.max_length=64", "--config.seed=1"]
FAST = ["--config.model.dtype=float32", "--config.adapter.targets=q_proj,down_proj"]


@pytest.fixture
def home(model_dir, data_file, tmp_path, monkeypatch):
    """Somebody's home folder with a model, data and a link to another disk; they work in a folder of it."""
    home = tmp_path / "Zoë's home"
    (home / "work").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (home / "big").symlink_to(tmp_path / "disk")
    shutil.copytree(model_dir, home / "models" / "tiny")
    for name in ("one.json", "two.json"):
        shutil.copyfile(data_file, home / name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    return home


STYLES = {"home": "~", "relative": "../work/../big/.."}


@pytest.mark.parametrize("style", STYLES)
def test_every_command_takes_them(run, home, style):
    to = STYLES[style]
    if style == "relative":
        for name in ("models", "one.json", "two.json"):
            (home / "big" / ".." / name).symlink_to(home / name)
    model, data, out = f"{to}/models/tiny", f"{to}/one.json", f"{to}/runs/a"
    code, _, err = run(
        *("train", f"--config.model.path={model}", f"--config.data.train={data}", f"--config.out={out}"),
        *(*SMALL, *FAST, "--config.train.save_every=1", f"--config.data.cache={to}/cache"),
    )
    assert code == 0, err
    real = Path(os.path.expanduser(out))
    assert sorted(path.name for path in (real / "checkpoints").iterdir()) == ["3", "4"]
    found = json.loads((real / "config.json").read_text())
    named = [found["out"], found["model"]["path"], *found["data"]["train"], found["data"]["cache"]]
    assert all(Path(path).is_absolute() and Path(path).exists() for path in named), named
    written = json.loads((real / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == found["model"]["path"]

    given = ["--model", model, "--adapter"]
    assert run("eval", *given, out, "--data", f"{to}/*.json", "--json")[0] == 0
    assert run("generate", *given, f"{out}/adapter", "--prompt", "Hi", "--max-new-tokens", "2")[0] == 0
    assert run("merge", *given, out, "--out", f"{to}/merged")[0] == 0
    assert run("convert", *given, out, "--to", "lora", "--out", f"{to}/lora")[0] == 0
    assert run("check", f"{to}/merged", "--for", "vllm")[0] == 0
    assert run("inspect", "--model", f"{to}/merged", "--data", data, "--html", f"{to}/page.html", "--json")[0] == 0
    shutil.copyfile(ROOT / "configs" / "smollm2_dolly.py", os.path.expanduser(f"{to}/config.py"))
    planned = ["--config", f"{to}/config.py", "--model", model, "--tries", "0", "--json"]
    assert run("plan", *planned, "--accelerator", "v5e-1")[0] == 0
    for name in ("merged/model.safetensors", "lora/adapter_model.safetensors", "page.html"):
        assert Path(os.path.expanduser(f"{to}/{name}")).is_file(), name
    assert list(Path.cwd().iterdir()) == []


def test_a_run_goes_on_from_another_folder(home, run, fails, monkeypatch):
    data = "--config.data.train=../*.json"
    command = ["train", "--config.model.path=../models/tiny", data, *SMALL, *FAST, "--config.train.save_every=2"]
    assert run(*command, "--config.out=runs/a")[0] == 0
    out = home / "work" / "runs" / "a"
    whole = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    # As a kill after step 3 would have left it.
    for name in ("adapter", "checkpoints/4"):
        shutil.rmtree(out / name)
    (out / "summary.json").unlink()
    monkeypatch.chdir(home / "big")
    # Where the data have gone is asked for, and taken from there.
    (home / "data").mkdir()
    for name in ("one.json", "two.json"):
        (home / name).rename(home / "data" / name)
    refusal = fails("train", "--resume", "~/work/runs/a")
    assert refusal.endswith("is not there any more; say where it is now with --config.data.train=...")
    monkeypatch.chdir(home / "data")
    code, _, err = run("train", "--resume", "../work/runs/a", "--config.data.train=one.json,two.json")
    assert code == 0 and "step 3/4" in err and "step 2/4" not in err, err
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    written = json.loads((out / "config.json").read_text())["data"]["train"]
    assert written == [str(home / "data" / name) for name in ("one.json", "two.json")]


def test_a_file_with_a_comma_in_its_name(home, run):
    (home / "one.json").rename(home / "work" / "one, two.json")
    code, out, err = run("inspect", "--model", "~/models/tiny", "--data", "one, two.json", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 12), err
    code, out, err = run("inspect", "--model", "~/models/tiny", "--data", "../two.json,../two.json", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 24), err


def test_hub_ids_and_buckets_are_no_paths(home, fails):
    (home / "work" / "owner").mkdir()
    refusal = fails("train", "--config.model.path=owner/absent", "--config.data.train=../one.json", "--config.out=a")
    assert refusal.startswith("error: owner/absent is not a local folder, and could not be fetched from the hub")
    refusal = fails("eval", "--model", "~nobody-here/x", "--data", "../one.json")
    assert "~nobody-here/x: there is no such home" in refusal


def test_names_that_checkpoints_cannot_be_read_from(home, fails, monkeypatch):
    command = ["train", "--config.model.path=../models/tiny", "--config.data.train=../one.json"]
    for name in ("a[1]", "x*y", "back\\slash"):
        assert "in it; choose another" in fails(*command, f"--config.out={name}/run")
    assert list(Path.cwd().iterdir()) == []


def test_the_folder_one_stands_in(home, run, monkeypatch):
    asked = ["--prompt", "Hi", "--max-new-tokens", "2"]
    assert run("train", "--config.model.path=../models/tiny", "--config.data.train=../one.json", *SMALL, *FAST,
               "--config.out=.")[0] == 0  # fmt: skip
    monkeypatch.chdir(home / "models" / "tiny")
    code, out, err = run("generate", "--model", ".", "--adapter", "../../work", "--strict", *asked)
    assert code == 0, err
    monkeypatch.chdir(home / "work" / "adapter")
    adapters = ["--adapter", ".", "--adapter", "second=."]
    code, out, err = run("generate", "--model", "../../models/tiny", *adapters, *asked)
    assert code == 0 and out.startswith("[work]\n"), err
