"""Load the base and its tokenizer as each engine needs them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from smt_dist.distributed import get_world_size, main_process_first, raise_on_any_rank
from smt_dist.engines.base import Engine
from smt_dist.models.folder import check_model_folder, load_causal_lm, load_tokenizer
from smt_dist.models.gguf import dequantize_gguf, find_gguf_file
from smt_dist.models.packing import prepare_model_for_packing
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.run_arguments import RunArguments

logger = logging.getLogger(__name__)


def load_tokenizer_and_model(
    run: RunArguments, args: SMTTrainingArguments, engine: Engine
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the base in its dtype; under ZeRO-3 and fsdp2 each rank keeps its part only.

    Args:
        run: which base.
        args: its dtype and how it computes.
        engine: what ``args`` ask for.

    Raises:
        SMTError: it can't be read; names the folder.
    """
    source = run.model_name_or_path
    if run.gguf_file is not None:
        with _without_zero_init(args):
            source = str(main_process_first(lambda: _dequantize(run, args.base_dtype), "dequantising the GGUF file"))
    options = {} if run.attn_implementation is None else {"attn_implementation": run.attn_implementation}
    config = raise_on_any_rank(lambda: check_model_folder(source, run.trust_remote_code), "reading the model's config")
    sharding = engine.load_options(config, args.base_dtype)
    logger.info("engine %s, %d ranks", args.engine, get_world_size())
    tokenizer = raise_on_any_rank(lambda: load_tokenizer(source, run.trust_remote_code), "reading the tokenizer")
    model = load_causal_lm(source, args.base_dtype, run.trust_remote_code, **options, **sharding)
    if not sharding and not is_deepspeed_zero3_enabled():
        model.to(args.device)
    engine.prepare_base(model)
    if args.activation_checkpointing:  # for the warm-up; Trainer enables it again with all its options
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # It also lets the embedding's output require a gradient, which would run the backward of layers below the
        # lowest block; re-entrant checkpointing alone needs that.
        model.disable_input_require_grads()
    if run.packing:
        rows = [args.per_device_train_batch_size, args.per_device_eval_batch_size if run.eval_file else 0]
        prepare_model_for_packing(model, max(rows))
    return tokenizer, model


def _dequantize(run: RunArguments, dtype: torch.dtype) -> Path:
    return dequantize_gguf(find_gguf_file(run.model_name_or_path, run.gguf_file), dtype=dtype)


@contextmanager
def _without_zero_init(args: SMTTrainingArguments) -> Iterator[None]:
    """Load an ordinary model inside although a ZeRO-3 config is active.

    It is converted, not trained.
    """
    if args.deepspeed:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
