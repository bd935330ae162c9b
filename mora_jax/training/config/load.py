"""From config files, command-line overrides and JSON to a checked `Config`.

A config file holds only what it changes: it is laid over the defaults, and the overrides over both, so any documented
key can be set whether or not the file names it. It is a Python file whose `get_config()` returns an
`ml_collections.ConfigDict`, or the same as YAML or JSON, such as the `config.json` of a run.
"""

import contextlib
import glob
import json
import os
import sys
import traceback
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ml_collections import config_dict

from mora_jax.data.read.files import once
from mora_jax.data.segments import ROLE_SEGMENT
from mora_jax.errors import InputError
from mora_jax.losses.preference import OBJECTIVES
from mora_jax.paths import expanded
from mora_jax.training.config.schema import (
    Config,
    OptimizerConfig,
    adapter_config,
    find_key,
    flatten,
    keys,
    lay_over,
    unused,
)
from mora_jax.training.distributed.signals import Stopped
from mora_jax.training.update_rules import OBJECT, RULES

MODULE_NAME = "mora_jax_config_file"
#: Endings of config files that are read, not run.
YAML, JSON = (".yaml", ".yml"), (".json",)
#: What may be changed when a run is resumed: where it runs and what it writes, not what it computes. Keys, and sections
#: whose keys all may. Base and data are compared by content with what the run began with.
CHANGEABLE = (
    "mesh",
    "log",
    "model.path",
    "model.attention",
    "model.remat",
    "model.unroll",
    "data.train",
    "data.eval",
    "data.workers",
    "data.cache",
    "train.eval_tasks",
    "train.micro_batch_size",
    "train.save_every",
    "train.keep",
    "train.watchdog_seconds",
    "optimizer.offload",
)


def load_config(
    path: str | None, overrides: Sequence[tuple[str, str]] = (), defaults: Mapping[str, Any] | None = None
) -> tuple[Config, str | None]:
    """Reads a configuration.

    Args:
        path: the config file, or None for the defaults alone.
        overrides: (dotted key, text) pairs from the command line; later ones win.
        defaults: values of dotted keys where neither sets them, instead of the usual ones.

    Returns:
        The checked configuration, and one line about keys that this run ignores (None when there are none).

    Raises:
        InputError: on a file that can't be read or run, unknown keys, wrong types, values out of range.
    """
    settings = read_settings(path, overrides)
    first = [(name, value, "defaults") for name, value in (defaults or {}).items()]
    config = check_together(lay_over(Config(), first + settings))
    return config, unused(config, {name for name, _, _ in settings})


def read_settings(path: str | None, overrides: Sequence[tuple[str, str]] = ()) -> list[tuple[str, Any, str]]:
    """The (dotted key, value, origin) settings of a config file, if any, and of the command line after it."""
    return ([] if path is None else read_config_file(path)) + _parsed(overrides)


def _parsed(overrides: Sequence[tuple[str, str]]) -> list[tuple[str, Any, str]]:
    """Overrides as settings: dotted key, value and origin."""
    origins = [(name, text, f"--config.{name}") for name, text in overrides]
    return [(name, find_key(name, origin).parse(text, origin), origin) for name, text, origin in origins]


def config_from_dict(values: Mapping[str, Any], origin: str = "config.json") -> Config:
    """Reads what `Config.to_dict` wrote (also after JSON made lists of tuples), checking every key again.

    Raises:
        InputError: as `lay_over` and `check_together`.
    """
    return check_together(lay_over(Config(), [(name, value, origin) for name, value in flatten(values)]))


def changed(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """A run's configuration with what is different from now on.

    Args:
        config: as the run has it.
        overrides: (dotted key, text) pairs from the command line; later ones win.

    Raises:
        InputError: an unknown key or a wrong value; or one that would make another run of it, and names the others.
    """
    settings = _parsed(overrides)
    for name, _, origin in settings:
        if not _changeable(name):
            known = ", ".join(f"{key}.*" if "." not in key else key for key in CHANGEABLE)
            raise InputError(f"{origin} would make another run of it: with --resume only {known} can be changed")
    return check_together(lay_over(config, settings))


def _changeable(name: str) -> bool:
    return name in CHANGEABLE or name.split(".")[0] in CHANGEABLE


def check_same_run(run: str | os.PathLike[str], earlier: Config, now: Config) -> None:
    """Refuses to go on with a run by settings that would make another one of it.

    Raises:
        InputError: names the first of them.
    """
    before = dict(flatten(earlier.to_dict()))
    for name, value in flatten(now.to_dict()):
        if value != before.get(name) and not _changeable(name):
            raise InputError(
                f"{name}={value} would make another run of the one in {run}, which has {before.get(name)}: give that, "
                "or overwrite=True, or another out="
            )


def check_found(config: Config, run: str | os.PathLike[str]) -> None:
    """Refuses a run whose model or data have gone from where its `config.json` says that they are.

    Raises:
        InputError: names the path, and the key that says where it is now.
    """
    data = config.data
    paths = [("model.path", config.model.path), ("adapter.path", config.adapter.path)]
    paths += [("data.train", path) for path in data.train or ()] + [("data.eval", path) for path in data.eval or ()]
    paths += [("train.eval_tasks", text.partition("=")[2]) for text in config.train.eval_tasks or ()]
    for name, path in paths:
        if path is None or not Path(path).is_absolute() or Path(path).exists() or glob.glob(path, recursive=True):
            continue
        how = f"say where it is now with --config.{name}=..." if name in CHANGEABLE else "put it back there"
        raise InputError(f"{path}, which the run in {run} names as {name}, is not there any more; {how}")


def read_config_file(path: str) -> list[tuple[str, Any, str]]:
    """The (dotted key, value, origin) settings of a config file.

    A text in YAML means what it does on the command line: `1e-4` is a number, `none` is none. Of JSON, where a run's
    file holds all keys, the defaults are left out: nobody asked for them.

    Raises:
        InputError: when the file can't be read, is broken, or isn't made of sections with keys.
    """
    file = expanded(path)
    try:
        source = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"config file {path}: can't be read ({error.strerror}); give --config a Python, YAML or JSON file"
        ) from None
    kind = file.suffix.lower()
    if kind not in YAML + JSON:
        return [(name, value, path) for name, value in flatten(_run(source, path))]
    values = _read(source, path, is_json=kind in JSON)
    if not isinstance(values, dict):
        raise InputError(f"config file {path}: holds {type(values).__name__}; it must hold sections with keys")
    settings, known = [], keys()
    for name, value in flatten({name: {} if value is None else value for name, value in values.items()}):
        if isinstance(value, str) and kind in YAML:
            value = find_key(name, path).parse(value, path)
        default = known[name].default if name in known else None
        if kind in YAML or name not in known or value != (list(default) if isinstance(default, tuple) else default):
            settings.append((name, value, path))
    return settings


def _read(source: bytes, path: str, is_json: bool) -> Any:
    try:
        if is_json:
            return json.loads(source.decode("utf-8-sig"), object_pairs_hook=once)
        return yaml.load(source, _Loader) or {}
    except UnicodeDecodeError as error:
        raise InputError(f"config file {path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"config file {path}, line {error.lineno}: broken JSON ({error.msg})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"config file {path}{where}: broken YAML ({reason})") from None
    except (ValueError, TypeError, RecursionError) as error:  # a key that stands twice or is a list, endless brackets
        raise InputError(f"config file {path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML whose keys stand once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The keys and values of a node."""
        self.flatten_mapping(node)
        return once([(self.construct_object(key), self.construct_object(value, True)) for key, value in node.value])


def _run(source: bytes, path: str) -> dict[str, Any]:
    """What `get_config()` of a Python file returns. What the file prints goes to stderr: stdout is for results.

    A required placeholder counts as not set.
    """
    module = types.ModuleType(MODULE_NAME)
    module.__file__ = path
    sys.modules[MODULE_NAME] = module  # dataclasses and pickling in the file look their module up there
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(source, path, "exec"), module.__dict__)
            get_config = module.__dict__.get("get_config")
            if not callable(get_config):
                raise InputError(f"config file {path}: defines no get_config(); it must return a ConfigDict")
            values = get_config()
            if not isinstance(values, config_dict.ConfigDict):
                raise InputError(
                    f"config file {path}: get_config() returned {type(values).__name__}; "
                    "it must return an ml_collections.ConfigDict"
                )
            return _plain(values)
    except (InputError, KeyboardInterrupt, Stopped):
        raise
    # The file is a stranger's program: whatever it raises is bad input, not a bug of this one.
    except BaseException as error:  # noqa: BLE001
        raise InputError(f"config file {path}{_line_of(error, path)}: {_reason(error)}") from None
    finally:
        sys.modules.pop(MODULE_NAME, None)


def _plain(values: config_dict.ConfigDict) -> dict[str, Any]:
    plain = {}
    for name in values:
        with contextlib.suppress(config_dict.RequiredValueError):
            value = values[name]
            plain[str(name)] = _plain(value) if isinstance(value, config_dict.ConfigDict) else value
    return plain


def _line_of(error: BaseException, path: str) -> str:
    """Returns ", line N" for the deepest line of the file that took part in the error, or nothing."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"calls exit ({error.code}); it must only return a ConfigDict"
    if isinstance(error, SyntaxError):
        return f"syntax error ({error.msg})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def check_together(config: Config) -> Config:
    """Refuses values that are fine alone and impossible together, and missing required keys; returns the configuration.

    Raises:
        InputError: naming the keys and what is allowed.
    """
    required = {"model.path": config.model.path, "data.train": config.data.train, "out": config.out}
    missing = [name for name, value in required.items() if value is None]
    if missing:
        flags = " ".join(f"--config.{name}=..." for name in missing)
        raise InputError(f"config: {', '.join(missing)} must be set, in the file or by {flags}")
    train, mesh, loss, data, optimizer = config.train, config.mesh, config.loss, config.data, config.optimizer
    attention, name, method = config.model.attention, config.adapter.method, config.adapter.config_class
    prefers, of_object = loss.preference is not None, optimizer.name == OBJECT
    by_matrix = not of_object and RULES[optimizer.name].by_matrix
    axes = {"fsdp": mesh.fsdp, "tensor": mesh.tensor, "context": mesh.context, "expert": mesh.expert}
    sharded = [f"mesh.{axis} (now {size})" for axis, size in axes.items() if size != 1]
    unknown_roles = [role for role in loss.roles if role not in ROLE_SEGMENT]
    impossible = {
        f"train.micro_batch_size={train.micro_batch_size} must divide train.batch_size={train.batch_size}": (
            train.batch_size % train.micro_batch
        ),
        f"model.attention={attention} takes whole rows, and mesh.context={mesh.context} shares each; set "
        "model.attention=auto with it": mesh.context != 1 and attention not in ("auto", "xla"),
        f"mesh.pmap shares rows only; set {', '.join(sharded)} to 1": mesh.pmap and sharded,
        "optimizer.offload needs jit over a mesh; set mesh.pmap=false with it": mesh.pmap and optimizer.offload,
        "loss.normalize=constant needs loss.constant, the number to divide by": (
            loss.normalize == "constant" and loss.constant is None
        ),
        f"loss.roles: unknown role {''.join(map(repr, unknown_roles[:1]))}; choose from {', '.join(ROLE_SEGMENT)}": (
            unknown_roles
        ),
        f"loss.kl_weight needs a base that stays frozen, and adapter.method={name} changes it": (
            loss.kl_weight and method.changes_base
        ),
        "data.packing fills rows of one length; set data.bucketing=false with it": data.packing and data.bucketing,
        f"loss.kl_weight is of loss.objective=sft, and it is {loss.objective}": prefers and loss.kl_weight,
        f"loss.balance_weight is of loss.objective=sft, and it is {loss.objective}": prefers and loss.balance_weight,
        f"data.truncation=split makes pieces of an answer, which loss.objective={loss.objective} compares whole; set "
        "data.truncation=prompt_first": prefers and data.truncation == "split",
        "an optimizer that is an object has its own settings; leave out optimizer.*": (
            of_object and optimizer != OptimizerConfig(name=OBJECT)
        ),
        f"adapter.method={name} lets the learning rate rise again after each restart, which an optimizer that is an "
        "object can't be told; name one by optimizer.name": of_object and method.restarts,
        f"optimizer.offload is of adamw alone, and optimizer.name={optimizer.name}": (
            optimizer.offload and optimizer.name != "adamw"
        ),
        f"restarts prune a moment of each weight, which optimizer.name={optimizer.name} does not have; take adamw, "
        f"lion or sgd with adapter.method={name}": by_matrix and method.restarts,
        "optimizer.name=muon makes each matrix orthogonal, and the model's kernels hold several (query, key and value; "
        "gate and up); take it with an adapter, or another with adapter.method=full": (
            optimizer.name == "muon" and name == "full"
        ),
    }
    for why, is_so in impossible.items():
        if is_so:
            raise InputError(f"config: {why}")
    by_objective = {
        key: ("beta", "sft_weight", *one.settings, *(("reference",) if one.referenced else ()))
        for key, one in OBJECTIVES.items()
    }
    _check_used("loss.objective", loss.objective, loss, by_objective)
    _check_used("optimizer.name", optimizer.name, optimizer, {key: rule.settings for key, rule in RULES.items()})
    if train.steps is not None:
        check_warmup(config, train.steps)
    adapter_config(config.adapter)
    check_quantize(config)
    return config


def check_quantize(config: Config) -> None:
    """Refuses a quantised base for methods that change it, or that start from its numbers.

    Raises:
        InputError: naming the keys.
    """
    adapter, quantize, method = config.adapter, config.model.quantize, config.adapter.config_class
    if quantize == "none" or not (method.changes_base or adapter_config(adapter).starts_from_base):
        return
    by_method = method.changes_base or method().starts_from_base
    asked = f"adapter.method={adapter.method}" if by_method else f"adapter.init={adapter.init}"
    why = "changes it" if method.changes_base else "takes its start from the exact weights"
    raise InputError(
        f"config: model.quantize={quantize} holds the base frozen, with rounded weights, and {asked} {why}; set "
        "model.quantize=none, or another method"
    )


def _check_used(key: str, chosen: str, section: Any, uses: Mapping[str, Collection[str]]) -> None:
    """Refuses keys of a section that what is chosen doesn't use.

    Args:
        key: the dotted name of the key that chooses.
        chosen: its value.
        section: the section.
        uses: of the keys that not every choice uses, those of each.
    """
    for name in dict.fromkeys(name for names in uses.values() for name in names):
        if getattr(section, name) is not None and name not in uses.get(chosen, ()):
            users = ", ".join(other for other, names in uses.items() if name in names)
            unused_key = f"{key.partition('.')[0]}.{name}"
            raise InputError(f"config: {key}={chosen} does not use {unused_key}, which is of {users}")


def check_warmup(config: Config, steps: int) -> None:
    """Refuses a warm-up longer than the run, and restarts that it never reaches; for when its steps are known."""
    warmup, every = config.optimizer.warmup_steps, config.adapter.restart_every
    if warmup > steps:
        raise InputError(f"config: optimizer.warmup_steps={warmup} must be at most the run's {steps} steps")
    if config.adapter.config_class.restarts and every >= steps:
        raise InputError(
            f"config: adapter.restart_every={every} must be less than the run's {steps} steps, or nothing restarts"
        )
