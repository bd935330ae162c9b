"""The script that changes the library: what counts as killed, and how a sample is drawn."""

from __future__ import annotations

import collections
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
    module = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutate"]


@pytest.mark.parametrize(
    ("status", "by", "expected"),
    [
        (1, "tests/test_x.py::test_y", "killed"),
        (1, "", "unclear"),
        (2, "tests/test_x.py", "killed"),
        (0, "", "survived"),
        ("no test", "", "survived"),
        ("timeout", "tests/test_x.py::test_y", "timeout"),
        ("crash", "", "crash"),
        (70, "", "crash"),
    ],
)
def test_only_a_test_that_fails_kills(mutate, status, by, expected):
    assert mutate.outcome(status, by) == expected


def test_a_sample_is_even_over_packages_and_the_same_again(mutate):
    packages = ["losses", "linen", "studies, statistics"]
    chosen = mutate.sample(ROOT, packages, 9, 7)
    assert collections.Counter(package for package, _ in chosen) == dict.fromkeys(packages, 3)
    # The first of a larger sample are those of a smaller one, so that it can be continued.
    assert mutate.sample(ROOT, packages, 12, 7)[:9] == chosen
    assert mutate.sample(ROOT, packages, 9, 8) != chosen
    for package, mutant in chosen:
        files = (path for pattern in mutate.PACKAGES[package] for path in (ROOT / "mora_jax").glob(pattern))
        assert ROOT / mutant.path in files


def test_every_package_has_files(mutate):
    for package, patterns in mutate.PACKAGES.items():
        assert any(path for pattern in patterns for path in (ROOT / "mora_jax").glob(pattern)), package


def test_every_kind_of_change_can_be_parsed(mutate):
    original = (ROOT / "mora_jax" / "losses" / "cross_entropy.py").read_text(encoding="utf-8")
    mutants = mutate.mutants_of(ROOT / "mora_jax" / "losses" / "cross_entropy.py", ROOT)
    assert len(mutants) > 20 and len({mutant.name for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        changed = mutant.source(original)
        assert changed != original
        compile(changed, mutant.path, "exec")


def test_results_of_another_commit_do_not_count(mutate, tmp_path, capsys):
    (tmp_path / "repository").symlink_to(ROOT)
    (tmp_path / "commit").write_text("here\n")
    one, other, third = (mutant for _, mutant in mutate.sample(ROOT, ["losses"], 3, 0))
    results = {"package": "losses", "tests": "1 of 1", "change": "-a\n+b", "by": "", "commit": "here"}
    rows = [
        one._asdict() | results | {"result": "killed"},
        other._asdict() | results | {"result": "timeout"},
        third._asdict() | results | {"result": "killed", "commit": "elsewhere"},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mutate.report(tmp_path, tmp_path / "saved.jsonl")
    out = capsys.readouterr().out
    assert "| `losses` | 2 | 0 | 1 | 0 | 1 | 0 | 0 |" in out
    assert "Killed: 1 of 2 that are not equivalent, 50.0 %." in out and f"timeout {other.name}" in out
    saved = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()]
    assert [row["commit"] for row in saved] == ["here", "here"]
