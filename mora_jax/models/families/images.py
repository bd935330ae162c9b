"""Families that read images, too: their text part is loaded, and the rest goes back into merged folders as it is."""

import dataclasses
import json
from functools import partial
from typing import Any

from mora_jax.models.config import DecoderConfig
from mora_jax.models.families import gemma, llama, qwen3_5
from mora_jax.models.families.fields import Family, Fields

_TEXTS = {family.model_type: family for family in (*llama.FAMILIES, *gemma.FAMILIES, *qwen3_5.FAMILIES)}


def read_text(fields: Fields, *, kinds: tuple[str, ...], tied: bool = True) -> DecoderConfig:
    """The text part of a model.

    Args:
        fields: the whole config.
        kinds: what the text part's `model_type` may be; the first where it states none.
        tied: whether the head is tied where the config says nothing.
    """
    table = fields.table("text_config")
    if table is None:
        raise fields.bad("text_config", "an object")
    kind = table.text("model_type", kinds[0])
    if kind not in kinds:
        raise table.bad("model_type", f"one of {', '.join(kinds)}")
    # That of the text part counts for nothing.
    tying = {"tie_word_embeddings": fields.flag("tie_word_embeddings", tied)}
    config = _TEXTS[kind].read(Fields(table.values | tying, table.where, _TEXTS[kind]))
    names: dict[str, Any] = {
        name: value.replace("model.", "model.language_model.", 1)
        for name, value in vars(config.names).items()
        if isinstance(value, str) and value.startswith("model.")
    }
    assert fields.family is not None
    return dataclasses.replace(
        config,
        family=fields.family.model_type,
        names=dataclasses.replace(config.names, **names),
        source=json.dumps(fields.values),
    )


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
        partial(read_text, kinds=("gemma3_text",)),
        "Gemma 3 4B to 27B",
        beside=_BESIDE,
        older=_OLDER,
    ),
    Family(
        "Gemma4ForConditionalGeneration",
        "gemma4",
        partial(read_text, kinds=("gemma4_text",)),
        "Gemma 4",
        beside=("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
    ),
    Family(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        partial(read_text, kinds=("mistral", "ministral3")),
        "Mistral Small 3.1, Ministral 3 with images",
        beside=_BESIDE,
        older=_OLDER,
    ),
    Family(
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        partial(read_text, kinds=("qwen3_5_text",), tied=False),
        "Qwen3.5 (dense)",
        beside=("model.visual.", "mtp."),
    ),
)
