"""A run of several processes: how they find each other, agree, and end.

Every process runs the same program on its own devices and its own rows of each batch. Process 0 alone writes the run's
files and prints. One process can't run without the others: what ends one ends all (see peer_monitor.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mora_jax.errors import InputError
from mora_jax.training.distributed.cluster import Cluster
from mora_jax.training.distributed.peer_monitor import EXIT_LOST, Watch

HEARTBEAT = 30  # seconds after which JAX takes a silent process for dead, and ends the others
PATIENCE = 300  # seconds in which all processes have to be there
_SHUTDOWN = 60
_SEEN = 30.0  # seconds in which a file has to appear on every host
_ROOM = 512  # bytes of a message to all


def join(cluster: Cluster, patience: float = PATIENCE) -> None:
    """Makes this process one of its run's; before anything is computed.

    Where the others don't come in time, the process ends with one line and the code of a lost process: JAX would abort.

    Args:
        cluster: from cluster.py.
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
