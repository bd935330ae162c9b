"""Which adapter class a configuration stands for. A new method is one file and one line here."""

from __future__ import annotations

from typing import Any

from mora_jax.adapters.adapter import Adapter
from mora_jax.adapters.config import FullConfig, LoRAConfig, MoRAConfig
from mora_jax.adapters.lora import LoRA
from mora_jax.adapters.mora import MoRA

METHODS: dict[type, type[Adapter]] = {LoRAConfig: LoRA, MoRAConfig: MoRA}
CONFIGS: dict[str, type] = {"lora": LoRAConfig, "mora": MoRAConfig, "full": FullConfig}


def adapter_class(config: Any) -> type[Adapter]:
    """The adapter class of a configuration.

    Raises:
        TypeError: `config` is no adapter configuration.
    """
    try:
        return METHODS[type(config)]
    except KeyError:
        known = ", ".join(kind.__name__ for kind in (*METHODS, FullConfig))
        raise TypeError(f"config must be one of {known}, not {type(config).__name__}") from None
