"""Slots of several adapters: each row gets what its own slot gives, by dense matrices and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from mora_jax.adapters.bank import LoRABank, MoRABank, use
from mora_jax.adapters.config import LoRAConfig, MoRAConfig
from mora_jax.adapters.merge import merge
from mora_jax.adapters.methods.mora import KINDS
from mora_jax.adapters.projection import Part, Projection
from mora_jax.adapters.sites import sites
from tests.adapters import oracle

SLOTS, TOKENS = 3, 4
IDS = [2, -1, 0, 2]


def filled(kind, in_features, out_features, rank=1):
    """A bank with random slots, and the dense update `[in, out]` of each."""
    draws = np.random.default_rng(0)
    if kind == "lora":
        bank = LoRABank(in_features, out_features, LoRAConfig(rank=rank), slots=SLOTS)
    else:
        bank = MoRABank(in_features, out_features, MoRAConfig(rank=rank, kind=kind), slots=SLOTS)
    updates = []
    for slot in range(SLOTS):
        shapes = {name: value[...].shape[1:] for name, value in bank.arrays().items()}
        values = {name: draws.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        if kind != "lora":
            values["scaling"] = np.ones((), np.float32)
            updates.append(oracle.dense(values["m"], in_features, out_features, kind).T)
        else:
            updates.append(np.float64(values["scaling"]) * (values["lora_a"].astype(np.float64) @ values["lora_b"]))
        bank.write(slot, values)
    return bank, updates


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_each_row_gets_its_own_update(kind):
    sizes = 7, 9
    bank, updates = filled(kind, *sizes)
    x = np.random.default_rng(1).standard_normal((len(IDS), TOKENS, sizes[0])).astype(np.float32)
    bank.choose(jnp.asarray(IDS))
    y = bank.delta(bank.config, sizes[1], jnp.asarray(x.reshape(-1, sizes[0])), bank.params())
    y = np.asarray(y).reshape(len(IDS), TOKENS, -1)
    for row, slot in enumerate(IDS):
        expected = np.zeros((TOKENS, sizes[1])) if slot < 0 else x[row] @ updates[slot]
        np.testing.assert_allclose(y[row], expected, atol=2e-5)
    bank.choose(jnp.asarray(1))
    y = bank.delta(bank.config, sizes[1], jnp.asarray(x.reshape(-1, sizes[0])), bank.params())
    np.testing.assert_allclose(y, x.reshape(-1, sizes[0]) @ updates[1], atol=2e-5)


def banked_projection(dtype):
    """Two fused matrices, one with a bank of LoRA, one with a bank of MoRA."""
    parts = (Part("q_proj", 2), Part("k_proj", 1))
    layer = Projection(
        parts, 6, out_shape=(3, 2), axes=("embed", "heads", "head_dim"), path="{name}", dtype=dtype, rngs=nnx.Rngs(0)
    )
    updates = {}
    for place, kind in zip(sites(layer), ("lora", "rotation"), strict=True):
        bank, updates[place.part] = filled(kind, place.in_features, place.out_features)
        place.put_adapter(bank, None)
    return layer, updates


def test_fused_matrices_with_banks_of_two_methods():
    layer, updates = banked_projection(jnp.float32)
    use(layer, IDS)
    x = np.random.default_rng(1).standard_normal((len(IDS), TOKENS, 6)).astype(np.float32)
    y = np.asarray(layer(jnp.asarray(x))).reshape(len(IDS), TOKENS, 6)
    base = x @ np.asarray(layer.kernel[...]).reshape(6, 6)
    for row, slot in enumerate(IDS):
        added = 0 if slot < 0 else x[row] @ np.concatenate([updates["q_proj"][slot], updates["k_proj"][slot]], axis=1)
        np.testing.assert_allclose(y[row], base[row] + added, atol=1e-5)


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def test_gradients_go_to_the_slots_of_the_rows_in_the_compute_dtype():
    layer, _ = banked_projection(jnp.bfloat16)
    use(layer, IDS)
    graphdef, adapters, frozen = nnx.split(layer, nnx.LoRAParam, ...)
    x = jax.random.normal(jax.random.key(0), (len(IDS), TOKENS, 6), jnp.bfloat16)

    def loss(adapters, x):
        return nnx.merge(graphdef, adapters, frozen)(x).astype(jnp.float32).sum()

    gradient = jax.grad(loss)
    for name, value in jax.tree.leaves_with_path(gradient(adapters, x)):
        assert value.dtype == jnp.float32
        used = np.abs(np.asarray(value)).sum((1, 2)) > 0
        assert used.tolist() == [True, False, True], name
    found = list(products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapters, x).jaxpr))
    assert len(found) > 6
    for equation in found:
        assert {operand.aval.dtype for operand in equation.invars} == {jnp.bfloat16.dtype}


def test_gradients_by_finite_differences():
    bank, _ = filled("rotation", 6, 5)
    bank.choose(jnp.asarray(IDS))
    params = bank.params()
    x = jax.random.normal(jax.random.key(1), (len(IDS) * TOKENS, 6))
    dy = jax.random.normal(jax.random.key(2), (len(IDS) * TOKENS, 5))

    def loss(m, x):
        return jnp.sum(dy * bank.delta(bank.config, 5, x, params | {"m": jnp.asarray(m)}))

    check_grads(loss, (params["m"], x), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_rows_do_not_touch_each_other():
    bank, _ = filled("lora", 6, 5)
    x = jax.random.normal(jax.random.key(0), (8, 6))
    bank.choose(jnp.asarray([0, -1]))
    before = bank.delta(bank.config, 5, x, bank.params())
    bank.write(1, {name: np.full(value[...].shape[1:], np.nan) for name, value in bank.arrays().items()})
    np.testing.assert_array_equal(bank.delta(bank.config, 5, x, bank.params()), before)
    bank.choose(jnp.asarray([1, SLOTS]))
    assert np.isnan(bank.delta(bank.config, 5, x, bank.params())).all(), "a slot that isn't there is not the base"


def test_refusals():
    layer, _ = banked_projection(jnp.float32)
    for ids, words in (
        ([SLOTS], "adapter id 3 is none of the 3 slots"),
        ([-2], "adapter id -2"),
        ([[0]], r"must be integers \[B\] or \[\], not int64 \[1, 1\]"),
        ([0.0], "not float64"),
    ):
        with pytest.raises(ValueError, match=words):
            use(layer, ids)
    use(layer, [0, 1, 2])
    with pytest.raises(ValueError, match="chosen for 3 rows, which don't divide 8 inputs"):
        layer(jnp.ones((2, 4, 6)))
    with pytest.raises(ValueError, match="several named adapters; merge one of them by its name"):
        merge(layer)
    with pytest.raises(ValueError, match="this one has none"):
        use(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0)
