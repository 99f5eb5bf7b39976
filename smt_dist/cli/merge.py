"""Merge an SMT adapter into its base model, one weight at a time: the result is an ordinary model folder.

smt-merge --model_name_or_path M --adapter O --output_dir X [--dtype bfloat16]
python launch/merge_adapter.py ...      (the same program by its path in a checkout)
"""

from __future__ import annotations

import argparse

import torch

from smt_dist.checkpoint.merge_files import merge_adapter_files
from smt_dist.cli.program import HelpFormatter, raise_usage_error, run_program
from smt_dist.errors import SMTError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--model_name_or_path", required=True, help="the base: folder with safetensors, or hub name")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--output_dir", required=True, help="new model folder; must not exist, or be empty")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the result's weights (default: the base's)")
    parser.add_argument("--max_shard_gib", type=float, default=2.0, help="largest file of the result, GiB")
    parser.error = raise_usage_error
    args = parser.parse_args()
    if args.max_shard_gib <= 0:
        raise SMTError(f"--max_shard_gib: {args.max_shard_gib} is not above 0")
    report = merge_adapter_files(
        args.model_name_or_path,
        args.adapter,
        args.output_dir,
        dtype=DTYPES.get(args.dtype),
        max_shard_bytes=int(args.max_shard_gib * 1024**3),
        progress=True,
    )
    print(
        f"merged {report.parameters:,} parameters into {report.weights} weights in {args.output_dir}; rounding them "
        f"changed the blocks' update by {report.lost:.2%} of its norm"
    )


if __name__ == "__main__":
    run_program(main)
