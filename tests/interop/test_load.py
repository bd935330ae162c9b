"""Loading base models: real weights, shards, dtypes, tokenizers, and one clear line for each bad folder."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.interop.safetensors_io import TensorFiles, open_checkpoint
from mora_jax.interop.sharded_read import empty
from tests.models.tiny import hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, hf_model, load_torch, save_torch

IDS = random_ids(2, 9)


@pytest.fixture
def folder(tmp_path) -> Path:
    return hf_folder(tmp_path / "model")


def load(folder: Path, **options):
    return mj.load_pretrained(folder, **({"dtype": "float32"} | options))[0]


def logits(folder: Path, **options) -> np.ndarray:
    return np.asarray(load(folder, **options)(IDS))


def change(folder: Path, function) -> None:
    """Rewrites the tensors of a folder."""
    path = folder / "model.safetensors"
    save_file(function(dict(load_file(path))), path, metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.peers
def test_sharded_files(tmp_path):
    reference = hf_model("llama")
    folder = save_torch(tmp_path / "model", reference, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    np.testing.assert_allclose(logits(folder), hf_logits(reference, IDS), atol=1e-4)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(mj.InputError, match="does not exist, but the index names it"):
        load(folder)


def test_an_index_without_a_map(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(mj.InputError, match="has no weight_map"):
        load(folder)
    weight_map = {"model.norm.weight": "../model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(mj.InputError, match="names what is no file of the folder"):
        load(folder)


@pytest.mark.peers
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_on_disk(folder, stored):
    change(folder, lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
    rounded = load(folder)
    np.testing.assert_allclose(np.asarray(rounded(IDS)), hf_logits(load_torch(folder), IDS), atol=1e-4)


def test_dtypes(folder):
    expected = logits(folder)
    half = load(folder, dtype="bfloat16")
    assert half.layers.mlp.down_proj.kernel.dtype == jnp.bfloat16
    assert half.norm.weight.dtype == jnp.float32
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half(IDS)), expected, atol=0.1 * np.abs(expected).max())
    assert load(folder, dtype=jnp.float32).dtype == jnp.float32
    with pytest.raises(mj.InputError, match="dtype 'int4' is not supported; give one of float32, bfloat16"):
        load(folder, dtype="int4")


def test_where_it_came_from(folder):
    model = load(folder, remat="full")
    assert (model.name_or_path, model.folder) == (str(folder), str(folder))
    assert model.remat == "full"


def test_harmless_extras_are_ignored(folder):
    expected = logits(folder)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    change(folder, lambda tensors: tensors | extra)
    np.testing.assert_array_equal(logits(folder), expected)


class TestTiedHeads:
    @pytest.fixture
    def tied(self, tmp_path) -> Path:
        return hf_folder(tmp_path / "tied", tie_word_embeddings=True)

    def test_a_copy_of_the_embedding_is_ignored(self, tied):
        before = logits(tied)
        change(tied, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
        assert load(tied).lm_head is None
        np.testing.assert_array_equal(logits(tied), before)

    def test_the_head_may_stand_for_both(self, tied):
        before = logits(tied)
        name = "model.embed_tokens.weight"
        change(tied, lambda tensors: {"lm_head.weight" if n == name else n: t for n, t in tensors.items()})
        np.testing.assert_array_equal(logits(tied), before)

    @pytest.mark.peers
    def test_a_head_of_its_own_is_kept_apart(self, tied):
        head = {"lm_head.weight": np.ones((97, 32), np.float32)}
        change(tied, lambda tensors: tensors | head)
        with pytest.warns(UserWarning, match="different values for both; they are kept apart"):
            model = load(tied)
        assert model.lm_head is not None
        assert model.config.hf_config["tie_word_embeddings"] is False
        np.testing.assert_allclose(np.asarray(model(IDS)), hf_logits(load_torch(tied), IDS), atol=1e-4)


class TestBadWeights:
    def test_missing(self, folder):
        change(
            folder,
            lambda tensors: {n: t for n, t in tensors.items() if "q_proj" not in n and n != "lm_head.weight"},
        )
        with pytest.raises(mj.InputError, match=r"4 tensors are missing: .*q_proj.weight, .*, …$"):
            load(folder)

    def test_extra(self, folder):
        change(folder, lambda tensors: tensors | {"model.extra.weight": np.ones(3, np.float32)})
        with pytest.raises(mj.InputError, match="1 tensors do not belong to the architecture: model.extra.weight"):
            load(folder)

    def test_biases_that_the_config_denies(self, tmp_path):
        folder = hf_folder(tmp_path / "b", changes={"attention_bias": False}, attention_bias=True)
        with pytest.raises(mj.InputError, match=r"12 tensors do not belong to the architecture: .*k_proj.bias"):
            load(folder)

    def test_shapes(self, folder):
        change(folder, lambda tensors: tensors | {"model.norm.weight": np.ones(31, np.float32)})
        with pytest.raises(mj.InputError, match=r"model.norm.weight has shape \[31\], but config.json implies \[32\]"):
            load(folder)

    def test_integers(self, folder):
        change(folder, lambda tensors: tensors | {"model.norm.weight": np.ones(32, np.int8)})
        with pytest.raises(mj.InputError, match="model.norm.weight has dtype I8"):
            load(folder)

    def test_truncated(self, folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(mj.InputError, match=r"model.safetensors is not a complete safetensors file \("):
            load(folder)

    def test_pickled(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(mj.InputError, match=r"only pickled weights \(pytorch_model.bin\)"):
            load(folder)

    def test_none(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(mj.InputError, match="has no model.safetensors, nor model.safetensors.index.json"):
            load(folder)


class TestBadFolders:
    def test_no_folder(self, tmp_path):
        with pytest.raises(mj.InputError, match=r"nowhere is not a folder \(a hub id looks like owner/name\)"):
            load(tmp_path / "nowhere")
        with pytest.raises(mj.InputError, match="nowhere is not a folder"):
            load("nowhere")

    def test_a_file(self, folder):
        with pytest.raises(mj.InputError, match="is a file; give the folder that holds config.json"):
            load(folder / "config.json")

    def test_a_hub_id_without_network(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(mj.InputError, match="owner/name is not a local folder, and could not be fetched") as error:
            load("owner/name")
        assert "\n" not in str(error.value)

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(mj.InputError, match="config.json does not exist"):
            load(folder)

    @pytest.mark.parametrize("text, message", [("{", "is not valid JSON"), ("[1]", "must hold a JSON object")])
    def test_bad_config(self, folder, text, message):
        (folder / "config.json").write_text(text)
        with pytest.raises(mj.InputError, match=f"config.json {message}") as error:
            load(folder)
        assert "\n" not in str(error.value)

    def test_a_bad_value_names_the_file(self, folder):
        values = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": "two"}
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(mj.InputError, match=r"model/config.json: num_hidden_layers must be a positive whole"):
            load(folder)


class TestTokenizers:
    def test_none(self, folder):
        assert mj.load_pretrained(folder)[1] is None

    def test_from_the_folder(self, folder):
        write_tokenizer(folder)
        tokenizer = mj.load_pretrained(folder)[1]
        assert tokenizer("b a c")["input_ids"] == [1, 0, 2]

    def test_cut_off(self, folder):
        write_tokenizer(folder)
        file = folder / "tokenizer.json"
        file.write_text(file.read_text()[:-20])
        with pytest.raises(mj.InputError, match="tokenizer.json is broken JSON"):
            load(folder)

    def test_of_another_form(self, folder):
        write_tokenizer(folder)
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}')
        with pytest.raises(mj.InputError, match="cannot load a tokenizer from"):
            load(folder)


def test_weights_exist_once(folder):
    """A parameter's buffer is its own: nothing of the file stays mapped into the model."""
    model = load(folder)
    before = np.asarray(model(IDS))
    shutil.rmtree(folder)
    np.testing.assert_array_equal(np.asarray(model(IDS)), before)
    assert all(isinstance(node[...], jnp.ndarray) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_every_number_is_read_once(folder, monkeypatch, quantize):
    read: Counter[str] = Counter()

    def counted(real):
        def reading(files, name, *index):
            found = real(files, name, *index)
            read[name] += found.size
            return found

        return reading

    for way in ("read", "read_part"):
        monkeypatch.setattr(TensorFiles, way, counted(getattr(TensorFiles, way)))
    load(folder, quantize=quantize)
    assert read == {name: math.prod(shape) for name, shape in open_checkpoint(folder).shapes.items()}


def test_what_is_read_is_not_copied_once_more():
    """XLA on a CPU takes over memory that begins at a multiple of 64 bytes."""
    buffer = empty((3, 1000), jnp.bfloat16)
    assert jax.device_put(buffer).unsafe_buffer_pointer() == buffer.ctypes.data


@pytest.mark.peers
@pytest.mark.shared
def test_real_weights(shared_dir):
    folder = shared_dir / "models" / "stories260K"
    model, tokenizer = mj.load_pretrained(folder, dtype="float32")
    reference = load_torch(folder)
    ids = np.array([tokenizer("Once upon a time, there was a little girl named Lily.")["input_ids"]])
    found, expected = np.asarray(model(ids)), hf_logits(reference, ids)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.skipif("MORA_JAX_SMOLLM2" not in os.environ, reason="MORA_JAX_SMOLLM2 names no folder")
def test_smollm2():
    folder = Path(os.environ["MORA_JAX_SMOLLM2"])
    model, tokenizer = mj.load_pretrained(folder, dtype="float32")
    reference = load_torch(folder)
    text = "The capital of France is Paris. 2 + 2 = 4. def add(a, b):\n    return a + b\n"
    ids = np.array([tokenizer(text)["input_ids"]])
    found, expected = np.asarray(model(ids)), hf_logits(reference, ids)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_the_first_import_of_transformers_is_silent():
    code = "from mora_jax.data.tokens.tokenize import _auto_tokenizer; _auto_tokenizer()"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""
