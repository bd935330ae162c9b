"""LoRA on experts in PEFT's folders, both ways against real PEFT, and merged folders in transformers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.products.quantization import FORMATS
from mora_jax.interop.engine_check import check_folder
from tests.models.quantized import rounded_files
from tests.models.tiny import fill_randomly
from tests.models.tiny_experts import FAMILIES, ours, tokens

#: PEFT looks for the keys of patterns among modules alone, and uses a name of transformers that goes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
]
TARGETS = {
    # Of Gemma 4 `down_proj` is that of the dense MLP beside the experts.
    "each": ("q_proj", "down_proj", "experts.gate_proj", "experts.up_proj", "experts.down_proj"),
    "whole": ("v_proj", "experts.gate_up_proj"),
    "down": ("experts.down_proj",),
}


def adapted(folder, targets, quantize="none", **settings):
    model, _ = mj.load_pretrained(folder, dtype="float32", quantize=quantize)
    mj.attach(model, mj.LoRAConfig(rank=3, alpha=5.0, targets=targets, **settings), rngs=nnx.Rngs(0))
    fill_randomly(model, scale=0.2)
    return model


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", TARGETS)
def test_folders_are_those_of_peft(family, which, tmp_path):
    import peft

    from tests.models.tiny_experts import saved
    from tests.models.tiny_torch import hf_logits, load_torch

    base, ids = saved(tmp_path / "base", family), tokens()
    model = adapted(base, TARGETS[which])
    before, _ = mj.load_pretrained(base, dtype="float32")
    logits = np.asarray(model(ids))
    assert np.abs(logits - before(ids)).max() > 0.1
    mj.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "ours")
    np.testing.assert_allclose(hf_logits(theirs, ids), logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again, _ = mj.load_pretrained(base, dtype="float32")
        mj.load_adapter(again, tmp_path / folder)
        np.testing.assert_allclose(again(ids), logits, rtol=1e-4, atol=1e-4)
    mj.merge(model)
    mj.save_pretrained(model, tmp_path / "merged")
    np.testing.assert_allclose(hf_logits(load_torch(tmp_path / "merged"), ids), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.peers
def test_layers_without_experts_between_others(tmp_path):
    import peft

    from tests.models.tiny_experts import saved
    from tests.models.tiny_torch import hf_logits, load_torch

    base, ids = saved(tmp_path / "base", "qwen3_moe", mlp_only_layers=[1]), tokens()
    model = adapted(base, TARGETS["whole"])
    mj.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "ours")
    np.testing.assert_allclose(hf_logits(theirs, ids), model(ids), rtol=1e-4, atol=1e-4)
    again, _ = mj.load_pretrained(base, dtype="float32")
    mj.load_adapter(again, tmp_path / "ours")
    np.testing.assert_allclose(again(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_pair_of_tensors_for_each_expert(family, tmp_path):
    import peft
    from safetensors.numpy import load_file

    from tests.models.tiny_experts import saved
    from tests.models.tiny_torch import hf_logits, load_torch

    base, ids = saved(tmp_path / "base", family), tokens()
    # Of gate and up alone PEFT's conversion loses the tensors, with a warning.
    for which, targets in {"each": TARGETS["each"], "whole": (*TARGETS["whole"], *TARGETS["down"])}.items():
        model = adapted(base, targets)
        folder = tmp_path / which
        mj.save_adapter(model, folder, experts="each")
        names = load_file(folder / "adapter_model.safetensors")
        gate = {"mixtral": "block_sparse_moe.experts.4.w1", "qwen3_moe": "mlp.experts.4.gate_proj"}[family]
        assert names[f"base_model.model.model.layers.2.{gate}.lora_A.weight"].shape == (3, 32)
        theirs = peft.PeftModel.from_pretrained(load_torch(base), folder)
        np.testing.assert_allclose(hf_logits(theirs, ids), model(ids), rtol=1e-4, atol=1e-4)
        again, _ = mj.load_pretrained(base, dtype="float32")
        mj.load_adapter(again, folder)
        np.testing.assert_allclose(again(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize(
    "family, held",
    [*((family, "none") for family in FAMILIES), *itertools.product(("mixtral", "qwen3_moe", "gpt_oss"), FORMATS)],
)
def test_gradients_are_those_of_peft(family, held, tmp_path):
    """Of the loss by the factors of attention and of experts, through the router's weights.

    Beside a quantised base they are PEFT's on the numbers that codes and scales stand for, and so are logits.
    """
    import peft

    from tests.models.tiny_experts import saved, torch
    from tests.models.tiny_torch import hf_logits, load_torch

    # Inputs of one block and a half, and of a little more than one.
    sizes = {"hidden_size": 96, "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size": 72}
    base, ids = saved(tmp_path / "base", family, **({} if held == "none" else sizes)), tokens()
    model = adapted(base, ("q_proj", "experts.gate_up_proj", "experts.down_proj"), held)
    if held != "none":
        base = rounded_files(base, model, tmp_path / "rounded")
    mj.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_torch(base), tmp_path / "adapter", is_trainable=True)
    logits = hf_logits(theirs, ids)
    np.testing.assert_allclose(model(ids), logits, rtol=1e-4, atol=5e-5 * np.abs(logits).max())
    theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
    graphdef, adapters, frozen = mj.partition(model)

    def loss(adapters):
        scores = jax.nn.log_softmax(nnx.merge(graphdef, adapters, frozen)(ids)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))

    gradients = jax.grad(loss)(adapters)
    copy = nnx.merge(graphdef, gradients, frozen)  # the gradients in the place of the factors
    mj.save_adapter(copy, tmp_path / "gradients")
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    wanted = {name.replace(".default", ""): p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * np.abs(gradient).max())


def test_some_layers_and_experts_alone(tmp_path):
    """What has no adapter is zero in the one tensor of all, and layers that are left out have none."""
    model, ids = ours("qwen3_moe", nnx.Rngs(0)), tokens()
    targets = r".*(layers\.1\.mlp\.experts\.[024]\.(gate|up)_proj|layers\.2\.mlp\.experts\.5\.down_proj)"
    mj.attach(model, mj.LoRAConfig(rank=2, targets=targets), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["target_modules"] == [] and values["lora_dropout"] == 0
    assert values["target_parameters"] == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.2.mlp.experts.down_proj",
    ]
    again = ours("qwen3_moe", nnx.Rngs(0))
    mj.load_adapter(again, tmp_path)
    np.testing.assert_allclose(again(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_what_engines_do_with_them(tmp_path):
    model = ours("qwen3_moe", nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "gate_proj", "up_proj", "down_proj")), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "fused")
    mj.save_adapter(model, tmp_path / "each", experts="each")
    for engine in ("peft", "transformers"):
        assert check_folder(tmp_path / "fused", engine).good
        assert check_folder(tmp_path / "each", engine).good
    assert check_folder(tmp_path / "each", "vllm").good
    assert "target_parameters is set" in str(check_folder(tmp_path / "fused", "vllm"))


def test_adapters_on_experts_and_on_dense_layers_are_said_to_be_lost_in_peft(tmp_path):
    model = ours("qwen3_moe", nnx.Rngs(0), mlp_only_layers=[1])
    mj.attach(model, mj.LoRAConfig(rank=2, targets=TARGETS["each"]), rngs=nnx.Rngs(0))
    fill_randomly(model)
    with pytest.warns(UserWarning, match="PEFT takes the name of model.layers.1.mlp.down_proj for that of experts"):
        mj.save_adapter(model, tmp_path / "both")
    again = ours("qwen3_moe", nnx.Rngs(0), mlp_only_layers=[1])
    mj.load_adapter(again, tmp_path / "both")
    np.testing.assert_allclose(again(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


def test_a_tensor_an_expert_is_refused_where_peft_loses_it(tmp_path):
    """PEFT wants all three matrices in that form, and for families with one tensor for all experts it finds none."""
    model = ours("qwen3_moe", nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "gate_proj", "down_proj")), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path / "each", experts="each")
    assert "carries adapters on down_proj, gate_proj alone; PEFT wants" in str(check_folder(tmp_path / "each", "peft"))
    model = ours("gpt_oss", nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets="all-linear"), rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="hold all experts of a layer as one"):
        mj.save_adapter(model, tmp_path / "none", experts="each")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_mora_on_experts_is_a_tensor_an_expert(family, tmp_path):
    model, ids = ours(family, nnx.Rngs(0)), tokens()
    mj.attach(model, mj.MoRAConfig(rank=2, kind="rotation"), rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path)
    again = ours(family, nnx.Rngs(0))
    mj.load_adapter(again, tmp_path)
    np.testing.assert_array_equal(again(ids), model(ids))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_parameters": ["mlp.gate.weight"]}, "target_parameters names mlp.gate.weight, which is no parameter"),
        (
            {"target_parameters": ["experts.down_proj"]},
            "tensor .*gate_up|belong to no target|missing|is no part|has shape",
        ),
        ({"target_parameters": 3}, "target_parameters must be a list of names"),
    ],
    ids=str,
)
def test_folders_that_do_not_fit(changes, message, tmp_path):
    model = ours("qwen3_moe", nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("mlp.experts.gate_up_proj",)), rngs=nnx.Rngs(0))
    mj.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    other = ours("qwen3_moe", nnx.Rngs(0))
    with pytest.raises(mj.InputError, match=message):
        mj.load_adapter(other, tmp_path)
    assert other.layers.mlp.gate_up_proj.seen_whole is False
