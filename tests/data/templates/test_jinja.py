"""A user's chat template in a file, and templates that cannot be tracked."""

from __future__ import annotations

import pytest

from mora_jax.data import Conversation, Message, Renderer, render_prompt
from mora_jax.errors import InputError

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ¿' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ¿' }}{% endif %}\n"
)
ROW = Conversation((Message("user", "a"), Message("assistant", "b")), source="f.json, row 3")


def test_a_file_takes_the_place_of_the_tokenizers_own_template(make_tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + CHAT.encode())
    tokenizer = make_tokenizer("byte_level", "llama3")
    renderer = Renderer(tokenizer, str(file))
    assert renderer.template == str(file)
    assert renderer.render(ROW).text == "<|user|> ¿a<|im_end|><|assistant|> ¿b<|im_end|>"
    assert renderer.prompt(ROW.messages[:1]) == "<|user|> ¿a<|im_end|><|assistant|> ¿"
    assert render_prompt(tokenizer, "a", str(file)).text == renderer.prompt(ROW.messages[:1])
    assert renderer.program == CHAT
    assert Renderer(tokenizer).program != CHAT


def test_a_file_of_any_name_and_a_name_that_is_also_a_file(make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(CHAT, encoding="utf-8")
    (tmp_path / "zephyr").write_text(CHAT, encoding="utf-8")
    tokenizer = make_tokenizer("byte_level")
    assert "¿" in Renderer(tokenizer, "mine.txt").render(ROW).text
    assert "¿" not in Renderer(tokenizer, "zephyr").render(ROW).text
    assert "¿" in Renderer(tokenizer, "./zephyr").render(ROW).text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jinja", b"{% for m in messages %}\n{{ m['content'] }\n", r"a\.jinja, line 2: not a Jinja template: "),
        ("a.j2", b"{% endfor %}", r"a\.j2, line 1: not a Jinja template: "),
        ("a.jinja", b"{{ messages }}\n\xff", r"a\.jinja: not UTF-8 at byte 15: "),
        ("a.jinja", None, r"cannot read the chat template .*a\.jinja: No such file"),
        ("a", None, r"unknown template '.*a': choose one of tokenizer, .*, or a Jinja file"),
    ],
)
def test_files_that_are_no_template(name, content, message, make_tokenizer, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Renderer(make_tokenizer("byte_level"), str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_template(make_tokenizer, tmp_path):
    (tmp_path / "a.jinja").mkdir()
    with pytest.raises(InputError, match=r"cannot read the chat template .*a\.jinja: Is a directory"):
        Renderer(make_tokenizer("byte_level"), str(tmp_path / "a.jinja"))


def test_a_file_that_refuses_a_bare_question_is_read_all_the_same(make_tokenizer, tmp_path):
    file = tmp_path / "strict.jinja"
    file.write_text("{% if messages | length < 2 %}{{ raise_exception('two') }}{% endif %}" + CHAT, encoding="utf-8")
    assert "¿b" in Renderer(make_tokenizer("byte_level"), str(file)).render(ROW).text


UPPER = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"


def test_a_row_that_cannot_be_tracked_is_refused_or_falls_back(make_tokenizer):
    tokenizer = make_tokenizer("byte_level", UPPER)
    with pytest.raises(InputError, match=r"^f\.json, row 3: .* cannot be tracked, .*; set data\.fallback=chatml"):
        Renderer(tokenizer).render(ROW)
    renderer = Renderer(tokenizer, fallback="zephyr")
    assert renderer.fell_back == 0
    assert renderer.render(ROW) == Renderer(tokenizer, "zephyr").render(ROW)
    assert renderer.fell_back == 1
    shown = Conversation((Message("user", "A"), Message("assistant", "B")))
    [note] = Renderer(tokenizer).notes
    assert note.startswith("the chat template cannot be tracked, ")
    assert renderer.render(shown).text.startswith("<|user|>\n")
    assert renderer.fell_back == 2


def test_a_fallback_that_is_none(make_tokenizer):
    with pytest.raises(InputError, match="unknown template 'tokenizer' to fall back to: choose one of alpaca"):
        Renderer(make_tokenizer("byte_level", UPPER), fallback="tokenizer")


def test_a_template_that_changes_earlier_turns_is_reported(make_tokenizer):
    chat = (
        "{% for m in messages %}{{ m['role'] if loop.revindex < 3 else '' }}{{ m['content'] + '<|im_end|>' }}"
        "{% endfor %}"
    )
    told = "the chat template renders a turn in another way when more turns follow"
    assert told in Renderer(make_tokenizer("byte_level", chat)).notes
    assert told not in Renderer(make_tokenizer("byte_level", "llama3")).notes
