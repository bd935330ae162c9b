"""Thin factors against numpy's SVD."""

import numpy as np
import pytest

from mora_jax.interop.convert.low_rank import best_factors, best_factors_of_product, singular_values

DRAWS = np.random.default_rng(0)


def svd_error(delta: np.ndarray, rank: int) -> float:
    return float(np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[rank:]))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("rank", [1, 3, 7, 9])
def test_no_factors_come_nearer(shape, rank):
    delta = DRAWS.standard_normal(shape)
    found = best_factors(delta, rank)
    assert found.a.shape == (shape[0], rank)
    assert found.b.shape == (rank, shape[1])
    left = np.linalg.norm(delta - found.a.astype(float) @ found.b.astype(float))
    np.testing.assert_allclose(left, svd_error(delta, rank), atol=1e-5)
    np.testing.assert_allclose(found.error, svd_error(delta, rank), atol=1e-9)
    np.testing.assert_allclose(found.norm, np.linalg.norm(delta))
    kept = min(rank, *shape)
    sizes = [np.linalg.norm(found.a, axis=0)[:kept], np.linalg.norm(found.b, axis=1)[:kept]]
    np.testing.assert_allclose(*sizes, rtol=1e-5, err_msg="the factors share the singular values")


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_product_without_forming_it(rank):
    a, b = DRAWS.standard_normal((11, 4)), DRAWS.standard_normal((4, 8))
    found, formed = best_factors_of_product(a, b, rank), best_factors(a @ b, rank)
    np.testing.assert_allclose(found.a @ found.b, formed.a @ formed.b, atol=1e-5)
    np.testing.assert_allclose([found.norm, found.error], [formed.norm, formed.error], atol=1e-9)
    assert found.a.shape == (11, rank)


def test_factors_that_fit_are_kept_as_they_are():
    a, b = DRAWS.standard_normal((6, 2)).astype(np.float32), DRAWS.standard_normal((2, 5)).astype(np.float32)
    found = best_factors_of_product(a, b, 2)
    np.testing.assert_array_equal(found.a, a)
    np.testing.assert_array_equal(found.b, b)
    assert found.error == 0


def test_zero_has_no_direction():
    found = best_factors(np.zeros((4, 3)), 2)
    assert found.norm == found.error == 0
    assert not found.a.any()
    assert not found.b.any()


def test_small_singular_values_survive():
    left, right = (np.linalg.qr(DRAWS.standard_normal((8, 8)))[0] for _ in range(2))
    values = 10.0 ** -np.arange(8)
    np.testing.assert_allclose(singular_values(left * values @ right.T)[:6], values[:6], rtol=1e-3)
    found = best_factors(left * values @ right.T, 5)
    np.testing.assert_allclose(found.error, np.linalg.norm(values[5:]), rtol=1e-3)
