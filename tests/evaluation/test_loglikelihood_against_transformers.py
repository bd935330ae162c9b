"""Log-likelihoods are those that `transformers`' models give in torch."""

import pytest
from transformers import LlamaForCausalLM

from mora_jax.evaluation import LoglikelihoodScorer
from mora_jax.interop import load_pretrained
from tests.evaluation import tiny
from tests.peers import torch

pytestmark = pytest.mark.peers


def test_log_likelihoods_equal_those_of_transformers(tmp_path):
    folder = tiny.save_folder(tmp_path / "model")
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype="float32").eval()
    model, tokenizer = load_pretrained(folder, dtype="float32")
    pairs = [("A question", " answer"), ("A", " much longer answer, by a good deal"), ("long " * 12, "x"), ("", "y")]
    found = LoglikelihoodScorer(model, tokenizer, batch_size=3).loglikelihood(pairs)
    for (context, continuation), score in zip(pairs, found, strict=True):
        before = tokenizer(context.rstrip())["input_ids"] or [tokenizer.eos_token_id]
        behind = tokenizer(context[len(context.rstrip()) :] + continuation)["input_ids"]
        ids = torch.tensor([before + behind])
        with torch.no_grad():
            logits = theirs(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, ids[0, len(before) :, None]).sum().item()
        assert score.logprob == pytest.approx(expected, rel=1e-5)
        assert score.is_greedy == bool((logits.argmax(-1) == ids[0, len(before) :]).all())
