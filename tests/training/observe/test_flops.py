"""FLOPs by the stated convention, against the compiler's own count of the real step."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.observe.flops import StepFlops, peak_flops, span
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import make_step
from tests.models.tiny import LLAMA

SIZES = LLAMA | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS, LENGTH = 4, 64


def parts(method, tie: bool, layers: int):
    """The configuration, trained and frozen arrays, and the step."""
    config = read_config(SIZES | {"tie_word_embeddings": tie, "num_hidden_layers": layers}, "config.json")
    model = Decoder(config, rngs=nnx.Rngs(0))
    mj.attach(model, method, rngs=nnx.Rngs(1))
    graphdef, trained, frozen = mj.partition(model)
    optimizer = make_optimizer(OptimizerConfig(), 3)
    step = make_step(Structure(graphdef, trained, frozen), optimizer, make_schedule(OptimizerConfig(), 3))
    return config, flat_arrays(trained), flat_arrays(frozen), step, optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tie", "layers"),
    [(mj.LoRAConfig(rank=4), True, 2), (mj.FullConfig(), False, 1)],
    ids=["lora", "full"],
)
def test_the_convention_counts_what_the_compiler_counts(method, tie, layers, monkeypatch):
    # The compiler counts a loop's body once.
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    config, trained, frozen, step, optimizer = parts(method, tie, layers)
    shape = (1, ROWS, LENGTH)
    batch = {name: np.ones(shape, np.int32) for name in ("input_ids", "segment_ids")}
    batch["weights"] = np.ones(shape, np.float32)
    compiled = jax.jit(step).lower(initial_state(trained, optimizer, 0), frozen, batch).compile()
    flops = StepFlops.of(config, trained, frozen, [LENGTH])
    tokens = ROWS * LENGTH
    # The compiler also counts norms, softmax and the optimizer, which the convention leaves out.
    assert compiled.cost_analysis()["flops"] / flops.needed(tokens, tokens) == pytest.approx(1.03, abs=0.05)
    if layers == 1:
        assert flops.needed(tokens, tokens) == flops.palm(tokens)
    else:
        assert 0.6 < flops.needed(tokens, tokens) / flops.palm(tokens) < 0.8


def test_the_formula_by_hand():
    flops = StepFlops(body=1000, body_trained=10, head=100, head_trained=0, attention=40.0)
    assert flops.needed(5, 2) == 5 * (4 * 1000 + 2 * 10 + 3 * 40) + 2 * 4 * 100
    assert flops.palm(5) == 5 * (6 * 1100 + 3 * 40)
    with_kl = StepFlops(1000, 10, 100, 0, 40.0, base_passes=1)
    assert with_kl.needed(5, 2) - flops.needed(5, 2) == 5 * (2 * 990 + 40) + 2 * 2 * 100
    crossed = StepFlops(1000, 10, 100, 0, 40.0, base_passes=1, tuned_passes=1)
    assert crossed.needed(5, 2) - with_kl.needed(5, 2) == 5 * (2 * 1000 + 40) + 2 * 2 * 100


def test_tokens_in_sight():
    assert span([8, 8]) == 8
    assert span([2, 6]) == (2 * 2 + 6 * 6) / 8
    assert span([2, 6], window=4) == (2 * 2 + 6 * 4) / 8
    assert span([]) == 0


def test_the_peak_is_that_of_all_devices_or_unknown():
    chip, other = (SimpleNamespace(device_kind=kind) for kind in ("TPU v5 lite", "cpu"))
    assert peak_flops([chip, chip]) == 2 * 197e12
    assert peak_flops([chip, other]) is None and peak_flops([other]) is None
