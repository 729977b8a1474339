"""What makes a folder of weights a relevance model: `relevance.json` beside the plain `save_pretrained` files.

The folder stays loadable by anything that reads `save_pretrained` folders. Everything that is ours (label scale,
template, calibration) lies in one small file that is written last; a finished folder never changes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from relevance_ray.calibration import Calibration, calibration_of
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale
from relevance_ray.storage import exists, is_remote, join, publish_folder, read_bytes
from relevance_ray.templates import Template

INFO_FILE = "relevance.json"
FORMAT = 1
ModelKind = Literal["cross_encoder", "classifier", "bi_encoder", "bm25", "query_likelihood", "ensemble"]
_IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class ModelInfo:
    """The content of `relevance.json`.

    Attributes:
        kind: which loader reads the weights.
        scale: the grades it was trained for.
        template: how it reads a pair.
        calibration: logit to class probabilities; None until training ends.
        extra: numbers of one kind only (a bi-encoder's `logit_scale`, an ensemble's `stack`).
    """

    kind: ModelKind
    scale: LabelScale
    template: Template
    calibration: Calibration | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "scale": self.scale.to_dict(),
            "template": self.template.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "extra": dict(self.extra),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelInfo:
        if value.get("format") != FORMAT or value.get("kind") not in get_args(ModelKind):
            raise ValueError(f"format {value.get('format')!r}, kind {value.get('kind')!r}")
        calibration = value.get("calibration")
        return cls(
            kind=value["kind"],
            scale=LabelScale.from_dict(value["scale"]),
            template=Template.from_dict(value["template"]),
            calibration=None if calibration is None else calibration_of(calibration),
            extra=value.get("extra", {}),
        )


def read_model_info(folder: str | Path) -> ModelInfo:
    """Read the `relevance.json` of a model folder, local or s3://.

    Raises:
        UserError: the folder does not exist, is no model folder, or its file cannot be understood.
    """
    path = join(str(folder), INFO_FILE)
    if not exists(path):
        what = "has no relevance.json" if exists(str(folder)) else "does not exist"
        raise UserError(
            f"{folder} is no model folder: it {what}; give a folder written by train-teacher or train-student"
        )
    try:
        return ModelInfo.from_dict(json.loads(read_bytes(path)))
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is not a file of this version ({error}); train the model again") from error


def write_model_info(folder: str | Path, info: ModelInfo) -> None:
    """Write `relevance.json`, whole or not at all."""
    _write_json(Path(folder) / INFO_FILE, info.to_dict())


@contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` by one rename when the block ends well, and is removed when it
    does not: a model folder is there whole or not at all, and a finished one is never written over. To a store it is
    uploaded, `relevance.json` last, without which it is no model folder.

    Raises:
        OSError: `out` exists already and is not empty.
    """
    if is_remote(str(out)):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            publish_folder(Path(scratch), str(out), last=INFO_FILE)
        return
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):  # safetensors writes for its owner alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def finish_folder(folder: str | Path, info: ModelInfo) -> None:
    """The last act on a `save_pretrained` folder, before it is renamed into place.

    Names identity as sentence-transformers' activation (its default for one output is a sigmoid, which would turn our
    logits into something else), states the maximum length in the tokenizer, and writes `relevance.json`.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["sentence_transformers"] = {**config.get("sentence_transformers", {}), "activation_fn": _IDENTITY}
        _write_json(config_path, config)
    tokenizer_path = folder / "tokenizer_config.json"
    if tokenizer_path.is_file():
        tokenizer = json.loads(tokenizer_path.read_text(encoding="utf-8"))
        _write_json(tokenizer_path, {**tokenizer, "model_max_length": info.template.max_tokens})
    write_model_info(folder, info)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
