"""Masks of dropout: a token's own, wherever in the step it is computed."""

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.adapters.projection import TokenDropout

ROWS, LENGTH, WIDTH = 3, 4, 64
ONES = jnp.ones((ROWS * LENGTH, WIDTH))


def masks(dropout: TokenDropout, rate: float = 0.25) -> np.ndarray:
    """What is left of ones, `[tokens, in]`."""
    return np.asarray(dropout.drop(ONES[: dropout.tokens.size], rate))


def test_every_token_has_a_mask_of_its_own():
    found = masks(TokenDropout.of(jax.random.key(0), ROWS, LENGTH))
    assert len(np.unique(found, axis=0)) == ROWS * LENGTH
    np.testing.assert_allclose(np.unique(found), [0, 4 / 3], rtol=1e-6)
    assert 0.9 < found.mean() < 1.1


def test_rows_have_their_masks_under_any_split():
    key = jax.random.key(1)
    whole = masks(TokenDropout.of(key, ROWS, LENGTH)).reshape(ROWS, LENGTH, WIDTH)
    two = masks(TokenDropout.of(key, 2, LENGTH, jnp.asarray([2, 0]))).reshape(2, LENGTH, WIDTH)
    np.testing.assert_array_equal(two, whole[[2, 0]])


def test_places_differ():
    one = TokenDropout.of(jax.random.key(0), ROWS, LENGTH)
    several = np.stack([masks(one), *(masks(one.fold(place)) for place in range(2))])
    assert len(np.unique(several, axis=0)) == 3
