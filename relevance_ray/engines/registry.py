"""From options to an engine. Engines are imported here, when asked for, so that a file of labels needs no torch."""

from __future__ import annotations

from pathlib import Path

from relevance_ray.engines.base import Engine, EngineOptions
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale


def open_engine(options: EngineOptions, model: str | Path | None, scale: LabelScale) -> Engine:
    """The engine that the options name.

    Args:
        model: the teacher's folder, for `transformers`.
        scale: the grades of `file` and `oracle`.

    Raises:
        UserError: `transformers` without a teacher, or what the engine itself refuses.
    """
    if options.engine == "file":
        from relevance_ray.engines.file import FileEngine

        return FileEngine(options.path, scale)
    if options.engine == "oracle":
        from relevance_ray.engines.oracle import OracleEngine

        return OracleEngine(scale, noise=options.noise)
    from relevance_ray.engines.transformers import TransformersEngine

    if model is None:
        raise UserError("the transformers engine needs a teacher; run train-teacher first or give its model folder")
    return TransformersEngine(model, options.max_batch_tokens, options.device, options.num_threads or None)
