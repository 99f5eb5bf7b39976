"""An error is told by the rank that has it, unless another rank's end is behind it."""

from __future__ import annotations

import pytest

from smt_dist.cli import program
from smt_dist.errors import RankError, SMTError
from smt_dist.fault_tolerance import supervision


class Ended(BaseException):
    """Stands for the heartbeat's end of the process."""


class Watched:
    """A heartbeat that knows of another rank's end, or doesn't."""

    def __init__(self, knows: bool) -> None:
        self.knows, self.left, self.asked = knows, [], 0

    def await_verdict(self, _seconds: float) -> None:
        self.asked += 1
        if self.knows:
            raise Ended

    def leave(self, text: str, code: int) -> None:
        self.left.append((text, code))


@pytest.fixture
def watched(monkeypatch):
    def put(knows: bool) -> Watched:
        heartbeat = Watched(knows)
        monkeypatch.setattr(supervision._active, "heartbeat", heartbeat)
        return heartbeat

    return put


def fail(error: Exception):
    def main() -> None:
        raise error

    return main


def test_a_file_is_not_blamed_for_another_ranks_end(watched, capsys):
    """Under ZeRO-3 a base is read with collectives: when another rank has gone, this one's reading fails too, and the
    exit code of bad input would keep a launcher from starting the job again.
    """
    watched(knows=True)
    with pytest.raises(Ended):
        program.run_program(fail(RankError("model: can't be loaded (Connection closed by peer)")))
    assert capsys.readouterr().err == ""


def test_an_error_of_one_rank_alone_is_printed_when_nobody_is_gone(watched, capsys):
    """The file may be wrong here only."""
    heartbeat = watched(knows=False)
    with pytest.raises(SystemExit) as ended:
        program.run_program(fail(RankError("model: can't be loaded")))
    assert ended.value.code == 2
    assert "model: can't be loaded" in capsys.readouterr().err
    assert heartbeat.left == [("failed: model: can't be loaded", 2)]


def test_an_error_that_all_ranks_have_is_not_waited_with(watched):
    """It is nobody's end."""
    heartbeat = watched(knows=True)
    with pytest.raises(SystemExit):
        program.run_program(fail(SMTError("--flag: wrong")))
    assert heartbeat.asked == 0
