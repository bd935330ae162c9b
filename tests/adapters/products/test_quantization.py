"""Both formats against loops over single numbers, and products with a quantised kernel against dense ones."""

import dataclasses
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax as mj
from mora_jax.adapters.methods.lora import LoRA
from mora_jax.adapters.products.matmul import FusedLayout, adapted_dot
from mora_jax.adapters.products.quantization import FORMATS, NF4, Quantized, QuantizedKernel, quantize
from mora_jax.training.config.schema import QUANTIZE

SHAPES = [(64, 3), (100, 2, 3), (40, 5), (256, 4)]


def drawn(shape, seed=0, dtype=np.float32):
    """Numbers whose columns differ in size, with an outlier and a block of zeros."""
    draws = np.random.default_rng(seed)
    kernel = draws.standard_normal(shape) * np.exp(draws.standard_normal(shape[1:]))
    kernel[3] *= 20
    kernel.reshape(shape[0], -1)[[0, -1], [-1, -2]] = 50, -60  # the first and the last number of a block count
    kernel.reshape(shape[0], -1)[:64, 0] = 0
    return kernel.astype(dtype)


def by_loops(kernel, held):
    """The numbers that a quantised kernel stands for, one at a time."""
    found = np.zeros_like(kernel)
    for place in np.ndindex(kernel.shape[1:]):
        for start in range(0, len(kernel), 64):
            block = kernel[(slice(start, start + 64), *place)]
            largest = max(abs(number) for number in block)
            for i, number in enumerate(block):
                if largest == 0:
                    continue
                if held == "int8":
                    step = largest / np.float32(127)
                    value = np.float32(round(float(number / step))) * step
                else:
                    unit = number / largest
                    value = min((abs(np.float32(v) - unit), v) for v in NF4)[1] * largest
                found[(start + i, *place)] = value
    return found


def packed(kernel, held):
    values, scales = quantize(kernel, held)
    return Quantized(jnp.asarray(values), jnp.asarray(scales), held, len(kernel))


def test_the_table_is_that_of_its_definition():
    """Quantiles between the two ends that lie half a code from 0 and 1, of 8 codes above zero and 7 below, and zero."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    expected = np.array(sorted([*below, 0.0, *above])) / max(above)
    np.testing.assert_allclose(NF4, expected, atol=1e-6)


def test_the_formats_are_those_of_the_configuration():
    assert ("none", *FORMATS) == QUANTIZE


@pytest.mark.parametrize("held", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_a_loop(held, shape):
    kernel = drawn(shape)
    found = packed(kernel, held)
    expected = by_loops(kernel, held)
    np.testing.assert_allclose(found.dense(jnp.float32, len(shape) - 1), expected, rtol=1e-6)
    blocks = -(-shape[0] // 64)
    largest = np.repeat([np.abs(kernel[64 * b : 64 * b + 64]).max(0) for b in range(blocks)], 64, axis=0)[: shape[0]]
    filled_up = dataclasses.replace(found, in_features=64 * blocks).dense(jnp.float32, len(shape) - 1)
    assert not np.any(filled_up[shape[0] :])
    # Half of the largest distance between two codes.
    error = np.abs(expected - kernel) / np.where(largest > 0, largest, 1)
    assert 0 < error.max() <= {"int8": 0.5 / 127, "nf4": (1.0 - 0.6961928) / 2}[held] + 1e-6
    assert found.values.nbytes == kernel.size // shape[0] * blocks * {"int8": 64, "nf4": 32}[held]
    assert found.scales.nbytes == kernel.size // shape[0] * blocks * 4


def test_two_codes_share_a_byte_half_a_block_apart():
    kernel = np.tile(np.array(NF4, np.float32), 8)[:, None]  # 128 inputs that are codes 0 to 15 again and again
    kernel[40], kernel[100] = NF4[1], NF4[9]
    values, scales = quantize(kernel, "nf4")
    np.testing.assert_array_equal(scales, np.ones((2, 1)))
    codes = np.arange(128) % 16
    codes[40], codes[100] = 1, 9
    for block in range(2):
        for j in range(32):
            assert values[32 * block + j, 0] == codes[64 * block + j] + 16 * codes[64 * block + j + 32]


@pytest.mark.parametrize("held", FORMATS)
def test_blocks_of_a_part_are_those_of_the_whole(held):
    kernel = drawn((200, 3))
    values, scales = quantize(kernel, held)
    part, part_scales = quantize(kernel[64:192], held)
    rows = len(values) // 4
    np.testing.assert_array_equal(part, values[rows : 3 * rows])
    np.testing.assert_array_equal(part_scales, scales[1:3])


@pytest.mark.parametrize("held", FORMATS)
def test_a_number_that_is_not_finite_shows(held):
    kernel = drawn((128, 2))
    kernel[70, 1] = np.nan
    dense = np.asarray(packed(kernel, held).dense(jnp.float32, 1))
    assert np.isnan(dense[64:, 1]).all() and np.isfinite(dense[:64]).all() and np.isfinite(dense[:, 0]).all()


@pytest.mark.parametrize("held", FORMATS)
def test_a_stack_is_its_layers(held):
    stack = np.stack([drawn((100, 2, 3), seed) for seed in range(3)])
    kernel = QuantizedKernel(held, stack.shape, axes=("layers", "embed", "heads", "mlp"), out_axes=2, dtype="float32")
    parts = [quantize(layer, held) for layer in stack]
    kernel.values[...], kernel.scales[...] = (np.stack(part) for part in zip(*parts, strict=True))
    assert kernel.shape == stack.shape and kernel.size == stack.size
    for layer, expected in zip(kernel[...], stack, strict=True):
        np.testing.assert_allclose(layer, by_loops(expected, held), rtol=1e-6)


def products(held, dtype):
    """A product with LoRA beside a quantised kernel `[100, 2, 3]` and one with its dense form, and their arguments."""
    kernel = packed(drawn((100, 2, 3)), held)
    draws = np.random.default_rng(1)
    x, dy = (jnp.asarray(draws.standard_normal((5, size)), dtype) for size in (100, 6))
    params = {
        "lora_a": jnp.asarray(draws.standard_normal((100, 2)), jnp.float32),
        "lora_b": jnp.asarray(draws.standard_normal((2, 6)), jnp.float32),
        "scaling": jnp.float32(0.5),
    }
    gain = jnp.asarray(draws.standard_normal(6), jnp.float32)
    bias = jnp.asarray(draws.standard_normal((2, 3)), dtype)
    delta = LoRA.fuse(FusedLayout((2, 3), 0, (2,)), (mj.LoRAConfig(rank=2),))

    def results(kernel):
        def plain(x, params):
            return adapted_dot(delta, x, kernel, bias, (params,))

        def scaled(x, gain, params):
            return adapted_dot(delta, x, kernel, bias, (params,), gain)

        y, pull = jax.vjp(plain, x, params)
        z, pull_scaled = jax.vjp(scaled, x, gain, params)
        return y, pull(dy), z, pull_scaled(dy)

    return results, kernel, kernel.dense(dtype, 2)


@pytest.mark.parametrize("held", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_gradients_are_those_of_the_dense_kernel(held, dtype):
    results, kernel, dense = products(held, dtype)
    assert dense.dtype == dtype
    for found, expected in zip(*(jax.tree.leaves(jax.jit(results)(k)) for k in (kernel, dense)), strict=True):
        assert found.dtype == expected.dtype
        scale = np.abs(np.asarray(expected, np.float32)).max()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("held", FORMATS)
def test_products_stay_in_the_compute_dtype(held):
    results, kernel, _ = products(held, "bfloat16")
    found = list(dots(jax.make_jaxpr(results)(kernel).jaxpr))
    assert len(found) >= 12
    for left, right in found:
        assert left == right == jnp.bfloat16


def dots(jaxpr):
    """The dtypes of the operands of every matrix product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(variable.aval.dtype for variable in equation.invars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dots(inner)
