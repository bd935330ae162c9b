"""The maps from M to an update: exact factors, rank, and the least-squares M, each against dense matrices."""

import numpy as np
import pytest

from mora_jax.adapters.methods.mora import BLOCK_KINDS, KINDS, square_rank
from mora_jax.interop.convert.mora_fit import exact_factors, exact_rank, nearest_m
from tests.adapters.oracle import dense

# (in, out, q): blocks that divide and that don't, more inputs, more outputs, M larger than either, or than twice both.
SHAPES = [(8, 8, 4), (7, 5, 4), (5, 7, 4), (9, 4, 6), (4, 11, 6), (3, 4, 8), (4, 13, 2), (13, 3, 4)]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BLOCK_KINDS])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_factors_are_the_update(kind, sizes):
    n_in, n_out, q = sizes
    m = random(q, q).astype(np.float32)
    a, b = exact_factors(m, n_in, n_out, kind)
    assert (a.shape, b.shape) == ((n_in, q), (q, n_out))
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a @ b, dense(m, n_in, n_out, kind).T, atol=1e-6)
    assert set(np.unique(b)) <= {0, *np.unique(m)}
    np.testing.assert_array_equal(a, a.astype(int))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(24, 24, 2), (40, 24, 1), (24, 40, 1), (6, 5, 4)], ids=str)
def test_rank_is_a_bound_that_is_reached(kind, sizes):
    n_in, n_out, rank = sizes
    q = square_rank(n_in, n_out, rank, kind)
    delta = dense(random(q, q), n_in, n_out, kind)
    bound = exact_rank(n_in, n_out, rank, kind)
    assert np.linalg.matrix_rank(delta) == bound
    assert (bound == min(n_in, n_out)) == (kind in BLOCK_KINDS or q >= min(n_in, n_out))
    assert (exact_factors(random(q, q), n_in, n_out, kind) is None) == (kind in BLOCK_KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_no_m_comes_nearer(kind, sizes):
    n_in, n_out, q = sizes
    target = random(n_in, n_out, seed=1)
    units = np.eye(q * q).reshape(-1, q, q)
    jacobian = np.stack([dense(unit, n_in, n_out, kind).T.ravel() for unit in units], axis=1)
    best = jacobian @ np.linalg.lstsq(jacobian, target.ravel(), rcond=None)[0]
    found = nearest_m(target, q, kind)
    assert found.dtype == np.float64 and nearest_m(target.astype(np.float32), q, kind).dtype == np.float32
    np.testing.assert_allclose(dense(found, n_in, n_out, kind).T.ravel(), best, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_its_own_update_is_recovered(kind, sizes):
    n_in, n_out, q = sizes
    m = random(q, q).astype(np.float32)
    delta = dense(m, n_in, n_out, kind)
    found = nearest_m(delta.T, q, kind)
    np.testing.assert_allclose(dense(found, n_in, n_out, kind), delta, atol=1e-5)
    if q <= min(n_in, n_out):
        np.testing.assert_allclose(found, m, atol=1e-5)
