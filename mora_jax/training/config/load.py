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
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ml_collections import config_dict

from mora_jax.data.segments import ROLE_SEGMENT
from mora_jax.errors import InputError
from mora_jax.losses.preference import OBJECTIVES, Settings
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
from mora_jax.training.update_rules import OBJECT, RULES, SETTINGS

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
    config = lay_over(Config(), first + settings)
    check_together(config)
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
    config = lay_over(Config(), [(name, value, origin) for name, value in flatten(values)])
    check_together(config)
    return config


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
    config = lay_over(config, settings)
    check_together(config)
    return config


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
    named = [("model.path", config.model.path), ("adapter.path", config.adapter.path)]
    named += [("data.train", path) for path in data.train or ()] + [("data.eval", path) for path in data.eval or ()]
    named += [("train.eval_tasks", text.partition("=")[2]) for text in config.train.eval_tasks or ()]
    for name, path in named:
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
            return json.loads(source.decode("utf-8-sig"), object_pairs_hook=_once)
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


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object's keys and values; the last of two would win without a word."""
    values: dict[Any, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} stands twice in one section; keep one")
        values[key] = value
    return values


class _Loader(yaml.SafeLoader):
    """YAML whose keys stand once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The keys and values of a node."""
        self.flatten_mapping(node)
        return _once((self.construct_object(key), self.construct_object(value, True)) for key, value in node.value)


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
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    return f", line {line}" if line is not None else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"calls exit ({error.code}); it must only return a ConfigDict"
    if isinstance(error, SyntaxError):
        return f"syntax error ({error.msg})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def check_together(config: Config) -> None:
    """Refuses values that are fine alone and impossible together, and missing required keys.

    Raises:
        InputError: naming the keys and what is allowed.
    """
    required = {"model.path": config.model.path, "data.train": config.data.train, "out": config.out}
    missing = [name for name, value in required.items() if value is None]
    if missing:
        flags = " ".join(f"--config.{name}=..." for name in missing)
        raise InputError(f"config: {', '.join(missing)} must be set, in the file or by {flags}")
    train, mesh, loss, data = config.train, config.mesh, config.loss, config.data
    attention, method = config.model.attention, config.adapter.method
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
        "optimizer.offload needs jit over a mesh; set mesh.pmap=false with it": mesh.pmap and config.optimizer.offload,
        "loss.normalize=constant needs loss.constant, the number to divide by": (
            loss.normalize == "constant" and loss.constant is None
        ),
        f"loss.roles: unknown role {''.join(map(repr, unknown_roles[:1]))}; choose from {', '.join(ROLE_SEGMENT)}": (
            unknown_roles
        ),
        f"loss.kl_weight needs a base that stays frozen, and adapter.method={method} changes it": (
            loss.kl_weight and config.adapter.config_class.changes_base
        ),
        "data.packing fills rows of one length; set data.bucketing=false with it": data.packing and data.bucketing,
    }
    for why, is_so in impossible.items():
        if is_so:
            raise InputError(f"config: {why}")
    _check_objective(config)
    _check_optimizer(config)
    if train.steps is not None:
        check_warmup(config, train.steps)
    adapter_config(config.adapter)
    check_quantize(config)


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


def _check_objective(config: Config) -> None:
    """Refuses keys of preferences that the objective doesn't use."""
    loss, objective = config.loss, config.loss.preference
    known: set[str] = set()
    if objective is not None:
        known = {"beta", "sft_weight", *objective.settings, *(("reference",) if objective.referenced else ())}
    for name in (*Settings._fields, "sft_weight", "reference"):
        if getattr(loss, name) is not None and name not in known:
            users = [key for key, entry in OBJECTIVES.items() if name in (*entry.settings, "beta", "sft_weight")]
            users = [key for key, entry in OBJECTIVES.items() if entry.referenced] if name == "reference" else users
            raise InputError(
                f"config: loss.objective={loss.objective} does not use loss.{name}, which is of {', '.join(users)}"
            )
    if objective is None:
        return
    for name in ("kl_weight", "balance_weight"):
        if getattr(loss, name):
            raise InputError(f"config: loss.{name} is of loss.objective=sft, and it is {loss.objective}")
    if config.data.truncation == "split":
        raise InputError(
            f"config: data.truncation=split makes pieces of an answer, which loss.objective={loss.objective} compares "
            "whole; set data.truncation=prompt_first"
        )


def _check_optimizer(config: Config) -> None:
    """Refuses keys that the optimizer doesn't use, and methods that it can't train."""
    optimizer, method = config.optimizer, config.adapter.config_class
    if optimizer.name == OBJECT:
        if optimizer != OptimizerConfig(name=OBJECT):
            raise InputError("config: an optimizer that is an object has its own settings; leave out optimizer.*")
        if method.restarts:
            raise InputError(
                f"config: adapter.method={config.adapter.method} lets the learning rate rise again after each restart, "
                "which an optimizer that is an object can't be told; name one by optimizer.name"
            )
        return
    rule = RULES[optimizer.name]
    for name in SETTINGS:
        if getattr(optimizer, name) is not None and name not in rule.settings:
            users = ", ".join(other for other, entry in RULES.items() if name in entry.settings)
            raise InputError(
                f"config: optimizer.name={optimizer.name} does not use optimizer.{name}, which is of {users}"
            )
    if optimizer.offload and optimizer.name != "adamw":
        raise InputError(f"config: optimizer.offload is of adamw alone, and optimizer.name={optimizer.name}")
    if rule.by_matrix and method.restarts:
        raise InputError(
            f"config: restarts prune a moment of each weight, which optimizer.name={optimizer.name} does not have; "
            f"take adamw, lion or sgd with adapter.method={config.adapter.method}"
        )
    if optimizer.name == "muon" and config.adapter.method == "full":
        raise InputError(
            "config: optimizer.name=muon makes each matrix orthogonal, and the model's kernels hold several (query, "
            "key and value; gate and up); take it with an adapter, or another with adapter.method=full"
        )


def check_warmup(config: Config, steps: int) -> None:
    """Refuses a warm-up longer than the run, and restarts that it never reaches; for when its steps are known."""
    warmup, every = config.optimizer.warmup_steps, config.adapter.restart_every
    if warmup > steps:
        raise InputError(f"config: optimizer.warmup_steps={warmup} must be at most the run's {steps} steps")
    if config.adapter.config_class.restarts and every >= steps:
        raise InputError(
            f"config: adapter.restart_every={every} must be less than the run's {steps} steps, or nothing restarts"
        )
