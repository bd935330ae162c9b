"""Loss modes that look at turns, for every template: what is trained, written out character by character."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mora_jax.data import TEMPLATES, Conversation, Message
from tests.data.conftest import CHAT_TEMPLATES
from tests.data.encoded import encode


@dataclass(frozen=True)
class Parts:
    """What a template writes around turns.

    Attributes:
      system: closes the system's turn; None where there can be none.
      asked: closes a question.
      header: opens an answer, apart from what closes the question.
      lead: space that belongs to the answer.
      end: ends an answer.
      last: ends the last answer, if in another way.
    """

    asked: str
    header: str
    end: str
    lead: str = ""
    system: str | None = ""
    last: str | None = None


CHATML = Parts("<|im_end|>", "\n<|im_start|>assistant\n", "<|im_end|>", system="<|im_end|>")
LLAMA3 = Parts("<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", system="<|eot_id|>")
GEMMA = Parts("<end_of_turn>", "\n<start_of_turn>model\n", "<end_of_turn>")
LLAMA2 = Parts(" [/INST]", "", " </s>", lead=" ", system="\n<</SYS>>\n\n")
BUILT_IN = {
    "alpaca": Parts("", "\n\n### Response:", "</s>"),
    "plain": Parts("", "", "</s>"),
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": Parts(" [/INST]", "", "</s>", lead=" ", system="\n\n"),
    "tulu": Parts("", "\n<|assistant|>\n", "</s>"),
    "zephyr": Parts("</s>", "\n<|assistant|>\n", "</s>", system="</s>"),
    "phi3": Parts("<|end|>", "\n<|assistant|>\n", "<|end|>", system="<|end|>"),
    "gemma": GEMMA,
}
#: In the templates of a tokenizer a system message inside of a question is closed by that question's header.
JINJA = {
    "chatml": CHATML,
    "llama2": Parts(" [/INST]", "", " </s>", lead=" "),
    "llama3": LLAMA3,
    "gemma": Parts("<end_of_turn>", "\n<start_of_turn>model\n", "<end_of_turn>", system=None),
    "mistral": Parts("[/INST]", "", "</s>", lead=" "),
    "headers_only": Parts("", "<|assistant|>\n", "", last="</s>"),
    "thinking": CHATML,
}
CASES = [(None, chat, parts) for chat, parts in JINJA.items()]
CASES += [(template, None, parts) for template, parts in BUILT_IN.items()]


def test_every_template_is_here():
    assert set(BUILT_IN) == set(TEMPLATES)
    assert set(JINJA) == set(CHAT_TEMPLATES)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A token a byte, but for the ends of turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|im_end|>", "<|eot_id|>", "<end_of_turn>"],
    )


def trained(tokenizer, template, chat, messages, **loss):
    """The trained text, stretch by stretch."""
    tokenizer.chat_template = CHAT_TEMPLATES.get(chat)
    [example] = encode([Conversation(messages)], tokenizer, template, **loss)
    assert set(example.weights) <= {0.0, 1.0}
    edges = np.flatnonzero(np.diff(example.weights, prepend=0, append=0))
    return [tokenizer.decode(example.input_ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


def conversation(parts):
    turns = [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]
    return tuple(turns if parts.system is None else [Message("system", "s0"), *turns])


@pytest.mark.parametrize(("template", "chat", "parts"), CASES)
class TestModes:
    def test_masked_trains_each_answer_with_its_end(self, template, chat, parts, byte_tokenizer):
        last = parts.end if parts.last is None else parts.last
        found = trained(byte_tokenizer, template, chat, conversation(parts))
        assert found == [parts.lead + "a1" + parts.end, parts.lead + "a2" + last]

    def test_last_turn(self, template, chat, parts, byte_tokenizer):
        last = parts.end if parts.last is None else parts.last
        found = trained(byte_tokenizer, template, chat, conversation(parts), mode="last_turn")
        assert found == [parts.lead + "a2" + last]

    def test_questions_alone(self, template, chat, parts, byte_tokenizer):
        found = trained(byte_tokenizer, template, chat, conversation(parts), roles=("user",))
        assert found == ["q1" + parts.asked, "q2" + parts.asked]

    def test_the_end_of_every_turn(self, template, chat, parts, byte_tokenizer):
        found = trained(byte_tokenizer, template, chat, conversation(parts), end_of_turn="all")
        last = parts.end if parts.last is None else parts.last
        expected = [parts.system or ""]
        for answer, end in (("a1", parts.end), ("a2", last)):
            said = parts.lead + answer + end
            expected += [parts.asked, said] if parts.header else [parts.asked + said]
        assert found == [text for text in expected if text]

    def test_no_end(self, template, chat, parts, byte_tokenizer):
        found = trained(byte_tokenizer, template, chat, conversation(parts), end_of_turn="none")
        assert found == [parts.lead + "a1", parts.lead + "a2"]

    def test_the_end_of_the_last_turn(self, template, chat, parts, byte_tokenizer):
        last = parts.end if parts.last is None else parts.last
        found = trained(byte_tokenizer, template, chat, conversation(parts), end_of_turn="last")
        assert found == [parts.lead + "a1", parts.lead + "a2" + last]

    def test_headers_of_answers(self, template, chat, parts, byte_tokenizer):
        last = parts.end if parts.last is None else parts.last
        found = trained(byte_tokenizer, template, chat, conversation(parts), headers="turn")
        opened = parts.header + parts.lead
        assert found == [opened + "a1" + parts.end, opened + "a2" + last]

    def test_full_trains_all_but_the_first_token(self, template, chat, parts, byte_tokenizer):
        [found] = trained(byte_tokenizer, template, chat, conversation(parts), mode="full")
        [example] = encode([Conversation(conversation(parts))], byte_tokenizer, template, mode="full")
        assert found == byte_tokenizer.decode(example.input_ids[1:].tolist())
        assert example.turns.max() == len(conversation(parts)) - 1
