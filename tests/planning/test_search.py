"""The ways that are tried, and their order."""

import math

import pytest

from mora_jax.planning.advice import MARGIN, candidates, recommend
from mora_jax.planning.plan import by_formula
from mora_jax.planning.topology import read_topology
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.sharding.mesh import AXES
from tests.planning.test_memory_model import MODEL


def run_of(**settings) -> Config:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return lay_over(Config(), [(name, value, "test") for name, value in named.items()])


@pytest.mark.parametrize("last", [False, True])
def test_every_way_uses_all_chips_and_shares_rows_evenly(last):
    topology = read_topology("v5e-8")
    ways = list(candidates(run_of(train__batch_size=12), topology, last=last))
    meshes = {tuple(getattr(way.mesh, axis) for axis in AXES) for way in ways}
    # 8 rows are fewer than 12 and don't divide it: those meshes are left out.
    assert meshes and all(math.prod(mesh) == 8 and mesh[0] * mesh[1] in (1, 2, 4) for mesh in meshes)
    for way in ways:
        micro = way.train.micro_batch_size
        assert micro and way.train.batch_size == 12 and 12 % micro == 0
        assert micro % (way.mesh.data * way.mesh.fsdp) == 0
    assert any(mesh[3] > 1 for mesh in meshes) == last
    assert any(way.model.remat == "offload" for way in ways) == last


def test_experts_are_shared_where_they_divide():
    ways = list(candidates(run_of(train__batch_size=8), read_topology("v5e-8"), experts=12))
    assert {way.mesh.expert for way in ways} == {1, 2, 4}
    assert all(8 == math.prod(getattr(way.mesh, axis) for axis in AXES) for way in ways)
    assert all(way.train.micro_batch_size % (way.mesh.data * way.mesh.fsdp * way.mesh.expert) == 0 for way in ways)


def test_a_batch_of_fewer_rows_than_devices_grows():
    ways = candidates(run_of(train__batch_size=1), read_topology("v5e-4"))
    assert {way.train.batch_size for way in ways} == {1, 2, 4}


def test_the_fastest_that_fits_leads():
    topology = read_topology("v5e-4")
    config = run_of(train__batch_size=8, data__max_length=256, model__dtype="bfloat16", mesh__data=1)
    ways = recommend(config, MODEL, topology)
    assert len(ways) > 10 and all(way.needed <= MARGIN * topology.usable_bytes for way in ways)

    def middle(plan):
        return (plan.estimate.fastest + plan.estimate.slowest) / plan.tokens

    # Times are compared to two digits.
    assert middle(ways[0]) <= min(map(middle, ways)) * 1.1
    assert middle(ways[0]) <= middle(by_formula(config, MODEL, topology))
