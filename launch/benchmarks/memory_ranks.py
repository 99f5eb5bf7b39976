"""One rank of cells of the planner's validation; ``profile_memory.py validate`` starts one a rank.

Rank 0 writes a cell's result as soon as all ranks have it, so that a run that is cut short loses one cell at most.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

import torch.distributed as dist
from memory_cell import measure_cell
from memory_grid import Cell

from smt_dist.cli.program import configure_logging, run_program
from smt_dist.distributed import get_rank, get_world_size, is_distributed


def main() -> None:
    """Measure the cells of one engine, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", type=Path, help="JSON list of cells; the results go beside it, one file a cell")
    path = parser.parse_args().cells
    configure_logging()
    warnings.simplefilter("ignore")
    for index, values in enumerate(json.loads(path.read_text())):
        peaks = measure_cell(Cell(**values).request(), str(path.parent / "trainer"))
        own = {phase: memory.to_json() | {"moment": moment} for phase, (moment, memory) in peaks.items()}
        ranks = [own] * get_world_size()
        if is_distributed():
            dist.all_gather_object(ranks, own)
        if get_rank() == 0:
            # Whole or not there: the parent looks while this is written.
            temporary = path.parent / f"{index}.part"
            temporary.write_text(json.dumps({phase: [rank[phase] for rank in ranks] for phase in own}))
            os.replace(temporary, path.parent / f"{index}.json")


if __name__ == "__main__":
    run_program(main)
