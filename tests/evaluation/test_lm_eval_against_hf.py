"""EleutherAI's harness gets from the model `mora_jax`, item by item, what its own model `hf` gives."""

import json
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from mora_jax import AdapterParam, LoRAConfig, attach, demo, load_adapter, load_pretrained, save_adapter
from mora_jax.cli.lm_eval import command_lines
from mora_jax.cli.main import main
from mora_jax.errors import InputError
from mora_jax.interop.read_adapter import bare

ours_module = pytest.importorskip("mora_jax.evaluation.lm_eval", reason="the extra lm-eval is not installed")
evaluator, task_files = (pytest.importorskip(f"lm_eval.{name}") for name in ("evaluator", "tasks"))
# The harness, and what it imports, give warnings of their own.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

ROWS = [
    {"query": "The opposite of hot is", "choices": [" cold", " warm and wet", " sun"], "gold": 0},
    {"query": "Tell me the opposite of wet. ", "choices": ["dry", "A", "B"], "gold": 0},
    {"query": "Sort these letters: " + "b a d c " * 50, "choices": [" a", " a b c d", " z"], "gold": 1},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
        "num_fewshot": 1,
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{query}}{{choices|join}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_target": "x",
        "generation_kwargs": {"until": [" the", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks of three kinds, for `include_path`."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{gold}}",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT folder of a LoRA whose update is far from zero."""
    model, _ = load_pretrained(demo.model_path(), dtype="float32")
    attach(model, LoRAConfig(rank=4, alpha=8.0), rngs=nnx.Rngs(0))
    for leaf in jax.tree.leaves(nnx.state(model, AdapterParam), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        leaf[...] = 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    save_adapter(model, folder)
    return folder


def responses(model, tasks, names=tuple(TASKS), **options):
    """What a model answered, by task and item."""
    manager = task_files.TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"batch_size": 2, "bootstrap_iters": 0, "task_manager": manager, **options}
    found = evaluator.simple_evaluate(model, tasks=list(names), **options)["samples"]
    return {name: [sample["filtered_resps"] for sample in samples] for name, samples in found.items()}


def test_items_equal_those_of_hf_with_an_adapter(tasks, adapter, tmp_path):
    base = f"pretrained={demo.model_path()},dtype=float32"
    theirs = responses("hf", tasks, model_args=f"{base},peft={adapter}", device="cpu", apply_chat_template=True)
    lm = ours_module.MoraJaxLM.create_from_arg_string(f"{base},adapter={adapter}", {"batch_size": 2})
    cache = str(tmp_path / "cache")
    ours = responses(lm, tasks, apply_chat_template=True, use_cache=cache)
    for name in ("choice", "rolling"):
        expected, got = jax.tree.flatten(theirs[name]), jax.tree.flatten(ours[name])
        assert got[0] == pytest.approx(expected[0], abs=1e-3)
        assert got[1] == expected[1]
    assert ours["answer"] == theirs["answer"]
    plain = responses(lm, tasks, ("choice",))["choice"]
    assert plain != ours["choice"]  # without the chat template

    model, tokenizer = load_pretrained(demo.model_path(), dtype="float32")
    without = ours_module.MoraJaxLM(model, tokenizer=tokenizer, batch_size=2)
    assert responses(without, tasks, ("choice",))["choice"] != plain  # without the adapter
    loaded = bare(model)
    load_adapter(loaded, adapter)
    again = responses(ours_module.MoraJaxLM(loaded, tokenizer=tokenizer, batch_size=2), tasks, ("choice",))["choice"]
    assert jax.tree.leaves(again) == pytest.approx(jax.tree.leaves(plain), abs=1e-5)
    cached = responses(lm, tasks, ("rolling",), apply_chat_template=True, use_cache=cache)["rolling"]
    assert cached == ours["rolling"]


@pytest.mark.slow
def test_the_command_compares_adapters_with_one_base(tasks, adapter, tmp_path, monkeypatch, capsys):
    loads = []
    load = ours_module.load_pretrained
    monkeypatch.setattr(
        ours_module, "load_pretrained", lambda *given, **more: loads.append(given) or load(*given, **more)
    )
    words = ["--model_args", f"pretrained={demo.model_path()},dtype=float32", "--include_path", str(tasks)]
    words += ["--tasks", "choice", "--batch_size", "4", "--output_path", str(tmp_path / "out.json")]
    assert main(["lm-eval", "--base", "--adapter", f"poet={adapter}", *words]) == 0
    assert len(loads) == 1
    written = {path.name.split("_")[1]: path for path in tmp_path.rglob("out_*.json")}
    assert written.keys() == {"base", "poet"}
    values = {name: json.loads(path.read_text())["config"]["model_args"] for name, path in written.items()}
    assert "adapter" not in values["base"] and values["poet"]["adapter"] == str(adapter)
    assert capsys.readouterr().out.count("|choice|") == 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"peft": "runs/1"}, "unknown model_args peft; an adapter folder is given as adapter="),
        ({"adapter": "nowhere"}, "nowhere is not a folder"),
        ({"batch_size": "auto"}, "batch_size must be a positive whole number, got 'auto'"),
        ({"max_length": 1000}, "max_length is 1000, but the model's context has 256 tokens"),
        ({"pretrained": None}, "model_args lack pretrained="),
        ({"device": "mps"}, "device=mps: JAX chooses"),
    ],
)
def test_model_args_that_are_refused(settings, line):
    with pytest.raises(InputError, match="^[^\n]*$") as refused, ours_module.one_base():
        ours_module.MoraJaxLM(**{"pretrained": demo.model_path(), **settings})
    assert line in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"num_beams": 4}, "num_beams=4 are not supported"),
        ({"do_sample": True}, "do_sample=True needs a temperature"),
        ({"do_sample": True, "temperature": 0.5, "top_p": 2}, "top_p must be"),
        ({"max_gen_toks": 256}, "leave room for the prompt in max_length=256"),
    ],
)
def test_generation_arguments_that_are_refused(arguments, line):
    model, tokenizer = load_pretrained(demo.model_path(), dtype="float32")
    with pytest.raises(InputError, match="^[^\n]*$") as refused:
        ours_module.MoraJaxLM(model, tokenizer=tokenizer)._plan(arguments)
    assert line in str(refused.value)


def test_samples_belong_to_their_requests_whatever_the_batch_size():
    model, tokenizer = load_pretrained(demo.model_path(), dtype="float32")
    drawn = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    prompts = ["Say the word", "Say", *["Say the word"] * 4]
    requests = [SimpleNamespace(args=(prompt, drawn)) for prompt in prompts]
    found = []
    for batch_size in (1, 2, 6):
        lm = ours_module.MoraJaxLM(model, tokenizer=tokenizer, batch_size=batch_size)
        found.append(lm.generate_until(requests, disable_tqdm=True))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 6
    lm.set_cache_hook(hook := SimpleNamespace(dbdict={}, add_partial=lambda *given: kept.append(given)))
    kept = []
    assert lm.generate_until(requests, disable_tqdm=True) == found[0] and hook.dbdict == {}
    assert sorted(text for *_, text in kept) == sorted(found[0])


def test_what_the_harness_is_called_with():
    assert command_lines(["--tasks", "x"], {}, False) == [["--tasks", "x", "--model", "mora_jax"]]
    assert command_lines(["--model=hf", "--tasks", "x"], {}, False) == [["--model=hf", "--tasks", "x"]]
    assert command_lines(["ls", "tasks"], {"a": "b"}, True) == [["ls", "tasks"]]
    _, line = command_lines(["--use_cache", "runs/c", "-o", "out/"], {"a": "b"}, True)
    assert line[-6:] == ["--model_args", '{"adapter": "b"}', "--use_cache", "runs/c_a", "--output_path", "out_a"]
    with pytest.raises(InputError, match="--config"):
        command_lines(["-C", "x.yaml"], {"a": "b"}, False)
