"""Adapters on the decoder's embedding and head, tied or not, and modules that are trained whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.base import FullParam
from mora_jax.models import init_decoder
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step
from tests.models.tiny import LLAMA, fill_randomly, random_ids

IDS = random_ids(2, 9)


def decoder(tied: bool, dtype="float32"):
    return init_decoder(LLAMA | {"tie_word_embeddings": tied}, nnx.Rngs(0), dtype=dtype)


def set_tables(model, embedding, head):
    model.embed_tokens.embedding[...] = jnp.asarray(embedding, jnp.float32)
    if head is not None:
        model.lm_head.kernel[...] = jnp.asarray(head, jnp.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [mj.LoRAConfig, pytest.param(mj.RsLoRAConfig, marks=pytest.mark.slow), mj.DoRAConfig])
def test_adapted_tables_equal_a_model_with_those_tables(tied, make):
    model, plain = decoder(tied), decoder(tied)
    before = np.asarray(model(IDS))
    targets = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    config = make(rank=3, alpha=6.0, targets=targets)
    mj.attach(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(IDS), before, rtol=0, atol=2e-5)
    fill_randomly(model, scale=0.4)
    tables = {}
    for entry in adapters_of(model):
        p = {name: np.float64(value) for name, value in entry.params.items()}
        base = plain.embed_tokens.embedding[...] if entry.is_embedding else plain.lm_head.kernel[...].T
        adapted = np.float64(base) + p["scaling"] * p["lora_a"] @ p["lora_b"]
        if "magnitude" in p:
            adapted = adapted / np.sqrt((adapted**2).sum(0)) * p["magnitude"]
        tables[entry.path] = adapted
    assert set(tables) == ({"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"})
    set_tables(plain, tables["model.embed_tokens"], None if tied else tables["lm_head"].T)
    expected = np.asarray(plain(IDS))
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(model(IDS), expected, rtol=1e-4, atol=1e-4)
    merged = mj.merge(model)
    np.testing.assert_allclose(model(IDS), expected, rtol=1e-4, atol=1e-4)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model(IDS), expected, rtol=1e-4, atol=1e-4)
    mj.detach(model)
    np.testing.assert_allclose(model(IDS), before, rtol=1e-4, atol=1e-4)


def test_the_tied_table_learns_from_both_ends():
    model, plain = decoder(True), decoder(True)
    mj.attach(model, mj.LoRAConfig(rank=2, alpha=4.0, targets=("embed_tokens",)), rngs=nnx.Rngs(1))
    fill_randomly(model)
    (entry,) = adapters_of(model)
    p = entry.params
    graphdef, adapters, frozen = mj.partition(model)
    weights = np.random.default_rng(0).normal(size=(2, 9, 97)).astype(np.float32)
    found = jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, a, frozen)(IDS) * weights))(adapters)
    table = plain.embed_tokens.embedding[...] + p["scaling"] * p["lora_a"] @ p["lora_b"]

    set_tables(plain, table, None)
    structure, state = nnx.split(plain)
    slopes = jax.grad(lambda state: jnp.sum(nnx.merge(structure, state)(IDS) * weights))(state)
    slope = np.asarray(slopes["embed_tokens"]["embedding"][...])
    leaves = found["embed_tokens"]["adapter"]
    np.testing.assert_allclose(leaves["lora_a"][...], p["scaling"] * slope @ p["lora_b"].T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(leaves["lora_b"][...], p["scaling"] * p["lora_a"].T @ slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [mj.MoRAConfig(targets=("embed_tokens",)), mj.BitFitConfig(targets=("lm_head",))])
def test_methods_without_a_form_for_an_end(config):
    with pytest.raises(ValueError, match="leave it out of targets"):
        mj.attach(decoder(False), config, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("make", [mj.LoRAConfig, mj.MoRAConfig, mj.BitFitConfig])
def test_modules_to_save_are_trained_whole_and_given_back(make):
    model = decoder(False, "bfloat16")
    before = np.asarray(model(IDS))
    names = ("embed_tokens", "lm_head", "norm", "input_layernorm")
    report = mj.attach(model, make(targets=("q_proj", "v_proj"), modules_to_save=names), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(IDS), before)
    whole = {match.path: match.trainable for match in report.matches if match.layers == 0}
    assert whole == {
        "model.embed_tokens": 97 * 32,
        "lm_head": 97 * 32,
        "model.norm": 32,
        "model.layers.*.input_layernorm": 3 * 32,
    }
    _, adapters, _ = mj.partition(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == report.trainable
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
    fill_randomly(model)
    tuned = np.asarray(model(IDS))
    assert np.abs(tuned - before).max() > 0.01
    other = nnx.clone(model)
    mj.merge(other)
    assert other.lm_head.kernel[...].dtype == other.embed_tokens.embedding[...].dtype == jnp.bfloat16
    assert not any(isinstance(node, FullParam) for _, node in nnx.iter_graph(other))
    np.testing.assert_allclose(other(IDS), tuned, atol=np.abs(tuned).max() * 0.05)
    mj.detach(model)
    np.testing.assert_array_equal(model(IDS), before)


def test_modules_to_save_are_not_adapted_and_named_right():
    model = decoder(True)
    config = mj.LoRAConfig(targets=r".*(q_proj|k_proj|v_proj|o_proj)", modules_to_save=("o_proj",))
    mj.attach(model, config, rngs=nnx.Rngs(1))
    assert {entry.path.rpartition(".")[2] for entry in adapters_of(model)} == {"q_proj", "k_proj", "v_proj"}
    assert isinstance(model.layers.self_attn.o_proj.kernel, FullParam)
    with pytest.raises(ValueError, match="no module is called 'head'; there are .*embed_tokens"):
        mj.attach(decoder(True), mj.LoRAConfig(modules_to_save=("head",)), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="q_proj is stored together with model.layers.*k_proj; name that too"):
        mj.attach(decoder(True), mj.LoRAConfig(modules_to_save=("q_proj",)), rngs=nnx.Rngs(1))


def test_the_adapter_of_the_head_leaves_out_inputs_and_the_base_does_not():
    """An adapter whose update shows its inputs: logit v is input v of the head, or nothing of it, scaled up."""
    model, rate = decoder(False), 0.25
    width = LLAMA["hidden_size"]
    base, hidden = np.asarray(model(IDS)), np.asarray(model.hidden(IDS))
    mj.attach(model, mj.LoRAConfig(rank=width, alpha=width, dropout=rate, targets=("lm_head",)), rngs=nnx.Rngs(1))
    adapter = model.lm_head.adapter
    adapter.lora_a[...], adapter.lora_b[...] = jnp.eye(width), jnp.eye(width, base.shape[-1])
    np.testing.assert_allclose(model(IDS)[..., :width] - base[..., :width], hidden, atol=1e-4)
    updates = [np.asarray(model(IDS, dropout_key=jax.random.key(seed))) - base for seed in range(40)]
    np.testing.assert_allclose(updates[0][..., width:], 0, atol=1e-5)
    shares = np.stack(updates)[..., :width] / hidden
    dropped = np.abs(shares) < 0.1
    np.testing.assert_allclose(shares[~dropped], 1 / (1 - rate), rtol=0.05)
    assert dropped.mean() == pytest.approx(rate, abs=0.02)
    assert dropped.any((0, 1)).all() and not dropped.all((0, 1)).any()


def test_a_step_trains_the_head_with_its_dropout():
    model = decoder(False)
    mj.attach(model, mj.LoRAConfig(rank=3, dropout=0.5, targets=("lm_head",)), rngs=nnx.Rngs(1))
    fill_randomly(model, scale=0.4)
    graphdef, adapters, frozen = mj.partition(model)
    optimizer = optax.sgd(1e-2)
    step = make_step(Structure(graphdef, adapters, frozen), optimizer, lambda _: 1e-2, StepConfig(dropout=True))
    state = initial_state(flat_arrays(adapters), optimizer, 0)
    batch = {name: np.ones((1, *IDS.shape), np.int32) for name in ("input_ids", "segment_ids")}
    batch |= {"input_ids": IDS[None], "weights": np.ones((1, *IDS.shape), np.float32)}
    after, metrics = jax.jit(step)(state, flat_arrays(frozen), batch)

    def loss(adapters):
        logits = nnx.merge(graphdef, adapters, frozen)(IDS, dropout_key=jax.random.fold_in(state.key, 0))
        likelihoods = jax.nn.log_softmax(logits)[:, :-1]
        return -jnp.mean(jnp.take_along_axis(likelihoods, IDS[:, 1:, None], axis=-1))

    expected, gradient = jax.value_and_grad(loss)(adapters)
    assert float(metrics.loss) == pytest.approx(float(expected), rel=1e-5)
    for name, array in flat_arrays(gradient).items():
        assert np.abs(array).max() > 1e-4
        np.testing.assert_allclose((state.adapters[name] - after.adapters[name]) / 1e-2, array, rtol=2e-3, atol=1e-5)
