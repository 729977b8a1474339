"""The teacher as a classifier: a language model, or an encoder, with a head of K grades or of one logit.

A causal model reads a prompt and its last token is classified; an encoder reads query and product as a text pair. LoRA
trains small adapters beside frozen weights, so a large model fits where its optimizer would not; they are merged into the
weights when it is saved, so that the folder stays a plain one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from relevance_ray.engines.sequence import build_start_folder, is_causal
from relevance_ray.model_folder import ModelInfo
from relevance_ray.models import resolve_model
from relevance_ray.schema import LabelScale
from relevance_ray.teacher.options import ClassifierOptions


def build_classifier(options: ClassifierOptions, scale: LabelScale, out: str | Path, seed: int) -> None:
    """Write the folder a classifier starts from: pretrained layers and a fresh head, decided by `seed`.

    Raises:
        UserError: the model does not resolve, or has fewer layers or positions than asked for.
    """
    source = resolve_model(options.model)
    info = ModelInfo(kind="classifier", scale=scale, template=options.template(causal=is_causal(source)))
    num_labels = 1 if options.num_classes == "single" else scale.num_classes
    build_start_folder(
        source, info, out, num_labels=num_labels, num_layers=options.num_layers, dropout=options.dropout, seed=seed
    )


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """Freeze a classifier and put LoRA adapters (Hu et al., arXiv 2106.09685) on its linear layers; the head stays trained.

    Args:
        model: a transformers sequence-classification model.
        rank: of the adapters; their scale is 2 (alpha = 2 rank).
        seed: decides the adapters' first weights, the same on every worker.
    """
    import peft  # takes a second, and few trainings need it

    head = next(name for name in ("score", "classifier") if hasattr(model, name))
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        modules_to_save=[head],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def merge_lora(model: nn.Module) -> nn.Module:
    """The plain model, with its adapters merged into the weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
