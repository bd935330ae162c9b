"""Qwen2 and Qwen2.5: biases on q, k and v; optionally a sliding window in the upper layers."""

from mora_jax.models.config import DecoderConfig
from mora_jax.models.families.common import layer_types, read_common, windows_of
from mora_jax.models.families.hf_config import Fields

ARCHITECTURE = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"
BIAS_FIELDS: dict[str, tuple[str, ...]] = {}


def read(fields: Fields) -> DecoderConfig:
    """The decoder that a Qwen2 `config.json` describes."""
    return read_common(fields, MODEL_TYPE, qkv_bias=True, windows=upper_windows(fields))


def upper_windows(fields: Fields) -> tuple[int | None, ...]:
    """Windows from `use_sliding_window`: layers from `max_window_layers` on slide."""
    window = fields.nullable_integer("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.whole("max_window_layers", 28)
    layers = range(fields.layers())
    sliding = [window is not None and layer >= first for layer in layers]
    types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return windows_of(fields, layer_types(fields, types), window)
