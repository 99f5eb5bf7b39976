"""End a rank in time when another has died, stopped, failed or become unreachable.

A collective notices a dead rank at once (gloo), after the collective time-out (NCCL), or not at all while this rank
computes, loads or compiles. So every rank keeps a connection to rank 0 beside the process group, on which a thread of
its own says each second that it lives and what it does. A killed process's connection closes at once; one that is
stopped, or behind a cut cable, falls silent. Rank 0 tells the others, and all end, whatever their main threads do.

The listening port is open only while the ranks connect, and a connection must begin with a secret that came through
the process group. Messages are JSON, one a line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from typing import Any, NamedTuple

from smt_dist.fault_tolerance.activity import current_activity
from smt_dist.fault_tolerance.peers import Peer, connect_ranks

logger = logging.getLogger(__name__)

EXIT_PEER_LOST = 75  # sysexits.h: a temporary failure, worth another try
BEAT_SECONDS = 0.5
FAILED_GRACE = 5.0  # seconds for this rank to end by itself when another said that it failed


class Verdict(NamedTuple):
    """Hold the reason why all ranks end.

    Attributes:
        text: what happened, to which rank, during which activity.
        code: the exit code.
        grace: seconds that the main thread gets to end by itself, which it does where all ranks fail alike.
    """

    text: str
    code: int = EXIT_PEER_LOST
    grace: float = 0.0


class Heartbeat:
    """Watch the other ranks in a thread; see the module.

    Args:
        rank: this one.
        peers: rank 0: all others; else rank 0 alone.
        timeout: seconds of silence after which a rank counts as lost.
    """

    def __init__(self, rank: int, peers: list[Peer], timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self._peers = {peer.rank: peer for peer in peers}
        self._lock = threading.Lock()
        self._stopped, self._failing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="smt_dist heartbeat", daemon=True)
        self._thread.start()

    # -- for the main thread -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Notify the other ranks that this rank's work is done."""
        self._say({"bye": True})
        self._close()

    def leave(self, text: str, code: int = EXIT_PEER_LOST, grace: float = FAILED_GRACE) -> None:
        """Notify the other ranks that this one ends, and why; they end too."""
        self._say(Verdict(f"rank {self.rank} {text}", code, grace)._asdict())
        self._close()

    def await_verdict(self, seconds: float) -> None:
        """Wait for the explanation of an exception that another rank's end may have caused.

        If one comes, it ends the process.
        """
        self._failing.set()
        self._stopped.wait(seconds)

    def _close(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * BEAT_SECONDS + 1)
        for peer in self._peers.values():
            peer.close()

    def _say(self, message: dict[str, Any]) -> None:
        with self._lock:
            for peer in self._peers.values():
                peer.send(message)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            last = time.monotonic()
            while not self._stopped.is_set() and self._peers:
                self._say({"activity": current_activity()})
                selector.select(BEAT_SECONDS)
                verdict = self._read(selector)
                before, last = last, time.monotonic()
                if last - before > self.timeout / 2:  # this process, or the whole machine, was stopped
                    for peer in self._peers.values():
                        peer.heard = last
                verdict = verdict or self._silent()
                if verdict is not None and not self._stopped.is_set():
                    self._conclude(verdict)
                    return
                self._stopped.wait(BEAT_SECONDS)  # not more often, however much the others send

    def _read(self, selector: selectors.BaseSelector) -> Verdict | None:
        verdict = None
        for peer in list(self._peers.values()):
            messages, closed = peer.receive()
            for message in messages:
                if "activity" in message:
                    peer.activity = str(message["activity"])
                elif "text" in message and verdict is None:
                    verdict = Verdict(str(message["text"]), int(message["code"]), float(message["grace"]))
                if "bye" in message or "text" in message:
                    selector.unregister(peer.connection)
                    with self._lock:
                        del self._peers[peer.rank]
                    peer.close()
                    closed = False
                    break
            if closed and verdict is None:
                verdict = Verdict(f"rank {peer.rank} is gone: its connection closed; {self._last_words(peer)}")
        return verdict

    def _silent(self) -> Verdict | None:
        for peer in self._peers.values():
            if time.monotonic() - peer.heard > self.timeout:
                reason = (
                    f"has said nothing for {self.timeout:g} s (--heartbeat_timeout): it hangs, or the network is cut"
                )
                return Verdict(f"rank {peer.rank} {reason}; {self._last_words(peer)}")
        return None

    @staticmethod
    def _last_words(peer: Peer) -> str:
        return f"it was last heard of {time.monotonic() - peer.heard:.1f} s ago, in: {peer.activity}"

    def _conclude(self, verdict: Verdict) -> None:
        """Pass the verdict on and end the process.

        It may end by itself within the verdict's grace.
        """
        self._say(verdict._asdict())
        deadline = time.monotonic() + verdict.grace
        while time.monotonic() < deadline and not self._failing.is_set():
            if self._stopped.wait(0.1):
                return
        line = f"smt_dist: error: rank {self.rank} ends, in: {current_activity()}. {verdict.text}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # sys.stderr's lock may be held by a thread that hangs
        # Not sys.exit: the main thread may wait in a collective for ever.
        os._exit(verdict.code)


def start_heartbeat(timeout: float) -> Heartbeat | None:
    """Connect all ranks and begin to watch them; collective.

    Args:
        timeout: seconds of silence after which a rank counts as lost; 0: no heartbeat.

    Returns:
        None without a process group of several ranks, or where the ranks can't connect beside it, which is logged.
    """
    import torch.distributed as dist

    if timeout <= 0 or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    peers, problem = connect_ranks(dist.get_rank(), dist.get_world_size())
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [rank for rank, said in enumerate(problems) if said is not None]
    if failed:
        for peer in peers:
            peer.close()
        logger.warning(
            "no heartbeat between the ranks, so that lost ones are noticed by collectives only (--ddp_timeout): rank "
            "%d: %s",
            failed[0],
            problems[failed[0]],
        )
        return None
    return Heartbeat(dist.get_rank(), peers, timeout)
