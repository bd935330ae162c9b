"""Settings that must stand before jax is imported, and the rule for tests that need the folder shared/."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Four simulated devices, so that sharding and pmap are tested everywhere. The price: they share the cores,
# and an array on several of them is copied. Code for one device runs on the first as it would alone.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
# No test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REQUIRE_SHARED = os.environ.get("MORA_JAX_REQUIRE_SHARED") == "1"

_shared_passed = pytest.StashKey[set[str]]()
_shared_selected = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Prepares the two sets that tell whether the `shared` tests did run."""
    config.stash[_shared_passed] = set()
    config.stash[_shared_selected] = set()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips `shared` tests where the folder is absent, unless the environment demands that they run."""
    for item in items:
        if item.get_closest_marker("shared") is None:
            continue
        config.stash[_shared_selected].add(item.nodeid)
        if not SHARED.is_dir() and not REQUIRE_SHARED:
            item.add_marker(pytest.mark.skip(reason="no folder shared/ beside the repository"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Notes which `shared` tests went through."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.passed and item.get_closest_marker("shared") is not None:
        item.config.stash[_shared_passed].add(item.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails a run that was told to run the `shared` tests and left one out."""
    config = session.config
    if not REQUIRE_SHARED or exitstatus != pytest.ExitCode.OK or config.option.collectonly:
        return
    missing = config.stash[_shared_selected] - config.stash[_shared_passed]
    if missing:
        for nodeid in sorted(missing):
            print(f"\nshared test did not run: {nodeid}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder shared/ beside the repository. A test that uses it carries the marker `shared`."""
    assert SHARED.is_dir(), f"the folder {SHARED} is absent, and MORA_JAX_REQUIRE_SHARED=1 demands it"
    return SHARED
