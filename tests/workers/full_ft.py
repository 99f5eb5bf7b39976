"""The authors' warm-up by one engine after the other: scores, and the base that it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_tokenizer import make_tokenizer

from smt_dist.config import SMTConfig
from smt_dist.distributed import barrier, get_world_size
from smt_dist.engines import make_engine
from smt_dist.full_ft import save_moved_base
from smt_dist.run import collect_and_select
from workers.runs import elements_held, engine_arguments, load_model, standard_data

CONFIG = SMTConfig.model_validate(
    {"block_size": 16, "groups": [{"blocks": 9}], "warmup": {"steps": 4, "mode": "full_ft"}}
)


def tune_fully(folder: Path, engines: list[str], model: str) -> dict[str, Any]:
    """What each engine found; the moved bases lie in ``folder``."""
    return {engine: _tune(folder, engine, model) for engine in engines}


def _tune(folder: Path, engine: str, model_folder: str) -> dict[str, Any]:
    with engine_arguments(engine, folder / "out", accumulation=2, learning_rate=1e-3) as args:
        model = load_model(model_folder, args)
        held = elements_held(model)
        selection, scores = collect_and_select(model, standard_data(), CONFIG, args)
        # A shared folder would do; here each rank's copy shows that rank 0's write is enough.
        moved = folder.parent / f"moved_{engine}_{get_world_size()}"
        save_moved_base(model, make_tokenizer(), moved)
        barrier()
        return {
            "world_size": get_world_size(),
            "engine": type(make_engine(args.engine, args.filled_deepspeed_config())).__name__,
            "base_elements_held": held,
            "selection": selection.to_json(),
            "tables": scores.tables,
            "moved": str(moved),
        }
