"""What to adapt and how: one frozen dataclass a method, which stands in the method's file in `adapters/methods/`.

`targets` is the same for every method: a sequence of layer names (`("q_proj", "v_proj")`; a name matches the last
components of a module path), one regular expression that must match the whole path (`r".*attn.*"`), or `"all-linear"`
(every linear layer but the output head). `layers_to_transform` keeps some numbered layers of those.
"""

from typing import Any

from mora_jax.adapters.config.common import BIASES as BIASES, CommonConfig as CommonConfig, Targets as Targets


def __getattr__(name: str) -> Any:
    """The methods' configurations, collected at their first use: their files import this package's."""
    if not name.startswith("_"):
        from mora_jax.adapters.methods.registry import CONFIGS

        for config in CONFIGS.values():
            if config.__name__ == name:
                return config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
