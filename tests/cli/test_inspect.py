"""inspect: tables or one JSON object on stdout, a page beside, and refusals."""

import json

import pytest


def test_report_and_examples_as_text(run, model_dir, data_file):
    code, out, err = run("inspect", "--model", model_dir, "--data", data_file, "--examples", "2")
    assert (code, err) == (0, "")
    assert "format  alpaca (recognised from the first rows" in out
    assert "Advice on the loss mode" in out
    assert "example 2: " in out and "example 3" not in out
    assert "    1  assistant    'redred'" in out
    assert "\x1b" not in out
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_one_object(run, model_dir, data_file):
    base = ["inspect", "--model", model_dir, "--data", data_file, "--json"]
    code, out, err = run(*base, "--loss-mode", "weighted", "--prompt-weight", "0.5", "--examples", "3")
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    assert (found["rows"], found["kept"], found["mode"]) == (12, 12, "weighted")
    assert len(found["examples"]) == 3
    assert {0.0, 0.5, 1.0} == {weight for example in found["examples"] for weight in example["weights"]}
    assert json.loads(run(*base)[1])["mode"] == "masked"
    assert "as asked" not in out


def test_both_answers_of_a_pair(run, fails, model_dir, tmp_path):
    path = tmp_path / "pairs.json"
    row = {"prompt": "Say red", "chosen": "red", "rejected": "no red"}
    path.write_text(json.dumps([row, row | {"prompt": "Say blue"}]))
    base = ["inspect", "--model", model_dir, "--data", path, "--template", "chatml"]
    code, out, err = run(*base)
    assert (code, err) == (0, "")
    assert "2 chosen of" in out and "2 rejected of" in out
    assert "rows judge answers" in out and "Instruction Modelling" not in out
    assert "row 1, chosen" in out and "row 1, rejected" in out and "row 2" not in out
    found = json.loads(run(*base, "--json", "--examples", "2")[1])
    assert found["judged"] == {"chosen": 2, "rejected": 2} and len(found["examples"]) == 4
    for example in found["examples"]:
        assert set(example["weights"]) == {0.0, 1.0}
    assert "the rows judge answers" in fails("eval", "--model", model_dir, "--data", path)
    path.write_text(json.dumps([row, row | {"rejected": "red"}]))
    error = fails(*base)
    assert "row 2: `chosen` and `rejected` are equal" in error


def test_page_beside_either(run, model_dir, data_file, tmp_path):
    path = tmp_path / "page.html"
    base = ["inspect", "--model", model_dir, "--data", data_file, "--html", path, "--examples", "2"]
    code, out, err = run(*base, "--json")
    assert (code, err) == (0, f"wrote {path}\n")
    assert json.loads(out)["rows"] == 12
    page = path.read_text(encoding="utf-8")
    assert page.count('<section class="example">') == 2
    code, out, _ = run(*base, "--format", "alpaca")
    assert code == 0 and "alpaca (as asked)" in out
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]


def test_refusals_leave_nothing(fails, model_dir, data_file, tmp_path):
    base = ["inspect", "--model", model_dir, "--data", data_file]
    assert "make it first" in fails(*base, "--html", tmp_path / "absent" / "page.html")
    assert str(tmp_path) in fails(*base, "--html", tmp_path)
    assert "max_length" in fails(*base, "--html", tmp_path / "page.html", "--max-length", "2")
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_command_s_own_options(fails, model_dir, tmp_path):
    def error(*rows, options=()):
        (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return fails("inspect", "--model", model_dir, "--data", tmp_path / "data.jsonl", *options)

    assert error({"problem": "q", "solution": "a"}).endswith(
        "set --columns to prompt=problem,completion=solution; docs/formats.md lists all formats"
    )
    row = {"instruction": "i", "output": "o"}
    assert error(row, {"instruction": "i"}).endswith("(--on-error=skip leaves such rows out)")
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    message = error({"messages": [{"role": "user", "content": "q"}, called]}, options=("--template", "alpaca"))
    assert "set --template=chatml" in message and "data.jsonl, row 1" in message
    message = error({"instruction": "i " * 50, "output": "o"}, options=("--max-length", "8"))
    assert "raise --max-length (now 8" in message and "set --truncation=prompt_first" in message


@pytest.mark.parametrize("mode", ["last_turn", "im_paper", "wit", "full"])
def test_modes(run, model_dir, data_file, mode):
    code, out, _ = run("inspect", "--model", model_dir, "--data", data_file, "--loss-mode", mode, "--json")
    assert code == 0
    assert json.loads(out)["trained_fraction"] > 0
