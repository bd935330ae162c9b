"""The page of the studies and the files of claims say what the tables of cells say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_and_the_claims_are_made_of_the_tables():
    command = [sys.executable, str(ROOT / "scripts/studies_page.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
