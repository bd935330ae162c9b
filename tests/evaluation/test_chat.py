"""Prompts in, text out."""

import json

from mora_jax.evaluation import Sampling, generate_batch, stream_text
from mora_jax.evaluation.chat import find_stop_ids


def test_stop_tokens_come_from_tokenizer_configs_and_template(model, tokenizer, tmp_path, monkeypatch):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert find_stop_ids(model, tokenizer) == {256, end}
    assert find_stop_ids(model, tokenizer, "plain") == {256}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    monkeypatch.setattr(model, "folder", str(tmp_path))
    assert find_stop_ids(model, tokenizer) == {256, end, 7, 9}


def test_batches_give_the_streamed_answers_in_order(model, tokenizer):
    prompts = ["What?", "A longer question, by a good deal", [{"role": "user", "content": "hm"}], "x", "yes"]
    answers = generate_batch(model, tokenizer, prompts, max_new_tokens=8, batch_size=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        streamed = "".join(stream_text(model, tokenizer, prompt, max_new_tokens=8))
        assert streamed == answer.rstrip("\ufffd")


def test_sampled_text_follows_the_seed(model, tokenizer):
    texts = [
        "".join(stream_text(model, tokenizer, "x", max_new_tokens=16, sampling=Sampling(2.0, 0.9, seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
