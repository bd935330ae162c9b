"""`mora-jax chat`, and `generate` with many prompts, as a user calls them."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

import mora_jax as mj
from mora_jax.cli.main import main
from mora_jax.evaluation import generate_batch
from mora_jax.evaluation.chat import ChatSession
from tests.cli.test_commands import write_adapter


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """Two of LoRA that share batches, one of DoRA that doesn't."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "one": mj.LoRAConfig(rank=2, alpha=4, targets=("q_proj", "down_proj")),
        "two": mj.LoRAConfig(rank=4, alpha=8, targets="v_proj"),
        "dora": mj.DoRAConfig(rank=2, alpha=4, targets="q_proj"),
    }
    return {name: write_adapter(model_dir, folder / name, config) for name, config in configs.items()}


@pytest.fixture
def typed(monkeypatch):
    """Puts lines into standard input."""

    def put(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))

    return put


def answer(model, tokenizer, *messages, **options):
    """What the model answers, by `generate_batch`."""
    turns = [{"role": role, "content": text} for role, text in messages]
    return generate_batch(model, tokenizer, [turns], max_new_tokens=6, **options)[0].rstrip("\ufffd")


def test_a_conversation_goes_on_until_it_is_forgotten(run, typed, model_dir, adapters):
    model, tokenizer = mj.load_pretrained(model_dir, dtype="float32")
    base = ("chat", "--model", model_dir, "--max-new-tokens", 6, "--system", "Be")
    typed("Hello\nAnd?\n\n/reset\nAnd?\n/adapter one\nAnd?\n/adapter three\n/help\n")
    code, out, err = run(*base, "--adapter", f"one={adapters['one']}", "--adapter", f"dora={adapters['dora']}")
    assert code == 0, err
    loaded = {name: mj.load_pretrained(model_dir, dtype="float32")[0] for name in ("one", "dora")}
    for name, other in loaded.items():
        mj.load_adapter(other, adapters[name])
    system, first = ("system", "Be"), "one"
    hello = answer(loaded[first], tokenizer, system, ("user", "Hello"))
    said = [system, ("user", "Hello"), ("assistant", hello), ("user", "And?")]
    again = answer(loaded[first], tokenizer, *said)
    forgotten = answer(loaded[first], tokenizer, system, ("user", "And?"))
    after = answer(loaded[first], tokenizer, system, ("user", "And?"), ("assistant", forgotten), ("user", "And?"))
    assert out == f"{hello}\n{again}\n{forgotten}\n{after}\n"
    assert len({hello, again, forgotten, after}) > 2, "equal answers would prove little"
    assert "error: there is no adapter 'three'; there are one, dora, base" in err
    typed("And?\n/adapter dora\nAnd?\n/adapter base\nAnd?\n")
    code, out, err = run(
        *base[:-2], *(w for name in ("one", "dora") for w in ("--adapter", f"{name}={adapters[name]}"))
    )
    assert code == 0, err
    turns: list[tuple[str, str]] = []
    for speaker, line in zip((loaded["one"], loaded["dora"], model), out.split("\n"), strict=False):
        turns.append(("user", "And?"))
        assert line == answer(speaker, tokenizer, *turns).split("\n")[0]
        turns.append(("assistant", answer(speaker, tokenizer, *turns)))


def test_a_session_leaves_out_what_has_no_room_and_numbers_its_draws(model_dir):
    model, tokenizer = mj.load_pretrained(model_dir, dtype="float32")
    session = ChatSession({"base": model}, tokenizer, max_new_tokens=8, sampling=mj_sampling(1.5))
    for number in range(5):
        said = "".join(session.ask("x" * 20))
        assert session.messages[-1] == {"role": "assistant", "content": said}
        kept = session.messages[session.left_out : -1]
        alone = generate_batch(model, tokenizer, [kept], max_new_tokens=8, sampling=mj_sampling(1.5), numbers=[number])[
            0
        ]
        assert said == alone.rstrip("\ufffd")
    assert session.left_out and session.left_out % 2 == 0
    with pytest.raises(mj.errors.InputError, match="the message has 143 tokens, the model's context 128"):
        list(session.ask("x" * 140))
    assert len(session.messages) == 10


def mj_sampling(temperature):
    from mora_jax.evaluation import Sampling

    return Sampling(temperature, 1.0, 3)


def test_ctrl_c_ends_an_answer_and_elsewhere_the_chat(run, typed, model_dir, monkeypatch):
    heard = []

    def ask(self, text):
        heard.append(text)
        for number in range(100):
            if number == 3 and text == "long":
                signal.raise_signal(signal.SIGINT)
            yield f"{number} "

    monkeypatch.setattr(ChatSession, "ask", ask)
    typed("long\nnext\n")
    code, out, _ = run("chat", "--model", model_dir)
    assert (code, heard) == (0, ["long", "next"])
    assert out == "0 1 2 3 \n" + "".join(f"{number} " for number in range(100)) + "\n"

    def lines(self):
        yield "long\n"
        signal.raise_signal(signal.SIGINT)
        yield "never\n"

    monkeypatch.setattr(sys, "stdin", type("Lines", (), {"__iter__": lines, "isatty": lambda self: False})())
    code, out, err = run("chat", "--model", model_dir)
    assert (code, err.splitlines()[-1]) == (130, "stopped by Ctrl-C")
    assert heard == ["long", "next", "long"]


@pytest.mark.slow
def test_a_terminal(model_dir):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mora_jax", "chat", "--model", model_dir, "--max-new-tokens", "4"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, start_new_session=True)
    os.close(slave)

    def until(text):
        seen, ends = b"", time.monotonic() + 120
        while text not in seen and select.select([master], [], [], max(ends - time.monotonic(), 0))[0]:
            seen += os.read(master, 1024)
        assert text in seen, seen

    until(b"> ")
    os.write(master, b"Hello\n")
    until(b"\r\n> ")
    time.sleep(1)  # readline misses a signal between writing its prompt and waiting for keys
    process.send_signal(signal.SIGINT)
    until(b"\r\n> ")
    os.write(master, b"\x04")
    assert process.wait(60) == 0
    assert b"Ctrl-D ends the chat" in process.stderr.read()
    process.stderr.close()
    os.close(master)


def test_many_prompts_are_answered_in_their_order(run, fails, typed, model_dir, tmp_path):
    texts = ["Hello", "a rather longer question, " * 3, "x", "Say red", "y"]
    (tmp_path / "p.txt").write_text("\n".join(texts[:2]) + "\n\n" + "\n".join(texts[2:]))
    base = ("generate", "--model", model_dir, "--max-new-tokens", 8)
    model, tokenizer = mj.load_pretrained(model_dir, dtype="float32")
    answers = [text.rstrip("\ufffd") for text in generate_batch(model, tokenizer, texts, max_new_tokens=8)]
    many = ("--prompts", tmp_path / "p.txt", "--batch-size", 2)
    code, out, err = run(*base, *many)
    assert code == 0, err
    assert out == "".join(f"[{number}]\n{answer}\n\n" for number, answer in enumerate(answers, 1))
    code, out, _ = run(*base, *many, "--json")
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert found == [{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
    rows = [{"prompt": texts[0]}, {"messages": [{"role": "user", "content": texts[2]}]}]
    typed("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(*base, "--prompts", "-", "--json")
    assert [json.loads(line)["answer"] for line in out.split("\n")[:-1]] == [answers[0], answers[2]]
    assert json.loads(run(*base, "--prompt", "Hello", "--json")[1]) == {"prompt": "Hello", "answer": answers[0]}
    system = json.loads(run(*base, "--prompt", "Hello", "--json", "--system", "Be")[1])["answer"]
    turns = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hello"}]
    assert [system] == generate_batch(model, tokenizer, [turns], max_new_tokens=8)
    drawn = [run(*base, *many, "--json", "--temperature", 2, "--batch-size", size)[1] for size in (1, 5)]
    assert drawn[0] == drawn[1] != out
    (tmp_path / "long.txt").write_text("short\n" + "x" * 200)
    assert f"{tmp_path}/long.txt, line 2: the prompt has 203 tokens" in fails(*base, "--prompts", tmp_path / "long.txt")
    for line in ("no JSON", "[" * 100_000):
        typed(f'{{"prompt": "x"}}\n{line}\n')
        assert "standard input, line 2: no JSON object" in fails(*base, "--prompts", "-")
    typed('{"question": "x"}\n')
    assert 'standard input, line 1: expected {"prompt": TEXT}' in fails(*base, "--prompts", "-")
    answered = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    typed(json.dumps({"messages": answered}) + "\n")
    assert "standard input, line 1: the messages end with an answer" in fails(*base, "--prompts", "-")
    typed("\n")
    assert "standard input: there are no prompts" in fails(*base, "--prompts", "-")
    assert "not allowed with argument" in fails(*base, "--prompts", "-", "--prompt", "x")


def test_a_closed_standard_input_is_said(fails, model_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input, which is closed" in fails("generate", "--model", model_dir, "--prompts", "-")
    assert "standard input, which is closed" in fails("chat", "--model", model_dir)


@pytest.mark.parametrize("others", [("two",), ("two", "dora")])
def test_many_prompts_and_several_adapters(run, model_dir, adapters, tmp_path, others):
    (tmp_path / "p.txt").write_text("Hello\nSay red\n")
    base = (
        "generate",
        "--model",
        model_dir,
        "--max-new-tokens",
        8,
        "--temperature",
        1.5,
        "--prompts",
        tmp_path / "p.txt",
    )
    names = ("one", *others)
    alone = {name: run(*base, "--json", "--adapter", adapters[name])[1].split("\n")[:-1] for name in names}
    code, out, err = run(*base, "--json", *(word for name in names for word in ("--adapter", adapters[name])))
    assert code == 0, err
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    expected = [json.loads(alone[name][number]) | {"adapter": name} for number in range(2) for name in names]
    assert found == expected
    assert len({one["answer"] for one in found}) > 2, "equal answers would prove little"


def test_results_go_to_their_file_while_a_bar_is_on_the_terminal(model_dir, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    (tmp_path / "p.txt").write_text("Hello\nSay red\n")
    bar, results = Terminal(), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", bar)
    monkeypatch.setattr(sys, "stdout", results)
    base = ("generate", "--model", model_dir, "--max-new-tokens", "4")
    assert main([*base, "--prompts", str(tmp_path / "p.txt"), "--json"]) == 0
    assert "answering" in bar.getvalue()
    assert [json.loads(line)["prompt"] for line in results.getvalue().split("\n")[:-1]] == ["Hello", "Say red"]
