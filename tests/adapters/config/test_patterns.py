"""Ranks by layer, chosen layers, trained biases: what differs within one model."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.config.limits import POSITIVE
from mora_jax.adapters.config.patterns import value_at
from mora_jax.models import init_decoder
from tests.models.tiny import LLAMA, fill_randomly, random_ids
from tests.peers import peft


@pytest.mark.peers
@pytest.mark.parametrize(
    ("key", "path", "found"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        (r"layers\.0\.self_attn\.q_proj", "model.layers.0.self_attn.q_proj", True),
        (r"layers\.[01]\..*", "model.layers.1.mlp.up_proj", True),
        (r"^layers.0.q_proj", "model.layers.0.q_proj", False),
        ("model.layers.1.x", "model.layers.1.x", True),
    ],
)
def test_keys_match_as_in_peft(key, path, found):
    assert (value_at(((key, 7),), path, 3) == 7) is found
    # PEFT gives the path itself where no key matches.
    assert (peft.utils.other.get_pattern_key([key], path) == key) is found


def decoder():
    return init_decoder(LLAMA, nnx.Rngs(0))


@pytest.mark.slow
def test_layers_of_a_stack_with_ranks_and_alphas_of_their_own():
    config = mj.LoRAConfig(
        rank=2,
        alpha=4.0,
        targets=("q_proj", "up_proj"),
        rank_pattern={r"layers\.1\..*q_proj": 5, "up_proj": 3},
        alpha_pattern={r"layers\.0\..*": 8.0},
    )
    model, ids = decoder(), random_ids(2, 9)
    before = np.asarray(model(ids))
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(ids), before)
    fill_randomly(model)
    entries = {entry.path: entry for entry in adapters_of(model)}
    shapes = {path: entry.params["lora_a"].shape[1] for path, entry in entries.items()}
    assert shapes == {f"model.layers.{i}.self_attn.q_proj": 5 if i == 1 else 2 for i in range(3)} | {
        f"model.layers.{i}.mlp.up_proj": 3 for i in range(3)
    }
    scalings = {path: float(entry.params["scaling"]) for path, entry in entries.items()}
    for path, entry in entries.items():
        assert scalings[path] == pytest.approx((8.0 if ".0." in path else 4.0) / entry.config.rank)
    assert report.trainable == sum(rank * (64 if "q_proj" in path else 80) for path, rank in shapes.items())

    # Nothing beyond a layer's rank has an effect, nor does it learn.
    q_proj = model.layers.self_attn.qkv_proj.adapters["q_proj"]
    kernels = np.asarray(q_proj.delta_weight())
    for i in range(3):
        entry = entries[f"model.layers.{i}.self_attn.q_proj"].params
        np.testing.assert_allclose(kernels[i], entry["scaling"] * entry["lora_a"] @ entry["lora_b"], atol=1e-6)
    tuned = np.asarray(model(ids))
    graphdef, adapters, frozen = mj.partition(model)
    slope = jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, a, frozen)(ids) ** 2))(adapters)
    slope_a = np.asarray(slope["layers"]["self_attn"]["qkv_proj"]["adapters"]["q_proj"]["lora_a"][...])
    assert np.abs(slope_a[1]).min() > 0 and not slope_a[[0, 2], :, 2:].any()
    mj.merge(model)
    np.testing.assert_allclose(model(ids), tuned, rtol=1e-4, atol=1e-4)


def test_mora_refuses_ranks_that_differ_within_a_stack():
    config = mj.MoRAConfig(rank=2, rank_pattern={r"layers\.1\..*": 5})
    with pytest.raises(ValueError, match="different ranks, for which mora has no form"):
        mj.attach(decoder(), config, rngs=nnx.Rngs(1))
    model = decoder()
    mj.attach(model, mj.MoRAConfig(rank=2, rank_pattern={"q_proj": 5}), rngs=nnx.Rngs(1))
    assert {entry.config.rank for entry in adapters_of(model) if "q_proj" in entry.path} == {5}


def test_layers_to_transform():
    model = decoder()
    report = mj.attach(model, mj.LoRAConfig(targets=("q_proj",), layers_to_transform=[0, 2]), rngs=nnx.Rngs(1))
    assert [entry.path for entry in adapters_of(model)] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    assert report.matches[0].layers == 2
    with pytest.raises(ValueError, match="names layer 3, which the model does not have"):
        mj.attach(decoder(), mj.LoRAConfig(layers_to_transform=3), rngs=nnx.Rngs(1))


class Small(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)
        self.bare = nnx.Linear(3, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.bare(self.last(self.norm(self.first(x))))


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", 0),
        ("lora_only", 5),
        ("all", 5 + 5 + 3),
    ],
)
def test_existing_biases_are_trained(bias, trained):
    model, x = Small(nnx.Rngs(0)), jnp.ones((2, 4)) * jnp.arange(4.0)
    before = np.asarray(model(x))
    report = mj.attach(model, mj.LoRAConfig(rank=2, targets=("first", "bare"), bias=bias), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(x), before)
    assert report.trainable == 2 * 9 + 2 * 6 + trained
    _, adapters, _ = mj.partition(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == report.trainable
    fill_randomly(model, scale=1.0)
    tuned = np.asarray(model(x))
    mj.merge(model)
    np.testing.assert_allclose(model(x), tuned, rtol=1e-4, atol=1e-5)
    assert (np.asarray(model.norm.bias[...]) != 0).any() == (bias == "all")
    assert model.bare.bias is None and type(model.norm.bias) is nnx.Param


def test_detach_gives_the_old_biases_back():
    model, x = Small(nnx.Rngs(0)), jnp.ones((2, 4))
    before = np.asarray(model(x))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("first",), bias="all"), rngs=nnx.Rngs(1))
    fill_randomly(model)
    mj.detach(model)
    np.testing.assert_array_equal(model(x), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mj.LoRAConfig(bias="some"), "bias must be one of none, lora_only, all, not 'some'"),
        (lambda: mj.LoRAConfig(rank_pattern={"q": 0}), r"rank_pattern\['q'\] must be a positive integer, not 0"),
        (lambda: mj.LoRAConfig(alpha_pattern={"q": -1.0}), r"alpha_pattern\['q'\] must be a positive number"),
        (lambda: mj.LoRAConfig(rank_pattern={"[": 2}), "is no regular expression"),
        (lambda: mj.LoRAConfig(layers_to_transform=()), "layers_to_transform must be layer numbers"),
        (lambda: mj.DoRAConfig(use_dora=False), "use LoRAConfig"),
    ],
)
def test_bad_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_are_checked_whether_annotations_are_classes_or_names():
    @dataclass(frozen=True)
    class Sized(mj.LoRAConfig):
        size: int = field(default=1, kw_only=True, metadata={"limits": POSITIVE})

    assert Sized.__dataclass_fields__["size"].type is int
    for wrong in ({"size": 0}, {"rank": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a positive integer, not 0"):
            Sized(**wrong)
