"""NEFTune's noise: its distribution, its scale, and what it must not depend on."""

import jax
import numpy as np

from mora_jax.training.neftune import embedding_noise

drawn_once = jax.jit(embedding_noise, static_argnames=("width", "alpha"))

KEY = jax.random.key(0)
WIDTH = 64
ALPHA = 5.0


def noise(segments, rows=None, key=KEY) -> np.ndarray:
    segments = np.asarray(segments, np.int32)
    rows = np.arange(len(segments)) if rows is None else np.asarray(rows)
    return np.asarray(drawn_once(key, rows, segments, WIDTH, ALPHA))


def test_uniform_within_the_bound_of_its_own_length():
    segments = np.repeat([1, 2, 0], [100, 25, 5])[None]
    drawn = noise(segments)[0]
    for here, length in ((slice(0, 100), 100), (slice(100, 125), 25)):
        unit = drawn[here].ravel() * np.sqrt(length * WIDTH) / ALPHA
        assert np.abs(unit).max() <= 1 + 1e-6
        assert np.abs(unit).max() > 0.99
        spread = 1 / np.sqrt(unit.size)
        assert abs(unit.mean()) < 4 * spread * np.sqrt(1 / 3)
        assert abs(np.mean(unit**2) - 1 / 3) < 4 * spread * np.sqrt(4 / 45)
        counts, _ = np.histogram(unit, bins=10, range=(-1, 1))
        assert np.abs(counts / unit.size - 0.1).max() < 5 * np.sqrt(0.09 / unit.size)
    assert not np.any(drawn[125:])


def test_tokens_rows_and_keys_draw_on_their_own():
    drawn = noise([[1] * 6 + [2] * 6] * 2)
    flat = drawn.reshape(24, WIDTH)
    assert len(np.unique(flat, axis=0)) == 24
    closeness = np.abs(np.corrcoef(flat) - np.eye(24)).max()
    assert closeness < 5 / np.sqrt(WIDTH)
    assert not np.any(drawn == noise([[1] * 6 + [2] * 6] * 2, key=jax.random.key(1)))


def test_padding_changes_nothing():
    alone = noise([[1] * 7])[0]
    np.testing.assert_array_equal(noise([[1] * 7 + [0] * 9])[0, :7], alone)
    np.testing.assert_array_equal(noise([[0] * 4 + [1] * 7])[0, 4:], alone)


def test_neighbours_in_the_row_change_nothing():
    short = noise([[1] * 3 + [2] * 7])[0, 3:]
    np.testing.assert_array_equal(noise([[1] * 9 + [2] * 7 + [3] * 2])[0, 9:16], short)


def test_a_row_draws_by_its_number_wherever_it_is():
    segments = np.ones((6, 5), np.int32)
    whole = noise(segments)
    np.testing.assert_array_equal(noise(segments[4:], rows=[4, 5]), whole[4:])
