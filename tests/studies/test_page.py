"""The page of the studies and the files of claims say what the tables of cells say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mora_jax.studies.conclusion import rates_table
from mora_jax.studies.figures import rates_figure
from mora_jax.studies.instruct import Instruct
from mora_jax.studies.results import Results

ROOT = Path(__file__).parents[2]


def test_the_page_and_the_claims_are_made_of_the_tables():
    command = [sys.executable, str(ROOT / "scripts/studies_page.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_a_metric_that_was_not_measured_at_every_rate_is_missing_there():
    """As in a table of an earlier version, which measured some at the chosen rate alone."""
    results = Results.read(ROOT / "docs/studies/instruct/small/cells.csv", Instruct())
    assert results.preset.seeds == 3
    assert Results.read(ROOT / "docs/studies/instruct/quick/cells.csv", Instruct()).preset.seeds == 10
    heads, _, *rows = rates_table(results).splitlines()
    assert len(rows) > 10
    assert {row.count("|") for row in rows} == {heads.count("|")}
    assert any("| missing |" in row for row in rows)


def test_a_figure_has_no_panel_without_data():
    results = Results.read(ROOT / "docs/studies/instruct/quick/cells.csv", Instruct())
    frame = results.frame[results.frame["level"].isin(results.levels[:3])]
    assert len(rates_figure(Results(frame, results.study, results.preset)).axes) == 3
