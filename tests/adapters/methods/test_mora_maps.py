"""The forms of MoRA's sums and repetitions, against a loop over their steps and against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.adapters.methods import mora_maps
from mora_jax.adapters.methods.lora import FusedLoRA
from mora_jax.adapters.methods.mora import KINDS, delta_weight, square_rank
from mora_jax.adapters.methods.mora_fused import FusedMoRA
from mora_jax.adapters.methods.mora_maps import CyclicMap, FeatureMaps, Form
from mora_jax.adapters.products.matmul import FusedLayout

# length, source, target: tiles with a rest and without, sums with a rest and without, padding of both sides, one step.
WALKS = [(11, 4, 11), (12, 4, 12), (12, 12, 5), (12, 10, 4), (8, 5, 8), (5, 8, 9), (3, 9, 3), (1, 1, 1), (24, 5, 7)]


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_walk_against_its_steps(walk, form):
    length, source, target = walk
    x = np.random.default_rng(0).normal(size=(3, source)).astype(np.float32)
    for step, sizes in (
        (CyclicMap(*walk, form), (source, target)),
        (CyclicMap(*walk, form).transpose, (target, source)),
    ):
        given = x if sizes[0] == source else np.resize(x, (3, target))
        expected = np.zeros((3, sizes[1]), np.float32)
        for f in range(length):
            expected[:, f % sizes[1]] += given[:, f % sizes[0]]
        np.testing.assert_allclose(step(jnp.asarray(given)), expected, rtol=1e-6, atol=1e-6)


def test_sums_of_bfloat16_are_wide():
    x = jnp.array([[1.0, 2**-10]], jnp.bfloat16)
    for form in Form:
        assert CyclicMap(2, 2, 1, form)(x)[0, 0] == 1 + 2**-10


# How matrices share an output, and the number of inputs: more outputs than inputs and fewer, sizes that don't divide.
LAYOUTS = {
    "one matrix": (FusedLayout((20,), 0, (20,)), 12),
    "gate and up": (FusedLayout((2, 30), 0, (1, 1)), 12),
    "query, key and value": (FusedLayout((2, 4, 5), 1, (2, 1, 1)), 33),
}


def value_and_gradients(delta, x, params, dy):
    y, residuals = delta.forward(x, params)
    return y, delta.backward(residuals, dy)


def gate_and_up(method, random):
    """A fused update on two matrices `[64, 192]` with random values, and its parameters."""
    layout = FusedLayout((2, 192), 0, (1, 1))
    sizes = {"lora_a": (64, 8), "lora_b": (8, 192)} if method == "lora" else {"m": (46, 46)}
    params = tuple(
        {name: jnp.asarray(random.normal(size=size), jnp.float32) for name, size in sizes.items()}
        | {"scaling": jnp.float32(1)}
        for _ in layout.sizes
    )
    return FusedLoRA(layout) if method == "lora" else FusedMoRA(layout, (method, method)), params


def errors_in_bfloat16(method):
    """Relative errors of the output and the input's gradient, against the dense matrices in float64."""
    random = np.random.default_rng(2)
    delta, params = gate_and_up(method, random)
    x, dy = (jnp.asarray(random.normal(size=(128, n)), jnp.bfloat16) for n in (64, 384))
    y, (dx, _) = value_and_gradients(delta, x, params, dy)
    assert y.dtype == dx.dtype == jnp.float32
    dense = np.concatenate(
        [
            np.float64(p["lora_a"]) @ np.float64(p["lora_b"])
            if method == "lora"
            else np.float64(delta_weight(p["m"], 64, 192, method))
            for p in params
        ],
        axis=1,
    )
    exact = np.float64(x) @ dense, np.float64(dy) @ dense.T
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip((y, dx), exact, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_updates_are_as_exact_as_loras(kind):
    for error, of_lora in zip(errors_in_bfloat16(kind), errors_in_bfloat16("lora"), strict=True):
        assert error < 1.1 * of_lora


@pytest.mark.parametrize("kind", ["sharing", "rotation"])
def test_slices_of_tokens_are_put_together_in_the_compute_dtype(kind):
    delta, params = gate_and_up(kind, np.random.default_rng(3))
    x, dy = jnp.ones((128, 64), jnp.bfloat16), jnp.ones((128, 384), jnp.bfloat16)
    program = jax.make_jaxpr(lambda: value_and_gradients(delta, x, params, dy))()
    joined = [equation.outvars[0].aval for equation in program.eqns if equation.primitive.name == "concatenate"]
    tokens = [array for array in joined if array.shape[0] == 128]
    assert len(tokens) > 4
    assert {array.dtype for array in tokens} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-6)])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_forms_of_fused_updates(name, sharded, dtype, tolerance, monkeypatch):
    """Slices, and what a mesh takes, give the same output and gradients as split axes, for every kind."""
    layout, width = LAYOUTS[name]
    random = np.random.default_rng(1)
    x, dy = (jnp.asarray(random.normal(size=(7, n)), dtype) for n in (width, layout.features))

    def programs(layout):
        return [
            value_and_gradients(FusedMoRA(layout, kinds), x, params, dy) for kinds, params in zip(*cases, strict=True)
        ]

    parts = range(len(layout.sizes))
    cases = [], []
    for kind in KINDS:
        sides = [square_rank(width, layout.part_features(i), 4, kind) for i in parts]
        squares = [jnp.asarray(random.normal(size=(q, q)), jnp.float32) for q in sides]
        cases[0].append(tuple(kind for _ in parts))
        cases[1].append(tuple({"m": m, "scaling": jnp.float32(1.5)} for m in squares))
    with monkeypatch.context() as patched:
        patched.setattr(mora_maps, "_PIECES", 0)  # all axes are split
        expected = jax.jit(lambda: programs(layout))()
    walks = [FeatureMaps.of(kind, width, 20, 6, sharded=sharded).outer for kind in ("sharing", "rotation")]
    assert [walk.form for walk in walks] == ([Form.MATRIX, Form.SPLIT] if sharded else [Form.SLICES] * 2)
    found = jax.jit(lambda: programs(dataclasses.replace(layout, sharded=sharded)))()
    for kind, one, other in zip(KINDS, expected, found, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            scale = np.abs(a).max()
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * scale, err_msg=kind)
            assert scale > 0
