"""What a checkpoint belongs to: base, method, rank, layers, data. A restore into something else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mora_jax.errors import InputError
from mora_jax.interop.fingerprint import base_hash
from mora_jax.training.config.adapter import adapter_config
from mora_jax.training.setup import Setup
from mora_jax.training.state import Arrays

# In the order in which they are compared: what explains most comes first.
COMPARED = {
    "base": "base",
    "quantize": "model.quantize",
    "method": "adapter.method",
    "rank": "adapter.rank",
    "targets": "adapted layers",
    "arrays": "trained arrays",
    "data": "data",
    "evaluation": "evaluation data",
    "tasks": "evaluation tasks",
    "restarts": "restarts",
}


def run_identity(setup: Setup, adapters: Arrays, restarts: Any = None) -> dict[str, Any]:
    """The identity of a run, as plain JSON values.

    Args:
        setup: the run.
        adapters: its trained arrays.
        restarts: of ReLoRA and ReMoRA.
    """
    section = setup.config.adapter
    assert setup.model.folder is not None, "a model that was loaded has a folder"
    identity = {
        "base": base_hash(setup.model.folder),
        "base_path": setup.config.model.path,
        "quantize": setup.config.model.quantize,
        "method": section.method,
        "rank": getattr(adapter_config(section), "rank", None),
        "targets": sorted({match.path for match in setup.attached.matches}),
        "arrays": {name: list(array.shape) for name, array in adapters.items()},
        "data": f"{setup.train.fingerprint()} in {setup.plan}",
        "evaluation": None if setup.evaluation is None else setup.evaluation.fingerprint(),
        "tasks": setup.task_rows,
    }
    return identity if restarts is None else identity | {"restarts": f"{restarts}"}


def check_identity(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compares a checkpoint's identity with a run's.

    Raises:
        InputError: they differ; one line with both values.
    """
    for name, words in COMPARED.items():
        # What a run did not have, it may have from now on.
        if found.get(name) is not None and found[name] != own.get(name):
            theirs, ours = (_value(name, identity, other) for identity, other in ((found, own), (own, found)))
            raise InputError(
                f"the checkpoint was written with {words} {theirs}, this run has {ours}; resume with the run's own "
                f"settings"
            )


def _value(name: str, identity: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A value in words: of many only what the other doesn't have."""
    value, against = identity.get(name), other.get(name)
    if name == "base":
        return f"{identity.get('base_path')} ({value})"
    if isinstance(value, list) and isinstance(against, list):
        return (
            f"{', '.join(sorted(set(value) - set(against))) or 'none'} beside {len(set(value) & set(against))} others"
        )
    if isinstance(value, dict) and isinstance(against, dict):
        differing = [key for key in sorted({*value, *against}) if value.get(key) != against.get(key)]
        return ", ".join(f"{key} {value.get(key, 'absent')}" for key in differing[:3])
    return repr(value)
