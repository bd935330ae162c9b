"""Attention and its backward against whole rows of scores in float64, one query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.models.attention import causal as module
from mora_jax.models.attention.causal import attention

B, T, G, N, H = 2, 11, 2, 3, 4
SCALE = 0.7
# Two examples and padding, and one example whose first place is padding.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 2, [0] + [3] * 10])


def drawn(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE = drawn(B, T, G, N, H, seed=0), drawn(B, T, G, H, seed=1), drawn(B, T, G, H, seed=2)
COTANGENT = drawn(B, T, G, N, H, seed=3)


def by_rows(query, key, value, cotangent, segments, places, window, softcap, sinks):
    """The output, and its gradients with respect to query, key, value and the sinks: keys of no value, one a head."""
    query, key, value, cotangent = (np.float64(array) for array in (query, key, value, cotangent))
    out, dquery, dkey, dvalue = (np.zeros_like(array) for array in (query, query, key, value))
    dsinks = np.zeros((G, N))
    for b, t, g, n in np.ndindex(*query.shape[:4]):
        q, do = query[b, t, g, n], cotangent[b, t, g, n]
        back = places[b, t] - places[b]
        seen = [s for s in range(key.shape[1]) if segments[b, t] == segments[b, s] != 0 and back[s] >= 0]
        seen = [s for s in seen if window is None or back[s] < window]
        if not seen:
            continue
        k, v = key[b, seen, g], value[b, seen, g]
        raw = SCALE * k @ q
        scores, slope = (
            (raw, 1.0) if softcap is None else (softcap * np.tanh(raw / softcap), 1 - np.tanh(raw / softcap) ** 2)
        )
        sink = 0.0 if sinks is None else np.exp(np.float64(sinks[g, n]))
        p = np.exp(scores) / (np.exp(scores).sum() + sink)
        dsinks[g, n] -= sink / (np.exp(scores).sum() + sink) * (p @ (v @ do))
        out[b, t, g, n] = p @ v
        draw = SCALE * slope * p * (v @ do - p @ (v @ do))
        dquery[b, t, g, n] += draw @ k
        dkey[b, seen, g] += np.outer(draw, q)
        dvalue[b, seen, g] += np.outer(p, do)
    return out, dquery, dkey, dvalue, dsinks


# Window, whether it is traced, cap, whether places are indices.
CASES = [
    (None, False, None, True),
    (3, False, None, True),
    (3, True, 1.5, True),
    (4, False, 1.5, False),
    (None, False, 1.5, True),
]


# Rows with positions of their own are never taken in tiles.
@pytest.mark.parametrize("sinks", [None, drawn(G, N, seed=4)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize(
    ("block", "window", "traced", "softcap", "by_index"),
    [(block, *case) for block in (4, 128, "tiles") for case in CASES if block != "tiles" or case[-1]],
)
def test_values_and_gradients(block, window, traced, softcap, by_index, sinks, monkeypatch):
    if block == "tiles":  # as long rows are computed
        monkeypatch.setattr(module, "LONG", T - 1)
        monkeypatch.setattr(module, "TILE", 4)
    else:
        monkeypatch.setattr(module, "query_block", lambda: block)
    # Places that are not indices: as where a prompt was filled up in front.
    places = np.tile(np.arange(T), (B, 1)) if by_index else np.cumsum(SEGMENTS > 0, axis=1) * 2

    def run(query, key, value, sinks, window):
        given = {} if by_index else {"q_positions": jnp.asarray(places), "kv_positions": jnp.asarray(places)}
        out = attention(
            query,
            key,
            value,
            q_segments=jnp.asarray(SEGMENTS),
            kv_segments=jnp.asarray(SEGMENTS),
            window=window if traced else static,
            scale=SCALE,
            softcap=softcap,
            sinks=sinks,
            **given,
        )
        return jnp.sum(out * COTANGENT), out

    static = window
    both = jax.jit(jax.grad(run, (0, 1, 2) if sinks is None else (0, 1, 2, 3), has_aux=True))
    gradients, out = both(QUERY, KEY, VALUE, sinks, window if traced else 0)
    expected = by_rows(QUERY, KEY, VALUE, COTANGENT, SEGMENTS, places, window, softcap, sinks)
    for found, right in zip((out, *gradients), expected, strict=False):
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-5)


def test_arguments_that_do_not_go_together():
    segments = jnp.asarray(SEGMENTS)
    options = {"q_segments": segments, "kv_segments": segments, "scale": 1.0}
    with pytest.raises(ValueError, match="both q_positions and kv_positions, or neither"):
        attention(QUERY, KEY, VALUE, q_positions=segments, **options)
    with pytest.raises(ValueError, match="T and S must agree, not 10 and 11"):
        attention(QUERY[:, 1:], KEY, VALUE, **options)
