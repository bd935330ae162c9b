"""The studies by name. A new one is a file and a line here."""

from __future__ import annotations

from mora_jax.studies.forget.study import Forget
from mora_jax.studies.instruct.study import Instruct
from mora_jax.studies.memorize.study import Memorize
from mora_jax.studies.rates.study import Rates
from mora_jax.studies.study import Study

STUDIES: dict[str, Study] = {study.name: study for study in (Memorize(), Forget(), Instruct(), Rates())}
