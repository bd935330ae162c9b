"""The studies by name. A new one is a file, a template in `text/` and its name here."""

from __future__ import annotations

from mora_jax.studies import forget, instruct, memorize, rates
from mora_jax.studies.study import Study

STUDIES: dict[str, Study] = {
    study.name: study for study in (memorize.Memorize(), forget.Forget(), instruct.Instruct(), rates.Rates())
}
