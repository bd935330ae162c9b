"""Task files: the prompts that they make, and what is refused."""

import json

import pytest

from mora_jax.errors import InputError
from mora_jax.evaluation.tasks.examples import make_examples, pairs_of, read_rows
from mora_jax.evaluation.tasks.task import load_task, task_names

MMLU = "The following are multiple choice questions (with answers) about a b.\n\n"
# (task, row, the prompt, the right choice)
PROMPTS = [
    ("arc_easy", {"query": "Question: Why?\n", "choices": ["x", "y"], "gold": 1}, "Question: Why?\nAnswer:", 1),
    (
        "arc_challenge",
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "Question: Why?\nAnswer:",
        1,
    ),
    ("boolq", {"query": "Passage: P.\nQuestion: q?", "choices": ["n", "y"], "gold": 0}, "P.\nQuestion: q?\nAnswer:", 0),
    ("boolq", {"passage": "P.", "question": "q", "answer": True}, "P.\nQuestion: q?\nAnswer:", 1),
    ("boolq", {"passage": "P.", "question": "q", "label": 0}, "P.\nQuestion: q?\nAnswer:", 0),
    ("piqa", {"query": "Question: g\n", "choices": ["x", "y"], "gold": 0}, "Question: g\nAnswer:", 0),
    ("piqa", {"goal": "g", "sol1": "x", "sol2": "y", "label": 1}, "Question: g\nAnswer:", 1),
    (
        "mmlu",
        {"subject": "a_b", "question": " Q? ", "choices": ["x", "y", "z", "w"], "answer": 3},
        MMLU + "Q?\nA. x\nB. y\nC. z\nD. w\nAnswer:",
        3,
    ),
    ("lambada", {"context": "It is a", "continuation": "word"}, "It is a", None),
    ("lambada_openai", {"text": "It is a word"}, "It is a", None),
    ("gsm8k", {"question": "1+1?", "answer": "2\n#### 2"}, "Question: 1+1?\nAnswer:", None),
    (
        "squad",
        {"title": "T", "context": "C", "question": "Q?", "answers": {"text": ["x"]}},
        "Title: T\n\nBackground: C\n\nQuestion: Q?\n\nAnswer:",
        None,
    ),
    ("squad", {"context": "C", "question": "Q?", "answers": ["x"]}, "Background: C\n\nQuestion: Q?\n\nAnswer:", None),
    ("squad", {"context": "C", "question": "Q?", "answer": "x"}, "Background: C\n\nQuestion: Q?\n\nAnswer:", None),
    ("instruct", {"instruction": "Do", "input": "it", "output": "x"}, "Do\n\nit", None),
    ("instruct", {"instruction": "Do", "output": "x"}, "Do", None),
    ("classification", {"text": " t ", "label": "neg"}, "t\nLabel:", 0),
    ("text", {"text": " t "}, " t ", None),
]  # fmt: skip


def examples(name, *rows, **options):
    numbered = [(f"f.jsonl, row {number}", number, row) for number, row in enumerate(rows, 1)]
    return make_examples(load_task(name), numbered, **options)


@pytest.mark.parametrize("name, row, prompt, answer", PROMPTS)
def test_prompts(name, row, prompt, answer):
    rows = [row, {"text": "other", "label": "pos"}] if name == "classification" else [row]
    found = examples(name, *rows)[0]
    assert (found.prompt, found.answer) == (prompt, answer)
    task = load_task(name)
    pairs = list(pairs_of(found, task))
    if task.name in ("arc_easy", "piqa"):
        assert pairs == [(prompt, " x"), (prompt, " y")]
    elif task.name == "boolq":
        assert [continuation for _, continuation in pairs] in ([" no", " yes"], [" n", " y"])
    elif task.name == "mmlu":
        assert [continuation for _, continuation in pairs] == [" A", " B", " C", " D"]
    elif task.name == "classification":
        assert [continuation for _, continuation in pairs] == [" neg", " pos"]
    elif task.name == "lambada":
        assert pairs == [(prompt, " word")]
    elif task.type == "generate":
        assert found.truths[0] in ("x", "2\n#### 2")


def test_winogrande_scores_the_rest_behind_two_beginnings():
    shapes = [
        {"context_options": ["so Sarah", "so Maria"], "continuation": "left.", "gold": 1},
        {"sentence": "so _ left.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
    ]
    for row in shapes:
        found = examples("winogrande", row)[0]
        assert list(pairs_of(found, load_task("winogrande"))) == [("so Sarah", " left."), ("so Maria", " left.")]
        assert found.answer == 1


def test_winogrande_keeps_what_stands_behind_a_second_underscore():
    row = {"sentence": "so _ left the _ room.", "option1": "Sarah", "option2": "Maria", "answer": "1"}
    assert examples("winogrande", row)[0].continuation == "left the _ room."


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("arc_easy", {"query": None, "choices": ["x", "y"], "gold": 0}, "no prompt can be made of this row: column"),
        ("arc_easy", {"query": "q", "choices": ["x", None], "gold": 0}, "a list of texts, found ['x', null]"),
        ("arc_easy", {"query": "q", "choices": ["x", "y"], "gold": None}, "no answer can be made of this row: column"),
        ("winogrande", {"sentence": "a _ b", "option1": "x", "option2": None, "answer": "1"}, "column option2 is null"),
        ("mmlu", {"subject": None, "question": "q", "choices": ["x", "y"], "answer": 1}, "column subject is null"),
        ("gsm8k", {"question": "q", "answer": None}, "column answer is null"),
        ("gsm8k", {"question": "q", "answer": float("nan")}, "column answer is null"),
        ("gsm8k", {"question": "q", "answer": ["7", None]}, "a text, a number or a list of them, found ['7', null]"),
        ("gsm8k", {"question": "q", "answer": {"value": 7}}, "a text, a number or a list of them"),
        ("squad", {"context": "c", "question": "q", "answers": {"text": None}}, "column answers.text is null"),
        ("instruct", {"instruction": None, "input": "i", "output": "o"}, "column instruction is null"),
        ("text", {"text": None}, "column text is null"),
        ("classification", {"text": "t", "label": None}, "column label is null"),
        ("classification", {"text": "t", "label": ["a"]}, "a label must be a text or a number, found ['a']"),
        ("classification", {"text": None, "label": "a"}, "column text is null"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shots", [0, 1])
def test_nulls_are_refused_with_their_row_and_column(name, row, words, shots):
    with pytest.raises(InputError) as error:
        examples(name, row, row, shots=0 if name == "text" else shots)
    assert str(error.value).startswith("f.jsonl, row 1: ") and words in str(error.value)


def test_a_null_that_a_task_does_without(tmp_path):
    first = examples("instruct", {"instruction": "Do", "input": None, "output": "x"})[0]
    assert (first.prompt, first.truths) == ("Do", ("x",))
    row = {"passage": "P.", "question": "q", "answer": None, "label": 1}
    assert examples("boolq", row)[0].answer == 1
    title = {"title": None, "context": "C", "question": "Q?", "answers": {"text": ["x"]}}
    assert examples("squad", title)[0].prompt.startswith("Background: C")
    (tmp_path / "mine.toml").write_text(
        'type = "generate"\n[[rows]]\n'
        'prompt = "{% if a is none %}-{% else %}{{ a }}{% endif %}{% if b %}{{ b }}{% endif %}"\nanswer = "c or 0"'
    )
    rows = [{"a": None, "b": None, "c": None}, {"a": "A", "b": "B", "c": 2}]
    found = examples(str(tmp_path / "mine.toml"), *rows)
    assert [(one.prompt, one.truths) for one in found] == [("-", ("0",)), ("AB", ("2",))]


def test_a_column_that_is_called_labels_is_the_rows_own(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'type = "multiple_choice"\n[[rows]]\nprompt = "{{ q }}"\nchoices = "labels"\nanswer = "a"'
    )
    rows = [{"q": "Q", "labels": ["x", "y"], "a": "y"}, {"q": "Q", "labels": ["z", "x"], "a": "z"}]
    found = examples(str(tmp_path / "mine.toml"), *rows)
    assert [(one.choices, one.answer) for one in found] == [(("x", "y"), 1), (("z", "x"), 0)]
    without = [{"q": "Q", "a": "y"}, {"q": "Q", "a": "z"}]
    assert [one.choices for one in examples(str(tmp_path / "mine.toml"), *without)] == [("y", "z")] * 2


def test_shots_are_other_rows_of_the_same_group():
    rows = [
        {"subject": "ab"[number % 2], "question": f"Q{number}", "choices": ["x", "y"], "answer": number % 2}
        for number in range(8)
    ]
    found = examples("mmlu", *rows, shots=2, limit=3)
    assert len(found) == 3
    for example in found:
        header, *shots, last = example.prompt.split("\n\n")
        number = int(last[1])
        assert header.endswith("about " + "ab"[number % 2] + ".")
        asked = [int(shot[1]) for shot in shots]
        assert len(set(asked)) == 2 and number not in asked
        assert all(other % 2 == number % 2 for other in asked)
        assert all(shot.endswith("Answer: " + "AB"[number % 2]) for shot in shots)
        assert last == f"Q{number}\nA. x\nB. y\nAnswer:"
    assert [one.prompt for one in examples("mmlu", *rows, shots=2, limit=3)] == [one.prompt for one in found]
    # A limit draws rows from the whole file, and of more rows those of fewer are some.
    drawn = [{one.prompt for one in examples("mmlu", *rows, limit=limit)} for limit in (3, 5, None)]
    assert [len(prompts) for prompts in drawn] == [3, 5, 8] and drawn[0] < drawn[1] < drawn[2]
    assert drawn[0] != {one.prompt for one in examples("mmlu", *rows[:3])}
    with pytest.raises(InputError, match="row 1: 4 shots need as many other rows of its subject, there are 3"):
        examples("mmlu", *rows, shots=4)
    with pytest.raises(InputError, match="leave out --shots"):
        examples("text", {"text": "t"}, shots=1)
    partial = {"context_options": ["so A", "so B"], "continuation": "left.", "gold": 1}
    assert examples("winogrande", partial, partial, shots=1)[0].prompt == "so B left.\n\n"
    chat = examples("instruct", *({"instruction": f"Do {n}", "output": f"did {n}"} for n in range(2)), shots=1)
    assert (chat[0].turns, chat[0].prompt) == ((("Do 1", "did 1"),), "Do 0")


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("arc_easy", {"a": 1, "b": 2}, "needs the columns choices, gold, query; or answerKey, choices, question; "
         "this row has a, b"),
        ("arc_easy", {"query": "", "choices": ["x", "y"], "gold": 2}, "the answer 2 is outside of the 2 choices"),
        ("arc_easy", {"query": "Q", "choices": ["x", "y"], "gold": "z"}, "row 1: the answer 'z' is none of x, y"),
        ("arc_easy", {"query": "Q", "choices": ["x"], "gold": 0}, "at least two choices, found 1"),
        ("arc_easy", {"query": "Q", "choices": "xy", "gold": 0}, "choices must be a list of texts, found 'xy'"),
        ("arc_easy", {"query": 3, "choices": ["x", "y"], "gold": [0]}, "is none of x, y"),
        ("arc_easy", {"question": "Q", "choices": ["x"], "answerKey": "A"}, "no choices can be made of this row"),
        ("boolq", {"query": None, "choices": ["x", "y"], "gold": 0}, "no prompt can be made of this row"),
        ("winogrande", {"context_options": ["a", "b"], "continuation": "c", "gold": 2}, "the answer 2 is outside"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(name, row, words):
    with pytest.raises(InputError) as error:
        examples(name, row)
    assert words in str(error.value)
    assert str(error.value).startswith("f.jsonl, row 1: ")


def test_unknown_tasks_and_empty_files(tmp_path):
    with pytest.raises(InputError, match=r"no task 'arc'; there are arc_easy, boolq, .*, and task files NAME.toml"):
        load_task("arc")
    with pytest.raises(InputError, match=r"no task file nowhere.toml"):
        load_task("nowhere.toml")
    assert 6 < len(task_names()) <= 18
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "lists.json").write_text("[[1]]")
    (tmp_path / "text.txt").write_text("two\n\nlines\n")
    for name in ("empty.jsonl", "lists.json"):
        with pytest.raises(InputError, match=name):
            read_rows(str(tmp_path / name))
    assert [row for *_, row in read_rows(str(tmp_path / "text.txt"), whole_texts=True)] == [{"text": "two\n\nlines\n"}]


@pytest.mark.parametrize(
    "content, words",
    [
        ("a =", "is no TOML file"),
        ('type = "multiple_choice"', r"at least one \[\[rows\]\]"),
        ('type = "sums"\n[[rows]]\ntext = "t"', "type must be one of multiple_choice, .*, found 'sums'"),
        ('type = "text"\nstops = []\n[[rows]]\ntext = "t"', "unknown key stops; a task file has type, metrics"),
        ('type = "text"\nstop = "x"\n[[rows]]\ntext = "t"', "stop must be a list of texts"),
        ('type = "text"\nchat = 1\n[[rows]]\ntext = "t"', "chat must be a bool, found 1"),
        ('type = "generate"\nmax_new_tokens = 0\n[[rows]]\nprompt = "t"\nanswer = "a"', "max_new_tokens"),
        ('type = "text"\n[[rows]]\nprompt = "t"', r"\[\[rows\]\] lacks text"),
        ('type = "text"\n[[rows]]\ntext = "t"\nanswer = "a"', r"\[\[rows\]\] has answer; text knows text"),
        ('type = "text"\n[[rows]]\ntext = 1', "text must be a text, found 1"),
        ('type = "text"\n[[rows]]\ntext = "{{ a"', "text is not understood by Jinja"),
        ('type = "generate"\n[[rows]]\nprompt = "t"\nanswer = "a b"', "answer is not understood by Jinja"),
    ],
)  # fmt: skip
def test_task_files_that_are_not_understood(content, words, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=words) as error:
        load_task(str(path))
    assert str(path) in str(error.value)


def test_a_task_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'type = "multiple_choice"\ndelimiter = ""\n'
        '[[rows]]\nprompt = "{{ a }}="\nchoices = "[b, c]"\nanswer = "d == c"\n'
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": "A", "b": "B", "c": "C", "d": "C"}))
    task = load_task(str(path))
    found = make_examples(task, read_rows(str(tmp_path / "rows.jsonl")))[0]
    assert (task.name, list(pairs_of(found, task)), found.answer) == ("mine", [("A=", "B"), ("A=", "C")], 1)
