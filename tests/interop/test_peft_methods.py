"""What PEFT's LoRA can carry beside two factors, both ways against real PEFT: the same logits from the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.base import FullParam
from mora_jax.adapters.sites import sites
from tests.models.tiny import fill_randomly, hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, hf_model
from tests.peers import peft, torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Found missing adapter keys while loading.*:UserWarning"),
]

IDS = random_ids(2, 9)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": hf_folder(root / "llama"),
        "qwen2": hf_folder(root / "qwen2", "qwen2"),
    }


def load(folder: Path) -> mj.models.Decoder:
    return mj.load_pretrained(folder, dtype="float32")[0]


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Moves everything that PEFT trains away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def from_peft(name: str, folder: Path) -> np.ndarray:
    """Logits in float64: in float32 both sides' rounding would add up, to 1.3e-4 with OLoRA on some processors."""
    return hf_logits(peft.PeftModel.from_pretrained(hf_model(name), str(folder)).eval().double(), IDS)


READ = {
    "rslora": ("llama", {"use_rslora": True}),
    "all biases, some layers": ("qwen2", {"target_modules": ["q_proj"], "bias": "all", "layers_to_transform": [0, 2]}),
    "dora": ("llama", {"use_dora": True}),
    "dora with rslora": ("llama", {"use_dora": True, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]}),
    "dora beside biases": ("qwen2", {"use_dora": True}),
    "ranks in one stack": (
        "llama",
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*\.2\..*v_proj": 6}, "alpha_pattern": {"v_proj": 1}},
    ),
    "ranks and dora": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "use_dora": True}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}),
    "layers": ("llama", {"layers_to_transform": [0, 2], "layers_pattern": ["layers"]}),
    "bias of adapted layers": ("qwen2", {"bias": "lora_only"}),
    "all biases": ("qwen2", {"bias": "all", "target_modules": ["q_proj", "o_proj"]}),
    "norms": ("llama", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "everything that ends in norm": ("llama", {"modules_to_save": ["norm"]}),
    "table trained whole": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "matrices trained whole": ("llama", {"modules_to_save": ["o_proj"], "target_modules": "all-linear"}),
    "table": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "head trained whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "both ends trained whole": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "fan in, fan out": ("llama", {"fan_in_fan_out": True}),
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
@pytest.mark.parametrize("case", READ)
def test_both_ways(bases, tmp_path, case):
    name, fields = READ[case]
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 10, "init_lora_weights": False} | fields
    theirs = randomize(peft.get_peft_model(hf_model(name), peft.LoraConfig(task_type="CAUSAL_LM", **config)))
    expected = hf_logits(theirs, IDS)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(bases[name])
    mj.load_adapter(model, tmp_path / "theirs")
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-4)
    mj.save_adapter(model, tmp_path / "ours")
    np.testing.assert_allclose(from_peft(name, tmp_path / "ours"), expected, atol=1e-4)
    again = load(bases[name])
    mj.load_adapter(again, tmp_path / "ours")
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-4)


WRITTEN = {
    "rslora": ("llama", mj.RsLoRAConfig(rank=3, alpha=5.0)),
    "dora": ("llama", mj.DoRAConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))),
    "patterns": ("llama", mj.LoRAConfig(rank=2, rank_pattern={r"layers\.1\..*": 5}, alpha_pattern={"up_proj": 3})),
    "all biases": ("qwen2", mj.LoRAConfig(rank=2, targets=("q_proj",), bias="all")),
    "all biases, some layers": (
        "qwen2",
        mj.LoRAConfig(rank=2, targets=("q_proj", "o_proj"), bias="all", layers_to_transform=(1,)),
    ),
    "pissa": ("llama", mj.PiSSAConfig(rank=3, alpha=5.0)),
    "olora with ranks": ("llama", mj.OLoRAConfig(rank=2, rank_pattern={r"layers\.1\..*": 4})),
    "lora_plus": ("llama", mj.LoRAPlusConfig(rank=3, alpha=5.0)),
    "norms": ("llama", mj.LoRAConfig(rank=2, modules_to_save=("norm", "post_attention_layernorm"))),
}


@pytest.mark.peers
@pytest.mark.parametrize("case", WRITTEN)
def test_real_peft_reads_what_was_made_here(bases, tmp_path, case):
    name, config = WRITTEN[case]
    model = load(bases[name])
    mj.attach(model, config, rngs=nnx.Rngs(0))
    start = np.asarray(model(IDS))
    for _, node in nnx.iter_graph(model):
        if isinstance(node, FullParam):
            node.set_value(node[...] + 0.1)
        elif isinstance(node, mj.AdapterParam):
            noise = np.random.default_rng(node.size).standard_normal(node.shape)
            node.set_value(node[...] + 0.1 * noise.astype(np.float32))
    expected = np.asarray(model(IDS))
    assert np.abs(expected - start).max() > 1e-2
    mj.save_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(from_peft(name, tmp_path / "adapter"), expected, atol=1e-4)
    again = load(bases[name])
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-4)
    mj.merge(again)
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-4)


def test_all_biases_are_trained_in_layers_that_are_left_out(bases, tmp_path):
    model, again = load(bases["qwen2"]), load(bases["qwen2"])
    config = mj.LoRAConfig(rank=2, targets=("q_proj",), bias="all", layers_to_transform=(1,))
    report = mj.attach(model, config, rngs=nnx.Rngs(0))
    assert report.trainable == 2 * (32 + 32) + 3 * (32 + 16 + 16)
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "adapter")
    names = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if name.endswith("bias")]
    assert len(names) == 9
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(np.asarray(again(IDS)), np.asarray(model(IDS)))
    base = load(bases["qwen2"])
    adapters = again.layers.self_attn.qkv_proj.adapters
    for site in sites(base.layers.self_attn.qkv_proj):  # the same biases, added to the base's
        site.add_to_bias(adapters[site.part].bias[...])
        adapters[site.part].bias[...] *= 0
    lora = mj.LoRAConfig(rank=2, targets=("q_proj",), layers_to_transform=(1,))
    mj.attach(base, lora, rngs=nnx.Rngs(0))
    adapters = [one.layers.self_attn.qkv_proj.adapters["q_proj"] for one in (base, again)]
    for name in ("lora_a", "lora_b"):
        getattr(adapters[0], name)[...] = getattr(adapters[1], name)[...]
    np.testing.assert_allclose(np.asarray(base(IDS)), np.asarray(model(IDS)), atol=1e-5)


def test_mora_with_magnitudes_returns(bases, tmp_path):
    model = load(bases["llama"])
    mj.attach(model, mj.MoRAConfig(rank=2, use_dora=True), rngs=nnx.Rngs(0))
    fill_randomly(model)
    expected = np.asarray(model(IDS))
    mj.save_adapter(model, tmp_path / "adapter")
    again = load(bases["llama"])
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-5)


@pytest.fixture
def lora(bases, tmp_path) -> Path:
    model = load(bases["qwen2"])
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj",), bias="lora_only"), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_names_without_prefix(bases, lora):
    model, again = load(bases["qwen2"]), load(bases["qwen2"])
    mj.load_adapter(model, lora)
    edit_tensors(lora, lambda tensors: {name.removeprefix("base_model.model."): t for name, t in tensors.items()})
    mj.load_adapter(again, lora)
    np.testing.assert_array_equal(np.asarray(again(IDS)), np.asarray(model(IDS)))


def test_unknown_fields_are_written_back(bases, lora, tmp_path):
    edit(lora, novelty={"a": [1]}, another=None)
    model = load(bases["qwen2"])
    with pytest.warns(UserWarning, match="unknown fields are kept, but have no effect: another, novelty"):
        mj.load_adapter(model, lora)
    mj.save_adapter(model, tmp_path / "again")
    fields = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (fields["novelty"], fields["another"]) == ({"a": [1]}, None)
    assert not any("another" in json.dumps(entry.config.targets) for entry in adapters_of(model))


BIAS = "base_model.model.model.layers.1.self_attn.{}_proj{}.bias"


@pytest.mark.parametrize(
    "fields, change, message",
    [
        ({"bias": "none"}, None, r"q_proj.base_layer.bias belongs to nothing: bias is 'none'"),
        ({"bias": "all"}, None, "the biases of 6 modules are missing"),
        ({}, lambda t: t | {BIAS.format("k", ""): np.zeros(16, np.float32)}, "belongs to nothing: bias is 'lora_only'"),
        ({}, lambda t: t | {BIAS.format("q", ".base_layer"): np.zeros(3, np.float32)}, r"shape \[3\].*imply \[32\]"),
        ({}, lambda t: t | {"lm_head.weight": np.zeros((97, 32), np.float32)}, "modules_to_save is not set"),
        ({"modules_to_save": ["norm"]}, None, "there is no tensor model.layers.0.input_layernorm.weight"),
        ({"modules_to_save": ["q_proj"]}, None, "match no layer"),
        ({"use_qalora": True}, None, "use_qalora is set, which is not supported"),
        ({"peft_type": "LOHA"}, None, r"peft_type must be one of LORA, VERA, IA3, .*, found 'LOHA'"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_refusals(bases, lora, fields, change, message):
    edit(lora, **fields)
    if change is not None:
        edit_tensors(lora, change)
    model = load(bases["qwen2"])
    with pytest.raises(mj.InputError, match=message) as caught:
        mj.load_adapter(model, lora)
    assert "\n" not in str(caught.value)
    assert not list(adapters_of(model))


@pytest.mark.peers
def test_another_table_beside_an_adapter_is_another_base(bases, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(hf_model("llama"), config).save_pretrained(tmp_path / "adapter")
    mj.load_adapter(load(bases["llama"]), tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda t: {n: v + ("base_layer" in n) for n, v in t.items()})
    with pytest.raises(mj.InputError, match=r"base_layer.weight is not the base model's"):
        mj.load_adapter(load(bases["llama"]), tmp_path / "adapter")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_head_goes_with_its_table(tmp_path):
    tied = {"tie_word_embeddings": True}
    base = hf_folder(tmp_path / "base", **tied)
    fields = {"r": 2, "target_modules": ["embed_tokens"], "init_lora_weights": False}
    loose = peft.get_peft_model(hf_model("llama", **tied), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    loose.save_pretrained(tmp_path / "loose")
    with pytest.raises(mj.InputError, match="without ensure_weight_tying PEFT leaves the head as it was"):
        mj.load_adapter(load(base), tmp_path / "loose")
    config = peft.LoraConfig(task_type="CAUSAL_LM", ensure_weight_tying=True, **fields)
    theirs = peft.get_peft_model(hf_model("llama", **tied), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(base)
    mj.load_adapter(model, tmp_path / "theirs")
    expected = hf_logits(theirs, IDS)
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-3, rtol=1e-5)
    mj.save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(hf_model("llama", **tied), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(hf_logits(loaded, IDS), expected, atol=1e-3, rtol=1e-5)
    edit_tensors(tmp_path / "ours", lambda t: {n: v + ("lm_head" in n) for n, v in t.items()})
    with pytest.raises(mj.InputError, match="the tensors of lm_head are not those of model.embed_tokens"):
        mj.load_adapter(load(base), tmp_path / "ours")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]], ids=" ".join)
def test_a_tied_table_trained_whole(tmp_path, saved):
    tied = {"tie_word_embeddings": True}
    base = hf_folder(tmp_path / "base", **tied)
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": saved}
    config = peft.LoraConfig(task_type="CAUSAL_LM", ensure_weight_tying=True, **fields)
    theirs = randomize(peft.get_peft_model(hf_model("llama", **tied), config))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(base)
    mj.load_adapter(model, tmp_path / "theirs")
    expected = hf_logits(theirs, IDS)
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-4)
    mj.save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(hf_model("llama", **tied), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(hf_logits(loaded, IDS), expected, atol=1e-4)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_that_parts_from_its_table_is_refused(tmp_path):
    tied = {"tie_word_embeddings": True}
    base = hf_folder(tmp_path / "base", **tied)
    for number, fields in enumerate(({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]})):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **({"target_modules": ["q_proj"]} | fields))
        peft.get_peft_model(hf_model("llama", **tied), config).save_pretrained(tmp_path / str(number))
        with pytest.raises(mj.InputError, match="trains lm_head alone, which the model ties to model.embed_tokens"):
            mj.load_adapter(load(base), tmp_path / str(number))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_doras_magnitude_on_a_tied_table_is_refused_both_ways(tmp_path):
    tied = {"tie_word_embeddings": True}
    base = hf_folder(tmp_path / "base", **tied)
    fields = {"r": 2, "target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True}
    theirs = peft.get_peft_model(hf_model("llama", **tied), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(mj.InputError, match="magnitude of its own, which is not supported; merge the adapter in PEFT"):
        mj.load_adapter(load(base), tmp_path / "theirs")


def test_doras_magnitude_on_a_tied_table_is_not_written(tmp_path):
    model = load(hf_folder(tmp_path / "base", tie_word_embeddings=True))
    mj.attach(model, mj.DoRAConfig(rank=2, targets=("embed_tokens",)), rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="embed_tokens has DoRA's magnitude, and the model ties its head to that"):
        mj.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    mj.merge(model)


@pytest.mark.parametrize("kind", [mj.LoRAConfig, mj.RsLoRAConfig])
def test_scalings_return_bit_for_bit(bases, tmp_path, kind):
    alphas = {"q_proj": 16 / 7, "k_proj": 1e-7, "v_proj": 1234567.8, "o_proj": 3, "gate_proj": np.pi, "up_proj": 0.1}
    config = kind(rank=7, rank_pattern={r"layers\.1\..*": 3}, alpha=20 / 3, alpha_pattern=alphas)
    model, again = load(bases["llama"]), load(bases["llama"])
    mj.attach(model, config, rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "adapter")
    mj.load_adapter(again, tmp_path / "adapter")
    before, after = ({e.path: e.params["scaling"] for e in adapters_of(one)} for one in (model, again))
    assert len(before) == 21 and before == after
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    pattern = fields["alpha_pattern"]
    assert {pattern.get(f"model.layers.0.self_attn.{name}_proj") for name in "ko"} == {1e-7, 3}
    assert all(len(repr(alpha)) < 12 for alpha in pattern.values()), "no digits beyond those of float32"


def test_strict_refuses_another_base(bases, lora):
    edit(lora, base_model_name_or_path="somebody/else")
    with pytest.raises(mj.InputError, match="made for somebody/else"):
        mj.load_adapter(load(bases["qwen2"]), lora, strict=True)
    with pytest.warns(UserWarning, match="made for somebody/else"):
        mj.load_adapter(load(bases["qwen2"]), lora)
