"""What each remat policy keeps of a layer, read from the traced step and counted by hand; none changes a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models.decoder import REMAT
from mora_jax.models.init import init_decoder
from mora_jax.planning.jaxpr_cost import read_traced
from tests.models.tiny import LLAMA, fill_randomly

METHODS = {
    "lora": mj.LoRAConfig(rank=2),
    "mora": mj.MoRAConfig(rank=2, kind="rotation"),
    # One of several matrices with one input, twice, and one alone.
    "some": mj.MoRAConfig(rank=2, kind="rotation", targets=("q_proj", "up_proj", "down_proj")),
}
LAYERS, WIDTH, WIDE, HEADS, GROUPS, HEAD = 3, 32, 48, 4, 2, 8  # of LLAMA
ROWS, LENGTH = 2, 64
IDS = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (ROWS, LENGTH))


def gradient_of(method: str, remat: str, dtype: str):
    """The loss's value and gradient as a function of the adapters, and the adapters."""
    model = init_decoder(LLAMA, nnx.Rngs(0), dtype=dtype, remat=remat)
    mj.attach(model, METHODS[method], rngs=nnx.Rngs(1))
    fill_randomly(model)
    graphdef, adapters, frozen = mj.partition(model)

    def loss(adapters):
        return jnp.mean(jnp.square(nnx.merge(graphdef, adapters, frozen)(IDS)))

    return jax.value_and_grad(loss), adapters


def kept_bytes(method: str, remat: str) -> float:
    gradient, adapters = gradient_of(method, remat, "bfloat16")
    return read_traced(jax.make_jaxpr(gradient)(adapters), (LAYERS,), 1, WIDTH).saved


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_each_policy_keeps_less_than_the_one_before(method):
    none, dots, full = (kept_bytes(method, remat) for remat in ("none", "dots", "full"))
    assert none > 1.2 * dots and dots > 3 * full
    assert full == LAYERS * ROWS * LENGTH * WIDTH * 2  # each layer's input


def test_dots_keeps_what_projections_and_attention_give():
    mixed = HEADS * HEAD
    # The layer's input, queries with keys and values, attention's output, its projection, gate and up; not what the
    # last projection gives, which nothing but the residual stream reads.
    numbers = WIDTH + (mixed + 2 * GROUPS * HEAD) + mixed + WIDTH + 2 * WIDE
    sums = HEADS * 4  # attention's, float32
    assert kept_bytes("lora", "dots") == LAYERS * ROWS * LENGTH * (numbers * 2 + sums)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "mora", "some"])
def test_no_policy_changes_a_gradient(method):
    found = []
    for remat in REMAT:
        gradient, adapters = gradient_of(method, remat, "float32")
        value, leaves = jax.jit(gradient)(adapters)
        found.append([value, *jax.tree.leaves(leaves)])
    assert all(np.abs(leaf).max() > 0 for leaf in found[0])
    for others in found[1:]:
        for a, b in zip(others, found[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
