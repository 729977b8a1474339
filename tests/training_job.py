"""A training on a cluster whose nodes share nothing but an object store: run as a script, it distills a student.

    python tests/training_job.py ROOT WORK [--lose-nodes]

ROOT is s3://; each node has a cache of its own below the local folder WORK. With `--lose-nodes` those on which workers are
at work are killed once a checkpoint is there, and others, which know nothing yet, take their place.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from tiny_training import SCALE, build_tiny_encoder, judged_groups, labeled_groups

from relevance_ray.cluster.workers import Workers
from relevance_ray.quiet import quiet_libraries
from relevance_ray.storage import join, listdir, write_table
from relevance_ray.training.options import FitOptions, StudentOptions
from relevance_ray.training.student import StudentRequest, train_student

STEPS = 60


def request_at(root: str, work: Path) -> StudentRequest:
    """A student of two files of labels, all of it at `root`; its encoder is the driver's alone."""
    encoder = work / "encoder"
    if not encoder.exists():
        build_tiny_encoder(encoder)
    fit = FitOptions(epochs=20, learning_rate=3e-3, batch_size=10, max_batch_tokens=128, checkpoint_every=5, seed=3)
    options = StudentOptions(model=str(encoder), max_tokens=16, dropout=0.0, max_group_products=8, fit=fit)
    tables = {"a": labeled_groups(20), "b": labeled_groups(10, seed=4), "judged": judged_groups(20)}
    for name, table in tables.items():
        write_table(join(root, f"{name}.parquet"), table)
    files = [join(root, "a.parquet"), join(root, "b.parquet")]
    return StudentRequest(options, SCALE, files, join(root, "judged.parquet"), join(root, "model"), join(root, "work"))


def main() -> None:
    quiet_libraries()
    root, work, losing = sys.argv[1], Path(sys.argv[2]), "--lose-nodes" in sys.argv
    os.environ["RELEVANCE_RAY_CACHE"] = str(work / "driver")
    import ray
    from ray.cluster_utils import Cluster

    from relevance_ray.training.ray_train import ray_runner

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

    caches = [work / f"node-{number}" for number in range(4 if losing else 2)]
    nodes = [cluster.add_node(num_cpus=1, env_vars={"RELEVANCE_RAY_CACHE": str(cache)}) for cache in caches]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

    def lose() -> None:
        while not listdir(join(root, "work", "fit", "checkpoints")):
            time.sleep(0.05)
        for node in [node for node, cache in zip(nodes, caches, strict=True) if cache.exists()]:
            cluster.remove_node(node, allow_graceful=False)
            print("node killed", flush=True)

    killer = threading.Thread(target=lose)
    if losing:
        killer.start()
    steps: list[int] = []
    summary = train_student(
        request_at(root, work),
        ray_runner(Workers(2)),
        on_progress=lambda record: steps.append(record["step"]) if "loss" in record else None,
    )
    if losing:
        killer.join()
    assert summary["steps"] == max(steps) == STEPS, (summary, steps)
    print(f"dev nDCG {summary['dev']['ndcg']:.6f}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
