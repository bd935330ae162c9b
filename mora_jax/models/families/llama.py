"""Llama (also SmolLM2, TinyLlama) and what differs from it in a few fields: Mistral, Qwen2 and Qwen3."""

from mora_jax.models.config import DecoderConfig
from mora_jax.models.families.fields import Family, Fields, layer_types, read_decoder, windows_of


def read_llama(fields: Fields) -> DecoderConfig:
    """Llama 2 and 3.x."""
    bias = fields.flag("attention_bias", False)
    return read_decoder(fields, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def read_mistral(fields: Fields) -> DecoderConfig:
    """Mistral, whose layers all have the same sliding window (or none)."""
    window = fields.nullable(fields.integer, "sliding_window", 4096)
    return read_decoder(fields, "mistral", windows=(window,) * fields.layers())


def read_qwen2(fields: Fields) -> DecoderConfig:
    """Qwen2 and Qwen2.5: biases on q, k and v; optionally a sliding window in the upper layers."""
    return read_decoder(fields, "qwen2", qkv_bias=True, windows=_upper_windows(fields))


def read_qwen3(fields: Fields) -> DecoderConfig:
    """Qwen3 (dense): norms on the heads of q and k, a head size of its own."""
    bias = fields.flag("attention_bias", False)
    windows = _upper_windows(fields)
    return read_decoder(fields, "qwen3", head_dim=128, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=windows)


def _upper_windows(fields: Fields) -> tuple[int | None, ...]:
    """Windows from `use_sliding_window`: layers from `max_window_layers` on slide."""
    window = fields.nullable(fields.integer, "sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.integer("max_window_layers", 28, least=0)
    sliding = [window is not None and layer >= first for layer in range(fields.layers())]
    types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return windows_of(fields, layer_types(fields, types), window)


FAMILIES = (
    Family(
        "LlamaForCausalLM", "llama", read_llama, {"attention_bias": ("qkv", "out"), "mlp_bias": ("gate_up", "down")}
    ),
    Family("MistralForCausalLM", "mistral", read_mistral),
    Family("Qwen2ForCausalLM", "qwen2", read_qwen2),
    Family("Qwen3ForCausalLM", "qwen3", read_qwen3, {"attention_bias": ("qkv", "out")}),
)
