"""Adapters as plain values: read from a model or a folder beside the model that they are for, which stays as it is."""

import os
from collections.abc import Mapping
from typing import TypeVar

from flax import nnx

from mora_jax.adapters.attach import detach
from mora_jax.adapters.report import adapters_of
from mora_jax.adapters.sites import adapted_sites
from mora_jax.errors import InputError
from mora_jax.interop.adapter_values import AdapterValues, ValuesByPath, plain
from mora_jax.interop.peft.config import extra_fields
from mora_jax.interop.peft.load import load_adapter
from mora_jax.interop.peft.restarted_base import has_other_base
from mora_jax.interop.tensor_map import trained_weights

Model = TypeVar("Model", bound=nnx.Module)


def bare(model: Model) -> Model:
    """A second model on the same base arrays, without adapters."""
    copy = nnx.clone(model)
    if adapted_sites(copy):
        detach(copy)
    return copy


def read_adapter(model: nnx.Module, path: str | os.PathLike[str], *, strict: bool = False) -> tuple[ValuesByPath, dict]:
    """The values of an adapter folder, by module path, and the fields of a newer PEFT in its configuration.

    Args:
        model: what the adapter is for.
        path: as for `load_adapter`.
        strict: as for `load_adapter`.

    Raises:
        InputError: as `load_adapter` and `values_of`.
    """
    copy = bare(model)
    load_adapter(copy, path, strict=strict)
    try:
        return values_of(copy), extra_fields(copy)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def values_of(model: nnx.Module) -> ValuesByPath:
    """The adapters of a model, by module path: LoRA (whatever it was trained as) or MoRA of one kind.

    Raises:
        InputError: there is none, there are several methods, or one does more than add an update to a matrix.
    """
    if next(trained_weights(model), None) is not None:
        raise InputError("it trains modules whole (modules_to_save), which several adapters can't share; merge it")
    if has_other_base(model):
        raise InputError("it comes with a base of its own, which several adapters can't share; merge it")
    by_path: dict[str, AdapterValues] = {}
    for entry in map(plain, adapters_of(model)):
        for name, what in (("magnitude", "DoRA's magnitude"), ("bias", "a trained bias")):
            if name in entry.params:
                raise InputError(f"{entry.path} has {what}, which doesn't add up with other adapters; merge it instead")
        if not entry.config.combinable_as:
            raise InputError(f"{entry.path} has {entry.method}, but only LoRA and MoRA can be used beside others")
        by_path[entry.path] = AdapterValues(entry.config, entry.params)
    if not by_path:
        raise InputError("the model has no adapter")
    form_of(by_path)
    return by_path


def form_of(by_path: ValuesByPath) -> str:
    """The method of all values, in words: those of equal words can share a bank, or be added up.

    Raises:
        InputError: there are several methods.
    """
    forms = {adapter_values.config.combinable_as for adapter_values in by_path.values()}
    if len(forms) > 1:
        raise InputError(f"it has {' and '.join(sorted(forms))}, but one adapter is of one method here")
    return forms.pop()


def same_form(adapters: Mapping[str, ValuesByPath]) -> str:
    """The method of several adapters, by name.

    Raises:
        InputError: they have different ones.
    """
    forms = {name: form_of(by_path) for name, by_path in adapters.items()}
    first, *others = forms
    for other in others:
        if forms[other] != forms[first]:
            raise InputError(
                f"{first} is {forms[first]}, {other} is {forms[other]}: only adapters of one method go together"
            )
    return forms[first]
