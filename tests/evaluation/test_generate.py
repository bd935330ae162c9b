"""Generation: the cache must give what whole forwards give."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.errors import InputError
from mora_jax.evaluation import generate
from mora_jax.evaluation.chat import complete_batch
from mora_jax.evaluation.generate import Generator, Sampling, choose
from mora_jax.interop.read_adapter import bare
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from tests.evaluation import tiny

PROMPT = [10, 200, 31, 7, 7, 99]
KEYS = jax.random.split(jax.random.key(0))
GREEDY = generate.Request(KEYS, jnp.float32(0), jnp.float32(1), jnp.asarray([-1]), None, True)


def by_whole_forwards(model, prompt, count, stop_ids=()):
    ids = list(prompt)
    padded = np.zeros((1, 128), np.int32)
    for _ in range(count):
        padded[0, : len(ids)] = ids
        token = int(jnp.argmax(model(jnp.asarray(padded))[0, len(ids) - 1]))
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy_stream_equals_argmax_of_whole_forwards(model):
    expected = by_whole_forwards(model, PROMPT, 12)
    assert list(Generator(model).stream(PROMPT, 12)) == expected
    assert len(set(expected)) > 3, "a constant answer would prove little"


def test_batch_equals_streams_for_prompts_of_many_lengths(model):
    prompts = [PROMPT, PROMPT[:2], list(range(1, 30)), [5]]
    generator = Generator(model)
    answers = generator.batch(prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tolist() == by_whole_forwards(model, prompt, 12)


def test_stop_tokens_end_an_answer_and_are_not_part_of_it(model):
    free = by_whole_forwards(model, PROMPT, 12)
    stop = next(token for place, token in enumerate(free) if place > 1 and token not in free[:place])
    expected = free[: free.index(stop)]
    generator = Generator(model, stop_ids=[stop])
    assert list(generator.stream(PROMPT, 12)) == expected
    both = generator.batch([PROMPT, PROMPT[:3]], 12)
    assert both[0].tolist() == expected
    assert both[1].tolist() == by_whole_forwards(model, PROMPT[:3], 12, [stop])


def test_one_compilation_for_all_prompts_of_a_bucket(model, monkeypatch):
    monkeypatch.setattr(generate, "LARGE", 0)
    generator = Generator(model)
    list(generator.stream(PROMPT, 3))
    programs = [generator._enter, generator._leave, *generator._layers.programs]
    before = [program._cache_size() for program in programs]
    assert all(before)
    for length in (1, 20, generate.BUCKET):
        list(generator.stream(list(range(length)), 5))
    assert [program._cache_size() for program in programs] == before


def test_small_layers_are_one_program_for_all_prompts_of_a_bucket(model):
    generator = Generator(model)
    list(generator.stream(PROMPT, 3))
    before = generate._proceed_apart._cache_size()
    assert before
    for length in (1, 20, generate.BUCKET):
        list(generator.stream(list(range(length)), 5))
    assert generate._proceed_apart._cache_size() == before


def test_layers_of_a_kind_are_one_program_that_models_share(monkeypatch):
    """So that compiling doesn't grow with depth, nor with models of one form."""
    monkeypatch.setattr(generate, "LARGE", 0)
    config = read_config(tiny.llama_config() | {"num_hidden_layers": 3}, "config.json")
    deep = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    programs = Generator(deep)._layers.programs
    assert len(programs) == 3 and len(set(programs)) == 1
    assert Generator(nnx.merge(*nnx.split(deep)))._layers.programs == programs
    assert list(Generator(deep).stream(PROMPT, 5)) == by_whole_forwards(deep, PROMPT, 5)
    assert programs[0]._cache_size() == 1
    monkeypatch.undo()
    assert list(Generator(deep).stream(PROMPT, 5)) == by_whole_forwards(deep, PROMPT, 5)


def test_the_context_ends_an_answer(model):
    prompt = [3] * 125
    assert len(list(Generator(model).stream(prompt, 10))) == 3
    assert len(Generator(model).batch([prompt], 10)[0]) == 3


def test_a_long_prompt_leaves_its_neighbours_their_room(model):
    generator = Generator(model)
    prompts = [[3] * 122, PROMPT, [9, 8, 7], [4] * 100]
    alone = [by_whole_forwards(model, prompt, min(40, 128 - len(prompt))) for prompt in prompts]
    assert [len(answer) for answer in alone] == [6, 40, 40, 28]
    assert [answer.tolist() for answer in generator.batch(prompts, 40)] == alone
    heard = []
    answers = generator.batch(prompts, 40, ended=lambda tokens: bool(heard.append(len(tokens))))
    assert [answer.tolist() for answer in answers] == alone
    assert max(heard) == 32


@pytest.mark.parametrize("prompt, words", [([], "no tokens"), ([3] * 128, "128"), ([261], "261")])
def test_bad_prompts_are_refused(model, prompt, words):
    with pytest.raises(InputError, match=words):
        list(Generator(model).stream(prompt, 4))
    with pytest.raises(InputError, match=words):
        Generator(model).batch([prompt], 4)


def test_bad_numbers_are_refused(model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(Generator(model).stream(PROMPT, 0))
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=float("nan"))
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0)


def test_sampling_follows_the_seed(model):
    answers = [list(Generator(model, sampling=Sampling(3.0, 1.0, seed)).stream(PROMPT, 12)) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 12])
def test_the_draws_of_a_request_belong_to_its_number_whatever_the_batch(model, batch_size):
    generator = Generator(model, sampling=Sampling(1.0, 1.0, 5))
    samples = complete_batch(generator, [PROMPT] * 12, max_new_tokens=8, batch_size=batch_size)
    assert len({sample.tobytes() for sample in samples}) == 12
    assert samples[0].tolist() == list(generator.stream(PROMPT, 8))
    others = complete_batch(generator, [[5], PROMPT, list(range(30)), PROMPT], max_new_tokens=8, batch_size=batch_size)
    assert [others[number].tolist() for number in (1, 3)] == [samples[number].tolist() for number in (1, 3)]
    numbered = complete_batch(generator, [PROMPT] * 2, max_new_tokens=8, batch_size=batch_size, numbers=[7, 7])
    assert [sample.tolist() for sample in numbered] == [samples[7].tolist()] * 2


def distribution(logits, temperature, top_p):
    """The probabilities of a draw, token by token: float64 `[V]`."""
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    probabilities, reached, kept = weights / weights.sum(), 0.0, np.zeros(len(weights), bool)
    for token in np.argsort(-probabilities, kind="stable"):
        if reached >= top_p:
            break
        reached, kept[token] = reached + probabilities[token], True
    return np.where(kept, probabilities, 0) / probabilities[kept].sum()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.8, 0.97, 1.0])
def test_draws_have_the_probabilities_of_temperature_and_top_p(temperature, top_p):
    count, logits = 20_000, np.random.default_rng(3).normal(size=11).astype(np.float32) * 2
    rows, keys = jnp.broadcast_to(logits, (count, 11)), jax.random.split(jax.random.key(0), count)
    drawn = choose(rows, keys, jnp.float32(temperature), jnp.float32(top_p), greedy=False)
    shares = np.bincount(np.asarray(drawn), minlength=11) / count
    expected = distribution(logits, temperature, top_p)
    assert (shares[expected == 0] == 0).all()
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / count))


def test_a_changed_model_needs_a_new_generator_and_then_shows(model):
    graphdef, state = nnx.split(model)
    other = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * 1.7, state))
    assert list(Generator(other).stream(PROMPT, 12)) == by_whole_forwards(other, PROMPT, 12)


def test_adapters_that_read_the_kernel_decode_as_in_whole_forwards(model):
    adapted = bare(model)
    mj.attach(adapted, mj.DoRAConfig(rank=2), rngs=nnx.Rngs(0))
    draws = np.random.default_rng(0)
    for _, node in nnx.iter_graph(adapted):
        if isinstance(node, mj.AdapterParam):
            node.set_value(node[...] + 0.3 * draws.standard_normal(node.shape, np.float32))
    expected = by_whole_forwards(adapted, PROMPT, 8)
    assert expected != by_whole_forwards(model, PROMPT, 8), "an adapter without effect would prove nothing"
    assert Generator(adapted).batch([PROMPT], 8)[0].tolist() == expected


def test_bfloat16_in_place_and_alone_as_in_a_batch():
    model = Decoder(read_config(tiny.llama_config(), "config.json"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    generator = Generator(model)
    answers = generator.batch([PROMPT, PROMPT[:3]], 9)
    assert generator.batch([PROMPT], 9)[0].tolist() == answers[0].tolist()
    _, begun = generator._begin([PROMPT, PROMPT[:3]], 9, None, None)
    layers = generator._layers
    keys, values = begun.cache.keys[0], begun.cache.values[0]
    begun = dataclasses.replace(begun, cache=dataclasses.replace(begun.cache, keys=(), values=()))
    x, layout, begun = generator._enter(generator._leaves, layers.table, begun, None)
    layer = layers.programs[0].lower(layers.leaves[0], x, keys, values, layout, begun.cache.length, None)
    program = layer.compile().as_text()
    ends = [generator._enter.lower(generator._leaves, layers.table, begun, None)]
    ends += [generator._leave.lower(generator._leaves, None, x, begun, GREEDY)]
    program += "".join(end.compile().as_text() for end in ends)
    cache = ",".join(str(size) for size in keys.shape)
    assert f"f32[{cache}]" in program
    assert not re.findall(rf"= f32\[{cache}\]\S* copy\(", program), "the cache is written in place"
    widened = [size for size in ("64,32", "32,32", "96,32", "32,48", "261,32") if f"f32[{size}]" in program]
    assert not widened, "weights are read as they are"
