"""VeRA, (IA)³, AdaLoRA, BitFit, and LoRA taken from the base: both ways against real PEFT, the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from tests.models.tiny import fill_randomly, hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, hf_model
from tests.peers import peft, torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    pytest.mark.filterwarnings(
        "ignore:The following rank_pattern keys did not match:RuntimeWarning"
    ),  # PEFT's own folder
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),  # rank 0, PEFT's own
]

IDS = random_ids(2, 9)
BASES = {"llama": {}, "tied": {"tie_word_embeddings": True}, "qwen2": {}}
MASKS = ([True, False, True, True], [False, False, False, False], [False, True, False, False])


def model_type(name: str) -> str:
    return "llama" if name == "tied" else name


def hf(name: str) -> torch.nn.Module:
    return hf_model(model_type(name), **BASES[name])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: hf_folder(root / name, model_type(name), **BASES[name]) for name in BASES}


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


def prune(model: torch.nn.Module) -> torch.nn.Module:
    """Leaves AdaLoRA's triplets of `MASKS`, one mask a matrix in turn, as PEFT's allocation does."""
    pattern = {}
    for number, (name, parameter) in enumerate(model.base_model.model.named_parameters()):
        if ".lora_E." in name:
            mask = MASKS[number % 3]
            parameter.data *= torch.tensor(mask)[:, None]
            pattern[name] = mask
    model.peft_config["default"].rank_pattern = pattern
    assert any(not any(mask) for mask in pattern.values())
    return model


def from_peft(name: str, folder: Path) -> np.ndarray:
    return hf_logits(peft.PeftModel.from_pretrained(hf(name), str(folder)).eval(), IDS)


ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}
RANDLORA = {"randlora_alpha": 4}
READ = {
    "oft": ("tied", "OFTConfig", {"oft_block_size": 8, "target_modules": "all-linear"}),
    "oft by inverse, beside biases": (
        "qwen2",
        "OFTConfig",
        {"oft_block_size": 16, "target_modules": ["q_proj", "o_proj"], "use_cayley_neumann": False, "bias": "oft_only"},
    ),
    "oft of so many blocks": (
        "llama",
        "OFTConfig",
        {"r": 4, "oft_block_size": 0, "target_modules": ["v_proj", "down_proj"], "num_cayley_neumann_terms": 3},
    ),
    "oft of shared blocks": (
        "llama",
        "OFTConfig",
        {"oft_block_size": 8, "target_modules": ["up_proj"], "block_share": True, "layers_to_transform": [0, 2]},
    ),
    "hira": (
        "tied",
        "HiraConfig",
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    ),
    "hira beside biases": ("qwen2", "HiraConfig", {"r": 3, "target_modules": "all-linear", "hira_dropout": 0.1}),
    "vera": ("tied", "VeraConfig", {"r": 5, "target_modules": "all-linear", "projection_prng_key": 7}),
    "vera without projections": (
        "llama",
        "VeraConfig",
        {"r": 5, "target_modules": ["k_proj", "up_proj"], "save_projection": False},
    ),
    "vera beside biases": (
        "qwen2",
        "VeraConfig",
        {"r": 5, "target_modules": ["q_proj", "o_proj"], "bias": "vera_only", "layers_to_transform": [0, 2]},
    ),
    "ia3": ("llama", "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ia3 by expressions": (
        "tied",
        "IA3Config",
        {"target_modules": r".*\.[02]\..*(q_proj|up_proj)", "feedforward_modules": r".*up_proj"},
    ),
    "ia3 on biases": (
        "qwen2",
        "IA3Config",
        {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": ["v_proj"], "modules_to_save": ["norm"]},
    ),
    "adalora": ("llama", "AdaLoraConfig", dict(ADALORA, target_modules="all-linear")),
    "adalora beside biases": (
        "qwen2",
        "AdaLoraConfig",
        dict(ADALORA, target_modules=["q_proj", "down_proj"], bias="lora_only"),
    ),
    "adalora pruned": (
        "tied",
        "AdaLoraConfig",
        dict(ADALORA, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    ),
    "randlora": (
        "qwen2",
        "RandLoraConfig",
        {"r": 5, "target_modules": ["q_proj", "k_proj", "down_proj"], "bias": "randlora_only", "randlora_alpha": 4},
    ),
    "randlora without bases": (
        "llama",
        "RandLoraConfig",
        {"r": 7, "target_modules": "all-linear", "save_projection": False, "projection_prng_key": 3, **RANDLORA},
    ),
    "randlora of sparse bases": (
        "llama",
        "RandLoraConfig",
        {"r": 4, "target_modules": ["o_proj", "up_proj"], "sparse": True, "save_projection": False, **RANDLORA},
    ),
    "randlora of very sparse bases": (
        "tied",
        "RandLoraConfig",
        {"r": 4, "target_modules": ["k_proj", "up_proj"], "very_sparse": True, "save_projection": False, **RANDLORA},
    ),
    "miss": ("qwen2", "MissConfig", {"r": 5, "target_modules": ["q_proj", "down_proj"], "bias": "MiSS_only"}),
    "miss of form mini": (
        "llama",
        "MissConfig",
        {"r": 7, "mini_r": 4, "init_weights": "mini", "target_modules": "all-linear", "layers_to_transform": None},
    ),
    "pissa": (
        "llama",
        "LoraConfig",
        {"r": 3, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 5}},
    ),
    "olora": (
        "qwen2",
        "LoraConfig",
        {
            "r": 3,
            "target_modules": ["k_proj"],
            "init_lora_weights": "olora",
            "rank_pattern": {"layers.1.self_attn.k_proj": 2},
        },
    ),
}


@pytest.mark.peers
@pytest.mark.parametrize("case", READ)
def test_both_ways(bases, tmp_path, case):
    name, kind, fields = READ[case]
    theirs = randomize(peft.get_peft_model(hf(name), getattr(peft, kind)(task_type="CAUSAL_LM", **fields)))
    if case == "adalora pruned":
        prune(theirs)
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
    if case == "adalora pruned":
        sizes = [tensor.size for tensor in load_file(tmp_path / "theirs" / "adapter_model.safetensors").values()]
        ours = [tensor.size for tensor in load_file(tmp_path / "ours" / "adapter_model.safetensors").values()]
        assert sorted(ours) == sorted(sizes) and 0 in sizes


WRITTEN = {
    "oft": ("llama", mj.OFTConfig(8, targets=("q_proj", "down_proj"))),
    "oft by inverse": ("qwen2", mj.OFTConfig(blocks=2, use_cayley_neumann=False, modules_to_save=("norm",))),
    "hira": ("qwen2", mj.HiRAConfig(rank=3, modules_to_save=("norm",))),
    "vera": ("llama", mj.VeRAConfig(rank=5, projection_prng_key=7, layers_to_transform=(1,))),
    "ia3": ("llama", mj.IA3Config()),
    "adalora": ("qwen2", mj.AdaLoRAConfig(rank=4, target_rank=2, bias="all", targets=("q_proj",))),
    "randlora": ("qwen2", mj.RandLoRAConfig(rank=5, alpha=4.0, bias="all", targets=("k_proj", "down_proj"))),
    "randlora of sparse bases": (
        "llama",
        mj.RandLoRAConfig(rank=6, alpha=4.0, bases="sparse", projection_prng_key=7, layers_to_transform=(1,)),
    ),
    "randlora with its bases": ("llama", mj.RandLoRAConfig(rank=6, alpha=4.0, widths=(200, 300), targets=("v_proj",))),
    "miss": ("qwen2", mj.MiSSConfig(rank=6, bias="all", targets=("k_proj", "up_proj"))),
    "miss of form mini": ("tied", mj.MiSSConfig(rank=6, form="mini", mini_rank=2, layers_to_transform=(0, 2))),
    "bitfit": ("llama", mj.BitFitConfig(targets=("q_proj", "down_proj"))),
    "bitfit on biases": ("qwen2", mj.BitFitConfig(layers_to_transform=(0,), modules_to_save=("norm",))),
}


@pytest.mark.peers
@pytest.mark.parametrize("case", WRITTEN)
def test_real_peft_reads_what_was_made_here(bases, tmp_path, case):
    name, config = WRITTEN[case]
    model = load(bases[name])
    mj.attach(model, config, rngs=nnx.Rngs(0))
    start = np.asarray(model(IDS))
    fill_randomly(model)
    expected = np.asarray(model(IDS))
    assert np.abs(expected - start).max() > 1e-2
    mj.save_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(from_peft(name, tmp_path / "adapter"), expected, atol=1e-4)
    again = load(bases[name])
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-5)
    assert {entry.method for entry in adapters_of(again)} == {entry.method for entry in adapters_of(model)}
    mj.merge(again)
    np.testing.assert_allclose(np.asarray(again(IDS)), expected, atol=1e-4)


def test_a_fresh_adalora_is_written_whole(bases, tmp_path):
    model = load(bases["llama"])
    mj.attach(model, mj.AdaLoRAConfig(rank=3, target_rank=2, targets=("q_proj",)), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(3 in tensor.shape for tensor in tensors.values())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"] is None


MADE = {
    "oft": mj.OFTConfig(8, targets=("q_proj",)),
    "hira": mj.HiRAConfig(rank=3, targets=("q_proj",)),
    "vera": mj.VeRAConfig(rank=5, targets=("q_proj", "down_proj")),
    "ia3": mj.IA3Config(),
    "adalora": mj.AdaLoRAConfig(rank=3, target_rank=2, targets=("q_proj",)),
    "bitfit": mj.BitFitConfig(targets=("q_proj",)),
}


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """Config and tensors of a folder of each type."""
    found = {}
    for name, config in MADE.items():
        model = load(bases["llama"])
        mj.attach(model, config, rngs=nnx.Rngs(0))
        fill_randomly(model)
        folder = tmp_path_factory.mktemp(name) / "adapter"
        mj.save_adapter(model, folder)
        found[name] = (
            json.loads((folder / "adapter_config.json").read_text()),
            load_file(folder / "adapter_model.safetensors"),
        )
    return found


def write(folder: Path, fields: dict, tensors: dict) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def cut(part: str):
    return lambda tensors: {n: np.ascontiguousarray(t[..., :-1]) if part in n else t for n, t in tensors.items()}


def added(part: str):
    return lambda tensors: {n: t + 1 if part in n else t for n, t in tensors.items()}


BROKEN = {
    "no oft_R": ("oft", {}, without("1.self_attn.q_proj.oft_R"), r"1 targets lack tensors: .*q_proj \(oft_R\)"),
    "another size of blocks": ("oft", {"oft_block_size": 16}, None, r"shape \[4, 28\], .* \[2, 120\]"),
    "constrained rotations": ("oft", {"coft": True}, None, "coft is set, which is not supported"),
    "both sizes of oft": ("oft", {"r": 4}, None, "one of r and oft_block_size must be above 0, and the other 0"),
    "an older series": ("oft", {"peft_version": "0.17.1"}, None, "peft_version is not 0.18.0 or newer"),
    "blocks of one": ("oft", {"oft_block_size": 1}, None, "blocks of 1 of 32 inputs come to blocks of 1"),
    "no hira_B": ("hira", {}, without("1.self_attn.q_proj.hira_B"), r"1 targets lack tensors: .*q_proj \(hira_B\)"),
    "another rank of hira": (
        "hira",
        {"r": 2},
        None,
        r"shape \[3, 32\], .* \[2, 32\]",
    ),
    "a bias of hira": ("hira", {"bias": "all"}, None, "bias must be none"),
    "no projection": ("vera", {}, without("vera_A"), "save_projection is true, but vera_A are missing"),
    "a projection left unread": ("vera", {"save_projection": False}, None, "save_projection is false, but there is"),
    "a projection that is too small": (
        "vera",
        {},
        cut("vera_A"),
        r"vera_A has shape \[5, 47\], but it must be at least \[5, 48\],",
    ),
    "another rank of vera": (
        "vera",
        {"r": 4},
        None,
        r"vera_A has shape \[5, 48\], but it must be at least \[4, 48\], of rank 4",
    ),
    "no vector": ("vera", {}, without("1.self_attn.q_proj.vera_lambda_d"), r"1 targets lack tensors: .*vera_lambda_d"),
    "a bias of vera": ("vera", {"bias": "lora_only"}, None, "bias must be one of none, vera_only, all"),
    "a negative seed": (
        "vera",
        {"projection_prng_key": -2},
        None,
        "projection_prng_key must be an integer, at least 0",
    ),
    "no ia3_l": ("ia3", {}, without("2.mlp.down_proj.ia3_l"), r"1 targets lack tensors: .*down_proj \(ia3_l\)"),
    "inputs for outputs": ("ia3", {"feedforward_modules": []}, None, r"ia3_l has shape \[1, 48\], .* imply \[32, 1\]"),
    "a bias of ia3": ("ia3", {"bias": "all"}, None, "bias must be none"),
    "both in one stack": (
        "ia3",
        {"target_modules": ["k_proj"], "feedforward_modules": ["1.self_attn.k_proj"]},
        lambda t: {n: np.ones((1, 32), np.float32) if "1.self" in n else v for n, v in t.items() if "k_proj" in n},
        "k_proj is one stack, whose layers have to agree in everything but their ranks",
    ),
    "no lora_E": ("adalora", {}, without("0.self_attn.q_proj.lora_E"), r"1 targets lack tensors: .*\(lora_E\)"),
    "a mask of another length": (
        "adalora",
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}},
        None,
        "rank_pattern of .* must be a list of 3 truth values",
    ),
    "a mask that is not the file's": (
        "adalora",
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True]}},
        None,
        r"lora_A has shape \[3, 32\], but the base layer and the config imply \[2, 32\]",
    ),
    "no schedule": ("adalora", {"tinit": 990, "tfinal": 10}, None, r"tinit \+ tfinal is 1000, which must be less"),
    "dora": ("adalora", {"use_dora": True}, None, "use_dora is set, which is not supported"),
    "a lora beside its bias": (
        "bitfit",
        {},
        added("1.self_attn.q_proj.lora_A"),
        "lora_bias beside a LoRA that is not zero",
    ),
    "another's tensor": ("bitfit", {"lora_bias": False}, None, "by its config the adapter has no .*lora_B.bias"),
    "another's projection": (
        "ia3",
        {},
        lambda t: t | {"base_model.vera_A": np.zeros((2, 2), np.float32)},
        "no IA3 adapter",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(bases, made, tmp_path, case):
    kind, fields, change, message = BROKEN[case]
    config, tensors = made[kind]
    folder = write(tmp_path / "broken", config | fields, tensors if change is None else change(dict(tensors)))
    model = load(bases["llama"])
    with pytest.raises(mj.InputError, match=message) as caught:
        mj.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert not list(adapters_of(model))


@pytest.mark.parametrize("kind", MADE)
def test_names_without_prefix(bases, made, tmp_path, kind):
    config, tensors = made[kind]
    bare = {name.removeprefix("base_model.").removeprefix("model."): tensor for name, tensor in tensors.items()}
    model, again = load(bases["llama"]), load(bases["llama"])
    mj.load_adapter(model, write(tmp_path / "full", config, tensors))
    mj.load_adapter(again, write(tmp_path / "bare", config, bare))
    np.testing.assert_array_equal(np.asarray(again(IDS)), np.asarray(model(IDS)))
