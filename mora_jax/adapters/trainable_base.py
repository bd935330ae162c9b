"""Base weights that are trained themselves: float32 masters in place of frozen parameters.

Full fine-tuning trains all of them and keeps nothing else. For `modules_to_save`, and for biases beside adapters, the
frozen values stay with the module under `trained_from`, so that adapters can be removed again.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax.adapters.base import AdapterParam, AdapterState, FullParam
from mora_jax.adapters.layers import Adapted
from mora_jax.adapters.products.matmul import widened
from mora_jax.adapters.projection import Projection

KEPT = "trained_from"


class TrainableBase:
    """Makes masters of parameters; a parameter that several modules share stays shared."""

    def __init__(self, *, keep: bool):
        """With `keep`, modules keep the frozen values too."""
        # With the parameters themselves: the number of one that nobody holds may become another's.
        self._made: dict[int, tuple[nnx.Param, FullParam, AdapterState]] = {}
        self._keep = keep

    def train(self, module: nnx.Module, name: str) -> int:
        """Trains the parameter `module.name`; returns how many numbers that adds, 0 where it is trained already."""
        value = vars(module)[name]
        if not _is_param(value):
            return 0
        if isinstance(module, Projection) and value is module.kernel:
            module.lay_kernel(flat=False)  # optimizers and checkpoints see one form on all backends
            value = module.kernel
        added = 0
        if id(value) not in self._made:
            array = value.get_value()
            if not jnp.issubdtype(array.dtype, jnp.floating):
                return 0
            axes = value.get_metadata().get("axes")
            metadata = {} if axes is None else {"axes": axes}
            abstract = isinstance(array, jax.ShapeDtypeStruct)
            wide = jax.eval_shape(widened, array) if abstract else widened(array)
            self._made[id(value)] = value, FullParam(wide, **metadata), AdapterState(array, **metadata)
            added = array.size
        _, master, frozen = self._made[id(value)]
        if isinstance(module, nnx.List):
            module[int(name)] = master  # flax 0.12.0 names the entries by whole numbers
        else:
            setattr(module, name, master)
        if self._keep:
            if not hasattr(module, KEPT):
                setattr(module, KEPT, nnx.Dict())
            getattr(module, KEPT)[name] = frozen
        return added

    def train_all(self, module: nnx.Module) -> int:
        """Trains every parameter that `module` holds itself; returns how many numbers that adds."""
        return sum(self.train(module, name) for name in list(vars(module)))


def _is_param(value: Any) -> bool:
    return isinstance(value, nnx.Param) and not isinstance(value, AdapterParam)


def train_modules(model: nnx.Module, names: tuple[str, ...]) -> None:
    """Trains the modules whose path has one of `names` as a component, keeping their frozen values.

    Raises:
        ValueError: a name that no module has; a matrix that is stored together with others which are not named; a list
            of parameters.
    """
    trainable, matched = TrainableBase(keep=True), set()
    for path, module in named_modules(model):
        hits = [name for name in names if any(name in one.split(".") for one in path)]
        if not hits:
            continue
        if isinstance(module, nnx.List):  # it can hold nothing but its entries
            raise ValueError(f"modules_to_save: {hits[0]} is a list of parameters; hold each in a module of its own")
        if isinstance(module, Projection):
            others = [one for one in path if not any(name in one.split(".") for name in names)]
            if module.quantized is not None:
                raise ValueError(
                    f"modules_to_save: {hits[0]} can't be trained whole: model.quantize={module.quantized} holds it "
                    "quantised"
                )
            if others:
                raise ValueError(f"modules_to_save: {hits[0]} is stored together with {others[0]}; name that too")
        matched.update(hits)
        trainable.train_all(module)
    missing = [name for name in names if name not in matched]
    if missing:
        known = sorted({one.rpartition(".")[2] for path, _ in named_modules(model) for one in path})
        raise ValueError(f"modules_to_save: no module is called {missing[0]!r}; there are {', '.join(known)}")


def train_biases(model: nnx.Module) -> None:
    """Trains every `bias` of modules without adapters (norms, convolutions), keeping the frozen values."""
    trainable = TrainableBase(keep=True)
    for _, module in named_modules(model):
        if not isinstance(module, Projection | Adapted) and _is_param(getattr(module, "bias", None)):
            trainable.train(module, "bias")


def named_modules(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Module]]:
    """Modules that hold parameters themselves, with their paths: those in files where they are known."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Projection):
            yield tuple(node.module_path(part.name, "*", "*") for part in node.parts), node
            continue
        if not isinstance(node, nnx.Module) or not any(isinstance(v, nnx.Param) for v in vars(node).values()):
            continue
        template = getattr(node, "path", None)  # where the decoder's modules lie in files
        yield (template.format(layer="*") if isinstance(template, str) else ".".join(str(p) for p in path),), node


def kept(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Module, dict[str, AdapterState]]]:
    """Modules with masters beside their frozen values: paths, module, and the frozen values by name."""
    for path, module in named_modules(model):
        if hasattr(module, KEPT):
            yield path, module, dict(getattr(module, KEPT))


def restore(model: nnx.Module, *, trained: bool) -> None:
    """Makes frozen parameters of masters again: with the trained values, in the dtype of old, or with those of old."""
    made: dict[int, nnx.Param] = {}
    for _, module, values in list(kept(model)):
        for name, frozen in values.items():
            master, array = getattr(module, name), frozen.get_value()
            if id(master) not in made:
                metadata = {key: value for key, value in frozen.get_metadata().items() if key == "axes"}
                made[id(master)] = nnx.Param(master[...].astype(array.dtype) if trained else array, **metadata)
            setattr(module, name, made[id(master)])
        delattr(module, KEPT)
