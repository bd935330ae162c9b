"""The supported model families. A family is one module with `ARCHITECTURE`, `MODEL_TYPE` and `read`."""

from types import ModuleType
from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig
from mora_jax.models.families import gemma2, gemma3, llama, mistral, qwen2, qwen3
from mora_jax.models.families.fields import Fields

FAMILIES: tuple[ModuleType, ...] = (llama, mistral, qwen2, qwen3, gemma2, gemma3)


def family_of(config: DecoderConfig) -> ModuleType:
    """The family module that `config` came from."""
    return next(family for family in FAMILIES if family.MODEL_TYPE == config.family)


def read_config(values: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder that a HuggingFace config describes.

    Args:
        values: the parsed `config.json`.
        where: what error messages call it.

    Raises:
        InputError: for an architecture that is not supported, or a value that is missing or bad.
    """
    architectures = values.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = values.get("model_type")
    for family in FAMILIES:
        if named == family.ARCHITECTURE or (named is None and model_type == family.MODEL_TYPE):
            if values.get("quantization_config") is not None:
                raise InputError(f"{where}: the checkpoint is quantized; give the unquantized one")
            return family.read(Fields(values, where))
    supported = ", ".join(family.ARCHITECTURE for family in FAMILIES)
    raise InputError(f"{where}: architecture {named or model_type!r} is not supported; supported are {supported}")
