"""From a model folder to a loaded model, and from options to an engine.

Kinds and engines are imported here, when asked for, so that a file of labels needs no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from relevance_ray.engines.base import Engine, FolderModel, ModelEngine
from relevance_ray.engines.generation import TextGenerator
from relevance_ray.engines.options import EngineOptions, GeneratorOptions, VllmOptions
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.models import resolve_model
from relevance_ray.schema import LabelScale
from relevance_ray.storage import is_remote, localize


def load_pair_model(
    folder: str | Path,
    device: str = "auto",
    num_threads: int | None = None,
    max_batch_tokens: int | None = None,
    *,
    compiled: bool = False,
    vllm: VllmOptions | None = None,
) -> FolderModel:
    """Load any model folder.

    Args:
        folder: written by training, or by `build_bi_encoder_folder` and its kin.
        device: a torch device, or "auto".
        num_threads: CPU threads of the model in this process; None or 0 leaves them.
        max_batch_tokens: padded tokens of one forward pass; None for what suits the device.
        compiled: run classifiers and cross-encoders through `torch.compile`.
        vllm: run classifiers and cross-encoders, an ensemble's too, through vLLM; `close` the model when done.

    Raises:
        UserError: no model folder, or what vLLM refuses.
    """
    share = 1 / max(1, _num_of(folder, *_SEQUENCE, "query_likelihood"))

    def open_sequence(path: str | Path) -> FolderModel:
        if vllm is not None:
            from relevance_ray.engines.vllm import VllmModel

            return VllmModel(path, device, num_threads or 0, max_batch_tokens, vllm.engine_args, share)
        from relevance_ray.engines.transformers import SequenceModel

        return SequenceModel(path, device, max_batch_tokens, num_threads=num_threads, compiled=compiled)

    def open_any(path: str | Path) -> FolderModel:
        kind = read_model_info(path).kind
        if kind == "bm25":
            from relevance_ray.engines.bm25 import BM25Model

            return BM25Model(path)
        if kind == "ensemble":
            from relevance_ray.engines.ensemble import EnsembleModel, member_folders

            return EnsembleModel(path, [open_any(member) for member in member_folders(path)])
        import torch

        if num_threads:
            torch.set_num_threads(num_threads)
        if kind == "bi_encoder":
            from relevance_ray.engines.bi_encoder import BiEncoderModel

            return BiEncoderModel(path, device, max_batch_tokens, num_threads=num_threads)
        if kind == "query_likelihood":
            from relevance_ray.engines.query_likelihood import QueryLikelihoodModel

            return QueryLikelihoodModel(path, device, max_batch_tokens)
        return open_sequence(path)

    return open_any(folder)


_SEQUENCE = ("classifier", "cross_encoder")


def _num_of(folder: str | Path, *kinds: str) -> int:
    """How many models of some kinds a model folder holds, itself or its members."""
    kind = read_model_info(folder).kind
    if kind == "ensemble":
        from relevance_ray.engines.ensemble import member_folders

        return sum(_num_of(path, *kinds) for path in member_folders(folder))
    return int(kind in kinds)


def _check_vllm_runs(folder: str | Path) -> None:
    if not _num_of(folder, *_SEQUENCE):
        raise UserError(
            f"the vllm engine runs classifiers and cross-encoders, and the teacher {folder} holds none; "
            "set label.engine=transformers"
        )


def check_engine(options: EngineOptions) -> None:
    """Refuse what this machine can tell of an engine before anything is spent. On a cluster that `RAY_ADDRESS` names, its
    libraries need be on the nodes that label alone.

    Raises:
        UserError: no client or key, no vLLM, or a `model` that is no model folder.
    """
    if options.engine == "openai":
        from relevance_ray.engines.openai import check_endpoint

        check_endpoint(options.openai)
    if options.engine == "vllm" and not os.environ.get("RAY_ADDRESS"):
        from relevance_ray.engines.vllm import import_vllm

        import_vllm()
    if options.model:
        folder = localize(options.model)
        read_model_info(folder)
        if options.engine == "vllm":
            _check_vllm_runs(folder)


def open_engine(
    options: EngineOptions, model: str | Path | None, scale: LabelScale, label_smoothing: float = 0.1
) -> Engine:
    """The engine that the options name.

    Args:
        model: the teacher's folder, local or s3://, for `transformers` and `vllm`.
        scale: the grades of `file` and `oracle`.
        label_smoothing: mass of a grade of `file` that leaks to its neighbours.

    Raises:
        UserError: no teacher where the engine needs one, or what the engine itself refuses.
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
        raise UserError(
            f"the {options.engine} engine needs a teacher; run train-teacher first or give its model folder"
        )
    model = localize(str(model))
    vllm = options.vllm if options.engine == "vllm" else None
    if vllm is not None:
        _check_vllm_runs(model)
    loaded = load_pair_model(
        model, options.device, options.num_threads, options.max_batch_tokens, compiled=options.compile, vllm=vllm
    )
    return ModelEngine(loaded)


def check_generator(options: GeneratorOptions, section: str) -> None:
    """Refuse what this machine can tell of a writing model before anything is spent. On a cluster that `RAY_ADDRESS`
    names, its libraries and weights need be on the nodes that write alone.

    Args:
        section: where the configuration has these options, such as "generate.llm".

    Raises:
        UserError: no client or key, no vLLM, no such model, or one that writes no text.
    """
    if options.engine == "openai":
        from relevance_ray.engines.openai import check_endpoint

        check_endpoint(options.openai, f"{section}.openai")
    elif not os.environ.get("RAY_ADDRESS"):
        if options.engine == "vllm":
            from relevance_ray.engines.vllm import import_vllm

            import_vllm()
        _writer_folder(options.model)


def open_generator(options: GeneratorOptions, section: str) -> TextGenerator:
    """The generator that the options name; `close` it when done.

    Args:
        section: as `check_generator` has it.

    Raises:
        UserError: what `check_generator` refuses, or the engine itself.
    """
    if options.engine == "openai":
        from relevance_ray.engines.openai import OpenAIGenerator

        return OpenAIGenerator(options.openai, f"{section}.openai")
    folder = _writer_folder(options.model)
    if options.engine == "vllm":
        from relevance_ray.engines.vllm import VllmGenerator

        return VllmGenerator(folder, options.device, options.num_threads, options.vllm.engine_args)
    from relevance_ray.engines.transformers_generation import TransformersGenerator

    return TransformersGenerator(folder, options.device, options.num_threads, options.max_batch_tokens)


def _writer_folder(model: str) -> Path:
    """The local folder of a causal language model."""
    from relevance_ray.engines.sequence import check_writes

    folder = resolve_model(str(localize(model)) if is_remote(model) else model)
    check_writes(model, folder)
    return folder
