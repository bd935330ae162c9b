"""`mora-jax doctor`: what it says of a machine, and that a wrong kernel and a wrong installation are found."""

import json

import numpy as np
import pytest

from mora_jax import environment
from mora_jax.models.attention import compare, kernels


def test_it_names_versions_devices_and_caches(run):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == (1 if found["problems"] else 0)
    assert found["versions"]["jax"] and "libtpu" in found["versions"]
    assert "cpu" in found["devices"][0] and found["dtype"] in ("float32", "bfloat16")
    assert found["caches"][0]["free"] > 0


def test_what_is_wrong_has_the_line_that_mends_it(run, monkeypatch, tmp_path):
    def refuse():
        raise ImportError("mora_jax doesn't run with jax 0.1: pip install -U 'jax>=0.11.1'")

    monkeypatch.setattr(environment, "check_versions", refuse)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path / "file" / "cache"))
    code, out, _ = run("doctor")
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 1 and len(problems) == 2
    assert "pip install -U" in problems[0] and "set MORA_JAX_CACHE" in problems[1]


def test_kernels_agree_with_float64(monkeypatch):
    monkeypatch.setattr(compare, "LENGTH", 140)
    monkeypatch.setattr(compare, "_segments", lambda packed: SEGMENTS)
    found = list(compare.compare())
    assert {one.kernel.split()[1] for one in found} == {"blocks", "tiles", "ring"}
    assert all(one.agrees for one in found), found


SEGMENTS = compare._segments(True)[:, 60:200] + 1
SEGMENTS[1, 130:] = 0
SEGMENTS[0, 70:] = 5


def test_a_wrong_kernel_is_found(run, monkeypatch):
    def off(query, key, value, **options):
        return compare._by_attention(None, query, key, value, **options) + 0.1 * query  # beyond what bfloat16 rounds to

    monkeypatch.setattr(compare, "LENGTH", 140)
    monkeypatch.setattr(compare, "_segments", lambda packed: SEGMENTS)
    monkeypatch.setattr(compare, "kernels", lambda: iter([("cudnn", True, off)]))
    code, out, err = run("doctor", "--kernels")
    assert code == 1 and "attention by cudnn, packed rows: WRONG" in out
    assert "set model.attention=xla" in out and "compared cudnn" in err
    assert kernels.NAMES == ("auto", "xla", "splash", "cudnn")


@pytest.mark.parametrize("window", [None, 3])
def test_the_plain_form_is_what_loops_give(window, monkeypatch):
    rng = np.random.default_rng(0)
    query, slope = rng.normal(size=(2, 1, 7, 2, 2, 4)).astype(np.float64)
    key, value = rng.normal(size=(2, 1, 7, 2, 4))
    segments = np.array([[1, 1, 1, 2, 2, 2, 0]])

    def forward(query, key, value):
        out = np.zeros_like(query)
        for t, g, n in np.ndindex(7, 2, 2):
            seen = [s for s in range(t + 1) if segments[0, s] == segments[0, t] > 0 and (not window or t - s < window)]
            if seen:
                powers = np.exp([compare.SCALE * query[0, t, g, n] @ key[0, s, g] for s in seen])
                out[0, t, g, n] = sum(p * value[0, s, g] for p, s in zip(powers / powers.sum(), seen, strict=True))
        return out

    found = compare.plain_attention(query, key, value, slope, segments, window)
    np.testing.assert_allclose(found[0], forward(query, key, value), atol=1e-12)
    for i, gradient in enumerate(found[1:]):
        for place in ((0, 1, 0, 1, 2), (0, 4, 1, 0, 3)) if i == 0 else ((0, 1, 0, 2), (0, 4, 1, 3)):
            sides = []
            for sign in (1, -1):
                moved = [query.copy(), key.copy(), value.copy()]
                moved[i][place] += sign * 1e-5
                sides.append(np.sum(forward(*moved) * slope))
            assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(gradient[place], abs=1e-8)
