"""Methods by name."""

import ast
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.registry import CONFIGS, METHODS, adapter_class
from mora_jax.training.config.schema import keys


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_named_configured_and_exported(name):
    config = CONFIGS[name]()
    assert getattr(mj, type(config).__name__) is CONFIGS[name]
    if name != "full":
        assert adapter_class(config).method == name
    assert hash(config) == hash(CONFIGS[name]())


def test_every_method_has_a_line_for_editors():
    """`mora_jax` finds configurations by itself, and type checkers read them."""
    imports = [
        (node.module, name.name, name.asname)
        for node in ast.walk(ast.parse(Path(mj.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]
    for config in CONFIGS.values():
        name = config.__name__
        assert (config.__module__, name, name) in imports and name in dir(mj)


NUMBERS_OF = [
    (name, field.name, kind)
    for name, method in METHODS.items()
    for field in dataclasses.fields(method.config)
    if (kind := getattr(field.type, "__name__", field.type)) in ("int", "float")
]


@pytest.mark.parametrize(("method", "name", "kind"), NUMBERS_OF)
def test_every_number_of_every_configuration_is_checked(method, name, kind):
    make = CONFIGS[method]
    good = getattr(make(), name)
    for value in (np.int64(good), np.int32(good)) if kind == "int" else (np.float64(good), np.float64(good)):
        config = make(**{name: value})
        assert getattr(config, name) == good and type(getattr(config, name)) in (int, float)
        assert config == make() and hash(config) == hash(make())
    for value in (math.nan, math.inf, "16", True, None, 1j, -1.5, [1], jnp.ones(3)):
        if name == "d_initial" and isinstance(value, float) and value == -1.5:
            continue  # may be negative
        with pytest.raises(ValueError, match=f"^{name} must be a[^\n]* not [^\n]*$") as raised:
            make(**{name: value})
        assert len(str(raised.value)) < 160
    if kind == "int":
        with pytest.raises(ValueError, match=f"^{name} must be .*integer.*, not 2.0"):
            make(**{name: 2.0})


@pytest.mark.parametrize("method", [name for name in METHODS if hasattr(CONFIGS[name](), "alpha")])
@pytest.mark.parametrize("alpha", [0, 0.0, -1])
def test_alpha_is_above_zero(method, alpha):
    with pytest.raises(ValueError, match=f"alpha must be a positive number, not {alpha}"):
        CONFIGS[method](alpha=alpha)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mj.LoRAConfig(use_dora=1), "use_dora must be True or False, not 1"),
        (lambda: mj.MoRAConfig(use_dora="no"), "use_dora must be True or False, not 'no'"),
        (lambda: mj.LoRAConfig(targets=5), "targets must be layer names, .*, not 5"),
        (lambda: mj.LoRAConfig(modules_to_save=5), "modules_to_save must be module names, not 5"),
        (lambda: mj.LoRAConfig(layers_to_transform="1"), "layers_to_transform must be layer numbers, not '1'"),
        (lambda: mj.LoRAConfig(layers_to_transform=1.5), "layers_to_transform must be an integer, at least 0, not 1.5"),
        (lambda: mj.LoRAConfig(layers_to_transform=(True,)), "layers_to_transform must be .*, not True"),
        (lambda: mj.LoRAConfig(rank_pattern=5), "rank_pattern must be numbers by regular expression"),
        (lambda: mj.LoRAConfig(rank_pattern={3: 4}), "rank_pattern must be numbers by regular expression"),
        (lambda: mj.LoRAConfig(alpha_pattern="q=1"), "alpha_pattern must be numbers by regular expression"),
        (lambda: mj.LoRAConfig(alpha_pattern={"q": math.nan}), r"alpha_pattern\['q'\] must be a positive number"),
        (lambda: mj.IA3Config(feedforward=3), "feedforward must be layer names, not 3"),
        (lambda: mj.VeRAConfig(widths=(3,)), "widths must be a number of inputs and one of outputs"),
        (lambda: mj.ReLoRAConfig(kind="x"), "unexpected keyword"),
        (lambda: mj.LoRAConfig(use_rslora=True), "LoRAConfig has no use_rslora: RsLoRAConfig is rsLoRA"),
        (lambda: mj.LoRAConfig(task_type="CAUSAL_LM"), "LoRAConfig has no task_type: leave it out"),
        (lambda: mj.LoRAConfig(exclude_modules=["x"]), "a regular expression in targets can leave modules out"),
        (lambda: mj.MoRAConfig(mora_type=6), "kind names it: type 1 is 'sharing', type 6 'rotation'"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_line(make, words):
    with pytest.raises((ValueError, TypeError), match=words) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_pefts_names_of_settings():
    peft = mj.LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, bias="none")
    assert peft == mj.LoRAConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj"), dropout=0.1)
    assert mj.MoRAConfig(r=4, target_modules="all-linear") == mj.MoRAConfig(rank=4)
    assert dataclasses.replace(peft, rank=2).rank == 2 and peft == type(peft)(**vars(peft))
    assert mj.LoRAConfig(init_lora_weights="gaussian") == mj.LoRAConfig(init="gaussian")
    budget = mj.AdaLoRAConfig(init_r=6, target_r=3, total_step=9, deltaT=2, orth_reg_weight=0.2)
    assert budget == mj.AdaLoRAConfig(rank=6, target_rank=3, total_steps=9, delta_t=2, orth_weight=0.2)
    assert mj.IA3Config(feedforward_modules=["up"]) == mj.IA3Config(feedforward=["up"])
    for twice in (lambda: mj.LoRAConfig(rank=4, r=4), lambda: mj.LoRAConfig(4, r=4)):
        with pytest.raises(TypeError, match="LoRAConfig takes rank or PEFT's name for it, r, not both"):
            twice()
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_alpha'"):
        mj.MoRAConfig(lora_alpha=8)
    with pytest.raises(ValueError, match="rank must be a positive integer, not 0"):
        mj.LoRAConfig(r=0)


@pytest.mark.parametrize(
    ("config", "highest"),
    [
        (mj.LoRAConfig(rank=1000), 64),
        (mj.DoRAConfig(rank=65), 64),
        (mj.AdaLoRAConfig(rank=65), 64),
        (mj.HiRAConfig(rank=65), 64),
        (mj.MoRAConfig(rank=10_000), 32),
        (mj.MoRAConfig(rank=33, kind="rotation"), 32),
    ],
)
def test_a_rank_beyond_the_layer_is_said(config, highest):
    model = nnx.Dict(first=nnx.Linear(64, 64, rngs=nnx.Rngs(0)), last=nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    words = f"rank {config.rank} is more than first, 64 by 64, can use: {highest}"
    with pytest.warns(UserWarning, match=rf"^{words} \(and 1 more layers\)$") as said:
        report = mj.attach(model, config, rngs=0)
    assert said[0].filename == __file__
    assert words in report.warnings and words in " ".join(str(report).split())
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    report = mj.attach(model, dataclasses.replace(config, rank=highest), rngs=0)  # without a warning, which would fail
    assert not report.beyond


def test_numpys_integers_are_ranks_and_layers():
    config = mj.LoRAConfig(rank=np.int64(4), rank_pattern={"q": np.int32(2)}, layers_to_transform=np.arange(2))
    assert config == mj.LoRAConfig(rank=4, rank_pattern={"q": 2}, layers_to_transform=(0, 1))
    assert mj.LoRAConfig(layers_to_transform=np.int64(3)).layers_to_transform == (3,)


def test_the_command_line_has_the_same_ranges():
    for config in CONFIGS.values():
        for setting in config.settings():
            if (limits := config.limits(setting)) is not None:
                assert keys()[f"adapter.{setting}"].bounds == limits.bounds, setting


def test_keys_may_be_a_seed_or_a_key_and_nothing_else():
    def start(rngs):
        model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        mj.attach(model, mj.LoRAConfig(rank=2), rngs=rngs)
        return np.asarray(model.adapter.lora_a[...])

    expected = start(nnx.Rngs(5))
    for rngs in (5, np.int64(5), jax.random.key(5)):
        np.testing.assert_array_equal(start(rngs), expected)
    for bad in (None, "5", 1.5, True):
        with pytest.raises(TypeError, match=f"^rngs must be nnx.Rngs, a seed or a key.* not {type(bad).__name__}$"):
            start(bad)
    assert mj.LoRALinear(3, 4, rank=2, alpha=1.0, rngs=5)(np.ones((1, 3))).shape == (1, 4)
