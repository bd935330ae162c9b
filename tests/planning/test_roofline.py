"""The roofline, on numbers small enough to do by hand."""

import pytest

from mora_jax.planning.collectives import Collective
from mora_jax.planning.plan import FAST, SLOW, estimate
from mora_jax.planning.topology import read_topology


@pytest.mark.parametrize(
    "flops, moved, sent, bound, fast, slow",
    [
        (197e12, 1e9, 0.0, "compute", 1 / FAST, 1 / SLOW),
        (1e12, 819e9, 0.0, "memory", 1.0, 2.0),
        (1e12, 1e9, 200e9, "network", 1.0, 1e12 / SLOW / 197e12 + 2.0),
    ],
)
def test_range(flops, moved, sent, bound, fast, slow):
    found = estimate(flops, moved, [Collective("all-gather", 2, sent)], read_topology("v5e-8"))
    assert found.bound == bound
    assert (found.fastest, found.slowest) == (pytest.approx(fast, rel=1e-6), pytest.approx(slow, rel=1e-6))
    assert found.tokens_per_second(1000) == (1000 / found.slowest, 1000 / found.fastest)
    assert found.intensity == flops / moved


def test_groups_that_share_cards_take_turns():
    alone, beside = (
        estimate(1e12, 1e9, [Collective("all-gather", 2, 400e9, groups)], read_topology("h100x32")) for groups in (1, 4)
    )
    assert (alone.fastest, beside.fastest) == (1.0, 4.0) and alone.sent == beside.sent == 400e9
