"""Phi-3, GLM and GLM-4: gate and up are one tensor in files, and a part of each head may rotate."""

from mora_jax.models.config import DecoderConfig, TensorNames
from mora_jax.models.families.fields import Family, Fields, read_decoder
from mora_jax.models.rope import KINDS

_FUSED_MLP = ("mlp.gate_up_proj",)


def read_phi3(fields: Fields) -> DecoderConfig:
    """Phi-3: `qkv_proj` and `gate_up_proj` in one; partial rotary positions; longrope."""
    for name in ("rope_scaling", "rope_parameters"):
        table = fields.table(name)
        kind = "default" if table is None else table.text("rope_type", table.text("type", "default"))
        if table is not None and kind in ("su", "yarn"):  # older names
            fields = fields.replaced(name, table.values | {"rope_type": "longrope"})
        elif kind in set(KINDS) - {"default", "longrope"}:
            raise fields.bad(name, "of the rope type default or longrope")
    names = TensorNames(qkv=("self_attn.qkv_proj",), gate_up=_FUSED_MLP)
    return read_decoder(fields, rotary_factor=1.0, names=names, windows=fields.same_window(None))


def read_glm(fields: Fields, **names: str) -> DecoderConfig:
    """GLM: `gate_up_proj` in one; rotary pairs are neighbours, in half of each head; biases of q, k and v."""
    tensor_names = TensorNames(gate_up=_FUSED_MLP, **names)  # type: ignore[arg-type]
    return read_decoder(fields, head_dim=128, rotary_factor=0.5, rotary_neighbours=True, names=tensor_names)


def read_glm4(fields: Fields) -> DecoderConfig:
    """GLM-4: as GLM, with norms before and after."""
    return read_glm(fields, post_attention_norm="post_self_attn_layernorm", post_mlp_norm="post_mlp_layernorm")


_GLM_DEFAULTS = {"rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072, "attention_bias": True}

FAMILIES = (
    Family(
        "Phi3ForCausalLM",
        "phi3",
        read_phi3,
        "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    ),
    Family("GlmForCausalLM", "glm", read_glm, "GLM-4-9B, GLM-Edge", {"attention_bias": ("qkv",)}, _GLM_DEFAULTS),
    Family("Glm4ForCausalLM", "glm4", read_glm4, "GLM-4-0414, GLM-Z1", {"attention_bias": ("qkv",)}, _GLM_DEFAULTS),
)
