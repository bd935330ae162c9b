"""The methods by name: configuration and adapter class. A new method is one file and one line here."""

from __future__ import annotations

from typing import Any, NamedTuple

from mora_jax.adapters.base import Adapter
from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.methods.adalora import AdaLoRA, AdaLoRAConfig
from mora_jax.adapters.methods.bitfit import BitFit, BitFitConfig
from mora_jax.adapters.methods.full import FullConfig
from mora_jax.adapters.methods.hira import HiRA, HiRAConfig
from mora_jax.adapters.methods.ia3 import IA3, IA3Config
from mora_jax.adapters.methods.lora import INITS as INITS
from mora_jax.adapters.methods.lora import LoRA, LoRAConfig
from mora_jax.adapters.methods.lora_variants import (
    DoRA,
    DoRAConfig,
    LoRAFA,
    LoRAFAConfig,
    LoRAPlus,
    LoRAPlusConfig,
    OLoRA,
    OLoRAConfig,
    PiSSA,
    PiSSAConfig,
    ReLoRA,
    ReLoRAConfig,
    RsLoRA,
    RsLoRAConfig,
)
from mora_jax.adapters.methods.miss import MiSS, MiSSConfig
from mora_jax.adapters.methods.mora import MoRA, MoRAConfig
from mora_jax.adapters.methods.oft import OFT, OFTConfig
from mora_jax.adapters.methods.randlora import RandLoRA, RandLoRAConfig
from mora_jax.adapters.methods.remora import ReMoRA, ReMoRAConfig
from mora_jax.adapters.methods.vera import VeRA, VeRAConfig


class Method(NamedTuple):
    """A method: its configuration, and its adapter class (None for full fine-tuning, which has none)."""

    config: type[MethodConfig]
    adapter: type[Adapter] | None


METHODS: dict[str, Method] = {
    "lora": Method(LoRAConfig, LoRA),
    "rslora": Method(RsLoRAConfig, RsLoRA),
    "dora": Method(DoRAConfig, DoRA),
    "pissa": Method(PiSSAConfig, PiSSA),
    "olora": Method(OLoRAConfig, OLoRA),
    "lora_plus": Method(LoRAPlusConfig, LoRAPlus),
    "lora_fa": Method(LoRAFAConfig, LoRAFA),
    "mora": Method(MoRAConfig, MoRA),
    "vera": Method(VeRAConfig, VeRA),
    "adalora": Method(AdaLoRAConfig, AdaLoRA),
    "ia3": Method(IA3Config, IA3),
    "hira": Method(HiRAConfig, HiRA),
    "miss": Method(MiSSConfig, MiSS),
    "randlora": Method(RandLoRAConfig, RandLoRA),
    "oft": Method(OFTConfig, OFT),
    "relora": Method(ReLoRAConfig, ReLoRA),
    "remora": Method(ReMoRAConfig, ReMoRA),
    "bitfit": Method(BitFitConfig, BitFit),
    "full": Method(FullConfig, None),
}
CONFIGS: dict[str, type[MethodConfig]] = {name: method.config for name, method in METHODS.items()}
# The arrays of all adapters that hold one number a feature.
VECTORS = Adapter.vectors.union(*(method.adapter.vectors for method in METHODS.values() if method.adapter is not None))


def adapter_class(config: Any) -> type[Adapter]:
    """The adapter class of a configuration.

    Raises:
        TypeError: `config` is no adapter configuration.
    """
    for method in METHODS.values():
        if method.config is type(config) and method.adapter is not None:
            return method.adapter
    known = ", ".join(kind.__name__ for kind in CONFIGS.values())
    raise TypeError(f"config must be one of {known}, not {type(config).__name__}")
