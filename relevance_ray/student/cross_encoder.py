"""The interaction-based student: any encoder, query and product in one input, one logit out.

It is a plain sequence-classification model of `num_labels=1`, so everything that loads those loads it. A shallower student
keeps the first layers of its parent, which is where its attention has learnt words; the last ones have learnt its old task.
"""

from __future__ import annotations

from pathlib import Path

from relevance_ray.engines.sequence import build_sequence_folder
from relevance_ray.model_folder import ModelInfo
from relevance_ray.models import resolve_model
from relevance_ray.schema import LabelScale
from relevance_ray.student.options import CrossEncoderOptions


def build_cross_encoder(options: CrossEncoderOptions, scale: LabelScale, out: Path, seed: int) -> None:
    """Write the folder a student starts from: pretrained layers and a fresh head, decided by `seed`.

    Raises:
        UserError: the model does not resolve, is no encoder, or has fewer layers than asked for.
    """
    info = ModelInfo(kind="cross_encoder", scale=scale, template=options.template())
    source = resolve_model(options.model)
    build_sequence_folder(
        source, info, out, num_labels=1, num_layers=options.num_layers, dropout=options.dropout, seed=seed
    )
