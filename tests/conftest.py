"""Settings that must stand before jax is imported, and the rule for tests that need the folder shared/."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

# Four simulated devices, so that sharding and pmap are tested everywhere. The price: they share the cores,
# and an array on several of them is copied. Code for one device runs on the first as it would alone.
os.environ["JAX_PLATFORMS"] = "cpu"
# They also share a pool of threads, in which programs of several devices that are under way together can wait for one
# another for ever: one after the other.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "0"
# Tests compile much and compute little, so LLVM's optimisations cost more than they save.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
# torch's idle threads would spin on the cores that jax uses.
os.environ["OMP_NUM_THREADS"] = "1"
# No test reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tokens of tests are kept apart from the user's, and only as long as the tests run.
_CACHE = tempfile.TemporaryDirectory(prefix="mora-jax-tests-")
os.environ["MORA_JAX_CACHE"] = _CACHE.name

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REQUIRE_SHARED = os.environ.get("MORA_JAX_REQUIRE_SHARED") == "1"


# Linux gives a process 65,530 mappings, a compiled program takes some dozens, and XLA aborts where there are no more.
_MAPPINGS = Path("/proc/self/maps")
_MANY = 20_000


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """Forgets compiled programs after a file of tests where they have become many."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_configure(config: pytest.Config) -> None:
    """Watches the `shared` tests, in the process that hears of every test where there are several."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SharedTests())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `shared` tests where the folder is absent, and `peers` without torch and PEFT."""
    absent = {}
    if not SHARED.is_dir():
        absent["shared"] = "no folder shared/ beside the repository"
    if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
        absent["peers"] = "the extra peers is not installed"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


class SharedTests:
    """Fails a run that was told to run the `shared` tests and left one out."""

    def __init__(self) -> None:
        self.left_out: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the `shared` tests that were skipped."""
        if report.skipped and "shared" in report.keywords:
            self.left_out.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turns what was left out into a failure."""
        if REQUIRE_SHARED and self.left_out and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says what was left out."""
        if REQUIRE_SHARED and self.left_out:
            terminalreporter.write_line(
                "MORA_JAX_REQUIRE_SHARED=1, but these tests did not run: " + ", ".join(sorted(self.left_out)), red=True
            )


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder shared/ beside the repository. A test that uses it carries the marker `shared`."""
    assert SHARED.is_dir(), f"the folder {SHARED} is absent, and MORA_JAX_REQUIRE_SHARED=1 demands it"
    return SHARED
