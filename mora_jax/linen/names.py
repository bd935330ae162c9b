"""The automatic names of Linen's layers, from one class to another."""

import re
from collections.abc import Mapping
from typing import Any


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

    Examples:
        >>> from mora_jax.linen import rename_layers
        >>> rename_layers({"Dense_0": {"kernel": 1}, "Dense_1": {"kernel": 2}}, "LoRADense")
        {'LoRADense_0': {'kernel': 1}, 'LoRADense_1': {'kernel': 2}}
    """
    pattern = re.compile(rf"{re.escape(source)}_(\d+)")
    renamed = 0

    def walk(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        nonlocal renamed
        names = {name: name for name in node}
        auto = sorted((int(match[1]), name) for name in node if (match := pattern.fullmatch(name)))
        chosen = [name for _, name in auto if only is None or re.fullmatch(only, ".".join((*path, name)))]
        if chosen:
            renamed += len(chosen)
            stayed = [name for _, name in auto if name not in chosen]
            names.update((name, f"{target}_{i}") for i, name in enumerate(chosen))
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
