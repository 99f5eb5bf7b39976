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
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from smt_dist.checkpoint.adapter import trained_deltas
from smt_dist.checkpoint.moved_base import MOVED_BASE, save_moved_base
from smt_dist.cli.program import check_writable, parse_arguments, run_program
from smt_dist.cli.selection_report import PAGE_FILE, keep_scores, known_scores, report_selection
from smt_dist.data.batches import TrainingData
from smt_dist.distributed import get_rank, raise_on_any_rank
from smt_dist.engines import make_engine
from smt_dist.engines.base import Engine
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import begin_activity
from smt_dist.fault_tolerance.supervision import honour_collective_timeout, supervise
from smt_dist.memory.record.profiling import prepare_profiling, publish
from smt_dist.memory.record.recorder import Recorder
from smt_dist.memory.record.report import PAGE
from smt_dist.models.cpu_products import fp32_products
from smt_dist.selection.block_scores import SCORES_FILE, BlockScores
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.surgery import ever_trained_selection
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.loading import load_tokenizer_and_model
from smt_dist.training.pipeline import attach_blocks, collect_and_select, load_data
from smt_dist.training.rounds import trainer_class
from smt_dist.training.run_arguments import RunArguments
from smt_dist.training.run_plan import RunPlan
from smt_dist.training.trainer import SMTTrainer

logger = logging.getLogger("smt_dist.train")  # under the name whose level the command line sets


@dataclass
class Job:
    """Hold what the steps of a run share."""

    plan: RunPlan
    args: SMTTrainingArguments
    engine: Engine
    recorder: Recorder
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    data: TrainingData

    @property
    def page(self) -> Path:
        """Return the path of the selection's report."""
        return Path(self.args.output_dir) / PAGE_FILE


def main() -> None:
    run, args = parse_arguments(RunArguments, __doc__)
    run.check()
    run.check_data()
    if args.do_eval and run.eval_file is None:  # --eval_strategy switches do_eval on
        raise SMTError("--eval_strategy (or --do_eval) needs --eval_file")
    with fp32_products(args.cpu_fp32_products, "cpu" if args.use_cpu else "cuda", args.base_dtype):
        tune(run, args)


def tune(run: RunArguments, args: SMTTrainingArguments) -> None:
    """Run the whole job: load, warm-up, selection, training, saving."""
    args.set_up_process_group()
    supervise(args.heartbeat_timeout)
    set_seed(args.seed)
    raise_on_any_rank(lambda: check_writable("--output_dir", Path(args.output_dir)), "the output folder")
    if run.profile_memory is not None:
        raise_on_any_rank(lambda: prepare_profiling(Path(run.profile_memory)), "the folder of the memory report")
    plan = RunPlan.resolve(run, args.output_dir, args.resume_from_checkpoint)
    args.refuse_form(plan.config.form)
    job = load(plan, args)
    selection, scores = choose(job)
    trainer, metrics = train(job, selection, scores)
    if trainer.preempted:
        report_preemption(trainer)
        return
    save_results(trainer, metrics, job.recorder)
    if run.profile_memory is not None:
        report = publish(job.recorder, Path(run.profile_memory), job.model, job.plan.config, args)
        if report is not None:
            print(f"{report}\nmemory report: {Path(run.profile_memory) / PAGE}", flush=True)
    report_selection(job.plan.run, job.page, ever_trained_selection(trainer.model), scores, trainer.state.log_history)
    if get_rank() == 0:
        print(f"adapter saved in {args.output_dir}", flush=True)


def load(plan: RunPlan, args: SMTTrainingArguments) -> Job:
    """Read model and data; collective."""
    run, engine = plan.run, make_engine(args.engine_options)
    recorder = Recorder(args.device, run.profile_memory_steps, enabled=run.profile_memory is not None)
    begin_activity("load")
    with recorder.phase("load"):
        tokenizer, model = load_tokenizer_and_model(run, args, engine)
        recorder.see_model(model)
    honour_collective_timeout(model, args.ddp_timeout)
    begin_activity("data")
    return Job(plan, args, engine, recorder, tokenizer, model, load_data(run, tokenizer))


def choose(job: Job) -> tuple[BlockSelection, BlockScores | None]:
    """Return the earlier selection with its scores, or run the warm-up."""
    plan, args, model, recorder = job.plan, job.args, job.model, job.recorder
    folder = Path(args.output_dir)
    if plan.selection is not None:
        return plan.selection, raise_on_any_rank(lambda: known_scores(plan.run, folder, plan.selection), "the scores")
    begin_activity("warm-up")
    with recorder.phase("warmup", model):
        observe = recorder.observe_warmup(model, plan.config.warmup.steps)
        selection, scores = collect_and_select(model, job.data, plan.config, args, job.engine, observe)
    keep_scores(scores, folder / SCORES_FILE)
    if plan.config.warmup.mode == "full_ft":  # the blocks belong to the base as the warm-up left it
        save_moved_base(model, job.tokenizer, folder / MOVED_BASE)
    return selection, scores


def train(job: Job, selection: BlockSelection, scores: BlockScores | None) -> tuple[SMTTrainer, dict[str, float]]:
    """Put the blocks into the model and train them; the trainer and its metrics."""
    plan, args, model, data = job.plan, job.args, job.model, job.data
    begin_activity("attaching the blocks")
    with job.recorder.phase("setup", model):  # training from the first step on
        attach_blocks(model, selection, plan.config, args, plan.adapter, plan.adapter_source)
        report_selection(plan.run, job.page, selection, scores)
        trainer = trainer_class(model)(
            model,
            args,
            deltas=trained_deltas(plan.adapter) if plan.adapter is not None else None,
            engine=job.engine,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=data.collator,
            processing_class=job.tokenizer,
            callbacks=job.recorder.watch_training(model),
        )
        return trainer, trainer.train(plan.checkpoint).metrics


def report_preemption(trainer: SMTTrainer) -> None:
    """Describe what the signal left."""
    if get_rank() == 0:
        saved, name = trainer.saved_when_preempted(), signal.Signals(trainer.preempted).name
        print(f"ended by {name}: saved in {saved}; go on with --resume_from_checkpoint auto", flush=True)


def save_results(trainer: SMTTrainer, metrics: dict[str, float], recorder: Recorder) -> None:
    """Save the adapter and the metrics.

    Evaluation rows, if there are any, are evaluated first.
    """
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
