"""Writes docs/studies/index.md, and claims.json beside every conclusion there, from the tables of cells alone.

    python scripts/studies_page.py            writes them
    python scripts/studies_page.py --check    exits with 1 where one is not what its table says

The text is scripts/studies_page.md, a template for string.Template; every number of a result in it comes from here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd

from mora_jax.studies.claims import Claim, claims, to_json
from mora_jax.studies.conclusion import table
from mora_jax.studies.intervals import paired
from mora_jax.studies.results import Results
from mora_jax.studies.run import STUDIES

ROOT = Path(__file__).parents[1]
CURVATURE = ROOT / "docs/studies/rates/quick/curvature.csv"
PAGE, TEMPLATE = ROOT / "docs/studies/index.md", Path(__file__).with_suffix(".md")

WRITTEN, STORED = "generated accuracy", "bits stored"
NEW, OLD = "loss on the new domain, nats a token", "loss on the old domain, nats a token"
RISE = "rise of the old domain's loss at equal learning, nats a token"
TEST, BASE = "test loss at the best epoch, nats a token", "loss on base texts, nats a token"
UNMASKED = "LoRA unmasked − LoRA masked"
#: claim of a paper; (table, difference, metric, level, sign of the effect where it holds); what would decide it.
CLAIMS = [
    (
        "MoRA learns pairs by heart sooner than LoRA at equal parameters (2405.12130)",
        [("memorize/quick", "MoRA sharing r2 − LoRA r2", WRITTEN, "128 pairs", 1),
         ("memorize/quick", "MoRA sharing r2 − LoRA r2, α = 8r", WRITTEN, "128 pairs", 1),
         ("memorize/small", "MoRA sharing r2 − LoRA r2", WRITTEN, "", 1)],
        "`memorize` small with 8 seeds and LoRA at its best form",
    ),
    (
        "MoRA stores more than LoRA at equal parameters (2405.12130)",
        [("memorize/saturation", f"MoRA {kind} r1 − {lora}", STORED, "256 pairs", 1)
         for kind in ("sharing", "rotation") for lora in ("LoRA r1", "LoRA r1, α = 8r")],
        "more steps, the other numbers of pairs, and `memorize` small",
    ),
    (
        "LoRA learns less than full fine-tuning (2405.09673)",
        [("forget/quick", "LoRA r2 − full", NEW, "", 1),
         ("forget/quick", "LoRA r16 − full", NEW, "", 1)],
        "`forget` small",
    ),
    (
        "LoRA forgets less than full fine-tuning (2405.09673)",
        [("forget/quick", "LoRA r2 − full", OLD, "", -1),
         ("forget/quick", "LoRA r16 − full", OLD, "", -1),
         ("forget/quick", "LoRA r2 − full", RISE, "", -1),
         ("forget/quick", "LoRA r16 − full", RISE, "", -1)],
        "`forget` small, with rates lowered until the least forgetting lies inside",
    ),
    (
        "Loss on instructions helps where they are long and rows are few (2405.14394)",
        [("instruct/quick", UNMASKED, TEST, "ratio 2 of 2, 64 rows", -1),
         ("instruct/quick", UNMASKED, TEST, "ratio 2 of 2, 256 rows", -1),
         ("instruct/small", UNMASKED, TEST, "ratio 4 of 4, 32 rows", -1)],
        "`instruct` small with rates inside their grids, more rows and the normaliser `response`",
    ),
]  # fmt: skip

#: Differences in the text, by name: table, difference, metric, level.
EFFECTS = {
    **{f"{kind}_lead_{preset}": (f"memorize/{preset}", f"MoRA {kind} r2 − LoRA r2", WRITTEN, level)
       for kind in ("sharing", "rotation") for preset, level in (("quick", "128 pairs"), ("small", ""))},
    **{f"{short}_{kind}": ("memorize/saturation", f"MoRA {kind} r1 − LoRA r1", metric, "256 pairs")
       for short, metric in (("stored_lead", STORED), ("written_lead", WRITTEN)) for kind in ("sharing", "rotation")},
    **{f"{name}_{short}": ("forget/quick", f"{arm} − full", metric, "")
       for name, metric in (("new", NEW), ("old", OLD), ("rise", RISE))
       for arm, short in (("LoRA r2", "r2"), ("LoRA r16", "r16"), ("MoRA sharing r2", "sharing"),
                          ("MoRA rotation r2", "rotation"))},
    **{f"{name}_{kind}_lora": ("forget/quick", f"MoRA {kind} r2 − LoRA r2", metric, "")
       for name, metric in (("new", NEW), ("old", OLD)) for kind in ("sharing", "rotation")},
    **{f"ranks_{short}": ("forget/ranks", claim, metric, "")
       for short, claim, metric in (
           ("intruders_sharing_r2", "MoRA sharing r2 − LoRA r2", "intruders a matrix at ε = 0.5"),
           ("old_r8", "LoRA r8 − full", OLD),
           ("old_sharing_r8", "MoRA sharing r8 − LoRA r8", OLD),
           ("old_rotation_r8", "MoRA rotation r8 − LoRA r8", OLD),
           ("old_sharing_r32", "MoRA sharing r32 − full", OLD))},
    "old_kl": ("forget/quick", "LoRA r16, KL − LoRA r16", OLD, ""),
    "new_kl": ("forget/quick", "LoRA r16, KL − LoRA r16", NEW, ""),
    "rise_kl": ("forget/quick", "LoRA r16, KL − full", RISE, ""),
    **{f"{name}_{ratio}_{rows}": ("instruct/quick", UNMASKED, metric, f"ratio {ratio} of 2, {rows} rows")
       for name, metric in (("test", TEST), ("exact", "exact match"), ("base", BASE))
       for ratio in (1, 2) for rows in (64, 256)},
    **{f"{name}_{rows}": ("rates/quick", "LoRA r16 − full", f"loss on {which}, nats a token", f"{rows} rows")
       for name, which in (("new_rows", "new rows"), ("trained", "rows trained on"))
       for rows in (128, 1024)},
}  # fmt: skip


def read_tables() -> dict[str, Results]:
    """All of them, by study and preset."""
    files = sorted((ROOT / "docs/studies").glob("*/*/cells.csv"))
    return {f"{file.parts[-3]}/{file.parts[-2]}": Results.read(file, STUDIES[file.parts[-3]]) for file in files}


def find(stated: list[Claim], claim: str, metric: str, level: str) -> Claim:
    """The claim of this name."""
    return next(one for one in stated if (one.claim, one.metric, one.level) == (claim, metric, level))


def claims_table(stated: dict[str, list[Claim]]) -> str:
    """A row a claim of a paper and a table that says something of it."""
    rows = []
    for text, evidence, decides in CLAIMS:
        if not evidence:
            rows.append([text, "not measured", "", "", "", decides])
        for name, claim, metric, level, sign in evidence:
            one = find(stated[name], claim, metric, level)
            holds = "undecided" if not one.decided else "holds" if (one.effect or 0) * sign > 0 else "doesn't hold"
            where = f"`{name.replace('/', '` ')}: {claim}{f', {level}' if level else ''}"
            p = "" if one.p is None else f"{one.p:.2g}"
            rows.append([text, holds, where, f"{one.effect_text()} ({metric})", f"{one.n}, {p}", decides])
            text, decides = "", ""
    return table(["claim", "found", "where", "effect", "n, p (Holm)", "what would decide it"], rows)


def numbers(tables: dict[str, Results], stated: dict[str, list[Claim]]) -> dict[str, str]:
    """What stands in the text, by name."""
    values = {name: find(stated[study], *where).effect_text() for name, (study, *where) in EFFECTS.items()}
    for name, level in (("quick", "128 pairs"), ("small", "")):
        results = tables[f"memorize/{name}"]
        for arm, short in (("LoRA r2", "lora"), ("LoRA r2, α = 8r", "alpha"), ("MoRA sharing r2", "sharing"),
                           ("MoRA rotation r2", "rotation")):  # fmt: skip
            if arm in results.arms_at(level):
                values[f"{short}_{name}"] = results.mean("generated_accuracy", arm, level).text(2)
    saturation = tables["memorize/saturation"]
    for arm, short in (("LoRA r1", "lora"), ("LoRA r1, α = 8r", "alpha"), ("MoRA sharing r1", "sharing"),
                       ("MoRA rotation r1", "rotation"), ("HiRA r1", "hira")):  # fmt: skip
        stored, before = (saturation.mean("bits_stored", arm, "256 pairs", share=share) for share in (1.0, 0.75))
        values |= {f"stored_{short}": stored.text(0), f"added_{short}": f"{stored.mean - before.mean:.0f}"}
    rates = tables["rates/quick"]
    loras = {rates.rate(f"LoRA r{rank}", "1024 rows") for rank in (1, 4, 16)}
    values |= {
        "lora_rate": ", ".join(f"{rate:g}" for rate in loras),
        "full_rate": f"{rates.rate('full', '1024 rows'):g}",
    }
    values |= curvature(rates) | intruders(tables["forget/ranks"])
    for name, results in tables.items():
        short, decided = name.replace("/", "_"), [one for one in stated[name] if one.decided]
        values[f"seeds_{short}"] = str(results.preset.seeds)
        values[f"decided_{short}"] = f"{len(decided)} of {len(stated[name])}"
        again = [one.robust for one in decided if one.robust is not None]
        values[f"robust_{short}"] = f"{sum(again)} of {len(again)}"
        edges = [
            f"{arm} ({level})" if level else arm
            for level in results.levels
            for arm in results.arms_at(level)
            if results.at_edge(arm, level)
        ]
        values[f"edges_{short}"] = ", ".join(edges) or "none"
    return values


def intruders(ranks: Results) -> dict[str, str]:
    """How many each arm has, and what both losses change by where they are halved."""
    values = {}
    for arm in ranks.arms:
        short = arm.replace("MoRA ", "").replace(" ", "_")
        values[f"intruders_{short}"] = ranks.mean("intruders_0.5", arm).text(2)
        for domain, metric in (("old", "base_text_loss"), ("new", "loss")):
            halved = paired(ranks.values(f"{metric}_scaled_0.5", arm), ranks.values(metric, arm))
            values[f"halved_{domain}_{short}"] = halved.text(sign=True)
    loras = [f"{ranks.rate(f'LoRA r{rank}'):g}" for rank in (2, 8, 32)]
    return values | {"ranks_lora_rates": ", ".join(loras)}


def curvature(rates: Results) -> dict[str, str]:
    """How the rates that were chosen lie to the largest eigenvalues of scripts/rate_from_curvature.py."""
    by_arm = pd.read_csv(CURVATURE).groupby("arm", sort=False)["largest_eigenvalue"]
    eigenvalues = np.exp(by_arm.apply(lambda values: np.log(values).mean()))
    chosen = [rates.rate(arm, "1024 rows") or rates.rate(arm, "variants") for arm in eigenvalues.index]

    def alike(values: np.ndarray) -> str:
        """How many lie within a factor of 2 of a number that is chosen so that they are many."""
        return f"{max(sum((low <= values) & (values <= 4 * low)) for low in values)} of {len(values)}"

    return {
        "by_curvature": alike(chosen * eigenvalues.to_numpy()),
        "by_one_rate": alike(np.array(chosen)),
        "curvature_seeds": f"{(by_arm.max() / by_arm.min()).max():.1f}",
        "curvature_correlation": f"{np.corrcoef(np.log(chosen), np.log(eigenvalues))[0, 1]:.2f}",
    }


def main() -> int:
    """Writes the files, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    check = parser.parse_args().check
    tables = read_tables()
    stated = {name: claims(results) for name, results in tables.items()}
    text = Template(TEMPLATE.read_text(encoding="utf-8"))
    files = {PAGE: text.substitute(numbers(tables, stated), claims=claims_table(stated))}
    files |= {ROOT / "docs/studies" / name / "claims.json": to_json(of) for name, of in stated.items()}
    differing = [file for file, text in files.items() if not file.exists() or file.read_text("utf-8") != text]
    for file in differing:
        print(f"{file.relative_to(ROOT)} is not what its table says" if check else f"wrote {file.relative_to(ROOT)}")
        if not check:
            file.write_text(files[file], encoding="utf-8")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
