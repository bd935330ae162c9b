"""What to adapt and how: one frozen dataclass a method.

`targets` is the same for every method: a sequence of layer names (`("q_proj", "v_proj")`; a name matches the last
components of a module path), one regular expression that must match the whole path (`r".*attn.*"`), or `"all-linear"`
(every linear layer but the output head). `layers_to_transform` keeps some numbered layers of those.
"""

from mora_jax.adapters.config.adalora import AdaLoRAConfig
from mora_jax.adapters.config.bitfit import BitFitConfig
from mora_jax.adapters.config.common import BIASES, CommonConfig, Targets
from mora_jax.adapters.config.full import FullConfig
from mora_jax.adapters.config.ia3 import IA3Config
from mora_jax.adapters.config.lora import (
    INITS,
    DoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    LoRAPlusConfig,
    OLoRAConfig,
    PiSSAConfig,
    RsLoRAConfig,
)
from mora_jax.adapters.config.mora import MoRAConfig
from mora_jax.adapters.config.restarts import ReLoRAConfig, ReMoRAConfig
from mora_jax.adapters.config.vera import VeRAConfig

AdapterConfig = CommonConfig | FullConfig

__all__ = [
    "BIASES",
    "INITS",
    "AdaLoRAConfig",
    "AdapterConfig",
    "BitFitConfig",
    "CommonConfig",
    "DoRAConfig",
    "FullConfig",
    "IA3Config",
    "LoRAConfig",
    "LoRAFAConfig",
    "LoRAPlusConfig",
    "MoRAConfig",
    "OLoRAConfig",
    "PiSSAConfig",
    "ReLoRAConfig",
    "ReMoRAConfig",
    "RsLoRAConfig",
    "Targets",
    "VeRAConfig",
]
