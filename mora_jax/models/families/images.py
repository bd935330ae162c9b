"""Families that read images, too: their text part is loaded, and the rest goes back into merged folders as it is."""

import dataclasses
import json

from mora_jax.models.config import DecoderConfig
from mora_jax.models.families import gemma, llama
from mora_jax.models.families.fields import Family, Fields

_TEXTS = {family.model_type: family for family in (*llama.FAMILIES, *gemma.FAMILIES)}


def read_gemma3(fields: Fields) -> DecoderConfig:
    """Gemma 3 with images: its text part."""
    return _read_text(fields, ("gemma3_text",))


def read_mistral3(fields: Fields) -> DecoderConfig:
    """Mistral 3 with images: its text part, a Mistral or a Ministral 3."""
    return _read_text(fields, ("mistral", "ministral3"))


def _read_text(fields: Fields, kinds: tuple[str, ...]) -> DecoderConfig:
    table = fields.table("text_config")
    if table is None:
        raise fields.bad("text_config", "an object")
    kind = table.text("model_type", kinds[0])
    if kind not in kinds:
        raise table.bad("model_type", f"one of {', '.join(kinds)}")
    tied = {"tie_word_embeddings": fields.flag("tie_word_embeddings", True)}  # that of the text part counts for nothing
    config = _TEXTS[kind].read(Fields(table.values | tied, table.where, _TEXTS[kind]))
    names = dataclasses.replace(
        config.names,
        embedding="model.language_model.embed_tokens",
        final_norm="model.language_model.norm",
        layer="model.language_model.layers.{layer}",
    )
    assert fields.family is not None
    return dataclasses.replace(config, family=fields.family.model_type, names=names, source=json.dumps(fields.values))


_BESIDE = ("model.vision_tower.", "model.multi_modal_projector.")
_OLDER = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    **{name.removeprefix("model."): name for name in _BESIDE},
}

FAMILIES = (
    Family(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        read_gemma3,
        "Gemma 3 4B to 27B",
        beside=_BESIDE,
        older=_OLDER,
    ),
    Family(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        read_mistral3,
        "Mistral Small 3.1, Ministral 3 with images",
        beside=_BESIDE,
        older=_OLDER,
    ),
)
