"""LoRA, rsLoRA, DoRA and MoRA for Flax Linen.

`LoRADense` and `MoRADense` stand where `flax.linen.Dense` stood. Kernel and bias stay in the collection
`params` under the names of `nn.Dense`, so a trained tree loads; the factors are float32 in the collection
`adapters`. A model that should stay as it is gets its adapters by interception, see `adapted`. Everything
computed here is in the adapters' own classes, see `mora_jax.adapters.registry`.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from mora_jax.linen import LoRADense
    >>> layer = LoRADense(features=4, rank=2, alpha=4.0)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 8)))
    >>> jax.tree.map(jnp.shape, variables)
    {'adapters': {'lora_a': (8, 2), 'lora_b': (2, 4)}, 'params': {'bias': (4,), 'kernel': (8, 4)}}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen.dtypes import promote_dtype

from mora_jax.adapters import lora, mora
from mora_jax.adapters.config import DoRAConfig, LoRAConfig, MoRAConfig, RsLoRAConfig
from mora_jax.adapters.magnitude import column_norms
from mora_jax.adapters.registry import adapter_class

Array = jax.Array
Config = LoRAConfig | MoRAConfig

COLLECTION = "adapters"


def _check(config: Config) -> None:
    """Refuses methods that take more from the base than its kernel's norms, or train in a way of their own."""
    if type(config) not in (LoRAConfig, RsLoRAConfig, DoRAConfig, MoRAConfig) or config.bias != "none":
        raise ValueError(f"Linen layers have LoRA, rsLoRA, DoRA and MoRA without biases, not {config}")
    if isinstance(config, LoRAConfig) and config.init != "kaiming":
        raise ValueError(f"the factors of Linen layers start as init='kaiming', not {config.init!r}")


def _factors(module: nn.Module, config: Config, in_features: int, features: int) -> dict[str, Array]:
    """The layer's adapter arrays by name; creates them on the first call."""
    if isinstance(config, MoRAConfig):
        q = mora.square_rank(in_features, features, config.rank, config.kind)
        found = {"m": module.variable(COLLECTION, "m", jnp.zeros, (q, q), jnp.float32).value}
    else:

        def first() -> Array:
            return lora.init(module.make_rng("params"), in_features, features, config.rank)[0]

        shape = (config.rank, features)
        found = {
            "lora_a": module.variable(COLLECTION, "lora_a", first).value,
            "lora_b": module.variable(COLLECTION, "lora_b", jnp.zeros, shape, jnp.float32).value,
        }
    if config.use_dora:
        found["magnitude"] = module.variable(
            COLLECTION, "magnitude", lambda: column_norms(_param(module, "kernel"))
        ).value
    return found


def _param(module: nn.Module, name: str) -> Array:
    return nn.meta.unbox(module.get_variable("params", name))


def _scaled(config: Config, factors: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays as the adapters' own classes take them."""
    return dict(factors) | {"scaling": jnp.float32(adapter_class(config).scale(config))}


def _added(module: nn.Module, config: Config, inputs: Array, y: Array, deterministic: bool | None) -> Array:
    """`inputs [..., in]` and the plain layer's `y [..., features]` → what the adapted layer gives."""
    _check(config)
    in_features, features = inputs.shape[-1], module.features
    x = inputs.astype(y.dtype)
    if config.dropout > 0.0:
        if deterministic is None:
            raise ValueError(f"dropout is {config.dropout}: deterministic must be True (no dropout) or False")
        if not deterministic:
            kept = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - config.dropout, x.shape)
            x = jnp.where(kept, x / (1.0 - config.dropout), 0.0).astype(y.dtype)
    method, params = adapter_class(config), _scaled(config, _factors(module, config, in_features, features))
    update = method.delta(config, features, x.reshape(-1, in_features), params).reshape(y.shape)
    gain = method.output_gain(config, params, lambda: _param(module, "kernel"))
    if gain is None:
        return y + update.astype(y.dtype)
    product = y.astype(jnp.float32)
    bias = _param(module, "bias").astype(jnp.float32) if module.use_bias else 0.0
    return (gain * (product - bias + update) + bias).astype(y.dtype)


def _adapted_dense(module: LoRADense | MoRADense, config: Config, inputs: Array, deterministic: bool | None) -> Array:
    # A real nn.Dense in the module's own scope: the same numbers as without adapter, whatever its fields say.
    base = nn.Dense(
        module.features,
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
        kernel_init=module.kernel_init,
        bias_init=module.bias_init,
        promote_dtype=module.promote_dtype,
        dot_general=module.dot_general,
        dot_general_cls=module.dot_general_cls,
        name="base",
    )
    nn.share_scope(module, base)
    y = base(inputs)
    if deterministic is None:
        deterministic = module.deterministic
    return _added(module, config, inputs, y, deterministic)


class LoRADense(nn.Module):
    """`nn.Dense` with LoRA: `y = x W + b + (alpha / rank) · (x A) B`.

    Variables: `params/kernel [in, features]`, `params/bias [features]`, and float32 `adapters/lora_a [in,
        rank]`,
    `adapters/lora_b [rank, features]`. B starts at zero, so a fresh layer computes what `nn.Dense` does.

    Attributes:
        features: size of the last axis of the output.
        rank: inner size of the update.
        alpha: numerator of the scaling alpha / rank.
        dropout: probability of dropping an input feature of the adapter path (never of the base path), with
            keys from the stream "dropout".
        deterministic: True switches dropout off. Needed, here or in the call, where `dropout` > 0.
        use_rslora: scale by alpha / √rank, as rsLoRA.
        use_dora: train a magnitude for each output too, `adapters/magnitude [features]`, as DoRA.

    The other attributes are those of `nn.Dense`. The factors are used in the dtype of the computation and
    accumulated in float32.
    """

    features: int
    rank: int
    alpha: float
    use_bias: bool = True
    dropout: float = 0.0
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., Array] = nn.initializers.zeros_init()
    promote_dtype: Any = promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    use_rslora: bool = False
    use_dora: bool = False

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """`[..., in]` → `[..., features]`."""
        method = RsLoRAConfig if self.use_rslora else LoRAConfig
        config = method(rank=self.rank, alpha=self.alpha, dropout=self.dropout, use_dora=self.use_dora)
        return _adapted_dense(self, config, inputs, deterministic)


class MoRADense(nn.Module):
    """`nn.Dense` with MoRA: `y = x W + b + decompress(compress(x) Mᵀ)`.

    Variables: `params/kernel [in, features]`, `params/bias [features]`, and float32 `adapters/m [q, q]` with
        q of
    `mora_jax.adapters.mora.square_rank`. M starts at zero, so a fresh layer computes what `nn.Dense` does.

    Attributes:
        features: size of the last axis of the output.
        rank: LoRA rank of equal parameter count.
        kind: one of `mora_jax.adapters.mora.KINDS`.
        dropout, deterministic, use_dora: as in `LoRADense`.

    The other attributes are those of `nn.Dense`.
    """

    features: int
    rank: int
    kind: str = "sharing"
    use_bias: bool = True
    dropout: float = 0.0
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., Array] = nn.initializers.zeros_init()
    promote_dtype: Any = promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    use_dora: bool = False

    @nn.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None) -> Array:
        """`[..., in]` → `[..., features]`."""
        config = MoRAConfig(rank=self.rank, kind=self.kind, dropout=self.dropout, use_dora=self.use_dora)
        return _adapted_dense(self, config, inputs, deterministic)


def _targeted(config: Config, path: tuple[str, ...]) -> bool:
    """Whether the config's targets name the layer at `path`; the rule is that of `mora_jax.attach`."""
    targets, joined = config.targets, ".".join(path)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return path[-1:] != ("lm_head",)
    if isinstance(targets, str) and not re.fullmatch(r"\w+", targets):
        return re.fullmatch(targets, joined) is not None
    names = (targets,) if isinstance(targets, str) else targets
    return any(joined == name or joined.endswith("." + name) for name in names)


@contextmanager
def adapted(config: Config, *, deterministic: bool | None = None) -> Iterator[None]:
    """Puts adapters on the `nn.Dense` layers of models that run inside the context; their code stays as it
    is.

    Inside, `model.init` makes the collection `adapters` beside `params`, and `model.apply` uses it. The names
    in `params` are those of the plain model. Under `jax.jit` the context has to be open while the function is
    traced, so open it inside the function.

    Args:
        config: `LoRAConfig`, `RsLoRAConfig`, `DoRAConfig` or `MoRAConfig`. `targets` are matched with module paths
            such as `Block_0.Dense_1`; "all-linear" takes every `nn.Dense`.
        deterministic: True switches the adapters' dropout off; needed where `config.dropout` > 0.

    Raises:
        ValueError: at the end, when there were layers and no target named one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from mora_jax.adapters.config import MoRAConfig
        >>> from mora_jax.linen import adapted
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
        >>> with adapted(MoRAConfig(rank=1)):
        ...     variables = model.init(jax.random.key(0), jnp.ones((3, 8)))
        >>> jax.tree.map(jnp.shape, variables["adapters"])
        {'layers_0': {'m': (4, 4)}, 'layers_2': {'m': (3, 3)}}
    """

    seen: list[str] = []
    found = False

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        module = context.module
        if not isinstance(module, nn.Dense) or context.method_name != "__call__":
            return y
        if isinstance(module.parent, (LoRADense, MoRADense)):
            return y
        nonlocal found
        seen.append(".".join(module.path))
        if not _targeted(config, module.path):
            return y
        found = True
        inputs = args[0] if args else kwargs["inputs"]
        return _added(module, config, inputs, y, deterministic)

    with nn.intercept_methods(intercept):
        yield
    if seen and not found:
        could = f"layers that could have matched: {', '.join(dict.fromkeys(seen))}"
        raise ValueError(f"targets {config.targets!r} match no layer; {could}")


def _merged(config: Config, kernel: Array, factors: Mapping[str, Array], where: str) -> Array:
    """The kernel of one layer `[..., in, out]` with its adapter in it, in float32."""
    _check(config)
    in_features, out_features = kernel.shape[-2:]
    if isinstance(config, MoRAConfig):
        q = mora.square_rank(in_features, out_features, config.rank, config.kind)
        expected: dict[str, tuple[int, ...]] = {"m": (q, q)}
    else:
        expected = {"lora_a": (in_features, config.rank), "lora_b": (config.rank, out_features)}
    if config.use_dora:
        expected["magnitude"] = (out_features,)
    for name in dict.fromkeys((*expected, *factors)):
        found = factors[name].shape if name in factors else None
        wanted = (*kernel.shape[:-2], *expected[name]) if name in expected else None
        if found != wanted:
            raise ValueError(f"{where}: {name} is {found}; {config} over {kernel.shape} asks for {wanted}")
    method = adapter_class(config)

    def one(kernel: Array, factors: Mapping[str, Array]) -> Array:
        params = _scaled(config, factors)
        total = kernel.astype(jnp.float32) + method.dense(config, in_features, out_features, params)
        gain = method.output_gain(config, params, lambda: kernel)
        return total if gain is None else total * gain

    for _ in range(kernel.ndim - 2):  # axes that nn.scan or nn.vmap put in front
        one = jax.vmap(one)
    return one(kernel, dict(factors))


def merge(variables: Mapping[str, Any], *configs: Config) -> dict[str, Any]:
    """Folds the adapters into the kernels: the `params` of a plain `nn.Dense` model that computes the same.

    Args:
        variables: `{"params": …, "adapters": …}`, also with axes that `nn.scan` or `nn.vmap` put in front.
        *configs: what the adapters were made with; the alpha and the kind are not in the arrays. Each layer
            takes the first one of its method whose `targets` name it.

    Returns:
        `params` with new kernels in their own dtype, the sum taken in float32. Auto-named `LoRADense_0` keeps
        its name; `rename_layers` turns it back.

    Raises:
        ValueError: no adapters, a layer without kernel or without a config, or shapes that deny the config.
    """
    params = traverse_util.flatten_dict(variables["params"])
    layers: dict[tuple[str, ...], dict[str, Array]] = {}
    for path, value in traverse_util.flatten_dict(variables.get(COLLECTION, {})).items():
        layers.setdefault(path[:-1], {})[path[-1]] = nn.meta.unbox(value)
    if not layers:
        raise ValueError(f"the variables hold no collection {COLLECTION!r}, so there is nothing to merge")
    for path, factors in layers.items():
        where = "/".join(path) or "the layer"
        wanted = MoRAConfig if "m" in factors else LoRAConfig
        config = next((c for c in configs if isinstance(c, wanted) and _targeted(c, path)), None)
        if config is None:
            raise ValueError(f"{where} holds {', '.join(sorted(factors))}, but no {wanted.__name__} names it")
        boxed = params.get((*path, "kernel"))
        if boxed is None:
            raise ValueError(f"{where} has an adapter, but params hold no kernel for it")
        kernel = nn.meta.unbox(boxed)
        merged = _merged(config, kernel, factors, where)
        params[(*path, "kernel")] = nn.meta.replace_boxed(boxed, merged.astype(kernel.dtype))
    return traverse_util.unflatten_dict(params)


def rename_layers(
    tree: Mapping[str, Any], target: str, *, source: str = "Dense", only: str | None = None
) -> dict[str, Any]:
    """Maps auto-named layers: `Dense_0` of a trained tree to `LoRADense_0` of a model that has `LoRADense`
    there.

    Args:
        tree: a tree of parameters, nested dictionaries.
        target: class name of the new layers, such as "LoRADense".
        source: class name of the old ones.
        only: a regular expression for the whole path with dots, such as `r"Block_\\d+\\.Dense_0"`, where only
            some of the layers change their class. Flax numbers each class on its own, so the others close
            ranks.

    Returns:
        The same leaves under the new names.

    Raises:
        ValueError: a new name is taken, or no layer matches.
    """
    pattern = re.compile(rf"{re.escape(source)}_(\d+)")
    renamed = 0

    def walk(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        nonlocal renamed
        names = {name: name for name in node}
        auto = sorted((int(found[1]), name) for name in node if (found := pattern.fullmatch(name)))
        moved = [name for _, name in auto if only is None or re.fullmatch(only, ".".join((*path, name)))]
        if moved:
            renamed += len(moved)
            stayed = [name for _, name in auto if name not in moved]
            names.update((name, f"{target}_{i}") for i, name in enumerate(moved))
            names.update((name, f"{source}_{i}") for i, name in enumerate(stayed))
        if len(set(names.values())) < len(names):
            place = ".".join(path) or "the tree"
            raise ValueError(f"{place} already has {target} layers: {', '.join(sorted(node))}")
        return {
            names[name]: walk(child, (*path, name)) if isinstance(child, Mapping) else child
            for name, child in node.items()
        }

    result = walk(tree, ())
    if not renamed:
        matching = f" that matches {only!r}" if only else ""
        raise ValueError(f"the tree has no layer {source}_<number>{matching}")
    return result
