"""The runs of a sweep: every combination of the values that some configuration keys take."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from mora_jax.errors import InputError
from mora_jax.training.config.key import TEXTS, split_list
from mora_jax.training.config.schema import AdapterConfig, Config, MeshConfig, adapter_config, find_key, lay_over

#: Runs share one device and one process; where they write belongs to the sweep.
NOT_SWEPT = ("out", "mesh", "log")
_PLAIN = re.compile(r"[^\w.=+-]+")
_LONGEST = 120  # characters of a run's name; file systems take 255 bytes


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        values: of the swept keys, in the order of the sweep.
        config: the whole configuration; `out` is the run's own folder.
    """

    name: str
    values: Mapping[str, Any]
    config: Config


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each key that texts `KEY=v1,v2` of `--sweep` name, in their order.

    Commas inside brackets don't separate, so that a value can be a list: `adapter.targets=all-linear,[q_proj,v_proj]`.

    Raises:
        InputError: no key, an unknown one or one that is named twice; an empty value, or one that it doesn't take.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        origin = f"--sweep {name}"
        if not name or not equals:
            raise InputError(f"--sweep {text}: write KEY=VALUE,VALUE, such as optimizer.learning_rate=1e-4,3e-4")
        key, values = find_key(name, origin), split_list(listed)
        if any(not value.strip() for value in values):
            raise InputError(f"--sweep {text}: a value is empty; write {name}=VALUE,VALUE")
        if name in grid:
            raise InputError(f"{origin} is given twice; put all values into one: {origin}=VALUE,VALUE")
        if TEXTS in key.types:
            values = tuple(value[1:-1] if value[:1] + value[-1:] == "[]" else value for value in values)
        grid[name] = [key.parse(value, origin) for value in values]
    return grid


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last key changing fastest.

    Raises:
        InputError: there are none, or one twice.
    """
    if not grid:
        raise InputError(
            "nothing to sweep: name a key with its values, such as --sweep optimizer.learning_rate=1e-4,1e-3"
        )
    for name, values in grid.items():
        find_key(name, f"--sweep {name}")
        if not values:
            raise InputError(f"--sweep {name} has no values")
        for index, value in enumerate(values):
            if value in values[:index]:
                raise InputError(f"--sweep {name} has the value {shown(value)} twice; each run should be another")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def expand(
    settings: Sequence[Mapping[str, Any]], config_of: Callable[[dict[str, Any]], Config], out: str | None
) -> list[SweepRun]:
    """The runs with these values of keys.

    Args:
        settings: for each run the values of the swept keys.
        config_of: gives the checked configuration with such values.
        out: the sweep's folder; None where nothing is written.

    Raises:
        InputError: a key that can't be swept, values that don't go together (names the run), two runs alike.
    """
    keys = list(dict.fromkeys(name for values in settings for name in values))
    for name in keys:
        find_key(name, f"--sweep {name}")
        if name.split(".")[0] in NOT_SWEPT:
            raise InputError(f"--sweep {name}: this key can't be swept; it says where a run computes or writes")
    config_of(dict(settings[0]))  # what is wrong with all runs is not said of one
    runs: list[SweepRun] = []
    taken: set[str] = set()
    for values in settings:
        name = _free(_name(values, keys), taken)
        try:
            config = config_of(dict(values))
        except InputError as error:
            raise InputError(f"run {name}: {error}") from None
        _check_shared(config)
        where = config.out or "" if out is None else f"{out.rstrip('/')}/runs/{name}"
        config = lay_over(config, [("out", where, "out"), ("mesh.data", 1, "the sweep")])
        runs.append(SweepRun(name, dict(values), config))
    _check_different(runs)
    return runs


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where another run has it; some file systems don't tell `a` from `A`."""
    numbered = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    free = next(one for one in numbered if one.casefold() not in taken)
    taken.add(free.casefold())
    return free


def _check_shared(base: Config) -> None:
    """Refuses what a sweep has no use for."""
    mesh = base.mesh
    if mesh.data not in (-1, 1) or mesh != MeshConfig(data=mesh.data):
        raise InputError(
            "config: a sweep trains its runs side by side on one device; leave the keys mesh.* at their defaults"
        )
    for name, on in (("log.wandb", base.log.wandb), ("log.profile_steps", base.log.profile_steps)):
        if on:
            raise InputError(f"config: {name} is for a run alone, not for a sweep; log.tensorboard works in one")


def _check_different(runs: Sequence[SweepRun]) -> None:
    """Refuses runs that would compute the same, as where a method doesn't read the swept key."""
    seen: dict[Any, str] = {}
    for run in runs:
        config = run.config
        rest = dataclasses.replace(config, out=None, adapter=AdapterConfig(path=config.adapter.path))
        what = adapter_config(config.adapter), rest
        first = seen.setdefault(what, run.name)
        if first != run.name:
            raise InputError(
                f"the runs {first} and {run.name} are the same: adapter.method={config.adapter.method} doesn't read "
                "what differs between them"
            )


def _name(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """`learning_rate=0.001_seed=0`: characters that every file system and shell takes as they are.

    A key is called by its last part, or by all of it where another of `keys` ends so too; a path by its end.
    """
    lasts = [key.rpartition(".")[2] for key in keys]
    parts = []
    for key, value in values.items():
        last, text = key.rpartition(".")[2], shown(value)
        end = PurePath(text).name or text if "/" in text else text
        parts.append(f"{last if lasts.count(last) == 1 else key}={_PLAIN.sub('-', end).strip('-')}")
    return "_".join(parts)[:_LONGEST] or "run"


def shown(value: Any) -> str:
    """A value as it is shown in tables."""
    return "none" if value is None else "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
