"""Reading a text piece by piece through the cache gives what reading it at once gives."""

import jax
import numpy as np
import pytest
from flax import nnx

from mora_jax.models import init_decoder
from tests.models.tiny import LLAMA, random_ids

IDS = random_ids(2, 11)
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CONFIGS = {
    "llama": LLAMA,
    "mixed windows": LLAMA | {"architectures": ["Qwen2ForCausalLM"]} | WINDOW,
    "gemma3": LLAMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 8,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return init_decoder(CONFIGS[request.param], nnx.Rngs(0))


def close(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=3e-5)


def test_prompt_then_token_by_token(model):
    expected = model(IDS)
    cache = model.init_cache(2, 11)
    logits, cache = model.extend(cache, IDS[:, :5])
    close(logits, expected[:, 4])
    for at in range(5, 11):
        logits, cache = model.extend(cache, IDS[:, at : at + 1])
        close(logits, expected[:, at])
    assert int(cache.length) == 11


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths(model, side):
    lengths = (5, 3)
    prompt, mask = np.zeros((2, 5), int), np.zeros((2, 5), int)
    for row, length in enumerate(lengths):
        where = slice(5 - length, 5) if side == "left" else slice(0, length)
        prompt[row, where], mask[row, where] = IDS[row, :length], 1
    expected = model(IDS)
    cache = model.init_cache(2, 11)
    logits, cache = model.extend(cache, prompt, segment_ids=mask)
    for row, length in enumerate(lengths):
        close(logits[row], expected[row, length - 1])
    for step in range(3):
        new = np.array([[IDS[row, length + step]] for row, length in enumerate(lengths)])
        logits, cache = model.extend(cache, new)
        for row, length in enumerate(lengths):
            close(logits[row], expected[row, length + step])


def test_inside_a_compiled_loop(model):
    def greedy(cache, token):
        logits, cache = model.extend(cache, token)
        return cache, logits.argmax(-1)[:, None]

    logits, cache = model.extend(model.init_cache(2, 11), IDS[:, :5])
    token = logits.argmax(-1)[:, None]
    text = [IDS[:, :5], token]
    step = jax.jit(greedy)
    for _ in range(5):
        cache, token = step(cache, token)
        text.append(token)
    text = np.concatenate(text, axis=1)
    np.testing.assert_array_equal(np.asarray(model(text)).argmax(-1)[:, 4:-1], text[:, 5:])


def test_a_full_cache_is_refused():
    model = init_decoder(LLAMA, nnx.Rngs(0))
    _, cache = model.extend(model.init_cache(2, 11), IDS[:, :5])
    with pytest.raises(ValueError, match="the cache has 11 slots, 5 in use: no room for 7 tokens"):
        model.extend(cache, IDS[:, :7])
    with pytest.raises(ValueError, match="at least one row and one slot, got 2 rows of 0"):
        model.init_cache(2, 0)
