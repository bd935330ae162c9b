"""Where a plan takes a model's shapes from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.families import read_config
from mora_jax.models.init import read_json
from mora_jax.paths import expanded
from mora_jax.training.config.key import nearest


def read_model(name: str) -> dict[str, Any]:
    """The HuggingFace config of a model: a published one's name, a `config.json`, or a folder that holds one.

    Raises:
        InputError: there is none, or its architecture is not supported.
    """
    path = expanded(name)
    if name.lower() in PUBLISHED:
        values = PUBLISHED[name.lower()]
    elif path.is_dir() and not (path / "config.json").exists():
        raise InputError(
            f"--model {name}: that folder has no config.json; give a model's folder, or one of {', '.join(PUBLISHED)}"
        )
    elif path.exists():
        values = read_json(path / "config.json" if path.is_dir() else path)
    else:
        hint = nearest(name.rpartition("/")[2], PUBLISHED)
        meant = f"did you mean {hint}? " if hint else ""
        raise InputError(
            f"--model {name}: there is no such file; {meant}Give a folder with config.json, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    read_config(values, name)
    return values


_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "vocab_size",
)


def _family(architecture: str, **common: Any) -> Callable[..., dict[str, Any]]:
    """Makes the HuggingFace configs of an architecture: from `_SIZES`, in their order, and what differs."""

    def config(*sizes: int, **others: Any) -> dict[str, Any]:
        return {"architectures": [architecture], **dict(zip(_SIZES, sizes, strict=True)), **common, **others}

    return config


_llama = _family("LlamaForCausalLM", max_position_embeddings=8192, rms_norm_eps=1e-5)
_smollm2 = functools.partial(_llama, tie_word_embeddings=True)
_llama3 = functools.partial(_llama, rope_theta=5e5)
_qwen = {"max_position_embeddings": 40960, "head_dim": 128, "rope_theta": 1e6}
_qwen3 = _family("Qwen3ForCausalLM", **_qwen)
_qwen3_experts = _family("Qwen3MoeForCausalLM", **_qwen, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
_gemma3 = _family("Gemma3ForCausalLM", max_position_embeddings=131072, rope_theta=1e6)

#: By the name that `--model` takes. Of Gemma 3 27B the text decoder, without the images' part.
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 49152, rope_theta=1e5),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 49152, rope_theta=1e5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 49152, rope_theta=1.3e5),
    "llama3-8b": _llama3(4096, 14336, 32, 32, 8, 128256),
    "llama3-70b": _llama3(8192, 28672, 80, 64, 8, 128256),
    "qwen2.5-7b": _family("Qwen2ForCausalLM", max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6)(
        3584, 18944, 28, 28, 4, 152064
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 151936, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, 151936),
    "qwen3-30b-a3b": _qwen3_experts(2048, 6144, 48, 32, 4, 151936, moe_intermediate_size=768),
    "qwen3-235b-a22b": _qwen3_experts(4096, 12288, 94, 64, 4, 151936, moe_intermediate_size=1536),
    "mixtral-8x7b": _family("MixtralForCausalLM", max_position_embeddings=32768, rope_theta=1e6)(
        4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2
    ),
    "gpt-oss-20b": _family("GptOssForCausalLM", max_position_embeddings=131072)(
        2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4
    ),
    "gemma3-1b": _gemma3(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512, query_pre_attn_scalar=256),
    "gemma3-27b": _gemma3(
        *(5376, 21504, 62, 32, 16, 262208),
        head_dim=128,
        sliding_window=1024,
        query_pre_attn_scalar=168,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
}
