"""Which library computes a model folder's forward pass: torch, or one that the folder was exported for.

`relevance-ray export` puts a graph (ONNX) and a `runtime.json` that names it beside the weights. On a CPU the folder is run
as that file says from then on; on a GPU, and for everything that reads plain `save_pretrained` folders, the weights are
still there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from relevance_ray.engines.forward import Batch, Forward, TorchForward, pick_dtype
from relevance_ray.errors import UserError

RUNTIME_FILE = "runtime.json"
FORMAT = 1
TORCH = "torch"
ACTIVATION_GROUP = 128
"""Neighbouring activations that share a scale where a runtime quantizes them as it runs, each row for itself."""


@dataclass(frozen=True)
class Runtime:
    """A way to compute a forward pass.

    Attributes:
        name: as `--runtime` has it.
        library: Python module that runs it.
        graph: which of the exported graphs it runs (`student.export.GRAPHS`).
    """

    name: str
    library: str
    graph: str


RUNTIMES = {
    each.name: each
    for each in (
        Runtime(TORCH, "torch", ""),
        Runtime("onnx", "onnxruntime", "float32"),
        Runtime("onnx-int8-dynamic", "onnxruntime", "dynamic"),
        Runtime("onnx-int8-dynamic-channel", "onnxruntime", "dynamic_channel"),
        Runtime("onnx-int8-static", "onnxruntime", "static"),
        Runtime("openvino", "openvino", "float32"),
        Runtime("openvino-int8", "openvino", "weights"),
        Runtime("openvino-int8-static", "openvino", "static"),
    )
}


def open_forward(
    folder: str | Path,
    device: torch.device,
    *,
    pooled: bool,
    pad_token_id: int | None = None,
    num_threads: int | None = None,
    compiled: bool = False,
) -> Forward:
    """Load a folder's weights, or on a CPU the graph it was exported to.

    Args:
        pooled: unit vectors of an encoder; else the logits of a sequence classifier.
        pad_token_id: told to a causal classifier without one, which finds its last token by looking for padding.
        num_threads: CPU threads of a runtime other than torch; None for as many as torch has.
        compiled: run torch through `torch.compile`.

    Raises:
        UserError: `runtime.json` is not understood, or its library is not installed.
    """
    if device.type == "cpu" and (found := read_runtime(folder)) is not None:
        name, file = found
        return open_graph(name, Path(folder) / file, num_threads)
    kind = AutoModel if pooled else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=pick_dtype(device))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return TorchForward(model.to(device).eval(), pooled=pooled, compiled=compiled)


def read_runtime(folder: str | Path) -> tuple[str, str] | None:
    """Name of the runtime of an exported folder, and its graph's file within; None for a folder that torch runs.

    Raises:
        UserError: the file is not understood.
    """
    path = Path(folder) / RUNTIME_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        name, file = found["runtime"], found["file"]
        if found["format"] != FORMAT or name not in RUNTIMES:
            raise ValueError(f"format {found['format']!r}, runtime {name!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a file of this version ({error}); export the model again, or remove that file to run it in torch"
        ) from error
    return None if name == TORCH else (name, file)


def write_runtime(folder: str | Path, name: str, file: str, measured: Mapping[str, Any]) -> None:
    """Name the runtime of a folder, and keep what was measured of it."""
    value = {"format": FORMAT, "runtime": name, "file": file, "measured": dict(measured)}
    (Path(folder) / RUNTIME_FILE).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def open_graph(name: str, path: Path, num_threads: int | None = None) -> Forward:
    """A runtime over an exported graph.

    Raises:
        UserError: its library is not installed, or the graph is not there.
    """
    runtime = RUNTIMES[name]
    if not path.is_file():
        raise UserError(f"{path} is not there; export the model again, or remove {RUNTIME_FILE} to run it in torch")
    num_threads = num_threads or torch.get_num_threads()
    try:
        if runtime.library == "onnxruntime":
            return OnnxForward(path, num_threads)
        return OpenVinoForward(path, num_threads, quantized=runtime.graph == "weights")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path.parent} runs through {runtime.library}, which is not installed; "
            f"pip install 'relevance-ray[runtimes]', or remove {RUNTIME_FILE} to run it in torch"
        ) from error
    except Exception as error:
        raise UserError(
            f"{runtime.library} cannot read {path} ({first_line(error)}); export the model again, or remove "
            f"{RUNTIME_FILE} to run it in torch"
        ) from error


def first_line(error: Exception) -> str:
    """What an exception of a library says, in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class OnnxForward:
    """ONNX Runtime on a CPU."""

    def __init__(self, path: Path, num_threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [each.name for each in self._session.get_inputs()]
        self.width = int(self._session.get_outputs()[0].shape[1])

    def __call__(self, batch: Batch) -> np.ndarray:
        return np.asarray(self._session.run(None, {name: batch[name] for name in self._names})[0], dtype=np.float32)


class OpenVinoForward:
    """OpenVINO on a CPU, in float32 but for what the graph itself has quantized.

    With `quantized` weights it also quantizes the activations that meet them, each row in groups of `ACTIVATION_GROUP` with
    a scale of their own, so that a score does not depend on the rows beside it.
    """

    def __init__(self, path: Path, num_threads: int, *, quantized: bool) -> None:
        import openvino

        core = openvino.Core()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": False,  # it begins at the first core in each process, and copies would share that
            "INFERENCE_PRECISION_HINT": "f32",  # where the CPU has bf16, a score would depend on the machine
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": ACTIVATION_GROUP if quantized else 0,
        }
        self._request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()
        model = self._request.model_outputs[0]
        self._names = [each.any_name for each in self._request.model_inputs]
        self.width = model.get_partial_shape()[1].get_length()

    def __call__(self, batch: Batch) -> np.ndarray:
        out = self._request.infer({name: batch[name] for name in self._names})[0]
        return np.array(out, dtype=np.float32)  # the library writes its next answer over this one
