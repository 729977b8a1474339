"""The scaling curve, and what a GPU trains and labels a second, on a machine with torch, transformers and the cores alone.

    python benchmarks/gpu.py FOLDER [--results FOLDER] [--seeds 1] [--minutes 9]

FOLDER is what `gpu_pack.py` left; neither Ray nor pydantic nor a network is needed. A teacher is trained on the human
judgments (all layers, one logit on soft targets, the form of arXiv 2505.07105), labels the generated pairs, and students of
half as many layers are distilled from 1, 2, 4, ... times as many pairs as there are human ones. What was found lies in
`--results` (labels and figures, no weights), so that a machine which is lent for minutes at a time goes on where the last
one ended: nothing new is begun after `--minutes`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from relevance_ray.data.prepare import read_judged, read_scale
from relevance_ray.engines.base import ModelEngine
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.judged import JudgedPairs, flatten
from relevance_ray.evaluation.scaling import scaling_markdown, scaling_report
from relevance_ray.labeling.shard import Known, label_groups
from relevance_ray.metrics import ndcg
from relevance_ray.quiet import quiet_libraries
from relevance_ray.schema import GROUP, query_id
from relevance_ray.storage import fingerprint
from relevance_ray.training.options import (
    FitOptions,
    HumanFitOptions,
    StudentOptions,
    TeacherFitOptions,
    TeacherOptions,
)
from relevance_ray.training.student import StudentRequest, train_student
from relevance_ray.training.teacher import train_teacher

MODEL = "minilm"
MAX_TOKENS = 64
GROUPS_A_FILE = 4_096
SPEED_PAIRS = 32_768
"""Trained on to measure speed."""
SPEEDS: list[dict[str, Any]] = [
    {"precision": "float32"},
    {"precision": "bfloat16"},
    {"precision": "bfloat16", "compiled": True},
]


def _pairs(groups: pa.Table) -> int:
    return int(pc.sum(pc.list_value_length(groups["products"])).as_py())


class Measuring:
    """What is measured of one pack, kept in the results' folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.pack, self.results = Path(arguments.folder).absolute(), Path(arguments.results).absolute()
        self.until = time.monotonic() + 60 * arguments.minutes
        self.layers, self.epochs = arguments.layers, arguments.epochs
        settings = {"layers": self.layers, "epochs": self.epochs, "pack": content_of(self.pack)}
        self.work = Path(arguments.work).absolute() / fingerprint(settings)
        for folder in (self.results, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        self.figures_file = self.results / "figures.json"
        self.figures: dict[str, Any] = {"settings": settings}
        if self.figures_file.exists():
            self.figures = json.loads(self.figures_file.read_text(encoding="utf-8"))
        if self.figures["settings"] != settings:
            raise SystemExit(
                f"{self.results} has figures of {self.figures['settings']}, not of {settings}; name another folder"
            )
        self.scale = read_scale(self.pack)
        self.judged_file = str(self.pack / "judged_groups.parquet")
        self.test: JudgedPairs = flatten(read_judged(self.pack, "test"), self.scale)
        self.human_pairs = _pairs(read_judged(self.pack, "train"))

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A figure that is there, or is measured now and kept; None where the time is up."""
        if name not in self.figures:
            if time.monotonic() > self.until:
                print(f"{name}: no time left", flush=True)
                return None
            began = time.monotonic()
            self.figures[name] = measure()
            unfinished = self.figures_file.with_suffix(".partial")
            unfinished.write_text(json.dumps(self.figures), encoding="utf-8")
            unfinished.replace(self.figures_file)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        return self.figures[name]

    def start(self) -> str:
        """MiniLM in single precision."""
        from transformers import AutoModel, AutoTokenizer

        folder = self.work / MODEL
        if not (folder / "tokenizer_config.json").exists():
            AutoModel.from_pretrained(self.pack / "weights", dtype=torch.float32).save_pretrained(folder)
            AutoTokenizer.from_pretrained(self.pack / "weights").save_pretrained(folder)
        return str(folder)

    def teacher(self) -> dict[str, Any]:
        """Train the teacher, label all generated pairs, rank the test queries."""
        options = TeacherOptions(
            model=self.start(),
            num_classes="single",
            max_tokens=MAX_TOKENS,
            fields=["title"],
            fit=TeacherFitOptions(epochs=self.epochs, batch_size=64, learning_rate=1e-4),
        )
        folder = self.work / "teacher"
        summary = train_teacher(
            options,
            self.scale,
            self.judged_file,
            tuple,
            str(folder),
            str(self.work / "teacher-work"),
            on_progress=_show,
        )
        model = load_pair_model(folder, max_batch_tokens=65_536)
        values = self.ranked(folder)
        logits = []
        began, tokens = time.monotonic(), model.num_tokens
        for groups in self.groups():
            labeled = label_groups(groups, lambda: ModelEngine(model))
            logits.append(_logits(labeled))
        seconds = time.monotonic() - began
        whole = np.concatenate(logits)
        logits_table = pa.table({"logit": pa.array(whole.astype(np.float16))})
        pq.write_table(logits_table, self.results / "labels.parquet", compression="zstd")
        return {
            "ndcg": values,
            "trained_pairs_per_second": summary["pairs_per_second"],
            "labeled_pairs": len(whole),
            "labeled_pairs_per_second": round(len(whole) / seconds, 1),
            "labeled_tokens_per_second": round((model.num_tokens - tokens) / seconds, 1),
        }

    def groups(self) -> Iterator[pa.Table]:
        """The generated groups, as tables of the GROUP schema."""
        products = pq.read_table(self.pack / "products.parquet").combine_chunks()
        ids, fields = (products.column(name).combine_chunks() for name in ("product_id", "fields"))
        struct = GROUP.field("products").type.value_type
        for batch in pq.ParquetFile(self.pack / "groups.parquet").iter_batches(GROUPS_A_FILE):
            rows = batch.column("rows")
            taken = rows.flatten()
            columns = {
                "pair_id": pa.nulls(len(taken), pa.int64()),
                "product_id": ids.take(taken),
                "fields": fields.take(taken),
                "origins": pa.nulls(len(taken), struct.field("origins").type),
            }
            flat = pa.StructArray.from_arrays([columns[field.name] for field in struct], fields=list(struct))
            offsets = pc.subtract(rows.offsets, rows.offsets[0])
            queries = batch.column("query")
            yield pa.table(
                {
                    "query_id": pa.array([query_id(query) for query in queries.to_pylist()]),
                    "query": queries,
                    "query_source": pa.repeat(pa.scalar("generated"), len(queries)),
                    "products": pa.ListArray.from_arrays(offsets, flat),
                }
            ).cast(GROUP)

    def label_files(self, num_pairs: int) -> list[str]:
        """Files that hold so many pairs, labeled as the labeling step does: made of the pack and of the teacher's logits."""
        folder = self.work / "labels"
        if not folder.exists():
            unfinished = self.work / "labels-unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            logits = pq.read_table(self.results / "labels.parquet")["logit"].to_numpy().astype(np.float32)
            start = 0
            for number, groups in enumerate(self.groups()):
                stop = start + len(groups.column("products").combine_chunks().flatten())
                own = logits[start:stop]
                known = Known(np.arange(len(own)), np.stack([np.zeros_like(own), own], axis=1), own, [None] * len(own))
                labeled = label_groups(groups, _no_engine, known)
                pq.write_table(labeled, unfinished / f"labels-{number:05d}.parquet")
                start = stop
            unfinished.rename(folder)
        files: list[str] = []
        held = 0
        for path in sorted(folder.glob("*.parquet")):
            if held < num_pairs:
                files.append(str(path))
                held += _pairs(pq.read_table(path, columns=["products"]))
        assert held >= 0.99 * num_pairs, (held, num_pairs)
        return files

    def student(self, num_pairs: int | None, seed: int, name: str, **fit: Any) -> dict[str, Any]:
        """Train a student on the first pairs, or on the human judgments alone, and rank the test queries."""
        loop = FitOptions(batch_size=32, learning_rate=2e-4, seed=seed, eval_every=0, **fit)
        options = StudentOptions(
            model=self.start(), num_layers=self.layers, max_tokens=MAX_TOKENS, fields=["title"], fit=loop
        )
        files = None
        if num_pairs is None:
            options = options.on_human_labels(
                "margin_mse", HumanFitOptions(epochs=self.epochs, batch_size=32, learning_rate=2e-4, seed=seed, **fit)
            )
        else:
            files = self.label_files(num_pairs)
        folder = self.work / name
        request = StudentRequest(
            options,
            self.scale,
            files,
            self.judged_file,
            str(folder),
            str(self.work / f"{name}-work"),
            max_pairs=num_pairs,
            part=name,
        )
        rates: list[float] = []

        def follow(record: dict[str, Any]) -> None:
            _show(record)
            if "loss" in record:
                rates.append(record["pairs_per_second"])

        summary = train_student(request, on_progress=follow)
        return {
            "ndcg": self.ranked(folder),
            "pairs": summary["pairs"],
            "seconds": round(summary["seconds"], 1),
            "first_step_seconds": round(summary["pairs"] / summary["steps"] / rates[0], 1) if rates else None,
            "pairs_per_second": round(float(np.median(rates[len(rates) // 4 :])), 1) if rates else None,
        }

    def ranked(self, folder: Path) -> list[float | None]:
        """nDCG of each test query."""
        logits = predict(load_pair_model(folder), self.test).logits
        return [
            None if np.isnan(value) else round(float(value), 6)
            for value in ndcg(self.test.gains, logits, self.test.offsets)
        ]


def content_of(folder: Path) -> str:
    """What tells packs apart."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.parquet")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _logits(labeled: pa.Table) -> np.ndarray:
    flat = labeled.column("products").combine_chunks().flatten()
    assert flat.field("error").null_count == len(flat), "generated pairs are all well-formed"
    return np.asarray(flat.field("logit").to_numpy())


def _no_engine() -> ModelEngine:
    raise AssertionError("every logit is known")


def _show(record: dict[str, Any]) -> None:
    if "dev" in record or record.get("step", 1) % 500 == 0:
        print(json.dumps(record), flush=True)


def measure(arguments: argparse.Namespace) -> None:
    at = Measuring(arguments)
    teacher = at.once("teacher", at.teacher)
    students: dict[int, list[Any]] = {}
    human: list[Any] = []
    times = [2**power for power in range(20) if 2**power <= arguments.times]
    if teacher is not None:
        sizes = [least * at.human_pairs for least in times if least * at.human_pairs <= 1.01 * teacher["labeled_pairs"]]
        for fit in SPEEDS if torch.cuda.is_available() else SPEEDS[:1]:
            name = "-".join(["speed", *map(str, fit.values())])
            at.once(name, partial(at.student, min(SPEED_PAIRS, sizes[-1]), 0, name, **fit))
        for size, seed in itertools.product([None, *sizes], range(arguments.seeds)):
            name = f"student-{size or 'human'}-{seed}"
            if (found := at.once(name, partial(at.student, size, seed, name))) is not None:
                (human if size is None else students.setdefault(size, [])).append(found)
    complete = {size: found for size, found in students.items() if len(found) == arguments.seeds}
    report: dict[str, Any] = {}
    if len(complete) >= 3 and human:
        lines = {"teacher": _array([teacher]), "human_only": _array(human)}
        report = scaling_report({size: _array(found) for size, found in complete.items()}, lines)
        print(scaling_markdown(report))
    speed = {
        name: {key: value for key, value in found.items() if key != "ndcg"}
        for name, found in at.figures.items()
        if name == "teacher" or name.startswith("speed-")
    }
    print(
        json.dumps(
            {
                "benchmark": "gpu",
                "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs",
                "torch": torch.__version__,
                "human_pairs": at.human_pairs,
                "speed": speed,
                "law": report.get("law"),
                "forecast": report.get("forecast"),
            }
        )
    )


def _array(found: list[Any]) -> np.ndarray:
    """nDCG of each query, float64 [seeds, q]."""
    return np.asarray(
        [[np.nan if value is None else value for value in each["ndcg"]] for each in found], dtype=np.float64
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="of the pack")
    parser.add_argument("--results", default="runs/gpu/results", help="labels and figures; read if there")
    parser.add_argument("--work", default="runs/gpu/work", help="models and labeled groups; may be lost")
    parser.add_argument("--times", type=int, default=64, help="the largest student's pairs, in human ones")
    parser.add_argument("--layers", type=int, default=3, help="of the students; the teacher has 6")
    parser.add_argument("--epochs", type=int, default=2, help="over the human judgments")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="nothing new is begun after these")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # one process has all cores
    quiet_libraries()
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
