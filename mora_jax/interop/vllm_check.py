"""What vLLM's loaders demand of an adapter folder and of a model folder, checked without vLLM.

From vLLM's sources: `vllm/lora/peft_helper.py` (fields), `vllm/lora/lora_model.py` and `vllm/lora/utils.py` (names of
tensors and modules), `vllm/config/lora.py` (ranks). vLLM takes rank and scaling from `r` and `lora_alpha` alone: it
reads neither `rank_pattern` nor `alpha_pattern`, so an adapter whose scaling differs by module would be loaded and mean
something else, which is the finding that no error of vLLM's would show.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mora_jax.adapters.config.patterns import value_at
from mora_jax.errors import InputError
from mora_jax.interop.hub import load_tokenizer
from mora_jax.interop.load import load_shapes
from mora_jax.interop.peft.lora import scaling_at
from mora_jax.models.init import read_json
from mora_jax.paths import local_path

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
_KEY = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.(?P<factor>lora_[AB]\.weight|lora_embedding_[AB])")
_BASE_EMBEDDING = re.compile(r".*\.(embed_tokens|lm_head)\.base_layer\.weight")
_DTYPES = ("F32", "F16", "BF16")
_OTHER_FIELDS = ("layer_replication", "lora_bias", "target_parameters", "trainable_token_indices", "use_bdlora")


def check_folder(folder: str | os.PathLike[str]) -> list[str]:
    """Checks an adapter folder or a model folder for what vLLM would refuse or misread.

    Args:
        folder: with `adapter_config.json` or `config.json`.

    Returns:
        One sentence for each finding; empty where there is none.

    Raises:
        InputError: the folder is neither.
    """
    where = local_path(folder)
    if (where / "adapter_config.json").is_file():
        return check_adapter(where)
    if (where / "config.json").is_file():
        return check_model(where)
    raise InputError(f"{where} holds neither adapter_config.json nor config.json")


def check_adapter(folder: str | os.PathLike[str]) -> list[str]:
    """As `check_folder`, for an adapter."""
    where = local_path(folder)
    values = read_json(where / "adapter_config.json")
    absent = [name for name in ("r", "lora_alpha", "target_modules") if values.get(name) is None]
    if absent:
        return [f"adapter_config.json lacks {', '.join(absent)}, which vLLM requires"]
    findings = _fields(values)
    weights = where / "adapter_model.safetensors"
    if not weights.is_file():
        return [*findings, f"{where} has no adapter_model.safetensors"]
    try:
        with safe_open(weights, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    except SafetensorError as error:
        return [*findings, f"adapter_model.safetensors is not a complete safetensors file: {error}"]
    odd = sorted({dtype for dtype in dtypes.values() if dtype not in _DTYPES})
    if odd:
        findings.append(f"tensors have dtype {', '.join(odd)}; vLLM takes float32, float16 and bfloat16")
    return findings + _tensors(values, shapes)


def _fields(values: dict[str, Any]) -> list[str]:
    findings = []
    if values.get("peft_type", "LORA") != "LORA":
        findings.append(f"peft_type is {values['peft_type']}; vLLM loads LORA alone")
    if values.get("use_mora") or values.get("mora_jax_kind"):
        findings.append("it is a MoRA, which vLLM does not have; use mora-jax convert --to lora, or merge")
    if values.get("use_dora"):
        findings.append("use_dora is set, which vLLM does not support; merge, or convert --to lora with a rank")
    if values.get("modules_to_save"):
        findings.append(f"modules_to_save is {values['modules_to_save']}; vLLM takes none, so merge instead")
    if values.get("bias", "none") != "none":
        findings.append(f"bias is {values['bias']!r}; vLLM takes 'none', so merge instead")
    findings += [f"{name} is set, which vLLM does not read" for name in _OTHER_FIELDS if values.get(name)]
    rank = values["r"]
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANKS[-1]:
        findings.append(f"r is {rank}; vLLM's max_lora_rank goes up to {MAX_RANKS[-1]}: convert with a smaller rank")
    return findings


def _tensors(values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    findings: list[str] = []
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _KEY.fullmatch(name)
        if match is not None:
            factors.setdefault(match["module"], {})["a" if "_A" in match["factor"] else "b"] = shape
        elif not _BASE_EMBEDDING.fullmatch(name):
            findings.append(f"tensor {name} is no LoRA weight by its name, which vLLM refuses")
    if not factors:
        return [*findings, "there is no LoRA weight"]
    limit, scaling = values["r"], scaling_at(values, "")
    for module, found in factors.items():
        if module.rpartition(".")[2] not in _MODULES:
            findings.append(f"{module} is none of the modules that vLLM adapts: {', '.join(_MODULES)}")
        if len(found) < 2:
            findings.append(f"{module} has lora_{'A' if 'a' in found else 'B'} alone; vLLM needs both factors")
            continue
        a, b = found["a"], found["b"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            findings.append(f"{module} has factors {list(a)} and {list(b)}; vLLM takes [rank, in] and [out, rank]")
            continue
        if a[0] != value_at((values.get("rank_pattern") or {}).items(), module, values["r"]):
            findings.append(f"{module} has rank {a[0]}, which is not what adapter_config.json says")
        elif a[0] > limit:
            findings.append(f"{module} has rank {a[0]} above r {limit}; vLLM reads r alone, so r must be the largest")
        wanted = scaling_at(values, module)
        if abs(wanted - scaling) > 1e-6 * max(abs(wanted), abs(scaling)):
            findings.append(
                f"{module} is scaled by {wanted:.6g}, but vLLM reads no patterns and would scale by {scaling:.6g}"
            )
    return findings


def check_model(folder: str | os.PathLike[str]) -> list[str]:
    """As `check_folder`, for a whole model."""
    where = local_path(folder)
    values = read_json(where / "config.json")
    findings = []
    for name in ("architectures", "model_type"):
        if not values.get(name):
            findings.append(f"config.json has no {name}, from which vLLM picks the model")
    dtype = values.get("dtype", values.get("torch_dtype"))
    if dtype not in ("float32", "float16", "bfloat16"):
        findings.append(f"config.json names the dtype {dtype!r}; vLLM takes float32, float16 and bfloat16")
    if not findings:  # else transformers can't read the config either
        findings += _tokenizer(where)
    try:
        load_shapes(where)
    except InputError as error:
        findings.append(f"weights: {error}")
    return findings + _index(where)


def _tokenizer(where: Path) -> list[str]:
    try:
        found = load_tokenizer(where)
    except InputError as error:
        return [f"tokenizer: {error}"]
    return [] if found is not None else ["there are no tokenizer files; vLLM needs them, or --tokenizer"]


def _index(where: Path) -> list[str]:
    """An index whose total or whose files are wrong."""
    index = where / "model.safetensors.index.json"
    if not index.is_file():
        return []
    weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
    stray = sorted({path.name for path in where.glob("*.safetensors")} - set(weight_map.values()))
    return [f"{', '.join(stray)} is not in the index; vLLM would leave it out"] if stray else []
