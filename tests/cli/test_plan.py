"""`mora-jax plan`, with a folder that holds a config.json alone."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mora_jax.cli.main import main
from mora_jax.planning import advice
from mora_jax.planning.collectives import Collective
from mora_jax.planning.tpu_compile import Compiled, CompilerError
from mora_jax.training.config.schema import Config, lay_over
from tests.models.tiny import LLAMA

KEYS = ["--config.data.max_length=64", "--config.train.batch_size=8", "--config.train.steps=3600"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(advice, "has_libtpu", lambda: False)


def plan_of(method: str):
    config = lay_over(Config(), [("adapter.method", method, "test"), ("train.steps", 2, "test")])
    return SimpleNamespace(config=config, trainable=1000, tokens=64)


def planned(capsys, *argv: str) -> tuple[dict, str]:
    assert main(["plan", "--json", *argv]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_json_without_a_compiler(model, capsys):
    found, _ = planned(capsys, "--model", model, "--accelerator", "v5e-8", "--price", "2", *KEYS)
    own = found["configured"]
    assert found["chips"] == 8 and own["fits"] and own["figures_by"] == "formula"
    assert any("libtpu" in note for note in found["notes"])
    capacity, rate = found["hints"]
    assert f"{found['trainable_parameters']:,} trained parameters" in capacity
    assert rate.startswith("learning rate: the best rates of LoRA")
    assert own["settings"]["mesh.data"] == 8
    assert own["total_bytes"] == pytest.approx(sum(own["bytes"].values()))
    fast, slow = own["step_seconds"]
    assert 0 < fast < slow and own["hours"] == pytest.approx([fast, slow])
    assert own["cost"] == pytest.approx([16 * fast, 16 * slow])
    assert own["tokens_per_second"] == pytest.approx([8 * 64 / slow, 8 * 64 / fast])
    best = found["recommended"]
    assert best["fits"] and sum(best["step_seconds"]) <= sum(own["step_seconds"]) * 1.02
    assert own["quantisation"].startswith("none") and best["settings"]["model.quantize"] == "none"


@pytest.mark.parametrize(
    ("method", "source"),
    [("lora", "LoRA Without Regret"), ("mora", "docs/studies/rates/quick"), ("dora", "was not measured here")],
)
def test_hints_on_rates_name_their_source(method, source):
    rates = [hint for hint in advice.hints(plan_of(method)) if hint.startswith("learning rate: ")]
    assert len(rates) == 1 and source in rates[0]


@pytest.mark.parametrize(("method", "pairs"), [("lora", r"LoRA .*? over full"), ("mora", r"MoRA (\w+) .*? over LoRA")])
def test_hints_on_rates_are_those_of_the_study(method, pairs):
    """The lowest and the highest ratio of best rates, each with its widest range."""
    page = (Path(__file__).parents[2] / "docs/studies/rates/quick/conclusion.md").read_text(encoding="utf-8")
    found = re.findall(rf"^\| ({pairs}.*?) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$", page, re.MULTILINE)
    groups = {}
    for _, *kind, ratio, low, high in found:
        groups.setdefault(tuple(kind), {}).setdefault(float(ratio), []).append((float(low), float(high)))
    hint = " ".join(advice.hints(plan_of(method)))
    for ratios in groups.values():
        for ratio in (min(ratios), max(ratios)):
            low, high = max(ratios[ratio], key=lambda ends: ends[1] / ends[0])
            assert f"{ratio:g} ({low:g} to {high:g})" in hint
    assert len(groups) == (1 if method == "lora" else 2)


def test_table_for_gpus(model, capsys):
    assert main(["plan", "--model", model, "--accelerator", "h100x2", "--config.adapter.method=full", *KEYS]) == 0
    out = capsys.readouterr().out
    for words in (
        "2 × h100",
        "frozen weights",
        "total",
        "fits",
        "all-reduce",
        "tokens/s a chip",
        "no compiler for GPUs",
    ):
        assert words in out
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_what_does_not_fit_names_a_slice_that_would(capsys):
    keys = ["--config.adapter.method=full", "--config.data.max_length=1024", "--config.train.batch_size=4"]
    found, _ = planned(capsys, "--model", "llama3-8b", "--accelerator", "v5e-4", "--tries", "0", *keys)
    assert not found["configured"]["fits"] and found["recommended"] is None
    assert found["smallest_that_fits"] in ("v5e-16", "v5e-32")
    assert "doesn't fit" in found["verdict"] and found["smallest_that_fits"] in found["verdict"]


def test_the_compilers_figures_take_the_place_of_the_formulas(model, capsys, monkeypatch):
    keys = [*KEYS, "--config.mesh.tensor=2", "--config.train.micro_batch_size=1"]
    answers = [
        Compiled(False, 1.0, 40e9),
        Compiled(True, 2.0, 6e9, 3 * 10**9, 10**9, 10**9, 10**9, 0, (Collective("all-gather", 7, 1e9),)),
    ]
    monkeypatch.setattr(advice, "has_libtpu", lambda: True)
    monkeypatch.setattr("mora_jax.planning.plan.compile_elsewhere", lambda *_: answers.pop(0))
    found, err = planned(capsys, "--model", model, "--accelerator", "v5e-4", *keys)
    assert any("2 of the 4 chips work" in note for note in found["notes"])
    own, best = found["configured"], found["recommended"]
    assert own["figures_by"] == "compiled" and not own["fits"] and own["total_bytes"] == 40e9
    assert best["figures_by"] == "compiled" and best["total_bytes"] == pytest.approx(6e9)
    assert best["collectives"] == [{"kind": "all-gather", "count": 7, "bytes": 1e9, "beside": 1}]
    assert "compiling for v5e:2x2" in err


def test_why_chips_are_idle(model, capsys):
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in (("data", 1), ("fsdp", 2))]
    found, _ = planned(capsys, "--model", model, "--accelerator", "v5e-4", *KEYS, *mesh)
    assert "as configured, 2 of the 4 chips work: the mesh names 2" in found["notes"]


def test_a_compiler_that_fails_leaves_the_formula(model, capsys, monkeypatch):
    def broken(*_):
        raise CompilerError("no such target")

    monkeypatch.setattr(advice, "has_libtpu", lambda: True)
    monkeypatch.setattr("mora_jax.planning.plan.compile_elsewhere", broken)
    found, _ = planned(capsys, "--model", model, "--accelerator", "v5e-1", *KEYS)
    assert found["configured"]["figures_by"] == "formula"
    assert any("no such target" in note for note in found["notes"])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--accelerator", "v5e-9", "--model", "llama3-8b"], "did you mean v5e-8"),
        (["--accelerator", "v5e-8"], "no model"),
        (["--accelerator", "v5e-8", "--model", "llama3-8"], "did you mean llama3-8b"),
        (["--accelerator", "v5e-8", "--model", str(Path(__file__).parent)], "has no config.json"),
        (["--accelerator", "v5e-8", "--model", "llama3-8b", "--config.mesh.fsdp=3"], "can't be laid out"),
        (["--accelerator", "v5e-8", "--model", "llama3-8b", "--config.mesh.data=8"], "can't share 4 rows"),
        (["--accelerator", "v5e-8", "--model", "llama3-8b", "--config.mesh.pmap=true"], "mesh.pmap"),
        (["--accelerator", "v5e-1", "--model", "llama3-8b", "--config.adapter.path=x"], "adapter.path"),
        (["--accelerator", "v5e-1", "--model", "llama3-8b", "--config.adapter.targets=zz"], "adapter: "),
        (["--accelerator", "v5e-1", "--model", "llama3-8b", "--config.nonsense=1"], "unknown key"),
        (["--model", "llama3-8b"], "--accelerator"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    assert main(["plan", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1
