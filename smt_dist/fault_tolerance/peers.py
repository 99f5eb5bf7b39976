"""Connect rank 0 with the other ranks, for :mod:`smt_dist.fault_tolerance.heartbeat`."""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import socket
import time
from typing import Any

CONNECT_SECONDS = 30.0
HELLO_SECONDS = 5.0
HELLO_BYTES = 256
MOST_BYTES = 1 << 16  # of messages that wait to be sent or read


class Peer:
    """Hold a connection to one rank; neither sending nor receiving blocks.

    Attributes:
        rank: at the other end.
        connection: the socket.
        heard: when something last came from it, by ``time.monotonic``.
        activity: what it last said it was doing.
    """

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank, self.connection = rank, connection
        self.heard, self.activity = time.monotonic(), "start"
        self._unsent, self._unread = b"", b""
        connection.setblocking(False)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or keep what doesn't fit for the next time.

        A broken connection shows when receiving.
        """
        if len(self._unsent) < MOST_BYTES:
            self._unsent += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the messages that arrived, and whether the connection is closed."""
        closed = False
        try:
            while not closed and (data := self.connection.recv(MOST_BYTES)) is not None:
                closed = not data
                self._unread += data
                if data:
                    self.heard = time.monotonic()
                closed = closed or len(self._unread) > MOST_BYTES
        except BlockingIOError:
            pass  # that was all
        except OSError:
            closed = True
        *lines, self._unread = self._unread.split(b"\n")
        return [json.loads(line) for line in lines], closed

    def close(self) -> None:
        """Close it for all processes that have inherited it, such as data loader workers."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def connect_ranks(rank: int, world_size: int) -> tuple[list[Peer], str | None]:
    """Connect rank 0 to all others; collective.

    Returns:
        Rank 0: the others; else rank 0 alone; and on this rank's failure the reason.
    """
    import torch.distributed as dist

    listener = _listen() if rank == 0 else None
    hello = [listener.getsockname()[1] if listener is not None else 0, secrets.token_hex(16)]
    # The secret is as private as the process group's own traffic.
    dist.broadcast_object_list(hello, src=0)
    port, secret = hello
    peers: list[Peer] = []
    try:
        if listener is not None:
            with listener:
                _accept(listener, world_size, secret, peers)
        else:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            peers.append(Peer(0, connection))
            peers[0].send({"rank": rank, "secret": secret})
    except OSError as error:
        return peers, f"{error.strerror or error}"
    return peers, None


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def _accept(listener: socket.socket, world_size: int, secret: str, peers: list[Peer]) -> None:
    """Wait for every other rank. Who doesn't know the secret is shown the door."""
    deadline, missing = time.monotonic() + CONNECT_SECONDS, set(range(1, world_size))
    while missing:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        listener.settimeout(left)
        connection, _ = listener.accept()
        caller = _caller(connection, secret)
        if caller in missing:
            missing.remove(caller)
            peers.append(Peer(caller, connection))
        else:
            connection.close()


def _caller(connection: socket.socket, secret: str) -> int | None:
    """Return the rank that opened a connection; None if it isn't one of this job's."""
    deadline, line = time.monotonic() + HELLO_SECONDS, b""
    try:
        while not line.endswith(b"\n") and len(line) < HELLO_BYTES:
            connection.settimeout(max(0.01, deadline - time.monotonic()))  # for the whole line, not for each byte
            byte = connection.recv(1)  # nothing of the messages that may follow
            if not byte:
                return None
            line += byte
        said = json.loads(line)
        known = hmac.compare_digest(str(said["secret"]).encode(), secret.encode())
        return int(said["rank"]) if known else None
    except (OSError, ValueError, TypeError, LookupError):
        return None
