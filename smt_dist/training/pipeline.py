"""Run the steps that the programs ``train`` and ``select`` share, in their order."""

from __future__ import annotations

import logging

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smt_dist.checkpoint.adapter import Adapter, attach_adapter, verify_base_model
from smt_dist.config import SMTConfig
from smt_dist.data.batches import TrainingData, warmup_batches
from smt_dist.data.dataset import CausalLMCollator, build_dataset, get_pad_token_id, load_rows
from smt_dist.distributed import get_world_size, main_process_first, raise_on_any_rank
from smt_dist.engines.base import Engine
from smt_dist.fault_tolerance.activity import begin_activity
from smt_dist.models.chunked_loss import chunk_loss
from smt_dist.selection.block_scores import BlockScores
from smt_dist.selection.full_ft import collect_scores_full_ft
from smt_dist.selection.select import select_blocks
from smt_dist.selection.steps import Observer
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.forms import describe_forms
from smt_dist.sparse.surgery import apply_selection, describe_blocks, sparse_layers
from smt_dist.sparse.targets import find_targets
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.run_arguments import RunArguments
from smt_dist.training.trainer import STATE_BYTES, state_bytes_per_rank

logger = logging.getLogger(__name__)


def load_data(run: RunArguments, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read and tokenise the training rows, and the evaluation rows if given.

    Raises SMTError on all ranks.
    """

    def build(train_file: str | None, dataset_name: str | None) -> datasets.Dataset:
        rows = load_rows(train_file, dataset_name, run.dataset_config)
        dataset, _ = build_dataset(
            rows,
            tokenizer,
            max_seq_length=run.max_seq_length,
            prompt_style=run.prompt_style,
            packing=run.packing,
        )
        return dataset

    def build_all() -> TrainingData:
        return TrainingData(
            train=build(run.train_file, run.dataset_name),
            evaluation=build(run.eval_file, None) if run.eval_file else None,
            collator=CausalLMCollator(get_pad_token_id(tokenizer)),
        )

    if run.dataset_name is not None:  # one process downloads, the others find it in the cache
        return main_process_first(build_all, "reading the data")
    return raise_on_any_rank(build_all, "reading the data")


def collect(
    model: PreTrainedModel,
    data: TrainingData | None,
    config: SMTConfig,
    args: SMTTrainingArguments,
    engine: Engine,
    observe: Observer | None = None,
) -> BlockScores:
    """Run the warm-up under the engine.

    ``data`` may be None where the score needs none; ``observe`` is called with each step.
    """
    batches = warmup_batches(data, args.batch_order, config.warmup.steps) if data is not None else ()
    progress = not args.disable_tqdm
    if config.warmup.mode == "full_ft":
        return collect_scores_full_ft(
            model, batches, config, engine, args.learning_rate, args.gradient_accumulation_steps, progress, observe
        )
    if not config.selection.needs_batches:
        return collect_scores(model, batches, config, progress)
    targets = {name for names in find_targets(model, config).values() for name in names}
    chunk_loss(model, args.loss_chunk_size, targets)
    with engine.scoring(model):
        return collect_scores(model, batches, config, progress, observe)


def collect_and_select(
    model: PreTrainedModel,
    data: TrainingData | None,
    config: SMTConfig,
    args: SMTTrainingArguments,
    engine: Engine,
    observe: Observer | None = None,
) -> tuple[BlockSelection, BlockScores]:
    """Run the warm-up and choose the blocks; ``observe`` looks on."""
    scores = collect(model, data, config, args, engine, observe)
    begin_activity("selection")
    return select_blocks(scores, config), scores


def attach_blocks(
    model: PreTrainedModel,
    selection: BlockSelection,
    config: SMTConfig,
    args: SMTTrainingArguments,
    adapter: Adapter | None = None,
    source: str = "",
) -> None:
    """Put the blocks into the model in the engine's dtype, and log what is trained.

    Args:
        model: the base.
        selection: to train, known to be the same on all ranks (:func:`select_blocks`, :class:`RunPlan`).
        config: recorded in the adapters of this run.
        args: with dtype and device.
        adapter: whose values to go on from; its trained blocks are the selection.
        source: names the adapter in errors.

    Raises:
        SMTError: the selection doesn't fit the model, or the adapter belongs to another base.
    """
    # The blocks compute in the base's dtype; the engine keeps their fp32 masters.
    dtype, device = args.base_dtype, args.device
    if adapter is not None:
        verify_base_model(model, adapter, source)
        attach_adapter(model, adapter._replace(config=config), dtype, device, args.auto_form)
    else:
        apply_selection(model, selection, config, dtype, device=device, auto_form=args.auto_form)
    model.smt.is_compared = True
    chunk_loss(model, args.loss_chunk_size, {*selection.blocks, *_may_get_blocks(model, config)})
    logger.info("SMT trains %s; %s", describe_blocks(model), describe_forms(sparse_layers(model), model))
    logger.info(
        "optimizer state: %s bytes a rank (%d a parameter: fp32 master and two moments; sharded over %d ranks)",
        f"{state_bytes_per_rank(model):,}",
        STATE_BYTES,
        get_world_size(),
    )


def _may_get_blocks(model: PreTrainedModel, config: SMTConfig) -> set[str]:
    """Return the modules in which re-selection may put blocks later."""
    return {name for names in find_targets(model, config).values() for name in names} if config.reselect else set()
