"""Preference losses and their gradients against TRL's trainers, on one tiny model with one adapter and one batch."""

from __future__ import annotations

import importlib.util
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.data import EncodedDataset, load_rows
from mora_jax.data.preferences import PreferenceDataset
from tests.evaluation import tiny
from tests.models.tiny import fill_randomly
from tests.peers import peft, torch
from tests.training.test_preferences import LABELS, ROWS, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the extra trl is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
TARGETS = ("q_proj", "v_proj", "down_proj")
#: Settings here, and of TRL: the trainer, arguments of its configuration.
CASES = {
    "dpo": ("dpo", {"beta": 0.3}, {"beta": 0.3, "loss_type": "sigmoid"}, 0.0),
    "dpo means": ("dpo", {"beta": 1.5, "length_normalize": True}, {"beta": 1.5, "loss_type": "sigmoid_norm"}, 0.0),
    "dpo beside SFT": (
        "dpo",
        {"beta": 0.3},
        {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        0.7,
    ),
    "ipo": ("ipo", {"beta": 0.2}, {"beta": 0.2, "loss_type": "ipo"}, 0.0),
    "kto": (
        "kto",
        {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.9},
        {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.9},
        0.0,
    ),
    "orpo": ("orpo", {"beta": 0.4}, {"beta": 0.4}, 1.0),
    "simpo": (
        "simpo",
        {"beta": 2.0, "gamma": 0.6},
        {"beta": 2.0, "simpo_gamma": 0.6, "loss_type": "simpo", "cpo_alpha": 0.0},
        0.0,
    ),
    "cpo": (
        "cpo",
        {"beta": 0.3, "label_smoothing": 0.1},
        {"beta": 0.3, "label_smoothing": 0.1, "loss_type": "sigmoid", "cpo_alpha": 0.8},
        0.8,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and the model with an adapter whose factors are all filled."""
    path = tmp_path_factory.mktemp("trl")
    tiny.save_folder(path / "base")
    model, tokenizer = mj.load_pretrained(path / "base", dtype="float32")
    mj.attach(model, mj.LoRAConfig(rank=2, alpha=4, targets=TARGETS), rngs=nnx.Rngs(1))
    mj.save_adapter(model, path / "fresh")
    fill_randomly(model)
    mj.save_adapter(model, path / "adapter")
    return path, model, tokenizer


def trainer_of(name, arguments, path, tokenizer):
    """TRL's trainer of an objective, with a fresh adapter on the base: that is its reference."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, path / "fresh", is_trainable=True)
    if name == "kto":
        from trl import KTOConfig as TrlConfig, KTOTrainer as Trainer
    elif name in ("dpo", "ipo"):
        from trl import DPOConfig as TrlConfig, DPOTrainer as Trainer
    elif name == "orpo":
        from trl.experimental.orpo import ORPOConfig as TrlConfig, ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as TrlConfig, CPOTrainer as Trainer
    common = {
        "output_dir": str(path / "out"),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
    }
    common |= (
        {"gradient_checkpointing": False, "disable_dropout": True}
        if name != "kto"
        else {"gradient_checkpointing": False}
    )
    tokenizer.pad_token = tokenizer.eos_token
    rows = LABELS if name == "kto" else ROWS
    config = TrlConfig(**common, **arguments)
    return Trainer(model=model, args=config, train_dataset=Dataset.from_list(rows[:4]), processing_class=tokenizer)


def tensor(array):
    return torch.tensor(np.array(array))


def loss_of(name, trainer, batch):
    """TRL's loss of our tokens."""
    ids, mask = tensor(batch["input_ids"]).long(), tensor(batch["segment_ids"]).long()
    answers = tensor(batch["answer_weights"]).long()
    model = trainer.model
    if name in ("dpo", "ipo"):
        both = {"input_ids": ids, "attention_mask": mask, "completion_mask": answers}
        inputs = {key: torch.cat([value[:, 0], value[:, 1]]) for key, value in both.items()}
        return trainer.compute_loss(model, inputs)
    if name == "kto":
        inputs = {"input_ids": ids[:, 0], "attention_mask": mask[:, 0], "completion_mask": answers[:, 0]}
        inputs |= {"KL_input_ids": ids[:, 1], "KL_attention_mask": mask[:, 1], "KL_completion_mask": answers[:, 1]}
        return trainer.compute_loss(model, inputs | {"label": tensor(batch["desired"][:, 0]).bool()})
    labels = torch.where(answers > 0, ids, -100)
    inputs = {}
    for half, side in enumerate(("chosen", "rejected")):
        inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"] = ids[:, half], mask[:, half]
        inputs[f"{side}_labels"] = labels[:, half]
    return trainer.get_batch_loss_metrics(model, inputs)[0]


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case, folders, tmp_path):
    name, settings, arguments, sft_weight = CASES[case]
    path, model, tokenizer = folders
    # TRL's NLL beside ORPO is over prompt and answer, that beside the others over the answer.
    encoded = EncodedDataset.build(
        load_rows(LABELS if name == "kto" else ROWS),
        tokenizer,
        mode="full" if name == "orpo" else "masked",
        max_length=64,
    )
    dataset = PreferenceDataset(encoded, labelled=name == "kto")
    batch = dataset.batch([[i] for i in range(6)], length=int(dataset.lengths.max()))
    metrics, gradient = run(model, batch, name, sft_weight=sft_weight, **settings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(name, arguments, path, tokenizer)
    trainer.model.load_adapter(path / "adapter", "filled", is_trainable=True)
    trainer.model.set_adapter("filled")
    trainer.model.train()
    loss = loss_of(name, trainer, batch)
    loss.backward()
    np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-5)
    # Our gradient in PEFT's names and layout: as if it were an adapter.
    graphdef, adapters, frozen = mj.partition(model)
    slopes = nnx.from_flat_state(
        {at: leaf.replace(jnp.asarray(gradient[".".join(map(str, at))])) for at, leaf in nnx.to_flat_state(adapters)}
    )
    mj.save_adapter(nnx.merge(graphdef, slopes, frozen), tmp_path / "gradient")
    from safetensors.numpy import load_file

    ours = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    theirs = {
        key.replace(".filled", ""): value.grad.numpy()
        for key, value in trainer.model.named_parameters()
        if ".filled" in key
    }
    assert ours.keys() == theirs.keys() and len(ours) == 6
    largest = max(np.abs(value).max() for value in theirs.values())
    assert largest > 1e-4
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-5 * largest, err_msg=key)
