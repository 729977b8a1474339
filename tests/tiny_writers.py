"""Small causal language models of random weights, which write nonsense, each its own, and fast."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from relevance_ray.models import resolve_model


def writer_folder(out: Path, *, window: int | None = None, max_tokens: int = 512) -> Path:
    """Two layers with the tokenizer and chat template of smollm2-135m.

    Args:
        window: attention reaches so many tokens back; None: all.
        max_tokens: positions that it has.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_tokens,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        # So large that attention matters and tokens are far apart.
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if window is None:
            model = LlamaForCausalLM(LlamaConfig(**shape))
        else:
            model = MistralForCausalLM(MistralConfig(sliding_window=window, **shape))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
