"""The studies by name. A new one is a file, a template in `text/` and a line here."""

from __future__ import annotations

from mora_jax.studies.forget import Forget
from mora_jax.studies.instruct import Instruct
from mora_jax.studies.memorize import Memorize
from mora_jax.studies.rates import Rates
from mora_jax.studies.study import Study

STUDIES: dict[str, Study] = {study.name: study for study in (Memorize(), Forget(), Instruct(), Rates())}
