"""`--adapter RUN@STEP`: a checkpoint of a run in the place of its adapter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mora_jax.cli.options import adapter_folder

SETTINGS = {"train.steps": 2, "train.save_every": 1, "train.batch_size": 4, "model.dtype": "float32", "mesh.data": 1}
SETTINGS |= {"data.max_length": 64, "optimizer.learning_rate": 0.01, "adapter.rank": 2, "adapter.targets": "q_proj"}


def train(run, model_dir, data_file, out, **settings):
    """A run of two steps, with a checkpoint of each."""
    settings = {"model.path": model_dir, "data.train": data_file, "out": out, **SETTINGS, **settings}
    code, _, err = run("train", *(f"--config.{name}={value}" for name, value in settings.items()))
    assert code == 0, err
    return out


METHODS = [
    "lora",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("pissa", "dora", "adalora", "mora", "ia3")),
]


@pytest.mark.parametrize("method", METHODS)
def test_the_last_checkpoint_is_the_result_and_an_earlier_one_is_not(run, model_dir, data_file, tmp_path, method):
    out = train(run, model_dir, data_file, tmp_path / "run", **{"adapter.method": method})
    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    folders = [adapter_folder(f"{out}@{step}") for step in (1, 2)]
    first, last = (load_file(f"{folder}/adapter_model.safetensors") for folder in folders)
    for name, array in kept.items():
        np.testing.assert_array_equal(last[name], array)
    assert first.keys() == last.keys() == kept.keys()
    assert any((first[name] != last[name]).any() for name in kept)
    assert (Path(folders[1]) / "adapter_config.json").read_text() == (out / "adapter/adapter_config.json").read_text()


def test_commands_take_a_checkpoint_of_a_run_that_has_not_ended(run, fails, model_dir, data_file, tmp_path):
    out = train(run, model_dir, data_file, tmp_path / "run")
    scored = ("eval", "--model", model_dir, "--data", data_file, "--json", "--adapter")
    code, whole, err = run(*scored, out)
    assert code == 0, err
    shutil.rmtree(out / "adapter")
    (out / "summary.json").unlink()
    line = fails(*scored, out)
    assert "has not ended" in line and f"mora-jax train --resume {out}" in line and f"{out}@2" in line
    assert {**json.loads(run(*scored, f"{out}@2")[1]), "adapter": str(out)} == json.loads(whole)
    assert json.loads(run(*scored, f"{out}@1")[1])["nll"] != json.loads(whole)["nll"]
    ask = ("generate", "--model", model_dir, "--prompt", "Hello", "--max-new-tokens", 8, "--adapter", f"{out}@1")
    code, text, err = run(*ask, "--adapter", f"late={out}@2")
    assert code == 0, err
    assert text.startswith("[run@1]\n") and "\n[late]\n" in text
    code, _, err = run("merge", "--model", model_dir, "--adapter", f"{out}@1", "--out", tmp_path / "merged")
    assert code == 0, err
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "has no checkpoint of step 9; there are 1, 2" in fails(*scored, f"{out}@9")
    assert "is not a folder" in fails(*scored, f"{tmp_path / 'nothing'}@1")


def test_a_run_that_trains_the_model_itself_has_no_adapter(run, fails, model_dir, data_file, tmp_path):
    out = train(run, model_dir, data_file, tmp_path / "run", **{"adapter.method": "full"})
    line = fails("eval", "--model", model_dir, "--data", data_file, "--adapter", f"{out}@1")
    assert "trains the model itself (full)" in line
    for base in ((), ("--model", model_dir)):
        assert f"a model: give {out / 'model'} as" in fails("generate", "--prompt", "Hi", "--adapter", out, *base)
    assert "no architecture is named" in fails("generate", "--prompt", "Hi", "--model", out)
