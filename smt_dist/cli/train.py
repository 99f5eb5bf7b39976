"""Fine-tune a language model with Sparse Matrix Tuning.

smt-train --smt_config S.json --model_name_or_path M --train_file T.json --output_dir O
    [any transformers.TrainingArguments flag]
smt-train recipe.yaml [--flag value ...]      (a recipe holds flags, as `flag: value`; later ones win)
torchrun --nproc_per_node N -m smt_dist.cli.train --engine ddp --smt_config S.json ...
deepspeed --num_gpus N launch/train.py --smt_config S.json --deepspeed D.json ...
launch/train.py is the same program by its path in a checkout, for every launcher.
"""

from __future__ import annotations

import logging
import signal
from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from smt_dist.checkpoint.adapter import trained_deltas
from smt_dist.checkpoint.moved_base import save_moved_base
from smt_dist.checkpoint.rotation import find_checkpoint
from smt_dist.cli.pictures import PAGE_FILE, draw, keep_scores, known_scores
from smt_dist.cli.program import check_writable, parse_arguments, run_program
from smt_dist.config import SMTConfig
from smt_dist.data.batches import TrainingData
from smt_dist.distributed import agree, from_main_process, get_rank
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import enter_phase
from smt_dist.fault_tolerance.supervision import honour_collective_timeout, supervise
from smt_dist.memory.record.profiling import prepare_profiling, publish
from smt_dist.memory.record.recorder import Recorder
from smt_dist.memory.record.report import PAGE
from smt_dist.models.cpu_products import SinglePrecisionProducts
from smt_dist.selection.block_scores import SCORES_FILE, BlockScores
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.surgery import touched_selection
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.loading import load_tokenizer_and_model
from smt_dist.training.pipeline import attach_blocks, collect_and_select, find_selection, load_config, load_data
from smt_dist.training.run_arguments import RunArguments
from smt_dist.training.trainer import SMTTrainer

logger = logging.getLogger("smt_dist.train")  # under the name whose level the command line sets
MOVED_BASE = "moved_base"


def main() -> None:
    run, args = parse_arguments(RunArguments, __doc__)
    run.check()
    run.check_data()
    if args.do_eval and run.eval_file is None:  # --eval_strategy switches do_eval on
        raise SMTError("--eval_strategy (or --do_eval) needs --eval_file")
    with SinglePrecisionProducts() if args.cpu_fp32_products else nullcontext():
        tune(run, args)


def tune(run: RunArguments, args: SMTTrainingArguments) -> None:
    """The whole run: load, warm-up, selection, training, saving."""
    args.set_up_process_group()
    supervise(args.heartbeat_timeout)
    set_seed(args.seed)
    agree(lambda: check_writable("--output_dir", Path(args.output_dir)), "the output folder")

    if run.profile_memory is not None:
        agree(lambda: prepare_profiling(Path(run.profile_memory)), "the folder of the memory report")
    recorder = Recorder(args.device, run.profile_memory_steps, enabled=run.profile_memory is not None)

    resume_from = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    selection, adapter = agree(lambda: find_selection(run, resume_from), "the selection")
    config = agree(lambda: load_config(run, selection, adapter, resume_from), "the SMT config")
    if resume_from is not None and config.warmup.mode == "full_ft":
        moved = Path(resume_from).parent / MOVED_BASE
        # The checkpoint's blocks belong to that base; a run that continued an adapter was given it.
        if from_main_process(moved.is_dir, "the moved base"):
            run.model_name_or_path, run.gguf_file = str(moved), None

    enter_phase("load")
    with recorder.phase("load"):
        tokenizer, model = load_tokenizer_and_model(run, args)
        recorder.see_model(model)
    honour_collective_timeout(model, args.ddp_timeout)
    enter_phase("data")
    data = load_data(run, tokenizer)
    page = Path(args.output_dir) / PAGE_FILE
    if selection is None:
        selection, scores = warm_up(model, tokenizer, data, config, args, recorder)
    else:
        scores = agree(lambda: known_scores(run, page.parent, selection), "the scores")
    enter_phase("attaching the blocks")
    with recorder.phase("setup", model):  # training from the first step on
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
            callbacks=recorder.watch_training(model),
        )
        result = trainer.train(resume_from_checkpoint=resume_from)
    if trainer.preempted:
        report_preemption(trainer)
        return
    save_results(trainer, result.metrics, recorder)
    if run.profile_memory is not None:
        report = publish(recorder, Path(run.profile_memory), model, config, args)
        if report is not None:
            print(f"{report}\nmemory report: {Path(run.profile_memory) / PAGE}", flush=True)
    draw(run, page, touched_selection(trainer.model), scores, trainer.state.log_history)
    if get_rank() == 0:
        print(f"adapter saved in {args.output_dir}", flush=True)


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    config: SMTConfig,
    args: SMTTrainingArguments,
    recorder: Recorder,
) -> tuple[BlockSelection, BlockScores]:
    """Choose the blocks, and keep what they were chosen by."""
    enter_phase("warm-up")
    with recorder.phase("warmup", model):
        observe = recorder.observe_warmup(model, config.warmup.steps)
        selection, scores = collect_and_select(model, data, config, args, observe)
    keep_scores(scores, Path(args.output_dir) / SCORES_FILE)
    if config.warmup.mode == "full_ft":  # the blocks belong to the base as the warm-up left it
        save_moved_base(model, tokenizer, Path(args.output_dir) / MOVED_BASE)
    return selection, scores


def report_preemption(trainer: SMTTrainer) -> None:
    """Say what the signal left."""
    if get_rank() == 0:
        saved, name = trainer.saved_when_preempted(), signal.Signals(trainer.preempted).name
        print(f"ended by {name}: saved in {saved}; go on with --resume_from_checkpoint auto", flush=True)


def save_results(trainer: SMTTrainer, metrics: dict[str, float], recorder: Recorder) -> None:
    """The adapter and the metrics; those of the evaluation rows, if there are any, are worked out first."""
    logger.info("%s", trainer.describe_optimizer())
    with recorder.phase("save", trainer.model):
        trainer.save_model()
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    run_program(main)
