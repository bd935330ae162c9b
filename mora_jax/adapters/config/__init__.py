"""What to adapt and how: one frozen dataclass a method, which stands in the method's file in `adapters/methods/`.

`targets` is the same for every method: a sequence of layer names (`("q_proj", "v_proj")`; a name matches the last
components of a module path), one regular expression that must match the whole path (`r".*attn.*"`), or `"all-linear"`
(every linear layer but the output head). `layers_to_transform` keeps some numbered layers of those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mora_jax.adapters.config.common import BIASES as BIASES
from mora_jax.adapters.config.common import CommonConfig as CommonConfig
from mora_jax.adapters.config.common import Targets as Targets

if TYPE_CHECKING:
    from mora_jax.adapters.methods.registry import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """The methods' configurations, imported at their first use: their files import this package's."""
    from mora_jax.adapters.methods import registry

    found = vars(registry).get(name)
    if name.startswith("_") or found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
