"""An adapter and the base that restarts changed, as files: our own, and those of the MoRA authors' script."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.sites import sites
from mora_jax.interop.convert.convert import convert_to_lora
from mora_jax.interop.peft.load import needs_base
from mora_jax.interop.read_adapter import read_adapter
from mora_jax.models import init_decoder
from mora_jax.training.relora import renewed
from mora_jax.training.state import Structure, flat_arrays
from tests.models.tiny import LLAMA, fill_randomly, random_ids
from tests.models.tiny_torch import hf_logits, load_torch
from tests.peers import peft

IDS = random_ids(2, 9)
SMALL = LLAMA | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    mj.save_pretrained(init_decoder(SMALL, nnx.Rngs(0), dtype="float32"), folder)
    return folder


def load(folder: Path, adapter: Path | None = None, **reading):
    model = mj.load_pretrained(folder, dtype="float32")[0]
    if adapter is not None:
        mj.load_adapter(model, adapter, **reading)
    return model


def restarted(base: Path, config, times: int):
    """A model as training has it after some restarts: another base, and adapters that are not zero."""
    model = load(base)
    mj.attach(model, config, rngs=nnx.Rngs(0))
    for number in range(times):
        fill_randomly(model, number)
        graphdef, adapters, frozen = mj.partition(model)
        structure, trained, rest = Structure(graphdef, adapters, frozen), flat_arrays(adapters), flat_arrays(frozen)
        changed, base_changed = renewed(structure, trained, rest, jax.random.key(number))
        model = structure.model(trained | changed, rest | base_changed)
    model.name_or_path = str(base)
    fill_randomly(model, 9)
    return model


@pytest.fixture(scope="module")
def remora(base):
    """After two restarts, of the third kind."""
    return restarted(base, mj.ReMoRAConfig(rank=2), 2)


def logits(model) -> np.ndarray:
    return np.asarray(model(IDS))


def test_an_adapter_goes_with_its_base(base, remora, tmp_path):
    folder = tmp_path / "run"
    mj.save_adapter(remora, folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["use_mora"], fields["mora_type"]) == (True, 3)
    assert needs_base(folder)
    model = load(base, folder, strict=True)
    np.testing.assert_allclose(logits(model), logits(remora), atol=1e-5)
    mj.save_adapter(model, folder, overwrite=True)  # again, and in the place of the first
    model = load(base, folder)
    np.testing.assert_allclose(logits(model), logits(remora), atol=1e-5)
    mj.merge(model)
    np.testing.assert_allclose(logits(model), logits(remora), atol=1e-4)
    assert (folder / "base-model").stat().st_mode & 0o777 == folder.stat().st_mode & 0o777


@pytest.mark.peers
def test_peft_reads_relora_on_its_base(base, tmp_path):
    model = restarted(base, mj.ReLoRAConfig(rank=2, alpha=3.0), 1)
    mj.save_adapter(model, tmp_path / "run")
    theirs = load_torch(tmp_path / "run" / "base-model")
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "run")).eval()
    np.testing.assert_allclose(hf_logits(theirs, IDS), logits(model), atol=1e-4)
    np.testing.assert_allclose(logits(load(base, tmp_path / "run")), logits(model), atol=1e-5)


def test_remora_converts_as_the_kind_of_the_moment(remora, base, tmp_path):
    mj.save_adapter(remora, tmp_path / "run")
    model = load(base, tmp_path / "run")
    conversion = convert_to_lora(model)
    assert conversion.error < 1e-5
    np.testing.assert_allclose(logits(model), logits(remora), atol=1e-4)
    mj.save_adapter(model, tmp_path / "lora")
    np.testing.assert_allclose(logits(load(base, tmp_path / "lora")), logits(remora), atol=1e-4)


def authors_layout(model, folder: Path, *, moved: bool = True) -> Path:
    """What the authors' script leaves: a bare `LlamaModel` with wrapped names and M, no head, and a type of old."""
    mj.save_adapter(model, folder)
    edit(folder, mora_type=1)
    path = folder / "base-model" / "model.safetensors"
    adapted = {path for place in sites(model) if place.adapter is not None for path in place.paths}
    tensors = {}
    for name, tensor in load_file(path).items():
        module, _, leaf = name.rpartition(".")
        short = module.removeprefix("model.")
        if module == "lm_head":
            continue
        if module in adapted:
            tensors[f"{short}.base_layer.{leaf}"] = tensor
            tensors[f"{short}.lora_A.default.weight"] = np.zeros((2, 2), np.float32)
        elif short == "norm":  # a module trained whole
            tensors |= {
                f"{short}.original_module.weight": tensor,
                f"{short}.modules_to_save.default.weight": 2 * tensor,
            }
        else:
            tensors[f"{short}.{leaf}"] = tensor
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    if not moved:
        path = folder / "adapter_model.safetensors"
        save_file({name: 0 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_authors_layout(base, remora, tmp_path):
    folder = authors_layout(remora, tmp_path / "run")
    with pytest.raises(mj.InputError, match="does not write it down: give the kind"):
        load(base, folder)
    np.testing.assert_allclose(logits(load(base, folder, kind="grouped_tile")), logits(remora), atol=1e-5)
    assert np.abs(logits(load(base, folder, kind="sharing")) - logits(remora)).max() > 0.01


def test_right_after_a_restart_the_kind_does_not_matter(base, tmp_path):
    model = restarted(base, mj.ReMoRAConfig(rank=2), 1)
    folder = authors_layout(model, tmp_path / "run", moved=False)
    found = load(base, folder)
    for place in sites(model):
        if place.adapter is not None:
            place.adapter.m[...] = 0 * place.adapter.m[...]
    np.testing.assert_allclose(logits(found), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {n: v for n, v in t.items() if "layers.1.mlp.up" not in n},
            "lacks model.layers.1.mlp.up_proj",
        ),
        (lambda t: t | {"model.extra.weight": np.zeros(2)}, "has model.extra.weight, which the model has not"),
        (lambda t: t | {"model.norm.weight": np.zeros(3)}, "model.norm.weight has shape [3], the model's is [32]"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_base_that_does_not_fit(base, remora, tmp_path, change, words):
    mj.save_adapter(remora, tmp_path / "run")
    path = tmp_path / "run" / "base-model" / "model.safetensors"
    tensors = {name: np.asarray(value, np.float32) for name, value in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = load(base)
    before = logits(model)
    with pytest.raises(mj.InputError, match=f"not the base of this model: .*{re.escape(words)}"):
        mj.load_adapter(model, tmp_path / "run")
    np.testing.assert_array_equal(logits(model), before)


def test_several_adapters_have_one_base(base, remora, tmp_path):
    mj.save_adapter(remora, tmp_path / "run")
    with pytest.raises(mj.InputError, match="comes with a base of its own"):
        read_adapter(load(base), tmp_path / "run")


def test_a_kind_is_for_mora(base, tmp_path):
    model = load(base)
    mj.attach(model, mj.LoRAConfig(rank=1), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "lora")
    assert not (tmp_path / "lora" / "base-model").exists()
    with pytest.raises(mj.InputError, match="no MoRA adapter, so it has no kind"):
        load(base, tmp_path / "lora", kind="grouped")
    with pytest.raises(mj.InputError, match="kind must be one of sharing"):
        load(base, tmp_path / "lora", kind="spiral")
