"""Training a cross-encoder on teacher logits, beside sentence-transformers: speed, margins, and time to the same nDCG.

Both train the same encoder on the same groups (8 products a query) in batches of 8 queries at the same learning rate, on the
same threads. Theirs is `CrossEncoderTrainer` with its listwise `MarginMSELoss`, one positive (the product of the highest
logit) against seven negatives; ours takes all 28 margins of a query. Speed is measured in rounds that alternate, each in a
process of its own; the time to equal nDCG is that of a whole epoch each, measured on the dev queries between steps, with the
measuring taken out.

Two workers are measured against one, each of one thread, in steps of a global batch of 32 queries: what is lost is the sum
of the gradients and the wait for the slower worker. More workers are reckoned from the size of the gradients: a ring moves
2 (n - 1) / n times that size a step and worker.

    python benchmarks/training.py [--quick] [--data FOLDER] [--work FOLDER]

Labels come from an untrained bi-encoder: how fast a student learns is asked here, not how good its teacher is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from relevance_ray.cluster.workers import Workers
from relevance_ray.config import build_config
from relevance_ray.quiet import quiet_libraries
from relevance_ray.steps import Chain
from relevance_ray.storage import CommitLog, read_table

BATCH, LEARNING_RATE, PRODUCTS, MAX_TOKENS = 8, 1e-4, 8, 64
BATCH_OF_WORKERS, STEPS_OF_WORKERS = 32, 8
GIGABYTES_PER_SECOND = {"10 Gbit/s": 1.25, "100 Gbit/s": 12.5}


def labeled(arguments: argparse.Namespace) -> tuple[list[str], str]:
    """Files of labeled groups, and the file of judged ones."""
    values = {
        "data": {"format": "esci", "path": str(Path(arguments.data).resolve())},
        "storage": {"root": str(Path(arguments.work).absolute() / "root")},
        "teacher": {"kind": "bi_encoder", "max_tokens": 64},
        "generate": {"num_pairs": PRODUCTS * arguments.groups, "source": "titles", "candidates_per_query": PRODUCTS},
    }
    chain = Chain(build_config(values))
    outcome = chain.run("label")
    log = CommitLog(outcome.folders["label"])
    judged = Path(outcome.folders["prepare"]) / "judged_groups.parquet"
    return [log.path(name) for name in chain.at.labeled_shards()], str(judged)


def start_folder(arguments: argparse.Namespace, judged: str) -> Path:
    from relevance_ray.data.prepare import read_scale
    from relevance_ray.student.cross_encoder import build_cross_encoder
    from relevance_ray.training.options import StudentOptions

    options = StudentOptions(max_tokens=MAX_TOKENS, num_layers=arguments.layers)
    start = Path(arguments.work).absolute() / f"start-{arguments.layers}"
    build_cross_encoder(options, read_scale(Path(judged).parent), start, seed=0)
    return start


class Dev:
    """nDCG on the dev queries, and the time that measuring it took."""

    def __init__(self, judged: str, start: Path) -> None:
        from relevance_ray.training.pair_task import PairTask

        self.task, self.seconds = PairTask(str(start), judged), 0.0

    def measure(self, model: Any) -> float:
        started = time.perf_counter()
        was_training = model.training
        self.task.net = model.eval()
        found = self.task.evaluate()["ndcg"]
        model.train(was_training)
        self.seconds += time.perf_counter() - started
        return found


def ours(arguments: argparse.Namespace, files: list[str], judged: str) -> dict[str, Any]:
    """Train on the first `arguments.steps` batches; the seconds include tokenising."""
    from relevance_ray.student.packed import PackedTokens
    from relevance_ray.training.fit import fit
    from relevance_ray.training.ingest import IngestSpec, ingest
    from relevance_ray.training.options import FitOptions, StudentOptions
    from relevance_ray.training.student_task import StudentTaskSpec

    start = start_folder(arguments, judged)
    every = max(1, arguments.steps // arguments.points)
    loop = FitOptions(batch_size=BATCH, learning_rate=LEARNING_RATE, eval_every=every, checkpoint_every=10**6)
    options = StudentOptions(max_tokens=MAX_TOKENS, num_layers=arguments.layers, fit=loop, level_weight=0.0)
    work = Path(arguments.work).absolute() / f"ours-{os.getpid()}"
    waiting = [0.0]
    whole_pad = PackedTokens.pad

    def timed_pad(self: PackedTokens, rows: np.ndarray) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        out = whole_pad(self, rows)
        waiting[0] += time.perf_counter() - began
        return out

    began = time.perf_counter()
    tokens = ingest(IngestSpec(str(start), options), files, work / "tokens")
    tokenising = time.perf_counter() - began
    task = StudentTaskSpec(str(start), tokens, judged, options, max_pairs=arguments.steps * BATCH * PRODUCTS).build(
        0, 1
    )
    whole_take = task.take

    def timed_take(examples: np.ndarray) -> Any:
        began = time.perf_counter()
        out = whole_take(examples)
        waiting[0] += time.perf_counter() - began
        return out

    task.take = timed_take  # type: ignore[method-assign]
    PackedTokens.pad = timed_pad  # type: ignore[method-assign]
    curve, seconds = [], [tokenising * arguments.steps * BATCH / arguments.groups]
    waited = []

    def follow(record: dict[str, Any]) -> None:
        if "loss" in record:
            seconds[0] += BATCH / record["groups_per_second"]
            waited.append(waiting[0])
        else:
            curve.append((seconds[0], record["dev"]["ndcg"]))
        waiting[0] = 0.0

    result = fit(task, loop, work / "fit", follow, keep_model=False)
    sizes = task.num_pairs
    return {
        "seconds": result.seconds + tokenising * result.pairs / (PRODUCTS * arguments.groups),
        "products": result.pairs,
        "margins": int((sizes * (sizes - 1) // 2).sum()),
        "waiting": sum(waited),
        "curve": curve,
    }


def theirs(arguments: argparse.Namespace, files: list[str], judged: str) -> dict[str, Any]:
    """The same groups through sentence-transformers."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import MarginMSELoss
    from transformers import TrainerCallback

    from relevance_ray.model_folder import read_model_info

    start = start_folder(arguments, judged)
    template = read_model_info(start).template
    rows: list[dict[str, Any]] = []
    for file in files:
        for group in read_table(file).select(["query", "products"]).to_pylist():
            found = sorted(group["products"], key=lambda product: -product["logit"])
            if len(found) == PRODUCTS and len(rows) < arguments.steps * BATCH:
                texts = {f"product_{n}": template.render_product(p["fields"]) for n, p in enumerate(found)}
                rows.append({"query": group["query"], **texts, "label": [p["logit"] for p in found]})
    model = CrossEncoder(str(start), max_length=MAX_TOKENS, device="cpu")
    dev = Dev(judged, start)
    curve: list[tuple[float, float]] = []
    every = max(1, arguments.steps // arguments.points)

    class Follow(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()
            dev.seconds = 0.0

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % every == 0 or state.global_step == arguments.steps:
                seconds = time.perf_counter() - self.began - dev.seconds
                curve.append((seconds, dev.measure(model.model)))

    follow = Follow()
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=str(Path(arguments.work) / f"theirs-{os.getpid()}"),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            warmup_ratio=0.06,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        loss=MarginMSELoss(model),
        callbacks=[follow],
    )
    trainer.train()
    return {
        "seconds": curve[-1][0],
        "products": PRODUCTS * len(rows),
        "margins": (PRODUCTS - 1) * len(rows),
        "curve": curve,
    }


def measured(arguments: argparse.Namespace, side: str, steps: int, points: int) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps), "--points", str(points)]
    for name in ("data", "work", "groups", "layers", "rounds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    spent = f"{found['seconds']:.0f} of them training, " if "seconds" in found else ""
    print(
        f"{side}, {steps} steps: {time.monotonic() - began:.0f} s, {spent}{len(found.get('curve', []))} times on dev",
        flush=True,
    )
    return found


def over_workers(arguments: argparse.Namespace, files: list[str], judged: str) -> dict[str, Any]:
    """Rates of one worker and of two of one thread each, and the size of what they sum."""
    import ray
    import torch
    from transformers import AutoModelForSequenceClassification

    from relevance_ray.training.ingest import IngestSpec, ingest
    from relevance_ray.training.options import FitOptions, StudentOptions
    from relevance_ray.training.ray_train import ray_runner
    from relevance_ray.training.runners import Job
    from relevance_ray.training.student_task import StudentTaskSpec

    start = start_folder(arguments, judged)
    loop = FitOptions(
        batch_size=BATCH_OF_WORKERS, learning_rate=LEARNING_RATE, checkpoint_every=10**6, eval_every=10**6
    )
    options = StudentOptions(max_tokens=MAX_TOKENS, num_layers=arguments.layers, fit=loop)
    work = Path(arguments.work).absolute() / f"workers-{os.getpid()}"
    tokens = ingest(IngestSpec(str(start), options), files, work / "tokens")
    pairs = STEPS_OF_WORKERS * BATCH_OF_WORKERS * PRODUCTS
    spec = StudentTaskSpec(str(start), tokens, judged, options, max_pairs=pairs)
    ray.init(
        address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range((arguments.rounds + 1) // 2):
        for workers, found in rates.items():
            job = Job(spec, loop, work / f"{workers}-{number}")
            [result] = ray_runner(Workers(workers))([job])
            found.append(result.pairs_per_second)
    ray.shutdown()
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    megabytes = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    return {
        "two_workers_over_one": round(statistics.median(rates[2]) / statistics.median(rates[1]), 3),
        "gradient_mb": round(megabytes, 1),
        "seconds_of_the_sum_over_64": {
            name: round(2 * 63 / 64 * megabytes / 1e3 / speed, 4) for name, speed in GIGABYTES_PER_SECOND.items()
        },
    }


def time_to(curve: list[tuple[float, float]], value: float) -> float:
    """Seconds until a curve first is at `value`."""
    return next(seconds for seconds, ndcg in curve if ndcg >= value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("RELEVANCE_RAY_TEST_DATA", "data")
    parser.add_argument("--data", default=f"{data}/esci", help="folder of ESCI's official files")
    parser.add_argument("--work", default="runs/training", help="where labels are kept")
    parser.add_argument("--groups", type=int, help="labeled queries; 1,200, or 160 with --quick")
    parser.add_argument("--layers", type=int, help="of the student; 6, or 2 with --quick")
    parser.add_argument("--rounds", type=int, help="of the speed, 5, or 2 with --quick; of the workers half as many")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", choices=["ours", "theirs", "workers"], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--points", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.groups = arguments.groups or (160 if arguments.quick else 1200)
    arguments.layers = arguments.layers or (2 if arguments.quick else 6)
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    quiet_libraries()
    files, judged = labeled(arguments)
    if arguments.side:
        measure = {"ours": ours, "theirs": theirs, "workers": over_workers}[arguments.side]
        print(json.dumps(measure(arguments, files, judged)))
        return

    steps, points = (10, 8) if arguments.quick else (20, 20)
    rounds = [
        {side: measured(arguments, side, steps, points=1) for side in ("ours", "theirs")}
        for _ in range(arguments.rounds)
    ]

    def rate(side: str, what: str) -> float:
        return statistics.median(found[side][what] / found[side]["seconds"] for found in rounds)

    whole = {side: measured(arguments, side, arguments.groups // BATCH, points) for side in ("ours", "theirs")}
    best = {side: max(ndcg for _, ndcg in found["curve"]) for side, found in whole.items()}
    goal = min(best.values())
    seconds = {side: time_to(found["curve"], goal) for side, found in whole.items()}
    print(
        json.dumps(
            {
                "benchmark": "training",
                "quick": arguments.quick,
                "hardware": f"{os.cpu_count()} CPUs {platform.machine()}",
                "products_over_sentence_transformers": round(rate("ours", "products") / rate("theirs", "products"), 3),
                "margins_over_sentence_transformers": round(rate("ours", "margins") / rate("theirs", "margins"), 3),
                "time_to_equal_ndcg": round(seconds["ours"] / seconds["theirs"], 3),
                "waiting_share": round(
                    statistics.median(r["ours"]["waiting"] / r["ours"]["seconds"] for r in rounds), 4
                ),
                "products_per_second": {side: round(rate(side, "products"), 1) for side in ("ours", "theirs")},
                "over_workers": measured(arguments, "workers", 0, 0),
                "best_ndcg": {side: round(value, 4) for side, value in best.items()},
                "comparisons": [
                    {
                        "what": f"products trained on a second, {arguments.layers} layers",
                        "ours": round(rate("ours", "products"), 1),
                        "peer": round(rate("theirs", "products"), 1),
                        "rows": steps * BATCH * PRODUCTS,
                        "seconds": round(statistics.median(r["ours"]["seconds"] for r in rounds), 2),
                    },
                    {
                        "what": f"seconds to dev nDCG {goal:.4f}",
                        "ours": round(seconds["ours"], 1),
                        "peer": round(seconds["theirs"], 1),
                        "rows": PRODUCTS * arguments.groups,
                        "seconds": round(whole["ours"]["seconds"], 1),
                    },
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
