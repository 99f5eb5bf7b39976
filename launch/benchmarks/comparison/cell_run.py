"""``python -m comparison.cell_run REQUEST FIGURES``: one cell, in a process of its own.

A ``train`` cell trains, finds the validation loss and saves what it trained. A ``test`` cell merges that into the base,
and tests the plain model that users would deploy.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from comparison.methods import PEFT_FAMILIES, Method, parse_method
from comparison.training import base_dtype, prepare
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from smt_dist import load_adapter, merge_blocks
from smt_dist.cli.program import configure_logging, run_program
from smt_dist.data.dataset import IGNORED, CausalLMCollator, build_dataset, get_pad_token_id
from smt_dist.data.rows import read_rows
from smt_dist.errors import SMTError
from smt_dist.evaluation import EvaluationResult, evaluate, make_items
from smt_dist.files import parse_json_object, read_text, replace_file
from smt_dist.memory.record.resident import own_bytes
from smt_dist.models.folder import check_model_folder, load_causal_lm, load_tokenizer
from smt_dist.training.arguments import DTYPES

Figures = dict[str, Any]


def main() -> None:
    """Read the request, run the cell, write its figures."""
    source, target = map(Path, sys.argv[1:])
    configure_logging()
    content = parse_json_object(read_text(source), str(source))
    run = {"train": train, "test": test}[content["kind"]]
    text = json.dumps(run(content["request"], content["paths"]))
    replace_file(target, lambda path: path.write_text(text))


def train(request: Figures, paths: dict[str, str]) -> Figures:
    """Train, find the validation loss, save. Nothing here knows where the test set is.

    Returns:
        ``validation_loss``: mean over the answers' tokens, None where training diverged; ``step_seconds``: median;
        ``peak_bytes``: of this process's resident memory by the end of the training, ``start_bytes`` before it;
        ``artefact_bytes``; ``batches``: digest of the token ids, in order; ``trainable``; ``selection_seconds``.
    """
    method = parse_method(request["method"])
    set_seed(request["seed"])
    tokenizer, model = _load(paths["model"], base_dtype(method, request["dtype"]))
    data, validation = (_dataset(paths[split], tokenizer, request) for split in ("train", "validation"))
    artefact = Path(paths["artefact"])
    shutil.rmtree(artefact, ignore_errors=True)  # of a run that was interrupted
    artefact.mkdir(parents=True)
    figures: Figures = {
        "trainable": 0, "step_seconds": None, "selection_seconds": 0.0, "start_bytes": own_bytes("VmRSS"),
        "peak_bytes": None, "artefact_bytes": 0, "batches": None, "validation_loss": None,
    }  # fmt: skip
    if method.family == "base":
        figures["validation_loss"] = token_loss(model, validation, tokenizer, request["eval_batch_size"])
        return figures
    with tempfile.TemporaryDirectory() as scratch:
        trained, collator, timer = prepare(
            method, {**request, "scratch": scratch}, model, data, get_pad_token_id(tokenizer)
        )
        figures |= {"trainable": trained.trainable, "selection_seconds": trained.selection_seconds}
        set_seed(request["seed"])
        try:
            trained.trainer.train()
        except SMTError:  # SMT stops at NaN; the other methods' trainer goes on with it, and the loss will say so
            if not trained.met_non_finite_values:
                raise
        figures |= {"step_seconds": timer.median() if timer.seconds else None, "peak_bytes": own_bytes("VmHWM")}
    if not trained.met_non_finite_values:
        loss = token_loss(trained.trainer.model, validation, tokenizer, request["eval_batch_size"])
        figures |= {"validation_loss": loss if math.isfinite(loss) else None, "batches": collator.digest}
    if figures["validation_loss"] is not None:
        trained.save(artefact)
    figures["artefact_bytes"] = sum(path.stat().st_size for path in artefact.rglob("*") if path.is_file())
    return figures


def test(request: Figures, paths: dict[str, str]) -> Figures:
    """Test what a ``train`` cell has saved.

    Returns:
        ``test_loss``: as the validation loss; ``accuracy``: share of exact answers of ``items`` questions;
        ``unparsed``: answers without any number; ``by_task``: accuracy of the rows of each ``task``, if they name one.
    """
    method = parse_method(request["method"])
    tokenizer, model = restore(method, paths["model"], Path(paths["artefact"]), DTYPES[request["dtype"]])
    held_out = _dataset(paths["held_out"], tokenizer, request)
    items = make_items(read_rows(paths["test"]), request["test_items"])
    loss = token_loss(model, held_out, tokenizer, request["eval_batch_size"])
    result = evaluate(
        model,
        tokenizer,
        items,
        prompt_style=request["prompt_style"],
        batch_size=request["eval_batch_size"],
        max_new_tokens=request["max_new_tokens"],
        show_progress=True,
    )
    return {
        "test_loss": loss,
        "accuracy": result.accuracy,
        "items": result.n,
        "unparsed": result.unparsed,
        "by_task": _by_task(result, [item.row.get("task") for item in items]),
    }


def restore(
    method: Method, source: str, artefact: Path, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The plain model of what a method has saved: adapters and blocks are merged."""
    if method.family == "full":
        return load_tokenizer(source), load_causal_lm(str(artefact), dtype)
    tokenizer, model = _load(source, dtype)
    if method.family == "smt":
        load_adapter(model, str(artefact))
        merge_blocks(model)
    elif method.family in PEFT_FAMILIES:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, artefact).merge_and_unload()
    return tokenizer, model


def token_loss(
    model: torch.nn.Module, data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> float:
    """Mean cross entropy over all labels of ``data``; every token counts the same, in whichever batch it is."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in DataLoader(data, batch_size, collate_fn=CausalLMCollator(get_pad_token_id(tokenizer))):
            labels = batch.pop("labels")[:, 1:].to(device)
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits[:, :-1]
            chosen = labels != IGNORED
            total += cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum").item()
            count += int(chosen.sum())
    model.train(was_training)
    return total / count


def _load(source: str, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    check_model_folder(source)
    model = load_causal_lm(source, dtype)
    return load_tokenizer(source), model.to("cuda") if torch.cuda.is_available() else model


def _dataset(path: str, tokenizer: PreTrainedTokenizerBase, request: Figures) -> datasets.Dataset:
    rows = read_rows(path)
    length, style = request["max_seq_length"], request["prompt_style"]
    return build_dataset(rows, tokenizer, max_seq_length=length, prompt_style=style)[0]


def _by_task(result: EvaluationResult, tasks: list[str | None]) -> dict[str, float]:
    answers: dict[str, list[bool]] = {}
    for task, prediction in zip(tasks, result.predictions, strict=True):
        if task is not None:
            answers.setdefault(task, []).append(prediction.correct)
    return {task: sum(found) / len(found) for task, found in answers.items()}


if __name__ == "__main__":
    run_program(main)
