"""MoRA against dense matrices built by loops, and against the outputs of the authors' code."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.adapters.methods import mora
from tests.adapters import oracle

TYPES = {1: "sharing", 2: "grouped", 3: "grouped_tile", 4: "strided_interleave", 6: "rotation"}
# in, out, rank: square, out > in, in > out, in not divisible by q, odd q, in = 1, out = 1, q >= both, q > 2 in.
SHAPES = [(64, 64, 4), (16, 40, 3), (40, 16, 3), (33, 20, 2), (1, 7, 3), (7, 1, 2), (12, 9, 30), (5, 90, 8)]


def everything(cases, out_features):
    """Weight, update and gradients for cases `(kind, (m, x, g))`.

    In one program: most of a small program's compilation is the same for all.
    """

    def one(kind, m, x, g):
        y, pullback = jax.vjp(lambda m, x: mora.apply(x, m, out_features, kind), m, x)
        return mora.delta_weight(m, x.shape[-1], out_features, kind), y, *pullback(g)

    kinds = [kind for kind, _ in cases]
    return jax.jit(lambda inputs: [one(kind, *each) for kind, each in zip(kinds, inputs, strict=True)])(
        [inputs for _, inputs in cases]
    )


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_loops(shape):
    in_features, out_features, rank = shape
    x, g = random(2, 3, in_features), np.zeros((3, out_features), np.float32)
    sides = {kind: mora.square_rank(in_features, out_features, rank, kind) for kind in mora.KINDS}
    cases = [(kind, (random(1, q, q), x, g)) for kind, q in sides.items()]
    for (kind, (m, _, _)), (weight, y, _, _) in zip(cases, everything(cases, out_features), strict=True):
        expected = oracle.dense(m, in_features, out_features, kind)
        scale, wanted = np.abs(expected).max(), x @ expected.T
        np.testing.assert_allclose(weight, expected.T, rtol=0, atol=1e-5 * scale, err_msg=kind)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()), err_msg=kind)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)])
def test_any_leading_axes(leading):
    x = random(1, *leading, 8)
    squares = {kind: random(0, *2 * (mora.square_rank(8, 6, 3, kind),)) for kind in mora.KINDS}
    found = jax.jit(lambda squares: {kind: mora.apply(x, m, 6, kind) for kind, m in squares.items()})(squares)
    for kind, y in found.items():
        assert y.shape == (*leading, 6)
        np.testing.assert_allclose(y, x @ oracle.dense(squares[kind], 8, 6, kind).T, atol=1e-4, err_msg=kind)


@pytest.mark.parametrize("kind", mora.KINDS)
def test_bfloat16_stays_bfloat16(kind):
    q = mora.square_rank(24, 16, 4, kind)
    m, x = random(0, q, q), random(1, 6, 24)
    y = mora.apply(jnp.asarray(x, jnp.bfloat16), m, 16, kind)
    assert y.dtype == jnp.bfloat16
    exact = x @ oracle.dense(m, 24, 16, kind).T
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=0, atol=0.03 * np.abs(exact).max())


def test_square_rank_matches_published_sizes():
    sizes = {(4096, 4096, 8): 256, (4096, 11008, 8): 348, (4096, 1024, 8): 202, (768, 768, 8): 111}
    for (in_features, out_features, rank), q in sizes.items():
        assert mora.square_rank(in_features, out_features, rank) == q
        assert mora.square_rank(in_features, out_features, rank, "rotation") == q - q % 2
        assert mora.square_rank(in_features, out_features, rank, "decouple") == q - q % 2
        assert mora.square_rank(in_features, out_features, rank, "truncation") == q


def test_gradients_against_the_dense_matrix():
    x, g = random(1, 5, 10), random(2, 5, 14)
    sides = {kind: mora.square_rank(10, 14, 3, kind) for kind in mora.KINDS}
    cases = [(kind, (random(0, q, q), x, g)) for kind, q in sides.items()]
    for (kind, (m, _, _)), (_, _, dm, dx) in zip(cases, everything(cases, 14), strict=True):
        np.testing.assert_allclose(dx, g @ oracle.dense(m, 10, 14, kind), atol=1e-4, err_msg=kind)
        # The update is linear in M, so its derivative in the direction of one entry is the update of a unit matrix.
        q = len(m)
        for row, column in [(0, 0), (q - 1, 0), (q // 2, q - 1)]:
            unit = np.zeros((q, q))
            unit[row, column] = 1
            expected = np.sum(x @ oracle.dense(unit, 10, 14, kind).T * g)
            np.testing.assert_allclose(dm[row, column], expected, atol=1e-4, err_msg=kind)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mora.square_rank(0, 4, 2), "in_features must be a positive integer, not 0"),
        (lambda: mora.square_rank(4, 4, -1), "rank must be a positive integer, not -1"),
        (lambda: mora.square_rank(4, 4, 2.5), "not 2.5"),
        (lambda: mora.square_rank(4, 4, 2, "square"), "kind must be one of .* not 'square'"),
        (lambda: mora.apply(jnp.ones((2, 4)), jnp.ones((3, 4)), 5), r"square matrix .* not \(3, 4\)"),
        (lambda: mora.apply(jnp.ones((2, 4)), jnp.ones((3, 3)), 5, "rotation"), "even, not 3"),
        (lambda: mora.apply(jnp.ones((2, 4)), jnp.ones((3, 3)), 0), "out_features must be .* not 0"),
        (lambda: mora.apply(jnp.float32(1), jnp.ones((3, 3)), 2), "scalar"),
        (lambda: mora.delta_weight(jnp.ones((2, 2)), 4, 0), "out_features"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_unused_inputs_are_those_with_a_zero_row():
    for kind in mora.KINDS:
        for in_features, out_features, rank in [(160, 64, 4), (64, 160, 4), (512, 64, 8), (30, 30, 2)]:
            q = mora.square_rank(in_features, out_features, rank, kind)
            weight = oracle.dense(random(0, q, q), in_features, out_features, kind)
            unused = int(np.sum(~weight.any(axis=0)))
            assert mora.unused_inputs(in_features, out_features, rank, kind) == unused, (kind, in_features)


@pytest.mark.shared
def test_goldens(shared_dir):
    cases = json.loads((shared_dir / "goldens/mora_goldens.json").read_text())["cases"]
    arrays = np.load(shared_dir / "goldens/mora_goldens.npz")
    checked = 0
    by_shape = collections.defaultdict(list)
    for case in cases:
        kind, key = TYPES.get(case["mora_type"]), case["key"]
        if kind is None or f"{key}/M" not in arrays:
            continue
        i, o = case["in"], case["out"]
        m = arrays[f"{key}/M"]
        assert mora.square_rank(i, o, case["r"], kind) == case["rhat"] == len(m)
        if f"{key}/dW" in arrays:
            reference = arrays[f"{key}/dW"]
        elif f"{key}/jac" in arrays:
            reference = arrays[f"{key}/jac"]
        else:
            continue
        expected = {"dW": reference.T}
        if f"{key}/delta" in arrays:  # absent where the authors' forward pass crashes
            expected |= {name: arrays[f"{key}/{name}"] for name in ("delta", "dM", "dx")}
        x, g = np.zeros((1, i), np.float32), np.zeros((1, o), np.float32)
        if "delta" in expected:
            x, g = arrays[f"{key}/x"], arrays[f"{key}/g"]
        by_shape[i, o].append((key, kind, (m, x, g), expected))
    for (_, o), group in by_shape.items():
        all_found = everything([(kind, inputs) for _, kind, inputs, _ in group], o)
        for (key, _, _, expected), values in zip(group, all_found, strict=True):
            found = dict(zip(("dW", "delta", "dM", "dx"), values, strict=True))
            for name, right in expected.items():
                atol = 1e-5 * max(1.0, np.abs(right).max())
                np.testing.assert_allclose(found[name], right, rtol=0, atol=atol, err_msg=f"{key}/{name}")
            checked += 1
    assert checked > 100


@pytest.mark.shared
def test_golden_remora_chains(shared_dir):
    arrays = np.load(shared_dir / "goldens/mora_goldens.npz")
    chains = sorted({key.split("/")[0] for key in arrays if key.startswith("remora_")})
    assert chains
    for chain in chains:
        weight = arrays[f"{chain}/W0"]
        for step, kind in enumerate(("sharing", "grouped", "grouped_tile", "strided_interleave", "sharing")):
            out_features, in_features = weight.shape
            weight = weight + mora.delta_weight(arrays[f"{chain}/M{step}"], in_features, out_features, kind).T
            np.testing.assert_allclose(weight, arrays[f"{chain}/W{step + 1}"], rtol=0, atol=1e-4)
