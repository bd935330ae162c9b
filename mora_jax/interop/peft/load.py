"""Adapters out of PEFT folders, and MoRA out of its authors' layout of them."""

import dataclasses
import functools
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import train_tokens, undone_on_error
from mora_jax.adapters.base import host
from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.sites import Site, by_path, sites
from mora_jax.adapters.token_rows import table_for_tokens
from mora_jax.errors import InputError, refused
from mora_jax.interop.adapter_values import AdapterValues, first, install, trained_as
from mora_jax.interop.hub import adapter_folder, local_folder
from mora_jax.interop.peft.config import AdapterFile, format_of, put_extra_fields, read_adapter_config
from mora_jax.interop.peft.format import CONFIG_NAME, WEIGHTS, Target, read_tensor
from mora_jax.interop.peft.fused_experts import unfused
from mora_jax.interop.peft.restarted_base import has_own_base, own_base, with_kind
from mora_jax.interop.peft.stored import TIED_BY_NAME, stored_tensors, unknown
from mora_jax.interop.safetensors_io import TensorFiles, open_checkpoint
from mora_jax.interop.tensor_map import base_bias, base_names, loose_biases, tensor_plan, train_weights
from mora_jax.models.decoder import Decoder
from mora_jax.models.init import read_json
from mora_jax.paths import found_path


def load_adapter(
    model: nnx.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    kind: str | None = None,
    method: MethodConfig | None = None,
) -> None:
    """Attaches the adapter in a PEFT folder to a model and fills it with the folder's values.

    Nothing is changed when the folder does not fit the model.

    Args:
        model: a model without adapters; changed in place.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`, a run directory, or a hub id.
        strict: refuse an adapter that names another base model, instead of warning.
        kind: the kind of a MoRA adapter, where its file has an older one (see `mora_jax.interop.peft.restarted_base`).
        method: how a LoRA is to be trained on, which files don't say: `LoRAPlusConfig()`, `LoRAFAConfig()`, or
            `PiSSAConfig()` or `OLoRAConfig()` for what these have written (see `adapter_values.trained_as`).

    Raises:
        InputError: when the folder is incomplete, does not fit, or means something that is not supported.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
        >>> mj.save_adapter(model, "adapter", overwrite=True)
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))  # the base again
        >>> mj.load_adapter(model, "adapter")
        >>> model.layers[0].adapter.lora_a.shape
        (6, 2)
    """
    folder = Path(adapter_folder(os.fspath(path)))
    values = with_kind(read_json(folder / CONFIG_NAME), kind, str(folder / CONFIG_NAME))
    config = read_adapter_config(values, str(folder / CONFIG_NAME))
    with undone_on_error(model):
        given = _Given(model, config, open_checkpoint(folder, WEIGHTS))
        given.check_base(strict)
        base = own_base(model, folder, given.files, kind_is_known=kind is not None or not values.get("use_mora"))
        given.drop_tied_head()
        adapters = given.adapters(method)
        given.add_biases(adapters)
        given.check_frozen()
        weights, rows = given.trained_whole(), given.token_rows()
        if base is not None:
            assert isinstance(model, Decoder), "checked with its tensors"
            base.put(model)
        train_weights(model, weights)
        install(model, adapters)
        if rows is not None:
            given.put_token_rows(rows)
    put_extra_fields(model, given.config.unknown)


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the tensors in a PEFT folder: by module path, then by the keys of `Format.tensor_names`.

    Raises:
        InputError: the folder is incomplete, or a name is none of PEFT's.
    """
    files = open_checkpoint(local_folder(path), WEIGHTS)
    return {
        module: {kind: files.shapes[name] for kind, name in names.items()}
        for module, names in stored_tensors(files).factors.items()
    }


def whole_modules(path: str | os.PathLike[str]) -> list[str]:
    """The names of the modules that the adapter in a PEFT folder trains whole."""
    return read_json(local_folder(path) / CONFIG_NAME).get("modules_to_save") or []


def needs_base(path: str | os.PathLike[str]) -> bool:
    """Whether an adapter, or the change that it makes, is only known beside the values of its base.

    So it is with magnitudes, gains, biases, modules that are trained whole, factors that start from the
    base, and adapters that come with a base.
    """
    folder = local_folder(path)
    values = read_json(folder / CONFIG_NAME)
    return has_own_base(folder) or format_of(values, str(folder / CONFIG_NAME)).needs_base(values)


def model_names(path: str) -> set[str]:
    """What a model is called: by the path as it is given, and by the folder that a link leads to."""
    return {Path(path).name, Path(found_path(path)).resolve().name}


class _Given:
    """An adapter's folder beside the model that it is for.

    Attributes:
        model: without adapters.
        config: what `adapter_config.json` says.
        files: the tensors.
        stored: their names, sorted by what they say.
        places: every matrix of the model that could carry an adapter, by module path, with the number of its layer.
        targets: those of them that the configuration names.
        loose: names of the biases that `bias="all"` trains on modules that can't carry adapters.
    """

    def __init__(self, model: nnx.Module, config: AdapterFile, files: TensorFiles):
        if any(place.adapter is not None for place in sites(model)):
            raise InputError("the model carries an adapter already: merge it, or load the base model again")
        files, experts = unfused(model, files, config.values.get("target_parameters") or (), config.where)
        is_decoder = isinstance(model, Decoder)
        self.model, self.files, self.stored = model, files, stored_tensors(files)
        self.config = dataclasses.replace(config, whole_components=not is_decoder, experts=experts)
        known = set() if is_decoder else set(base_names(model))
        if stray := [stored for name, stored in self.stored.others.items() if name not in known]:
            raise unknown(files, stray[0])
        with refused():
            self.places = by_path(sites(model))
        everything = str(config.values.get("target_modules")).lower() == "all-linear"
        self.targets = {
            path: (place, layer)
            for path, (place, layer) in self.places.items()
            if self.config.matches(path) and not (everything and not place.is_linear)
        }
        self.loose = loose_biases(model) if self.config.bias == "all" else set()

    def check_base(self, strict: bool) -> None:
        """Warns of another base than the one that the folder names, or refuses it."""
        wanted, have = self.config.values.get("base_model_name_or_path"), getattr(self.model, "name_or_path", None)
        if not wanted or not have or model_names(wanted) & model_names(have):
            return
        message = f"{self.config.where}: the adapter was made for {wanted}, the model is {have}"
        if strict:
            raise InputError(f"{message}; give that model, or load without strict")
        warnings.warn(message, stacklevel=4)

    def drop_tied_head(self) -> None:
        """With a tied head PEFT trains the table alone, or stores the head's share of it too; here they are one."""
        if not isinstance(self.model, Decoder) or not self.model.config.tie_embeddings:
            return
        stored, read, where = self.stored, self.files.read, self.config.where
        table, head = self.model.config.names.embedding, self.model.config.names.head
        trained = {*stored.factors, *stored.weights}
        if table not in trained and head in trained:
            raise InputError(
                f"{where}: it trains {head} alone, which the model ties to {table}: in PEFT they part then, which is "
                "not supported; merge the adapter in PEFT"
            )
        if table not in trained:
            return
        known = table.endswith(TIED_BY_NAME) or head in trained
        if not self.config.values.get("ensure_weight_tying") or not known:
            why = f"without {'ensure_weight_tying' if known else head}"
            raise InputError(
                f"{where}: it trains {table}, to which the model ties its head; {why} PEFT leaves the head as it was, "
                "which is not supported"
            )
        factors, given = stored.factors.pop(head, {}), stored.factors.get(table, {})
        if "magnitude" in given:
            raise InputError(
                f"{where}: it trains {table} with DoRA, and the model ties its head to that: PEFT gives the head a "
                "magnitude of its own, which is not supported; merge the adapter in PEFT"
            )
        pairs = [(factors[one], given[other]) for one, other in (("a", "b"), ("b", "a")) if one in factors]
        same = all(np.array_equal(read(one), read(other).T) for one, other in pairs)
        head_weight = stored.weights.pop(head, None)
        if head_weight is not None and table in stored.weights:
            same = same and np.array_equal(read(head_weight), read(stored.weights[table]))
        if not same:
            raise InputError(
                f"{self.files.folder}: the tensors of {head} are not those of {table}, to which the model ties it"
            )
        stored.frozen.pop(head, None)

    def adapters(self, method: MethodConfig | None) -> dict[str, AdapterValues]:
        """The adapters of all targets, to be trained as `method` says."""
        self._check_factors()
        form, values = self.config.format, self.config.values
        shared = form.shared(values, self.stored.shared, self.files, [place for place, _ in self.targets.values()])
        kernels: dict[int, np.ndarray] = {}

        def kernel(place: Site, layer: int) -> np.ndarray:
            if id(place) not in kernels:  # paths of one place follow each other
                kernels.clear()
                kernels[id(place)] = host(place.kernel())
            return kernels[id(place)][place.index(layer)]

        adapters = {}
        for path, (place, layer) in self.targets.items():
            setting_path = self.config.experts.get(path, path)
            names = self.stored.factors[path]
            adapters[path] = form.read(values, Target(path, place, names, self.files, shared, setting_path))
            if method is not None:
                adapters[path] = trained_as(adapters[path], method, functools.partial(kernel, place, layer), path)
        return adapters

    def _check_factors(self) -> None:
        """Every factor belongs to a target, and every target has its factors."""
        factors, form, where = self.stored.factors, self.config.format, self.config.where
        if not self.targets:
            raise InputError(f"{where}: target_modules {self.config.values.get('target_modules')!r} match no layer")
        extra = [path for path in factors if path not in self.targets]
        if extra:
            raise InputError(
                f"{where}: the tensors of {len(extra)} modules belong to no target that the model has: {first(extra)}"
            )
        needed, allowed = form.tensors(self.config.values)
        missing, unwanted = [], []
        for path in self.targets:
            have = set(factors.get(path, ()))
            if lacking := sorted(form.tensor_names[kind].removesuffix(".weight") for kind in needed - have):
                missing.append(f"{path} ({', '.join(lacking)})")
            unwanted += [factors[path][kind] for kind in sorted(have - allowed)]
        if missing:
            raise InputError(f"{where}: {len(missing)} targets lack tensors: {first(missing)}")
        if unwanted:
            raise InputError(f"{where}: by its config the adapter has no {first(unwanted)}")

    def add_biases(self, adapters: dict[str, AdapterValues]) -> None:
        """Adds the change of every stored bias; adapters hold changes, files hold biases."""
        which = self.config.bias
        for path, name in self.stored.biases.items():
            if self.config.saves(path) or f"{path}.bias" in self.loose:
                continue
            wanted = which == "all" or (which == "lora_only" and path in adapters)
            place, layer = self.places.get(path, (None, 0))
            if not wanted or place is None or not place.has_bias:
                why = f"bias is {which!r}" if not wanted else "the model has no such bias"
                raise InputError(f"{self.files.folder}: tensor {name} belongs to nothing: {why}")
            change = read_tensor(self.files, name, (place.out_features,)) - base_bias(place, layer)
            before = adapters.get(path, AdapterValues(None, {}))
            adapters[path] = before._replace(values=dict(before.values) | {"bias": change})
        if which == "none":
            return
        expected = [
            path
            for path, (place, _) in self.places.items()
            if place.has_bias and not place.is_embedding and (which == "all" or path in adapters)
        ]
        expected += [name.removesuffix(".bias") for name in self.loose]
        missing = [path for path in expected if path not in self.stored.biases]
        if missing:
            raise InputError(
                f"{self.config.where}: bias is {which!r}, but the biases of {len(missing)} modules are missing"
            )

    def check_frozen(self) -> None:
        """PEFT puts the table itself beside an adapter on embeddings; another table than ours is another base."""
        for path, name in self.stored.frozen.items():
            if path not in self.targets:
                raise InputError(f"{self.files.folder}: tensor {name} belongs to no target that the model has")
            place = self.targets[path][0]
            kernel = place.kernel()
            shape = tuple(kernel.shape) if place.is_embedding else kernel.shape[::-1]
            table = read_tensor(self.files, name, shape)
            table = table if place.is_embedding else table.T
            known = isinstance(kernel, jax.Array)
            if known and not np.allclose(np.asarray(kernel, np.float32), table, rtol=1e-2, atol=1e-3):
                raise InputError(
                    f"{self.files.folder}: tensor {name} is not the base model's: the base was trained too"
                )

    def token_rows(self) -> dict[str, np.ndarray] | None:
        """By the table's path, the rows that are trained; None where there are none."""
        tokens, where = self.config.values.get("trainable_token_indices"), self.config.where
        if bool(tokens) != bool(self.stored.tokens):
            raise InputError(f"{where}: trainable_token_indices is {tokens}, and the tensors say otherwise")
        if not tokens:
            return None
        with refused(where):
            table = table_for_tokens(list(dict.fromkeys(place for place, _ in self.places.values())), tuple(tokens))
        if [*self.stored.tokens] != [table.paths[0]]:
            raise InputError(f"{self.files.folder}: the rows of tokens are those of {first([*self.stored.tokens])}")
        name = self.stored.tokens[table.paths[0]]
        return {table.paths[0]: read_tensor(self.files, name, (len(tokens), table.out_features))}

    def put_token_rows(self, rows: dict[str, np.ndarray]) -> None:
        """Trains rows of a table, from the values of a file."""
        tokens = tuple(self.config.values["trainable_token_indices"])
        with refused():
            adapter = train_tokens(list(sites(self.model)), tokens, nnx.Rngs(0))
        for path, values in rows.items():
            table = host(self.places[path][0].kernel()[np.array(tokens)]).astype(np.float32)
            adapter.token_delta.set_value(jnp.asarray(values - table))

    def trained_whole(self) -> dict[str, np.ndarray]:
        """The tensors of base parameters that are trained themselves, by name in base checkpoints."""
        saved, where = self.config.values.get("modules_to_save"), self.config.where
        given = {f"{path}.weight": name for path, name in self.stored.weights.items()} | self.stored.others
        for path, name in self.stored.biases.items():
            if self.config.saves(path) or f"{path}.bias" in self.loose:
                given[f"{path}.bias"] = name
        wanted = {name for name in base_names(self.model) if self.config.saves(name.rpartition(".")[0])}
        extra = [stored for name, stored in given.items() if name not in wanted | self.loose]
        if extra:
            why = f"modules_to_save is {saved}" if saved else "modules_to_save is not set"
            raise InputError(f"{self.files.folder}: {len(extra)} tensors belong to nothing ({why}): {first(extra)}")
        missing = sorted(wanted - set(given))
        if missing or (saved and not wanted & set(given)):
            raise InputError(f"{where}: modules_to_save is {saved}, but there is no tensor {first(missing)}".rstrip())
        values: dict[str, np.ndarray] = {}
        for entry in tensor_plan(self.model):
            pieces = [piece for piece in entry.pieces if piece.name in given]
            if pieces and len(pieces) < len(entry.pieces):
                raise InputError(
                    f"{where}: modules_to_save {saved} names {pieces[0].name}, which is stored together with others "
                    "that are not named"
                )
            values |= {piece.name: read_tensor(self.files, given[piece.name], piece.shape) for piece in pieces}
        return values
