"""The table of published models: parameters as the models' cards and files say."""

import jax
import pytest
from flax import nnx

from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.planning.model_shapes import PUBLISHED

#: Numbers of parameters in the published safetensors files (of Gemma 3 27B in its text decoder).
COUNTS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "gemma3-1b": 999_885_952,
    "gemma3-27b": 27_009_346_304,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    model = nnx.eval_shape(lambda: Decoder(read_config(PUBLISHED[name], name), rngs=None))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == COUNTS[name]
