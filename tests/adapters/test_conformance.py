"""What every method promises, for every registered method on every kind of place.

A method takes part by being registered; it needs its formula and its count in `formulas.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.methods.registry import METHODS
from mora_jax.adapters.projection import Part, Projection
from mora_jax.adapters.sites import sites
from tests.adapters.formulas import COUNTS, FORMULAS
from tests.adapters.made import config_from

IN, TOKENS = 7, 11
LEFT_OUT = 1


def registered(name, **more):
    """The configuration of a method by name, small."""
    small = {"rank": 2, "target_rank": 1, "alpha": 3.0, "targets": "all-linear"}
    return config_from({"method": name, **small, **more})


CASES = {name: registered(name) for name in METHODS if name != "full"} | {
    "mora rotation": mj.MoRAConfig(rank=2, kind="rotation"),
    "mora with magnitude": mj.MoRAConfig(rank=2, use_dora=True),
    "rslora with magnitude": mj.RsLoRAConfig(rank=2, use_dora=True),
    "pissa with magnitude": mj.PiSSAConfig(rank=2, alpha=3.0, use_dora=True),
    "lora_fa with magnitude": mj.LoRAFAConfig(rank=2, use_dora=True),
    "randlora of sparse bases": mj.RandLoRAConfig(rank=3, alpha=2.0, bases="sparse", widths=(20, 30)),
    "miss of form mini": mj.MiSSConfig(rank=3, form="mini"),
    "ia3 on inputs": mj.IA3Config(targets="all-linear", feedforward=("", "q_proj", "k_proj")),
    "oft by inverse": mj.OFTConfig(use_cayley_neumann=False),
    "orthogonal": mj.LoRAConfig(rank=2, init="orthogonal"),
    "lora with biases": mj.LoRAConfig(rank=2, bias="lora_only"),
}
# A norm is computed in two orders, once at the start and once in the forward pass; orthogonal factors cancel; matrices
# with inputs of their own are several products where the base has one.
ROUNDED = {name for name, config in CASES.items() if getattr(config, "use_dora", False)}
ROUNDED |= {"orthogonal", "ia3 on inputs", "oft", "oft by inverse"}


def linear(dtype, bias):
    return nnx.Linear(IN, 5, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


def einsum(dtype, bias):
    options = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
    return nnx.Einsum("...td,ndh->...thn", (2, IN, 3), (3, 2) if bias else None, **options)


def stack(dtype, bias):
    return Projection(
        (Part("q_proj", 2), Part("k_proj", 1)),
        IN,
        out_shape=(2, 3, 2),
        part_axis=1,
        axes=("embed", "kv_heads", "q_per_kv", "head_dim"),
        num_layers=3,
        use_bias=bias,
        path="model.layers.{layer}.self_attn.{name}",
        dtype=dtype,
        rngs=nnx.Rngs(0),
        init_std=0.4,
    )


PLACES = {"linear": linear, "stack": stack, "einsum": einsum}


def draw(seed, *shape):
    return (0.5 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def make(place, dtype=jnp.float32, bias=True):
    model = PLACES[place](dtype, bias)
    if bias:
        model.bias[...] = jnp.asarray(draw(3, *model.bias.shape), dtype)
    return model


def attached(case, place, dtype=jnp.float32, bias=True):
    model, config = make(place, dtype, bias), CASES[case]
    if place == "stack":
        config = type(config)(**{**vars(config), "layers_to_transform": (0, 2)})
    return model, mj.attach(model, config, rngs=nnx.Rngs(1))


def fill(model):
    _, adapters, _ = mj.partition(model)
    for i, (_, variable) in enumerate(sorted(nnx.to_flat_state(adapters), key=lambda item: str(item[0]))):
        array = np.asarray(variable.get_value())
        variable.set_value(jnp.asarray(array + draw(i, *array.shape)))
    nnx.update(model, adapters)


def run(model, x):
    """`x [N, in]` → `[N, out]`; for a stack `[L, N, out]`, whatever order the place has."""
    if not isinstance(model, Projection):
        return model(x).reshape(len(x), -1)
    graphdef, state = nnx.split(model)
    return np.stack([nnx.merge(graphdef, layer)(x).reshape(len(x), -1) for (layer,) in layers(model, state)])


def layers(model, *states):
    """The states of a stack's layers one by one; of another place the states themselves."""
    if not isinstance(model, Projection):
        return [states]
    held = jax.tree.map(np.asarray, states)
    return [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), held) for i in range(model.num_layers)]


def matrices(model):
    """Base kernels `[in, out]` and biases `[out]` in the order of outputs, by path."""
    kernel, bias = (None if v is None else np.float64(v[...]) for v in (model.kernel, model.bias))
    if isinstance(model, nnx.Einsum):
        return {"": (kernel.transpose(1, 2, 0).reshape(IN, -1), bias.reshape(-1))}
    if isinstance(model, nnx.Linear):
        return {"": (kernel, bias)}
    found = {}
    for site in sites(model):
        kernels, biases = np.float64(site.kernel()), np.float64(site.bias())
        found |= {path: (kernels[layer], biases[layer]) for layer, path in enumerate(site.paths)}
    return found


def to_outputs(model, matrix):
    """The columns of an adapted matrix in the order of outputs."""
    if not isinstance(model, nnx.Einsum):
        return matrix
    return matrix.reshape(*matrix.shape[:-1], 2, 3).swapaxes(-1, -2).reshape(matrix.shape)


def by_formula(model, base, x, params, fixed):
    """The outputs by path, in float64."""
    entries = {entry.path: entry for entry in adapters_of(model)}
    outputs = {}
    for path, (kernel, bias) in base.items():
        entry = entries.get(path)
        if entry is not None:
            formula = FORMULAS[entry.method]
            inner = to_inner(model, kernel)
            kernel, added = formula(inner, to_inner(model, bias), params[path], entry.config, fixed[path])
            kernel, bias = to_outputs(model, kernel), bias + to_outputs(model, np.zeros(len(bias)) + added)
        outputs[path] = x @ kernel + bias
    return outputs


def to_inner(model, matrix):
    """The inverse of `to_outputs`."""
    if not isinstance(model, nnx.Einsum):
        return matrix
    return matrix.reshape(*matrix.shape[:-1], 3, 2).swapaxes(-1, -2).reshape(matrix.shape)


def parts_of(model, y):
    """`run`'s outputs by path."""
    if not isinstance(model, Projection):
        return {"": y}
    shaped = y.reshape(3, len(y[0]), *model.layout.out_shape)
    parts = enumerate(model.parts)
    return {model.module_path(p.name, i): model.layout.take(shaped[i], n) for n, p in parts for i in range(3)}


def values(model):
    return {e.path: {k: np.float64(v) for k, v in e.params.items()} for e in adapters_of(model)}


def names(model):
    """Paths of all arrays of a model."""
    return [path for path, _ in nnx.to_flat_state(nnx.state(model))]


every_place = pytest.mark.parametrize("place", PLACES)
every_case = pytest.mark.parametrize("case", CASES)
# These run the programs of others. How they start, their scale and what they merge to is tested for every case.
SAME = ("rslora", "lora_plus", "relora", "orthogonal", "olora", "rslora with magnitude")
PROGRAMS = [pytest.param(case, marks=[pytest.mark.slow] * (case in SAME)) for case in CASES]
every_program = pytest.mark.parametrize("case", PROGRAMS)


@every_place
@every_case
def test_starts_as_the_base_and_leaves_it_untouched(case, place):
    x, base = draw(9, TOKENS, IN), make(place)
    plain = np.asarray(run(base, x))
    model, _ = attached(case, place)
    # An einsum with more than an addition is computed as the product with a matrix that it is.
    rounded = case in ROUNDED or (place == "einsum" and not model.adapter.only_adds)
    np.testing.assert_allclose(run(model, x), plain, rtol=0, atol=2e-6 if rounded else 0)
    fill(model)
    assert np.abs(np.asarray(run(model, x)) - plain).max() > 0.05
    mj.detach(model)
    np.testing.assert_array_equal(run(model, x), plain)
    assert type(model) is type(base) and list(names(model)) == list(names(base))


@every_place
@every_case
def test_forward_is_the_formula_and_layers_left_out_are_the_base(case, place):
    x = draw(9, TOKENS, IN)
    plain = np.asarray(run(make(place), x))
    model, _ = attached(case, place)
    base = matrices(model)
    fill(model)
    y = run(model, x)
    params = values(model)
    for path, expected in by_formula(model, base, x, params, params).items():
        np.testing.assert_allclose(parts_of(model, y)[path], expected, rtol=1e-4, atol=2e-5, err_msg=path)
    if place == "stack":
        # One compiled program may round otherwise than another.
        np.testing.assert_allclose(y[LEFT_OUT], plain[LEFT_OUT], rtol=0, atol=1e-6)


@every_place
@every_case
def test_merge_and_unmerge(case, place):
    check_merge(case, place, bias=True)


# A layer without bias differs where the method has to do with biases; where it hasn't, one case stands for all.
@every_place
@pytest.mark.parametrize("case", ["lora", "lora with biases", "rslora with magnitude", "bitfit", "ia3"])
def test_merge_and_unmerge_without_bias(case, place):
    check_merge(case, place, bias=False)


def check_merge(case, place, bias):
    x = draw(9, TOKENS, IN)
    model, _ = attached(case, place, bias=bias)
    kernel, before = np.asarray(model.kernel[...]), (type(model), list(names(model)))
    fill(model)
    tuned = np.asarray(run(model, x))
    merged = mj.merge(model)
    with pytest.raises(ValueError, match="nothing to train"):
        mj.partition(model)
    np.testing.assert_allclose(run(model, x), tuned, rtol=1e-4, atol=1e-5)
    if place == "stack":
        np.testing.assert_array_equal(model.kernel[...][LEFT_OUT], kernel[LEFT_OUT])
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model.kernel[...], kernel, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(model, x), tuned, rtol=1e-4, atol=1e-5)
    assert (type(model), list(names(model))) == before


@every_place
@every_program
def test_gradients_by_finite_differences_of_the_formula(case, place):
    x = draw(9, TOKENS, IN)
    model, _ = attached(case, place)
    base = matrices(model)
    fill(model)
    slopes = draw(10, *np.shape(run(model, x)))
    graphdef, adapters, frozen = mj.partition(model)

    # All numbers are arguments, so layers and methods that differ in these alone share a program.
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slope(adapters, x, frozen, slopes):
        return jnp.sum(nnx.merge(graphdef, adapters, frozen)(x).reshape(len(x), -1) * slopes)

    parts = zip(layers(model, adapters, frozen), slopes.reshape(-1, TOKENS, slopes.shape[-1]), strict=True)
    found, dx = zip(*[slope(one, x, rest, weights) for (one, rest), weights in parts], strict=True)
    found = jax.tree.map(lambda *leaves: np.stack(leaves), *found) if len(found) > 1 else found[0]
    dx = np.sum(dx, axis=0)
    gradient = {e.path: e.params for e in adapters_of(nnx.merge(graphdef, found, frozen))}
    params, weights = values(model), {k: np.float64(v) for k, v in parts_of(model, slopes).items()}

    def value(changed, x=x):
        outputs = by_formula(model, base, x, changed, params)
        return sum(np.sum(outputs[path] * weights[path]) for path in outputs)

    trained = {str(path[-1]) for path, _ in nnx.to_flat_state(adapters)}
    step, rng = 1e-3, np.random.default_rng(0)
    for path, arrays in params.items():
        for name in sorted(trained & set(arrays)):
            for _ in range(3):
                index = tuple(rng.integers(size) for size in arrays[name].shape)
                ends = []
                for sign in (1, -1):
                    moved = arrays[name].copy()
                    moved[index] += sign * step
                    ends.append(value({**params, path: {**arrays, name: moved}}))
                numeric = (ends[0] - ends[1]) / (2 * step)
                where = f"{path} {name}{index}"
                np.testing.assert_allclose(gradient[path][name][index], numeric, rtol=2e-3, atol=2e-4, err_msg=where)
    moved = np.float64(x)
    moved[2, 3] += step
    numeric = (value(params, moved) - value(params)) / step
    np.testing.assert_allclose(dx[2, 3], numeric, rtol=2e-3, atol=2e-4)


def dots(jaxpr):
    """Every matrix product in a jaxpr, the nested ones too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jaxprs_in_params(equation.params):
            found += dots(inner)
    return found


@every_place
@every_program
def test_bfloat16_is_not_promoted_and_the_kernel_gets_no_gradient(case, place):
    model, _ = attached(case, place, jnp.bfloat16)
    fill(model)
    x = jnp.asarray(draw(9, TOKENS, IN), jnp.bfloat16)
    graphdef, adapters, frozen = mj.partition(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
    adapters, frozen = layers(model, adapters, frozen)[0]

    def loss(adapters, frozen):
        y = nnx.merge(graphdef, adapters, frozen)(x)
        assert y.dtype == jnp.bfloat16
        return jnp.sum(y.astype(jnp.float32) ** 2)

    traced = jax.make_jaxpr(jax.grad(loss))(adapters, frozen)
    columns = {"linear": 5, "stack": 12, "einsum": 6}[place]
    over_tokens = [d for d in dots(traced.jaxpr) if any(TOKENS in v.aval.shape for v in d.invars)]
    assert over_tokens
    for product in over_tokens:
        assert [v.aval.dtype for v in product.invars] == [jnp.bfloat16] * 2, product
        shape = product.outvars[0].aval.shape
        is_kernel = IN in shape and np.prod(shape) == IN * columns
        # What multiplies the kernel entry by entry has the gradient of the kernel behind it, and hands none on.
        assert not is_kernel or METHODS[next(adapters_of(model)).method].adapter.transforms_kernel, (
            f"a product with the kernel's shape: {product}"
        )


@every_place
@every_case
def test_parameters_are_counted(case, place):
    model, report = attached(case, place)
    expected = sum(
        COUNTS[entry.method](entry.in_features, entry.out_features, entry.config)
        + (entry.out_features if entry.config.bias == "lora_only" else 0)
        for entry in adapters_of(model)
    )
    assert report.trainable == expected
    assert len(list(adapters_of(model))) == (4 if place == "stack" else 1)
