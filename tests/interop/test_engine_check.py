"""Folders that other programs take, and one finding for each thing that they drop, refuse or misread."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.cli.check import ENGINE_NAMES
from mora_jax.interop.convert.convert import convert_to_lora
from mora_jax.interop.engine_check import ENGINES, check_folder as check
from mora_jax.interop.load import load_shapes
from tests.interop.test_load import write_tokenizer
from tests.models.tiny import fill_randomly, hf_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    model = load_shapes(base)
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "up_proj")), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def check_folder(folder, engine="vllm", **more) -> list[str]:
    """The findings in words."""
    return [finding.words for finding in check(folder, engine, **more).findings]


def edit(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_our_adapters_pass(adapter):
    assert check_folder(adapter) == []


def test_lifted_mora_passes_although_its_ranks_differ(base, tmp_path):
    model = load_shapes(base)
    mj.attach(model, mj.MoRAConfig(rank=1), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "mora")
    (refusal,) = check_folder(tmp_path / "mora", model=str(base))  # as a whole, not matrix by matrix
    assert "it is a MoRA" in refusal
    convert_to_lora(model)
    mj.save_adapter(model, tmp_path / "lifted")
    fields = json.loads((tmp_path / "lifted" / "adapter_config.json").read_text())
    assert fields["rank_pattern"], "the matrices have different sides"
    assert check_folder(tmp_path / "lifted") == []


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "VERA"}, "peft_type is VERA, which vLLM does not load"),
        ({"r": 513}, "max_lora_rank goes up to 512"),
        ({"target_modules": None}, "lacks target_modules"),
        ({"r": None}, "lacks r, which vLLM requires"),
        ({"lora_alpha": None}, "lacks lora_alpha, which vLLM requires"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"rank_pattern": {"q_proj": 513}}, "max_lora_rank goes up to 512"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    ],
    ids=str,
)
def test_fields(adapter, fields, words):
    edit(adapter, **fields)
    assert any(words in finding for finding in check_folder(adapter))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"alpha_pattern": {"q_proj": 4}}, "q_proj is scaled by 2, but SGLang reads no patterns and would scale by 8"),
        ({"r": 1, "rank_pattern": {".*": 2}}, "rank 2 above r 1"),
    ],
)
def test_patterns_are_read_by_some(adapter, fields, words):
    edit(adapter, **fields)
    layers = [finding for finding in check_folder(adapter, "sglang") if words in finding]
    # Printed, what is the same in every layer is one line.
    lines = [line for line in str(check(adapter, "sglang")).splitlines() if words in line]
    assert 0 < len(lines) < len(layers) and all(line.endswith(" like it)") for line in lines)
    assert check_folder(adapter, "vllm") == []


@pytest.mark.parametrize("engine", ["peft", "vllm"])
@pytest.mark.parametrize(
    "fields",
    [
        {"r": "2"},
        {"r": 0},
        {"lora_alpha": float("nan")},
        {"target_modules": 3},
        {"target_modules": "(q_proj"},
        {"rank_pattern": [1]},
        {"layers_to_transform": "1"},
    ],
    ids=str,
)
def test_fields_of_another_kind_are_bad_input(adapter, engine, fields):
    edit(adapter, **fields)
    with pytest.raises(mj.InputError, match=f"adapter_config.json: {next(iter(fields))} .*(must be|is not)"):
        check(adapter, engine)


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t | {"base_model.model.lm_head.weight": np.zeros((2, 2))}, "is no LoRA weight by its name"),
        (lambda t: {n: v for n, v in t.items() if n != f"{KEY}.lora_B.weight"}, "has lora_A alone"),
        (lambda t: t | {f"{KEY}.lora_A.weight": np.zeros((3, 32), np.float32)}, "has factors [3, 32] and [32, 2]"),
        (lambda t: {n.replace("q_proj", "c_attn"): v for n, v in t.items()}, "c_attn is none of the modules"),
        (lambda t: {n.replace(".weight", ".default.weight"): v for n, v in t.items()}, "by its name"),
    ],
)
def test_tensors(adapter, change, words):
    edit_tensors(adapter, change)
    assert any(words in finding for finding in check_folder(adapter))


def test_types_that_are_not_known_are_not_called_good(adapter):
    edit(adapter, peft_type="LOKR")
    with pytest.raises(mj.InputError, match="peft_type must be one of LORA, .*, found 'LOKR'"):
        check(adapter, "peft")
    assert check(adapter, "vllm").used == ()


def test_what_peft_leaves_fresh_or_refuses(adapter):
    edit(adapter, r=3)
    found = check(adapter, "peft")
    assert found.used == () and "has rank 2, and adapter_config.json says 3" in str(found)
    save_file({}, adapter / "adapter_model.safetensors")
    found = check(adapter, "peft")
    assert not found.good and "there are no factors" in str(found) and "uses 0 of 0 tensors" in str(found)


def test_missing_and_broken_weights(adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(mj.InputError, match="not a complete safetensors file"):
        check(adapter)
    weights.unlink()
    with pytest.raises(mj.InputError, match=r"adapter_model.safetensors"):
        check(adapter)
    with pytest.raises(mj.InputError, match=r"neither adapter_config.json nor config.json"):
        check_folder(tmp_path)


def test_merged_models(base, tmp_path):
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.save_pretrained(model, tmp_path / "merged", max_shard_bytes=20_000)
    assert check_folder(tmp_path / "merged") == ["there are no tokenizer files; vLLM needs them"]
    write_tokenizer(tmp_path / "merged")
    assert check_folder(tmp_path / "merged") == []
    (tmp_path / "merged" / "more.safetensors").write_bytes(
        next((tmp_path / "merged").glob("model-00001*")).read_bytes()
    )
    assert check_folder(tmp_path / "merged") == ["more.safetensors is not in the index; vLLM would leave it out"]
    next((tmp_path / "merged").glob("model-00002*")).unlink()
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float8", "architectures": None}))
    findings = check_folder(tmp_path / "merged")
    assert [words in "\n".join(findings) for words in ("weights: ", "'float8'", "no architectures")] == [True] * 3


def test_engines_and_what_the_command_offers():
    assert tuple(ENGINES) == ENGINE_NAMES


@pytest.mark.parametrize(
    "engine, fields, words",
    [
        ("sglang", {"target_modules": ".*q_proj"}, "takes a list, or all-linear"),
        ("sglang", {"use_rslora": True}, "scales by lora_alpha / r all the same"),
        ("llama.cpp", {"use_rslora": True}, "scales by lora_alpha / r all the same"),
        ("llama.cpp", {"alpha_pattern": {"q_proj": 4}}, "scaled by 2, but llama.cpp reads no patterns"),
        (
            "llama.cpp",
            {"modules_to_save": ["lm_head"]},
            "modules_to_save is ['lm_head'], which llama.cpp",
        ),
        ("transformers", {"peft_type": "VERA"}, "peft_type is VERA, which transformers does not load"),
        ("peft", {"use_mora": True}, "it is a MoRA, which PEFT does not have"),
        ("peft", {"target_modules": ["up_proj"]}, "target_modules does not name model.layers.0.self_attn.q_proj"),
    ],
    ids=str,
)
def test_other_engines(adapter, engine, fields, words):
    assert check_folder(adapter, engine) == []
    edit(adapter, **fields)
    assert any(words in finding for finding in check_folder(adapter, engine))


def test_used_tensors_values_and_the_base(adapter, base, tmp_path):
    other = f"{KEY}.lora_A.weight"
    edit_tensors(adapter, lambda t: {n: np.full_like(v, np.nan) if n == other else v for n, v in t.items()})
    found = check(adapter, "peft", model=str(base))
    assert (found.not_finite, found.good) == ((other,), False)
    assert all(".lora_B." in name for name in found.zeros) and len(found.zeros) == len(found.tensors) / 2
    numbers = sum(v.size for v in load_file(adapter / "adapter_model.safetensors").values())
    model = sum(v.size for v in load_file(base / "model.safetensors").values())
    assert (found.trained, found.same_base) == (numbers, True)
    assert found.share == pytest.approx(numbers / (numbers + model))
    edit_tensors(adapter, lambda t: {n.replace("layers.0", "layers.7"): v for n, v in t.items()})
    found = check(adapter, "peft", model=str(base))
    lost = [name for name in found.tensors if "layers.7" in name]
    assert lost and set(found.tensors) - set(found.used) == set(lost)
    edit(adapter, base_model_name_or_path="somebody/else")
    assert check(adapter, "vllm", model=str(base)).same_base is False


def _mutations():
    import torch

    def renamed(one, other):
        return lambda t: {n.replace(one, other): v for n, v in t.items()}

    extra = "base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight"
    return {
        "plain": lambda t: t,
        "a module that is no target": lambda t: t | {extra: torch.zeros(2, 32)},
        "no prefix": renamed("base_model.model.", ""),
        "the name of an adapter": renamed(".weight", ".default.weight"),
        "one factor is missing": lambda t: {n: v for n, v in t.items() if n != f"{KEY}.lora_B.weight"},
    }


@pytest.mark.peers
def test_the_real_loader_refuses_another_rank(adapter, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    edit(adapter, r=3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


@pytest.mark.peers
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", ["plain", "a module that is no target", "no prefix", "the name of an adapter"])
def test_what_is_dropped_is_what_the_real_loaders_drop(case, dora, base, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
    from safetensors import torch as files
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(base)

    settings = LoraConfig(r=2, use_dora=dora, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(load(), settings).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    files.save_file(_mutations()[case](files.load_file(path)), path)
    model = PeftModel(load(), settings)
    fresh = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "a")))
    kept = [
        name for name, value in model.state_dict().items() if "lora_" in name and bool((value == fresh[name]).all())
    ]
    found = check(tmp_path / "a", "peft")
    # Every tensor that is used changes one of the model's, whose random start is another.
    assert len(found.used) == len(fresh) - len(kept)
    info = load().load_adapter(str(tmp_path / "a"))
    assert len(found.tensors) - len(check(tmp_path / "a", "transformers").used) == len(info.unexpected_keys)
