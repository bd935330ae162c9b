"""Which layers an adapter goes on, by `targets` and `layers_to_transform`, and how messages name paths."""

import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mora_jax.adapters.config.common import Targets

WIDTH = 80
SHOWN = 8


def summary(paths: Iterable[str]) -> str:
    """Module paths in few words: stacks of layers once, with `*` for their numbers, by the ends that tell them apart.

    Examples:
        >>> summary(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.head"])
        'up_proj, head'
        >>> summary(["blocks.0", "blocks.1", "out", "heads.0.out"])
        'blocks.*, out, heads.*.out'
    """
    starred = list(dict.fromkeys(star(path) for path in paths))
    ends = [_end(path) for path in starred]
    names = [end if ends.count(end) == 1 else path for path, end in zip(starred, ends, strict=True)]
    if len(names) <= SHOWN + 1:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"


def star(path: str) -> str:
    """A path with `*` in place of numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _end(path: str) -> str:
    """The last component that is a name, and what follows it."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part != "*"), default=0)
    return ".".join(parts[last:])


def nearest(name: str, paths: Iterable[str]) -> str:
    """`; did you mean 'q_proj'?` where the end of a path is almost `name`, else nothing."""
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    close = difflib.get_close_matches(name, ends, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def quoted(value: object, most: int = 60) -> str:
    """`repr` of what a user gave, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows as lines: the first column to the left, the others, which are numbers, to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(n) for cell, n in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    ]


def wrapped(text: str) -> list[str]:
    """A sentence as lines of a terminal's width."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def layer_number(path: str) -> int | None:
    """The number of the layer that a module path is in: its first component that is a number, behind a name."""
    return next((int(name) for name in path.split(".")[1:] if name.isdecimal()), None)


def matcher(targets: Targets) -> Callable[[str, bool], bool]:
    """A predicate on (module path, whether it is linear: no embedding and no convolution) for a rule.

    A sequence of names matches a path whose last components are the name. A string is a regular expression for the
    whole path, but a plain name in a string works as a name. `"all-linear"` is every linear layer but the output head.

    Raises:
        ValueError: an invalid regular expression.
    """
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return lambda path, is_linear: is_linear and path.rpartition(".")[2] != "lm_head"
    if isinstance(targets, str) and not re.fullmatch(r"\w+", targets):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets {targets!r} is no regular expression: {error}") from None
        return lambda path, is_linear: pattern.fullmatch(path) is not None
    names: Sequence[str] = (targets,) if isinstance(targets, str) else targets
    return lambda path, is_linear: any(named(path, name) for name in names)


def named(path: str, name: str) -> bool:
    """Whether a module path is a name, or ends with it."""
    return path == name or path.endswith("." + name)


class Picker:
    """The rule of a configuration: which module paths its `targets` and `layers_to_transform` pick.

    Args:
        config: of a method.
        number: the number of the layer that a module path is in, or None.

    Raises:
        ValueError: `targets` is an invalid regular expression.
    """

    def __init__(self, config: Any, number: Callable[[str], int | None] = layer_number):
        self.config = config
        self._number = number
        self._matches = matcher(config.targets)
        self.everything = isinstance(config.targets, str) and config.targets.lower() == "all-linear"

    def __call__(self, path: str, aliases: Sequence[str] = (), *, is_linear: bool = True) -> bool:
        """Whether a path is picked; `aliases` are other names of the same layer that `targets` may give."""
        layers = self.config.layers_to_transform
        in_layer = layers is None or self._number(path) in layers
        return in_layer and any(self.in_any_layer(name, is_linear=is_linear) for name in (path, *aliases))

    def in_any_layer(self, path: str, *, is_linear: bool = True) -> bool:
        """Whether the rule would pick a path if it named no layers."""
        return self._matches(path, is_linear) and not set(path.split(".")) & set(self.config.modules_to_save)

    def names_in_any_layer(self, path: str) -> bool:
        """Whether the rule says this path, not all linear layers, leaving out what it says about layers."""
        return not self.everything and self._matches(path, True)

    def names(self, path: str) -> bool:
        """Whether the rule picks a path by what it says, not as one of all linear layers."""
        return self(path) and not self.everything

    def check(self, paths: Sequence[str], titles: Sequence[str], *, any_picked: bool) -> None:
        """Refuses a rule that matches nothing, in whole or in part.

        Args:
            paths: of everything in the model that could carry an adapter.
            titles: the same for people.
            any_picked: whether the rule picked anything.

        Raises:
            ValueError: nothing was picked (lists what could have been), or a name of a list or a layer number matches
                nothing.
        """
        targets = self.config.targets
        could = summary(titles) or "none: the model has no linear layer"
        absent = sorted(set(self.config.layers_to_transform or ()) - {self._number(path) for path in paths})
        if absent:
            raise ValueError(f"layers_to_transform names layer {absent[0]}, which the model does not have")
        if not any_picked:
            near = nearest(targets if isinstance(targets, str) else targets[0], [*paths, "all-linear"])
            if isinstance(targets, str) and any(re.search(targets, path) for path in paths):
                near = f"; an expression has to match the whole path, as '.*({targets}).*' would"
            raise ValueError(f"targets {quoted(targets)} match no layer; layers that could have matched: {could}{near}")
        for name in () if isinstance(targets, str) else targets:
            if not any(named(path, name) for path in paths):
                near = nearest(name, paths)
                raise ValueError(f"target {name!r} matches no layer; layers that could have matched: {could}{near}")
