"""Combinations of adapters: against dense sums by loops, against real PEFT, and what is refused."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.mora import KINDS
from tests.adapters import oracle
from tests.models.tiny import fill_randomly, hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, hf_model
from tests.peers import peft

# PEFT 0.21 asks transformers for a property whose name transformers 5 deprecates.
IN, OUT = 7, 5
WEIGHTS = {"a": 0.7, "b": -1.5}
IDS = random_ids(2, 9)


class Model(nnx.Module):
    """One layer."""

    def __init__(self):
        self.proj = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.proj(x)


def layer(config=None, seed=0):
    model = Model()
    if config is not None:
        mj.attach(model, config, rngs=nnx.Rngs(0))
        fill_randomly(model, seed, 1.0)
    return model


def collection(**configs):
    """A collection, and A, B and scaling (or M) of each adapter in float64."""
    named, values = mj.NamedAdapters(layer()), {}
    for seed, (name, config) in enumerate(configs.items()):
        source = layer(config, seed)
        named.add(name, source)
        values[name] = {key: np.asarray(array, np.float64) for key, array in source.proj.adapter.params().items()}
    return named, values


def combined(named):
    """The update of the adapter `mix`, by loops over its factors."""
    named.keep("mix")
    params = {key: np.asarray(array, np.float64) for key, array in named.model.proj.adapter.params().items()}
    return dense(params), params


def dense(p):
    update = np.zeros((IN, OUT))
    for i, o, k in itertools.product(range(IN), range(OUT), range(p["lora_a"].shape[1])):
        update[i, o] += p["scaling"] * p["lora_a"][i, k] * p["lora_b"][k, o]
    return update


LORAS = {"a": mj.LoRAConfig(rank=2, alpha=3.0), "b": mj.RsLoRAConfig(rank=2, alpha=4.0)}


def test_cat_is_the_weighted_sum():
    named, values = collection(**LORAS | {"b": mj.LoRAConfig(rank=1, alpha=5.0)})
    conversion = named.add_weighted("mix", WEIGHTS, "cat")
    assert conversion.error == 0.0
    update, params = combined(named)
    assert params["lora_a"].shape == (IN, 3)
    np.testing.assert_allclose(update, sum(w * dense(values[n]) for n, w in WEIGHTS.items()), atol=1e-5)


@pytest.mark.parametrize("rank", [None, 3])
def test_svd_is_the_nearest(rank):
    named, values = collection(**LORAS)
    whole = sum(w * dense(values[n]) for n, w in WEIGHTS.items())
    conversion = named.add_weighted("mix", WEIGHTS, "svd", rank=rank)
    u, s, vt = np.linalg.svd(whole)
    kept = rank or 2
    update, params = combined(named)
    assert params["lora_a"].shape == (IN, kept)
    np.testing.assert_allclose(update, u[:, :kept] * s[:kept] @ vt[:kept], atol=1e-5)
    assert conversion.error == pytest.approx(np.linalg.norm(s[kept:]) / np.linalg.norm(s), rel=1e-4)
    assert conversion.error > 0.01
    assert "svd of 0.7 a and -1.5 b, 1 matrices: relative Frobenius error 0." in str(conversion)


def test_linear_is_pefts_and_states_its_error():
    named, values = collection(**LORAS)
    conversion = named.add_weighted("mix", WEIGHTS, "linear")
    a, b = np.zeros((IN, 2)), np.zeros((2, OUT))
    for name, weight in WEIGHTS.items():
        p = values[name]
        a += np.sign(weight) * np.sqrt(abs(weight) * p["scaling"]) * p["lora_a"]
        b += np.sqrt(abs(weight) * p["scaling"]) * p["lora_b"]
    update, _ = combined(named)
    np.testing.assert_allclose(update, a @ b, atol=1e-5)
    whole = sum(w * dense(values[n]) for n, w in WEIGHTS.items())
    assert conversion.error == pytest.approx(np.linalg.norm(whole - a @ b) / np.linalg.norm(whole), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sum_of_mora(kind):
    named, values = collection(a=mj.MoRAConfig(rank=1, kind=kind), b=mj.MoRAConfig(rank=1, kind=kind))
    assert named.add_weighted("mix", WEIGHTS, "sum").error == 0.0
    named.keep("mix")
    expected = sum(w * oracle.dense(values[n]["m"], IN, OUT, kind).T for n, w in WEIGHTS.items())
    np.testing.assert_allclose(named.model.proj.adapter.delta_weight(), expected, atol=1e-5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, IN)), jnp.float32)
    np.testing.assert_allclose(named.model(x) - layer()(x), np.asarray(x) @ expected, atol=1e-5)


def test_refusals():
    named, _ = collection(a=LORAS["a"], b=mj.LoRAConfig(rank=3))
    for weights, combination, options, words in (
        (WEIGHTS, "linear", {}, "linear needs equal ranks, not 2 and 3; use cat or svd"),
        (WEIGHTS, "sum", {}, "LoRA are combined by linear or cat or svd, not by sum"),
        (WEIGHTS, "cat", {"rank": 2}, "a rank is for svd"),
        ({"a": float("nan")}, "cat", {}, "the weight of a is nan"),
        ({"x": 1.0}, "cat", {}, "there is no adapter 'x'"),
        ({}, "cat", {}, "at least one"),
    ):
        with pytest.raises(mj.InputError, match=words):
            named.add_weighted("mix", weights, combination, **options)
    with pytest.raises(mj.InputError, match="there is an adapter 'a' already"):
        named.add_weighted("a", WEIGHTS, "cat")
    assert named.names == ("a", "b")
    moras, _ = collection(a=mj.MoRAConfig(rank=1))
    with pytest.raises(mj.InputError, match="MoRA of kind sharing are combined by sum, not by svd"):
        moras.add_weighted("mix", {"a": 1.0}, "svd")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two adapters that PEFT wrote, under names here, and the model that wrote them."""
    root = tmp_path_factory.mktemp("trained")
    torch_model = hf_model("llama")
    hf_folder(root / "base")
    options = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(torch_model, peft.LoraConfig(lora_alpha=2, **options), adapter_name="poet")
    model.add_adapter("coder", peft.LoraConfig(lora_alpha=6, use_rslora=True, **options))
    model.save_pretrained(root)
    named = mj.NamedAdapters(mj.load_pretrained(root / "base", dtype="float32")[0], slots=8, rank=8)
    for name in ("poet", "coder"):
        named.load(root / name)
    return named, model.eval()


@pytest.mark.peers
@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_against_peft(trained, tmp_path, combination):
    named, torch_model = trained
    weights = {"poet": 0.8, "coder": -0.5}
    name = f"mix-{combination}"
    rank = 3 if combination == "svd" else None
    options = {} if rank is None else {"svd_rank": rank}
    torch_model.add_weighted_adapter(list(weights), list(weights.values()), name, combination, **options)
    torch_model.set_adapter(name)
    expected = hf_logits(torch_model, IDS)
    named.add_weighted(name, weights, combination, rank=rank)
    ours = named.model(IDS, adapter_ids=named.ids([name] * len(IDS)))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(named.model(IDS, adapter_ids=[-1] * len(IDS)) - expected).max() > 0.01
    named.save(name, tmp_path / "mix")
    again = peft.PeftModel.from_pretrained(hf_model("llama"), str(tmp_path / "mix"))
    np.testing.assert_allclose(hf_logits(again.eval(), IDS), expected, atol=1e-4)
