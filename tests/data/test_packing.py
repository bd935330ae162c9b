"""Best fit: every item once, no pack too full, few packs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mora_jax.data.batch_plan import best_fit, pack


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 30))
@settings(deadline=None)
def test_every_item_is_in_one_pack_that_holds_it(lengths, capacity):
    lengths = np.array(lengths, np.int32)
    packs = best_fit(lengths, capacity)
    assert sorted(item for items in packs for item in items) == list(range(len(lengths)))
    assert all(0 < lengths[items].sum() <= capacity for items in packs)
    # Two packs that fit into one would have been one.
    fills = sorted(int(lengths[items].sum()) for items in packs)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


@given(st.lists(st.integers(1, 20), max_size=30))
@settings(deadline=None)
def test_as_the_plain_rule_says(lengths):
    """Each item, the longest first, into the fullest pack that has room: done without any cleverness."""
    lengths = np.array(lengths, np.int32)
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 20) - length)
    assert sorted(20 - lengths[items].sum() for items in best_fit(lengths, 20)) == sorted(rooms)


def test_perfect_fit():
    packs = best_fit(np.array([5, 5, 3, 7, 2, 8]), 10)
    assert sorted(map(sorted, packs)) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("window", [4, 7, 100])
def test_windows_keep_the_order_of_the_data(window):
    lengths = np.full(20, 5)
    order = np.random.default_rng(0).permutation(20)
    packs = pack(lengths, order, 10, window)
    assert sorted(np.concatenate(packs).tolist()) == list(range(20))
    place = np.argsort(order)
    assert all(place[items].max() // window == place[items].min() // window for items in packs)
