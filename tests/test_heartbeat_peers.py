"""Who may join the ranks' own connections, and how long a stranger can keep them waiting."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest

from smt_dist.fault_tolerance import peers


def call(line: bytes, pause: float = 0.0) -> int | None:
    """What rank 0 makes of a caller that says ``line``, with ``pause`` seconds between its bytes."""
    ours, theirs = socket.socketpair()
    ended = threading.Event()

    def speak() -> None:
        with contextlib.suppress(OSError):  # hung up on
            for byte in line:
                if ended.wait(pause):
                    return
                theirs.send(bytes([byte]))

    speaker = threading.Thread(target=speak)
    speaker.start()
    try:
        return peers._caller(ours, "secret")
    finally:
        ended.set()
        ours.close()
        speaker.join()
        theirs.close()


def hello(**changes: object) -> bytes:
    return json.dumps({"rank": 3, "secret": "secret", **changes}).encode() + b"\n"


def test_a_rank_is_known_by_the_secret():
    """Anybody on the network can connect."""
    assert call(hello()) == 3
    assert call(hello(secret="guess")) is None


@pytest.mark.parametrize("line", [b"", b"GET / HTTP/1.1\n", b"[]\n", b"{}\n", hello(rank="x"), b"\xff" * 2000])
def test_anything_else_is_a_stranger(line, monkeypatch):
    """Its words must not end the job."""
    monkeypatch.setattr(peers, "HELLO_SECONDS", 0.2)
    assert call(line) is None


def test_a_stranger_that_speaks_slowly_is_not_waited_for(monkeypatch):
    """The time is for the whole line: at a byte a time it would keep all ranks from starting."""
    monkeypatch.setattr(peers, "HELLO_SECONDS", 0.5)
    started = time.monotonic()
    assert call(hello(), pause=0.1) is None
    assert time.monotonic() - started < 0.1 * len(hello())
