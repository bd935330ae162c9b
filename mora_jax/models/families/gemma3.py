"""Gemma 3 (text): norms on q and k, five local layers for each global one, a rotary table for either."""

from mora_jax.errors import InputError
from mora_jax.models.config import DecoderConfig
from mora_jax.models.families.common import layer_types
from mora_jax.models.families.gemma2 import read_gemma
from mora_jax.models.families.hf_config import Fields
from mora_jax.models.families.rope import rope_of
from mora_jax.models.rope import Rope

ARCHITECTURE = "Gemma3ForCausalLM"
MODEL_TYPE = "gemma3_text"
BIAS_FIELDS = {"attention_bias": ("qkv", "out")}


def read(fields: Fields) -> DecoderConfig:
    """The decoder that a Gemma 3 text `config.json` describes."""
    layers = fields.layers()
    pattern = fields.integer("sliding_window_pattern", 6)
    every = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    types = layer_types(fields, every)
    return read_gemma(
        fields,
        MODEL_TYPE,
        types,
        qk_norm=True,
        attention_softcap=fields.nullable_number("attn_logit_softcapping", None),
        final_softcap=fields.nullable_number("final_logit_softcapping", None),
        ropes=_ropes(fields),
        layer_ropes=tuple(1 if kind == "sliding_attention" else 0 for kind in types),
    )


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """The global table, which may be scaled, and the local one."""
    both = fields.table("rope_parameters") or Fields({}, fields.where)
    if both.values and not set(both.values) <= {"full_attention", "sliding_attention"}:
        raise InputError(f"{both.where} must have the entries full_attention and sliding_attention alone")
    whole = both.table("full_attention") or Fields({}, fields.where)
    scaling = fields.table("rope_scaling")
    if scaling is not None:
        whole = Fields(whole.values | scaling.values, scaling.where)
    local = both.table("sliding_attention") or Fields({}, fields.where)
    return (
        rope_of(whole, fields, fields.number("rope_theta", 1_000_000.0)),
        rope_of(local, fields, fields.number("rope_local_base_freq", 10_000.0)),
    )
