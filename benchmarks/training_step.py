"""A training step on random tokens, with what the system had to do for it; shared by benchmarks."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import mora_jax as mj
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import AdapterConfig, Config
from mora_jax.training.setup import put_adapter
from mora_jax.training.sharding.mesh import make_mesh

STEPS = 1000  # of the run that the step is taken from; its schedule and its optimizer don't change the time


@dataclass
class Spent:
    """What the steps of one contestant took, a number each.

    Attributes:
        cpu: seconds of CPU time of the process, user's and system's.
        system: of them the system's.
        faults: page faults without a disk.
    """

    cpu: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)


class TrainingStep:
    """A model with an adapter and one batch, trained a step at a time.

    Args:
        folder: a HuggingFace folder.
        dtype: of the base; None: the machine's default.
        method: a name of the key `adapter.method`, with further keys of that section.
        rows, length: of the batch; every token but the first of a row has a weight of 1.
    """

    def __init__(self, folder: str, dtype: str | None, method: str, rows: int, length: int, **adapter: Any):
        self.model, _ = mj.load_pretrained(folder, dtype=dtype)
        config = Config(adapter=AdapterConfig(method=method, **adapter))
        put_adapter(self.model, config, STEPS)
        made = assemble(self.model, config, STEPS, make_mesh(1))
        self.runner: Any = made.runner
        self.state, self.frozen = made.placed_state(0), self.runner.place(made.frozen)
        vocab = self.model.config.vocab_size
        ids = np.random.default_rng(0).integers(3, vocab - 1, (1, rows, length)).astype(np.int32)
        self.batch = self.runner.place_batch(
            {"input_ids": ids, "segment_ids": np.ones_like(ids), "weights": np.ones(ids.shape, np.float32)}
        )
        self.spent = Spent()

    def __call__(self, number: int = 1) -> None:
        """One optimizer step, waited for; what it took is noted unless `number` is 0, which compiles."""
        before = resource.getrusage(resource.RUSAGE_SELF)
        self.state, metrics = self.runner(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))
        after = resource.getrusage(resource.RUSAGE_SELF)
        if number:
            system = after.ru_stime - before.ru_stime
            self.spent.cpu.append(after.ru_utime - before.ru_utime + system)
            self.spent.system.append(system)
            self.spent.faults.append(after.ru_minflt - before.ru_minflt)

    @property
    def temporary(self) -> int:
        """Bytes of the compiled step's temporary buffers."""
        return self.runner.compiled[0].memory_analysis().temp_size_in_bytes
