"""eval, generate and merge on a tiny model: results on stdout, refusals, no folder left behind."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mora_jax import DoRAConfig, LoRAConfig, MoRAConfig, attach, load_pretrained, save_adapter
from mora_jax.adapters.base import AdapterParam
from mora_jax.evaluation import generate_batch
from tests.models.tiny_torch import hf_logits, load_torch


def write_adapter(model_dir, out, config):
    """Saves an adapter with random values for the tiny model."""
    model, _ = load_pretrained(model_dir, dtype="float32")
    attach(model, config, rngs=nnx.Rngs(0))
    adapters = nnx.state(model, AdapterParam)
    draw = np.random.default_rng(1)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(_moved(leaf, draw)), adapters))
    save_adapter(model, out)
    return str(out)


def _moved(leaf, draw):
    return np.asarray(leaf) + 0.3 * draw.standard_normal(leaf.shape).astype(np.float32)


SOME = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """LoRA in a folder of its own, MoRA inside a run directory."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "lora": write_adapter(model_dir, folder / "lora", LoRAConfig(rank=2, alpha=4, targets=SOME)),
        "mora": write_adapter(model_dir, folder / "run" / "adapter", MoRAConfig(rank=2, kind="rotation", targets=SOME)),
        "run": str(folder / "run"),
    }


def test_eval_prints_one_json_object(run, model_dir, data_file, adapters):
    results = []
    for extra in ([], ["--adapter", adapters["lora"]], ["--adapter", adapters["run"]]):
        code, out, err = run("eval", "--model", model_dir, "--data", data_file, "--json", *extra)
        assert code == 0
        assert all(line.startswith("scoring: ") for line in err.splitlines())  # of a slow machine
        assert out.count("\n") == 1
        results.append(json.loads(out))
    assert {"perplexity", "nll", "tokens", "accuracy"} <= set(results[0])
    assert results[0]["perplexity"] == pytest.approx(np.exp(results[0]["nll"]))
    assert len({round(result["nll"], 4) for result in results}) == 3, "adapters must count"
    assert len({result["tokens"] for result in results}) == 1


def test_eval_takes_loss_mode_and_data_options(run, model_dir, data_file):
    base = ["eval", "--model", model_dir, "--data", data_file, "--json"]
    masked, full = (json.loads(run(*base, "--loss-mode", mode)[1]) for mode in ("masked", "full"))
    assert full["tokens"] > masked["tokens"]
    weighted = json.loads(run(*base, "--loss-mode", "weighted", "--prompt-weight", "0")[1])
    assert weighted["nll"] == pytest.approx(masked["nll"])
    code, out, _ = run(*base[:-1], "--template", "plain", "--max-length", "32")
    assert code == 0
    assert out.startswith("perplexity ")


def test_generate_prints_the_answer_alone(run, model_dir, adapters):
    base = ["generate", "--model", model_dir, "--prompt", "Hello", "--max-new-tokens", "12"]
    code, out, err = run(*base)
    assert (code, err) == (0, "")
    model, tokenizer = load_pretrained(model_dir, dtype="float32")
    assert out.rstrip("\n") == generate_batch(model, tokenizer, ["Hello"], max_new_tokens=12)[0].rstrip("\ufffd\n")
    adapted = run(*base, "--adapter", adapters["mora"])[1]
    system = run(*base, "--system", "Be brief")[1]
    sampled = [run(*base, "--temperature", "2", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert len({out, adapted, system}) == 3
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.slow
def test_generate_with_several_adapters_gives_the_answer_of_each(run, fails, model_dir, adapters, tmp_path):
    base = ["generate", "--model", model_dir, "--prompt", "Hello", "--max-new-tokens", "12"]
    other = write_adapter(model_dir, tmp_path / "a=b", LoRAConfig(rank=4, alpha=6, targets=("v_proj", "up_proj")))
    alone = [run(*base, "--adapter", folder)[1] for folder in (adapters["lora"], other)]
    code, out, err = run(*base, "--adapter", adapters["lora"], "--adapter", f"other={other}")
    assert (code, err) == (0, "")
    assert out == f"[lora]\n{alone[0]}\n[other]\n{alone[1]}\n"
    assert alone[0] != alone[1]
    lora = ["--adapter", adapters["lora"]]
    assert "two adapters are called 'lora'" in fails(*base, *lora, *lora)
    code, twice, _ = run(*base, *lora, "--adapter", f"again={adapters['lora']}")
    assert (code, twice) == (0, f"[lora]\n{alone[0]}\n[again]\n{alone[0]}\n")
    assert "is not a folder" in fails(*base, *lora, "--adapter", f"nothing={tmp_path / 'nothing'}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("=runs/poet", "--adapter =runs/poet: it has no name before its path"),
        ("poet=", "--adapter poet=: it has no path behind its name"),
        ("", "the adapter is empty"),
    ],
)
def test_half_of_a_named_adapter_is_refused(fails, model_dir, text, line):
    assert line in fails("generate", "--model", model_dir, "--prompt", "Hello", "--adapter", text)


@pytest.mark.slow
def test_generate_with_methods_that_share_no_batch_answers_in_turn(run, fails, model_dir, adapters, tmp_path):
    base = ["generate", "--model", model_dir, "--prompt", "Hello", "--max-new-tokens", "12"]
    dora = write_adapter(model_dir, tmp_path / "dora", DoRAConfig(rank=4))
    folders = [adapters["lora"], adapters["mora"], dora]
    alone = [run(*base, "--adapter", folder)[1] for folder in folders]
    code, out, err = run(*base, *(text for folder in folders for text in ("--adapter", folder)))
    why = "lora is LoRA, run is MoRA of kind rotation: only adapters of one method go together"
    assert (code, err) == (0, f"the adapters answer one after the other: {why}\n")
    assert out == "".join(f"[{name}]\n{text}\n" for name, text in zip(("lora", "run", "dora"), alone, strict=True))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["nowhere"]}')
    assert "no adapter_model.safetensors" in fails(*base, "--adapter", dora, "--adapter", broken)


@pytest.mark.peers
@pytest.mark.parametrize("method", ["lora", "mora"])
def test_merged_folder_gives_the_adapted_logits_in_transformers(run, model_dir, adapters, tmp_path, method):
    out = tmp_path / "merged"
    code, printed, _ = run("merge", "--model", model_dir, "--adapter", adapters[method], "--out", out)
    assert (code, printed) == (0, "")
    ids = jnp.arange(20)[None] * 7 % 250
    from mora_jax import load_adapter

    model, _ = load_pretrained(model_dir, dtype="float32")
    load_adapter(model, adapters[method])
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model(ids))
    theirs = hf_logits(load_torch(out), np.asarray(ids))
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * np.abs(ours).max())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merge_writes_the_dtype_that_is_asked_for(run, model_dir, adapters, tmp_path):
    out, narrow = tmp_path / "merged", tmp_path / "tiny"  # called as the base is
    merge = ["merge", "--model", model_dir, "--adapter", adapters["lora"], "--out"]
    assert run(*merge, narrow, "--dtype", "bfloat16") == (0, "", f"wrote {narrow}\n")
    assert json.loads((narrow / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # A base in float32 doesn't grow; one in bfloat16 doubles, which is said.
    assert run(*merge, out) == (0, "", f"wrote {out}\n")
    merge[2] = narrow
    code, _, err = run(*merge, tmp_path / "wide")
    assert code == 0
    sizes = [f"{(folder / 'model.safetensors').stat().st_size / 1e3:.3g} kB" for folder in (tmp_path / "wide", narrow)]
    assert f"note: {sizes[0]} in float32, where the base has {sizes[1]}: --dtype bfloat16 takes half, but" in err


def test_refusals(fails, model_dir, data_file, adapters, tmp_path):
    absent, text = tmp_path / "absent", tmp_path / "text.txt"
    text.write_text("not a model")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"instruction": "x"')
    bad_adapter = tmp_path / "bad"
    bad_adapter.mkdir()
    (bad_adapter / "adapter_config.json").write_text("{")
    data, model = ["--data", data_file], ["--model", model_dir]
    assert str(absent) in fails("eval", "--model", absent, *data)
    assert str(text) in fails("eval", "--model", text, *data)
    assert str(absent) in fails("eval", *model, "--data", absent)
    assert str(broken) in fails("eval", *model, "--data", broken)
    assert str(absent) in fails("eval", *model, *data, "--adapter", absent)
    assert "adapter_config.json" in fails("eval", *model, *data, "--adapter", bad_adapter)
    assert "max_length" in fails("eval", *model, *data, "--max-length", "4")
    assert "template" in fails("eval", *model, *data, "--template", "nope")
    assert "messages" in fails("eval", *model, *data, "--format", "messages")
    assert "the model's context 128" in fails("generate", *model, "--prompt", "x" * 200)
    assert str(absent) in fails("generate", "--model", absent, "--prompt", "x")
    assert "is not empty" in fails("merge", *model, "--adapter", adapters["lora"], "--out", bad_adapter)
    out = tmp_path / "merged"
    assert str(absent) in fails("merge", *model, "--adapter", absent, "--out", out)
    fails("merge", *model, "--adapter", bad_adapter, "--out", out)
    assert "tokenizer" in fails("inspect", "--model", bad_adapter, *data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "broken.json", "text.txt"]


def test_commands_leave_torch_unimported(model_dir, data_file, tmp_path):
    """transformers would import it for seconds, where it is installed; scipy looks for it among the loaded modules."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('imported')\n")
    program = (
        f"import sys; sys.argv = ['mora-jax', 'inspect', '--model', {str(model_dir)!r}, '--data', {str(data_file)!r}]; "
        "from mora_jax.cli.main import main; print('code', main()); from scipy import stats; print(stats.norm.cdf(0.0))"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.splitlines()[-2:] == ["code 0", "0.5"]
    assert "imported" not in done.stdout


def test_the_harness_of_lm_eval_may_import_torch():
    program = (
        "import sys; sys.argv = ['mora-jax', 'lm-eval', '--help']; from mora_jax.cli.main import main; main();"
        "from mora_jax import environment; print(environment.torch_allowed)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"
