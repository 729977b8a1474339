"""A model folder's forward pass as a graph (ONNX) that other libraries run, in float32 and quantized to int8.

A graph takes the batches that `engines.forward` describes, any number of rows and tokens, and gives what the torch model
gives. How near an int8 graph comes is for `evaluation.runtimes` to measure.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from relevance_ray.engines.forward import Batch, mean_pooled
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info

MAX_BYTES = 2_000_000_000
"""Of the weights: a graph is one file, and its format ends there."""
_EXPORTED = ("cross_encoder", "classifier", "bi_encoder")


def check_libraries() -> None:
    """Raise `UserError` where the libraries that make graphs are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'relevance-ray[runtimes]'") from error


def check_exportable(folder: str | Path) -> None:
    """Raise `UserError` for a model that has no graph."""
    if (kind := read_model_info(folder).kind) not in _EXPORTED:
        raise UserError(f"{folder} is a {kind}, which only runs as it is; export a student")
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if size > MAX_BYTES:
        raise UserError(f"{folder} has {size / 1e9:.1f} GB of weights, and 2 GB can be exported; export a student")


def export_float32(folder: str | Path, out: Path) -> None:
    """Write the float32 graph of a model folder: logits of a sequence classifier, unit vectors of a two-tower."""
    pooled = read_model_info(folder).kind == "bi_encoder"
    kind = AutoModel if pooled else AutoModelForSequenceClassification
    # Eager attention: plain products and a softmax, which other libraries fuse better than torch's own operator.
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    known = ("input_ids", "attention_mask", "token_type_ids")
    names = [name for name in known if name != "token_type_ids" or name in tokenizer.model_input_names]
    ids = torch.full((3, 7), int(tokenizer.pad_token_id or 0), dtype=torch.int64)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    axes = {0: torch.export.Dim("rows", min=1, max=1 << 20), 1: torch.export.Dim("tokens", min=1, max=1 << 16)}
    with _quiet():
        torch.onnx.export(
            _Outputs(model, names, pooled),
            tuple(example[name] for name in names),
            str(out),
            input_names=names,
            output_names=["outputs"],
            dynamic_shapes=(tuple(axes for _ in names),),
            external_data=False,
            dynamo=True,
            verbose=False,
        )


class _Outputs(torch.nn.Module):
    """A transformers model by position, to its logits or vectors."""

    def __init__(self, model: Any, names: Sequence[str], pooled: bool) -> None:
        super().__init__()
        self.model, self.names, self.pooled = model, list(names), pooled

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        found = self.model(**given)
        return mean_pooled(found.last_hidden_state, given["attention_mask"]) if self.pooled else found.logits


def quantize_weights(source: Path, out: Path, _batches: Sequence[Batch]) -> None:
    """Weights of linear layers in int8, symmetric, a scale for each output channel; activations stay float32.

    A runtime that multiplies int8 quantizes the activations itself, row by row (Dettmers et al., "LLM.int8()", NeurIPS
    2022, section 2: vector-wise quantization).
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(source))
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    nodes, done = [], set()
    for node in graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if name in done:  # layers that share their weights
            node.input[1] = f"{name}.float"
        elif name in weights and len(weights[name].dims) == 2:
            weight = numpy_helper.to_array(weights.pop(name))
            scale = np.maximum(np.abs(weight).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
            values = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
            parts = {"int8": values, "scale": scale, "zero": np.zeros(len(scale), np.int8)}
            graph.initializer.extend(numpy_helper.from_array(each, f"{name}.{part}") for part, each in parts.items())
            graph.initializer.remove(next(each for each in graph.initializer if each.name == name))
            inputs = [f"{name}.{part}" for part in parts]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.float"], axis=1))
            node.input[1] = f"{name}.float"
            done.add(name)
        nodes.append(node)
    assert len(nodes) > len(graph.node), "no linear layer was found"
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(out))


def quantize_dynamic(source: Path, out: Path, _batches: Sequence[Batch], *, per_channel: bool = False) -> None:
    """Weights and activations in int8; the activations' scale is found anew in each batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(str(source), str(out), per_channel=per_channel, weight_type=QuantType.QInt8)


def quantize_dynamic_channel(source: Path, out: Path, batches: Sequence[Batch]) -> None:
    """The same, with a scale of the weights for each output channel."""
    quantize_dynamic(source, out, batches, per_channel=True)


def quantize_static(source: Path, out: Path, batches: Sequence[Batch]) -> None:
    """Weights (by output channel) and activations in int8; the activations' scales are found once, on `batches`."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Given(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else dict(batch)

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        ready = f"{scratch}/ready.onnx"
        quant_pre_process(str(source), ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            str(out),
            Given(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


GRAPHS: dict[str, Callable[[Path, Path, Sequence[Batch]], None]] = {
    "weights": quantize_weights,
    "dynamic": quantize_dynamic,
    "dynamic_channel": quantize_dynamic_channel,
    "static": quantize_static,
}
"""The quantized graphs by name, each made of the float32 graph and of batches of real pairs."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Spare the user what exporters tell of their own passes; what they raise is still raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal", "onnxscript", "onnx_ir", "")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
