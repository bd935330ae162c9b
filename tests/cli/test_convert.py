"""`mora-jax convert` on a tiny model: what it writes and prints, and what it refuses."""

import json
import re

import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.sites import adapted_sites
from tests.evaluation import tiny
from tests.models.tiny import fill_randomly

IDS = np.arange(8)[None]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Two layers: what is printed sums up layers."""
    return str(tiny.save_folder(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2))


def write(model_dir, out, config):
    model = mj.load_pretrained(model_dir, dtype="float32")[0]
    mj.attach(model, config, rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, out)
    return str(out)


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "lora": write(model_dir, folder / "lora", mj.LoRAConfig(rank=4)),
        "sharing": write(model_dir, folder / "run" / "adapter", mj.MoRAConfig(rank=1)),
        "rotation": write(model_dir, folder / "rotation", mj.MoRAConfig(rank=1, kind="rotation")),
        "run": str(folder / "run"),
    }


def logits(model_dir, adapter):
    model = mj.load_pretrained(model_dir, dtype="float32")[0]
    mj.load_adapter(model, adapter)
    return np.asarray(model(IDS))


@pytest.mark.parametrize("to", ["lora", "peft"])
def test_exact_lora_of_a_run_directory(run, model_dir, adapters, tmp_path, to):
    out = tmp_path / "out"
    code, table, err = run("convert", "--model", model_dir, "--adapter", adapters["run"], "--to", to, "--out", out)
    assert code == 0
    assert "relative Frobenius error 0 in total" in table
    lines = table.splitlines()  # a line for each type of module, not for each layer
    assert len(lines) == 1 + 7 + 1
    assert lines[0].split() == ["matrix", "layers", "in", "out", "size", "norm", "error", "worst"]
    assert [line.split()[:2] for line in lines[1:-1] if "q_proj" in line] == [["model.layers.*.self_attn.q_proj", "2"]]
    assert max(map(len, lines)) <= 80
    wrote, note = err.splitlines()
    assert wrote == f"wrote {out}"
    assert re.fullmatch(r"note: [\d.]+ kB, where the adapter had [\d.]+ kB: --rank R writes the nearest LoRA .*", note)
    assert not json.loads((out / "adapter_config.json").read_text()).get("use_mora")
    np.testing.assert_allclose(logits(model_dir, out), logits(model_dir, adapters["sharing"]), atol=1e-4)


def test_peft_keeps_what_peft_has(run, model_dir, adapters, tmp_path):
    out = tmp_path / "out"
    arguments = ["convert", "--model", model_dir, "--adapter", adapters["lora"], "--to", "peft", "--out", out]
    assert run(*arguments) == (0, "", f"wrote {out}\n")
    np.testing.assert_array_equal(logits(model_dir, out), logits(model_dir, adapters["lora"]))


def test_a_rank_accepts_the_error_and_json_states_it(run, model_dir, adapters, tmp_path):
    arguments = ["convert", "--model", model_dir, "--adapter", adapters["rotation"], "--to", "lora"]
    code, out, err = run(*arguments, "--rank", 2, "--out", tmp_path / "out", "--json")
    assert "warning: what was written differs from the change by 0." in err and "use mora-jax merge" in err
    result = json.loads(out)
    assert code == 0
    assert 0.1 < result["relative_error"] < 1
    assert {row["size"] for row in result["matrices"]} == {2}
    assert run("check", tmp_path / "out", "--for", "vllm")[0] == 0


def test_mora_in_its_authors_layout(run, model_dir, adapters, tmp_path):
    arguments = ["convert", "--model", model_dir, "--adapter", adapters["rotation"], "--to", "mora"]
    code, out, _ = run(*arguments, "--kind", "rotation", "--out", tmp_path / "out")
    assert code == 0
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["use_mora"], fields["mora_type"], fields["r"]) == (True, 6, 1)
    np.testing.assert_allclose(logits(model_dir, tmp_path / "out"), logits(model_dir, adapters["rotation"]), atol=1e-4)


def test_an_adapter_out_of_two_models(run, model_dir, adapters, tmp_path):
    model, tokenizer = mj.load_pretrained(model_dir, dtype="float32")
    mj.load_adapter(model, adapters["lora"])
    expected = np.asarray(model(IDS))
    mj.merge(model)
    mj.save_pretrained(model, tmp_path / "tuned", tokenizer)
    arguments = ["convert", "--from-diff", model_dir, tmp_path / "tuned", "--rank", "4"]
    code, table, err = run(*arguments, "--out", tmp_path / "out")
    assert code == 0
    assert err == f"wrote {tmp_path / 'out'}\n"
    assert "LoRA of rank 4, 14 matrices" in table
    np.testing.assert_allclose(logits(model_dir, tmp_path / "out"), expected, atol=1e-4)
    code, _, err = run(*arguments, "--targets", "q_proj", "--out", tmp_path / "some")
    assert code == 0
    assert "of the change is in tensors that the adapter leaves out" in err


def test_one_adapter_of_several(run, fails, model_dir, adapters, tmp_path):
    other = write(model_dir, tmp_path / "other", mj.LoRAConfig(rank=2, alpha=5.0, targets=("q_proj", "up_proj")))
    arguments = ["convert", "--model", model_dir, "--adapter", adapters["lora"], "--adapter", f"second={other}"]
    code, table, err = run(*arguments, "--combine", "cat", "--weights", "1", "-0.5", "--out", tmp_path / "cat")
    assert (code, err) == (0, f"wrote {tmp_path / 'cat'}\n")
    assert "cat of 1 lora and -0.5 second, 14 matrices: relative Frobenius error 0 in total" in table
    # The sum by merging one adapter after the other, the second with its alpha halved and negated.
    model = mj.load_pretrained(model_dir, dtype="float32")[0]
    mj.load_adapter(model, adapters["lora"])
    mj.merge(model)
    mj.load_adapter(model, other)
    for site in adapted_sites(model):
        site.adapter.scaling[...] *= -0.5
    np.testing.assert_allclose(logits(model_dir, tmp_path / "cat"), model(IDS), atol=1e-4)
    code, out, _ = run(*arguments, "--combine", "svd", "--weights", "1", "1", "--json", "--out", tmp_path / "svd")
    result = json.loads(out)
    assert 0.05 < result["relative_error"] < 1
    assert {row["size"] for row in result["matrices"]} == {4}
    out = ["--out", tmp_path / "no"]
    assert "--weights missing" in fails(*arguments, "--combine", "cat", *out)
    assert "1 numbers for 2 adapters" in fails(*arguments, "--combine", "cat", "--weights", "1", *out)
    assert "several adapters are for --combine" in fails(*arguments, "--to", "lora", *out)
    assert "leave --to and --from-diff away" in fails(*arguments, "--combine", "cat", "--to", "lora", *out)
    mixed = [*arguments[:5], "--adapter", adapters["sharing"], "--combine", "cat", "--weights", "1", "1"]
    assert "lora is LoRA, run is MoRA of kind sharing" in fails(*mixed, *out)
    assert not (tmp_path / "no").exists()


def test_refusals(fails, run, model_dir, adapters, tmp_path):
    out = tmp_path / "out"
    base = ["convert", "--model", model_dir, "--adapter", adapters["rotation"]]
    assert "at rank 8" in fails(*base, "--to", "lora", "--out", out)
    assert "have full rank" in fails(*base, "--to", "peft", "--out", out)
    ia3 = ["convert", "--model", model_dir, "--adapter", write(model_dir, tmp_path / "ia3", mj.IA3Config())]
    assert "has no rank that says how large MoRA's matrices become: give a rank" in fails(
        *ia3, "--to", "mora", "--out", out
    )
    assert "--to, --out missing" in fails(*base)
    assert "invalid choice: 'vera'" in fails(*base, "--to", "vera", "--out", out)
    assert "is not empty" in fails(*base, "--to", "lora", "--rank", "2", "--out", model_dir)
    assert "--rank must be" in fails(*base, "--to", "lora", "--rank", "0", "--out", out)
    assert "--kind must be" in fails(*base, "--to", "mora", "--kind", "spiral", "--out", out)
    assert "leave --model and --adapter" in fails(*base, "--from-diff", model_dir, model_dir, "--out", out)
    assert "invalid choice: 'tgi'" in fails("check", adapters["lora"], "--for", "tgi")
    assert "full rank" in fails("convert", "--from-diff", model_dir, model_dir, "--out", out)
    path = tmp_path / "other"
    model = mj.load_pretrained(model_dir, dtype="float32")[0]
    mj.attach(model, mj.LoRAConfig(rank=1), rngs=nnx.Rngs(0))
    mj.save_adapter(model, path, base_model_name_or_path="somebody/else")
    strict = ["convert", "--model", model_dir, "--adapter", path, "--to", "lora", "--out", out, "--strict"]
    assert "was made for somebody/else" in fails(*strict)
    model = ["--model", model_dir, "--adapter", path, "--strict"]
    assert "was made for somebody/else" in fails("merge", *model, "--out", out)
    assert "was made for somebody/else" in fails("generate", *model, "--prompt", "x")
    # An option that only another method has.
    assert "so it has no kind" in fails("merge", *model[:4], "--adapter-kind", "grouped", "--out", out)
    assert "--adapter-kind must be" in fails("merge", *model[:4], "--adapter-kind", "spiral", "--out", out)
    assert not out.exists()
    code, found, _ = run("check", adapters["rotation"], "--for", "vllm")
    assert code == 1
    assert "refused: it is a MoRA, which vLLM does not have" in found
