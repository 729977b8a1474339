"""Checkpoints of the loop: whole or absent, the latest two kept.

A checkpoint is one folder, `step-0000000100/`, written under another name and renamed, so that a kill at any moment
leaves the previous one. It holds only the trained weights (with LoRA, the adapters), the optimizer and the loop's state;
everything else is rebuilt from the task, which is the same every time.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

KEPT = 2
STATE_FILE = "state.json"


@dataclass
class LoopState:
    """Where the loop stands.

    Attributes:
        step: optimizer steps done.
        pairs: (query, product) pairs trained on.
        seconds: time spent in steps, over all runs of this loop.
        best_step: the step whose weights are the best so far; -1 before the first evaluation.
        best_metrics: what was measured there.
        ended: whether there is nothing left to do, be it before the last step.
    """

    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    best_step: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)
    ended: bool = False


def save_file(path: Path, value: object) -> None:
    """`torch.save` of a whole file or none."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    torch.save(value, partial)
    os.replace(partial, path)


def load_file(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU, mapped: all workers of a machine share one copy."""
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def save_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], optimizer: dict[str, Any], state: LoopState
) -> None:
    """Write the checkpoint of `state.step` below `folder` and remove all but the latest `KEPT`."""
    final = folder / f"step-{state.step:010d}"
    partial = folder / f".{final.name}.{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    torch.save(weights, partial / "weights.pt")
    torch.save(optimizer, partial / "optimizer.pt")
    (partial / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished)


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], LoopState] | None:
    """Weights, optimizer and state of the latest checkpoint below `folder`, None where there is none."""
    found = _checkpoints(folder)
    if not found:
        return None
    return (
        load_file(found[-1] / "weights.pt"),
        load_file(found[-1] / "optimizer.pt"),
        LoopState(**json.loads((found[-1] / STATE_FILE).read_text(encoding="utf-8"))),
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
