"""The supported model families, each with the function that reads its HuggingFace config; a file lists those it has."""

import reprlib
from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig
from mora_jax.models.families import experts, gemma, gpt, images, llama, olmo, phi, qwen3_5
from mora_jax.models.families.fields import Family, Fields

_FILES = (llama, gemma, phi, olmo, gpt, experts, qwen3_5, images)
FAMILIES: tuple[Family, ...] = tuple(family for file in _FILES for family in file.FAMILIES)


def family_of(config: DecoderConfig) -> Family:
    """The family that `config` came from."""
    return next(family for family in FAMILIES if family.model_type == config.family)


def read_config(values: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder that a HuggingFace config describes.

    Args:
        values: the parsed `config.json`.
        where: what error messages call it.

    Raises:
        InputError: for an architecture that is not supported, or a value that is missing or bad.
    """
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise Fields(values, where).bad("architectures", "a list with the name of a class")
    architecture, model_type = architectures[0] if architectures else None, values.get("model_type")
    for family in FAMILIES:
        if architecture == family.architecture or (architecture is None and model_type == family.model_type):
            if values.get("model_type", family.model_type) != family.model_type:
                raise InputError(
                    f"{where}: model_type is {reprlib.repr(model_type)}, but architectures names {architecture}, whose"
                    f" model_type is {family.model_type}; make them agree"
                )
            quantization = values.get("quantization_config")
            if quantization is not None and (
                not isinstance(quantization, dict) or quantization.get("quant_method") not in family.read_dense
            ):
                raise InputError(f"{where}: the checkpoint is quantized; give the unquantized one")
            dense = {name: value for name, value in values.items() if name != "quantization_config"}
            return family.read(Fields(dense, where, family))
    if architecture is None and model_type is None:
        raise InputError(f"{where}: no architecture is named; give a model's folder (of a run that is model/)")
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise InputError(
        f"{where}: architecture {reprlib.repr(architecture or model_type)} is not supported; supported are {supported}"
    )
