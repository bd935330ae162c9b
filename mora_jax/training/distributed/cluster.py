"""Which processes make up a run: what the launcher's environment says, before JAX is asked.

`jax.distributed.initialize()` finds TPU VMs, SLURM and Open MPI by itself, but it fails or waits where there is nothing
to find, and gives every process of SLURM one GPU even if it is alone on its host. So it is called only where an
environment is found here, and told which devices to take.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mora_jax.environment import has_libtpu, may_have_tpu
from mora_jax.errors import InputError

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
