"""A labeling job to be killed: run as a script, it labels shards of its own making with an engine that takes its time.

    python tests/labeling_job.py ROOT SECONDS_A_SHARD [--lose-a-node]

The shards lie in ROOT/generate, the labels in ROOT/label. With `--lose-a-node` the job runs on a real cluster of two nodes,
one of which is killed, with the actors on it, once a few shards are committed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from relevance_ray.cluster.workers import Workers
from relevance_ray.engines.base import Labels, Pair
from relevance_ray.labeling.pipeline import Shard, label, shards_to_label
from relevance_ray.quiet import quiet_libraries
from relevance_ray.schema import GROUP, pair_id, product_fields
from relevance_ray.storage import CommitLog, join

NUM_SHARDS, GROUPS, PRODUCTS = 24, 10, 3


class SlowEngine:
    """The logit is a function of the pair's id alone."""

    gains = (0.0, 1.0)
    num_tokens = 0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def label(self, pairs: Sequence[Pair]) -> Labels:
        time.sleep(self.seconds)
        logits = np.array([pair.pair_id % 1000 / 100 for pair in pairs], dtype=np.float32)
        return Labels(np.stack([np.zeros_like(logits), logits], axis=1), [None] * len(pairs), [None] * len(pairs))


def shards_of(root: str) -> list[Shard]:
    """The job's shards, made where they are not there yet."""
    groups = CommitLog(join(root, "generate"))
    for start in range(0, NUM_SHARDS * GROUPS, GROUPS):
        name = f"groups-{start:010d}-{start + GROUPS:010d}"
        if name not in groups.committed():
            groups.commit(name, _groups(start, start + GROUPS), "g", {"pairs": GROUPS * PRODUCTS})
    return shards_to_label(groups, list(groups.committed()))


def _groups(start: int, stop: int) -> pa.Table:
    rows = []
    for group in range(start, stop):
        query = f"query {group}"
        products = [
            {
                "pair_id": pair_id(query, f"p{n}"),
                "product_id": f"p{n}",
                "fields": product_fields({"title": f"title {n}"}),
                "origins": [{"name": "random", "rank": n}],
            }
            for n in range(PRODUCTS)
        ]
        rows.append({"query_id": str(group), "query": query, "query_source": "log", "products": products})
    return pa.Table.from_pylist(rows, schema=GROUP)


def labels_of(root: str) -> list[tuple[int, float]]:
    """(pair_id, logit) of every label that a reader sees, sorted."""
    log = CommitLog(join(root, "label"))
    products = [
        product
        for shard in log.committed()
        for row in log.read(shard, columns=["products"]).to_pylist()
        for product in row["products"]
    ]
    return sorted((product["pair_id"], product["logit"]) for product in products)


def main() -> None:
    quiet_libraries()
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    root, seconds = sys.argv[1], float(sys.argv[2])
    shards = shards_of(root)
    run = partial(label, shards, join(root, "label"), "t", partial(SlowEngine, seconds))
    if "--lose-a-node" not in sys.argv:
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        print(run(workers=Workers(2)))
        return

    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    doomed = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

    def lose() -> None:
        while len(CommitLog(join(root, "label")).committed()) < 4:
            time.sleep(0.1)
        cluster.remove_node(doomed, allow_graceful=False)
        print("node killed", flush=True)

    killer = threading.Thread(target=lose)
    killer.start()
    print(run(workers=Workers(4)))
    killer.join()
    print(f"nodes left: {sum(node['Alive'] for node in ray.nodes())}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
