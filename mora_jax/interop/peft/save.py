"""Adapters into PEFT folders, and MoRA into its authors' layout of them."""

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import numpy as np
from flax import nnx

from mora_jax.adapters.attach import AdapterEntry
from mora_jax.adapters.base import Adapter, host
from mora_jax.adapters.config import LoRAConfig
from mora_jax.adapters.config.patterns import targets_for
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.projection import Projection
from mora_jax.adapters.report import entries_of
from mora_jax.adapters.sites import Site, adapted_sites, by_path, sites
from mora_jax.adapters.slots import refuse_banks
from mora_jax.adapters.token_rows import TokenRows, trained_tokens
from mora_jax.adapters.trainable_base import named_modules
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import plain
from mora_jax.interop.atomic_folder import new_folder
from mora_jax.interop.peft.config import FORMATS, extra_fields
from mora_jax.interop.peft.format import CONFIG_NAME, PREFIX, WEIGHTS, Format, in_windows
from mora_jax.interop.peft.fused_experts import each, fused, parameter_names
from mora_jax.interop.peft.restarted_base import BASE_FOLDER, has_other_base
from mora_jax.interop.peft.stored import SHARED_PREFIX, TIED_BY_NAME, TOKENS, base_name, meaning
from mora_jax.interop.safetensors_io import write_tensors
from mora_jax.interop.save import beside_of, tensors_of, write_model
from mora_jax.interop.tensor_map import base_bias, base_names, loose_biases, trained_weights
from mora_jax.models.decoder import Decoder

EXPERTS = ("fused", "each")
LINEN_NAME = "linen_layers.json"
#: What a folder with an adapter holds.
ADAPTER_FILES = (CONFIG_NAME, f"{WEIGHTS}.safetensors*", f"{WEIGHTS}-*-of-*.safetensors", BASE_FOLDER, LINEN_NAME)


def save_adapter(
    model: nnx.Module,
    out: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
    write: bool = True,
    experts: str = "fused",
    linen_layers: dict[str, Any] | None = None,
) -> None:
    """Writes the adapters of a model as a PEFT folder.

    Tensors are gathered from the devices and written one after the other, so a model that was trained sharded never has
    its adapters in one memory twice. With adapters of ReLoRA and ReMoRA, whose base changes, the base goes with them
    (see `mora_jax.interop.peft.restarted_base`).

    Args:
        model: a model with adapters of one method. PiSSA and OLoRA become LoRA of twice the rank, BitFit a LoRA that
            is nothing but its own bias; AdaLoRA leaves out what it has pruned.
        out: the folder; one that holds something is refused without `overwrite`.
        base_model_name_or_path: what the folder names as its base; None for where the model was loaded from.
        overwrite: replace the adapter that is in `out`; files that belong to none stay there.
        write: False on all processes but one of those that hold parts of the adapters: all have to call this.
        experts: how LoRA on experts is held: "fused", all of a layer as one, which PEFT writes and reads with
            transformers 5; or "each", a pair of tensors an expert, which vLLM reads, and PEFT where all
            matrices of experts carry adapters. MoRA is "each".
        linen_layers: how the layers of a Linen model are matrices, for `mora_jax.linen.load_adapter`; others pass over
            the file.

    Raises:
        InputError: when the model has no adapter, adapters of several methods, or `out` cannot be used.

    Examples:
        >>> import os
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
        >>> mj.save_adapter(model, "adapter")
        >>> sorted(os.listdir("adapter"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    refuse_tied_magnitude(model)
    if experts not in EXPERTS:
        raise InputError(f"experts must be one of {', '.join(EXPERTS)}, not {experts!r}")
    form, adapted = _format(model)
    is_lora = all(hasattr(place.adapter, "lora_a") for place in adapted)
    layers = model.config.experts if isinstance(model, Decoder) else None
    if experts == "each" and is_lora and layers is not None and layers.fused:
        raise InputError(
            "experts='each': files of this family hold all experts of a layer as one, and PEFT passes over a tensor "
            "for each; save with experts='fused'"
        )
    is_fused = experts == "fused" and is_lora
    # Two passes over the model: names, sizes and scalings first, so that none of the arrays has to stay.
    shapes: dict[str, tuple[int, ...]] = {}
    main = []
    parameters = []
    for entry, tensors in fused(model) if is_fused else ():
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        parameters.append(dataclasses.replace(entry, params=form.kept(entry)))
    for entry, tensors in _gathered(model, form, is_fused):
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        odd = [name for name in tensors if meaning(name)[1] not in (entry.path, _head(model))]
        if odd:
            raise InputError(f"{entry.path} has a name that PEFT's files can't hold ({odd[0]}): rename that layer")
        if _is_main(entry, form):
            scaling, expected = entry.params["scaling"], np.float32(adapter_class(entry.config).scale(entry.config))
            any_positive = isinstance(entry.config, LoRAConfig)
            if not (scaling > 0 if any_positive else np.float32(scaling) == expected):
                raise InputError(
                    f"{entry.path} has scaling {float(scaling):g}, and files of {entry.method} hold none but "
                    f"{'positive ones' if any_positive else f'{expected:g}'}: scale its arrays instead, or merge"
                )
            main.append(dataclasses.replace(entry, params=form.kept(entry)))
    dense = [entry.path for entry in main if entry.path.endswith((".gate_proj", ".up_proj", ".down_proj"))]
    if parameters and dense and layers is not None and layers.fused is None:
        warnings.warn(
            f"PEFT takes the name of {dense[0]} for that of experts, and can't read adapters on both: this folder is "
            "for mora_jax alone",
            stacklevel=2,
        )
    shared = {SHARED_PREFIX + name: tensor for name, tensor in form.shared_of(adapted).items()}
    trained = {name: tensor.shape for name, tensor in _trained_whole(model)}
    for name in trained:
        if PREFIX + base_name(name) != name:
            raise InputError(f"{name} is trained, and PEFT's files can't hold that name: rename the module")
    base = base_model_name_or_path or getattr(model, "name_or_path", None)
    paths, everything = {entry.path for entry in main}, _all_paths(model)
    table, head = _tied_table(model), _head(model)
    trains_table = table in paths or f"{PREFIX}{table}.weight" in trained
    if table in paths and head is not None and not table.endswith(TIED_BY_NAME):
        paths, everything = paths | {head}, everything | {head}  # named too, or PEFT leaves it as it was
    targets = targets_for(paths, everything)
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": form.peft_type,
        "revision": None,
        "task_type": "CAUSAL_LM" if isinstance(model, Decoder) else None,
    } | form.written([*main, *parameters], targets)
    if parameters:  # for which PEFT has no dropout
        fields["target_parameters"] = parameter_names(model, [entry.path for entry in parameters])
        fields["lora_dropout"] = 0.0
    if form.fan_in_fan_out:
        fields["fan_in_fan_out"] = isinstance(model, Decoder) and model.config.names.turned
    whole_modules = {name.removeprefix(PREFIX).rpartition(".")[0] for name in _of_whole_modules(model, trained, main)}
    whole_modules.discard(head)  # with ensure_weight_tying PEFT adds it
    fields |= {"modules_to_save": _saved_modules(model, whole_modules)}
    if (tokens := trained_tokens(adapted_sites(model))) is not None:
        if "trainable_token_indices" not in form.known:
            raise InputError(f"PEFT trains rows of single tokens beside LoRA alone, not beside {form.peft_type}; merge")
        fields["trainable_token_indices"] = list(tokens)
    if table is not None and trains_table:
        fields["ensure_weight_tying"] = True
    if not write:
        base_tensors = tensors_of(model) if _has_own_base(model) else ()
        for _ in itertools.chain(_all_tensors(model, form, shared, is_fused), base_tensors):
            pass  # gathered for the process that writes
        return
    with new_folder(out, ours=ADAPTER_FILES, overwrite=overwrite) as folder:
        text = json.dumps(extra_fields(model) | fields, indent=2, sort_keys=True)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        if linen_layers is not None:
            (folder / LINEN_NAME).write_text(json.dumps(linen_layers, indent=2) + "\n", encoding="utf-8")
        shapes |= {name: tensor.shape for name, tensor in shared.items()} | trained
        dtypes = (value.dtype for place in adapted_sites(model) for value in place.adapter.params().values())
        dtype = np.result_type(np.float32, *dtypes)
        write_tensors(folder / f"{WEIGHTS}.safetensors", shapes, _all_tensors(model, form, shared, is_fused), dtype)
        if _has_own_base(model):
            write_model(model, folder / BASE_FOLDER)


def _all_paths(model: nnx.Module) -> set[str]:
    """Of all modules, among which PEFT looks for targets: those that hold others, too."""
    paths = {
        path for site in sites(model) for path in (site.paths if site.of_experts else (*site.paths, *site.aliases))
    }
    others = [names for names, module in named_modules(model) if not isinstance(module, Adapter | Projection)]
    paths |= {path for names in others for path in names if "*" not in path}
    if isinstance(model, Decoder):
        paths |= {name.rpartition(".")[0] for name, _, _ in beside_of(model)}
    return _with_owners(paths)


def _with_owners(paths: Iterable[str]) -> set[str]:
    """Module paths, and those of the modules around them."""
    return {".".join(parts[:end]) for parts in (path.split(".") for path in paths) for end in range(1, len(parts) + 1)}


def _tied(model: nnx.Module) -> TypeGuard[Decoder]:
    return isinstance(model, Decoder) and model.config.tie_embeddings


def _head(model: nnx.Module) -> str | None:
    """The path of a tied head, whose share of a table's adapter is written beside it."""
    return model.config.names.head if _tied(model) else None


def _tied_table(model: nnx.Module) -> str | None:
    """The path of the embedding that a tied head shares; positions have a table of their own."""
    return model.config.names.embedding if _tied(model) else None


def refuse_tied_magnitude(model: nnx.Module) -> None:
    """Raises `InputError` for DoRA on a table that is the output head, too: PEFT's is another function there."""
    for place in adapted_sites(model):
        if place.paths[0] == _tied_table(model) and hasattr(place.adapter, "magnitude"):
            raise InputError(
                f"{place.title} has DoRA's magnitude, and the model ties its head to that table: PEFT gives the head a "
                "magnitude of its own, so no folder can hold this adapter; leave the table out of targets, adapt it "
                "with LoRA, or merge the adapter"
            )


def _has_own_base(model: nnx.Module) -> TypeGuard[Decoder]:
    return isinstance(model, Decoder) and has_other_base(model)


def _all_tensors(
    model: nnx.Module, form: Format, shared: dict[str, np.ndarray], is_fused: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for _, tensors in itertools.chain(fused(model) if is_fused else (), _gathered(model, form, is_fused)):
        yield from tensors.items()
    yield from shared.items()
    yield from _trained_whole(model)


def _trained_whole(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """The base tensors that are trained whole; PEFT reads a tied table under the name of its head, too."""
    for name, tensor in trained_weights(model):
        yield PREFIX + name, tensor
        if _tied(model) and name == f"{_tied_table(model)}.weight":
            yield f"{PREFIX}{_head(model)}.weight", tensor


def _format(model: nnx.Module) -> tuple[Format, list[Site]]:
    """The one format of a model's adapters, and the places that it is for; biases beside them have none of their own.

    Raises:
        InputError: there is no adapter, or there are several methods.
    """
    adapted = adapted_sites(model)
    if not adapted:
        raise InputError("the model has no adapter to save: attach one, or save the model with save_pretrained")
    adapted = [place for place in adapted if not isinstance(place.adapter, TokenRows)]
    main = [place for place in adapted if not place.adapter.config.biases_alone] or adapted
    methods = sorted({place.adapter.file_method or place.adapter.method for place in main})
    if len(methods) == 1 and len(main) < len(adapted) and main[0].adapter.config.bias != "all":
        methods = ["bitfit", *methods]
    if len(methods) > 1:
        raise InputError(f"one folder holds one method, but the model has adapters of {', '.join(methods)}")
    form = next(form for form in FORMATS if methods[0] in form.methods)
    return form.for_model(main), main


def _is_main(entry: AdapterEntry, form: Format) -> bool:
    return entry.method != TokenRows.method and (form.biases_alone or not entry.config.biases_alone)


def _gathered(model: nnx.Module, form: Format, is_fused: bool) -> Iterator[tuple[AdapterEntry, dict[str, np.ndarray]]]:
    """Each adapted matrix with its tensors under their names in files; without experts where these are fused."""
    refuse_banks(model, "take")
    where = by_path(sites(model))
    others = (entry for place in adapted_sites(model) if not place.of_experts for entry in entries_of(place))
    for entry in itertools.chain(map(plain, others), () if is_fused else each(model)):
        path, main = PREFIX + entry.path, _is_main(entry, form)
        if entry.method == TokenRows.method:
            table = host(where[entry.path][0].kernel()[np.array(entry.config.tokens)]).astype(np.float32)
            yield entry, {f"{path}{TOKENS}trainable_tokens_delta": table + entry.params["token_delta"]}
            continue
        by_kind = form.write(entry) if main else {}
        if form.convolutions and "lora_a" in entry.params and entry.path in where:  # of single experts nothing is
            by_kind = in_windows(where[entry.path][0], by_kind)
        names = form.names(entry)
        tensors = {f"{path}.{names[kind]}": tensor for kind, tensor in by_kind.items()}
        if entry.path == _tied_table(model):
            head = f"{PREFIX}{_head(model)}"
            a, b = form.tensor_names["a"], form.tensor_names["b"]
            tensors |= {f"{head}.{a}": by_kind["b"].T, f"{head}.{b}": by_kind["a"].T}
        if "bias" in entry.params and "added" not in by_kind:
            inner = "base_layer.bias" if main else "bias"
            tensors[f"{path}.{inner}"] = base_bias(*where[entry.path]) + entry.params["bias"]
        yield entry, tensors


def _of_whole_modules(model: nnx.Module, names: Iterable[str], entries: list[AdapterEntry]) -> set[str]:
    """Without the biases that are trained beside adapters alone, of modules that `modules_to_save` doesn't name."""
    if all(getattr(entry.config, "bias", "none") != "all" for entry in entries):
        return set(names)
    loose = {PREFIX + name for name in loose_biases(model)}
    others = {name.rpartition(".")[0] for name in names if name not in loose}
    return {name for name in names if name.rpartition(".")[0] in others}


def _saved_modules(model: nnx.Module, saved: set[str]) -> list[str] | None:
    """The shortest names that PEFT takes for exactly these modules: it takes any module whose path ends so."""
    if not saved:
        return None
    possible = _with_owners(name.rpartition(".")[0] for name in base_names(model))
    short = set()
    for path in saved:
        last = path.rpartition(".")[2]
        short.add(last if {other for other in possible if other.endswith(last)} <= saved else path)
    return sorted(short)
