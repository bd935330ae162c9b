"""Greedy generation gives the tokens that `transformers` gives in torch."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mora_jax.evaluation.generate import Generator
from mora_jax.interop import load_pretrained
from tests.peers import torch

pytestmark = pytest.mark.peers


def test_greedy_tokens_equal_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_pretrained(tmp_path, dtype="float32")
    prompts = ([5, 17, 80, 3], [9] * 11)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            mask = torch.ones_like(ids)
            answers.append(theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20))
    together = Generator(ours).batch(prompts, 20)
    for prompt, expected, row in zip(prompts, answers, together, strict=True):
        answer = list(Generator(ours).stream(prompt, 20))
        assert answer == expected[0, len(prompt) :].tolist() == row.tolist()
        assert len(set(answer)) > 3, "a constant answer would prove little"
