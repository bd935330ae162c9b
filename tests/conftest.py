"""Settings that must stand before jax is imported, and the rule for tests that need the folder shared/."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mora_jax.adapters import compat

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

# Tests compile the same programs again and again: a run and what resumes it, a command and its twin in Python. All
# processes of a session share what is compiled; a folder that is named in the environment keeps it for the next one.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="mora-jax-programs-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _PROGRAMS.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

compat.complete()  # tests use newer names too

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REQUIRE_SHARED = os.environ.get("MORA_JAX_REQUIRE_SHARED") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `make test-slice`."""
    parser.addoption("--slice", metavar="COMMIT", help="run as many of the tests as fit into --minutes, in its order")
    parser.addoption("--minutes", type=float, default=15.0, help="of --slice (%(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    """Watches the `shared` tests, in the process that hears of every test where there are several; and mappings."""
    sliced = config.getoption("slice")
    if sliced:
        config.pluginmanager.register(Slice(sliced, config.getoption("minutes")))
    if not hasattr(config, "workerinput") and not sliced:
        config.pluginmanager.register(SharedTests())
    if MAPPINGS.exists():
        config.pluginmanager.register(Mappings())


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


class Slice:
    """Begins no test after some minutes, nor near the limit of mappings; which come first differs for each commit.

    Files are shuffled by the hash of their name and the commit's, so that over a number of commits each comes first.

    Args:
        commit: its hash.
        minutes: after which no test begins; processes of one run count from the same moment.
    """

    def __init__(self, commit: str, minutes: float) -> None:
        self.commit = commit
        self.end = float(os.environ.setdefault("MORA_JAX_SLICE_ENDS", str(time.monotonic() + 60 * minutes)))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Shuffles the files; tests of a file stay in their order."""
        items.sort(key=lambda item: hashlib.sha256(f"{self.commit} {item.location[0]}".encode()).digest())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Leaves a test to other commits."""
        if time.monotonic() > self.end or (MAPPINGS.exists() and Mappings.count() > 0.6 * Mappings.limit()):
            pytest.skip("beyond the slice of this commit")


MAPPINGS = Path("/proc/self/maps")


class Mappings:
    """Keeps a process of tests below Linux's limit of memory mappings, beyond which XLA aborts.

    A compiled program takes dozens, one of a whole model hundreds, as long as jax keeps it, so programs are let go at
    a third of the limit. A test that comes near the limit is an error: it would end every test of its process.
    """

    #: Mappings are counted, which takes milliseconds, at the end of a test where so many seconds have gone.
    SECONDS = 5.0

    def __init__(self) -> None:
        self.counted = 0.0

    @staticmethod
    def count() -> int:
        """Mappings of this process."""
        return MAPPINGS.read_bytes().count(b"\n")

    @staticmethod
    def limit() -> int:
        """How many a process may have."""
        return int(Path("/proc/sys/vm/max_map_count").read_text())

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        """Counts, and lets programs go, after the test and what it used."""
        yield
        if "jax" not in sys.modules or time.monotonic() < self.counted + self.SECONDS:
            return
        import jax

        self.counted = time.monotonic()
        found, limit = self.count(), self.limit()
        if found > limit / 3:
            jax.clear_caches()
            gc.collect()
        assert found < 0.9 * limit, f"{found} memory mappings after this test: it compiles too many programs"


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
