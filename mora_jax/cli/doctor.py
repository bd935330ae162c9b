"""Say what this machine has for mora-jax, what is wrong, and the line that mends it: versions, devices, caches.

With --kernels every way to compute attention that runs here is compared with a plain one in float64, forward and
backward: a minute. Exit code 1 where something is wrong.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
from typing import Any

from mora_jax import environment
from mora_jax.errors import InputError
from mora_jax.paths import cache_folder, writable

HELP = "say what is wrong with this machine's installation"
PACKAGES = ("mora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "libtpu")
FREE = 5e9  # bytes that caches and checkpoints should have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--kernels", action="store_true", help="compare the kernels of this machine with float64")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    problems: list[str] = []
    facts: dict[str, Any] = {"versions": _versions(problems), "devices": [], "dtype": None, "caches": _caches(problems)}
    if not problems or "doesn't run with" not in problems[0]:
        facts |= _devices(problems)
    kernels = _kernels(problems) if args.kernels and facts["devices"] else []
    if args.json:
        print(json.dumps(facts | {"kernels": kernels, "problems": problems}))
        return 1 if problems else 0
    rows = [(name, version or "not installed") for name, version in facts["versions"].items()]
    rows += [("device", device) for device in facts["devices"]]
    rows += [("default dtype", facts["dtype"] or "unknown")]
    rows += [("cache", f"{cache['folder']}, {cache['free'] / 1e9:.0f} GB free") for cache in facts["caches"]]
    print(*(f"{name:17}{value}" for name, value in rows), sep="\n")
    for kernel in kernels:
        verdict = "agrees" if kernel["agrees"] else "WRONG"
        print(f"attention by {kernel['kernel']}, {kernel['rows']}: {verdict}, off by {kernel['error']:.1e}")
    print(*[f"problem: {problem}" for problem in problems] or ["nothing is wrong"], sep="\n")
    return 1 if problems else 0


def _versions(problems: list[str]) -> dict[str, str | None]:
    installed = {entry.name: entry.version for entry in importlib.metadata.distributions(name=None) if entry.name}
    plugins = sorted(name for name in installed if name.startswith("jax-") and name.endswith(("-plugin", "-pjrt")))
    try:
        environment.check_versions()
    except ImportError as error:
        problems.append(str(error))
    return {"Python": platform.python_version()} | {name: installed.get(name) for name in (*PACKAGES, *plugins)}


def _devices(problems: list[str]) -> dict[str, Any]:
    """The devices that jax finds, in words, and the dtype that a model has by default."""
    try:
        environment.prepare()
        import jax

        from mora_jax.backend import default_dtype

        devices = jax.devices()
    except (InputError, RuntimeError) as error:
        problems.append((environment.explain(error) if isinstance(error, RuntimeError) else None) or str(error))
        return {}
    if devices[0].platform == "cpu" and environment.has_nvidia_gpu() and "cuda" not in environment.plugins():
        problems.append("an NVIDIA GPU is here, and jax uses the CPU: pip install 'mora-jax[cuda]'")
    elif devices[0].platform == "cpu" and environment.may_have_tpu() and not environment.has_libtpu():
        problems.append("a TPU may be here, and jax uses the CPU: pip install 'mora-jax[tpu]'")
    counted = {kind: sum(device.device_kind == kind for device in devices) for kind in {d.device_kind for d in devices}}
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    size = f", {memory / 1e9:.1f} GB each" if memory else ""
    descriptions = [f"{count} × {kind} ({devices[0].platform}){size}" for kind, count in counted.items()]
    return {"devices": descriptions, "dtype": default_dtype().name}


def _caches(problems: list[str]) -> list[dict[str, Any]]:
    folder = cache_folder()
    if not writable(folder):
        problems.append(f"{folder} can't be written, so nothing is cached: set MORA_JAX_CACHE to a folder of yours")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < FREE:
        problems.append(f"{folder} has {free / 1e9:.1f} GB left: make room, or set MORA_JAX_CACHE to another disk")
    return [{"folder": str(folder), "free": free}]


def _kernels(problems: list[str]) -> list[dict[str, Any]]:
    from mora_jax.models.attention.compare import compare

    comparisons = []
    for one in compare():
        print(f"compared {one.kernel}, {one.rows}: {one.seconds:.1f} s", file=sys.stderr)
        comparisons.append(one._asdict() | {"agrees": one.agrees})
        if not one.agrees:
            problems.append(
                f"attention by {one.kernel} on {one.rows} is off by {one.error:.1e} (right: {one.tolerance:.0e}): set "
                "model.attention=xla, and report it with this output"
            )
    return comparisons
