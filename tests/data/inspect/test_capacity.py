"""How many parameters data can need, against numbers by hand."""

import math

import pytest

from mora_jax.data.inspect.advice import advise_on_capacity, bits_to_learn, parameters_for, smallest_rank


def test_bits_are_tokens_times_their_loss():
    assert bits_to_learn(1500) == 1500
    assert bits_to_learn(1500, 3 * math.log(2)) == pytest.approx(4500)


def test_a_parameter_holds_two_bits():
    assert [parameters_for(bits) for bits in (0, 1, 2, 3)] == [0, 1, 1, 2]


def test_the_smallest_rank_holds_all_bits():
    # LoRA on q and v of 4 layers of width 128: 4 · 2 · 256 parameters, 4096 bits, at each rank.
    assert [smallest_rank(bits, 4 * 2 * 256) for bits in (0, 4096, 4097, 40_960)] == [1, 1, 2, 10]


def test_the_advice_is_one_line_with_its_source():
    text = advise_on_capacity(20_001)
    assert "20,001 bits" in text and "10,001 trained parameters" in text
    assert "upper bound" in text and "LoRA Without Regret" in text and "\n" not in text
