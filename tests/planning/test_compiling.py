"""The TPU's own compiler, where libtpu is installed."""

import pytest

from mora_jax.planning.compiling import compile_elsewhere, has_libtpu
from mora_jax.planning.plan import by_formula
from mora_jax.planning.topology import read_topology
from mora_jax.training.config import Config, lay_over
from tests.planning.test_formula import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed")]


@pytest.mark.parametrize("slice_", ["v5e-8", "v5p-8", "v6e-4"])
def test_formula_against_the_compiler(slice_):
    topology = read_topology(slice_)
    # Sizes that fill tiles of 8 × 128: what layouts add for others is not in the formula.
    model = MODEL | {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 4096}
    settings = {
        "data.max_length": 1024,
        "mesh.data": 1,
        "mesh.fsdp": topology.chips,
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "train.batch_size": topology.chips,
    }
    config = lay_over(Config(), [(name, value, "test") for name, value in settings.items()])
    plan = by_formula(config, model, topology)
    found = compile_elsewhere(config, model, topology, plan.mesh)
    assert found.fits and found.total is not None
    assert plan.memory.arguments == pytest.approx(found.arguments, rel=0.1)
    assert plan.memory.activations + plan.memory.temp == pytest.approx(found.temp, rel=0.35)
    sent = {entry.kind: entry.bytes for entry in found.collectives}
    own = {entry.kind: entry.bytes for entry in plan.collectives}
    assert own["all-gather"] == pytest.approx(sent["all-gather"], rel=0.15)


def test_too_large_a_step_is_found_out():
    topology = read_topology("v5e-1")
    model = MODEL | {"hidden_size": 8192, "intermediate_size": 28672, "head_dim": 128, "num_hidden_layers": 24}
    settings = {"data.max_length": 128, "model.dtype": "bfloat16", "model.remat": "full", "train.batch_size": 1}
    config = lay_over(Config(), [(name, value, "test") for name, value in settings.items()])
    found = compile_elsewhere(config, model, topology, (1, 1, 1))
    assert not found.fits
    assert found.total is None or found.total > topology.usable_bytes
