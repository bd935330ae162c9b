"""What the benchmarks share: the machine in words, contestants that take turns, tables.

Nothing here imports jax or torch, so that the other environment of `lora_against_tunix.py` can use it too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Instruction sets that decide how fast products of matrices are.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
#: Variables of the environment that change how fast things are.
SETTINGS = (
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "GLIBC_TUNABLES",
)
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "torch",
    "transformers",
    "peft",
    "libtpu",
    "google-tunix",
    "qwix",
)


# The line of a results file that says of which state of the sources its figures are.
_STAMP = re.compile(r"\n*^Made at commits? (.*)\.$\n*", re.MULTILINE)


def commit() -> str | None:
    """The repository's commit; `-changed` behind it where files besides results differ; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"]
    try:
        head, differing = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in ([*git, "rev-parse", "--short=12", "HEAD"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-changed" if differing else head


def commits_of(text: str) -> list[str]:
    """The commits that a results file was made at, the oldest first; none where it doesn't say."""
    stamp = re.search(r"Made at commits? ((?:`[^`]+`(?:, )?)+)", text)
    return re.findall(r"`([^`]+)`", stamp[1]) if stamp else []


def without_stamp(text: str) -> str:
    """A results file without the line about its commits."""
    return _STAMP.sub("\n", text)


def versions_in_words() -> str:
    """The date, and the versions that decide what a compiler makes of a program."""
    named = [f"{name} {version}" for name in ("jax", "libtpu") if (version := _version(name))]
    return f"{time.strftime('%Y-%m-%d', time.gmtime())}, with {' and '.join(named)}"


def stamped(text: str, before: str = "") -> str:
    """A results file with the commit, the date and the versions of jax and libtpu in its last line.

    Args:
        text: the file, with or without that line.
        before: the file as it was, where parts of it stay; its commits are named too.
    """
    return f"{without_stamp(text).rstrip()}\n\n{stamp(before)}\n"


def stamp(before: str = "") -> str:
    """The line that `stamped` puts at the end."""
    commits = [f"`{name}`" for name in dict.fromkeys((*commits_of(before), commit() or "unknown"))]
    return f"Made at commit{'s' * (len(commits) > 1)} {', '.join(commits)}, {versions_in_words()}."


def machine() -> dict[str, Any]:
    """The processor, its cores and instruction sets, memory, load now, GPUs, commit, versions, settings."""
    lines = _text("/proc/cpuinfo").splitlines()
    pairs = [(line.split(":", 1)[0].strip(), line.split(":", 1)[1].strip()) for line in lines if ":" in line]
    said = dict(reversed(pairs))  # the first processor's
    flags = set(f"{said.get('flags', '')} {said.get('Features', '')}".split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = _text("/proc/meminfo").partition("MemTotal:")[2].split()[:1]
    return {
        "processor": said.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "instructions": [flag for flag in FLAGS if flag in flags],
        "memory_gb": round(int(memory[0]) * 1024 / 1e9, 1) if memory else None,
        "load": round(os.getloadavg()[0], 2),
        "gpus": _gpus(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def in_words(found: Mapping[str, Any]) -> str:
    """What `machine` says, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    settings = "".join(f", {name}={value}" for name, value in found["settings"].items())
    gpus = "".join(f", {gpu}" for gpu in found["gpus"])
    instructions = ", ".join(found["instructions"]) or "instruction sets unknown"
    memory = "" if found["memory_gb"] is None else f", {found['memory_gb']:.0f} GB"
    return (
        f"{found['processor']}, {found['cores']} cores ({instructions}){memory}{gpus}; load {found['load']:.1f} at the "
        f"start; {found['system']}, Python {found['python']}, {versions}{settings}; "
        f"commit {found['commit'] or 'unknown'}."
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.strip().splitlines()


@dataclass
class Times:
    """What one contestant took.

    Attributes:
        first: seconds of its first turn, which compiles and warms up, by the clock.
        wall, cpu: of each round after it, seconds by the clock and of CPU time of the process.
    """

    first: float = 0.0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """By the clock."""
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        """Of CPU time."""
        return statistics.median(self.cpu)

    @property
    def spread(self) -> str:
        """Least to most, by the clock."""
        return f"{min(self.wall):.3g}–{max(self.wall):.3g}"


#: Does a round's work, whose number it is given; returns nothing, or its seconds by the clock and of CPU time.
Turn = Callable[[int], tuple[float, float] | None]


def take_turns(contestants: Mapping[str, Turn], rounds: int) -> dict[str, Times]:
    """Every contestant does each round's work once before any goes on, in an order that turns around every round.

    Args:
        contestants: by name. A contestant in another process returns what it measured itself.
        rounds: besides a first one, which doesn't count.
    """
    found = {name: Times() for name in contestants}
    for number in range(rounds + 1):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            start, used = time.perf_counter(), time.process_time()
            said = contestants[name](number)
            wall, cpu = said or (time.perf_counter() - start, time.process_time() - used)
            if number:
                found[name].wall.append(wall)
                found[name].cpu.append(cpu)
            else:
                found[name].first = wall
    return found


def table(columns: Sequence[str], words: int, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first columns are words and whose others are numbers."""
    rule = ["---"] * words + ["---:"] * (len(columns) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def save(path: Path | None, figures: Any) -> None:
    """Writes what a benchmark measured as JSON, where a path is given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1, default=vars) + "\n", encoding="utf-8")


def vocabulary(folder: str | Path) -> int:
    """How many tokens the model in a HuggingFace folder has."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
