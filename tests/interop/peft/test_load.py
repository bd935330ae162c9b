"""Adapter folders: real PEFT reads them and means the same, and they come back as they were."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.interop.peft.lora import MORA_TYPES
from tests.models.tiny import fill_randomly, hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, hf_model
from tests.peers import peft

# PEFT 0.21 asks transformers for a property whose name transformers 5 deprecates.
IDS = random_ids(2, 9)
ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("base"))


def load(folder: Path) -> mj.models.Decoder:
    return mj.load_pretrained(folder, dtype="float32")[0]


def adapted(folder: Path, config, seed: int = 0) -> mj.models.Decoder:
    model = load(folder)
    mj.attach(model, config, rngs=nnx.Rngs(0))
    fill_randomly(model, seed)
    return model


def logits(model) -> np.ndarray:
    return np.asarray(model(IDS))


def assert_same_adapters(found, expected) -> None:
    found, expected = ({entry.path: entry for entry in adapters_of(model)} for model in (found, expected))
    assert set(found) == set(expected)
    for path, entry in expected.items():
        assert (found[path].config.rank, found[path].method) == (entry.config.rank, entry.method)
        for name, array in entry.params.items():
            np.testing.assert_array_equal(found[path].params[name], array)


def edit(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def rename(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path, metadata={"format": "pt"})


@pytest.mark.peers
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), r".*\.1\..*_proj", r".*\.[02]\.mlp\..*"])
def test_real_peft_reads_our_lora(base, tmp_path, targets):
    model = adapted(base, mj.LoRAConfig(rank=3, alpha=7.0, targets=targets))
    mj.save_adapter(model, tmp_path / "adapter")
    torch_model = peft.PeftModel.from_pretrained(hf_model("llama"), str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits(model), hf_logits(torch_model.eval(), IDS), atol=1e-4)
    names = {name.replace(".default", "") for name, _ in torch_model.named_parameters() if "lora_" in name}
    assert names == set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.peers
def test_the_folder_is_what_peft_writes(base, tmp_path):
    model = adapted(base, mj.LoRAConfig(rank=3, alpha=6.0))
    mj.save_adapter(model, tmp_path / "a", base_model_name_or_path="owner/base")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(fields) <= set(peft.LoraConfig().to_dict())
    assert fields["base_model_name_or_path"] == "owner/base"
    assert fields["target_modules"] == ALL
    assert (fields["r"], fields["lora_alpha"], fields["peft_type"]) == (3, 6, "LORA")
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        key = "base_model.model.model.layers.1.self_attn.k_proj"
        assert file.get_tensor(f"{key}.lora_A.weight").shape == (3, 32)
        assert file.get_tensor(f"{key}.lora_B.weight").shape == (16, 3)
    mj.save_adapter(model, tmp_path / "b", base_model_name_or_path="owner/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.peers
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "o_proj"]},
        {"target_modules": r".*\.(gate|up)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"k_proj": 5},
        },
        {"target_modules": ["q_proj"], "alpha_pattern": {r"layers.1.self_attn.q_proj": 11}},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {},
    ],
    ids=str,
)
def test_we_read_what_peft_writes(base, tmp_path, fields):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=10, init_lora_weights=False, **fields)
    torch_model = peft.get_peft_model(hf_model("llama"), config).eval()
    torch_model.save_pretrained(tmp_path / "adapter")
    model = load(base)
    mj.load_adapter(model, tmp_path / "adapter")
    expected = hf_logits(torch_model, IDS)
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)
    mj.save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(hf_model("llama"), str(tmp_path / "again"))
    np.testing.assert_allclose(hf_logits(again.eval(), IDS), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [*MORA_TYPES.values(), "decouple", "truncation"])
def test_mora_returns(base, tmp_path, kind):
    model = adapted(base, mj.MoRAConfig(rank=4, kind=kind))
    mj.save_adapter(model, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    numbers = {name: number for number, name in MORA_TYPES.items()}
    assert fields.get("mora_type") == numbers.get(kind)
    assert fields.get("use_mora", False) == (kind in numbers)
    assert fields.get("mora_jax_kind") == (None if kind in numbers else kind)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3
    for name, tensor in tensors.items():
        assert tensor.shape[0] == tensor.shape[1]
        np.testing.assert_array_equal(tensor, tensors[name.replace("lora_B", "lora_A")])
    second = load(base)
    mj.load_adapter(second, tmp_path / "adapter")
    assert_same_adapters(second, model)
    assert {entry.config.kind for entry in adapters_of(second)} == {kind}


def test_the_authors_fields_and_matrices(base, tmp_path):
    model = adapted(base, mj.MoRAConfig(rank=4, kind="rotation", targets=("q_proj",)))
    mj.save_adapter(model, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["peft_type"], fields["target_modules"]) == (4, "LORA", ["q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    entry = next(iter(adapters_of(model)))
    stored = tensors[f"base_model.model.{entry.path}.lora_A.weight"]
    np.testing.assert_array_equal(stored, entry.params["m"])  # a compressed input a gives M a, as in torch's Linear


@pytest.mark.parametrize("part", ["_A", "_A and no prefix", "default"])
def test_other_spellings_of_keys(base, tmp_path, part):
    model = adapted(base, mj.MoRAConfig(rank=4))
    mj.save_adapter(model, tmp_path / "adapter")
    if part == "default":
        rename(tmp_path / "adapter", lambda name: name.replace(".weight", ".default.weight"))
    else:
        prefix = "base_model.model." if "no prefix" in part else ""
        rename(tmp_path / "adapter", lambda name: name.removeprefix(prefix) if "lora_A" in name else "")
    second = load(base)
    mj.load_adapter(second, tmp_path / "adapter")
    assert_same_adapters(second, model)


@pytest.mark.peers
def test_several_ranks_and_alphas(base, tmp_path):
    model = load(base)
    mj.attach(model, mj.LoRAConfig(rank=2, alpha=3.0, targets=("q_proj", "v_proj")), rngs=nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=4, alpha=9.5, targets=(r"model.layers.1.mlp.up_proj",)), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "adapter")
    torch_model = peft.PeftModel.from_pretrained(hf_model("llama"), str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(logits(model), hf_logits(torch_model, IDS), atol=1e-4)
    second = load(base)
    mj.load_adapter(second, tmp_path / "adapter")
    assert_same_adapters(second, model)


def test_several_ranks_of_mora(base, tmp_path):
    model = load(base)
    mj.attach(model, mj.MoRAConfig(rank=2, targets=("q_proj",)), rngs=nnx.Rngs(0))
    mj.attach(model, mj.MoRAConfig(rank=4, targets=("down_proj",)), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "adapter")
    second = load(base)
    mj.load_adapter(second, tmp_path / "adapter")
    assert_same_adapters(second, model)


def test_mixtures_that_one_folder_cannot_hold(base, tmp_path):
    model = load(base)
    mj.attach(model, mj.MoRAConfig(rank=2, targets=("q_proj",)), rngs=nnx.Rngs(0))
    mj.attach(model, mj.MoRAConfig(rank=2, kind="rotation", targets=("k_proj",)), rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="mora of one kind, but the model has rotation, sharing"):
        mj.save_adapter(model, tmp_path / "adapter")
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("v_proj",)), rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="one method, but the model has adapters of lora, mora"):
        mj.save_adapter(model, tmp_path / "adapter")


def test_partial_layers_return(base, tmp_path):
    model = adapted(base, mj.LoRAConfig(rank=2, targets=r".*\.1\.self_attn\.[qv]_proj"))
    mj.save_adapter(model, tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 4
    second = load(base)
    mj.load_adapter(second, tmp_path / "adapter")
    assert_same_adapters(second, model)


def test_saving_again_replaces_the_adapter_but_nothing_else(base, tmp_path):
    model = adapted(base, mj.LoRAConfig(rank=2))
    mj.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    fill_randomly(model, seed=5)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(mj.InputError, match=r"is not empty \(adapter_config.json.*overwrite=True"):
        mj.save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    mj.save_adapter(model, tmp_path / "adapter", overwrite=True)
    second = load(base)
    mj.load_adapter(second, tmp_path / "adapter")
    assert_same_adapters(second, model)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_model_without_adapter_has_nothing_to_save(base, tmp_path):
    with pytest.raises(mj.InputError, match="no adapter to save"):
        mj.save_adapter(load(base), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_dora": True}, r"targets lack tensors: .*\(lora_magnitude_vector\)"),
        ({"lora_bias": True}, r"targets lack tensors: .*\(lora_B.bias\)"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], but there is no tensor lm_head.weight"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"bias": "some"}, "bias must be one of none, lora_only, all, found 'some'"),
        ({"use_mora": True, "bias": "all"}, "bias 'all' beside MoRA is not supported"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda' changes the base weights"),
        ({"init_lora_weights": ["gaussian"]}, r"init_lora_weights \['gaussian'\] changes the base weights"),
        ({"use_rslora": "no"}, "use_rslora must be true or false, found 'no'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a path or a hub id, found 3"),
        ({"peft_type": "LOKR"}, "peft_type must be one of LORA, VERA, .*, found 'LOKR'"),
        ({"use_mora": True, "mora_type": 5}, r"mora_type must be one of \[1, 2, 3, 4, 6\], found 5"),
        ({"mora_jax_kind": "spiral"}, "mora_jax_kind must be one of"),
        ({"r": 0}, "r must be a positive integer, found 0"),
        ({"r": 5}, r"lora_A.weight has shape \[2, 32\], but the base layer and the config imply \[5, 32\]"),
        ({"lora_dropout": 1}, "lora_dropout must be a finite number, at least 0 and below 1"),
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression"),
        (
            {"target_modules": ["q_proj", "k_proj", "v_proj"]},
            r"3 targets lack tensors: .*k_proj \(lora_A, lora_B\)",
        ),
        ({"target_modules": ["nothing"]}, "match no layer"),
        ({"target_modules": ["q_proj"]}, "the tensors of 3 modules belong to no target"),
        ({"layers_to_transform": [0]}, "the tensors of 4 modules belong to no target"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 3}},
            r"layers.1.self_attn.q_proj.lora_A.weight has shape \[2, 32\], .* imply \[3, 32\]",
        ),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a layer's number"),
    ],
    ids=str,
)
def test_configs_that_are_refused(base, tmp_path, fields, message):
    mj.save_adapter(adapted(base, mj.LoRAConfig(rank=2, targets=("q_proj", "v_proj"))), tmp_path / "adapter")
    edit(tmp_path / "adapter", **fields)
    model = load(base)
    with pytest.raises(mj.InputError, match=message) as caught:
        mj.load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert not list(adapters_of(model))


def test_unknown_fields_are_warned_of_once(base, tmp_path):
    mj.save_adapter(adapted(base, mj.LoRAConfig(rank=2)), tmp_path / "adapter")
    edit(tmp_path / "adapter", novelty=1, another=None)
    with pytest.warns(UserWarning, match="unknown fields are kept, but have no effect: another, novelty") as caught:
        mj.load_adapter(load(base), tmp_path / "adapter")
    assert len(caught) == 1


def test_another_base_is_warned_of(base, tmp_path):
    model = adapted(base, mj.LoRAConfig(rank=2))
    mj.save_adapter(model, tmp_path / "adapter", base_model_name_or_path="somebody/else")
    with pytest.warns(UserWarning, match="was made for somebody/else"):
        mj.load_adapter(load(base), tmp_path / "adapter")


def test_tensors_that_do_not_fit(base, tmp_path):
    mj.save_adapter(adapted(base, mj.LoRAConfig(rank=2)), tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda name: name.replace("lora_A.weight", "lora_magnitude_vector"))
    with pytest.raises(mj.InputError, match=r"targets lack tensors: .*\(lora_A\)"):
        mj.load_adapter(load(base), tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda name: name.replace("lora_magnitude_vector", "lora_C"))
    with pytest.raises(mj.InputError, match="is no part of an adapter of a known kind"):
        mj.load_adapter(load(base), tmp_path / "adapter")


def test_one_factor_stored_twice(base, tmp_path):
    mj.save_adapter(adapted(base, mj.LoRAConfig(rank=2)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name.removeprefix("base_model.model."): t for name, t in tensors.items()}, path)
    with pytest.raises(mj.InputError, match="are the same factor"):
        mj.load_adapter(load(base), tmp_path / "adapter")


class Words(nnx.Module):
    """A model of somebody else's."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(11, 6, rngs=rngs)
        self.body = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)])
        self.out = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.body[1](self.body[0](self.table(ids))))


def test_models_of_other_people(tmp_path):
    ids = np.arange(11)
    model = Words(nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("table", "body.1", "out")), rngs=nnx.Rngs(1))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.table.lora_embedding_A"].shape == (2, 11)
    assert tensors["base_model.model.body.1.lora_A.weight"].shape == (2, 6)
    second = Words(nnx.Rngs(0))
    mj.load_adapter(second, tmp_path / "adapter")
    np.testing.assert_allclose(second(ids), model(ids), rtol=1e-6)


def test_mora_with_two_different_matrices(base, tmp_path):
    mj.save_adapter(adapted(base, mj.MoRAConfig(rank=2)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: t + 1 if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(mj.InputError, match="differ, but MoRA has one matrix"):
        mj.load_adapter(load(base), tmp_path / "adapter")


def test_incomplete_folders(base, tmp_path):
    model = load(base)
    with pytest.raises(mj.InputError, match=re.escape(f"{tmp_path / 'none'} is not a folder")):
        mj.load_adapter(model, tmp_path / "none")
    with pytest.raises(mj.InputError, match="is no adapter: there is no adapter_config.json in it"):
        mj.load_adapter(model, tmp_path)
    mj.save_adapter(adapted(base, mj.LoRAConfig(rank=2)), tmp_path / "adapter")
    mj.load_adapter(load(base), tmp_path)  # as a run directory has its own
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-7])
    with pytest.raises(mj.InputError, match="is not a complete safetensors file"):
        mj.load_adapter(model, tmp_path / "adapter")
    weights.unlink()
    with pytest.raises(mj.InputError, match="has no adapter_model.safetensors"):
        mj.load_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps({}))
    (tmp_path / "adapter" / "training_args.bin").touch()  # what trainers leave there
    with pytest.raises(mj.InputError, match=r"only pickled weights \(adapter_model.bin\).*load with peft"):
        mj.load_adapter(model, tmp_path / "adapter")


def test_names_of_compiled_modules(base, tmp_path):
    model = adapted(base, mj.LoRAConfig(rank=2, targets=("q_proj",)))
    for place in ("base_model.model.", "base_model.model.model.layers.0."):
        folder = tmp_path / place
        mj.save_adapter(model, folder)
        rename(folder, lambda name, place=place: name.replace(place, f"{place}_orig_mod."))
        again = load(base)
        mj.load_adapter(again, folder)
        assert_same_adapters(again, model)


def test_names_with_an_adapters_name(base, tmp_path):
    model = adapted(base, mj.DoRAConfig(rank=2, targets=("q_proj", "embed_tokens")))
    for name in ("default", "poet-2"):
        mj.save_adapter(model, tmp_path / name)
        rename(tmp_path / name, lambda full, name=name: re.sub(r"(lora_\w+)(?=\.weight$|$)", rf"\1.{name}", full))
        again = load(base)
        mj.load_adapter(again, tmp_path / name)
        assert_same_adapters(again, model)


def test_weights_in_several_files(base, tmp_path):
    model = adapted(base, mj.LoRAConfig(rank=2, targets=("q_proj",)))
    mj.save_adapter(model, tmp_path / "adapter")
    whole = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(whole)
    files = {name: f"adapter_model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, tmp_path / "adapter" / file)
    index = tmp_path / "adapter" / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    whole.unlink()
    again = load(base)
    mj.load_adapter(again, tmp_path / "adapter")
    assert_same_adapters(again, model)
    mj.save_adapter(again, tmp_path / "adapter", overwrite=True)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", whole.name}


def test_a_second_adapter_is_refused(base, tmp_path):
    model = adapted(base, mj.LoRAConfig(rank=2))
    mj.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(mj.InputError, match="carries an adapter already"):
        mj.load_adapter(model, tmp_path / "adapter")
