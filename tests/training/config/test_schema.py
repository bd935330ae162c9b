"""Configuration: files, overrides, and everything that must be refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.data import MODES
from mora_jax.errors import InputError
from mora_jax.training.config.key import split_list
from mora_jax.training.config.load import check_warmup, config_from_dict, load_config, read_config_file
from mora_jax.training.config.schema import METHOD_KEYS, START, Config, LossConfig, keys, unused

REQUIRED = (("model.path", "base"), ("data.train", "rows.json"), ("out", "run"))


def config_file(tmp_path, body, name="config.py"):
    path = tmp_path / name
    path.write_text("import ml_collections\n\n\ndef get_config():\n" + "".join(f"    {line}\n" for line in body))
    return str(path)


def lines(*settings):
    return (
        "config = ml_collections.ConfigDict()",
        *(
            f"config.{name} = ml_collections.ConfigDict()"
            for name in sorted({s.split(".")[0] for s in settings if "." in s.split(" =")[0]})
        ),
        *(f"config.{setting}" for setting in settings),
        "return config",
    )


def test_defaults_are_the_documented_ones():
    config, note = load_config(None, REQUIRED)
    assert note is None
    assert (config.seed, config.out) == (0, "run")
    assert (config.adapter.method, config.adapter.rank, config.adapter.alpha) == ("lora", None, None)
    assert (config.adapter.targets, config.adapter.kind, config.adapter.dropout) == (
        None,
        "sharing",
        0.0,
    )
    assert (config.data.train, config.data.max_length, config.loss.mode) == (("rows.json",), 512, "masked")
    assert (config.train.batch_size, config.train.micro_batch_size) == (4, None)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (2e-4, 0)
    assert (config.mesh.data, config.mesh.pmap) == (-1, False)


def test_every_key_is_documented_and_its_default_is_allowed():
    for name, key in keys().items():
        assert key.doc.endswith("."), name
        assert key.check(key.default, name) == key.default, name
        assert key.describe(), name


def test_file_is_laid_over_defaults_and_overrides_over_the_file(tmp_path):
    path = config_file(
        tmp_path,
        lines("out = 'run'", "model.path = 'base'", "data.train = ('a.json', 'b.json')", "adapter.rank = 4"),
    )
    config, note = load_config(path, [("adapter.rank", "16"), ("train.steps", "7"), ("adapter.rank", "32")])
    assert note is None
    assert config.adapter.rank == 32
    assert config.train.steps == 7
    assert config.data.train == ("a.json", "b.json")
    assert config.optimizer == Config().optimizer


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("seed", "3", 3),
        ("adapter.alpha", "32", 32.0),
        ("adapter.targets", "all-linear", "all-linear"),
        ("adapter.targets", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("adapter.targets", r".*layers\.\d{1,2}\.self_attn\..*", r".*layers\.\d{1,2}\.self_attn\..*"),
        ("data.train", "a.json,b.json", ("a.json", "b.json")),
        ("data.eval", "a.json", ("a.json",)),
        ("data.eval", "none", None),
        ("train.steps", "None", None),
        ("train.micro_batch_size", "2", 2),
        ("optimizer.learning_rate", "2e-4", 2e-4),
        ("optimizer.clip_norm", "none", None),
        ("mesh.data", "-1", -1),
        ("mesh.pmap", "true", True),
        ("mesh.pmap", "False", False),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("model.path", "a folder, with a comma", "a folder, with a comma"),
    ],
)
def test_override_values(name, text, value):
    config, _ = load_config(None, (*REQUIRED, (name, text)))
    section, _, last = name.rpartition(".")
    found = getattr(getattr(config, section) if section else config, last)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("adapter.rnak", "8", ["adapter.rank"]),
        ("train.learning_rate", "8", ["optimizer.learning_rate"]),
        ("lr", "8", ["unknown key 'lr'", "did you mean 'optimizer.learning_rate'"]),
        ("zzz", "8", ["unknown key 'zzz'", "sections"]),
        ("train.data", "8", ["did you mean 'data.train'"]),
        ("adapter.zzz", "8", ["keys of adapter", "rank"]),
        ("adapter", "8", ["section", "rank"]),
        ("model.quantize", "fp4", ["model.quantize", "none, int8, nf4"]),
        ("data.packin", "true", ["unknown key", "data.packing"]),
        ("adapter.rank", "0", ["adapter.rank", "at least 1", "0"]),
        ("adapter.rank", "8.5", ["adapter.rank", "integer", "8.5"]),
        ("adapter.rank", "", ["adapter.rank", "integer"]),
        ("train.batch_size", "none", ["train.batch_size", "integer", "none"]),
        ("adapter.alpha", "nan", ["adapter.alpha", "finite"]),
        ("adapter.alpha", "0", ["above 0"]),
        ("adapter.dropout", "1", ["at least 0 and below 1"]),
        ("adapter.method", "dorra", ["must be one of lora, ", "dora, ", "dora"]),
        ("adapter.method", "Mora", ["did you mean 'mora'"]),
        ("adapter.kind", "rotate", ["sharing, rotation"]),
        ("adapter.targets", "", ["adapter.targets"]),
        ("adapter.targets", "q_proj,,v_proj", ["adapter.targets"]),
        ("data.max_length", "1", ["at least 2"]),
        ("data.eval_fraction", "1.0", ["below 1"]),
        ("data.eval_fraction", "-0.1", ["at least 0"]),
        ("loss.mode", "mask", ["masked, unmasked, full, weighted"]),
        ("loss.prompt_weight", "1.5", ["at most 1"]),
        ("loss.normalize", "exampl", ["token"]),
        ("train.steps", "0", ["at least 1"]),
        ("train.keep", "0", ["at least 1"]),
        ("train.micro_batch_size", "3", ["must divide train.batch_size=4"]),
        ("train.micro_batch_size", "8", ["must divide train.batch_size=4"]),
        ("optimizer.learning_rate", "inf", ["finite"]),
        ("optimizer.learning_rate", "-1", ["above 0"]),
        ("optimizer.learning_rate", "1e30", ["at most 10"]),
        ("optimizer.schedule", "cosin", ["did you mean 'cosine'"]),
        ("optimizer.name", "adam", ["adamw, adafactor, lion, sgd, muon", "did you mean 'adamw'"]),
        ("mesh.fsdp", "0", ["at least 1, or -1"]),
        ("mesh.tensor", "-2", ["at least 1, or -1"]),
        ("mesh.data", "0", ["at least 1, or -1"]),
        ("mesh.pmap", "maybe", ["true or false"]),
        ("seed", "-1", ["at least 0"]),
        ("out", "", ["out"]),
        ("data.format", "csv", ["messages, sharegpt"]),
    ],
)
def test_bad_overrides_name_key_value_and_what_is_allowed(name, text, words):
    with pytest.raises(InputError) as caught:
        load_config(None, (*REQUIRED, (name, text)))
    message = str(caught.value)
    assert f"--config.{name}" in message or "config:" in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "setting, words",
    [
        ("adapter.rank = True", ["adapter.rank", "integer", "True"]),
        ("adapter.rank = 8.0", ["integer", "8.0"]),
        ("adapter.rank = '8'", ["integer", "'8'"]),
        ("train.batch_size = None", ["integer"]),
        ("adapter.alpha = 'big'", ["number"]),
        ("adapter.targets = ()", ["targets"]),
        ("adapter.targets = ('q_proj', 3)", ["targets"]),
        ("data.train = 3", ["list of strings"]),
        ("mesh.pmap = 1", ["true or false"]),
        ("optimizer.lr = 1e-4", ["unknown key"]),
        ("optimzer.learning_rate = 1e-4", ["unknown key 'optimzer'"]),
        ("model = 'base'", ["model is a section"]),
        ("seed.x = 1", ["seed"]),
    ],
)
def test_bad_values_in_a_file(tmp_path, setting, words):
    path = config_file(tmp_path, lines(setting))
    with pytest.raises(InputError) as caught:
        load_config(path, REQUIRED)
    assert path in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_file_may_use_lists_integers_for_numbers_and_placeholders(tmp_path):
    body = (
        "from ml_collections import config_dict",
        "config = ml_collections.ConfigDict({'adapter': {'alpha': 8, 'targets': ['q_proj', 'k_proj']}})",
        "config.model = ml_collections.ConfigDict()",
        "config.model.path = config_dict.required_placeholder(str)",
        "print('built')",
        "return config",
    )
    config, _ = load_config(config_file(tmp_path, body), REQUIRED)
    assert config.adapter.alpha == 8.0
    assert config.adapter.targets == ("q_proj", "k_proj")
    assert config.model.path == "base"


@pytest.mark.parametrize(
    "source, words",
    [
        ("def get_config(:\n", ["line 1", "syntax error"]),
        ("x = 1\n", ["get_config"]),
        ("get_config = 3\n", ["get_config"]),
        ("def get_config(size):\n    return size\n", ["TypeError"]),
        ("def get_config():\n    return {}\n", ["dict", "ConfigDict"]),
        ("def get_config():\n    pass\n", ["NoneType"]),
        ("def get_config():\n    return 1 / 0\n", ["line 2", "ZeroDivisionError"]),
        ("import sys\nsys.exit(0)\n", ["line 2", "exit"]),
        ("def get_config():\n    raise SystemExit('no')\n", ["exit (no)"]),
        ("import no_such_module_here\n", ["ModuleNotFoundError", "no_such_module_here"]),
        ("assert False\n", ["AssertionError"]),
        ("class Odd(BaseException): pass\nraise Odd('strange')\n", ["Odd", "strange"]),
        ("x = '\x00'\n", ["null bytes"]),
    ],
)
def test_a_broken_file_is_bad_input(tmp_path, source, words):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(InputError) as caught:
        read_config_file(str(path))
    for word in [str(path), *words]:
        assert word in str(caught.value)


YAML_FILE = """\
# A comment; an empty section sets nothing.
seed: 3
out: run
data:
model:
  path: base
  dtype: none
adapter: {method: mora, targets: [q_proj, v_proj]}
optimizer:
  learning_rate: 1e-4
  clip_norm: null
loss:
  roles: user,assistant
mesh: {pmap: false}
"""


@pytest.mark.parametrize("name", ["c.yaml", "c.YML", "c.json"])
def test_a_file_that_is_no_program(tmp_path, name):
    path = tmp_path / name
    values = {
        "seed": 3,
        "out": "run",
        "data": None,
        "model": {"path": "base", "dtype": None},
        "adapter": {"method": "mora", "targets": ["q_proj", "v_proj"]},
        "optimizer": {"learning_rate": 1e-4, "clip_norm": None},
        "loss": {"roles": ["user", "assistant"]},
        "mesh": {"pmap": False},
    }
    path.write_text(json.dumps(values) if name == "c.json" else YAML_FILE)
    config, note = load_config(str(path), [("data.train", "rows.json"), ("seed", "4")])
    assert note is None
    assert (config.seed, config.model.path, config.model.dtype) == (4, "base", None)
    assert (config.adapter.method, config.adapter.targets) == ("mora", ("q_proj", "v_proj"))
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (1e-4, None)
    assert config.loss.roles == ("user", "assistant")


def test_the_config_file_of_a_run(tmp_path):
    settings = (*REQUIRED, ("adapter.method", "mora"), ("adapter.targets", r"layers\.\d{1,2}\.q,v"), ("seed", "5"))
    config, note = load_config(None, settings)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict(), indent=1))
    assert load_config(str(path)) == (config, note) and note is None
    # Only what the file says otherwise than the defaults was asked for.
    _, note = load_config(str(path), [("adapter.method", "lora"), ("adapter.alpha", "3"), ("adapter.path", "folder")])
    assert note is not None and "adapter.alpha" in note and "adapter.kind" not in note


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("c.yaml", "train:\n  steps: [1\n", ["line 3", "broken YAML"]),
        ("c.yaml", "train:\n\tsteps: 1\n", ["line 2", "broken YAML"]),
        ("c.yaml", "- train\n", ["list", "sections with keys"]),
        ("c.yaml", "text\n", ["str", "sections with keys"]),
        ("c.yaml", "train: {steps: 1}\ntrain: {epochs: 2}\n", ["'train' stands twice"]),
        ("c.yaml", "train:\n  steps: 1\n  steps: 2\n", ["'steps' stands twice"]),
        ("c.yaml", "train: {steps: many}\n", ["train.steps must be an integer", "got 'many'"]),
        ("c.yaml", "train: {steps: 2011-01-01}\n", ["train.steps must be an integer"]),
        ("c.yaml", "trian: {steps: 1}\n", ["unknown key 'trian'"]),
        ("c.yaml", "train.stepz: 1\n", ["did you mean 'train.steps'"]),
        ("c.yaml", "{a: b}: c\n", ["config file"]),
        ("c.yaml", "a: !!python/object/apply:os.system [ls]\n", ["line 1", "broken YAML"]),
        ("c.yaml", "---\nseed: 1\n---\nseed: 2\n", ["broken YAML"]),
        ("c.json", '{"train": {"steps": 1,}}', ["line 1", "broken JSON"]),
        ("c.json", "", ["line 1", "broken JSON"]),
        ("c.json", "[1]", ["list", "sections with keys"]),
        ("c.json", '{"seed": 1, "seed": 2}', ["'seed' stands twice"]),
        ("c.json", '{"seed": "1"}', ["seed must be an integer", "got '1'"]),
        ("c.json", '{"model": {"path": {"a": 1}}}', ["model.path must be a string"]),
        ("c.json", "[" * 100_000, ["config file"]),
        ("c.json", '{"seed": \xff}', ["UTF-8"]),
    ],
)
def test_a_broken_file_that_is_no_program(tmp_path, name, source, words):
    path = tmp_path / name
    path.write_bytes(source.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        load_config(str(path), REQUIRED)
    assert "\n" not in str(caught.value)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "absent.py"):
        with pytest.raises(InputError, match="can't be read"):
            read_config_file(str(path))


def test_what_a_file_prints_stays_off_stdout(tmp_path, capsys):
    read_config_file(config_file(tmp_path, ("print('hello')", "return ml_collections.ConfigDict()")))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "hello\n"


def test_required_keys_are_named_together():
    with pytest.raises(InputError, match=r"model.path, out must be set.*--config.model.path"):
        load_config(None, [("data.train", "rows.json")])


def test_json_round_trip():
    config, _ = load_config(None, (*REQUIRED, ("adapter.targets", "q_proj,v_proj"), ("optimizer.clip_norm", "none")))
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_with_foreign_content_is_refused():
    values = Config().to_dict()
    with pytest.raises(InputError, match="must be set"):
        config_from_dict(values)
    values.update(out="run", surprise=1)
    with pytest.raises(InputError, match="surprise"):
        config_from_dict(values)


@pytest.mark.parametrize(
    "settings, words",
    [
        ([("adapter.kind", "rotation")], ["adapter.kind", "adapter.method=lora"]),
        ([("adapter.method", "mora"), ("adapter.alpha", "4")], ["adapter.alpha", "adapter.method=mora"]),
        ([("adapter.method", "full"), ("adapter.rank", "4")], ["adapter.rank", "adapter.method=full"]),
        ([("adapter.path", "folder"), ("adapter.rank", "4")], ["adapter.rank", "adapter.path"]),
        ([("loss.prompt_weight", "0.5")], ["loss.prompt_weight", "loss.mode=masked"]),
        ([("train.steps", "5"), ("train.epochs", "2")], ["train.epochs", "train.steps"]),
        ([("data.eval", "e.json"), ("data.eval_fraction", "0.1")], ["data.eval_fraction"]),
        ([("train.eval_every", "5")], ["train.eval_every", "no evaluation data"]),
    ],
)
def test_unused_keys_give_one_line(settings, words):
    _, note = load_config(None, (*REQUIRED, *settings))
    assert note is not None
    assert "\n" not in note
    for word in words:
        assert word in note


@pytest.mark.parametrize("name", ["loss.end_of_turn", "loss.headers"])
def test_none_can_be_a_value_beside_no_value(name, tmp_path):
    section, _, last = name.partition(".")

    def given(text):
        return getattr(getattr(load_config(None, (*REQUIRED, (name, text)))[0], section), last)

    assert given("none") == "none" and given("unset") is None and given("null") is None
    assert keys()[name].describe().endswith(", or unset") and keys()[name].describe().count("none") == 1
    path = tmp_path / "c.yaml"
    path.write_text(f"{section}:\n  {last}: none\n")
    assert getattr(load_config(str(path), REQUIRED)[0].loss, last) == "none"
    assert load_config(None, (*REQUIRED, ("optimizer.clip_norm", "none")))[0].optimizer.clip_norm is None


def test_unused_keys_are_still_checked():
    with pytest.raises(InputError, match="prompt_weight"):
        load_config(None, (*REQUIRED, ("loss.prompt_weight", "7")))


def test_used_keys_give_no_line():
    config = dataclasses.replace(Config(), loss=dataclasses.replace(Config().loss, mode="weighted"))
    assert unused(config, {"loss.prompt_weight", "adapter.rank", "adapter.alpha"}) is None


def test_warmup_must_fit_the_run():
    with pytest.raises(InputError, match="warmup_steps=6 must be at most the run's 5"):
        load_config(None, (*REQUIRED, ("train.steps", "5"), ("optimizer.warmup_steps", "6")))
    config, _ = load_config(None, (*REQUIRED, ("optimizer.warmup_steps", "6")))
    check_warmup(config, 6)
    with pytest.raises(InputError):
        check_warmup(config, 5)


def test_lists_split_outside_brackets_only():
    assert split_list("a,b") == ("a", "b")
    assert split_list(r"x\(,y") == (r"x\(", "y")
    assert split_list("(q|k),v{1,2}") == ("(q|k)", "v{1,2}")


def test_configuration_needs_no_backend():
    code = (
        "import mora_jax.training.config.load, sys; from jax._src import xla_bridge;"
        "sys.exit(xla_bridge.backends_are_initialized())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_keys_are_those_that_the_methods_declare():
    section = {field.name: field for field in dataclasses.fields(Config().adapter)}
    assert set(METHOD_KEYS) == set(CONFIGS)
    for method, read in METHOD_KEYS.items():
        settings = read - START
        assert settings <= {field.name for field in dataclasses.fields(CONFIGS[method]) if field.init}
        assert settings <= section.keys()
        for name in settings:
            default = CONFIGS[method].field(name).default
            assert section[name].default in (None, default), (method, name)
            assert section[name].metadata["key"].doc.endswith(".")
    assert METHOD_KEYS["full"] == frozenset()
    assert {"use_dora", "init"} & METHOD_KEYS["dora"] == {"init"}
    assert METHOD_KEYS["pissa"] == METHOD_KEYS["lora"] - {"init"}
    assert METHOD_KEYS["adalora"] >= {"target_rank", "tinit"} and "total_steps" not in METHOD_KEYS["adalora"]


def test_help_says_where_methods_differ():
    known = keys()
    own = "none: the method's own, 8 (adalora 12, hira 32, miss 64, randlora 32, vera 256)"
    assert own in known["adapter.rank"].doc
    assert known["adapter.target_rank"].doc.startswith("adalora: mean rank")
    assert known["adapter.target_rank"].doc.endswith("none: two thirds of rank.")
    assert known["adapter.init"].choices == ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
    assert known["adapter.rank_pattern"].doc.endswith("given as REGEX=RANK.")


def test_unused_keys_of_the_loss_follow_its_mode():
    for name, mode in MODES.items():
        config = dataclasses.replace(Config(), loss=LossConfig(mode=name))
        for key, read in (("prompt_weight", mode.uses_prompt_weight), ("roles", mode.roles)):
            assert (unused(config, [f"loss.{key}"]) is None) == read


CONFIG_FILES = sorted((Path(__file__).parents[3] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_hold_no_unused_key(path):
    assert path.name in path.read_text().split('"""')[1], "the docstring must state the command"
    config, note = load_config(str(path), REQUIRED)
    assert note is None
    assert config.out == "run"
