"""Adapters for any tree of arrays, against kernels that are merged by loops."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.methods.registry import adapter_class
from tests.adapters import oracle
from tests.adapters.formulas import FORMULAS
from tests.adapters.test_conformance import CASES

REFUSED = ("bitfit", "lora with biases", "remora", "relora", "lora_plus", "adalora")
FORMS = {name: config for name, config in CASES.items() if name not in REFUSED}


def draw(seed, *shape):
    return (0.5 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def tree():
    """Kernels `[in, out]` under three names and `[out, in]` under one, in dictionaries and a list."""
    return {
        "blocks": [
            {"q": {"kernel": draw(1, 7, 6), "bias": draw(2, 6)}},
            {"q": {"kernel": draw(3, 6, 8), "bias": draw(4, 8)}},
        ],
        "up": draw(5, 8, 5),
        "mlp/~/linear_0": {"w": draw(6, 5, 7), "b": draw(7, 7)},
        "head": {"weight": draw(8, 4, 7), "bias": draw(9, 4)},
        "scale": draw(10, 7),
        "name": "not an array",
    }


def model(params, x):
    for block in params["blocks"]:
        x = jnp.tanh(x @ block["q"]["kernel"] + block["q"]["bias"])
    x = jnp.tanh(x @ params["up"])
    x = (x @ params["mlp/~/linear_0"]["w"] + params["mlp/~/linear_0"]["b"]) * params["scale"]
    return x @ params["head"]["weight"].T + params["head"]["bias"]


LAYERS = {  # path: kernel, bias, and whether the kernel is [out, in]
    "blocks.0.q": (lambda p: p["blocks"][0]["q"], "kernel", "bias", False),
    "blocks.1.q": (lambda p: p["blocks"][1]["q"], "kernel", "bias", False),
    "up": (lambda p: p, "up", None, False),
    "mlp.linear_0": (lambda p: p["mlp/~/linear_0"], "w", "b", False),
    "head": (lambda p: p["head"], "weight", "bias", True),
}


def filled(adapters):
    """Other values than those of the start, near it."""
    leaves, treedef = jax.tree.flatten(adapters)
    return jax.tree.unflatten(
        treedef, [jnp.asarray(leaf + 0.3 * draw(20 + i, *leaf.shape)) for i, leaf in enumerate(leaves)]
    )


def by_loops(params, adapters, config, fixed=None):
    """The tree merged by the formulas of the methods."""
    merged = jax.tree.map(lambda leaf: leaf, params)
    for path, (where, kernel, bias, transposed) in LAYERS.items():
        base, layer = where(params), where(merged)
        arrays = {name: np.asarray(value, np.float64) for name, value in adapters[path].items()}
        held = {name: np.asarray(value, np.float64) for name, value in (fixed or adapters)[path].items()}
        weight = np.asarray(base[kernel], np.float64)
        weight = weight.T if transposed else weight
        vector = np.zeros(weight.shape[1]) if bias is None else np.asarray(base[bias], np.float64)
        formula = FORMULAS[adapter_class(config).method]
        total, change = formula(weight, vector, arrays, config.at_path(path), held)
        layer[kernel] = (total.T if transposed else total).astype(np.float32)
        if bias is not None:
            layer[bias] = (vector + change).astype(np.float32)
    return merged


@pytest.mark.parametrize("case", FORMS)
def test_every_method_merges_and_applies_as_by_loops(case):
    config, params, x = FORMS[case], tree(), draw(30, 3, 7)
    fresh = mj.functional.init(params, config, rngs=0)
    assert set(fresh) == set(LAYERS)
    apply = mj.functional.apply(model, params, fresh, config)
    np.testing.assert_allclose(apply(x), model(params, x), rtol=1e-4, atol=1e-5)
    adapters = filled(fresh)
    expected = by_loops(params, adapters, config)
    merged = mj.functional.merge(params, adapters, config)
    assert merged["name"] == "not an array" and jax.tree.structure(merged) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        if not isinstance(ours, str):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    assert np.abs(model(expected, x) - model(params, x)).max() > 0.02
    np.testing.assert_allclose(
        mj.functional.apply(model, params, adapters, config)(x), model(expected, x), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", FORMS)
def test_gradients_of_both_agree_with_finite_differences(case):
    config, params, x = FORMS[case], tree(), draw(30, 3, 7)
    adapters = filled(mj.functional.init(params, config, rngs=0))
    trained = mj.functional.trainable(params, config)

    def loss(run):
        return jnp.sum(jnp.sin(run(x)))

    @jax.jit
    def applied(adapters):
        return loss(mj.functional.apply(model, params, adapters, config))

    def merged(adapters):
        return loss(functools.partial(model, mj.functional.merge(params, adapters, config)))

    grads, others = jax.grad(applied)(adapters), jax.grad(merged)(adapters)
    for path in adapters:
        for name in adapters[path]:
            np.testing.assert_allclose(grads[path][name], others[path][name], rtol=2e-3, atol=2e-4)
            assert trained[path][name] or not np.any(grads[path][name])
    direction = {path: {n: draw(5, *v.shape) * trained[path][n] for n, v in a.items()} for path, a in adapters.items()}

    def at(step):
        moved = jax.tree.map(lambda value, by: value + step * by, adapters, direction)
        return float(loss(functools.partial(model, by_loops(params, moved, config, adapters))))

    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    assert slope == pytest.approx((at(1e-2) - at(-1e-2)) / 2e-2, rel=3e-2, abs=3e-3)


@pytest.mark.parametrize("case", REFUSED)
def test_methods_without_a_form_say_why(case):
    with pytest.raises(ValueError, match="your optimizer|has no place"):
        mj.functional.init(tree(), CASES[case], rngs=0)


LORA = mj.LoRAConfig(rank=2, alpha=3.0)


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (
            tuple(variable.aval.shape)
            for variable in equation.outvars
            if equation.primitive.name not in ("transpose", "device_put")  # of the base's own kernels
        )
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


def test_apply_makes_no_dense_update_forward_or_backward():
    params, x = tree(), draw(30, 3, 7)
    adapters = filled(mj.functional.init(params, LORA, rngs=0))

    def loss(adapters):
        return jnp.sum(mj.functional.apply(model, params, adapters, LORA)(x) ** 2)

    kernels = {(7, 6), (6, 8), (8, 5), (5, 7), (4, 7)}
    program = jax.make_jaxpr(jax.grad(loss))(adapters)
    assert not kernels & set(shapes_in(program.jaxpr))
    dense = jax.make_jaxpr(lambda a: model(mj.functional.merge(params, a, LORA), x))(adapters)
    assert kernels - {(4, 7)} <= set(shapes_in(dense.jaxpr))  # so the first assertion can fail


def test_merge_keeps_no_update_for_the_backward_pass():
    params = {"w": draw(1, 32, 48)}
    for config in (LORA, mj.MoRAConfig(rank=2), mj.LoRAConfig(rank=2, use_dora=True)):
        adapters = filled(mj.functional.init(params, config, rngs=0))
        _, pull = jax.vjp(lambda a, config=config: mj.functional.merge(params, a, config)["w"], adapters)
        kept = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf is not params["w"] and leaf.size >= 32 * 48]
        assert len(kept) <= 1  # the base


def stacked():
    return {"layers": {"w": draw(1, 3, 6, 6), "b": draw(2, 3, 6)}, "out": draw(3, 6, 4)}


def body(x, layer):
    return jnp.tanh(x @ layer["w"] + layer["b"])


def scanned(p, x):
    return jax.lax.scan(lambda x, layer: (body(x, layer), x.sum()), x, p["layers"])[0] @ p["out"]


def indexed(p, x):
    for i in range(3):
        x = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"]))
    return x @ p["out"]


def looped(p, x):
    def step(i, x):
        return body(x, jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), p["layers"]))

    return jax.lax.fori_loop(0, 3, step, x) @ p["out"]


def while_looped(p, x):
    def step(state):
        return state[0] + 1, body(state[1], jax.tree.map(lambda leaf: jnp.asarray(leaf)[state[0]], p["layers"]))

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1] @ p["out"]


def branched(p, x):
    first = jax.tree.map(lambda leaf: leaf[0], p["layers"])
    x = jax.lax.cond(x.sum() > 0, lambda x: body(x, first), lambda x: body(-x, first), x)
    return jax.lax.switch(1, [lambda x: x @ p["out"], lambda x: indexed(p, x)], x)


def remat(p, x):
    return jax.checkpoint(lambda p, x: jax.jit(scanned)(p, x), policy=jax.checkpoint_policies.dots_saveable)(p, x)


def reshaped(p, x):
    w = p["layers"]["w"].astype(jnp.bfloat16).astype(jnp.float32).reshape(3, 2, 3, 6).transpose(0, 3, 1, 2)
    x = jnp.tanh(jnp.einsum("nhd,ohd->no", x.reshape(-1, 2, 3), w[0]))
    return jnp.einsum("io,ni->on", p["out"], x).T


def experts(p, x):
    each = jnp.einsum("eni,eio->eno", jnp.stack([x, 2 * x, -x]), p["layers"]["w"])
    return (each + jax.vmap(lambda w: x @ w)(p["layers"]["w"])).sum(0) @ p["out"]


def inner_gradient(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(scanned(p, x))))(x) @ p["out"]


PROGRAMS = (scanned, indexed, looped, while_looped, branched, remat, reshaped, experts, inner_gradient)


def loops_merged(params, adapters):
    """LoRA on the stack and on the output, by loops over entries."""
    merged = jax.tree.map(np.array, params)
    for path, kernel in (("layers", merged["layers"]["w"]), ("out", merged["out"])):
        a, b = (np.asarray(adapters[path][name], np.float64) for name in ("lora_a", "lora_b"))
        for index in np.ndindex(kernel.shape):
            *layer, i, o = index
            kernel[index] += 1.5 * sum(a[(*layer, i, r)] * b[(*layer, r, o)] for r in range(2))
    return merged


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.vmap], ids=["plain", "jit", "vmap"])
def test_apply_goes_into_programs(program, around):
    params, x = stacked(), draw(30, 5, 2, 6)
    adapters = filled(mj.functional.init(params, LORA, rngs=0))
    assert adapters["layers"]["lora_a"].shape == (3, 6, 2)  # by the bias
    expected = jax.vmap(functools.partial(program, loops_merged(params, adapters)))(x)
    run = mj.functional.apply(program, params, adapters, LORA)
    ours = around(run)(x) if around is jax.vmap else jnp.stack([around(run)(row) for row in x])
    tolerance = 2e-2 if program is reshaped else 1e-4  # it rounds the merged kernel to bfloat16
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)
    if program is while_looped:
        return

    def loss(adapters, make):
        return jnp.sum(jnp.sin(make(adapters)(x[0])))

    grads = jax.grad(loss)(adapters, lambda a: mj.functional.apply(program, params, a, LORA))
    others = jax.grad(loss)(adapters, lambda a: functools.partial(program, mj.functional.merge(params, a, LORA)))
    jax.tree.map(lambda g, o: np.testing.assert_allclose(g, o, rtol=10 * tolerance, atol=5 * tolerance), grads, others)


def test_apply_inside_a_scan_over_adapters():
    params, x = stacked(), draw(30, 2, 6)
    pairs = [filled(mj.functional.init(params, LORA, rngs=seed)) for seed in (0, 1)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    run = jax.lax.scan(lambda _, a: (None, mj.functional.apply(scanned, params, a, LORA)(x)), None, both)[1]
    for ours, adapters in zip(run, pairs, strict=True):
        np.testing.assert_allclose(ours, scanned(loops_merged(params, adapters), x), rtol=1e-4, atol=1e-5)


@jax.custom_vjp
def clipped(w, x):
    return x @ w


clipped.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, d: (2 * kept[1].T @ d, d @ kept[0].T))


def test_kernels_that_could_not_be_served_are_merged_and_named():
    params, x = {"a": draw(1, 6, 6), "b": draw(2, 6, 6)}, draw(3, 4, 6)
    adapters = filled(mj.functional.init(params, LORA, rngs=0))

    def f(p, x):
        return clipped(jnp.asarray(p["a"]), x @ p["b"]) @ p["b"]

    with pytest.warns(UserWarning, match=r"merged where .*: a \(custom_vjp_call\)"):
        ours = mj.functional.apply(f, params, adapters, LORA)(x)
    merged = mj.functional.merge(params, adapters, LORA)
    np.testing.assert_allclose(ours, f(merged, x), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="a "):
        grads = jax.grad(lambda a: mj.functional.apply(f, params, a, LORA)(x).sum())(adapters)
    others = jax.grad(lambda a: f(mj.functional.merge(params, a, LORA), x).sum())(adapters)
    # The function's own rule of differentiation, which doubles the gradient, is the one that counts.
    np.testing.assert_allclose(grads["a"]["lora_a"], others["a"]["lora_a"], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match=r"b \(mul\)"):
        mj.functional.apply(lambda p, x: (x @ p["a"]) @ (2.0 * p["b"]), params, adapters, LORA)(x)


def test_unused_kernels_are_an_error_with_their_paths():
    params, x = {"a": draw(1, 6, 6), "table": draw(2, 9, 6), "b": {"kernel": draw(2, 6, 6)}}, draw(3, 4, 6)
    adapters = mj.functional.init(params, LORA, rngs=0)
    run = mj.functional.apply(lambda p, x: x @ p["a"] + p["table"][jnp.array([1, 2, 3, 4])], params, adapters, LORA)
    with pytest.raises(
        ValueError, match=r"never uses as a product: .*table \(used by gather\), b \(not used\)|b \(not"
    ):
        run(x)


def test_lookups_and_a_tied_head():
    params, ids = {"embedding": {"embedding": draw(1, 9, 6)}, "w": draw(2, 6, 6)}, jnp.array([[1, 8], [-1, 0]])
    config = mj.LoRAConfig(rank=2, alpha=3.0, targets=("embedding", "w"))
    adapters = filled(mj.functional.init(params, config, rngs=0))

    def f(p, ids):
        table = p["embedding"]["embedding"]
        return jnp.tanh(table[ids] @ p["w"]) @ table.T + jnp.take(table, ids, axis=0).sum()

    merged = {"embedding": {"embedding": np.array(params["embedding"]["embedding"])}, "w": np.array(params["w"])}
    for path, kernel in (("embedding", merged["embedding"]["embedding"]), ("w", merged["w"])):
        a, b = (np.asarray(adapters[path][name]) for name in ("lora_a", "lora_b"))
        for i, o in np.ndindex(kernel.shape):
            kernel[i, o] += 1.5 * sum(a[i, r] * b[r, o] for r in range(2))
    ours = mj.functional.apply(f, params, adapters, config)(ids)
    np.testing.assert_allclose(ours, f(jax.tree.map(jnp.asarray, merged), ids), rtol=1e-4, atol=1e-5)


def test_dropout_draws_for_each_layer_and_keeps_the_mean():
    config = mj.LoRAConfig(rank=2, alpha=3.0, dropout=0.5)
    params, x = (
        {"layers": {"w": np.stack([np.eye(64, dtype=np.float32)] * 2), "b": np.zeros((2, 64))}},
        jnp.ones((1, 64)),
    )
    adapters = filled(mj.functional.init(params, config, rngs=0))

    def f(p, x):
        return jax.lax.scan(lambda x, p: (x, x @ p["w"]), x, p["layers"])[1]

    def run(key):
        return mj.functional.apply(f, params, adapters, config, key=key)(x)

    plain = run(None)
    same = {name: jnp.stack([value[0]] * 2) for name, value in adapters["layers"].items()}
    drawn = mj.functional.apply(f, params, {"layers": same}, config, key=jax.random.key(1))(x)
    assert not np.allclose(drawn[0], drawn[1])
    mean = jnp.mean(jax.vmap(run)(jax.random.split(jax.random.key(0), 2000)), axis=0)
    np.testing.assert_allclose(mean, plain, atol=0.35)
    np.testing.assert_allclose(plain, f(mj.functional.merge(params, adapters, config), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "params, options, error",
    [
        ({"a": np.ones(3)}, {}, "the tree has no kernel"),
        ({"a": np.ones((3, 3))}, {"targets": ("q_proj",)}, "match no layer; layers that could have matched: a"),
        (
            {"a": np.ones((2, 3, 3))},
            {},
            r"a has the shape \[2, 3, 3\], which can be a matrix in several ways.*einsums=",
        ),
        (
            {"conv": {"weight": np.ones((4, 3, 2, 2)), "bias": np.ones(4)}},
            {},
            r"conv has the shape \[4, 3, 2, 2\], which can be a matrix in several ways",
        ),
        ({"a": {"w": np.ones((3, 3)), "kernel": np.ones((3, 3))}}, {}, "several arrays of the tree are at 'a'"),
        ({"a": np.ones((3, 3))}, {"modules_to_save": ("b",)}, "part of your tree"),
    ],
)
def test_refusals(params, options, error):
    with pytest.raises(ValueError, match=error):
        mj.functional.init(params, mj.LoRAConfig(rank=2, **options), rngs=0)


def test_other_arrays_beside_kernels_stop_nothing(tmp_path):
    conv = {"w": draw(1, 2, 2, 3, 4), "b": draw(2, 3)}  # of a transposed convolution of Haiku
    params = {"conv": conv, "layers": {"kernel": draw(3, 3, 4, 5), "bias": draw(4, 3, 5), "gain": np.float32(2)}}
    config = mj.LoRAConfig(rank=2, targets="layers")
    adapters = filled(mj.functional.init(params, config, rngs=0))
    assert adapters["layers"]["lora_a"].shape == (3, 4, 2)
    mj.functional.save(params, adapters, tmp_path / "a", config)
    jax.tree.map(np.testing.assert_array_equal, mj.functional.load(params, tmp_path / "a")[1], adapters)


def test_adapters_of_another_tree_are_refused():
    params = {"a": np.ones((3, 3), np.float32), "b": np.ones((3, 3), np.float32)}
    adapters = mj.functional.init(params, LORA, rngs=0)
    with pytest.raises(ValueError, match="b is missing among the adapters"):
        mj.functional.merge(params, {"a": adapters["a"]}, LORA)
    with pytest.raises(ValueError, match=r"of a has arrays .*asks for"):
        mj.functional.merge(params, adapters, mj.LoRAConfig(rank=3))
    with pytest.raises(TypeError, match="config must be one of"):
        mj.functional.init(params, "lora", rngs=0)


def test_einsums_say_how_kernels_are_matrices():
    params, x = {"attn": {"q": draw(1, 6, 2, 3), "o": draw(2, 2, 3, 6)}, "layers": draw(3, 2, 6, 6)}, draw(4, 5, 6)
    einsums = {"attn.q": "nd,dhk->nhk", "attn.o": "nhk,hkd->nd", "layers": "...i,io->...o"}
    adapters = filled(mj.functional.init(params, LORA, rngs=0, einsums=einsums))
    assert [adapters[path]["lora_a"].shape for path in adapters] == [(6, 2), (6, 2), (2, 6, 2)]

    def f(p, x):
        x = jnp.einsum("nhk,hkd->nd", jnp.einsum("nd,dhk->nhk", x, p["attn"]["q"]), p["attn"]["o"])
        return x @ p["layers"][0] @ p["layers"][1]

    ours = mj.functional.apply(f, params, adapters, LORA, einsums=einsums)(x)
    merged = mj.functional.merge(params, adapters, LORA, einsums=einsums)
    np.testing.assert_allclose(ours, f(merged, x), rtol=1e-4, atol=1e-5)
    heads = params["attn"]["o"].reshape(6, 6) + 1.5 * np.asarray(
        adapters["attn.o"]["lora_a"] @ adapters["attn.o"]["lora_b"]
    )
    np.testing.assert_allclose(merged["attn"]["o"].reshape(6, 6), heads, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x)
        return nn.Dense(3)(nn.LayerNorm()(x))


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        pytest.param(mj.MoRAConfig(rank=2), marks=pytest.mark.slow),
        pytest.param(mj.LoRAConfig(rank=2, use_dora=True), marks=pytest.mark.slow),
    ],
)
def test_linen_variables_and_folders_that_both_ways_read(config, tmp_path):
    x = draw(1, 2, 5, 8)
    variables = Net().init(jax.random.key(0), x)
    adapters = filled(mj.functional.init(variables, config, rngs=0))
    attention = "MultiHeadDotProductAttention_0"
    assert set(adapters) == {f"{attention}.{name}" for name in ("query", "key", "value", "out")} | {"Dense_0"}
    ours = mj.functional.apply(Net().apply, variables, adapters, config)(x)
    merged = mj.functional.merge(variables, adapters, config)
    np.testing.assert_allclose(ours, Net().apply(merged, x), rtol=1e-3, atol=1e-4)
    mj.functional.save(variables, adapters, tmp_path / "a", config)
    read, again = mj.functional.load(variables, tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    np.testing.assert_allclose(mj.functional.apply(Net().apply, variables, again, read)(x), ours, rtol=1e-5, atol=1e-6)
    settings, linen = mj.linen.load_adapter(variables, tmp_path / "a")
    with mj.linen.adapted(settings):
        np.testing.assert_allclose(Net().apply(linen, x), ours, rtol=1e-3, atol=1e-4)


def test_stacks_are_numbered_in_folders(tmp_path):
    params = stacked()
    adapters = filled(mj.functional.init(params, LORA, rngs=0))
    mj.functional.save(params, adapters, tmp_path / "a", LORA)
    _, again = mj.functional.load(params, tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again, adapters)

    class Listed(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(6, 6, rngs=nnx.Rngs(0)) for _ in range(3)])
            self.out = nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0))

    listed = Listed()
    mj.load_adapter(listed, tmp_path / "a")
    found = {entry.path: entry.params["lora_a"] for entry in adapters_of(listed)}
    np.testing.assert_array_equal(found["layers.1"], adapters["layers"]["lora_a"][1])


def test_stacks_in_stacks_keep_every_layer(tmp_path):
    params = {"layers": {"kernel": draw(1, 2, 3, 4, 5), "bias": draw(2, 2, 3, 5)}}
    adapters = filled(mj.functional.init(params, LORA, rngs=0))
    mj.functional.save(params, adapters, tmp_path / "a", LORA)
    jax.tree.map(np.testing.assert_array_equal, mj.functional.load(params, tmp_path / "a")[1], adapters)


def test_report_says_what_matches_and_what_not():
    text = str(mj.functional.report(tree(), mj.LoRAConfig(rank=2, targets=("q", "head"))))
    assert re.search(r"blocks\.0\.q +1 +7 +6 +26", text) and "not adapted: linear_0, up" in text


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["out_features"])
@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer as Equinox and PyTorch have it: `weight [out, in]`."""

    weight: jax.Array
    bias: jax.Array
    out_features: int

    def __call__(self, x):
        return self.weight @ x + self.bias


def test_modules_of_other_classes_keep_them():
    layers = (Linear(draw(1, 5, 6), draw(2, 5), 5), Linear(draw(3, 2, 5), draw(4, 2), 2))
    x, config = draw(5, 4, 6), mj.MoRAConfig(rank=2, kind="rotation")
    adapters = filled(mj.functional.init(layers, config, rngs=0))

    def run(layers, x):
        for layer in layers:
            x = jax.vmap(layer)(x)
        return x

    merged = mj.functional.merge(layers, adapters, config)
    assert isinstance(merged[1], Linear) and merged[1].out_features == 2
    for path, (layer, plain) in {"0": (merged[0], layers[0]), "1": (merged[1], layers[1])}.items():
        delta = oracle.dense(np.asarray(adapters[path]["m"]), *plain.weight.shape[::-1], "rotation")
        np.testing.assert_allclose(layer.weight, plain.weight + delta, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        mj.functional.apply(run, layers, adapters, config)(x), run(merged, x), rtol=1e-4, atol=1e-5
    )


class Conv:
    """A convolution as Equinox has it: `weight [out, in / groups, height, width]`, `bias [out, 1, 1]`."""

    def __init__(self, weight, bias, groups):
        self.weight, self.bias, self.groups, self.num_spatial_dims = weight, bias, groups, 2

    def __call__(self, x):  # [in, height, width]
        how = {"feature_group_count": self.groups}
        return jax.lax.conv_general_dilated(x[None], self.weight, (1, 1), "SAME", **how)[0] + self.bias


Conv.__module__ = "equinox.nn._conv"
jax.tree_util.register_pytree_with_keys(
    Conv,
    lambda conv: ([(jax.tree_util.GetAttrKey(name), getattr(conv, name)) for name in ("weight", "bias")], conv.groups),
    lambda groups, arrays: Conv(*arrays, groups),
)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_equinox(groups, tmp_path):
    conv = Conv(draw(1, 8, 3, 2, 5), draw(2, 8, 1, 1), groups)
    tree = {"conv": conv, "head": Linear(draw(3, 4, 8), draw(4, 4), 4)}
    image = draw(5, 3 * groups, 6, 7)
    run = lambda tree, x: tree["head"](tree["conv"](x).mean((1, 2)))  # noqa: E731
    assert set(mj.functional.init(tree, LORA, rngs=0)) == {"head"}
    layer = nnx.Conv(3 * groups, 8, (2, 5), feature_group_count=groups, rngs=nnx.Rngs(0))
    on = {"targets": "conv"}
    for config in (mj.LoRAConfig(rank=2, **on), mj.MoRAConfig(rank=1, **on), mj.IA3Config(**on)):
        folder = tmp_path / type(config).__name__
        adapters = filled(mj.functional.init(tree, config, rngs=0))
        merged = mj.functional.merge(tree, adapters, config)
        with pytest.warns(UserWarning, match="conv"):
            ours = mj.functional.apply(run, tree, adapters, config)(image)
        np.testing.assert_allclose(ours, run(merged, image), rtol=1e-4, atol=1e-4)
        mj.functional.save(tree, adapters, folder, config)
        read, again = mj.functional.load(tree, folder)
        jax.tree.map(np.testing.assert_array_equal, again, adapters)
        # The same layer of NNX, whose kernel has inputs and outputs last, gives the same with the same folder.
        holder = nnx.Dict(conv=nnx.clone(layer))
        holder.conv.kernel.set_value(tree["conv"].weight.transpose(2, 3, 1, 0))
        holder.conv.bias.set_value(tree["conv"].bias.reshape(8))
        mj.load_adapter(holder, folder)
        other = holder.conv(image.transpose(1, 2, 0)).transpose(2, 0, 1)
        np.testing.assert_allclose(other, merged["conv"](image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_stacked_convolutions_of_equinox_are_those_of_each_layer(groups, tmp_path):
    layers = [Conv(draw(i, 4, 4 // groups, 2, 3), draw(i + 3, 4, 1, 1), groups) for i in range(3)]
    stack = {"conv": jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)}
    for config in (mj.LoRAConfig(rank=2, targets="conv"), mj.IA3Config(targets="conv")):
        adapters = filled(mj.functional.init(stack, config, rngs=0))
        merged = mj.functional.merge(stack, adapters, config)["conv"]
        for i, layer in enumerate(layers):
            own = {"conv": jax.tree.map(lambda array, i=i: array[i], adapters["conv"])}
            expected = mj.functional.merge({"conv": layer}, own, config)["conv"]
            np.testing.assert_allclose(merged.weight[i], expected.weight, rtol=1e-6)
            np.testing.assert_allclose(merged.bias[i], expected.bias, rtol=1e-6)
        folder = tmp_path / type(config).__name__
        mj.functional.save(stack, adapters, folder, config)
        jax.tree.map(np.testing.assert_array_equal, mj.functional.load(stack, folder)[1], adapters)


def test_equinox_models():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 4)
    model = {
        "embed": eqx.nn.Embedding(11, 6, key=keys[0]),
        "mlp": eqx.nn.MLP(6, 5, 8, 2, key=keys[1]),
        "layers": eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 5, key=key))(jax.random.split(keys[2], 3)),
        "cell": eqx.nn.GRUCell(5, 4, key=keys[3]),
    }

    def run(model, ids):
        def one(token):
            x = model["mlp"](model["embed"](token))
            arrays, rest = eqx.partition(model["layers"], eqx.is_array)
            x = jax.lax.scan(lambda x, layer: (jnp.tanh(eqx.combine(layer, rest)(x)), None), x, arrays)[0]
            return model["cell"](x, jnp.ones(4))

        return jax.vmap(one)(ids)

    ids = jnp.array([3, 1, 10])
    for config in (mj.LoRAConfig(rank=2, targets=r".*"), mj.MoRAConfig(rank=1), mj.LoRAConfig(rank=2, use_dora=True)):
        adapters = filled(mj.functional.init(model, config, rngs=0))
        assert adapters["mlp.layers.0"].keys() and adapters["cell.weight_ih"].keys()
        merged = mj.functional.merge(model, adapters, config)
        assert type(merged["mlp"]) is eqx.nn.MLP and merged["mlp"].activation is model["mlp"].activation
        ours = mj.functional.apply(run, model, adapters, config)(ids)
        np.testing.assert_allclose(ours, run(merged, ids), rtol=1e-3, atol=1e-4)
        if isinstance(config, mj.LoRAConfig) and not config.use_dora:
            assert set(adapters) == {f"mlp.layers.{i}" for i in range(3)} | {
                "embed",
                "layers",
                "cell.weight_ih",
                "cell.weight_hh",
            }
            weight, arrays = np.array(model["mlp"].layers[0].weight), adapters["mlp.layers.0"]
            for o, i in np.ndindex(weight.shape):
                weight[o, i] += (
                    config.alpha
                    / 2
                    * sum(float(arrays["lora_a"][i, r]) * float(arrays["lora_b"][r, o]) for r in range(2))
                )
            np.testing.assert_allclose(merged["mlp"].layers[0].weight, weight, rtol=1e-4, atol=1e-5)


def test_haiku_models():
    hk = pytest.importorskip("haiku")

    def forward(ids):
        x = hk.Embed(11, 6)(ids)
        x = hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling(1.0), model_size=6)(x, x, x)
        return hk.nets.MLP([8, 4])(hk.LayerNorm(-1, True, True)(x))

    model, ids = hk.without_apply_rng(hk.transform(forward)), jnp.array([[3, 1, 10]])
    params = model.init(jax.random.key(0), ids)
    config = mj.LoRAConfig(rank=2, targets=r".*")
    adapters = filled(mj.functional.init(params, config, rngs=0))
    names = {"embed", *(f"multi_head_attention.{name}" for name in ("query", "key", "value", "linear"))}
    assert set(adapters) == names | {"mlp.linear_0", "mlp.linear_1"}
    merged = mj.functional.merge(params, adapters, config)
    ours = mj.functional.apply(model.apply, params, adapters, config)(ids)
    np.testing.assert_allclose(ours, model.apply(merged, ids), rtol=1e-3, atol=1e-4)
    kernel, arrays = np.array(params["mlp/~/linear_1"]["w"]), adapters["mlp.linear_1"]
    for i, o in np.ndindex(kernel.shape):
        kernel[i, o] += (
            config.alpha / 2 * sum(float(arrays["lora_a"][i, r]) * float(arrays["lora_b"][r, o]) for r in range(2))
        )
    np.testing.assert_allclose(merged["mlp/~/linear_1"]["w"], kernel, rtol=1e-4, atol=1e-5)
