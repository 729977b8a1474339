"""The student of a run, exported for the runtime that serves it fastest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa

from relevance_ray.data.prepare import read_judged, read_scale
from relevance_ray.engines.runtimes import RUNTIMES, TORCH, read_runtime, write_runtime
from relevance_ray.errors import UserError
from relevance_ray.evaluation.judged import JudgedPairs, flatten
from relevance_ray.evaluation.runtimes import MeasuredRuntimes
from relevance_ray.model_folder import staged_folder
from relevance_ray.progress import Progress
from relevance_ray.schema import LabelScale
from relevance_ray.steps import Chain
from relevance_ray.storage import absolute, check_reachable, exists, join, localize
from relevance_ray.student.export import check_exportable, check_libraries

AUTO = "auto"
MAX_PAIRS = 4000
"""Judged pairs that runtimes are measured on, in whole queries."""


def check_runtime(runtime: str) -> None:
    """Raise `UserError` for a runtime that there is not."""
    if runtime not in (AUTO, *RUNTIMES):
        raise UserError(f"--runtime {runtime} is none; give {AUTO}, or one of {', '.join(RUNTIMES)}")


def export_student(chain: Chain, out: str, runtime: str = AUTO, num_threads: int = 1) -> tuple[str, MeasuredRuntimes]:
    """Write a model folder that runs through another library than torch; what the student needs is run first.

    Args:
        chain: of the run whose student, and whose dev judgments, are taken.
        out: the folder to write, local or s3://.
        runtime: one of `RUNTIMES`, or "auto" for the fastest that ranks as torch does.
        num_threads: CPU cores that a copy of the server will have.

    Returns:
        The name of the runtime, and the figures of all that were measured.

    Raises:
        UserError: no such runtime, its libraries are missing, the folder is there already, or the named runtime cannot run
            this model.
    """
    check_runtime(runtime)
    if runtime != TORCH:
        check_libraries()
    out = absolute(out)
    check_reachable(out)
    if exists(out):
        raise UserError(f"{out} is there already; name another folder, or remove it")
    student = localize(chain.student())
    check_exportable(student)
    if read_runtime(student) is not None:
        raise UserError(f"{student} is an exported model; export the one that train-student made")
    prepared = chain.prepared()
    scale = read_scale(prepared)
    judged, known = _some(read_judged(prepared, "dev"), scale), _some(read_judged(prepared, "train"), scale)
    names = tuple(RUNTIMES) if runtime == AUTO else (runtime,)
    with staged_folder(out) as partial, Progress("export", len({TORCH, *names}), "runtimes") as progress:
        shutil.copytree(student, partial, dirs_exist_ok=True)
        graphs = partial / "onnx"
        graphs.mkdir()
        measured = MeasuredRuntimes(Path(student), judged, known, num_threads, graphs, names, progress.advance)
        if runtime in measured.failed:
            raise UserError(
                f"{runtime} does not run {student} ({measured.failed[runtime]}); choose another runtime, or pip install "
                "'relevance-ray[runtimes]' where a library is missing"
            )
        name = measured.fastest().name if runtime == AUTO else runtime
        kept = None if name == TORCH else measured.graph_of(name)
        for path in graphs.iterdir():
            if path != kept:
                path.unlink()
        file = "" if kept is None else f"{graphs.name}/{kept.name}"
        write_runtime(partial, name, file, {each.name: each.to_dict() for each in measured.figures})
    return name, measured


def default_out(chain: Chain) -> str:
    """Where an exported student lies if nobody says otherwise."""
    return join(chain.at.root, "exported")


def _some(judged: pa.Table, scale: LabelScale) -> JudgedPairs:
    """The first queries of a split, of about `MAX_PAIRS` pairs."""
    rows, pairs = 0, 0
    for products in judged["products"]:
        if pairs >= MAX_PAIRS:
            break
        rows, pairs = rows + 1, pairs + len(products)
    return flatten(judged.slice(0, rows), scale)
