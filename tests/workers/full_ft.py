"""The authors' warm-up by one engine after the other: scores, and the base that it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import make_tokenizer

from smt_dist.checkpoint.moved_base import save_moved_base
from smt_dist.config import SMTConfig
from smt_dist.distributed import barrier, get_world_size
from smt_dist.engines import make_engine
from smt_dist.engines.replicated import adamw_step
from smt_dist.errors import SMTError
from smt_dist.training.pipeline import collect_and_select
from workers.runs import elements_held, engine_arguments, load_model, standard_data

CONFIG = SMTConfig.model_validate(
    {"block_size": 16, "groups": [{"blocks": 9}], "warmup": {"steps": 4, "mode": "full_ft"}}
)


def tune_fully(folder: Path, engines: list[str], model: str) -> dict[str, Any]:
    """What each engine found; the moved bases lie in ``folder``."""
    return {engine: _tune(folder, engine, model) for engine in engines}


def split_tie(folder: Path, model: str) -> dict[str, Any]:
    """What a head tied to the embedding computes with under fsdp2, after weights moved; and what the engine says."""
    with engine_arguments("fsdp2", folder) as args:
        base = load_model(model, args).train()
        engine, used = make_engine(args.engine_options), {}
        base.lm_head.register_forward_hook(lambda head, *_: used.update(head=head.weight.detach().clone()))
        step = adamw_step(base, learning_rate=1e-2, accumulation=1)
        for _ in range(2):
            tokens = torch.arange(3, 23)[None]
            base(input_ids=tokens, labels=tokens).loss.backward()
            moved = base.model.embed_tokens.weight.full_tensor().detach().clone()
            step()
        try:
            with engine.full_finetuning(base, 1e-2, 1):
                said = "nothing"
        except SMTError as error:
            said = str(error)
    return {"stale_rows": int((used["head"] != moved).any(1).sum()), "said": said}


def _tune(folder: Path, engine: str, model_folder: str) -> dict[str, Any]:
    with engine_arguments(engine, folder / "out", accumulation=2, learning_rate=1e-3) as args:
        model = load_model(model_folder, args)
        held = elements_held(model)
        selection, scores = collect_and_select(model, standard_data(), CONFIG, args, make_engine(args.engine_options))
        # A shared folder would do; here each rank's copy shows that rank 0's write is enough.
        moved = folder.parent / f"moved_{engine}_{get_world_size()}"
        save_moved_base(model, make_tokenizer(), moved)
        barrier()
        return {
            "world_size": get_world_size(),
            "engine": type(make_engine(args.engine_options)).__name__,
            "base_elements_held": held,
            "selection": selection.to_json(),
            "tables": scores.tables,
            "moved": str(moved),
        }
