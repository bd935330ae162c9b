"""The embedded folder: small enough, and the same model in transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

import mora_jax as mj
from mora_jax.demo import ASSETS, model_path
from scripts.demo_model import corpus, world
from tests.models.tiny_torch import hf_logits, load_torch


def test_size():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    model, _ = mj.load_pretrained(model_path())
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) <= 1_500_000


@pytest.mark.peers
def test_logits_equal_those_of_transformers():
    model, tokenizer = mj.load_pretrained(model_path(), dtype="float32")
    text = corpus.Corpus().document(corpus.HELD_OUT[0])
    ids = tokenizer(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(model_path())(text)["input_ids"]
    expected = hf_logits(load_torch(model_path()), np.array([ids]))
    got = np.asarray(model(jnp.asarray([ids])))
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert (got.argmax(-1) == expected.argmax(-1)).all()


def test_every_word_of_the_world_is_one_token():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    words = {
        *world.NAMES,
        *world.NOUNS,
        *(noun.upper() for noun in world.NOUNS),
        *world.COLOURS,
        *world.OPPOSITE,
        *(word for order in world.SEQUENCES.values() for word in order),
    }
    assert [word for word in words if len(tokenizer.tokenize(word)) != 1] == []


def test_text_survives_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    for text in ("Tom wrote: cat dog.", "naïve – 東京 🙂", "two  spaces\nand a line"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]).removeprefix(" ") == text


def test_offsets_cover_every_character_also_after_a_role_marker():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    text = tokenizer.apply_chat_template([{"role": "user", "content": "m"}], tokenize=False)
    assert text == "<|user|>m<|end|>"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(0, 8), (8, 9), (9, 16)]


def test_the_folder_holds_nothing_else():
    assert {file.name for file in Path(model_path()).iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
