"""Prepare models for packing, so that packed examples don't attend to one another."""

from __future__ import annotations

from transformers import PreTrainedModel

from smt_dist.errors import SMTError

# Others (Falcon, BLOOM, OPT, MPT) ignore position_ids in the attention mask, so examples would attend to one another.
PACKING_ARCHITECTURES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt_neox", "olmo", "olmo2"}
)


def prepare_model_for_packing(model: PreTrainedModel, batch_size: int) -> None:
    """Check that ``model`` keeps packed examples apart, and switch its cache off.

    transformers derives the block-diagonal mask from ``position_ids`` only if no cache is filled, and its
    flash attention only if a batch is one row. Otherwise the examples silently attend to one another.
    ``Trainer`` switches the cache off as well, but a warm-up runs before there is a ``Trainer``.

    Args:
        model: its ``config.use_cache`` is set to False.
        batch_size: rows of a forward pass.

    Raises:
        SMTError: the architecture isn't known to keep packed examples apart, or it uses flash attention and
            ``batch_size`` is above 1.
    """
    if model.config.model_type not in PACKING_ARCHITECTURES:
        raise SMTError(
            f"--packing: {model.config.model_type} isn't known to keep packed examples apart; tested are "
            f"{', '.join(sorted(PACKING_ARCHITECTURES))}"
        )
    attention = model.config._attn_implementation or ""
    if "flash" in attention and batch_size > 1:
        raise SMTError(
            f"--packing with attention '{attention}' needs a per-device batch size of 1, not {batch_size}; "
            "raise max_seq_length instead, or use attention 'sdpa'"
        )
    model.config.use_cache = False
