"""Rows in the shapes in which the most used public instruction sets are published, in the files that hold them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mora_jax.data import Mapping, Message, inspect_data, load_rows, load_tokenizer
from mora_jax.errors import InputError

DEMO = Path(__file__).parents[2] / "mora_jax/demo/assets/model"


class Public(NamedTuple):
    """A set: the kinds of file it comes in, its rows, and what the rows become (or a part of the refusal)."""

    files: str
    rows: list[dict[str, Any]]
    read: list[list[Message]] | str


def system(text: str, **more: Any) -> Message:
    return Message("system", text, **more)


def user(text: str, context: str = "", **more: Any) -> Message:
    return Message("user", text, context, **more)


def assistant(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(*turns: tuple[str, str], **more: Any) -> list[dict[str, Any]]:
    return [{"from": role, "value": text, **more} for role, text in turns]


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


TOOL = {"name": "rain", "description": "Rain of a day", "parameters": {"day": {"type": "str", "default": ""}}}
ASK = [("human", "Two plus two?"), ("gpt", "Four.")]
ASKED = [user("Two plus two?"), assistant("Four.")]
CHAT = chat(("user", "Two plus two?"), ("assistant", "Four."))
ASKED_FIVE = [user("Two plus two?"), assistant("Five.")]
CHAT_FIVE = chat(("user", "Two plus two?"), ("assistant", "Five."))

SETS: dict[str, Public] = {
    "alpaca": Public(
        "json jsonl parquet csv",
        [
            {"instruction": "Name a tree.", "input": "", "output": "Oak.", "text": "Below ... Name a tree ... Oak."},
            {"instruction": "Sort.", "input": "c a b", "output": "a b c", "text": "Below ... Sort ... a b c"},
        ],
        [[user("Name a tree."), assistant("Oak.")], [user("Sort.", "c a b"), assistant("a b c")]],
    ),
    "alpaca-cleaned": Public(
        "json",
        [{"output": "Oak.", "input": "", "instruction": "Name a tree."}, {"output": "", "instruction": "Be still."}],
        [[user("Name a tree."), assistant("Oak.")], [user("Be still."), assistant("")]],
    ),
    "dolly-15k": Public(
        "jsonl parquet",
        [
            {"instruction": "Who?", "context": "Ann came.", "response": "Ann.", "category": "closed_qa"},
            {"instruction": "Why?", "context": "", "response": "Because.", "category": "general_qa"},
        ],
        [[user("Who?", "Ann came."), assistant("Ann.")], [user("Why?"), assistant("Because.")]],
    ),
    "code-alpaca": Public(
        "json csv", [{"prompt": "Print 1.", "completion": "print(1)"}], [[user("Print 1."), assistant("print(1)")]]
    ),
    "vicuna": Public(
        "json",
        [
            {"id": "a_0", "conversations": said(*ASK, markdown=None, text=None)},
            {"id": "a_1", "model": "", "conversations": [*said(("user", "Hi")), *said(("bing", "Hello"), text="x")]},
            {"id": "a_2", "conversations": said(("system", "Be brief."), ("Human", "Hi"), ("chatgpt", "Hello"))},
        ],
        [ASKED, [user("Hi"), assistant("Hello")], [system("Be brief."), user("Hi"), assistant("Hello")]],
    ),
    "vicuna-without-turns": Public(
        "json",
        [{"id": "a_0", "conversations": said(*ASK)}, {"id": "a_1", "conversations": []}],
        "row 2: `conversations` should be a filled list and is empty (data.on_error=skip leaves such rows out)",
    ),
    "glaive-toolcall-demo": Public(
        "json jsonl parquet",
        [
            {
                "conversations": said(
                    ("human", "Will it rain?"),
                    ("function_call", '{"name": "rain", "arguments": {"day": "today"}}'),
                    ("observation", '{"rain": true}'),
                    ("gpt", "Yes."),
                ),
                "tools": json.dumps([TOOL]),
            },
            {"conversations": said(*ASK), "tools": "[]"},
        ],
        [
            [
                user("Will it rain?"),
                assistant("", tool_calls=(call("rain", day="today"),)),
                Message("tool", '{"rain": true}'),
                assistant("Yes."),
            ],
            ASKED,
        ],
    ),
    "glaive-v2": Public(
        "json",
        [{"system": "SYSTEM: Be brief.", "chat": "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"}],
        "row 1: `chat` holds a whole conversation as one text (USER: ..., ASSISTANT: ...), as Glaive publishes them:",
    ),
    "xlam-function-calling": Public(
        "json parquet",
        [
            {
                "id": 0,
                "query": "Will it rain?",
                "answers": '[{"name": "rain", "arguments": {"day": "today"}}]',
                "tools": json.dumps([TOOL]),
            }
        ],
        [[user("Will it rain?"), assistant("", tool_calls=(call("rain", day="today"),))]],
    ),
    "openai-tools": Public(
        "jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "Will it rain?", "tool_calls": [], "name": "", "weight": None},
                    {
                        "role": "assistant",
                        "content": None,
                        "reasoning_content": None,
                        "function_call": {"name": None, "arguments": None},
                        "tool_calls": [
                            {"id": "c", "type": "function", "function": {"name": "rain", "arguments": '{"day": ""}'}}
                        ],
                    },
                    {"role": "tool", "content": "true", "tool_call_id": "c", "tool_calls": ""},
                    {"role": "assistant", "content": "Yes.", "tool_calls": "[]", "function_call": "", "weight": ""},
                ],
                "tools": [{"type": "function", "function": TOOL}],
                "parallel_tool_calls": False,
            },
            {"messages": CHAT, "tools": None, "functions": ""},
        ],
        [
            [
                user("Will it rain?"),
                assistant("", tool_calls=(call("rain", day="") | {"id": "c"},)),
                Message("tool", "true", tool_call_id="c"),
                assistant("Yes."),
            ],
            ASKED,
        ],
    ),
    "oasst1": Public(
        "jsonl parquet csv",
        [
            {"message_id": "m", "parent_id": None, "text": "Hi", "role": "prompter", "lang": "en", "rank": None},
            {"message_id": "n", "parent_id": "m", "text": "Hello", "role": "assistant", "lang": "en", "rank": 0},
        ],
        "row 1: the row is one message of a tree (`message_id`, `parent_id`), as OpenAssistant publishes them: join",
    ),
    "oasst-trees": Public(
        "jsonl",
        [{"message_tree_id": "m", "tree_state": "ready_for_export", "prompt": {"text": "Hi", "replies": []}}],
        "row 1: the row is a tree of messages (`message_tree_id`, `prompt` with `replies`), as OpenAssistant",
    ),
    "ultrachat-200k": Public(
        "parquet jsonl",
        [{"prompt": "Two plus two?", "prompt_id": "f0e3", "messages": CHAT}],
        [ASKED],
    ),
    "no-robots": Public(
        "parquet jsonl",
        [{"prompt": "Two plus two?", "prompt_id": "f0", "messages": CHAT, "category": "Closed QA"}],
        [ASKED],
    ),
    "tulu-3": Public("parquet jsonl", [{"id": "s_1", "messages": CHAT, "source": "ai2/s"}], [ASKED]),
    "openhermes-2.5": Public(
        "json parquet",
        [
            {"custom_instruction": None, "system_prompt": None, "conversations": said(*ASK, weight=None), "idx": None},
            {
                "custom_instruction": False,
                "system_prompt": "Be brief.",
                "conversations": said(("system", "Be brief."), *ASK),
                "idx": "3",
            },
        ],
        [ASKED, [system("Be brief."), *ASKED]],
    ),
    "slim-orca": Public(
        "jsonl parquet",
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be brief.", "weight": None},
                    {"from": "human", "value": "Two plus two?", "weight": 0.0},
                    {"from": "gpt", "value": "Four.", "weight": 1.0},
                ]
            }
        ],
        [[system("Be brief."), user("Two plus two?", weight=0.0), assistant("Four.", weight=1.0)]],
    ),
    "open-orca": Public(
        "parquet jsonl",
        [
            {"id": "niv.1", "system_prompt": "Be brief.", "question": "Two plus two?", "response": "Four."},
            {"id": "niv.2", "system_prompt": "", "question": "Two plus two?", "response": "Four."},
        ],
        [[system("Be brief."), *ASKED], ASKED],
    ),
    "flan": Public(
        "jsonl parquet",
        [{"inputs": "Two plus two?", "targets": "Four.", "_template_idx": 4, "_task_name": "sum"}],
        [ASKED],
    ),
    "aya": Public(
        "parquet",
        [{"inputs": "Two plus two?", "targets": "Four.", "language": "English", "user_id": "u"}],
        [ASKED],
    ),
    "capybara": Public(
        "jsonl parquet",
        [{"source": "s", "conversation": [{"input": "Two plus two?", "output": "Four."}] * 2}],
        [ASKED * 2],
    ),
    "lima": Public(
        "jsonl",
        [
            {"conversations": ["Two plus two?", "Four."], "source": "stackexchange"},
            {"conversations": ["Two plus two?", "Four.", "Why?", "Count."], "source": "multi_turn"},
        ],
        [ASKED, [*ASKED, user("Why?"), assistant("Count.")]],
    ),
    "meta-math-qa": Public(
        "json parquet",
        [{"type": "GSM_AnsAug", "query": "Two plus two?", "original_question": "2 + 2", "response": "Four."}],
        [ASKED],
    ),
    "gsm8k": Public("jsonl parquet", [{"question": "Two plus two?", "answer": "Four."}], [ASKED]),
    "math-instruct": Public(
        "json parquet", [{"source": "d/g.json", "output": "Four.", "instruction": "Two plus two?"}], [ASKED]
    ),
    "wizard-lm-evol-v2": Public("json", [{"idx": "x", "conversations": said(*ASK)}], [ASKED]),
    "self-instruct-seeds": Public(
        "jsonl",
        [
            {
                "id": "seed_task_0",
                "name": "sum",
                "instruction": "Add.",
                "instances": [{"input": "2 2", "output": "4"}, {"input": "", "output": "0"}],
                "is_classification": False,
            }
        ],
        [[user("Add.", "2 2"), assistant("4")], [user("Add."), assistant("0")]],
    ),
    "help-steer": Public(
        "jsonl parquet", [{"prompt": "Two plus two?", "response": "Four.", "helpfulness": 4}], [ASKED]
    ),
    "nemotron": Public(
        "jsonl",
        [{"input": chat(("user", "Two plus two?")), "output": "Four.", "category": "math", "system_prompt": "Think."}],
        [[system("Think."), *ASKED]],
    ),
    "sql-create-context": Public(
        "json csv",
        [{"question": "Count.", "context": "CREATE TABLE t (a INT)", "answer": "SELECT COUNT(*) FROM t"}],
        [[user("Count.", "CREATE TABLE t (a INT)"), assistant("SELECT COUNT(*) FROM t")]],
    ),
    "agent-instruct": Public(
        "jsonl",
        [
            {
                "id": "os_0",
                "conversations": [
                    {"from": "human", "loss": None, "value": "Hi"},
                    {"from": "gpt", "loss": False, "value": "Hello"},
                    {"from": "human", "loss": None, "value": "List."},
                    {"from": "gpt", "loss": True, "value": "ls"},
                ],
            }
        ],
        [[user("Hi"), assistant("Hello", weight=0.0), user("List."), assistant("ls", weight=1.0)]],
    ),
    "thinking": Public(
        "jsonl parquet",
        [
            {
                "messages": [
                    {"role": "system", "content": "Be brief.", "thinking": None},
                    {"role": "user", "content": "Two plus two?", "thinking": None},
                    {"role": "assistant", "content": "Four.", "thinking": "Count."},
                ]
            }
        ],
        [[system("Be brief."), user("Two plus two?"), assistant("Four.", reasoning="Count.")]],
    ),
    "ultrafeedback": Public(
        "jsonl",
        [{"source": "s", "instruction": "Two plus two?", "models": ["m"], "completions": [{"response": "Four."}]}],
        "row 1: `completions` holds several answers to one instruction, as UltraFeedback publishes them: choose one",
    ),
    "ultrafeedback-preferences": Public(
        "jsonl parquet",
        [{"prompt": "Two plus two?", "prompt_id": "f", "chosen": CHAT, "rejected": CHAT_FIVE, "score_chosen": 8.0}],
        [ASKED, ASKED_FIVE],
    ),
    "orca-preferences": Public(
        "jsonl",
        [{"system": "", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."}],
        [ASKED, ASKED_FIVE],
    ),
    "hh-rlhf": Public(
        "jsonl",
        [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}],
        [[user("Hi"), assistant("Hello")], [user("Hi"), assistant("No")]],
    ),
    "kto": Public(
        "jsonl parquet",
        [{"prompt": "Two plus two?", "completion": "Five.", "label": False}],
        [ASKED_FIVE],
    ),
    "mmlu": Public(
        "jsonl parquet",
        [{"question": "Two plus two?", "subject": "sums", "choices": ["3", "4"], "answer": 1}],
        "row 1: the row is a question with `choices`, and says by a number or a letter which is right: write a row",
    ),
    "arc": Public(
        "jsonl",
        [{"question": "Two plus two?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}],
        "row 1: the row is a question with `choices`, and says by a number or a letter which is right: write a row",
    ),
    "lambada": Public(
        "jsonl",
        [{"context": "Two plus two is", "continuation": " four"}],
        "nearest is `prompt_completion`; set data.columns to prompt=context,completion=continuation;",
    ),
    "numina-math": Public(
        "parquet", [{"source": "s", "problem": "Two plus two?", "solution": "Four.", "messages": CHAT}], [ASKED]
    ),
    "competition-math": Public(
        "jsonl",
        [{"problem": "Two plus two?", "level": "1", "solution": "Four."}],
        "nearest is `prompt_completion`; set data.columns to prompt=problem,completion=solution; docs/formats.md",
    ),
    "cnn-dailymail": Public(
        "csv",
        [{"id": "1", "article": "Long.", "highlights": "Short."}],
        "set data.columns to prompt=article,completion=highlights;",
    ),
    "ultrachat": Public(
        "jsonl",
        [{"id": "0", "data": ["Two plus two?", "Four."]}],
        "nearest is `messages`; set data.columns to messages=data;",
    ),
    "capital-letters": Public(
        "csv",
        [{"Instruction": "Two plus two?", "Input": "", "Output": "Four."}],
        "nearest is `alpaca`; set data.columns to instruction=Instruction,output=Output,input=Input;",
    ),
    "one-half": Public(
        "csv",
        [{"instruction": "Two plus two?", "score": "1"}],
        "nearest is `alpaca`, which needs `output` too; set data.columns to output=COLUMN;",
    ),
}


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(path)


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


WRITE: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"),
    "parquet": _parquet,
    "csv": _csv,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in SETS for kind in SETS[name].files.split()])
def test_public_sets(name, kind, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    path = Path(f"{name}.{kind}")
    WRITE[kind](path, SETS[name].rows)
    expected = SETS[name].read
    if isinstance(expected, str):
        for read in (load_rows, lambda path: inspect_data(path, tokenizer)):
            with pytest.raises(InputError) as caught:
                read(path)
            assert expected in str(caught.value)
            assert str(caught.value).startswith(f"{path}, row ")
            assert len(str(caught.value)) < 330
            assert "\n" not in str(caught.value)
        return
    assert [list(row.messages) for row in load_rows(path)] == expected
    facts = inspect_data(path, tokenizer, template="chatml")
    assert facts["kept"] == len(expected)
    assert facts["dropped"] == {}


def test_rendered_chats_are_read_as_text_and_named(tmp_path, tokenizer):
    for text in (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>",
        "### Human: Hi### Assistant: Hello",
    ):
        WRITE["jsonl"](tmp_path / "a.jsonl", [{"text": text}])
        facts = inspect_data(tmp_path / "a.jsonl", tokenizer)
        # All but the first token, which nothing predicts.
        assert (facts["format"], facts["trained_tokens"]) == ("text", facts["tokens"] - 1)
        assert any("hold the markup of a chat and are trained whole" in note for note in facts["notes"])


#: What a refusal proposes as `data.columns`, and what the rows become with it: messages, or plain text.
ADVICE: dict[str, tuple[str, list[Message] | str]] = {
    "glaive-v2": ("text=chat", "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"),
    "lambada": ("prompt=context,completion=continuation", [user("Two plus two is"), assistant(" four")]),
    "competition-math": ("prompt=problem,completion=solution", ASKED),
    "cnn-dailymail": ("prompt=article,completion=highlights", [user("Long."), assistant("Short.")]),
    "ultrachat": ("messages=data", ASKED),
    "capital-letters": ("instruction=Instruction,output=Output,input=Input", ASKED),
}


#: What trains on the chosen answers of pairs alone, or on labelled ones as on others.
WITHOUT_JUDGEMENT: dict[str, tuple[str, list[Message] | str]] = {
    "ultrafeedback-preferences": ("messages=chosen", ASKED),
    "orca-preferences": ("answer=chosen", ASKED),
    "hh-rlhf": ("text=chosen", "\n\nHuman: Hi\n\nAssistant: Hello"),
    "kto": ("ignore=label", ASKED_FIVE),
}


@pytest.mark.parametrize("name", WITHOUT_JUDGEMENT)
def test_chosen_answers_are_trained_on_alone_by_columns(name):
    columns, expected = WITHOUT_JUDGEMENT[name]
    [row] = load_rows(list(SETS[name].rows), mapping=Mapping.parse([columns]))
    assert (row.text if isinstance(expected, str) else list(row.messages)) == expected


@pytest.mark.parametrize("name", [name for name in SETS if isinstance(SETS[name].read, str)])
def test_the_advice_works(name, tmp_path):
    """What a refusal says to set is enough, and gives what the row means."""
    path = tmp_path / f"{name}.jsonl"
    WRITE["jsonl"](path, SETS[name].rows)
    with pytest.raises(InputError) as caught:
        load_rows(path)
    advised = re.search(r"data\.columns to ([\w=,-]+)", str(caught.value))
    if name not in ADVICE:
        assert advised is None or "COLUMN" in advised[1]
        return
    columns, expected = ADVICE[name]
    assert advised is not None and advised[1] == columns
    rows = load_rows(path, mapping=Mapping.parse(columns.split(",")))
    assert len(rows) == len(SETS[name].rows)
    assert (rows[0].text if isinstance(expected, str) else list(rows[0].messages)) == expected
