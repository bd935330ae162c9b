"""What other programs do with an adapter or a model folder, by their own rules of a stated version, without them.

An adapter whose tensors are passed over in silence looks loaded. So each engine's loader is described here as data: the
types it takes, the names of tensors and modules that it knows, the fields that it reads. The rules of PEFT and
transformers are those that their loaders follow on random adapters (see the tests of this file, which run them).
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax.adapters.report import count
from mora_jax.adapters.sites import by_path, sites
from mora_jax.errors import InputError
from mora_jax.interop.hub import load_tokenizer
from mora_jax.interop.load import load_shapes
from mora_jax.interop.peft.config import FORMATS, AdapterFile, check_common, format_of
from mora_jax.interop.peft.format import CONFIG_NAME, PREFIX, WEIGHTS
from mora_jax.interop.peft.fused_experts import unfused
from mora_jax.interop.peft.load import model_names
from mora_jax.interop.peft.lora import rank_at, scaling_at
from mora_jax.interop.peft.stored import meaning
from mora_jax.interop.safetensors_io import open_checkpoint
from mora_jax.models.decoder import Decoder
from mora_jax.models.init import read_json
from mora_jax.paths import local_path

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
_LORA_KEY = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.(?P<factor>lora_[AB]\.weight|lora_embedding_[AB])")
_BASE_EMBEDDING = re.compile(r".*\.(embed_tokens|lm_head)\.base_layer\.weight")


@dataclass(frozen=True)
class Engine:
    """What a program's loader does.

    Attributes:
        title: its name.
        version: whose rules these are.
        source: the file of its sources, or its function, that they were taken from.
        lora_only: whether it takes nothing but plain LoRA, tensor by tensor.
        modules: the ends of module paths that it adapts; empty for any.
        patterns: whether it reads `rank_pattern` and `alpha_pattern`.
        rslora: whether it scales by the root of the rank where `use_rslora` says so.
        highest_rank: that it can be set to; 0 for any.
        bare_names: whether it takes tensors without `base_model.model.` in front.
        adapter_names: whether it takes tensors with the adapter's name (`lora_A.default.weight`).
        types: of PEFT that it refuses.
        dropped: ends of tensors' names that it passes over.
    """

    title: str
    version: str
    source: str
    lora_only: bool = True
    modules: tuple[str, ...] = ()
    patterns: bool = False
    rslora: bool = True
    highest_rank: int = 0
    bare_names: bool = True
    adapter_names: bool = False
    types: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


# Fields that engines for plain LoRA refuse, or pass over so that the adapter would be another.
_REFUSED = (
    "use_dora",
    "modules_to_save",
    *("layer_replication", "lora_bias", "target_parameters", "trainable_token_indices", "use_bdlora"),
)
ENGINES = {
    "peft": Engine(
        "PEFT",
        "0.21",
        "peft/utils/save_and_load.py",
        lora_only=False,
        patterns=True,
        bare_names=False,
        adapter_names=True,
    ),
    "transformers": Engine(
        "transformers",
        "5.24",
        "PeftAdapterMixin.load_adapter",
        lora_only=False,
        patterns=True,
        types=("VERA",),
        dropped=("lora_magnitude_vector",),
    ),
    "vllm": Engine(
        "vLLM",
        "0.33",
        "vllm/lora/peft_helper.py, lora_model.py",
        modules=_LLAMA,
        patterns=True,
        highest_rank=512,
    ),
    "sglang": Engine(
        "SGLang",
        "0.5.23",
        "sglang/srt/lora/lora_config.py, utils.py",
        modules=_LLAMA,
        rslora=False,
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        "of 2026",
        "convert_lora_to_gguf.py",
        rslora=False,
    ),
}


@dataclass(frozen=True)
class Finding:
    """Something that an engine would not do as the adapter means it.

    Attributes:
        effect: "dropped" (passed over in silence), "refused", or "misread" (loaded, and means something else).
        words: what and why.
        tensors: of the file, where it concerns some.
    """

    effect: str
    words: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.effect}: {self.words}"


@dataclass(frozen=True)
class Check:
    """What an engine would do with a folder.

    Attributes:
        engine: whose rules were applied.
        kind: the adapter's `peft_type`, or "model".
        tensors: names in the file.
        findings: what it would drop, refuse or misread.
        trained: numbers in the file.
        share: of them in all parameters of the model; None where no model was given.
        base: the model that the folder names, or None.
        same_base: whether the model that was given is called so; None where that can't be said.
        not_finite: tensors with values that are no finite numbers.
        zeros: tensors that are zero.
    """

    engine: Engine
    kind: str
    tensors: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    trained: int = 0
    share: float | None = None
    base: str | None = None
    same_base: bool | None = None
    not_finite: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()

    @property
    def used(self) -> tuple[str, ...]:
        """The tensors that the engine uses; none where it refuses the adapter."""
        if any(finding.effect == "refused" for finding in self.findings):
            return ()
        lost = {name for finding in self.findings if finding.effect == "dropped" for name in finding.tensors}
        return tuple(name for name in self.tensors if name not in lost)

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings and not self.not_finite

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        engine, kind, names = values.pop("engine"), values.pop("kind"), values.pop("tensors")
        rules = {"engine": engine["title"], "version": engine["version"], "source": engine["source"]}
        return {**rules, "type": kind, "tensors": len(names), "used": list(self.used), **values}

    def __str__(self) -> str:
        share = "" if self.share is None else f", {100 * self.share:.3g} % of the model"
        lines = [f"{self.kind}: {len(self.tensors)} tensors, {self.trained:,} numbers{share}"] if self.tensors else []
        if self.base is not None:
            same = {True: ", which is the one given", False: ", which is not the one given", None: ""}[self.same_base]
            lines.append(f"base: {self.base}{same}")
        if self.zeros:
            lines.append(f"{len(self.zeros)} tensors are zero, such as {self.zeros[0]}")
        lines += [f"{name} has values that are no finite numbers" for name in self.not_finite]
        alike: dict[str, list[Finding]] = {}  # the same in many layers is one line
        for finding in self.findings:
            alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", str(finding)), []).append(finding)
        lines += [f"{first}{f' (and {len(more)} like it)' if more else ''}" for first, *more in alike.values()]
        engine = f"{self.engine.title} {self.engine.version} ({self.engine.source})"
        uses = f"uses {len(self.used)} of {len(self.tensors)} tensors" if self.kind != "model" else "takes the model"
        taken = self.good or self.kind != "model"
        lines.append(f"{engine} {uses}" if taken else f"{engine} does not take the model as it is")
        return "\n".join(lines)


def check_folder(folder: str | os.PathLike[str], engine: str = "vllm", *, model: str | None = None) -> Check:
    """Checks an adapter folder, or a model folder, for what an engine would drop, refuse or misread.

    Args:
        folder: with `adapter_config.json`, or with `config.json` (for vLLM and transformers).
        engine: one of `ENGINES`.
        model: the base model's folder or hub id, with which modules, shapes and the share of trained numbers are
            checked, too.

    Raises:
        InputError: the folder is neither, can't be read, or the engine is unknown.
    """
    if engine not in ENGINES:
        raise InputError(f"no engine {engine!r} is known; choose one of {', '.join(ENGINES)}")
    where, rules = local_path(folder), ENGINES[engine]
    if (where / CONFIG_NAME).is_file():
        return _check_adapter(where, rules, None if model is None else load_shapes(model))
    if (where / "config.json").is_file():
        if engine not in ("vllm", "transformers"):
            raise InputError(f"{where} is a whole model, which is checked for vllm and transformers alone")
        return Check(rules, "model", findings=tuple(Finding("refused", text) for text in _model(where, rules)))
    raise InputError(f"{where} holds neither adapter_config.json nor config.json")


def _check_adapter(where: Path, engine: Engine, model: Decoder | None) -> Check:
    values = read_json(where / CONFIG_NAME)
    kind = str(values.get("peft_type", "LORA"))
    files = open_checkpoint(where, WEIGHTS)
    check_common(values, str(where / CONFIG_NAME))
    for form in (form for form in FORMATS if form.peft_type == kind):  # a null is said below, by engine
        form.check_values({k: v for k, v in values.items() if v is not None}, str(where / CONFIG_NAME))
    findings = [*_fields(values, kind, engine)]
    # A MoRA is refused as a whole, and its matrices are no factors.
    is_mora = bool(values.get("use_mora") or values.get("mora_jax_kind"))
    if engine.lora_only and not is_mora:
        findings += _lora_tensors(values, files.shapes, engine)
    elif not engine.lora_only and kind not in engine.types:
        findings += _peft_tensors(values, files.shapes, engine, str(where / CONFIG_NAME))
    if model is not None and not is_mora:
        findings += _against(model, unfused(model, files, values.get("target_parameters") or (), str(where))[0].shapes)
    odd, zeros = [], []
    for name in files.shapes:
        array = files.read(name).astype(np.float32)
        if not np.isfinite(array).all():
            odd.append(name)
        elif not array.any():
            zeros.append(name)
    trained = sum(math.prod(shape) for shape in files.shapes.values())
    base, given = values.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    same = bool(model_names(base) & model_names(given)) if base and given else None
    share = None if model is None else trained / (trained + count(model))
    return Check(engine, kind, (*files.shapes,), (*findings,), trained, share, base, same, (*odd,), (*zeros,))


def _fields(values: dict[str, Any], kind: str, engine: Engine) -> Iterator[Finding]:
    """What the config says that the engine has no place for."""
    name = engine.title
    if values.get("use_mora") or values.get("mora_jax_kind"):
        yield Finding("refused", f"it is a MoRA, which {name} does not have; use mora-jax convert --to lora, or merge")
    if kind in engine.types or (engine.lora_only and kind != "LORA"):
        yield Finding("refused", f"peft_type is {kind}, which {name} does not load; merge instead")
    for one in _REFUSED if engine.lora_only else ():
        if values.get(one):
            said = f"{one} is {values[one]}" if one == "modules_to_save" else f"{one} is set"
            yield Finding("refused", f"{said}, which {name} does not take; merge instead")
    if engine.lora_only and values.get("bias", "none") != "none":
        yield Finding("refused", f"bias is {values['bias']!r}; {name} takes 'none', so merge instead")
    if engine.lora_only and kind == "LORA":
        absent = [one for one in ("r", "lora_alpha", "target_modules") if values.get(one) is None]
        if absent:
            yield Finding("refused", f"adapter_config.json lacks {', '.join(absent)}, which {name} requires")
        rank = values.get("r")
        ranks = [one for one in (rank, *(values.get("rank_pattern") or {}).values()) if isinstance(one, int)]
        if engine.highest_rank and ranks and not 1 <= min(ranks) <= max(ranks) <= engine.highest_rank:
            most = f"{name}'s max_lora_rank goes up to {engine.highest_rank}"
            yield Finding("refused", f"r is {max(ranks)}; {most}: convert with a smaller rank")
        if values.get("use_rslora") and not engine.rslora and rank != 1:
            yield Finding("misread", f"use_rslora is set, and {name} scales by lora_alpha / r all the same")
    targets = values.get("target_modules")
    if engine.title == "SGLang" and isinstance(targets, str) and targets != "all-linear":
        yield Finding("refused", f"target_modules is a regular expression, and {name} takes a list, or all-linear")


def _lora_tensors(values: dict[str, Any], shapes: dict[str, tuple[int, ...]], engine: Engine) -> Iterator[Finding]:
    """What an engine that takes plain LoRA alone does with the tensors."""
    factors: dict[str, dict[str, str]] = {}
    for name in shapes:
        match = _LORA_KEY.fullmatch(name)
        if match is not None:
            factors.setdefault(match["module"], {})["a" if "_A" in match["factor"] else "b"] = name
        elif not _BASE_EMBEDDING.fullmatch(name):
            reason = f"tensor {name} is no LoRA weight by its name, which {engine.title} refuses"
            yield Finding("refused", reason, (name,))
    if not factors:
        yield Finding("refused", "there is no LoRA weight")
        return
    rank, alpha = values.get("r") or 8, values.get("lora_alpha") or 8
    scaling = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    for module, names in factors.items():
        given = tuple(names.values())
        if engine.modules and module.rpartition(".")[2] not in engine.modules:
            known = ", ".join(engine.modules)
            yield Finding("refused", f"{module} is none of the modules that {engine.title} adapts: {known}", given)
        if len(names) < 2:
            alone = f"{module} has lora_{'A' if 'a' in names else 'B'} alone; {engine.title} needs both factors"
            yield Finding("refused", alone, given)
            continue
        a, b = shapes[names["a"]], shapes[names["b"]]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            reason = f"{module} has factors {list(a)} and {list(b)}; {engine.title} takes [rank, in] and [out, rank]"
            yield Finding("refused", reason, given)
            continue
        stated = rank_at(values, module)
        if a[0] != stated:
            yield Finding("refused", f"{module} has rank {a[0]}, and adapter_config.json says {stated}", given)
        elif a[0] > rank and not engine.patterns and engine.title != "llama.cpp":
            reason = f"{module} has rank {a[0]} above r {rank}; {engine.title} reads r alone, so r must be the largest"
            yield Finding("refused", reason, given)
        # llama.cpp divides the one alpha by the rank that the tensors have, the others by r.
        wanted = scaling_at(values, module)
        reads = wanted if engine.patterns else scaling if engine.title != "llama.cpp" else alpha / a[0]
        told = values.get("use_rslora") and not engine.rslora  # by the field
        if abs(wanted - reads) > 1e-6 * max(abs(wanted), abs(reads)) and not told:
            reason = f"{module} is scaled by {wanted:.6g}, but {engine.title} reads no patterns and would scale by"
            mend = "mora-jax convert --rank R gives all matrices one rank"
            yield Finding("misread", f"{reason} {reads:.6g}: {mend}", given)


def _peft_tensors(
    values: dict[str, Any], shapes: dict[str, tuple[int, ...]], engine: Engine, where: str
) -> Iterator[Finding]:
    """What PEFT's loaders do with the tensors: names that no module has are passed over in silence."""
    form = format_of(values, where)
    config = AdapterFile(form, values, where)
    factors: dict[str, dict[str, str]] = {}
    others = ("weights", "biases") if config.bias == "none" else ("weights",)
    for name in shapes:
        group, path, kind = meaning(name)
        if not name.startswith(PREFIX) and not name.startswith("base_model.") and not engine.bare_names:
            yield Finding("dropped", f"tensor {name} lacks {PREFIX} in front", (name,))
        elif (
            group == "factors"
            and re.search(r"\.(lora_[AB])\.(?!weight|bias)[^.]+\.weight$", name)
            and not engine.adapter_names
        ):
            yield Finding("dropped", f"tensor {name} has an adapter's name in it", (name,))
        elif any(end in name for end in engine.dropped):
            yield Finding("dropped", f"tensor {name}: {engine.title} looks for it under another name", (name,))
        elif group == "factors" and not config.matches(path) and not _of_parameters(values, path):
            yield Finding("dropped", f"tensor {name}: target_modules does not name {path}", (name,))
        elif group in others and not config.saves(path) and kind != "added":
            yield Finding("misread", f"tensor {name} takes the place of the base's own", (name,))
        elif group == "factors":
            factors.setdefault(path, {})[kind] = name
    for module, matrices in _expert_matrices(factors).items():
        if engine.title == "PEFT" and len(matrices) < 3:
            reason = f"{module} carries adapters on {', '.join(sorted(matrices))} alone; {engine.title} wants all three"
            yield Finding("refused", f"{reason} matrices of its experts, or target_parameters")
    if not factors and values.get("target_modules") != []:
        yield Finding("misread", f"there are no factors, and {engine.title} leaves all at a fresh adapter's values")
    needed = form.tensors(values)[0] - {"magnitude" for end in engine.dropped if "magnitude" in end}
    for path, names in factors.items():
        if missing := sorted(form.tensor_names[kind] for kind in needed - set(names)):
            reason = f"{path} lacks {', '.join(missing)}, which {engine.title} leaves at a fresh adapter's values"
            yield Finding("misread", reason, tuple(names.values()))
        stated = rank_at(values, path)
        plain = form.peft_type == "LORA" and "a" in names and ".experts" not in path and "use_mora" not in values
        if plain and shapes[names["a"]][0] != stated:
            reason = f"{path} has rank {shapes[names['a']][0]}, and adapter_config.json says {stated}"
            yield Finding("refused", reason, tuple(names.values()))


def _expert_matrices(factors: dict[str, dict[str, str]]) -> dict[str, set[str]]:
    """Of adapters that lie in a tensor an expert: the matrices that have one, by the path of their experts."""
    matrices: dict[str, set[str]] = {}
    for path in factors:
        match = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)", path)
        if match is not None:
            matrices.setdefault(match[1], set()).add(match[2])
    return matrices


def _of_parameters(values: dict[str, Any], path: str) -> bool:
    """Whether a path is that of adapters on parameters of a module, which lie in each other's `base_layer`."""
    modules = [name.rpartition(".")[0] for name in values.get("target_parameters") or ()]
    return any(f".{path.removesuffix('.base_layer')}".endswith(f".{module}" if module else "") for module in modules)


def _against(model: Decoder, shapes: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Tensors of modules that the model does not have, or has in another size."""
    places = by_path(sites(model))
    head = model.config.names.head
    for name, shape in shapes.items():
        group, path, kind = meaning(name)
        if group != "factors" or (path == head and head not in places):
            continue
        if path not in places:
            yield Finding("dropped", f"tensor {name}: the model has no {path}", (name,))
            continue
        place = places[path][0]
        axis, size = {"a": (-1, place.in_features), "b": (0, place.out_features)}.get(kind, (0, 0))
        if size and ".lora_" in name and len(shape) == 2 and shape[axis] != size:
            reason = f"tensor {name} is {list(shape)}, and the model's {path} has {size} there"
            yield Finding("refused", reason, (name,))


def _model(where: Path, engine: Engine) -> Iterator[str]:
    """What is missing in the folder of a whole model."""
    values, title = read_json(where / "config.json"), engine.title
    absent = [name for name in ("architectures", "model_type") if not values.get(name)]
    yield from (f"config.json has no {name}, from which {title} picks the model" for name in absent)
    dtype = values.get("dtype", values.get("torch_dtype"))
    known = dtype in ("float32", "float16", "bfloat16")
    if not known:
        yield f"config.json names the dtype {dtype!r}; {title} takes float32, float16 and bfloat16"
    if known and not absent:  # else transformers can't read the config either
        try:
            if load_tokenizer(where) is None:
                yield f"there are no tokenizer files; {title} needs them"
        except InputError as error:
            yield f"tokenizer: {error}"
    try:
        load_shapes(where)
    except InputError as error:
        yield f"weights: {error}"
    index = where / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        if stray := sorted({path.name for path in where.glob("*.safetensors")} - set(weight_map.values())):
            yield f"{', '.join(stray)} is not in the index; {title} would leave it out"
