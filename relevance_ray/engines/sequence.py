"""A folder to start training from: a sequence classifier of an encoder or a causal model, or an encoder as it is.

Each worker loads this folder instead of building a model of its own, so all start from the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from relevance_ray.errors import UserError
from relevance_ray.model_folder import INFO_FILE, ModelInfo, finish_folder, staged_folder
from relevance_ray.models import check_layers
from relevance_ray.storage import exists, join

_DROPOUT_KEYS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),  # BERT and its kin
    *("dropout", "attention_dropout", "seq_classif_dropout"),  # DistilBERT
    *("embedding_dropout", "mlp_dropout"),  # ModernBERT
)


def is_causal(source: str | Path) -> bool:
    """Whether a model is a causal language model, by the architecture its configuration names."""
    config = AutoConfig.from_pretrained(source)
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])


def check_writes(name: str, source: str | Path) -> None:
    """Raise `UserError` where a model is no causal language model: with a fresh head it would write noise."""
    if not is_causal(source):
        raise UserError(f"model {name} writes no text; give a causal language model, such as smollm2-135m")


def check_positions(name: str, source: str | Path, max_tokens: int) -> None:
    """Raise `UserError` where a model reads fewer tokens than asked for."""
    positions = getattr(AutoConfig.from_pretrained(source), "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise UserError(f"max_tokens is {max_tokens}, but model {name} reads {positions} at most; lower it")


def build_start_folder(
    source: str | Path,
    info: ModelInfo,
    out: str | Path,
    *,
    num_labels: int | None,
    num_layers: int | None,
    dropout: float,
    seed: int,
) -> None:
    """Write `out`, whole or not at all; nothing happens where it exists already.

    Args:
        source: folder or hub id of the pretrained model.
        info: what `relevance.json` will say.
        num_labels: outputs of the fresh head; None for no head.
        num_layers: keep the first layers only; None keeps all.
        dropout: of every kind the architecture has.
        seed: decides the fresh head's weights.

    Raises:
        UserError: fewer layers than asked for, or too few positions for the template's `max_tokens`.
    """
    if exists(join(str(out), INFO_FILE)):
        return
    config = AutoConfig.from_pretrained(source)
    check_layers(str(source), source, num_layers)
    check_positions(str(source), source, info.template.max_tokens)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if num_layers is not None:
        if num_layers > config.num_hidden_layers:  # some architectures have another name for it in their file
            raise UserError(
                f"num_layers is {num_layers}, but model {source} has {config.num_hidden_layers} layers; ask for fewer"
            )
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    if num_labels is not None:
        config.num_labels = num_labels
    config.pad_token_id = tokenizer.pad_token_id
    for key in _DROPOUT_KEYS:
        if isinstance(getattr(config, key, None), float | int):
            setattr(config, key, dropout)
    with torch.random.fork_rng(), _without_report():
        torch.manual_seed(seed)
        kind = AutoModel if num_labels is None else AutoModelForSequenceClassification
        model = kind.from_pretrained(source, config=config, dtype=torch.float32)
    with staged_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        finish_folder(partial, info)


@contextmanager
def _without_report() -> Iterator[None]:
    """Spare the user the warning that the head is fresh: here it is meant to be."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
