"""Adapters on the layers of a Linen model whose code stays as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn

from mora_jax.adapters.config.patterns import config_at
from mora_jax.adapters.matrices import NORMALISED, LayerForm
from mora_jax.adapters.targets import Picker
from mora_jax.linen.layers import LoRADense, MoRADense
from mora_jax.linen.matrices import KINDS, adapter_path, layer_number, product_of
from mora_jax.linen.registered import EinsumCall, form_of
from mora_jax.linen.report import LinenReport
from mora_jax.linen.update import adapted_output, check_config, table_output

# Part of the key of what jax.jit has compiled: a function that was traced outside a context, or inside one of another
# configuration, is traced again.
_CONTEXT = jax.make_user_context(None)


@contextmanager
def adapted(config: Any, *, deterministic: bool | None = None) -> Iterator[LinenReport]:
    """Puts adapters on the layers of models that run inside the context; their code stays as it is.

    Inside, `model.init` makes the collection `adapters` beside `params`, and `model.apply` uses it; the names in
    `params` are those of the plain model. Outside, `apply` silently ignores the collection. A function under
    `jax.jit` is compiled once for inside and once for outside.

    Adapters go on `nn.Dense`, `nn.DenseGeneral` (so on the projections of `nn.MultiHeadDotProductAttention` and its
    relatives), `nn.Einsum` where it is a product with one matrix, `nn.Conv`, `nn.Embed`, and layers of classes that
    `register_layer` was called for; the `Einsum` of the package `gemma` is known without. A layer under `nn.scan` or
    `nn.vmap` needs `"adapters"` in the transformation's `variable_axes`; its adapters then have the same axis as its
    kernel.

    Args:
        config: of a method that has a form in Linen (see `check_config`). `targets` are matched with module paths such
            as `Block_0.Dense_1`, as in `mora_jax.attach`; "all-linear" takes every layer but embeddings and `lm_head`.
            For `layers_to_transform` the number of a layer is the first in its path: 3 in `h.3`, `layers_3`, `Block_3`.
        deterministic: True switches the adapters' dropout off; needed where `config.dropout` > 0.

    Returns:
        What has been adapted so far, a table when printed.

    Raises:
        ValueError: the configuration has no form in Linen; at the end, when models ran and no target named one of their
            layers, or a name of `targets` or a layer number matched nothing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from mora_jax.adapters.config import MoRAConfig
        >>> from mora_jax.linen import adapted
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
        >>> with adapted(MoRAConfig(rank=1)) as report:
        ...     variables = model.init(jax.random.key(0), jnp.ones((3, 8)))
        >>> jax.tree.map(jnp.shape, variables["adapters"])
        {'layers_0': {'m': (4, 4)}, 'layers_2': {'m': (3, 3)}}
    """
    check_config(config)
    picks = Picker(config, layer_number)
    report = LinenReport(config)
    running: list[nn.Module] = []  # modules whose calls are open, the outermost first

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        running.append(context.module)
        try:
            y = around(call, args, kwargs, context)
        finally:
            running.pop()
        if not running and context.method_name != "setup":
            report.finish(context.module)
        return y

    def around(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, kind, form = context.module, _kind(context), _form(context)
        report.meet(module)
        if kind is None and form is None:
            return call(*args, **kwargs)
        if isinstance(module.parent, LoRADense | MoRADense):
            report.note(module.path, module, why=f"{type(module.parent).__name__} has an adapter of its own")
            return call(*args, **kwargs)
        if form is not None:
            layer = EinsumCall.of(form, module, call, args, kwargs)
            where, inputs, plain, bias = adapter_path(module.path, layer.array), layer.inputs, layer.again, form.bias
            if not module.has_variable("params", layer.array):
                first = plain(inputs)  # makes the parameter
                plain = lambda _: first  # noqa: E731 - a fresh adapter leaves the input as it is
            product = layer.product(module)
        else:
            inputs, *others = args if args else [kwargs.pop("query" if context.method_name == "attend" else "inputs")]
            einsum_str = (others[0] if others else kwargs.get("einsum_str")) if kind is nn.Einsum else None
            product, where = product_of(module, inputs, einsum_str), module.path
            bias = "bias" if getattr(module, "use_bias", False) else None

            def plain(x):
                return call(x, *others, **kwargs)

        path = ".".join(where)
        if any(isinstance(outer, nn.WeightNorm | nn.SpectralNorm) for outer in running):
            product = NORMALISED
        if isinstance(product, str):
            report.note(where, module, why=product)
            return plain(inputs)
        if not picks(path, is_linear=product.matrix.is_linear):
            report.note(where, module, product.matrix)
            return plain(inputs)
        settings = config_at(config, path)
        if form is not None and bias is None and settings.biases_alone:
            raise ValueError(f"{path} has no bias, nor a place for one; leave it out of targets")
        if kind is nn.Embed:
            y = table_output(module, settings, product.matrix, plain, inputs, attends=context.method_name == "attend")
        else:
            y = adapted_output(module, settings, product, plain, inputs, deterministic, bias)
        report.note(where, module, product.matrix, settings)
        return y

    with _CONTEXT((config, deterministic)), nn.intercept_methods(intercept):
        yield report
    report.check(picks)


def _form(context: nn.module.InterceptorContext) -> LayerForm | None:
    """The form of the registered class whose own call this is, or None."""
    base, form = form_of(type(context.module)) or (None, None)
    called: Any = context.orig_method
    method: Any = None if base is None else base.__call__
    return form if context.method_name == "__call__" and called.func is getattr(method, "__wrapped__", None) else None


def _kind(context: nn.module.InterceptorContext) -> type[nn.Module] | None:
    """The class of `KINDS` whose own product this call computes, or None."""
    name = context.method_name
    if name != "__call__" and not (name == "attend" and isinstance(context.module, nn.Embed)):
        return None
    kind = next((kind for kind in KINDS if isinstance(context.module, kind)), None)
    # A subclass's method may do more, or something else; the product is what it calls by super().
    called: Any = context.orig_method
    return kind if kind is not None and called.func is getattr(kind, name).__wrapped__ else None
