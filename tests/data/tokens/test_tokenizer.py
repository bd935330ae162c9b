"""Loading a folder's tokenizer, quietly, and what is said of folders that hold none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mora_jax.data import load_tokenizer
from mora_jax.errors import InputError


def test_a_folder_is_loaded(make_tokenizer, tmp_path):
    made = make_tokenizer("byte_level", "chatml")
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.is_fast
    assert loaded("Hello")["input_ids"] == made("Hello")["input_ids"]
    assert loaded.chat_template == made.chat_template


def test_nothing_is_printed(make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)  # the command line sets it
    make_tokenizer("metaspace").save_pretrained(tmp_path)
    code = f"from mora_jax.data import load_tokenizer; load_tokenizer({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ


def test_folders_that_hold_none(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match=r"there is none of tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_file_that_was_cut_off(make_tokenizer, tmp_path):
    make_tokenizer("metaspace").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"tokenizer\.json is broken JSON"):
        load_tokenizer(tmp_path)
