"""Put adapters on the layers of a model, in place."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.base import Adapter, AdapterParam, as_rngs, constant, params_of
from mora_jax.adapters.config.patterns import by_layer, resolve
from mora_jax.adapters.expert_projection import ExpertProjection
from mora_jax.adapters.matrices import registered, weight_of
from mora_jax.adapters.methods.bitfit import BitFit
from mora_jax.adapters.methods.full import FullConfig
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.products.quantization import quantized_format
from mora_jax.adapters.report import (
    LINEN,
    AdapterEntry as AdapterEntry,
    AttachReport,
    Match as Match,
    adapters_of as adapters_of,
    count,
    report_of,
    unknown_matrices,
    why_unknown,
)
from mora_jax.adapters.sites import LayerSite, Site, adapted_sites, by_path, sites
from mora_jax.adapters.targets import Picker
from mora_jax.adapters.token_rows import TokenRows, TokenRowsConfig, table_for_tokens
from mora_jax.adapters.trainable_base import KEPT, TrainableBase, kept, restore, train_biases, train_modules


def attach(model: nnx.Module, config: Any, *, rngs: nnx.Rngs | int | jax.Array) -> AttachReport:
    """Puts an adapter on every layer that `config.targets` picks; with `FullConfig`, makes every parameter trainable.

    Works on any `nnx.Module` that holds `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` (where it is a product with a
    matrix), `nnx.Embed` (LoRA), this library's stacked `Projection`, or layers of other classes that are einsums, too
    (see `mj.register_layer`). A fresh adapter changes no output. What was passed over stands in the report.

    It works while a function is traced, too (`nnx.jit`, `nnx.eval_shape`), and on a model of shapes alone: there the
    arrays that a method takes from the base (DoRA's magnitude, PiSSA's factors, masters) are shapes, and the others
    have their values.

    Args:
        model: changed in place; its own variables stay where they are.
        config: the configuration of a method (see `mora_jax.adapters.config`).
        rngs: keys for the new parameters, and for dropout; a seed or a key stands for `nnx.Rngs` of it.

    Returns:
        A report of what matched; `print` it.

    Raises:
        ValueError: nothing matches, or a layer that matches can't carry this method or carries an adapter already. The
            model is as it was then.
        TypeError: `model` is no NNX module, `config` is no adapter configuration, or `rngs` is none.

    Warns:
        UserWarning: targets name what can't be adapted, or the rank is higher than a layer can use.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(1)))
        >>> print(mj.attach(model, mj.LoRAConfig(rank=2), rngs=2))
        layer     layers  in  out  trainable
        ────────────────────────────────────
        layers.0       1   6   32         76
        layers.2       1  32    4         72
        ────────────────────────────────────
        lora: 148 of 504 parameters are trained (29.4 %)
    """
    all_sites = add_adapters(model, config, rngs=rngs)
    if isinstance(config, FullConfig):
        return report_of_trained(model)
    report = report_of(model, config, all_sites)
    report.warn(stacklevel=3)
    return report


def add_adapters(model: nnx.Module, config: Any, *, rngs: nnx.Rngs | int | jax.Array) -> list[Site]:
    """`attach` without its report.

    Args:
        model, config, rngs: as for `attach`.

    Returns:
        The sites of the model.
    """
    _check_module(model)
    rngs = as_rngs(rngs)
    _check_base(model, config)
    if isinstance(config, FullConfig):
        _train_everything(model)
        return []
    method = adapter_class(config)
    name_experts(model, config)
    all_sites = list(sites(model))
    selected = select(model, config, all_sites)
    for site, mask in selected:
        check_site(site, by_layer(config, site.paths, mask), method)
    config = method.configure_for_shapes(config, [(site.in_features, site.out_features) for site, _ in selected])
    with undone_on_error(model):
        if config.modules_to_save:
            train_modules(model, config.modules_to_save)
        for site, mask in selected:
            adapter = put_adapter(site, by_layer(config, site.paths, mask), method, rngs)
            if config.bias != "none" and site.has_bias:
                adapter.train_bias()
        if config.bias == "all":
            _train_other_biases(model, config, rngs, all_sites)
        if config.trainable_tokens:
            train_tokens(all_sites, config.trainable_tokens, rngs)
    return all_sites


def name_experts(model: nnx.Module, config: Any) -> None:
    """Has gate and up of experts seen as one matrix where targets name that, and as two where they name those."""
    picks = Picker(config)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, ExpertProjection) and len(node.matrices) > 1 and not len(node.adapters):
            node.see(whole=node.named_by(picks.names_in_any_layer))


def select(model: nnx.Module, config: Any, all_sites: list[Site]) -> list[tuple[Site, tuple[bool, ...]]]:
    """The sites that a configuration picks, each with one truth value a path.

    Raises:
        ValueError: as `Picker.check`.
    """
    picks = Picker(config)
    selected = []
    for site in all_sites:
        if site.stack:
            names = site.names_in(config.targets)
            mask = tuple(picks(path, names, is_linear=site.is_linear) for path in site.paths)
        else:
            mask = (any(picks(path, is_linear=site.is_linear) for path in (*site.paths, *site.aliases)),)
        if any(mask):
            selected.append((site, mask))
    by_path(all_sites)
    paths = [path for site in all_sites for path in (*site.paths, *site.aliases)]
    try:
        picks.check(paths, [site.title for site in all_sites], any_picked=bool(selected))
    except ValueError:
        for path, module, _ in unknown_matrices(model, {id(site.layer) for site in all_sites}):
            if picks(path) and config.targets != "all-linear":
                kind = type(module).__name__
                raise ValueError(
                    f"targets name {path} ({kind}), which can't be adapted: {why_unknown(module)}"
                ) from None
        linen = [path for path, node in nnx.iter_graph(model) if isinstance(node, nnx.bridge.ToNNX)]
        if linen and not all_sites:
            name = ".".join(map(str, linen[0])) or "the model"
            raise ValueError(f"the model has no linear layer of Flax NNX, and {name} is {LINEN}") from None
        raise
    return selected


def _check_module(model: Any) -> None:
    """Refuses what is no NNX module, and says what to do with it instead."""
    if isinstance(model, nnx.Module):
        return
    kind = type(model)
    if any(base.__module__ == "flax.linen.module" for base in kind.__mro__):
        raise TypeError(
            f"attach takes a Flax NNX module, and {kind.__name__} is one of Linen, which get their adapters while they "
            "run: with mora_jax.linen.adapted(config): model.init(…)"
        )
    if isinstance(model, Mapping) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(model)):
        raise TypeError(
            "attach takes a Flax NNX module, not a tree of arrays: of a Linen model use mora_jax.linen.adapted; of "
            "any other tree mj.functional"
        )
    raise TypeError(f"attach takes a Flax NNX module, not {kind.__name__}")


def _check_base(model: nnx.Module, config: Any) -> None:
    """Refuses a quantised base for what would change it, or takes its start out of it."""
    held = quantized_format(model)
    if held is None:
        return
    if isinstance(config, FullConfig):
        raise ValueError(f"full fine-tuning trains the base, which model.quantize={held} holds quantised and frozen")
    if config.restarts:
        raise ValueError(
            f"{adapter_class(config).method} merges into the base, which model.quantize={held} holds quantised"
        )
    if config.starts_from_base:
        raise ValueError(
            f"{config.init} takes the adapter's start out of the base, of which model.quantize={held} holds rounded "
            "numbers"
        )


def check_site(site: Site, configs: Sequence[Any | None], method: type[Adapter]) -> None:
    """Refuses a site that can't carry an adapter of these configurations, one a layer (None: left out).

    Raises:
        ValueError: says why.
    """
    biases_alone = any(config is not None and config.biases_alone for config in configs)
    if site.of_experts:
        _check_experts(site, configs, method)
    if site.adapter is not None:
        raise ValueError(f"{site.title} carries an adapter already; merge it before attaching another")
    for dtype in (site.dtype, getattr(site.layer, "dtype", None)):
        if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"{site.title} is {jnp.dtype(dtype)}, and adapters have no complex form; leave it out")
    if site.is_embedding:
        method.check_embedding(site.title)
    if site.is_head and biases_alone:
        raise ValueError(f"{site.title} has no bias, and logits get none; leave it out of targets")
    if registered(type(site.layer)) is not None and not site.has_bias and biases_alone:
        raise ValueError(f"{site.title} has no bias, nor a place for one; leave it out of targets")
    if isinstance(site, LayerSite) and not site.holds_layers:
        shape, sizes = list(weight_of(site.layer).shape), f"{site.in_features} by {site.out_features}"
        raise ValueError(
            f"{site.title} holds {shape}, no layers of {sizes} stacked along axes in front: make it with "
            "nnx.vmap(…, out_axes=0)"
        )
    ranks = resolve(configs, method, site.paths).ranks
    if ranks is not None and not hasattr(method, "limit_ranks"):
        raise ValueError(
            f"rank_pattern gives the layers of {site.title} different ranks, for which {method.method} has no form"
        )


def _check_experts(site: Site, configs: Sequence[Any | None], method: type[Adapter]) -> None:
    reason = f"{method.method} has no form for" if not method.on_experts else ""
    for config in filter(None, configs):
        if getattr(config, "use_dora", False):
            reason = "DoRA would need the norms of all experts' columns for each product, and has no form for"
        elif getattr(config, "init", "") == "eva":
            reason = "init='eva' collects what a layer reads, and has no form for"
    if reason:
        raise ValueError(f"{reason} {site.title}, the matrices of experts; leave them out of targets")


def put_adapter(site: Site, configs: Sequence[Any | None], method: Any, rngs: nnx.Rngs) -> Adapter:
    """Makes an adapter and puts it on a site.

    Args:
        site: where it goes.
        configs: for each of `site.paths` its configuration, None for a layer that gets no adapter.
        method: the adapter's class.
        rngs: keys for its arrays.
    """
    resolved = resolve(configs, method, site.paths)
    sizes = site.in_features, site.out_features
    make = method.for_embedding if site.is_embedding else method
    adapter = make(*sizes, resolved.config, rngs=rngs, **site.layout)
    adapter.fit(site.dtype)
    scalings = resolved.scalings.astype(adapter.scaling.dtype)
    adapter.scaling.set_value(constant(scalings.reshape(adapter.layers)))
    if resolved.ranks is not None:
        adapter.limit_ranks(resolved.ranks)
    if isinstance(weight_of(site.layer).get_value(), jax.ShapeDtypeStruct):
        _start_abstract(adapter, jax.ShapeDtypeStruct((*site.stack, *sizes), site.dtype))
    else:
        adapter.init_from_kernel(site.kernel)
    site.put_adapter(adapter, rngs)
    return adapter


def train_tokens(all_sites: list[Site], tokens: tuple[int, ...], rngs: nnx.Rngs) -> TokenRows:
    """Trains rows of the one embedding table among the sites of a model.

    Raises:
        ValueError: as `table_for_tokens`.
    """
    site = table_for_tokens(all_sites, tokens)
    config = TokenRowsConfig(tokens=tokens, targets=site.title or "embedding")
    return put_adapter(site, (config,), TokenRows, rngs)  # type: ignore[return-value]


def _start_abstract(adapter: Adapter, kernel: jax.ShapeDtypeStruct) -> None:
    """`adapter.start` on a base without values: what is taken from it has a shape and a dtype alone."""
    taken: list[str] = []

    def start(kernel: jax.Array) -> Adapter:
        copy = nnx.clone(adapter)
        before = params_of(copy)
        copy.init_from_kernel(lambda: kernel)
        taken.extend(name for name, value in params_of(copy).items() if before.get(name) is not value)
        return copy

    started = nnx.eval_shape(start, kernel)
    for name in taken:
        setattr(adapter, name, getattr(started, name))


def _train_other_biases(model: nnx.Module, config: Any, rngs: nnx.Rngs, all_sites: list[Site]) -> None:
    """`bias="all"`: those of layers without an adapter, too."""
    for site in all_sites:
        trained_whole = hasattr(site.layer, KEPT)
        if site.adapter is None and not trained_whole and site.has_bias and not site.is_embedding:
            put_adapter(site, (BitFit.only(config),) * len(site.paths), BitFit, rngs)
    train_biases(model)


def _train_everything(model: nnx.Module) -> None:
    """Turns every `nnx.Param` into a trained float32 master. Shared parameters stay shared."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and jnp.issubdtype(node.dtype, jnp.complexfloating):
            name = ".".join(map(str, path))
            raise ValueError(f"{name} is {node.dtype}, and full fine-tuning trains real numbers alone")
    base = TrainableBase(keep=False)
    if not sum(base.train_all(node) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)):
        raise ValueError("the model has no parameters to train")


def report_of_trained(model: nnx.Module) -> AttachReport:
    """The report on what `model` trains: its adapters, or without any all of its parameters."""
    if adapted_sites(model):
        return report_of(model)
    return AttachReport("full", (), count(model, AdapterParam), count(model))


def detach(model: nnx.Module) -> None:
    """Removes every adapter of `model`, in place, without folding anything in: the layers are plain again.

    No method touches the base, so the base is as it was, bit for bit; modules that were trained whole get their
    frozen values back.

    Args:
        model: a module to which `attach` or `load_adapter` was applied; changed in place.

    Raises:
        ValueError: the model has no adapter.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
        >>> mj.detach(model)
        >>> type(model.layers[0]).__name__
        'Linear'
    """
    adapted = adapted_sites(model)
    if not adapted and not list(kept(model)):
        raise ValueError("the model has no adapter to remove")
    for site in adapted:
        site.take_adapter()
    restore(model, trained=False)


@contextlib.contextmanager
def undone_on_error(model: nnx.Module) -> Iterator[None]:
    """Puts every module of `model` back to the class and the attributes that it had, when what is done inside fails."""
    before = [(node, type(node), dict(vars(node))) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    try:
        yield
    except BaseException:
        for node, kind, attributes in before:
            object.__setattr__(node, "__class__", kind)
            vars(node).clear()
            vars(node).update(attributes)
        raise


def partition(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits `model` into its structure, its trainable float32 arrays and everything else.

    Differentiate with respect to the second, give the second to optax, and pass the third through unchanged;
    `nnx.merge(graphdef, adapters, frozen)` puts the model together again, inside a compiled function too.

    The third holds what a call may change too: counters of dropout, batch statistics, caches. Where a model has such
    state and is in training mode, take it out as a part of its own that the step returns:
    `nnx.split(model, mj.AdapterParam, mj.mutable_state, ...)`, see `mutable_state`.

    Args:
        model: a module to which `attach` was applied; it isn't changed.

    Returns:
        `(graphdef, adapters, frozen)`: the structure, and two states of `nnx.Variable`s.

    Raises:
        ValueError: the model has no adapter and wasn't prepared for full fine-tuning.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> graphdef, adapters, frozen = mj.partition(model)
        >>> loss = lambda adapters, x: (nnx.merge(graphdef, adapters, frozen)(x) ** 2).mean()
        >>> gradients = jax.jit(jax.grad(loss))(adapters, jnp.ones((3, 4)))
        >>> optimizer = optax.adamw(1e-3)
        >>> updates, _ = optimizer.update(gradients, optimizer.init(adapters), adapters)
        >>> adapters = optax.apply_updates(adapters, updates)
    """
    graphdef, *states = nnx.split(model, AdapterParam, ...)
    adapters, frozen = states
    if not adapters:
        raise ValueError("the model has nothing to train; call attach(model, config, rngs=…) first")
    return graphdef, adapters, frozen
