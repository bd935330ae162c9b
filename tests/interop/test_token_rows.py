"""Rows of single tokens trained beside adapters, and vocabularies that grow, against numpy and PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mora_jax as mj
from mora_jax.evaluation import Generator
from tests.interop.test_load import write_tokenizer
from tests.models.tiny import fill_randomly, hf_folder

CONFIG = mj.LoRAConfig(rank=2, targets=("q_proj", "down_proj"), trainable_tokens=[3, 90, 7])
IDS = jnp.array([[3, 5, 90, 11, 7, 3]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    return hf_folder(tmp_path / "base", tie_word_embeddings=request.param)


def loaded(base, config=CONFIG):
    model = mj.load_pretrained(base, dtype="float32")[0]
    report = mj.attach(model, config, rngs=nnx.Rngs(0))
    return model, report


@pytest.mark.slow
def test_rows_are_trained_merged_and_counted_as_in_a_table_with_other_rows(base):
    plain = mj.load_pretrained(base, dtype="float32")[0]
    model, report = loaded(base)
    np.testing.assert_array_equal(model(IDS), plain(IDS))
    (match,) = [match for match in report.matches if match.path == "model.embed_tokens"]
    assert match.trainable == 3 * 32
    fill_randomly(model)
    rows = np.asarray(model.embed_tokens.adapter.token_delta[...])
    other, _ = loaded(base, mj.LoRAConfig(rank=2, targets=("q_proj", "down_proj")))
    fill_randomly(other)
    graphdef, adapters, frozen = nnx.split(model, mj.AdapterParam, ...)
    theirs, base_arrays = nnx.split(other, mj.AdapterParam, ...)[1:]
    same = dict(nnx.to_flat_state(adapters))
    for path, variable in nnx.to_flat_state(theirs):
        variable.set_value(same[path].get_value())
    nnx.update(other, theirs)
    table = np.array(other.embed_tokens.embedding[...])
    for row, token in enumerate((3, 90, 7)):
        table[token] += rows[row]
    other.embed_tokens.embedding[...] = jnp.asarray(table)
    np.testing.assert_allclose(model(IDS), other(IDS), rtol=1e-5, atol=1e-5)
    prompt = [3, 90, 7, 4]
    greedy, others = (Generator(one).batch([prompt], max_new_tokens=6) for one in (model, other))
    jax.tree.map(np.testing.assert_array_equal, greedy, others)

    def loss(adapters, ids):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, adapters, frozen)(ids)))

    unused = jax.grad(loss)(adapters, jnp.array([[5, 11]]))["embed_tokens"]["adapter"]["token_delta"][...]
    assert bool(jnp.any(unused != 0)) is (model.lm_head is None)  # a tied head reads every row
    used = jax.grad(loss)(adapters, IDS)["embed_tokens"]["adapter"]["token_delta"][...]
    assert bool(jnp.all(jnp.any(used != 0, axis=1)))
    before = model(IDS)
    merged = mj.merge(model)
    np.testing.assert_allclose(model(IDS), before, rtol=1e-4, atol=1e-4)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model(IDS), before, rtol=1e-4, atol=1e-4)


def test_folders_hold_the_rows_themselves(base, tmp_path):
    model, _ = loaded(base)
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [3, 90, 7]
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    rows = stored["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    delta = np.asarray(model.embed_tokens.adapter.token_delta[...])
    np.testing.assert_allclose(rows, table[[3, 90, 7]] + delta, rtol=1e-6)
    again = mj.load_pretrained(base, dtype="float32")[0]
    mj.load_adapter(again, tmp_path / "a")
    np.testing.assert_allclose(again(IDS), model(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("tokens", [[90, 3], {"embed_tokens": [90, 3]}], ids=["list", "of a table"])
def test_folders_of_both_ways_give_the_same_logits_in_peft(base, tmp_path, tokens):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(base)

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, init_lora_weights=False)
    theirs = peft.get_peft_model(load(), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path / "theirs")
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.load_adapter(model, tmp_path / "theirs")
    ids = torch.tensor(np.array(IDS))
    np.testing.assert_allclose(model(IDS), theirs.eval()(ids).logits.detach().numpy(), rtol=1e-4, atol=1e-4)
    model, _ = loaded(base)
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(load(), tmp_path / "ours").eval()
    np.testing.assert_allclose(read(ids).logits.detach().numpy(), model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"trainable_tokens": [97]}, r"trainable_tokens names 97, and model.embed_tokens has 97 rows"),
        ({"trainable_tokens": [1], "targets": ("embed_tokens",)}, "is among the targets, and trainable_tokens"),
        ({"trainable_tokens": [1], "modules_to_save": ("embed_tokens",)}, "is trained whole"),
        ({"trainable_tokens": [-1]}, "trainable_tokens must be"),
        ({"trainable_tokens": "all"}, "trainable_tokens must be ids of tokens"),
    ],
)
def test_refusals(changes, words, tmp_path):
    model = mj.load_pretrained(hf_folder(tmp_path / "base"), dtype="float32")[0]
    with pytest.raises(ValueError, match=words):
        mj.attach(model, mj.LoRAConfig(**({"rank": 2, "targets": ("q_proj",)} | changes)), rngs=nnx.Rngs(0))
    assert type(model.embed_tokens).__name__ == "TokenEmbedding"


def test_methods_that_peft_has_no_tokens_for(tmp_path):
    model, _ = loaded(hf_folder(tmp_path / "base"), mj.IA3Config(targets=("k_proj",), trainable_tokens=[1]))
    with pytest.raises(mj.InputError, match="beside LoRA alone, not beside IA3"):
        mj.save_adapter(model, tmp_path / "a")


def test_added_tokens_grow_table_head_and_tokenizer(base, tmp_path):
    write_tokenizer(base)
    model, tokenizer = mj.load_pretrained(base, dtype="float32")
    before = np.asarray(model.embed_tokens.embedding[...])
    used = max(tokenizer.get_vocab().values()) + 1
    known = jnp.arange(used)[None, :5]
    logits = np.asarray(model(known))
    ids = mj.add_tokens(model, tokenizer, ["<think>", "</think>"], multiple=16)
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == list(ids)
    assert model.config.vocab_size % 16 == 0 or model.config.vocab_size == 97
    after = np.asarray(model.embed_tokens.embedding[...])
    mean = sum(before[row].astype(np.float64) for row in range(min(used, 97))) / min(used, 97)
    for row in (*ids, *range(97, model.config.vocab_size)):
        np.testing.assert_allclose(after[row], mean, rtol=1e-5, atol=1e-6)
    others = [row for row in range(97) if row not in ids]
    np.testing.assert_array_equal(after[others], before[others])
    np.testing.assert_allclose(np.asarray(model(known))[..., others], logits[..., others], rtol=1e-5, atol=1e-5)
    config = mj.LoRAConfig(rank=2, targets=("q_proj",), trainable_tokens=ids)
    with pytest.raises(mj.InputError, match="the added token '<think>', which the tokenizer in .* would split: give"):
        mj.finetune(model, [{"prompt": "a", "completion": "<think>"}], config, steps=1)
    mj.attach(model, config, rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "a")
    again, words = mj.load_pretrained(base, dtype="float32")
    mj.add_tokens(again, words, ["<think>", "</think>"], multiple=16)
    mj.load_adapter(again, tmp_path / "a")
    text = jnp.array([[5, ids[0], 7, ids[1]]])
    np.testing.assert_allclose(again(text), model(text), rtol=1e-5, atol=1e-5)
    mj.merge(model)
    with pytest.raises(mj.InputError, match="the added token '<think>'.* give the one that was grown"):
        mj.save_pretrained(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    mj.save_pretrained(model, tmp_path / "merged", tokenizer)
    whole, words = mj.load_pretrained(tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(whole(text), again(text), rtol=1e-4, atol=1e-4)
    assert words.convert_tokens_to_ids("<think>") == ids[0]


def test_tokens_that_can_not_be_added(base):
    write_tokenizer(base)
    model, tokenizer = mj.load_pretrained(base, dtype="float32")
    there = next(iter(tokenizer.get_vocab()))
    for tokens, words in (([there], "has the token .* already"), (["<a>", "<a>"], "twice"), ("<a>", "a list of texts")):
        with pytest.raises(mj.InputError, match=words):
            mj.add_tokens(model, tokenizer, tokens)
    mj.attach(model, CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="add tokens first"):
        mj.add_tokens(model, tokenizer, ["<a>"])
