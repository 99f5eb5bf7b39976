"""Fine-tune a language model with Sparse Matrix Tuning.

deepspeed --num_gpus N launch/train.py --smt_config S.json --deepspeed D.json --model_name_or_path M
    --train_file T.json --output_dir O [any transformers.TrainingArguments flag]
torchrun --nproc_per_node N launch/train.py --engine ddp --smt_config S.json ...
python launch/train.py --smt_config S.json ...
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from smt_dist.adapter import trained_deltas
from smt_dist.cli import parse_arguments, run_program
from smt_dist.distributed import agree, assert_same_on_all_ranks, get_rank
from smt_dist.errors import SMTError, first_line
from smt_dist.full_ft import save_moved_base
from smt_dist.loading import initialize_process_group, load_tokenizer_and_model
from smt_dist.model import touched_selection
from smt_dist.run import (
    PAGE_FILE,
    RunArguments,
    attach_blocks,
    check_writable,
    collect_and_select,
    draw,
    find_selection,
    keep_scores,
    known_scores,
    load_config,
    load_data,
)
from smt_dist.score_files import SCORES_FILE
from smt_dist.trainer import SMTTrainer, last_checkpoint

logger = logging.getLogger("smt_dist.train")  # under the name whose level the command line sets
MOVED_BASE = "moved_base"


def main() -> None:
    run, args = parse_arguments(RunArguments, __doc__)
    run.check()
    run.check_data()
    if args.do_eval and run.eval_file is None:  # --eval_strategy switches do_eval on
        raise SMTError("--eval_strategy (or --do_eval) needs --eval_file")
    initialize_process_group(args)
    set_seed(args.seed)
    agree(lambda: check_writable("--output_dir", Path(args.output_dir)), "the output folder")

    resume_from = agree(lambda: find_checkpoint(args.resume_from_checkpoint, args.output_dir), "the checkpoint")
    assert_same_on_all_ranks(str(resume_from).encode(), "the checkpoint to resume from (is --output_dir shared?)")
    selection, adapter = agree(lambda: find_selection(run, resume_from), "the selection")
    config = agree(lambda: load_config(run, selection, adapter, resume_from), "the SMT config")
    if resume_from is not None and config.warmup.mode == "full_ft":  # the checkpoint's blocks belong to that base
        run.model_name_or_path, run.gguf_file = str(Path(resume_from).parent / MOVED_BASE), None

    page = Path(args.output_dir) / PAGE_FILE
    tokenizer, model = load_tokenizer_and_model(run, args)
    data = load_data(run, tokenizer)
    if selection is None:
        selection, scores = collect_and_select(model, data, config, args)
        keep_scores(scores, page.with_name(SCORES_FILE))
        if config.warmup.mode == "full_ft":  # the blocks belong to the base as the warm-up left it
            save_moved_base(model, tokenizer, Path(args.output_dir) / MOVED_BASE)
    else:
        scores = agree(lambda: known_scores(run, page.parent, selection), "the scores")
    attach_blocks(model, selection, config, args, adapter, resume_from or f"--adapter {run.adapter}")
    draw(run, page, selection, scores)

    trainer = SMTTrainer(
        model,
        args,
        deltas=trained_deltas(adapter) if adapter is not None else None,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=resume_from)
    logger.info("%s", trainer.describe_optimizer())
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    if data.evaluation is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    draw(run, page, touched_selection(trainer.model), scores, trainer.state.log_history)
    if get_rank() == 0:
        print(f"adapter saved in {args.output_dir}", flush=True)


def find_checkpoint(flag: str | None, output_dir: str) -> str | None:
    """The folder that ``--resume_from_checkpoint`` means: a path, or ``auto`` / ``true`` for the newest."""
    if flag is None or flag.lower() in ("false", "none"):
        return None
    if flag.lower() not in ("auto", "true"):
        if not (Path(flag) / TRAINER_STATE_NAME).is_file():
            raise SMTError(f"--resume_from_checkpoint: {flag} is no checkpoint folder (it has no {TRAINER_STATE_NAME})")
        found = flag
    else:
        found = last_checkpoint(output_dir)
        if found is None and flag.lower() == "true":
            raise SMTError(f"--resume_from_checkpoint: {output_dir} holds no checkpoint")
    if found is not None:
        check_trainer_state(Path(found) / TRAINER_STATE_NAME)
    return found


def check_trainer_state(path: Path) -> None:
    """Raise SMTError where Trainer would end in a traceback."""
    try:
        state = TrainerState.load_from_json(str(path))
        assert state.global_step >= 0
    except (OSError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise SMTError(f"{path}: damaged ({first_line(error)})") from None


if __name__ == "__main__":
    run_program(main)
