"""The reference of preference losses where it is cached: log-probabilities by the model that training begins from."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, Self

import numpy as np

from mora_jax.data.preferences import PreferenceDataset
from mora_jax.evaluation.preferences import answer_scores
from mora_jax.interop.fingerprint import base_hash
from mora_jax.paths import OFF, cache_folder, expanded, local_path, replacing, writable
from mora_jax.training.config.schema import adapter_config
from mora_jax.training.distributed.processes import several
from mora_jax.training.hooks import Hook, Point, Run


class ReferenceHook(Hook):
    """Scores the data by the model that a run begins from, or finds what an earlier run of the same kept.

    Args:
        run: whose reference is cached.
        start: its beginning, before any checkpoint is read.
    """

    def __init__(self, run: Run, start: Point) -> None:
        self._run, self._start = run, start

    def __enter__(self) -> Self:
        setup = self._run.setup
        for part, dataset in (("training", setup.train), ("evaluation", setup.evaluation)):
            if isinstance(dataset, PreferenceDataset):
                dataset.reference = self._scored(dataset, part)
        del self._start  # its arrays are given away by the first step
        return self

    def _scored(self, dataset: PreferenceDataset, part: str) -> np.ndarray:
        run = self._run
        path = self._file(dataset)
        if path is not None and path.is_file():
            return np.load(path)
        scores = answer_scores(
            run.model(self._start),
            dataset,
            batch_size=run.setup.micro_batch,
            partitioner=run.assembly.settings.partitioner,
            progress=lambda done, total: run.display.progress(f"reference of the {part} data", done, total),
        )
        if path is not None and run.directory.writes:
            # A full disk only costs computing it again.
            with contextlib.suppress(OSError), replacing(path) as beside:
                np.save(beside, scores.logp)
        return scores.logp

    def _file(self, dataset: PreferenceDataset) -> Path | None:
        """Where the log-probabilities are kept; None where what training begins from isn't all in files.

        Processes compute them together, so that none may find a file that another doesn't see.
        """
        run, config = self._run, self._run.config
        folder = cache_folder() if config.data.cache is None else local_path(config.data.cache)
        if several() or config.data.cache == OFF or not run.setup.loaded or folder is None or not writable(folder):
            return None
        # A fresh adapter leaves the base as it is, but for rounding where it takes a part of it.
        method = adapter_config(config.adapter)
        adapter: Any = [repr(method), config.seed] if method.starts_from_base else None
        if config.adapter.path is not None:
            files = sorted(expanded(config.adapter.path).glob("*.safetensors"))
            if not files:
                return None
            adapter = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        assert run.setup.model.folder is not None, "a model that was loaded has a folder"
        parts = {
            "base": base_hash(run.setup.model.folder),
            "model": [run.setup.model.dtype.name, config.model.quantize],
            "adapter": adapter,
            "data": [dataset.fingerprint(), dataset.labelled],
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return folder / f"reference-{key}.npy"
