"""Runs the commands of docs/tutorial.md, and puts what they print below them.

    python scripts/tutorial_run.py --model SmolLM2-135M-Instruct --data instruction-data.json

Blocks of Python and blocks of `mora-jax` commands run from the top in one folder, with the folder of the model in place
of its hub id; other commands (installing, downloading, serving) are left out. The block of text behind a block of
commands is written anew from their standard output. `--check` runs the page and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n(\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)


def run(code: str, language: str, model: Path, folder: Path) -> str:
    """What a block prints in `folder`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    code = code.replace(HUB_ID, str(model))
    if language == "sh":
        code = code.replace("mora-jax ", f"{sys.executable} -m mora_jax ")
    command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return printed.replace(str(model), HUB_ID).replace(f"{folder}/", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="instruction-data.json")
    parser.add_argument("--out", type=Path, help="folder to run in, which is kept (default: one that is removed)")
    parser.add_argument("--check", action="store_true", help="write nothing into the page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.out or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.data, folder / "instruction-data.json")

        def filled(block: re.Match[str]) -> str:
            language, code, _ = block.groups()
            if language == "sh" and not code.startswith("mora-jax "):
                return block[0]
            print(code, file=sys.stderr, flush=True)
            printed = run(code, language, args.model.resolve(), folder).strip("\n")
            print(printed, file=sys.stderr, flush=True)
            text = "\n".join(line.rstrip() for line in printed.splitlines())
            return f"```{language}\n{code}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

        page = BLOCK.sub(filled, PAGE.read_text(encoding="utf-8"))
    if not args.check:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
