"""A field that a PEFT folder leaves out has the value that PEFT gives it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from tests.models.tiny import fill_randomly, hf_folder
from tests.peers import peft

NAMES = ("q_proj", "down_proj")
# By PEFT's configuration class: adapters of its default values, and those values.
DEFAULTS = {
    "LoraConfig": (mj.LoRAConfig(rank=8, alpha=8, targets=NAMES), {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}),
    "VeraConfig": (mj.VeRAConfig(rank=256, targets=NAMES), {"r": 256, "projection_prng_key": 0, "vera_dropout": 0.0}),
    "HiraConfig": (mj.HiRAConfig(rank=32, targets=NAMES), {"r": 32, "hira_dropout": 0.0}),
    "MissConfig": (
        mj.MiSSConfig(rank=64, targets=NAMES),
        {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True},
    ),
    "RandLoraConfig": (
        mj.RandLoRAConfig(rank=32, alpha=640, targets=NAMES),
        {"r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0, "projection_prng_key": 0, "sparse": False},
    ),
    "OFTConfig": (
        mj.OFTConfig(block_size=32, targets=NAMES),
        {"r": 0, "oft_block_size": 32, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "block_share": False},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("bases") / "llama", hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_field_left_out_has_its_default(name, base, tmp_path):
    config, fields = DEFAULTS[name]
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.attach(model, config, rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    for field, value in fields.items():
        assert values.pop(field) == value, field
    path.write_text(json.dumps(values))
    again = mj.load_pretrained(base, dtype="float32")[0]
    mj.load_adapter(again, tmp_path / "adapter")
    before, after = list(adapters_of(model)), list(adapters_of(again))
    assert [entry.path for entry in before] == [entry.path for entry in after] != []
    for one, other in zip(before, after, strict=True):
        assert set(one.params) == set(other.params)
        for key, value in one.params.items():
            np.testing.assert_array_equal(value, other.params[key], err_msg=f"{one.path}.{key}")


@pytest.mark.peers
@pytest.mark.parametrize("name", DEFAULTS)
def test_these_are_the_defaults_of_peft(name):
    theirs = {field.name: field.default for field in dataclasses.fields(getattr(peft, name))}
    assert {field: theirs[field] for field in DEFAULTS[name][1]} == DEFAULTS[name][1]
