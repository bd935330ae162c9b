"""Runs on a quantised base: resuming, pmap, several processes, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mora_jax.adapters.products.quantization import NF4
from mora_jax.cli.main import main
from mora_jax.errors import InputError
from mora_jax.interop import load_pretrained
from mora_jax.training import loop
from mora_jax.training.config.load import check_quantize
from mora_jax.training.config.schema import METHOD_KEYS, Config, lay_over
from tests.evaluation import tiny
from tests.training.distributed.test_processes import alone, arguments, same_run
from tests.training.launching import run as launched
from tests.training.test_loop import ROWS, Interrupting, config, metrics, quiet

HELD = {"model__quantize": "nf4", "data__eval_fraction": 0.2, "train__eval_every": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    (folder / "rows.json").write_text(json.dumps(ROWS * 4))
    return folder


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert loop.train(config(inputs, out, **HELD), quiet()) == 0
    return out


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_and_only_as_it_was(inputs, unbroken, tmp_path):
    def die():
        raise MemoryError("as good as a kill")

    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        loop.train(config(inputs, out, **HELD), Interrupting(5, die))
    written = json.loads((out / "config.json").read_text())
    for other in ("none", "int8"):
        (out / "config.json").write_text(json.dumps(written | {"model": written["model"] | {"quantize": other}}))
        with pytest.raises(InputError, match=f"model.quantize 'nf4', this run has '{other}'"):
            loop.resume(str(out), quiet())
    (out / "config.json").write_text(json.dumps(written))
    assert loop.resume(str(out), quiet()) == 0
    assert metrics(out) == metrics(unbroken)
    weights = "adapter/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (unbroken / weights).read_bytes()


@pytest.mark.slow
def test_a_run_is_scored_and_counted_on_its_own_base(inputs, unbroken, tmp_path):
    plain = tmp_path / "plain"
    assert loop.train(config(inputs, plain, **HELD | {"model__quantize": "none"}), quiet()) == 0
    ours, theirs = (json.loads((out / "summary.json").read_text()) for out in (unbroken, plain))
    for name in ("total_parameters", "trainable_parameters", "flops_per_token", "flops_per_token_palm"):
        assert ours[name] == theirs[name], name
    assert ours["eval_loss"] != theirs["eval_loss"]
    # It trains as on a base whose matrices hold the values that their codes stand for.
    folder = tmp_path / "rounded"
    shutil.copytree(inputs / "model", folder)
    weights = load_file(folder / "model.safetensors")
    rounded = {name: nearest_nf4(weight) if "_proj" in name else weight for name, weight in weights.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    settings = HELD | {"model__quantize": "none", "model__path": str(folder)}
    assert loop.train(config(inputs, tmp_path / "run", **settings), quiet()) == 0
    losses = [[row["loss"] for row in metrics(out) if "loss" in row] for out in (unbroken, tmp_path / "run", plain)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert np.abs(np.subtract(losses[0], losses[2])).min() > 1e-3
    scores = [json.loads((out / "summary.json").read_text())["eval_loss"] for out in (unbroken, tmp_path / "run")]
    np.testing.assert_allclose(*scores, rtol=2e-5)


def nearest_nf4(weight):
    """`[out, in]` of at most 64 inputs, one block an output: each number at the nearest of the format's 16."""
    largest = np.abs(weight).max(1, keepdims=True)
    levels = np.array(NF4, np.float32)
    return (levels[np.abs(weight[..., None] / largest[..., None] - levels).argmin(-1)] * largest).astype(np.float32)


@pytest.mark.slow
def test_pmap_gives_the_same_losses(inputs, tmp_path):
    losses = []
    for pmap in (True, False):
        out = tmp_path / str(pmap)
        settings = HELD | {"mesh__pmap": pmap, "mesh__data": 2, "adapter__dropout": 0.0, "train__save_every": 0}
        assert loop.train(config(inputs, out, **settings), quiet()) == 0
        losses.append([row["loss"] for row in metrics(out) if "loss" in row])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_read_and_train_their_shares(inputs, tmp_path):
    common = {"train__steps": 6, "model__quantize": "nf4"}
    alone(arguments(inputs, tmp_path / "alone", **common))
    shared = arguments(inputs, tmp_path / "run", **common, mesh__data=1, mesh__fsdp=2, mesh__tensor=2)
    assert [process.code for process in launched(shared, 2)] == [0, 0]
    same_run(tmp_path / "run", tmp_path / "alone")


def test_methods_that_would_change_the_base_are_refused_in_one_line():
    refused = {}
    for method in METHOD_KEYS:
        settings = [("model.quantize", "nf4", ""), ("adapter.method", method, "")]
        try:
            check_quantize(lay_over(Config(), settings))
        except InputError as error:
            refused[method] = str(error)
    assert sorted(refused) == ["full", "olora", "pissa", "relora", "remora"]
    assert all("model.quantize=nf4" in words and f"adapter.method={name}" in words for name, words in refused.items())
    check_quantize(lay_over(Config(), [("model.quantize", "int8", ""), ("adapter.init", "orthogonal", "")]))
    with pytest.raises(InputError, match=r"model\.quantize=int8.*adapter\.init=pissa"):
        check_quantize(lay_over(Config(), [("model.quantize", "int8", ""), ("adapter.init", "pissa", "")]))


@pytest.mark.slow
def test_the_command_line_trains_scores_and_answers(inputs, tmp_path, capsys):
    out, model = tmp_path / "run", str(inputs / "model")
    held = [f"--config.{name}" for name in ("model.quantize=int8", "train.steps=2", "mesh.data=1")]
    assert main(["train", *arguments(inputs, out), *held]) == 0
    assert "float32, layers held in int8" in capsys.readouterr().err
    refused = ["train", *arguments(inputs, tmp_path / "full"), *held, "--config.adapter.method=full"]
    assert main(refused) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "model.quantize=int8" in line and not (tmp_path / "full").exists()
    whole = [*refused[:-1], "--config.adapter.targets=q_proj", "--config.adapter.modules_to_save=down_proj"]
    assert main(whole) == 2
    assert "model.quantize=int8" in capsys.readouterr().err.splitlines()[-1]
    common, losses = ["--model", model, "--adapter", str(out)], []
    for quantize in ("none", "int8", "nf4"):
        words = ["eval", *common, "--data", str(inputs / "rows.json"), "--json", "--quantize", quantize]
        assert main(words) == 0
        losses.append(json.loads(capsys.readouterr().out)["nll"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and len(set(losses)) == 3
    assert abs(losses[1] - losses[0]) < abs(losses[2] - losses[0])
    assert main(["generate", *common, "--quantize", "nf4", "--prompt", "Hello", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["merge", *common, "--out", str(tmp_path / "merged")]) == 0
    assert load_pretrained(tmp_path / "merged")[0].quantize == "none"
