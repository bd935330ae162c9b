"""Saved models: transformers loads them, and so do we."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors import safe_open

import mora_jax as mj
from mora_jax.models import init_decoder
from mora_jax.models.families import FAMILIES
from tests.adapters.test_conformance import CASES as CASES_OF_METHODS
from tests.interop.test_load import write_tokenizer
from tests.models.odd import ODD
from tests.models.tiny import LLAMA, fill_randomly, hf_config, hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, hf_model, load_torch, save_torch

IDS = random_ids(2, 9)
CASES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2}),
}


def fresh(dtype: str = "float32"):
    return init_decoder(LLAMA, nnx.Rngs(0), dtype=dtype)


def torch_logits(folder: Path) -> np.ndarray:
    return hf_logits(load_torch(folder), IDS)


def load(folder: Path):
    return mj.load_pretrained(folder, dtype="float32")[0]


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_merged_models_load_in_transformers(name, tmp_path):
    model_type, fields = CASES[name]
    model = load(save_torch(tmp_path / "base", hf_model(model_type, **fields)))
    mj.attach(model, mj.MoRAConfig(rank=2), rngs=nnx.Rngs(0))
    fill_randomly(model)
    expected = np.asarray(model(IDS))
    mj.merge(model)
    mj.save_pretrained(model, tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(load(tmp_path / "merged")(IDS)), expected, atol=2e-4, rtol=1e-4)


BIASED = {
    "llama": ({}, "all-linear"),
    "qwen3": ({"head_dim": 8}, ("o_proj",)),
    "gemma2": ({"head_dim": 8, "sliding_window": 4}, ("k_proj",)),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 4}, ("q_proj", "o_proj")),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", BIASED)
def test_merged_biases_have_a_place(name, tmp_path):
    fields, targets = BIASED[name]
    model = load(save_torch(tmp_path / "base", hf_model(name, **fields)))
    mj.attach(model, mj.BitFitConfig(targets=targets), rngs=nnx.Rngs(0))
    start = np.asarray(model(IDS))
    fill_randomly(model)
    expected = np.asarray(model(IDS))
    assert np.abs(expected - start).max() > 1e-2
    mj.merge(model)
    mj.save_pretrained(model, tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(tmp_path / "merged"), expected, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(load(tmp_path / "merged")(IDS)), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.model_type in ODD], ids=lambda f: f.model_type
)
def test_biases_without_a_place_are_refused(family, tmp_path):
    # Every family says which of its projections may get biases; what it doesn't say is refused, not left out.
    config = hf_config(family.model_type, **(ODD[family.model_type] | {"attention_bias": False, "mlp_bias": False}))
    model = init_decoder(config.to_dict(), nnx.Rngs(0), dtype="float32")
    down = model.config.names.down.rpartition(".")[2]
    mj.attach(model, mj.BitFitConfig(targets=(model.config.names.down,)), rngs=nnx.Rngs(0))
    mj.merge(model)
    if "mlp_bias" in family.bias_fields or model.config.mlp_bias:
        mj.save_pretrained(model, tmp_path / "out")
        return
    with pytest.raises(mj.InputError, match=f"gave biases to {down}, for which {family.model_type} models have no"):
        mj.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_lost_in_float32(tmp_path):
    model = load(hf_folder(tmp_path / "base"))
    mj.save_pretrained(model, tmp_path / "copy")
    with safe_open(tmp_path / "base" / "model.safetensors", "np") as one:
        with safe_open(tmp_path / "copy" / "model.safetensors", "np") as two:
            assert set(one.keys()) == set(two.keys())
            assert two.metadata() == {"format": "pt"}
            for name in one.keys():
                np.testing.assert_array_equal(one.get_tensor(name), two.get_tensor(name))


def test_files_that_come_along(tmp_path):
    base = hf_folder(tmp_path / "base", changes={"keep": {"me": 1}, "dtype": None, "torch_dtype": "float32"})
    write_tokenizer(base)
    (base / "generation_config.json").write_text('{"eos_token_id": 3}')
    (base / "notes.txt").write_text("not mine to copy")
    model, tokenizer = mj.load_pretrained(base, dtype="float32")
    mj.save_pretrained(model, tmp_path / "a", dtype="bfloat16")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    settings = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == settings | {"model.safetensors"}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["keep"] == {"me": 1}
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config
    assert (tmp_path / "a" / "generation_config.json").read_text() == '{"eos_token_id": 3}'
    mj.save_pretrained(model, tmp_path / "b", tokenizer)
    assert mj.load_pretrained(tmp_path / "b")[1]("b a")["input_ids"] == [1, 0]


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, tmp_path):
    model = fresh()
    mj.save_pretrained(model, tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["model_type"]) == (dtype, "llama")
    assert config["architectures"] == ["LlamaForCausalLM"]
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(found.dtype) == f"torch.{dtype}"
    np.testing.assert_allclose(
        torch_logits(tmp_path / "out"), np.asarray(model(IDS)), atol=0.3 if "3" not in dtype else 1e-4
    )


def test_shards(tmp_path):
    model = fresh()
    mj.save_pretrained(model, tmp_path / "out", max_shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = []
    for file in files:
        with safe_open(tmp_path / "out" / file, "np") as tensors:
            sizes.append([tensors.get_tensor(name).nbytes for name in tensors.keys()])
    assert len(files) > 2
    assert all(sum(held) <= 30_000 for held in sizes)
    assert all(sum(held) + max(after) > 30_000 for held, after in itertools.pairwise(sizes)), "a file is filled"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "out")(IDS)), np.asarray(model(IDS)))


@pytest.mark.peers
def test_transformers_loads_shards(tmp_path):
    model = fresh()
    mj.save_pretrained(model, tmp_path / "out", max_shard_bytes=30_000)
    np.testing.assert_allclose(torch_logits(tmp_path / "out"), np.asarray(model(IDS)), atol=1e-4)


def test_full_fine_tuning_is_saved(tmp_path):
    model = fresh("bfloat16")
    mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(0))
    mj.save_pretrained(model, tmp_path / "out")
    assert load(tmp_path / "out").layers.mlp.down_proj.kernel.shape == (3, 48, 32)


class TestRefusals:
    def test_adapters(self, tmp_path):
        model = fresh()
        mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(0))
        with pytest.raises(mj.InputError, match=r"unmerged adapters: call merge\(model\) first"):
            mj.save_pretrained(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_used_folders(self, tmp_path):
        model = fresh()
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "file").touch()
        with pytest.raises(mj.InputError, match=r"used is not empty \(file\)"):
            mj.save_pretrained(model, tmp_path / "used")
        with pytest.raises(mj.InputError, match="file is a file"):
            mj.save_pretrained(model, tmp_path / "used" / "file")
        (tmp_path / "empty").mkdir()
        mj.save_pretrained(model, tmp_path / "empty")
        with pytest.raises(mj.InputError, match=r"empty is not empty \(config.json, model.safetensors\)"):
            mj.save_pretrained(model, tmp_path / "empty")

    def test_overwriting(self, tmp_path):
        out, model = tmp_path / "out", fresh()
        mj.save_pretrained(model, out, max_shard_bytes=30_000)
        write_tokenizer(out)
        (out / "README.md").write_text("somebody's own")
        mj.save_pretrained(model, out, overwrite=True)
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        np.testing.assert_array_equal(np.asarray(load(out)(IDS)), np.asarray(model(IDS)))

    def test_models_of_others(self, tmp_path):
        own = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        with pytest.raises(mj.InputError, match=r"not a Sequential: save nnx.state\(model\) .* docs/own_models.md"):
            mj.save_pretrained(own, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_dtypes(self, tmp_path):
        model = fresh()
        for bad in ("int8", "float64", "tiny"):
            with pytest.raises(mj.InputError, match=f"saved in one of float32, bfloat16, float16, not '{bad}'"):
                mj.save_pretrained(model, tmp_path / "out", dtype=bad)
        model.norm.weight[...] = model.norm.weight[...] + 1e6
        with pytest.raises(mj.InputError, match="model.norm.weight has values that float16 cannot hold"):
            mj.save_pretrained(model, tmp_path / "out", dtype="float16")
        assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize("config", [mj.LoRAConfig(rank=2, bias="lora_only"), mj.BitFitConfig()])
def test_a_bias_with_turned_axes_comes_back(config, tmp_path):
    def make():
        model = nnx.Einsum("...td,ndh->...thn", (2, 4, 3), (3, 2), rngs=nnx.Rngs(0))
        model.bias[...] = jnp.arange(6.0).reshape(3, 2)
        holder = nnx.Module()
        holder.out = model
        return holder

    model, x = make(), np.ones((5, 4), np.float32)
    mj.attach(model, config, rngs=nnx.Rngs(1))
    fill_randomly(model)
    expected = np.asarray(model.out(x))
    mj.save_adapter(model, tmp_path / "a")
    again = make()
    mj.load_adapter(again, tmp_path / "a")
    np.testing.assert_allclose(again.out(x), expected, atol=1e-6)
    mj.merge(again)
    np.testing.assert_allclose(again.out(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (mj.MoRAConfig(rank=2, targets=".*"), 0.5),
        (mj.AdaLoRAConfig(targets=".*"), 0.5),
        (mj.LoRAConfig(rank=2, targets=".*"), -1.0),
    ],
)
def test_a_scaling_that_files_do_not_hold_is_refused(config, factor, tmp_path):
    layer = nnx.Dict(up=nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    mj.attach(layer, config, rngs=nnx.Rngs(1))
    mj.save_adapter(layer, tmp_path / "adapter")
    layer.up.adapter.scaling[...] = factor * layer.up.adapter.scaling[...]
    with pytest.raises(mj.InputError, match="up has scaling .*, and files of .* hold none but"):
        mj.save_adapter(layer, tmp_path / "scaled")
    assert not (tmp_path / "scaled").exists()


@pytest.mark.parametrize("case", CASES_OF_METHODS)
def test_a_model_that_is_one_layer_comes_back(case, tmp_path):
    config = CASES_OF_METHODS[case]
    model, again = (nnx.Linear(20, 30, rngs=nnx.Rngs(0)) for _ in range(2))
    x = np.random.default_rng(1).normal(size=(5, 20)).astype(np.float32)
    plain = model(x)
    mj.attach(model, config, rngs=nnx.Rngs(1))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "a")
    mj.load_adapter(again, tmp_path / "a")
    assert np.abs(plain - again(x)).max() > 1e-2
    np.testing.assert_allclose(again(x), model(x), atol=2e-6)


@pytest.mark.parametrize("config", [mj.LoRAConfig(rank=2), mj.VeRAConfig(rank=2), mj.RandLoRAConfig(rank=2, alpha=2.0)])
def test_a_layer_that_is_switched_off_stays_off(config, tmp_path):
    # Its widths are the largest, from which bases that layers share are drawn.
    model = nnx.Dict(up=nnx.Linear(8, 9, rngs=nnx.Rngs(0)), out=nnx.Linear(3, 5, rngs=nnx.Rngs(1)))
    again, (wide, thin) = nnx.clone(model), (np.ones((2, 8)), np.arange(6.0).reshape(2, 3))
    mj.attach(model, config, rngs=nnx.Rngs(2))
    nnx.update(model, jax.tree.map(lambda array: array + 0.3, nnx.state(model, mj.AdapterParam)))
    model.up.adapter.scaling[...] = jnp.zeros(())
    mj.save_adapter(model, tmp_path / "adapter")
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(again.up(wide), model.up(wide))
    np.testing.assert_allclose(again.out(thin), model.out(thin), rtol=1e-6)
