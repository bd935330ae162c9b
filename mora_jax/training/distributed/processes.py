"""A run of several processes: how they find each other, agree, and end.

Every process runs the same program on its own devices and its own rows of each batch. Process 0 alone writes the run's
files and prints. One process can't run without the others: what ends one ends all (see peer_monitor.py).

Which processes make up a run is what the launcher's environment says, before JAX is asked.
`jax.distributed.initialize()` finds TPU VMs, SLURM and Open MPI by itself, but it fails or waits where there is nothing
to find, and gives every process of SLURM one GPU even if it is alone on its host. So it is called only where an
environment is found here, and told which devices to take.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mora_jax.environment import has_libtpu, may_have_tpu
from mora_jax.errors import InputError
from mora_jax.training.distributed.peer_monitor import EXIT_LOST, Watch

#: Variables with a process's number and the number of processes, of launchers.
RANKS = {
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
}
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Cluster:
    """How the processes of a run find each other.

    Attributes:
        name: for messages.
        coordinator: `host:port` of process 0; None where JAX finds it.
        index, count: this process's number, and how many there are; None where JAX finds them.
        devices: numbers of the local devices to take; empty for all that are visible.
    """

    name: str
    coordinator: str | None = None
    index: int | None = None
    count: int | None = None
    devices: tuple[int, ...] = ()


def read_flags(
    coordinator: str | None, index: int | None, count: int | None, environ: Mapping[str, str] = os.environ
) -> Cluster | None:
    """What the command line says; numbers that it leaves out are those of the launcher's environment.

    Raises:
        InputError: part of it is missing or makes no sense.
    """
    if coordinator is None:
        for flag, value in (("--process-id", index), ("--process-count", count)):
            if value is not None:
                raise InputError(f"{flag} needs --coordinator HOST:PORT, the address of process 0")
        return None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator {coordinator}: give the host of process 0 and a free port, as in node0:8476")
    name = "the command line"
    if index is None and count is None:
        for launcher, (rank, size) in RANKS.items():
            if rank in environ and size in environ:
                name, index, count = launcher, int(environ[rank]), int(environ[size])
                break
    if index is None or count is None:
        raise InputError("--coordinator needs --process-id (from 0) and --process-count beside it")
    if not 0 <= index < count:
        raise InputError(f"--process-id {index} must be between 0 and {count - 1}, for --process-count {count}")
    return Cluster(name, coordinator, index, count, _local_devices(environ)) if count > 1 else None


def find_cluster(
    environ: Mapping[str, str] = os.environ, attribute: Callable[[str], str | None] | None = None
) -> Cluster | None:
    """What the environment says; None where this process is alone.

    Args:
        environ: the environment's variables.
        attribute: reads an attribute of a Google Cloud machine; None: from its metadata server, where this can be one.

    Raises:
        InputError: a launcher that has started several processes, but doesn't say where process 0 is.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm) and int(environ["SLURM_NTASKS"]) > 1:
        return Cluster("SLURM", devices=_local_devices(environ))
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise InputError(
                "Open MPI 5 doesn't tell its processes where process 0 is: add --coordinator HOST:PORT, the host of "
                "process 0 and a free port there; numbers are taken from Open MPI"
            )
        return Cluster("Open MPI", devices=_local_devices(environ))
    return Cluster("TPU") if _tpu_workers(environ, attribute) > 1 else None


def _local_devices(environ: Mapping[str, str]) -> tuple[int, ...]:
    """The one device of this process where a host runs several processes that see all its GPUs; else all."""
    local, alone = environ.get("SLURM_LOCALID"), True
    if local is not None:
        alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")) is not None
    elif "OMPI_COMM_WORLD_LOCAL_RANK" in environ:
        local, alone = environ["OMPI_COMM_WORLD_LOCAL_RANK"], environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") == "1"
    bound = any(name in environ and "," not in environ[name] for name in _VISIBLE)
    return () if local is None or alone or bound else (int(local),)


def _tpu_workers(environ: Mapping[str, str], attribute: Callable[[str], str | None] | None) -> int:
    """Hosts of the TPU slices that this host belongs to; 1 for a single one, and where there is no TPU."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return 1
    slices = int(environ.get("MEGASCALE_NUM_SLICES", "1") or 1)
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # GKE's
        if environ.get(name):
            return slices * len(environ[name].split(","))
    if attribute is None:
        # Elsewhere looking up the metadata server's name can take long.
        if environ.get("TPU_SKIP_MDS_QUERY") or not (has_libtpu() and may_have_tpu()):
            return slices
        attribute = _read_attribute
    hosts = attribute("worker-network-endpoints")
    if hosts is None:
        return slices
    match = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", attribute("tpu-env") or "")
    return (int(match[1]) if match else slices) * len(hosts.split(","))


def _read_attribute(name: str) -> str | None:
    """An attribute of the Google Cloud machine that this is; None where it has none, or is no such machine."""
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None


HEARTBEAT = 30  # seconds after which JAX takes a silent process for dead, and ends the others
PATIENCE = 300  # seconds in which all processes have to be there
_SHUTDOWN = 60
_SEEN = 30.0  # seconds in which a file has to appear on every host
_ROOM = 512  # bytes of a message to all


def join(cluster: Cluster, patience: float = PATIENCE) -> None:
    """Makes this process one of its run's; before anything is computed.

    Where the others don't come in time, the process ends with one line and the code of a lost process: JAX would abort.

    Args:
        cluster: from `find_cluster` or `read_flags`.
        patience: seconds to wait for the others.

    Raises:
        InputError: the port of process 0 is taken, or what the launcher's environment says makes no sense.
    """
    # JAX's own handler of SIGTERM would take the place of the loop's.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = cluster.coordinator is not None
    if explicit and cluster.index == 0:
        _check_port(str(cluster.coordinator))
    timer = threading.Timer(patience, _give_up, (cluster, patience))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.count,
            cluster.index,
            local_device_ids=list(cluster.devices),
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=math.ceil(patience) + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"the processes that {cluster.name} names can't work together: {first}") from None
    finally:
        timer.cancel()


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(f"--coordinator {coordinator}: process 0 can't use this port: {error.strerror}") from None


def _give_up(cluster: Cluster, patience: float) -> None:
    """Ends a process that has waited in vain for the others."""
    why = "not all processes came"
    if cluster.coordinator is not None:
        host, _, port = cluster.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError as error:
            why = f"process 0 can't be reached at {cluster.coordinator} ({error.strerror or error})"
        else:
            why = f"process 0 answers at {cluster.coordinator}, but not all of {cluster.count} processes came"
    text = f"error: {why} within {patience:g} s: start all of them, each once, with the same coordinator and count\n"
    os.write(2, text.encode())
    os._exit(EXIT_LOST)


def start(cluster: Cluster) -> Watch:
    """Joins the other processes (see `join`), and watches over them from then on."""
    join(cluster)
    watch = Watch(jax.process_index(), jax.process_count())
    main = broadcast(watch.listen(_names(cluster)) if is_main() else None)
    if not is_main() and not watch.connect(main):
        print(
            f"note: process {watch.index} can't reach process 0 at {', '.join(main['hosts'])}, port {main['port']}: "
            f"a lost process will be noticed after {HEARTBEAT} s only",
            file=sys.stderr,
        )
    return watch


def _names(cluster: Cluster) -> list[str]:
    """Under which names other hosts may reach this one, the likeliest first."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address that packets would come from
        names.insert(0, probe.getsockname()[0])
    if cluster.coordinator is not None:
        names.insert(0, cluster.coordinator.rpartition(":")[0].strip("[]"))
    return list(dict.fromkeys(names))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def broadcast(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """What process 0 gives (small, as JSON), on every process."""
    text = json.dumps(values or {}).encode()
    assert len(text) <= _ROOM, "a message to all is small"
    padded = np.frombuffer(text.ljust(_ROOM), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def gather(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, `[processes, …]`; every process gives one of the same shape."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def check_same(parts: Mapping[str, str]) -> None:
    """Refuses processes that were started for different runs.

    Args:
        parts: by what they are, in words, texts that must be the same everywhere.

    Raises:
        InputError: on every process, with the first one that differs from process 0, and in what.
    """
    if not several():
        return
    digests = [np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.uint8) for text in parts.values()]
    everywhere = gather(np.stack(digests))
    for process, digest in enumerate(everywhere):
        names = [name for name, same in zip(parts, (digest == everywhere[0]).all(-1), strict=True) if not same]
        if names:
            raise InputError(
                f"process {process} differs from process 0 in {', '.join(names)}: start every process with the same "
                f"command, files and versions"
            )


def check_shared(folder: Path) -> None:
    """Refuses a run directory that is not one and the same on all hosts.

    Raises:
        InputError: on every process, with the first one that doesn't see what process 0 writes.
    """
    if not several() or "://" in os.fspath(folder):  # a bucket is the same from everywhere
        return
    is_new = is_main() and not folder.exists()
    probe = folder / f".seen-by-all-{broadcast({'token': secrets.token_hex(4)})['token']}"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
    gather(np.zeros(1))  # nobody looks before it is written
    deadline = time.monotonic() + _SEEN
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)  # network file systems show new files late
    everywhere = gather(np.array(seen))
    if is_main():
        probe.unlink()
        if is_new:
            folder.rmdir()
    gather(np.zeros(1))  # nobody ends the others before that is gone
    if not everywhere.all():
        raise InputError(
            f"process {int(np.argmin(everywhere))} can't see the run directory {folder} that process 0 writes: "
            f"config.out must name one folder that all hosts share"
        )


class Agreement:
    """The highest number that any process gives, the same on all of them, one call late.

    A call starts a tiny collective and reads the result of the one before, so that nothing waits for it.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), ("all",))
        self._one_each = NamedSharding(mesh, PartitionSpec("all"))
        self._highest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def __call__(self, value: int) -> int:
        """Every process has to call this equally often."""
        before = self._pending
        count = (len(self._one_each.mesh.devices),)
        flags = jax.make_array_from_callback(count, self._one_each, lambda index: np.full(1, value, np.int32))
        self._pending = self._highest(flags)
        return 0 if before is None else int(before)
