"""What goes to the hub, with a hub that only listens."""

import json
from pathlib import Path

import pytest
import yaml

import mora_jax as mj
from mora_jax import demo
from mora_jax.errors import InputError
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.run.publish import model_card, push_to_hub

SUMMARY = {
    "method_settings": "lora, rank 8, alpha 16",
    "trainable_parameters": 1000,
    "total_parameters": 200_000,
    "steps": 7,
    "trained_fraction": 0.25,
    "eval_loss": 1.25,
    "eval_loss_stderr": 0.031,
    "eval_perplexity": 3.49,
    "eval_arc_accuracy": 0.5,
    "eval_arc_accuracy_stderr": 0.07,
    "eval_data": "55b8",
}


class Hub:
    """Takes what `HfApi` would send."""

    def __init__(self):
        self.files: dict[str, str] = {}
        self.calls: list[tuple] = []
        self.token: str | None = None

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        self.calls.append(("create", repo_id, private))

    def upload_folder(self, *, folder_path, repo_id, commit_message, ignore_patterns):
        names = [file.name for file in Path(folder_path).iterdir() if file.name not in ignore_patterns]
        self.calls.append(("upload", repo_id, commit_message, sorted(names)))
        for name in names:
            self.files[name] = (Path(folder_path) / name).read_bytes().decode("utf-8", "replace")
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    listening = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", listening)
    return listening


def config_of(**values):
    settings = {"model.path": "owner/base", "data.train": ("/home/me/rows.jsonl",), "out": "o"} | values
    return lay_over(Config(), [(name, value, "config") for name, value in settings.items()])


def fields_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_says_what_was_done():
    config = config_of(**{"adapter.method": "lora", "loss.mode": "full", "optimizer.name": "lion", "seed": 3})
    card = model_card(config, SUMMARY, "me/tuned", licence="mit")
    assert fields_of(card) == {
        "base_model": "owner/base",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["mora-jax", "lora", "adapter"],
    }
    for words in (
        "| method | lora, rank 8",
        "1,000 of 200,000 parameters (0.50%)",
        "25.0% of the tokens carry loss",
        "lion, learning rate 0.0002",
        "| data | rows.jsonl |",
        "nats a token | 1.25 ± 0.031 |",
        "| arc accuracy | 0.5 ± 0.07 |",
        'mj.load_adapter(model, "me/tuned")',
        "PeftModel.from_pretrained",
    ):
        assert words in card, words
    assert "/home" not in card and "55b8" not in card


def test_cards_of_mora_and_of_whole_models_say_what_loads_them(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base.\n")
    mora = model_card(config_of(**{"adapter.method": "mora", "model.path": str(tmp_path)}), {"steps": 2}, "me/m")
    assert fields_of(mora)["library_name"] == "mora-jax" and fields_of(mora)["license"] == "apache-2.0"
    assert "base_model" not in fields_of(mora) and str(tmp_path) not in mora and "Peft" not in mora
    assert "no data to evaluate on" in mora
    whole = model_card(config_of(**{"adapter.method": "full"}), SUMMARY, "me/m")
    assert fields_of(whole)["library_name"] == "transformers" and "license" not in fields_of(whole)
    assert 'AutoModelForCausalLM.from_pretrained("me/m")' in whole and "not stated" in whole


@pytest.mark.slow
def test_a_run_and_its_result_are_pushed_alike(hub, tmp_path):
    rows = [{"prompt": "What is the capital of France?", "completion": "Paris"}] * 8
    options = {"eval_rows": rows[:4], "steps": 1, "batch_size": 2, "config": {"data.max_length": 32}}
    result = mj.finetune(demo.model_path(), rows, mj.LoRAConfig(rank=2), out=tmp_path / "run", **options)
    assert result.push_to_hub("me/tuned", token="secret") == "https://hub/me/tuned"
    assert hub.token == "secret"
    first, hub.files = hub.files, {}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= first.keys()
    assert "±" in first["README.md"] and "lora, rank 2" in first["README.md"]
    assert str(tmp_path) not in first["README.md"]
    assert mj.push_to_hub(tmp_path / "run", "me/tuned", private=True) == "https://hub/me/tuned"
    assert hub.files["README.md"] == first["README.md"]
    assert hub.files["adapter_model.safetensors"] == first["adapter_model.safetensors"]
    assert json.loads(hub.files["adapter_config.json"])["r"] == 2
    assert ("create", "me/tuned", True) in hub.calls
    with pytest.raises(InputError, match="OWNER/NAME"):
        mj.push_to_hub(tmp_path / "run", "tuned")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match="has not ended"):
        push_to_hub(tmp_path / "run", "me/tuned")


def test_what_the_hub_refuses_is_one_line(monkeypatch, tmp_path):
    def refuse(self, *args, **options):
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    from mora_jax.training.run.publish import upload

    with pytest.raises(InputError, match=r"me/m could not be written to the hub: 401 Client Error; log in"):
        upload(tmp_path, "me/m", "card", private=None, token=None, commit_message="")
