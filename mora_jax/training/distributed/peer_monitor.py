"""What ends one process of a run ends all of them at once, and says why.

JAX notices a process that is gone when a collective fails, or by its heartbeat after half a minute, and then aborts.
The watch is faster and clearer where the machine itself is still there: each process holds a connection to process 0,
and the system closes it when the process is killed. Process 0 tells the others. A host that is silently gone is left to
JAX's heartbeat.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any, NoReturn

#: Exit code where another process of the run is gone: sysexits' EX_TEMPFAIL, "try again".
EXIT_LOST = 75
_HELLO = 20.0  # seconds in which a connection has to be made
_PARTING = 5.0  # seconds to wait for the others when this process ends before its time


class Watch:
    """This process's part in watching.

    Args:
        index, count: this process's number, and how many there are.

    Attributes:
        resume: the command that continues the run, for messages.
    """

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self.resume = "mora-jax train --resume RUN"
        self._peers: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closing = False
        self._listener: socket.socket | None = None
        self._token = secrets.token_hex(8)

    def listen(self, hosts: list[str]) -> dict[str, Any]:
        """On process 0: waits for the others in the background; returns what they need to know."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=self.count, dualstack_ipv6=both)
        threading.Thread(target=self._accept, args=(self._listener,), name="watch", daemon=True).start()
        return {"hosts": hosts, "port": self._listener.getsockname()[1], "token": self._token}

    def connect(self, main: dict[str, Any]) -> bool:
        """On the others: connects to process 0; returns whether that worked."""
        for host in main["hosts"]:
            with contextlib.suppress(OSError):
                peer = socket.create_connection((host, main["port"]), timeout=_HELLO / 4)
                peer.settimeout(None)
                self._send(peer, {"hello": self.index, "token": main["token"]})
                self._peers[0] = peer
                self._start(self._read, 0, peer, peer.makefile())
                return True
        return False

    def lost(self, sign: str) -> NoReturn:
        """Ends this process after a sign that another one is gone; most often the watch knows soon which."""
        time.sleep(_PARTING)
        said = {"stop": self.index, "why": f"lost another one ({sign})"}
        self._lost(f"another process of {self.count} is gone ({sign})", EXIT_LOST, said)
        time.sleep(2 * _PARTING)  # another thread was faster, and ends this process
        os._exit(EXIT_LOST)

    def fail(self, why: str, code: int) -> NoReturn:
        """Ends this process, and tells the others why."""
        with self._lock:
            self._closing = True
        self._tell({"stop": self.index, "why": why, "code": code})
        self._part(code)

    def close(self) -> None:
        """Ends the watch: from now on this process may go."""
        with self._lock:
            self._closing = True
        self._tell({"bye": self.index})
        if self._listener is not None:
            self._listener.close()

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name="watch", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:  # closed
                return
            self._start(self._greet, peer)

    def _greet(self, peer: socket.socket) -> None:
        peer.settimeout(_HELLO)
        file = peer.makefile()
        with contextlib.suppress(OSError, ValueError):
            hello = json.loads(file.readline(200))
            if isinstance(hello, dict) and hello.get("token") == self._token:
                peer.settimeout(None)
                index = int(hello["hello"])
                with self._lock:
                    self._peers[index] = peer
                return self._read(index, peer, file)
        peer.close()

    def _read(self, index: int, peer: socket.socket, file: Any) -> None:
        """Reads what a peer says until it goes, with or without a word."""
        said: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            while line := file.readline():
                said = json.loads(line)
                if "stop" in said:
                    self._lost(f"process {said['stop']} of {self.count} {said['why']}", said["code"], said)
                if "bye" in said:
                    break
        if "bye" not in said:
            self._lost(f"process {index} of {self.count} is gone", EXIT_LOST, {"stop": index, "why": "is gone"})

    def _lost(self, what: str, code: int, said: dict[str, Any]) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        advice = "" if code == 2 else f"; start all processes again with {self.resume}"
        os.write(2, f"error: {what}, so process {self.index} stops too{advice}\n".encode())
        if self.index == 0:
            self._tell({"code": code} | said)
        self._part(code if code == 2 else EXIT_LOST)

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            with contextlib.suppress(OSError):
                self._send(peer, message)

    @staticmethod
    def _send(peer: socket.socket, message: dict[str, Any]) -> None:
        peer.sendall(json.dumps(message).encode() + b"\n")

    def _part(self, code: int) -> NoReturn:
        """Ends this process without a word to JAX, which would wait for the others; the coordinator goes last."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.index == 0:
            deadline = time.monotonic() + _PARTING
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(max(0.0, deadline - time.monotonic()))
        os._exit(code)
