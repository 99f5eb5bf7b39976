"""Tiny random causal language models of many architectures, and batches for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

VOCAB = 64
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}

# Name -> config, the modules of each layer that "attention" means, and those that "mlp" means.
SEPARATE = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
ARCHITECTURES: dict[str, tuple[Callable[[], tf.PreTrainedConfig], tuple[str, ...], tuple[str, ...]]] = {
    "llama": (lambda: tf.LlamaConfig(**LLAMA_LIKE), SEPARATE, GATED),
    "mistral": (lambda: tf.MistralConfig(**LLAMA_LIKE, sliding_window=8), SEPARATE, GATED),
    "qwen2": (lambda: tf.Qwen2Config(**LLAMA_LIKE), SEPARATE, GATED),
    "qwen3": (lambda: tf.Qwen3Config(**LLAMA_LIKE, head_dim=8), SEPARATE, GATED),
    "gemma": (lambda: tf.GemmaConfig(**LLAMA_LIKE, head_dim=8), SEPARATE, GATED),
    "phi3": (lambda: tf.Phi3Config(**LLAMA_LIKE, pad_token_id=0), ("qkv_proj",), ("gate_up_proj", "down_proj")),
    "gpt_neox": (
        lambda: tf.GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=64),
        ("query_key_value",),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "olmo": (lambda: tf.OlmoConfig(**LLAMA_LIKE), SEPARATE, GATED),
    "olmo2": (lambda: tf.Olmo2Config(**LLAMA_LIKE), SEPARATE, GATED),
    "falcon": (
        lambda: tf.FalconConfig(**SMALL, new_decoder_architecture=False),
        ("query_key_value",),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "bloom": (
        lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        ("query_key_value",),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": (
        lambda: tf.OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32),
        SEPARATE,
        ("fc1", "fc2"),
    ),
}


def make_model(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model in eval mode; ``changes`` are set on its config."""
    config = ARCHITECTURES[architecture][0]()
    return build(config, seed, dtype, **changes)


def build(config: tf.PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of ``config``, without dropout and in eval mode."""
    for name in ("attention_dropout", "hidden_dropout", "attention_probs_dropout_prob", "resid_pdrop", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Biases start at zero, which would hide one that is dropped.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_batches(count: int = 2, seed: int = 0, rows: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Batches whose labels mask prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
        labels = ids.clone()
        for row in range(rows):
            labels[row, : 2 + (row + index) % 4] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def logits_of(model, batch=None) -> torch.Tensor:
    """The model's logits, without a graph."""
    batch = batch or make_batches(1)[0]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
