"""From a model folder to a loaded model, and from options to an engine.

Kinds and engines are imported here, when asked for, so that a file of labels needs no torch.
"""

from __future__ import annotations

from pathlib import Path

from relevance_ray.engines.base import Engine, FolderModel, ModelEngine
from relevance_ray.engines.options import EngineOptions
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.schema import LabelScale
from relevance_ray.storage import localize

DEFAULT_BATCH_TOKENS = 8192


def load_pair_model(
    folder: str | Path,
    device: str = "auto",
    num_threads: int | None = None,
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    *,
    compiled: bool = False,
) -> FolderModel:
    """Load any model folder.

    Args:
        folder: written by training, or by `build_bi_encoder_folder` and its kin.
        device: a torch device, or "auto".
        num_threads: CPU threads of torch in this process; None or 0 leaves them.
        max_batch_tokens: padded tokens of one forward pass.
        compiled: run cross-encoders and classifiers through `torch.compile`.

    Raises:
        UserError: no model folder.
    """
    kind = read_model_info(folder).kind
    if kind == "bm25":
        from relevance_ray.engines.bm25 import BM25Model

        return BM25Model(folder)
    if kind == "ensemble":
        from relevance_ray.engines.ensemble import EnsembleModel, member_folders

        members = [
            load_pair_model(path, device, num_threads, max_batch_tokens, compiled=compiled)
            for path in member_folders(folder)
        ]
        return EnsembleModel(folder, members)
    import torch

    if num_threads:
        torch.set_num_threads(num_threads)
    if kind == "bi_encoder":
        from relevance_ray.engines.bi_encoder import BiEncoderModel

        return BiEncoderModel(folder, device, max_batch_tokens)
    from relevance_ray.engines.transformers import SequenceModel

    return SequenceModel(folder, device, max_batch_tokens, compiled=compiled)


def open_engine(
    options: EngineOptions, model: str | Path | None, scale: LabelScale, label_smoothing: float = 0.1
) -> Engine:
    """The engine that the options name.

    Args:
        model: the teacher's folder, local or s3://, for `transformers`.
        scale: the grades of `file` and `oracle`.
        label_smoothing: mass of a grade of `file` that leaks to its neighbours.

    Raises:
        UserError: `transformers` without a teacher, or what the engine itself refuses.
    """
    if options.engine == "file":
        from relevance_ray.engines.file import FileEngine

        return FileEngine(options.path, scale, label_smoothing)
    if options.engine == "oracle":
        from relevance_ray.engines.oracle import OracleEngine

        return OracleEngine(scale, noise=options.noise)
    if options.engine == "openai":
        from relevance_ray.engines.grading import GradingEngine
        from relevance_ray.engines.openai import OpenAIGenerator

        endpoint = options.openai
        return GradingEngine(OpenAIGenerator(endpoint), scale, endpoint.fields, endpoint.guidelines)
    if model is None:
        raise UserError("the transformers engine needs a teacher; run train-teacher first or give its model folder")
    model = localize(str(model))
    return ModelEngine(
        load_pair_model(model, options.device, options.num_threads, options.max_batch_tokens, compiled=options.compile)
    )
