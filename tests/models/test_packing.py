"""Examples packed into one row are computed as if each were alone: logits and gradients, for families and methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models import init_decoder
from mora_jax.models.decoder import Decoder
from tests.models.tiny import SIZES, fill_randomly

METHODS = {
    # Where the family is the point, not the adapters.
    "two": mj.LoRAConfig(rank=2, targets=("q_proj", "down_proj")),
    "lora": mj.LoRAConfig(rank=2),
    "mora": mj.MoRAConfig(rank=2, kind="rotation"),
    "sharing": mj.MoRAConfig(rank=2, kind="sharing"),
    "full": mj.FullConfig(),
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "Gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3": GEMMA
    | {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}
CASES = [
    ("Gemma3", "mora"),
    *[pytest.param("Gemma3", method, marks=pytest.mark.slow) for method in ("lora", "sharing", "full")],
    *[(family, "two") for family in ("Llama", "Qwen3", "Gemma2")],
    *[pytest.param(family, "mora", marks=pytest.mark.slow) for family in FAMILIES if family != "Gemma3"],
]


def model_of(family: str, **fields) -> Decoder:
    config = SIZES | {"num_hidden_layers": 2, "architectures": [f"{family}ForCausalLM"]} | FAMILIES[family] | fields
    return init_decoder(config, nnx.Rngs(0))


def laid(lengths: list[int], packed_length: int):
    """Random examples packed into one row, and as rows of their own."""
    rng = np.random.default_rng(0)
    alone = np.zeros((len(lengths), max(lengths)), np.int32)
    mask = np.zeros_like(alone)
    packed, segments, positions = (np.zeros((1, packed_length), np.int32) for _ in range(3))
    places = []
    start = 0
    for number, length in enumerate(lengths):
        here = slice(start, start + length)
        alone[number, :length] = packed[0, here] = rng.integers(0, SIZES["vocab_size"], length)
        mask[number, :length], segments[0, here], positions[0, here] = 1, number + 1, np.arange(length)
        places.append(here)
        start += length
    return (packed, segments, positions), (alone, mask, None), places


def per_example(logits, places) -> list[np.ndarray]:
    """The logits of each example, from either layout."""
    logits = np.asarray(logits)
    if len(logits) == 1:
        return [logits[0, here] for here in places]
    return [row[: here.stop - here.start] for row, here in zip(logits, places, strict=True)]


@pytest.mark.parametrize("family, method", CASES)
def test_packed_equals_alone(family, method):
    model = model_of(family)
    mj.attach(model, METHODS[method], rngs=nnx.Rngs(1))
    if method != "full":
        fill_randomly(model)
    graphdef, trained, frozen = mj.partition(model)
    (ids, segments, positions), (alone, mask, _), places = laid([9, 6, 11], 30)
    # Both of one shape, so that one program computes them: two empty rows follow the packed one.
    packed = [np.pad(array, ((0, 2), (0, 0))) for array in (ids, segments, positions)]
    alone, mask = (np.pad(array, ((0, 0), (0, 19))) for array in (alone, mask))
    cotangents = np.random.default_rng(1).standard_normal((3, 30, SIZES["vocab_size"])).astype(np.float32)
    cotangents *= mask[:, :, None]
    joined = np.zeros_like(cotangents)
    for number, here in enumerate(places):
        joined[0, here] = cotangents[number, : here.stop - here.start]

    @jax.jit
    def run(trained, arrays, cotangent):
        def value(trained):
            logits = nnx.merge(graphdef, trained, frozen)(*arrays)
            return jnp.sum(logits * cotangent), logits

        return jax.grad(value, has_aux=True)(trained)

    gradient, logits = run(trained, packed, joined)
    expected_gradient, expected = run(trained, [alone, mask, np.broadcast_to(np.arange(30), mask.shape)], cotangents)
    for found, wanted in zip(per_example(logits[:1], places), per_example(expected, places), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    leaves = jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected_gradient)
    for (path, found), wanted in zip(*leaves, strict=True):
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=1e-4, err_msg=str(path))


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
def test_rows_longer_than_a_block_of_queries(family):
    """A window that all layers share is cut out of the keys, one that differs by layer is masked."""
    model = model_of(family, sliding_window=70)
    (ids, segments, positions), alone, places = laid([100, 150, 31], 300)
    expected = per_example(model(*alone), places)
    for found, wanted in zip(per_example(model(ids, segments, positions), places), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    for found, wanted in zip(per_example(model(ids, segments), places), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_neighbour_is_never_seen():
    model = model_of("Gemma3")
    (ids, segments, positions), _, places = laid([9, 6, 11], 30)
    before = per_example(model(ids, segments, positions), places)
    changed = ids.copy()
    changed[0, places[1]] = (changed[0, places[1]] + 1) % SIZES["vocab_size"]
    after = per_example(model(changed, segments, positions), places)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[2], after[2])
    assert np.abs(before[1] - after[1]).max() > 0.01
