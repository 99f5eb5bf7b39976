"""Score a model, with or without an SMT adapter, on questions that have one exact answer.

smt-evaluate --model_name_or_path M [--adapter O] --eval_file E.json --output results.json
python launch/evaluate_model.py ...      (the same program by its path in a checkout)
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from smt_dist.cli.program import configure_logging, positive_int, raise_usage_error, run_program
from smt_dist.errors import SMTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smt_dist.evaluation import EvaluationItem, EvaluationResult


_CHOICES = {"auto": None, "true": True, "false": False}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; argparse itself exits with 2 on a bad flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder or hub name of the base model")
    add("--adapter", help="folder of an SMT adapter, applied to the base model (default: none)")
    add("--eval_file", required=True, help="JSON or JSONL rows: instruction, answer and perhaps input")
    add("--output", required=True, help="JSON file to write: scores and every prediction")
    add("--gguf_file", help="GGUF file, by its path or its name inside model_name_or_path (default: none)")
    styles = ["plain", "chat", "best"]
    add("--prompt_style", choices=styles, default="plain", help="best tries both (default: %(default)s)")
    add_count = partial(add, type=positive_int, metavar="N")
    add_count("--batch_size", default=32, help="prompts generated together (default: %(default)s)")
    add_count("--max_new_tokens", default=64, help="tokens of an answer at most (default: %(default)s)")
    add_count("--max_items", help="rows to use, from the first on (default: all)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    dtype_help = "of the weights; auto is the checkpoint's own, bfloat16 for GGUF (default: %(default)s)"
    add("--dtype", choices=dtypes, default="auto", help=dtype_help)
    devices = ["auto", "cpu", "cuda"]
    add("--device", choices=devices, default="auto", help="auto is cuda where there is one (default: %(default)s)")
    products_help = "multiply bf16 matrices in fp32; auto: on a CPU without bf16 instructions (default: %(default)s)"
    add("--cpu_fp32_products", choices=list(_CHOICES), default="auto", help=products_help)
    parser.error = raise_usage_error
    return parser.parse_args()


def main() -> None:
    """Read the questions, answer them, write the scores."""
    arguments = parse_arguments()
    configure_logging()
    if arguments.adapter and arguments.dtype == "float16":
        # Rounded to fp16, a bf16 or fp32 base can no longer be told from another one.
        raise SMTError("--dtype float16 with --adapter: merge first (smt-merge --dtype float16)")
    # Imported late: `--help` and bad flags should answer at once.
    from smt_dist.data.rows import read_rows
    from smt_dist.evaluation import make_items
    from smt_dist.files import replace_file
    from smt_dist.models.cpu_products import fp32_products

    items = make_items(read_rows(arguments.eval_file), arguments.max_items)
    output = _prepare_output(Path(arguments.output))
    model, tokenizer = _load_model(arguments)
    with fp32_products(_CHOICES[arguments.cpu_fp32_products], model.device.type, model.dtype):
        results = [
            _evaluate_style(style, model, tokenizer, items, arguments)
            for style in _choose_styles(arguments.prompt_style, tokenizer)
        ]
    best = max(results, key=lambda result: result.correct)
    content = {
        "arguments": vars(arguments),
        "prompt_style": best.prompt_style,
        "accuracy": best.accuracy,
        "n": best.n,
        "correct": best.correct,
        "unparsed": best.unparsed,
        "results": [result.to_dict() for result in results],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    replace_file(output, lambda path: path.write_text(text, encoding="utf-8"))
    others = "".join(f"; {r.prompt_style}: {r.accuracy:.4f}" for r in results if r is not best)
    print(
        f"{arguments.eval_file}: accuracy {best.accuracy:.4f} ({best.correct} of {best.n}, {best.unparsed} "
        f"unparsed, prompt style {best.prompt_style}{others}) -> {output}"
    )


def _choose_styles(prompt_style: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if prompt_style != "best":
        return [prompt_style]
    # A base model has no chat template: there, plain is the best there is.
    return ["plain", "chat"] if tokenizer.chat_template else ["plain"]


def _evaluate_style(
    prompt_style: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[EvaluationItem],
    arguments: argparse.Namespace,
) -> EvaluationResult:
    from smt_dist.evaluation import evaluate

    return evaluate(
        model,
        tokenizer,
        items,
        prompt_style=prompt_style,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        show_progress=True,
    )


def _load_model(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from smt_dist.models.folder import check_model_folder, load_causal_lm, load_tokenizer

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SMTError("--device cuda: torch sees no CUDA device")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = arguments.model_name_or_path
    if arguments.gguf_file:
        from smt_dist.models.gguf import dequantize_gguf, find_gguf_file

        dtype = torch.bfloat16 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        source = dequantize_gguf(find_gguf_file(source, arguments.gguf_file), dtype=dtype)
    check_model_folder(str(source))
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, arguments.dtype)
    if arguments.adapter:
        from smt_dist.checkpoint.adapter import load_adapter

        load_adapter(model, arguments.adapter)
    return model.to(device), tokenizer


def _prepare_output(path: Path) -> Path:
    """Fail before the model is loaded, not after an hour of generation."""
    if path.is_dir():
        raise SMTError(f"--output {path}: is a folder, expected a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SMTError(f"--output {path}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise SMTError(f"--output {path}: its folder isn't writable")
    return path


if __name__ == "__main__":
    run_program(main)
