"""Merge an SMT adapter into its base model, one weight at a time.

The result is an ordinary model folder.

smt-merge --model_name_or_path M --adapter O --output_dir X [--dtype bfloat16]
python launch/merge_adapter.py ...      (the same program by its path in a checkout)
"""

from __future__ import annotations

import argparse

from smt_dist.cli.program import HelpFormatter, raise_usage_error, run_program
from smt_dist.errors import SMTError

DTYPES = ("bfloat16", "float16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--model_name_or_path", required=True, help="the base: folder with safetensors, or hub name")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--output_dir", required=True, help="new model folder; must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the result's weights (default: the base's)")
    parser.add_argument("--max_shard_gib", type=float, default=2.0, help="largest file of the result, GiB")
    parser.error = raise_usage_error
    args = parser.parse_args()
    if args.max_shard_gib <= 0:
        raise SMTError(f"--max_shard_gib: {args.max_shard_gib} is not above 0")
    # Imported late: `--help` and bad flags should answer at once.
    import torch

    from smt_dist.checkpoint.merge_files import merge_adapter_files

    report = merge_adapter_files(
        args.model_name_or_path,
        args.adapter,
        args.output_dir,
        dtype=getattr(torch, args.dtype) if args.dtype is not None else None,
        max_shard_bytes=int(args.max_shard_gib * 1024**3),
        progress=True,
    )
    print(
        f"merged {report.parameters:,} parameters into {report.weights} weights in {args.output_dir}; rounding them "
        f"changed the blocks' update by {report.lost:.2%} of its norm"
    )


if __name__ == "__main__":
    run_program(main)
