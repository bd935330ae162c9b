"""Where a plan takes a model's shapes from."""

from __future__ import annotations

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


def _config(architecture: str, sizes: tuple[int, ...], **others: Any) -> dict[str, Any]:
    """A HuggingFace config; `sizes`: hidden, intermediate, layers, heads, key/value heads, vocabulary."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return {"architectures": [architecture], **dict(zip(names, sizes, strict=True)), **others}


def _llama(*sizes: int, **others: Any) -> dict[str, Any]:
    return _config("LlamaForCausalLM", sizes, max_position_embeddings=8192, rms_norm_eps=1e-5, **others)


def _qwen3(*sizes: int, tie_word_embeddings: bool = False) -> dict[str, Any]:
    return _config(
        "Qwen3ForCausalLM",
        sizes,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=tie_word_embeddings,
    )


def _gemma3(*sizes: int, **others: Any) -> dict[str, Any]:
    return _config("Gemma3ForCausalLM", sizes, max_position_embeddings=131072, rope_theta=1e6, **others)


#: By the name that `--model` takes. Of Gemma 3 27B the text decoder, without the images' part.
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, rope_theta=1e5, tie_word_embeddings=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, rope_theta=1e5, tie_word_embeddings=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, rope_theta=1.3e5, tie_word_embeddings=True),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256, rope_theta=5e5),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256, rope_theta=5e5),
    "qwen2.5-7b": _config(
        "Qwen2ForCausalLM",
        (3584, 18944, 28, 28, 4, 152064),
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 151936, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, 151936),
    "qwen3-30b-a3b": _config(
        "Qwen3MoeForCausalLM",
        (2048, 6144, 48, 32, 4, 151936),
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "mixtral-8x7b": _config(
        "MixtralForCausalLM",
        (4096, 14336, 32, 32, 8, 32000),
        max_position_embeddings=32768,
        rope_theta=1e6,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "gpt-oss-20b": _config(
        "GptOssForCausalLM",
        (2880, 2880, 24, 64, 8, 201088),
        head_dim=64,
        max_position_embeddings=131072,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    "gemma3-1b": _gemma3(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512, query_pre_attn_scalar=256),
    "gemma3-27b": _gemma3(
        5376,
        21504,
        62,
        32,
        16,
        262208,
        head_dim=128,
        sliding_window=1024,
        query_pre_attn_scalar=168,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
}
