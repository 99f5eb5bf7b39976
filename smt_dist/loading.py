"""The process group, and the base with its tokenizer, as each engine wants them."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.cpp_extension import get_default_build_root
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from smt_dist.arguments import SMTTrainingArguments
from smt_dist.data import prepare_model_for_packing
from smt_dist.distributed import agree, get_world_size, main_process_first
from smt_dist.engines import make_engine
from smt_dist.gguf import dequantize_gguf, find_gguf_file
from smt_dist.model_folder import check_model_folder, load_causal_lm, load_tokenizer

if TYPE_CHECKING:
    import torch

    from smt_dist.run import RunArguments

logger = logging.getLogger(__name__)


def initialize_process_group(args: SMTTrainingArguments) -> None:
    """Trainer's own set-up of the process group, and DeepSpeed's on top, before any model is built."""
    if args.engine == "deepspeed" and "RANK" not in os.environ:
        os.environ |= _single_rank()  # without a launcher DeepSpeed would ask MPI
    _ = args.device  # sets the process group up
    if args.process_index == 0:
        warn_of_a_shared_store()
    if args.n_gpu > 1:  # one process that sees several GPUs: Trainer would use nn.DataParallel
        args._n_gpu = 1
    if args.engine == "deepspeed":
        # Imported here: DeepSpeed takes seconds, and ddp doesn't need it.
        import deepspeed

        if args.local_process_index == 0:
            warn_of_abandoned_builds()
        # Before from_pretrained: without it zero.Init would reckon with one rank.
        deepspeed.init_distributed(timeout=timedelta(seconds=args.ddp_timeout))


def warn_of_a_shared_store() -> None:
    """Say how torchrun restarts ranks safely, where it will restart them.

    In torch 2.13.0 its agent keeps one store for all tries: restarted ranks may read the addresses of those that are
    gone, and then wait for one another until the time-out.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        logger.warning(
            "torchrun --max-restarts %d: restarted ranks may read addresses of those that are gone, and hang. Launch "
            "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv_backend c10d (or --standalone)",
            restarts,
        )


def warn_of_abandoned_builds(minutes: float = 5) -> None:
    """Name the locks of old builds: PyTorch waits for one without end, in silence, although its owner was killed.

    Args:
        minutes: from which age on; a build of one of DeepSpeed's ops takes less.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        if _age(lock) > 60 * minutes:
            logger.warning(
                "%s is over %g minutes old: if no process compiles DeepSpeed's ops now, one was killed while it did, "
                "and this run may wait for it without end; then delete that file",
                lock,
                minutes,
            )


def _age(path: Path) -> float:
    """In seconds; 0 for a lock that another node's build took away while we looked."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _single_rank() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def load_tokenizer_and_model(
    run: RunArguments, args: SMTTrainingArguments
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the base in its dtype; under ZeRO-3 and fsdp2 each rank keeps its part only.

    Raises:
        SMTError: it can't be read; names the folder.
    """
    source = run.model_name_or_path
    if run.gguf_file is not None:
        with _without_zero_init(args):
            source = str(main_process_first(lambda: _dequantize(run, args.base_dtype), "dequantising the GGUF file"))
    options = {} if run.attn_implementation is None else {"attn_implementation": run.attn_implementation}
    config = agree(lambda: check_model_folder(source, run.trust_remote_code), "reading the model's config")
    engine = make_engine(args)
    sharding = engine.load_options(config, args.base_dtype)
    logger.info("engine %s, %d ranks", args.engine, get_world_size())
    tokenizer = agree(lambda: load_tokenizer(source, run.trust_remote_code), "reading the tokenizer")
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
    """Load an ordinary model inside although a ZeRO-3 config is active: it is converted, not trained."""
    if args.deepspeed:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
