"""Every file in configs/ that names chips: its step traced with the real shapes, and what its head says of memory."""

import re
from pathlib import Path

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from mora_jax.backend import compiling_for
from mora_jax.models.families import read_config
from mora_jax.planning.abstract_step import abstract_model, assemble_abstract
from mora_jax.planning.model_shapes import read_model
from mora_jax.planning.plan import by_formula
from mora_jax.planning.topology import read_topology
from mora_jax.training.config.load import load_config

FOLDER = Path(__file__).resolve().parents[2] / "configs"
PLANNED = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem.startswith(("tpu_", "gpu_")))


def planned(name: str):
    """The configuration with the model and the chips that its head names."""
    text = (FOLDER / f"{name}.py").read_text()
    # Its sentences are wrapped.
    command = re.search(r"--model\s+(\S+)\s+--accelerator\s+([\w-]+)", text)
    assert command, f"{name} names no plan"
    model, topology = command[1], read_topology(command[2])
    config, note = load_config(str(FOLDER / f"{name}.py"), (), {"data.train": ("x",), "out": "x", "model.path": model})
    assert note is None
    return text, config, model, topology


def test_there_are_some():
    assert {"tpu_v5e_8_llama3_8b_mora", "tpu_v5p_64_llama3_70b_lora", "gpu_h100_qwen3_8b_mora"} <= set(PLANNED)


@pytest.mark.parametrize("name", PLANNED)
def test_its_step_can_be_traced_and_fits_as_its_head_says(name):
    text, config, model, topology = planned(name)
    plan = by_formula(config, read_model(model), topology)  # traces one row and two
    assert plan.fits
    said = re.search(r"([\d.]+)\s+of\s+([\d.]+)\s+GB\s+on\s+each\s+chip", text)
    assert said
    # Rounded; and the head may hold the compiler's figure.
    assert float(said[1]) == pytest.approx(plan.needed / 1e9, rel=0.25)
    assert float(said[2]) == pytest.approx(topology.usable_bytes / 1e9, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_its_whole_step_by_shapes(name, monkeypatch):
    """With its own micro-batches, on as many devices as there are (one)."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # this machine has none
    _, config, model, topology = planned(name)
    with compiling_for("tpu" if topology.tpu else "gpu"):
        decoder = abstract_model(read_config(read_model(model), model), config)
        made, arguments = assemble_abstract(decoder, config, (1,) * 5)
        traced = made.runner.trace(*arguments)
    state, metrics = traced.out_info
    assert metrics.loss.shape == () and jax.tree.structure(state) == jax.tree.structure(arguments[0])
