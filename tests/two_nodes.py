"""Two nodes on one machine: two sets of namespaces (network, processes, hostname, mounts) with a cable between them.

A node has its own loopback, hostname and processes, and reaches the other only through a veth pair with one address
on each end. It has no name that could collide or be left behind: it lives as long as its first process, a ``cat`` that
reads from a pipe of ours. However this process ends, the pipe closes, ``cat`` ends, and the kernel kills whatever
still runs in the node and takes the link away.

    with two_nodes() as nodes:
        ended = run_together([(node, ["torchrun", ...]) for node in nodes.both()], folder)

Where namespaces can't be made (no root, no ``ip``), the nodes are two launchers with node ranks on this machine,
``nodes.real`` is False and a warning says why.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import psutil
import pytest
from harness import GRACE, TIMEOUT, rank_environment

INTERFACE = "link0"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
# The first process of a node: sets a hostname, which resolves on both, and loopback; then it lives until stdin closes.
BOOT = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2" /etc/hosts
ip link set lo up
echo ready
exec cat
"""


class NoNamespaces(Exception):
    """This machine doesn't let us make a node."""


@dataclass
class Node:
    """A machine to start processes on."""

    address: str
    interface: str
    init: int | None = None  # the node's first process, by its id on this machine; None: the node is this machine

    def popen(self, command: Sequence[str], env: dict[str, str], output: int) -> subprocess.Popen:
        """Start ``command`` here, in a session of its own; its collectives use this node's end of the link."""
        own = {"GLOO_SOCKET_IFNAME": self.interface, "TP_SOCKET_IFNAME": self.interface}
        return subprocess.Popen(
            [*self.enter(), *command], env={**env, **own}, stdout=output, stderr=output, start_new_session=True
        )

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes received and sent over the link since it was made."""
        table = Path(f"/proc/{self._real_init()}/net/dev").read_text()
        counters = next(line for line in table.splitlines() if line.strip().startswith(f"{INTERFACE}:"))
        values = counters.partition(":")[2].split()
        return int(values[0]), int(values[8])

    def cut(self) -> None:
        """Pull this end of the cable out: here nothing is reachable, at the other end packets are lost silently."""
        self._set_link("down")

    def mend(self) -> None:
        """Plug it in again; addresses are kept."""
        self._set_link("up")

    def _set_link(self, state: str) -> None:
        self._real_init()
        _run([*self.enter(), "ip", "link", "set", INTERFACE, state])

    def _real_init(self) -> int:
        assert self.init is not None, "this node is the machine itself: it has no link (see Nodes.real)"
        return self.init

    def enter(self) -> list[str]:
        """What to put before a command that is to run here."""
        if self.init is None:
            return []
        return ["nsenter", "--target", str(self.init), "--net", "--uts", "--mount", "--pid", "--wd", "--"]


class Nodes(NamedTuple):
    """Both nodes."""

    first: Node
    second: Node
    problem: str | None = None  # why they are only two launchers on this machine

    @property
    def real(self) -> bool:
        return self.problem is None

    def both(self) -> tuple[Node, Node]:
        return self.first, self.second


class Ended(NamedTuple):
    """A process that has ended, by itself or killed because another failed."""

    code: int
    output: str


def this_machine() -> Node:
    """The machine that the tests run on, as a node."""
    return Node("127.0.0.1", "lo")


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Two nodes and the link between them; everything that runs in them is killed at the end."""
    with contextlib.ExitStack() as stack:
        try:
            nodes = _connected_nodes(stack)
        except NoNamespaces as problem:
            # Two addresses: DeepSpeed refuses a host file that has a host twice.
            nodes = Nodes(this_machine(), Node("127.0.0.2", "lo"), str(problem))
            message = f"not two nodes but two launchers on this machine: {problem}"
            warnings.warn(pytest.PytestWarning(message), stacklevel=3)
        yield nodes


def free_port() -> int:
    """A port that is free here. In new nodes every port is."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def run_together(
    commands: Sequence[tuple[Node, Sequence[str]]], folder: Path, timeout: float = TIMEOUT, grace: float = GRACE
) -> list[Ended]:
    """Start each command on its node, all at once, and wait for all.

    Args:
        commands: node and command.
        folder: for their outputs; created.
        timeout: seconds until a hang is called a hang.
        grace: seconds that the others get when one has failed.

    Returns:
        Exit code and output of each.

    Raises:
        AssertionError: some hang; the message holds the end of each one's output, with Python's stacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env = {**rank_environment(0, 1), "PYTHONFAULTHANDLER": "1"}
    started: list[subprocess.Popen] = []
    try:
        for index, (node, command) in enumerate(commands):
            with open(folder / f"output_{index}.txt", "wb") as output:
                started.append(node.popen(command, env, output.fileno()))
        hanging = _wait(started, timeout, grace)
    finally:
        for process in started:
            _kill_tree(process)
    outputs = [(folder / f"output_{index}.txt").read_text(errors="replace") for index in range(len(commands))]
    ended = [Ended(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
    assert not hanging, f"no end after {timeout:g} s: processes {hanging} hang\n{tails(ended)}"
    return ended


def tails(ended: Sequence[Ended], lines: int = 60) -> str:
    """The end of each output, for messages."""
    return "\n".join(
        "\n".join([f"--- process {index}, exit code {code} ---", *output.splitlines()[-lines:]])
        for index, (code, output) in enumerate(ended)
    )


def _wait(started: Sequence[subprocess.Popen], timeout: float, grace: float) -> list[int]:
    """Wait until all have ended, or for ``grace`` seconds after the first failed. Returns which ones hang."""
    deadline, failed_at = time.monotonic() + timeout, None
    while None in (codes := [process.poll() for process in started]):
        now = time.monotonic()
        if failed_at is None and any(codes):
            failed_at = now
        if failed_at is not None and now > failed_at + grace:
            return []
        if now > deadline:
            hanging = [index for index, code in enumerate(codes) if code is None]
            for index in hanging:
                _signal_tree(started[index], signal.SIGABRT)  # faulthandler writes where each process hangs
            time.sleep(1)
            return hanging
        time.sleep(0.05)
    return []


def _kill_tree(process: subprocess.Popen) -> None:
    _signal_tree(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _signal_tree(process: subprocess.Popen, number: signal.Signals) -> None:
    # torchrun starts its ranks in sessions of their own: killpg doesn't reach them.
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)


def _connected_nodes(stack: contextlib.ExitStack) -> Nodes:
    with NamedTemporaryFile("w", suffix=".hosts") as hosts:  # mounted in the nodes, which keep it
        hosts.write("127.0.0.1 localhost\n")
        hosts.writelines(f"{address} node{rank}\n" for rank, address in enumerate(ADDRESSES))
        hosts.flush()
        inits = [_boot(stack, f"node{rank}", hosts.name) for rank in range(2)]
    nodes = Nodes(*(Node(address, INTERFACE, init) for address, init in zip(ADDRESSES, inits, strict=True)))
    # Made inside the first node, so that nothing appears among this machine's own interfaces.
    in_first = ["nsenter", "--target", str(inits[0]), "--net", "--"]
    _run([*in_first, *f"ip link add {INTERFACE} type veth peer name {INTERFACE} netns {inits[1]}".split()])
    for node in nodes.both():
        _run([*node.enter(), "ip", "address", "add", f"{node.address}/30", "dev", INTERFACE])
        node.mend()
    return nodes


def _boot(stack: contextlib.ExitStack, name: str, hosts: str) -> int:
    """Start a node's first process, which ends when the stack does. Returns its id on this machine."""
    spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = ["unshare", *spaces, "sh", "-c", BOOT, "sh", name, hosts]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        # A session of its own: an interrupt from the keyboard is for the tests, which clean up in order.
        holder = subprocess.Popen(command, **streams, text=True, start_new_session=True)
    except FileNotFoundError as error:
        raise NoNamespaces(str(error)) from None
    stack.callback(holder.communicate)  # closes its stdin and waits
    if holder.stdout.readline() != "ready\n":
        raise NoNamespaces(holder.stderr.read().strip())
    return psutil.Process(holder.pid).children()[0].pid


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoNamespaces(str(error)) from None
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"{' '.join(command)}: {error.stderr.strip()}") from None
