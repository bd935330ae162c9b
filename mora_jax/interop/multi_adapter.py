"""Named adapters on one base: load, switch, mix in one batch, combine, save, merge."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from mora_jax.adapters.attach import detach, undone_on_error
from mora_jax.adapters.bank import Bank, LoRABank, MoRABank
from mora_jax.adapters.config import LoRAConfig, MoRAConfig
from mora_jax.adapters.merge import Merged, merge
from mora_jax.adapters.products.matmul import wide
from mora_jax.adapters.projection import OutputHead
from mora_jax.adapters.sites import Site, adapted_sites, sites
from mora_jax.adapters.slots import NO_SLOT, use
from mora_jax.errors import InputError, refused
from mora_jax.interop.adapter_values import AdapterValues, ValuesByPath, first, install, put_padded
from mora_jax.interop.convert.combine import combine
from mora_jax.interop.convert.convert import Conversion
from mora_jax.interop.peft.config import put_extra_fields
from mora_jax.interop.peft.save import save_adapter
from mora_jax.interop.read_adapter import bare, read_adapter, same_form, values_of
from mora_jax.paths import local_path


class _Named(NamedTuple):
    """The slot of an adapter, its configuration by module path, and further fields of its folder."""

    slot: int
    configs: Mapping[str, Any]
    extra: Mapping[str, Any]


class NamedAdapters:
    """Adapters under names on one model, all LoRA or all MoRA of one kind.

    The adapters lie in slots of arrays on the model (see `mora_jax.adapters.bank`). Adding, deleting, combining and
    switching change these arrays alone, so nothing is compiled again; only an adapter that the slots have no room for
    (a further slot, a higher rank, another module) makes larger arrays, and the next call compiles.

    Args:
        model: a model without adapters, changed in place: this library's decoder, or any `nnx.Module` for which
            `attach` works.
        slots: adapters that there is room for at first.
        rank: LoRA rank that there is room for at first; None for the first adapter's.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> def tuned(seed):
        ...     model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        ...     _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(seed))
        ...     model.adapter.lora_b[...] = model.adapter.lora_b[...] + seed
        ...     return model
        >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        >>> named = mj.NamedAdapters(model)
        >>> named.add("one", tuned(1))
        >>> named.add("two", tuned(2))
        >>> named.names, named.active
        (('one', 'two'), 'one')
        >>> named.set_active(["two", None])  # by row
        >>> x = jnp.ones((2, 4))
        >>> bool(jnp.allclose(model(x), jnp.stack([tuned(2)(x)[0], nnx.Linear(4, 4, rngs=nnx.Rngs(0))(x)[1]])))
        True
    """

    def __init__(self, model: nnx.Module, *, slots: int = 4, rank: int | None = None):
        if slots < 1 or (rank is not None and rank < 1):
            raise ValueError(f"slots and rank must be positive integers, not {slots} and {rank}")
        if adapted_sites(model):
            raise InputError("the model carries an adapter already: detach it and add it under a name")
        self.model = model
        self._slots = slots
        self._rank = rank or 1
        self._named: dict[str, _Named] = {}
        self._active: str | None | tuple[str | None, ...] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they were added."""
        return tuple(self._named)

    @property
    def active(self) -> str | None | tuple[str | None, ...]:
        """What a call without ids uses: one adapter, the base alone (None), or one of these for each row."""
        return self._active

    def load(self, path: str | os.PathLike[str], name: str | None = None, *, strict: bool = False) -> str:
        """Adds the adapter of a PEFT folder.

        Args:
            path: the folder, or a hub id, as for `load_adapter`.
            name: what it is called from now on; None for the last component of the path.
            strict: refuse an adapter that names another base model, instead of warning.

        Returns:
            The name.

        Raises:
            InputError: as `load_adapter` and `add`.
        """
        name = name if name is not None else local_path(path).name
        self._check_new(name)
        by_path, extra = read_adapter(self.model, path, strict=strict)
        self._put(name, by_path, extra)
        return name

    def add(self, name: str, source: nnx.Module) -> None:
        """Adds a copy of the adapter on `source`, a model with the same module paths.

        The first adapter of a collection becomes the active one.

        Args:
            name: what it is called from now on.
            source: a model to which `attach` or `load_adapter` was applied; it isn't changed.

        Raises:
            InputError: the name is taken; the adapter is of another method than those here, does not fit the model, or
                does more than add to matrices of linear layers.
        """
        self._check_new(name)
        self._put(name, values_of(source), {})

    def add_weighted(
        self, name: str, weights: Mapping[str, float], combination: str, *, rank: int | None = None
    ) -> Conversion:
        """Adds a combination of adapters as one more.

        Args:
            name: of the new adapter.
            weights: by the names of those to combine.
            combination: `"cat"` or `"sum"` for the exact weighted sum of LoRA or MoRA, `"svd"` or `"linear"` for a LoRA
                of lower rank (see `mora_jax.interop.convert.combine`).
            rank: for `"svd"`; None for the highest among the adapters.

        Returns:
            The error of each matrix against the weighted sum; `print` it.

        Raises:
            InputError: as `add`, or the combination is none for these adapters.
        """
        self._check_new(name)
        if not weights:
            raise InputError("give the weight of at least one adapter")
        adapters = {one: self._read(one) for one in weights}
        by_path, conversion = combine(self.model, adapters, weights, combination, rank)
        self._put(name, by_path, {})
        return conversion

    def delete(self, name: str) -> None:
        """Removes an adapter; its slot is zero and free. Where it was active, the base alone is.

        Args:
            name: the adapter's.

        Raises:
            InputError: there is no adapter of that name.
        """
        slot = self._find(name).slot
        for _, bank in _banks(self.model):
            bank.write(slot, {})
        del self._named[name]
        if isinstance(self._active, tuple):
            self.set_active([None if one == name else one for one in self._active])
        elif self._active == name:
            self.set_active(None)

    def ids(self, names: Sequence[str | None]) -> np.ndarray:
        """The slots of adapters: `adapter_ids` for a batch.

        Args:
            names: an adapter's name for each of the B rows; None is the base alone.

        Returns:
            int32 `[B]`; -1 for the base alone.

        Raises:
            InputError: there is no adapter of that name.
        """
        return np.array([NO_SLOT if name is None else self._find(name).slot for name in names], np.int32)

    def set_active(self, names: str | None | Sequence[str | None]) -> None:
        """Says what calls without ids use.

        Args:
            names: one adapter, None for the base alone, or a name or None for each row.

        Raises:
            InputError: there is no adapter of that name.
        """
        if names is not None and not isinstance(names, str):
            names = tuple(names)
        ids = self.ids(names) if isinstance(names, tuple) else self.ids([names])[0]
        if any(True for _ in _banks(self.model)):
            use(self.model, ids)
        self._active = names

    def save(
        self,
        name: str,
        out: str | os.PathLike[str],
        *,
        base_model_name_or_path: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Writes one adapter as a PEFT folder, with its own rank.

        Args:
            name: the adapter's.
            out: the folder.
            base_model_name_or_path: as for `save_adapter`.
            overwrite: replace an adapter that is in the folder.

        Raises:
            InputError: there is no adapter of that name; or as `save_adapter`.
        """
        copy = bare(self.model)
        install(copy, self._read(name))
        put_extra_fields(copy, self._find(name).extra)
        save_adapter(copy, out, base_model_name_or_path=base_model_name_or_path, overwrite=overwrite)

    def keep(self, name: str) -> None:
        """Leaves one adapter on the model, as `load_adapter` would have put it there, and nothing of the others.

        Args:
            name: the adapter's.

        Raises:
            InputError: there is no adapter of that name, or the model can't hold it; all are there then as before.
        """
        with undone_on_error(self.model):
            self._leave(name)
        self._named, self._active = {}, None

    def merge(self, name: str) -> tuple[Merged, ...]:
        """Folds one adapter into the base and removes the others.

        Args:
            name: the adapter's.

        Returns:
            What `mora_jax.unmerge` takes, as of `mora_jax.merge`.

        Raises:
            InputError: there is no adapter of that name, or the base can't take it; all are there then as before.
        """
        with refused(), undone_on_error(self.model):
            self._leave(name)
            merged = merge(self.model)
        self._named, self._active = {}, None
        return merged

    def clear(self) -> None:
        """Removes everything from the model, which is the bare base again."""
        if any(True for _ in _banks(self.model)):
            detach(self.model)
        self._named, self._active = {}, None

    def _leave(self, name: str) -> None:
        """Puts one adapter in the place of the slots."""
        by_path, extra = self._read(name), self._find(name).extra
        detach(self.model)
        install(self.model, by_path)
        put_extra_fields(self.model, extra)

    def _check_new(self, name: str) -> None:
        if not name:
            raise InputError("an adapter's name is empty; give one")
        if name in self._named:
            raise InputError(f"there is an adapter {name!r} already; delete it first, or give another name")

    def _find(self, name: str) -> _Named:
        if name not in self._named:
            known = ", ".join(self._named) or "none"
            raise InputError(f"there is no adapter {name!r}; there are {known}")
        return self._named[name]

    def _read(self, name: str) -> dict[str, AdapterValues]:
        """The values of an adapter as they are now."""
        slot, configs, _ = self._find(name)
        return dict(item for place, bank in _banks(self.model) for item in _read_slot(place, bank, slot, configs))

    def _put(self, name: str, by_path: ValuesByPath, extra: Mapping[str, Any]) -> None:
        """Writes a new adapter into a free slot, making room where there is none."""
        if self._named:
            other = next(iter(self._named))
            same_form({other: self._read(other), name: by_path})
        places = list(sites(self.model))
        _check_sites(places, by_path)
        used = {adapter.slot for adapter in self._named.values()}
        slot = next(i for i in range(len(used) + 1) if i not in used)
        self._slots = self._slots if slot < self._slots else 2 * self._slots
        for place in places:
            configs = [by_path[path].config for path in place.paths if path in by_path]
            if configs or place.adapter is not None:
                _write_slot(place, _bank_with_room(place, configs, self._slots, self._rank), slot, by_path)
        configurations = {path: adapter_values.config for path, adapter_values in by_path.items()}
        self._named[name] = _Named(slot, configurations, extra)
        self.set_active(name if len(self._named) == 1 else self._active)


def _banks(model: nnx.Module) -> Iterator[tuple[Site, Bank]]:
    """Every bank of `model` with its place."""
    for place in sites(model):
        if isinstance(place.adapter, Bank):
            yield place, place.adapter


def _check_sites(places: list[Site], by_path: ValuesByPath) -> None:
    """Refuses a path that the model lacks, or a place where the adapter can't stand beside those that are there."""
    absent = sorted(set(by_path) - {path for place in places for path in place.paths})
    if absent:
        raise InputError(f"the model has no {first(absent)}")
    for place in places:
        adapters = [by_path[path] for path in place.paths if path in by_path]
        if adapters and (place.is_embedding or isinstance(place.layer, OutputHead)):
            raise InputError(
                f"{place.title} is a table that all rows share; an adapter on it can't be used beside others: merge it"
            )
        sides = {len(adapter_values.values["m"]) for adapter_values in adapters if "m" in adapter_values.values}
        if sides and isinstance(place.adapter, MoRABank):
            sides.add(place.adapter.m.shape[-1])
        if len(sides) > 1:
            raise InputError(
                f"{place.title}: MoRA's matrices have sides {' and '.join(map(str, sorted(sides)))}; a square can't be "
                "padded, so only adapters of one rank go together"
            )


def _bank_with_room(place: Site, configs: list[Any], slots: int, rank: int) -> Bank:
    """The bank of a place, or a larger one with the same contents, or a new one.

    Args:
        place: without an adapter, or with a bank.
        configs: of the adapters that go into it.
        slots: how many it has to have at least.
        rank: the least rank of a bank of LoRAs.
    """
    old = place.adapter
    configs = configs if old is None else [old.config, *configs]
    config = configs[0]
    if isinstance(config, MoRAConfig):
        config = MoRAConfig(rank=config.rank, kind=config.kind)
    else:
        config = LoRAConfig(rank=max(rank, *(one.rank for one in configs)), alpha=1.0)
    if old is not None and old.slots >= slots and old.config == config:
        return old
    if place.of_experts:
        raise InputError(f"{place.title} has an adapter for each expert, of which there can be one alone: merge it")
    bank_class: Any = MoRABank if isinstance(config, MoRAConfig) else LoRABank
    bank = bank_class(
        place.in_features, place.out_features, config, slots=slots, dtype=wide(place.dtype), **place.layout
    )
    if old is not None:
        bank.copy_from(old)
        place.take_adapter()
    place.put_adapter(bank, None)
    return bank


def _write_slot(place: Site, bank: Bank, slot: int, by_path: ValuesByPath) -> None:
    """Writes an adapter's values at one place: zeros for layers without any, those of a lower rank padded."""
    stack, values = len(bank.layers), {}
    for name, variable in bank.arrays().items():
        array = np.zeros(variable.shape[:stack] + variable.shape[stack + 1 :], variable.dtype)
        for layer, path in enumerate(place.paths):
            if path in by_path:
                put_padded(array, place.index(layer), by_path[path].values[name])
        values[name] = array
    bank.write(slot, values)


def _read_slot(place: Site, bank: Bank, slot: int, configs: Mapping[str, Any]) -> Iterator[tuple[str, AdapterValues]]:
    """The values of an adapter at one place by module path, as `configs` are; without padding."""
    arrays = bank.read(slot)
    for layer, path in enumerate(place.paths):
        if path in configs:
            values = {name: array[place.index(layer)] for name, array in arrays.items()}
            if "lora_a" in values:
                rank = configs[path].rank
                values |= {"lora_a": values["lora_a"][:, :rank], "lora_b": values["lora_b"][:rank]}
            yield path, AdapterValues(configs[path], values)
