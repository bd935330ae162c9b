"""Where metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases, in a thread of their own."""

import json
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from mora_jax.errors import InputError
from mora_jax.training.config.schema import Config
from mora_jax.training.hooks import Hook, Point, Row, Run
from mora_jax.training.run.directory import RunDirectory

_SPEED = frozenset(
    {"tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "host_seconds", "device_seconds"}
)  # fmt: skip


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under the names that plots are grouped by: `train/loss`, `eval/loss`, `speed/mfu`, ..."""
    values = {}
    for name, value in row.items():
        if name == "step" or value is None:
            continue
        if name.startswith("eval_"):
            tag = f"eval/{name.removeprefix('eval_')}"
        elif name in _SPEED:
            tag = f"speed/{name}"
        else:
            tag = f"memory/{name}" if name.endswith("_bytes") else f"train/{name}"
        values[tag] = float(value)
    return values


class Writer(Protocol):
    """A place for metrics.

    Attributes:
        name: of the program that shows them.
        how_to_open: the command that does.
    """

    name: str
    how_to_open: str

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the log: with the run's summary where it came to its end."""


def check_writers(config: Config) -> None:
    """Refuses writers that can't work here, before anything is loaded or written.

    Raises:
        InputError: a package is missing (names the command that installs it), or nobody is logged in.
    """
    wanted = {"tensorboard": ("tensorboardX", config.log.tensorboard), "wandb": ("wandb", config.log.wandb)}
    for extra, (package, on) in wanted.items():
        if on and find_spec(package) is None:
            raise InputError(f"log.{extra} needs the package {package}: pip install 'mora-jax[{extra}]'")
    if config.log.wandb and config.log.wandb_mode == "online":
        import wandb

        try:
            known = wandb.login(prompt=False)
        except wandb.Error as error:
            raise _refusal(error) from None
        if not known:
            raise _refusal("nobody is logged in")


def _refusal(why: object) -> InputError:
    return InputError(
        f"log.wandb: Weights & Biases can't be used online ({why}): run wandb login, set WANDB_API_KEY, "
        f"or set log.wandb_mode=offline"
    )


class MetricsHook(Hook):
    """Writes every row into `metrics.jsonl` and to the writers that the run asks for; of several processes one does."""

    def __init__(self, run: Run):
        self._run = run
        self._writers: list[Writer] = []
        self._background = Background(self._writers)
        self._summary: Row | None = None

    def __exit__(self, *exception: Any) -> None:
        self._background.close(self._summary)

    def on_start(self, point: Point) -> Point:
        directory, config = self._run.directory, self._run.config
        if directory.writes and config.log.tensorboard:
            self._writers.append(TensorBoardWriter(directory, config, point.step))
        if directory.writes and config.log.wandb:
            self._writers.append(WandbWriter(directory, config))
        return point

    def on_step(self, row: Row) -> None:
        self._run.directory.append_metrics([row])
        self._background.write(row)

    on_evaluation = on_step

    def summary(self, point: Point) -> dict[str, Any]:
        return {"open": {writer.name: writer.how_to_open for writer in self._writers}}

    def on_end(self, summary: Row) -> None:
        self._summary = summary  # for the writers, when they are closed


class Background:
    """Hands rows to writers, in order, in a thread, so that no step waits for a disk or another process.

    Args:
        writers: they are used by that thread alone until `close`.
    """

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._waiting: deque[Future[None]] = deque()

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`.

        Raises:
            Exception: whatever a writer raised on an earlier row.
        """
        if not self._writers:
            return
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, dict(row)))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Waits until all is written, and closes the writers, every one of them; raises as `write`."""
        self._pool.shutdown()
        try:
            for future in self._waiting:
                future.result()
        finally:
            for writer in self._writers:
                writer.close(summary)

    def _write(self, row: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(row)


class TensorBoardWriter:
    """Event files in the run's folder `tensorboard`, a new one each time that the run is started or resumed.

    Args:
        directory: of the run.
        config: of the run; shown as text.
        first_step: steps that are done already. What an earlier process wrote of later ones is hidden.
    """

    name, folder = "TensorBoard", "tensorboard"

    def __init__(self, directory: RunDirectory, config: Config, first_step: int):
        from tensorboardX import SummaryWriter

        self.how_to_open = f"tensorboard --logdir {directory.path / self.folder}"
        self._events = SummaryWriter(str(directory.files.on_disk(self.folder)), purge_step=first_step + 1)
        if first_step == 0:
            self._text("config", config.to_dict())

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`, as one event: `add_scalar` for each number takes eight times as long."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(row).items()]
        self._events.file_writer.add_summary(Summary(value=values), row["step"])
        self._events.flush()  # a killed run keeps what its checkpoints cover

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Writes the summary as text, and the file to its end."""
        if summary is not None:
            self._text("summary", summary)
        self._events.close()

    def _text(self, tag: str, values: Mapping[str, Any]) -> None:
        # Four spaces make it code in Markdown, which is what TensorBoard shows text as.
        self._events.add_text(tag, "    " + json.dumps(values, indent=2).replace("\n", "\n    "), 0)


class WandbWriter:
    """One run of Weights & Biases, the same one after a resume: its id is kept in `wandb.json`.

    Offline, every process that resumes a run writes the whole of it again, from `metrics.jsonl`, and removes what
    its forerunner had written: one folder is there to be synchronised, and no step is in it twice. Online, the server
    ignores steps that it knows already.

    Args:
        directory: of the run, whose `metrics.jsonl` has the rows up to the step at which this process starts; files
            lie in its folder `wandb`.
        config: of the run.

    Raises:
        InputError: the server can't be reached or refuses.
    """

    name, folder, id_file = "Weights & Biases", "wandb", "wandb.json"

    def __init__(self, directory: RunDirectory, config: Config):
        import wandb

        mode: Literal["offline", "online"] = "offline" if config.log.wandb_mode == "offline" else "online"
        files, path = directory.files, directory.path
        # The run has the id that it began with.
        run_id = (directory.read_json(self.id_file) or {}).get("id")
        if run_id is None:
            run_id = uuid.uuid4().hex[:8]
            directory.write_json(self.id_file, {"id": run_id})
        folder = files.on_disk(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                id=run_id,
                name=str((path if files.remote else path.absolute()).name),
                dir=str(folder.parent),
                mode=mode,
                resume="allow",
                config=config.to_dict(),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise _refusal(" ".join(str(error).split())) from None
        if mode == "online":
            self.how_to_open = str(self._run.url)
            return
        name = Path(self._run.dir).parent.name
        where = path / self.folder / name
        # Its program reads disks alone.
        fetched = f"gcloud storage cp -r {where} . && wandb sync {name}"
        self.how_to_open = fetched if files.remote else f"wandb sync {where}"
        for row in directory.read_metrics():
            self.write(row)
        for earlier in files.names(self.folder):
            if earlier != name and earlier.startswith("offline-run-") and earlier.endswith(f"-{run_id}"):
                files.remove(f"{self.folder}/{earlier}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `metrics.jsonl`."""
        self._run.log(tagged(row), step=row["step"])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the log; a run without a summary counts as crashed there, until it is resumed."""
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)
