"""Two nodes with a network between them do what one node does: launch/train.py under both launchers.

Each node has a disk of its own here, as far as ``--output_dir`` goes; model and data are the same files.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from programs import LAUNCH, command_line, logged_losses, train_flags
from safetensors.torch import load_file
from tiers import slow, slow_unless
from two_nodes import Ended, Nodes, free_port, run_together, tails, this_machine, two_nodes

# Launcher and engine.
RUNS = [("torchrun", "ddp"), ("torchrun", "fsdp2"), ("deepspeed", "zero2")]
SHARDED_BASE = {"fsdp2", "zero3"}  # these gather the base over the network in every step
RANKS_PER_NODE = 1
STEPS = 16
SELECTION, BLOCKS = "smt_selection.json", "smt_blocks.safetensors"
CHECKPOINT = f"checkpoint-{STEPS}"


class Run(NamedTuple):
    """A job that has ended."""

    engine: str
    outputs: list[Path]  # each node's --output_dir
    moved: tuple[int, int]  # bytes that the first node received and sent; zeros without a link


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def link(nodes) -> Nodes:
    """The nodes, where there is a link to look at."""
    if not nodes.real:
        pytest.skip(f"there is no link: {nodes.problem}")
    return nodes


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory) -> Path:
    """The output of the same job on one node, started the ordinary way."""
    output = tmp_path_factory.mktemp("reference")
    launcher = ["torchrun", "--nproc_per_node", str(2 * RANKS_PER_NODE), "--master_port", str(free_port())]
    ended = run_together([(this_machine(), [*launcher, *train(folder, output, "ddp")])], output / "log")
    assert ended[0].code == 0, tails(ended)
    return output


@pytest.fixture(scope="module", params=slow_unless(RUNS, lambda run: run == RUNS[0]), ids="-".join)
def run(request, nodes, folder, tmp_path_factory) -> Run:
    """The job on two nodes."""
    launcher, engine = request.param
    work = tmp_path_factory.mktemp(engine)
    outputs = [work / "disk0", work / "disk1"]
    before = nodes.first.bytes_moved() if nodes.real else (0, 0)
    programs = [train(folder, output, engine) for output in outputs]
    launchers = torchrun(nodes) if launcher == "torchrun" else deepspeed(nodes, work / "hosts")
    ended = start(nodes, launchers, programs, work / "log")
    assert [process.code for process in ended] == [0, 0], tails(ended)
    after = nodes.first.bytes_moved() if nodes.real else (0, 0)
    return Run(engine, outputs, (after[0] - before[0], after[1] - before[1]))


def train(folder: Path, output: Path, engine: str) -> list[str]:
    """train.py with its flags."""
    flags = {**train_flags(folder, output), "max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS}
    if engine.startswith("zero"):
        flags["deepspeed"] = LAUNCH.parent / "configs" / "deepspeed" / f"{engine}.json"
    else:
        flags["engine"] = engine
    return [str(LAUNCH / "train.py"), *command_line(flags)]


def torchrun(nodes: Nodes, *extra: str) -> list[list[str]]:
    """The launcher's command on each node: they meet at the first one's address."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{nodes.first.address}:{free_port()}", "--rdzv_id", "job"]
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", str(RANKS_PER_NODE), *meeting, *extra]
    return [[*command, "--local_addr", node.address] for node in nodes.both()]


def deepspeed(nodes: Nodes, hosts: Path) -> list[list[str]]:
    """As :func:`torchrun`; the host file says how many ranks each node has."""
    hosts.write_text("".join(f"{node.address} slots={RANKS_PER_NODE}\n" for node in nodes.both()))
    meeting = ["--master_addr", nodes.first.address, "--master_port", str(free_port())]
    command = ["deepspeed", "--hostfile", str(hosts), "--no_ssh", *meeting]
    return [[*command, "--node_rank", str(rank)] for rank in range(2)]


def start(nodes: Nodes, launchers: list[list[str]], programs: list[list[str]], log: Path) -> list[Ended]:
    """The job: each node's launcher with its program."""
    commands = [launcher + program for launcher, program in zip(launchers, programs, strict=True)]
    return run_together(list(zip(nodes.both(), commands, strict=True)), log)


def test_two_nodes_choose_the_blocks_of_one(run, reference):
    """Other bytes: the warm-up's batches or sums depend on how ranks are spread over nodes."""
    assert (run.outputs[0] / SELECTION).read_bytes() == (reference / SELECTION).read_bytes()


def test_two_nodes_train_as_one(run, reference):
    """Other losses or blocks: gradients aren't averaged over both nodes, or the nodes read the wrong rows."""
    losses = logged_losses(run.outputs[0] / CHECKPOINT)
    assert len(losses) == STEPS
    assert losses == pytest.approx(logged_losses(reference / CHECKPOINT), rel=1e-5)
    blocks, expected = load_file(run.outputs[0] / BLOCKS), load_file(reference / BLOCKS)
    assert blocks.keys() == expected.keys()
    for name, block in expected.items():
        assert (blocks[name] - block).norm() <= 1e-5 * block.norm(), name


def test_the_first_node_keeps_the_result_of_all_ranks_and_only_it_does(run):
    """Ranks that take themselves for the first because they are so on their node would write results twice, into the
    same files if the disk is shared; a rank that was left out would resume with another random state.
    """
    states = {path.name for path in (run.outputs[0] / CHECKPOINT).glob("rng_state_*")}
    assert states == {f"rng_state_{rank}.json" for rank in range(2 * RANKS_PER_NODE)}
    assert list(run.outputs[1].rglob("*")) == [], "the second node wrote results too"


@pytest.mark.usefixtures("link")
def test_gradients_of_the_blocks_cross_the_link(run):
    """Less than the blocks' gradients in each step, in either direction: it weren't two nodes that trained."""
    gradients = STEPS * sum(block.nbytes for block in load_file(run.outputs[0] / BLOCKS).values())
    assert min(run.moved) > gradients


@pytest.mark.usefixtures("link")
def test_the_base_does_not_cross_the_link_in_each_step(run, folder):
    """DDP and DeepSpeed send the base once, when they start. More means that frozen weights' gradients are reduced:
    what SMT is there to spare a slow network.
    """
    if run.engine in SHARDED_BASE:
        pytest.skip(f"{run.engine} gathers the base in each step")
    base = (folder / "model" / "model.safetensors").stat().st_size
    assert max(run.moved) < STEPS / 2 * base


@slow
def test_without_a_network_no_node_trains_alone(link, folder, tmp_path):
    """A job that starts on the nodes which are there would train with another batch, and report success."""
    outputs = [tmp_path / "disk0", tmp_path / "disk1"]
    impatient = ["--rdzv_conf", "join_timeout=5,read_timeout=5"]
    link.second.cut()
    try:
        programs = [train(folder, output, "ddp") for output in outputs]
        ended = start(link, torchrun(link, *impatient), programs, tmp_path / "log")
    finally:
        link.second.mend()
    assert all(process.code > 0 for process in ended), tails(ended)
    assert not any(output.exists() for output in outputs), "a node trained"


def test_a_hang_ends_and_shows_where(nodes, tmp_path):
    """Else a lost packet would stop the tests for good."""
    command = [sys.executable, "-c", "import time\nprint('started', flush=True)\ntime.sleep(60)"]
    launcher = ["sh", "-c", '"$@"; true', "sh", *command]  # a parent, as launchers are
    with pytest.raises(AssertionError, match=r"processes \[0, 1\] hang") as caught:
        run_together([(node, launcher) for node in nodes.both()], tmp_path, timeout=2)
    assert str(caught.value).count("started") == 2
    assert str(caught.value).count("Fatal Python error: Aborted") == 2


@pytest.mark.usefixtures("link")
def test_nothing_outlives_the_nodes(tmp_path):
    """A rank left behind would keep its port and memory, and disturb what is tested next."""
    with two_nodes() as nodes:
        detach = ["sh", "-c", "setsid sleep 61 & echo ready"]
        run_together([(node, detach) for node in nodes.both()], tmp_path)
        sleepers = [process for node in nodes.both() for process in psutil.Process(node.init).children()]
        assert len(sleepers) == 2
    assert not any(process.is_running() for process in sleepers)


def test_nodes_that_cannot_be_made_are_announced(monkeypatch):
    """Two launchers on one machine are a weaker test; nobody should take them for two nodes."""
    monkeypatch.setenv("PATH", "")
    with contextlib.ExitStack() as stack:
        with pytest.warns(pytest.PytestWarning, match="not two nodes but two launchers"):
            nodes = stack.enter_context(two_nodes())
        assert not nodes.real
        assert nodes.first.address != nodes.second.address
        with pytest.raises(AssertionError, match="it has no link"):
            nodes.first.bytes_moved()
