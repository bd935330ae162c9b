"""What the configurations of all methods have: targets, layers, modules trained whole."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mora_jax.adapters.config.limits import COUNT, NUMBERS, POSITIVE, Number

Targets = str | tuple[str, ...]
Pattern = Mapping[str, Any] | tuple[tuple[str, Any], ...]
BIASES = ("none", "lora_only", "all")
#: PEFT's names of settings, which configurations take in place of their own.
ALIASES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "trainable_token_indices": "trainable_tokens",
    "init_lora_weights": "init",
    "init_r": "rank",
    "target_r": "target_rank",
    "total_step": "total_steps",
    "deltaT": "delta_t",
    "orth_reg_weight": "orth_weight",
    "feedforward_modules": "feedforward",
}
#: Settings of PEFT, and of the fork that MoRA's authors made of it, that are none here.
INSTEAD = {
    "use_rslora": "RsLoRAConfig is rsLoRA",
    "exclude_modules": "a regular expression in targets can leave modules out",
    "task_type": "leave it out, as nothing depends on it",
    "mora_type": "kind names it: type 1 is 'sharing', type 6 'rotation'",
}


def freeze_targets(targets) -> Targets:
    """Targets as a string or a tuple of names, checked."""
    if isinstance(targets, str):
        if not targets:
            raise ValueError("targets is empty; give layer names, a regular expression or 'all-linear'")
        return targets
    names = _listed(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets must be layer names, a regular expression or 'all-linear', not {targets!r}")
    return names


def _listed(values: Any) -> tuple[Any, ...]:
    """What a list or another iterable holds; nothing of what is none, for the caller to refuse."""
    return tuple(values) if isinstance(values, Iterable) else ()


def freeze_pattern(pattern: Pattern, name: str) -> tuple[tuple[str, Any], ...]:
    """A pattern (`rank_pattern`, …) as pairs, which can be hashed; keys are regular expressions."""
    pairs = _listed(pattern.items() if isinstance(pattern, Mapping) else pattern)
    good = all(isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
    if not good or not isinstance(pattern, Iterable) or isinstance(pattern, str):
        raise ValueError(f"{name} must be numbers by regular expression, such as {{'q_proj': 16}}, not {pattern!r}")
    frozen = []
    for key, value in pairs:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name} {key!r} is no regular expression: {error}") from None
        frozen.append((key, NUMBERS[name.removesuffix("_pattern")].check(value, f"{name}[{key!r}]")))
    return tuple(frozen)


def module_names(names: Any, what: str) -> tuple[str, ...]:
    """Module names as a tuple, checked; `what` names them in the error."""
    given = (names,) if isinstance(names, str) else _listed(() if names is None else names)
    if (names and not given) or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{what} must be module names, not {names!r}")
    return given


class _Aliases(type):
    """Takes PEFT's names of settings in calls of a configuration, too."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        fields: dict[str, dataclasses.Field] = getattr(cls, "__dataclass_fields__", {})
        positional = [name for name, field in fields.items() if field.init and not field.kw_only][: len(args)]
        for alias, name in ALIASES.items():
            if alias in settings and name in fields:
                if name in settings or name in positional:
                    raise TypeError(f"{cls.__name__} takes {name} or PEFT's name for it, {alias}, not both")
                settings[name] = settings.pop(alias)
        for name in settings.keys() & INSTEAD.keys():
            raise TypeError(f"{cls.__name__} has no {name}: {INSTEAD[name]}")
        parameters = settings.pop("target_parameters", None) if "targets" in fields else None
        if parameters:  # of experts, which are targets like others here
            targets = settings.get("targets", ())
            if isinstance(targets, str) or isinstance(parameters, str) or "targets" in positional:
                raise TypeError("target_parameters is a list beside a list of targets; or name them in targets")
            settings["targets"] = (*targets, *parameters)
        return super().__call__(*args, **settings)


@dataclass(frozen=True)
class MethodConfig(metaclass=_Aliases):
    """What is asked about every method. What is no field is an attribute of the class.

    A field's metadata may say: `limits`, which numbers it takes (those of `NUMBERS` for the names in it);
    `choices`, the values allowed, and `run_choices`, those of them that a run can take;
    `training`, that the setting says how the method is trained, which an adapter's file doesn't keep; `unset`, what a
    run takes that leaves it open, in words; `by_run`, that the run says it.

    Attributes:
        changes_base: whether training changes the base itself, so that the result is a whole model.
        restarts: whether it is a `RestartConfig`.
        biases_alone: whether biases are all that is trained, as other methods do beside their layers.
        grows_with_rank: whether the trained numbers are as many as the rank times what one rank has.
        in_peft: whether PEFT has the method, or a form of it.
        scale_power: the power of the rank that alpha is divided by, for methods with alpha.
        combinable_as: what adapters have to agree in to be used beside each other; empty for a method whose can't be.
        derived_fields: fields that are no settings of a run: the method, the model or the run says them.
        starts_from_base: whether the adapter takes its start from the base's exact numbers.
    """

    changes_base: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    biases_alone: ClassVar[bool] = False
    grows_with_rank: ClassVar[bool] = False
    in_peft: ClassVar[bool] = True
    scale_power: ClassVar[float] = 1.0
    derived_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def starts_from_base(self) -> bool:
        """Whether the adapter takes its initial values from the base's exact numbers."""
        return False

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """The settings of a run with this method: its own, then those of all methods."""
        names = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in cls.derived_fields]
        return tuple(sorted(names, key=lambda name: name in CommonConfig.__annotations__))

    @classmethod
    def training_settings(cls) -> frozenset[str]:
        """Those that say how the method is trained."""
        return frozenset(name for name in cls.settings() if "training" in cls.field(name).metadata)

    @classmethod
    def field(cls, name: str) -> dataclasses.Field:
        """One field."""
        return next(field for field in dataclasses.fields(cls) if field.name == name)

    @classmethod
    def limits(cls, name: str) -> Number | None:
        """Which numbers a setting takes; None for one that is no number."""
        return cls.field(name).metadata.get("limits", NUMBERS.get(name))

    @classmethod
    def described(cls, name: str) -> str:
        """What the docstring of the class, or of one that it extends, says of a setting; empty where it says none."""
        for base in cls.__mro__:
            text = inspect.cleandoc(vars(base).get("__doc__") or "")
            match = re.search(rf"^    {name}: (.*(?:\n        .*)*)", text, re.MULTILINE)
            if match is not None:
                return " ".join(match[1].split())
        return ""

    @classmethod
    def for_run(cls, settings: Mapping[str, Any], steps: int | None) -> Any:
        """The configuration for a run.

        Args:
            settings: those that are said; the others are the method's own.
            steps: of the run; None where that is no matter.

        Raises:
            ValueError: a setting that can't be.
        """
        return cls(**settings)

    @property
    def tree_refusal(self) -> str:
        """Why this has no form where parameters are a plain tree (Linen, `mj.functional`); empty where it has one."""
        return ""

    def highest_rank(self, in_features: int, out_features: int) -> int | None:
        """The rank above which an update of a matrix of this size gains nothing; None where no rank is too high."""
        return None

    def beyond(self, title: str, in_features: int, out_features: int) -> str:
        """Says that the rank is too high for a matrix of this size, which `title` names; empty where it isn't."""
        highest = self.highest_rank(in_features, out_features)
        rank = getattr(self, "rank", 0)
        if highest is None or rank <= highest:
            return ""
        return f"rank {rank} is more than {title}, {in_features} by {out_features}, can use: {highest}"

    def warnings(self, title: str, in_features: int, out_features: int) -> list[str]:
        """What a user should know about the method on a matrix of this size, which `title` names."""
        beyond = self.beyond(title, in_features, out_features)
        return [beyond] if beyond else []

    @property
    def combinable_as(self) -> str:
        """What adapters have to agree in to be used beside each other; empty where they can't be."""
        return ""

    @property
    def details(self) -> tuple[str, ...]:
        """What a summary says of this method beside name, rank and alpha."""
        return ()


@dataclass(frozen=True, kw_only=True)
class CommonConfig(MethodConfig):
    """What every method with an adapter has.

    Attributes:
        layers_to_transform: numbers of the layers that are adapted, one number or several; None for all. The number
            of a layer is the first number in its module path; layers without one are left out.
        modules_to_save: names of modules (`"lm_head"`, `"embed_tokens"`, `"norm"`) that are trained whole, as
            float32 masters, and never adapted.
        trainable_tokens: ids of tokens whose rows of the embedding table are trained beside the adapters (PEFT's
            `trainable_token_indices`), such as those that `mj.add_tokens` gave; None for none.
    """

    layers_to_transform: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"limits": COUNT})
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"limits": COUNT})

    # Of methods without such a field. Not annotated: an annotation would fix their place among a subclass's fields.
    dropout = 0.0
    bias = "none"

    @property
    def rates(self) -> dict[str, float]:
        """Factors on the learning rate, by the name of an array of the adapter; 1 for those that aren't named."""
        return {}

    def at_path(self, path: str) -> CommonConfig:
        """The configuration for one module path, such as `"model.layers.0.self_attn.q_proj"`."""
        return self

    def __post_init__(self):
        for field in dataclasses.fields(self):
            # An annotation is a class, or its name where the file has `from __future__ import annotations`.
            self._check_field(field.name, getattr(field.type, "__name__", field.type))
        object.__setattr__(self, "targets", freeze_targets(self.targets))  # type: ignore[attr-defined]
        object.__setattr__(self, "modules_to_save", module_names(self.modules_to_save, "modules_to_save"))
        for name, what in (("layers_to_transform", "layer numbers"), ("trainable_tokens", "ids of tokens")):
            value = getattr(self, name)
            if value is not None:
                given = _listed(value) if isinstance(value, Iterable) else (value,)
                if not given or isinstance(value, str):
                    raise ValueError(f"{name} must be {what}, not {value!r}")
                # Each once: a row has one change.
                object.__setattr__(self, name, tuple(dict.fromkeys(COUNT.check(number, name) for number in given)))

    def _check_field(self, name: str, annotation: Any) -> None:
        """Checks a setting by its name and type, and makes a plain number of it."""
        value = getattr(self, name)
        choices, limits = self.field(name).metadata.get("choices"), self.limits(name)
        if choices is not None and annotation == "str":
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        elif limits is not None and annotation in ("int", "float"):
            object.__setattr__(self, name, limits.check(value, name))
        elif annotation == "bool":
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, not {value!r}")
        elif name.endswith("_pattern"):
            object.__setattr__(self, name, freeze_pattern(value, name))


@dataclass(frozen=True, kw_only=True)
class RestartConfig(CommonConfig):
    """What methods have whose adapter is merged into the base and reinitialised repeatedly, by `renew` of its class.

    Attributes:
        restart_every: steps between restarts.
        prune: share of the optimizer's moments that a restart sets to zero, the smallest in magnitude of each matrix;
            with either moment of a weight goes the other.
        restart_warmup: steps over which the learning rate rises again after a restart.
    """

    restart_every: int = dataclasses.field(default=1000, metadata={"limits": POSITIVE})
    prune: float = dataclasses.field(default=0.99, metadata={"limits": Number(at_least=0, at_most=1)})
    restart_warmup: int = dataclasses.field(default=50, metadata={"limits": COUNT})
    changes_base, restarts = True, True

    def __post_init__(self):
        super().__post_init__()
        every, warmup = self.restart_every, self.restart_warmup
        if warmup > every:  # the learning rate would still rise at the next restart
            raise ValueError(f"restart_warmup must be an integer from 0 to restart_every={every}, not {warmup!r}")

    @property
    def tree_refusal(self) -> str:
        name = type(self).__name__.removesuffix("Config")
        return f"{name} merges into the base while it trains, for which a plain tree of parameters has no place"

    @property
    def details(self) -> tuple[str, ...]:
        return (f"reinitialised every {self.restart_every} steps",)
