"""Parameter-efficient fine-tuning of language models in JAX and Flax.

Names are imported when they are first used, so `import mora_jax` is quick and starts no backend.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_HOMES = {
    "LoRALinear": "mora_jax.adapters.methods.lora",
    "MoRALinear": "mora_jax.adapters.methods.mora",
    "AdapterParam": "mora_jax.adapters.base",
    "mutable_state": "mora_jax.adapters.base",
    "attach": "mora_jax.adapters.attach",
    "register_layer": "mora_jax.adapters.layers",
    "partition": "mora_jax.adapters.attach",
    "merge": "mora_jax.adapters.merge",
    "unmerge": "mora_jax.adapters.merge",
    "detach": "mora_jax.adapters.attach",
    "load_pretrained": "mora_jax.interop",
    "save_pretrained": "mora_jax.interop",
    "load_adapter": "mora_jax.interop",
    "save_adapter": "mora_jax.interop",
    "add_tokens": "mora_jax.interop.add_tokens",
    "finetune": "mora_jax.training.finetune",
    "push_to_hub": "mora_jax.training.run.publish",
    "sweep": "mora_jax.sweeps.train",
    "NamedAdapters": "mora_jax.interop.multi_adapter",
    "InputError": "mora_jax.errors",
}
#: What users of PEFT look for first.
_OF_PEFT = {"get_peft_model": "attach", "PeftModel": "load_adapter", "PeftConfig": "LoRAConfig"}
_ROOMS = ("adapters", "linen", "functional", "losses", "models", "interop", "data", "training", "evaluation", "demo")

if TYPE_CHECKING:
    from mora_jax.adapters.attach import attach as attach, detach as detach, partition as partition
    from mora_jax.adapters.base import AdapterParam as AdapterParam, mutable_state as mutable_state
    from mora_jax.adapters.layers import register_layer as register_layer
    from mora_jax.adapters.merge import merge as merge, unmerge as unmerge
    from mora_jax.adapters.methods.adalora import AdaLoRAConfig as AdaLoRAConfig
    from mora_jax.adapters.methods.bitfit import BitFitConfig as BitFitConfig
    from mora_jax.adapters.methods.full import FullConfig as FullConfig
    from mora_jax.adapters.methods.hira import HiRAConfig as HiRAConfig
    from mora_jax.adapters.methods.ia3 import IA3Config as IA3Config
    from mora_jax.adapters.methods.lora import LoRAConfig as LoRAConfig, LoRALinear as LoRALinear
    from mora_jax.adapters.methods.lora_variants import (
        DoRAConfig as DoRAConfig,
        LoRAFAConfig as LoRAFAConfig,
        LoRAPlusConfig as LoRAPlusConfig,
        OLoRAConfig as OLoRAConfig,
        PiSSAConfig as PiSSAConfig,
        ReLoRAConfig as ReLoRAConfig,
        RsLoRAConfig as RsLoRAConfig,
    )
    from mora_jax.adapters.methods.miss import MiSSConfig as MiSSConfig
    from mora_jax.adapters.methods.mora import MoRAConfig as MoRAConfig, MoRALinear as MoRALinear
    from mora_jax.adapters.methods.oft import OFTConfig as OFTConfig
    from mora_jax.adapters.methods.randlora import RandLoRAConfig as RandLoRAConfig
    from mora_jax.adapters.methods.remora import ReMoRAConfig as ReMoRAConfig
    from mora_jax.adapters.methods.vera import VeRAConfig as VeRAConfig
    from mora_jax.errors import InputError as InputError
    from mora_jax.interop import (
        load_adapter as load_adapter,
        load_pretrained as load_pretrained,
        save_adapter as save_adapter,
        save_pretrained as save_pretrained,
    )
    from mora_jax.interop.add_tokens import add_tokens as add_tokens
    from mora_jax.interop.multi_adapter import NamedAdapters as NamedAdapters
    from mora_jax.sweeps.train import sweep as sweep
    from mora_jax.training.finetune import finetune as finetune
    from mora_jax.training.run.publish import push_to_hub as push_to_hub


def __getattr__(name: str):
    if name == "__all__":
        return __dir__()
    if name in _HOMES or name in _ROOMS or name.endswith("Config"):
        from mora_jax.environment import check_versions

        check_versions()
    if name in _ROOMS:
        value = importlib.import_module(f"mora_jax.{name}")
    elif name in _HOMES or (name.endswith("Config") and name in _configs()):
        value = getattr(importlib.import_module(_HOMES.get(name, "mora_jax.adapters.config")), name)
    else:
        configs = {config.lower(): config for config in _configs()} if name.endswith("Config") else {}
        hint = _OF_PEFT.get(name) or configs.get(name.lower())
        raise AttributeError(f"module 'mora_jax' has no attribute {name!r}" + (f"; here it is {hint}" if hint else ""))
    globals()[name] = value
    return value


def _configs() -> list[str]:
    """The names of the methods' configurations, which collect themselves."""
    return [
        config.__name__ for config in importlib.import_module("mora_jax.adapters.methods.registry").CONFIGS.values()
    ]


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_ROOMS, "__version__", *_configs()])
