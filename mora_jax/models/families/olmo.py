"""OLMo 2 and 3, EXAONE 4: norms stand behind attention and MLP, none before them, and q and k have norms."""

from typing import Any

from mora_jax.models.config import DecoderConfig, TensorNames
from mora_jax.models.families.fields import (
    ATTENTION_BIAS,
    Family,
    Fields,
    layer_types,
    local_ropes,
    read_decoder,
    sliding_but_every,
    windows_of,
)
from mora_jax.models.families.llama import rotating

_NAMES = TensorNames(
    attention_norm=None,
    post_attention_norm="post_attention_layernorm",
    mlp_norm=None,
    post_mlp_norm="post_feedforward_layernorm",
)


def read_olmo2(fields: Fields, **family_fields: Any) -> DecoderConfig:
    """OLMo 2: norms after attention and MLP alone; one norm over all of q, one over all of k."""
    return read_decoder(fields, names=_NAMES, qk_norm="all", **family_fields)


def read_olmo3(fields: Fields) -> DecoderConfig:
    """OLMo 3: as OLMo 2, with a window in three of four layers; only the others rotate scaled."""
    types = layer_types(fields, sliding_but_every(4, fields.layers()))
    theta = fields.number("rope_theta", 5e5)
    windows = windows_of(fields, types, fields.window(4096))
    return read_olmo2(fields, windows=windows, **local_ropes(fields, types, theta, theta))


def read_exaone4(fields: Fields) -> DecoderConfig:
    """EXAONE 4: norms after attention and MLP alone, and on each head of q and k; no rotation without window."""
    window = fields.window(4096)
    layers = fields.layers()
    types = fields.value("layer_types")
    if types is None and window is not None:
        types = sliding_but_every(fields.integer("sliding_window_pattern", 4), layers)
    types = layer_types(fields, types or ["full_attention"] * layers)
    rotates = [window is None or kind == "sliding_attention" for kind in types]
    windows = windows_of(fields, types, window)
    return read_decoder(fields, names=_NAMES, qk_norm="head", windows=windows, **rotating(fields, rotates))


FAMILIES = (
    Family("Olmo2ForCausalLM", "olmo2", read_olmo2, "OLMo 2", ATTENTION_BIAS, {"rms_norm_eps": 1e-5}),
    Family("Olmo3ForCausalLM", "olmo3", read_olmo3, "OLMo 3", ATTENTION_BIAS, {"rms_norm_eps": 1e-5}),
    Family("Exaone4ForCausalLM", "exaone4", read_exaone4, "EXAONE 4", defaults={"rms_norm_eps": 1e-5}),
)
