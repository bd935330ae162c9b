"""Rows cut along their length over devices: the same losses and gradients as on one device."""

import re

import jax
import numpy as np
import pytest

from tests.training.meshed import run
from tests.training.sharding.test_rules import assert_same_curve, eight_devices, gathers

CASES = [
    ("lora", (1, 1, 1, 4), {"dropout": 0.3}),
    pytest.param("mora", (1, 2, 1, 2), {"sizes": "gemma", "dropout": 0.3}, marks=pytest.mark.slow),
    pytest.param("full", (1, 1, 2, 2), {"sizes": "even", "packed": False}, marks=pytest.mark.slow),
]


def moments(state) -> dict[str, np.ndarray]:
    """Adam's first moments, which are sums of gradients."""
    leaves = jax.tree_util.tree_flatten_with_path(state.optimizer)[0]
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mesh", "options"), CASES)
def test_losses_and_gradients_are_those_of_one_device(method, mesh, options):
    spread = run(method, mesh, **options)
    assert_same_curve(spread.losses, method, options)
    alone = run(method, **options)
    np.testing.assert_allclose(spread.norms, alone.norms, rtol=1e-5)
    expected, found = moments(alone.state), moments(spread.state)
    assert expected.keys() == found.keys() and expected
    for name, sums in expected.items():
        assert np.linalg.norm(found[name] - sums) <= 2e-5 * np.linalg.norm(sums), name


@pytest.mark.slow
def test_scores_of_whole_rows_never_exist():
    """Rows of 16 tokens over 4 devices: each holds pairs of 2 tokens, and nobody gathers keys."""
    compiled = run("lora", (1, 1, 1, 4), dropout=0.3).compiled
    text = compiled.as_text()
    assert "collective-permute" in text
    assert not re.search(r"f32\[(\d+,){3,}16\]", text)
    # What is gathered is weights (and token ids): nothing of the size of a row's keys, [rows, T, G, H] or more.
    assert all(size <= 3 * 32 * 64 for _, size in gathers(compiled))


@pytest.mark.slow
def test_context_beside_the_other_axes():
    meshes = [(2, 1, 2, 2), (1, 2, 2, 2), (2, 1, 1, 4), (1, 2, 1, 4)]
    cases = [("lora", mesh, {"sizes": "odd"}) for mesh in meshes]
    cases += [("mora", mesh, {"sizes": "gemma", "micro_batches": 2, "dropout": 0.3}) for mesh in meshes]
    cases += [("full", mesh, {"sizes": "even", "packed": False}) for mesh in meshes]
    eight_devices(cases)
