"""What the data settings do in a run: packs, buckets, normalisers, noise, divergence; any of them resumes exactly."""

import io
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.data import BatchPlan
from mora_jax.errors import InputError
from mora_jax.interop import load_adapter, load_pretrained
from mora_jax.training import loop
from mora_jax.training.config.load import check_together
from mora_jax.training.display import Display
from mora_jax.training.setup import Setup
from mora_jax.training.sharding.runner import JitRunner
from tests.evaluation import tiny
from tests.training.test_loop import Interrupting, config, metrics, quiet

WORDS = ("red", "blue", "green", "black", "grey")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    rows = [{"instruction": f"Say {word}", "output": f"{word} " * (count + 1)} for word in WORDS for count in range(4)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


class Starting(Display):
    """Ends a run when it has said what it will do, before anything is compiled."""

    def __init__(self):
        super().__init__(io.StringIO())

    def start(self, info):
        super().start(info)
        raise MemoryError


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


SETTINGS = {
    "packing and divergence": {
        "data__packing": True,
        "data__max_length": 192,
        "loss__normalize": "example",
        "loss__kl_weight": 0.5,
        "loss__kl_tokens": "prompt",
        "loss__mode": "wit",
    },
    "bucketing": {"data__bucketing": True, "loss__mode": "weighted", "loss__normalize": "response"},
    "micro": {"train__micro_batch_size": 2, "data__truncation": "split", "data__max_length": 96},
    "noise": {"train__neftune_alpha": 5.0, "loss__mode": "im_paper"},
    "constant": {"loss__normalize": "constant", "loss__constant": 10.0, "loss__roles": ("user",)},
}
REST = ("bucketing", "micro", "constant", "noise")


@pytest.mark.parametrize(
    "name",
    ["packing and divergence", *(pytest.param(name, marks=pytest.mark.slow) for name in REST)],
)
def test_a_killed_run_resumes_bit_for_bit(name, inputs, tmp_path):
    settings = {"train__save_every": 1, "train__keep": 1, **SETTINGS[name]}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert loop.train(config(inputs, whole, **settings), quiet()) == 0

    def die():
        raise MemoryError("as good as a kill: nothing after this line runs")

    with pytest.raises(MemoryError):
        loop.train(config(inputs, broken, **settings), Interrupting(3, die))
    assert loop.resume(str(broken), quiet()) == 0
    assert metrics(broken) == metrics(whole)
    file = "adapter/adapter_model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()
    assert all(np.isfinite(row["loss"]) for row in metrics(whole))
    if "divergence" in name:
        first, last = metrics(whole)[0], metrics(whole)[-1]
        assert abs(first["kl"]) < 1e-6 < last["kl"]


def test_a_run_with_other_data_is_not_continued(inputs, tmp_path):
    rows = inputs / "own.json"
    rows.write_text((inputs / "rows.json").read_text())
    out = tmp_path / "run"

    def die():
        raise MemoryError("as good as a kill")

    with pytest.raises(MemoryError):
        loop.train(config(inputs, out, data__train=(str(rows),)), Interrupting(4, die))
    # An answer of the same length.
    rows.write_text(rows.read_text().replace("grey grey ", "grau grau "))
    with pytest.raises(InputError, match="the checkpoint was written with data .* this run has"):
        loop.resume(str(out), quiet())


def test_packs_waste_little_and_count_each_example_once(inputs, tmp_path):
    settings = {"train__steps": None, "train__batch_size": 2, "adapter__dropout": 0.0, "train__save_every": 0}
    packed, alone = tmp_path / "packed", tmp_path / "alone"
    assert loop.train(config(inputs, packed, data__packing=True, data__max_length=256, **settings), quiet()) == 0
    assert loop.train(config(inputs, alone, data__max_length=256, **settings), quiet()) == 0
    one, other = (sum(row["trained_tokens"] for row in metrics(out)) for out in (packed, alone))
    assert one == other
    assert summary(packed)["padding"] < summary(alone)["padding"]
    assert summary(packed)["steps"] < summary(alone)["steps"]
    assert summary(packed)["compilations"] == 1
    assert summary(packed)["data_wait_seconds"] >= 0
    assert 0 < summary(packed)["trained_fraction"] < 1


class StoppedWhileCompiling(Display):
    """A stop comes while the step is compiled for the second length."""

    def waiting(self, words):
        super().waiting(words)
        if "2nd" in words:
            signal.raise_signal(signal.SIGINT)


def test_while_another_length_compiles_the_display_says_so_and_what_a_stop_does(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(JitRunner, "compile_ahead", lambda *arguments: None)  # else it may be there before it is needed
    rows = [{"instruction": "Say", "output": "red " * count} for count in (3, 4, 60, 61)]
    (inputs / "lengths.json").write_text(json.dumps(rows))
    said, out = io.StringIO(), tmp_path / "run"
    settings = {"data__bucketing": True, "data__max_length": 512, "train__batch_size": 2, "train__save_every": 1}
    run = config(inputs, out, **settings, data__train=(str(inputs / "lengths.json"),), train__steps=9)
    assert loop.train(run, StoppedWhileCompiling(said)) == 130
    lines = said.getvalue().splitlines()
    shown = [line for line in lines if "compiling for" in line]
    assert len(shown) == 2 and shown[0] != shown[1]
    for line, number in zip(shown, ("1st", "2nd"), strict=True):
        assert re.fullmatch(rf"compiling for rows of \d+ \({number} of 2 lengths\)", line)
    assert "stopping after this compilation and its step; again to stop without saving" in lines
    assert lines[-1].startswith("stopped after step")


class Recording(Display):
    """Notes which step is shown, and when a compilation begins."""

    def __init__(self):
        super().__init__(io.StringIO())
        self.events = []

    def waiting(self, words):
        self.events += [words.split()[0]] if words else []

    def step(self, row):
        self.events.append(row["step"])


def test_a_step_is_shown_before_another_length_compiles(inputs, tmp_path, monkeypatch):
    """Else its time ends anywhere in the compilation, which is left out of it: tokens a second of nothing."""
    rows = [{"instruction": "Say", "output": "red " * count} for count in (3, 4, 60, 61)]
    (inputs / "lengths.json").write_text(json.dumps(rows))
    settings = {"data__bucketing": True, "data__max_length": 512, "train__batch_size": 2, "train__save_every": 0}
    settings |= {"data__train": (str(inputs / "lengths.json"),), "train__steps": 6}
    monkeypatch.setattr(JitRunner, "compile_ahead", lambda *arguments: None)  # else it may be there before it is needed
    display = Recording()
    assert loop.train(config(inputs, tmp_path / "run", **settings), display) == 0
    lengths = [row["tokens"] for row in metrics(tmp_path / "run")]
    second = next(step for step, tokens in enumerate(lengths, 1) if tokens != lengths[0])
    assert display.events == ["compiling", *range(1, second), "compiling", *range(second, 7)]


def test_a_step_that_is_done_is_shown_before_the_next_one_is_made(inputs, tmp_path, monkeypatch):
    """Several CPU devices make a step within its call: its time is not that of two, and the last one's not nothing."""
    display = Recording()
    call = JitRunner.__call__
    monkeypatch.setattr(JitRunner, "__call__", lambda *args: display.events.append("call") or call(*args))
    settings = {"train__steps": 3, "train__save_every": 0, "mesh__data": 2}
    assert loop.train(config(inputs, tmp_path / "run", **settings), display) == 0
    assert [event for event in display.events if event != "compiling"] == ["call", 1, "call", 2, "call", 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ("data.bucketing=true would leave ", "data.packing=true would leave ")),
        ({"data__bucketing": True}, ()),
        ({"data__packing": True}, ()),
    ],
)
def test_much_padding_is_told_with_what_would_leave_less(inputs, tmp_path, changes, words):
    lengths = np.array([30, 40, 50, 60] * 20 + [500], np.int32)
    settings = {"data__max_length": 512, "train__steps": None, **changes}
    made = setup_of(config(inputs, tmp_path / "run", **settings), lengths)
    advice = made.padding_advice()
    if not words:
        assert advice is None
        return
    assert advice.startswith(f"{made.plan.padding(512):.0%} of the tokens are padding; ")
    for name, word in zip(("bucketing", "packing"), words, strict=True):
        would = setup_of(config(inputs, tmp_path / "run", **settings, **{f"data__{name}": True}), lengths)
        assert f"--config.{word}{would.plan.padding(would.batches.length):.0%}" in advice


def test_little_padding_is_not_worth_a_word(inputs, tmp_path):
    even = np.full(40, 400, np.int32)
    assert setup_of(config(inputs, tmp_path / "run", data__max_length=512), even).padding_advice() is None
    # Rows that no other way would serve better: a single batch of one short and one long row.
    odd = np.array([10, 512], np.int32)
    assert setup_of(config(inputs, tmp_path / "run", data__max_length=512), odd).padding_advice() is None


def setup_of(settings, lengths):
    """A set-up of nothing but lengths."""
    data = settings.data
    train = SimpleNamespace(lengths=lengths, max_length=data.max_length, batch_length=data.max_length)
    kinds = {"packing": data.packing, "bucketing": data.bucketing, "max_length": data.max_length}
    plan = BatchPlan(lengths, settings.train.batch_size, settings.seed, **kinds)
    return Setup(settings, None, None, None, train, None, plan, (1,) * 5)


def test_what_is_shown_names_mode_and_normaliser(inputs, tmp_path):
    display = Starting()
    settings = {"loss__mode": "weighted", "loss__prompt_weight": 0.3, "loss__normalize": "response"}
    with pytest.raises(MemoryError):
        loop.train(config(inputs, tmp_path / "run", **settings), display)
    shown = display.stream.getvalue()
    assert "weighted, prompt_weight 0.3, divided by the number of response tokens" in shown
    assert "% padding" in shown


def test_evaluation_scores_responses_and_tells_instructions_apart(inputs, tmp_path):
    out = tmp_path / "run"
    settings = {"loss__mode": "full", "data__eval_fraction": 0.2, "train__save_every": 0}
    loop.train(config(inputs, out, **settings), quiet())
    [row] = [row for row in metrics(out) if "eval_loss" in row]
    assert row["eval_prompt_loss"] > 0
    assert row["eval_tokens"] < sum(row["trained_tokens"] for row in metrics(out) if "trained_tokens" in row)


def test_noise_is_off_in_evaluation(inputs, tmp_path):
    """A learning rate of next to nothing: the evaluation then is the base model's, with noise or without."""
    found = []
    for alpha in (0.0, 50.0):
        out = tmp_path / str(alpha)
        settings = {"data__eval_fraction": 0.2, "optimizer__learning_rate": 1e-12, "train__neftune_alpha": alpha}
        loop.train(config(inputs, out, train__save_every=0, adapter__dropout=0.0, **settings), quiet())
        rows = metrics(out)
        found.append((rows[0]["loss"], rows[-1]["eval_loss"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert found[0][0] != pytest.approx(found[1][0], rel=1e-4)


def test_modes_share_the_tokens(inputs, tmp_path, monkeypatch):
    """The second run, of another mode, finds the tokens of the first."""
    monkeypatch.setenv("MORA_JAX_CACHE", str(tmp_path / "cache"))
    for mode in ("masked", "full"):
        loop.prepare(config(inputs, tmp_path / mode, loss__mode=mode))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_settings_that_exclude_each_other(inputs, tmp_path):
    for settings, words in [
        ({"loss__normalize": "constant"}, "needs loss.constant"),
        ({"loss__kl_weight": 0.1, "adapter__method": "full"}, "needs a base that stays frozen"),
        ({"data__packing": True, "data__bucketing": True}, "data.bucketing=false"),
        ({"loss__roles": ("bot",)}, "unknown role 'bot'"),
    ]:
        with pytest.raises(InputError, match=words):
            check_together(config(inputs, tmp_path / "run", **settings))


def test_a_divergence_needs_a_frozen_base(inputs, tmp_path):
    settings = {"adapter__modules_to_save": ("norm",), "adapter__dropout": 0.0, "loss__kl_weight": 0.1}
    with pytest.raises(InputError, match="needs a frozen base"):
        loop.prepare(config(inputs, tmp_path / "run", **settings))


def test_an_adapter_of_another_base(inputs, tmp_path):
    model = load_pretrained(inputs / "model", dtype="float32")[0]
    mj.attach(model, mj.LoRAConfig(rank=1), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "adapter", base_model_name_or_path="somebody/else")
    settings = {"adapter__path": str(tmp_path / "adapter"), "adapter__dropout": 0.0}
    with pytest.raises(InputError, match="was made for somebody/else"):
        loop.prepare(config(inputs, tmp_path / "run", adapter__strict=True, **settings))
    with pytest.warns(UserWarning, match="was made for somebody/else"):
        loop.prepare(config(inputs, tmp_path / "run", **settings))


def test_rows_that_are_skipped_are_reported(inputs, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": "Say red", "output": "red"})] * 8 + ['{"instruction": "no answer"}']
    path.write_text("\n".join(lines))
    display = Starting()
    with pytest.raises(MemoryError):
        loop.train(config(inputs, tmp_path / "run", data__train=str(path), data__on_error="skip"), display)
    assert "1 of 9 rows dropped: not of the format (1)" in display.stream.getvalue()


LEAVE_ADAPTERS = {name for name, method in CONFIGS.items() if not method.changes_base}
# One of nothing but biases, one of vectors, one that draws what is frozen; AdaLoRA has tests of its own.
QUICK = {"bitfit", "ia3", "randlora"}


@pytest.mark.filterwarnings("ignore:block_size 32 doesn't divide 48 inputs:UserWarning")
@pytest.mark.parametrize(
    "method",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(LEAVE_ADAPTERS)],
)
def test_every_method_trains_and_leaves_an_adapter_that_loads(method, inputs, tmp_path):
    out = tmp_path / "run"
    settings = {"adapter__method": method, "adapter__dropout": 0.0, "train__steps": 3, "train__save_every": 0}
    assert loop.train(config(inputs, out, **settings), quiet()) == 0
    model, _ = load_pretrained(inputs / "model", dtype="float32")
    ids = np.arange(12)[None] % 200
    before = model(ids)
    load_adapter(model, out / "adapter")
    assert np.abs(model(ids) - before).max() > 0
