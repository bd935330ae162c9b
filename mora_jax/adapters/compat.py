"""Names of newer versions of jax and flax that older ones lack, put there; each goes with the floor that ends it.

The oldest versions are those that Colab has. Nothing is replaced: a version that has a name keeps its own.
"""

import importlib
from typing import Any


def complete() -> None:
    """Adds what is missing to the jax and the flax that are installed."""
    import jax
    from flax import nnx
    from flax.nnx.nn import normalization
    from jax.extend import core

    for owner, name, value in (
        (nnx.Variable, "get_value", lambda variable: variable.value),  # flax 0.12.1
        (nnx.Variable, "set_value", lambda variable, value: setattr(variable, "value", value)),  # flax 0.12.1
        (nnx, "InstanceNorm", normalization.InstanceNorm),  # flax 0.12.1
        (core, "jaxprs_in_params", _jaxprs_in_params),  # jax 0.10
        (jax.monitoring, "unregister_event_duration_listener", _unregister),  # jax 0.9
    ):
        if not hasattr(owner, name):
            setattr(owner, name, value)
    dictionary: Any = nnx.Dict
    if dictionary.get is not _get and not _has_keys(dictionary):
        dictionary.get = _get  # flax 0.12.6


def _has_keys(mapping: Any) -> bool:
    """Whether a missing key is a KeyError, as mappings need it to give their default."""
    try:
        return mapping().get("missing") is None
    except AttributeError:
        return False


def _get(mapping: Any, key: str, default: Any = None) -> Any:
    return getattr(mapping, key, default)


def _unregister(listener: Any) -> None:
    monitoring: Any = importlib.import_module("jax._src.monitoring")
    monitoring._unregister_event_duration_listener_by_callback(listener)


def _jaxprs_in_params(params: Any) -> Any:
    from jax._src.core import jaxprs_in_params

    return jaxprs_in_params(params)
