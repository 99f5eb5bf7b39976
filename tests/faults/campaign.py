"""Break runs on purpose, for hours, and count what survives.

python tests/faults/campaign.py --hours 1 --output outputs/campaign     (again: goes on where it ended)
python tests/faults/campaign.py --output outputs/campaign --table       (what it has found so far)

Each round takes an engine, a kind of fault, a rank, an activity and a moment in it, by a seeded draw; hurts a run of
two ranks there; relaunches it; and compares the final blocks with an undisturbed run's, bit for bit. "Survived": all
ranks ended in time and as promised, the newest checkpoint is good, and the relaunch ends with those blocks. Rounds go
to campaign.jsonl; the folders of rounds that were lost or hung are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from forks.job import FAULT, STARTED  # noqa: E402
from programs import write_job_files  # noqa: E402
from two_nodes import Nodes, two_nodes  # noqa: E402

from faults.fleet import Fault, Fleet, activities_of  # noqa: E402
from faults.judge import (  # noqa: E402
    ACTIVITIES,
    BLOCKS,
    ENGINES,
    KINDS,
    job_flags,
    judge_end,
    relaunch_and_judge,
    run_undisturbed,
)

LOG = "campaign.jsonl"
WORDS = ("survived", "lost", "hung", "too late")
MOST_DELAY = 0.4  # seconds from an activity's beginning
CUT_EVERY = 12  # rounds: a link is cut in each of these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0, help="how long, all launches together (default 1)")
    parser.add_argument("--output", type=Path, default=Path("outputs/campaign"), help="folder (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all")
    parser.add_argument("--table", action="store_true", help="only print what was found so far")
    args = parser.parse_args()
    args.output = args.output.resolve()  # ranks have a working directory of their own
    if not args.table:
        run(args)
    rounds = read_log(args.output)
    print(table(rounds))
    sys.exit(any(found["verdict"] in ("lost", "hung") for found in rounds))


def read_log(output: Path) -> list[dict[str, Any]]:
    """The rounds so far."""
    path = output / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace) -> None:
    """Do rounds until the time is up."""
    args.output.mkdir(parents=True, exist_ok=True)
    files = write_job_files(args.output / "files")
    rounds = read_log(args.output)
    spent = sum(found["seconds"] for found in rounds)
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(Fleet())
        nodes = stack.enter_context(two_nodes())
        linked = stack.enter_context(Fleet(nodes.both())) if nodes.real else None
        expected = {engine: reference(fleet, files, engine, args.output) for engine in args.engines}
        while spent < args.hours * 3600:
            began = time.monotonic()
            engine, kind, fault = draw(args.seed, len(rounds), args.engines, linked is not None)
            place = linked if kind == "link cut" else fleet
            folder = args.output / f"round-{len(rounds)}"
            shutil.rmtree(folder, ignore_errors=True)
            found = one_round(place, nodes, files, engine, kind, fault, folder, expected[engine])
            found |= {"round": len(rounds), "seconds": round(time.monotonic() - began, 1)}
            with open(args.output / LOG, "a") as log:
                log.write(json.dumps(found) + "\n")
            if found["verdict"] in ("survived", "too late"):
                shutil.rmtree(folder)
            rounds.append(found)
            spent += found["seconds"]
            show(rounds, spent, args.hours)


def reference(fleet: Fleet, files: Path, engine: str, output: Path) -> bytes:
    """The undisturbed run's blocks, kept from the first launch on."""
    folder = output / f"undisturbed-{engine}"
    if not (folder / BLOCKS).exists():
        shutil.rmtree(folder, ignore_errors=True)
        run_undisturbed(fleet, files, engine, folder)
    return (folder / BLOCKS).read_bytes()


def draw(seed: int, index: int, engines: list[str], with_link: bool) -> tuple[str, str, Fault]:
    """The engine, the kind and the fault of one round."""
    chance = random.Random(f"{seed} {index}")
    engine = engines[index % len(engines)]
    if with_link and index % CUT_EVERY == CUT_EVERY - 1:
        engine, kind = chance.choice(engines), "link cut"
    else:
        # Kills are what happens most.
        kind = chance.choice(["kill", "kill", "kill", "hang", *(k for k in KINDS if k not in ("kill", "link cut"))])
    ranks = (0, 1) if KINDS[kind].all_ranks else (chance.randrange(2),)
    activity, delay = chance.choice(ACTIVITIES), chance.choice([0.0, chance.uniform(0, MOST_DELAY)])
    return engine, kind, Fault(KINDS[kind].signal or 0, ranks, activity, delay, KINDS[kind].pause)


def one_round(
    fleet: Fleet, nodes: Nodes, files: Path, engine: str, kind: str, fault: Fault, folder: Path, expected: bytes
) -> dict[str, Any]:
    """Hurt a run, relaunch it, and judge both."""
    flags, relaunch = job_flags(files, engine, folder), None
    if kind == "link cut":
        outcome = fleet.run(flags, folder / "launch", meanwhile=cutter(nodes, fault))
        nodes.second.mend()
    else:
        outcome = fleet.run(flags, folder / "launch", fault)
    verdict = judge_end(kind, fault, outcome)
    if verdict.word == "survived":
        relaunch, verdict = relaunch_and_judge(fleet, files, engine, folder, outcome, expected)
    return {
        "engine": engine,
        "kind": kind,
        "ranks": fault.ranks,
        "activity": next(iter(outcome.struck.values()), fault.activity),
        "delay": round(fault.delay, 3),
        "codes": outcome.codes,
        "ended_after": round(max(outcome.seconds.values()), 2),
        "relaunch": relaunch.codes if relaunch else None,
        "verdict": verdict.word,
        "why": verdict.why,
    }


def cutter(nodes: Nodes, fault: Fault):
    """Cuts the link when rank 0 is in the fault's activity, and says when."""

    def cut(folder: Path) -> None:
        deadline = time.monotonic() + STARTED
        while not any(activity.startswith(fault.activity) for _, activity in activities_of(folder, 0)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        time.sleep(fault.delay)
        nodes.second.cut()
        record = {"time": time.time(), "activity": activities_of(folder, 0)[-1][1], "signal": 0}
        (folder / FAULT.format(0)).write_text(json.dumps(record))

    return cut


def show(rounds: list[dict[str, Any]], spent: float, hours: float) -> None:
    """A line of progress."""
    last, counts = rounds[-1], Counter(found["verdict"] for found in rounds)
    so_far = ", ".join(f"{counts[word]} {word}" for word in WORDS)
    print(
        f"{spent / 60:6.1f} of {hours * 60:g} min, round {last['round']}: {last['engine']}, {last['kind']} of "
        f"{last['ranks']} in {last['activity']}: {last['verdict']} {last['why']} ({last['ended_after']} s) | {so_far}",
        flush=True,
    )


def table(rounds: list[dict[str, Any]]) -> str:
    """Markdown: faults by kind and activity."""
    cells = Counter((found["kind"], plain(found["activity"]), found["verdict"]) for found in rounds)
    lines = ["| fault | activity | injected | survived | lost | hung |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        for activity in dict.fromkeys(map(plain, ACTIVITIES)):
            counts = [cells[kind, activity, word] for word in WORDS[:3]]
            if sum(counts):
                lines.append(f"| {kind} | {activity} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    totals = Counter(found["verdict"] for found in rounds)
    counts = [totals[word] for word in WORDS[:3]]
    lines.append(f"| all | | {sum(counts)} | {' | '.join(map(str, counts))} |")
    hours, late = sum(found["seconds"] for found in rounds) / 3600, totals["too late"]
    return "\n".join([*lines, "", f"{hours:.2f} hours, {len(rounds)} rounds; {late} faults came after the run's end."])


def plain(activity: str) -> str:
    """An activity without its step."""
    return re.sub(r",? ?(after )?step \d+", "", activity).strip()


if __name__ == "__main__":
    main()
