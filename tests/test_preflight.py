"""What Ray cannot hold is said before it is waited for."""

from __future__ import annotations

import pytest

from relevance_ray import preflight
from relevance_ray.config import ResourceOptions
from relevance_ray.errors import UserError
from relevance_ray.preflight import check_demands, room
from relevance_ray.workers import Demand, Workers

HEAD = {"CPU": 8.0, "memory": 1e9, "node:10.0.0.1": 1.0}
GPU_NODE = {"CPU": 16.0, "GPU": 8.0, "teacher": 8.0, "memory": 1e9}


def test_workers_are_counted_by_what_each_node_can_hold() -> None:
    four = Demand(Workers(4, cpus=5, gpus=0), "key", 1)
    assert room([HEAD, HEAD], four) == 2  # 16 CPUs, and yet not three times five
    assert room([HEAD, GPU_NODE], four) == 4
    tensor_parallel = Demand(Workers(3, cpus=1, gpus=4), "key", 1)
    assert room([GPU_NODE, HEAD], tensor_parallel) == 2
    assert room([HEAD, HEAD], tensor_parallel) == 0
    assert room([{"GPU": 0.3}], Demand(Workers(5, cpus=0, gpus=0.1), "key", 1)) == 3
    assert room([HEAD], Demand(Workers(8), "key", 1, taken_cpus=6)) == 2
    assert room([HEAD, GPU_NODE], Demand(Workers(9, resources={"teacher": 1}), "key", 1)) == 8


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The nodes of a cluster, and what it may grow to."""
    there: list[dict[str, float]] = []
    later: list[dict[str, float]] = []
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(preflight, "_cluster", lambda most: (there, later))
    return there, later


def test_what_no_node_holds_is_refused_with_the_nodes_that_are_there(
    nodes: tuple[list[dict[str, float]], list[dict[str, float]]],
) -> None:
    nodes[0].extend([HEAD, HEAD, {"CPU": 4.0}])
    wanted = ResourceOptions(label_actors=4, gpus_per_label_actor=1, label_resources={"teacher": 1}).needed("label")
    with pytest.raises(
        UserError,
        match=r"resources.label_actors asks for 4 at 2 CPUs, 1 GPU, 1 teacher each, and this Ray has room for 0 "
        r"\(its nodes: 1 with 4 CPUs; 2 with 8 CPUs\)",
    ):
        check_demands(wanted)
    nodes[0].append(GPU_NODE)
    assert check_demands(wanted) == []


def test_actors_begin_with_what_there_is_and_training_with_all_or_nothing(
    nodes: tuple[list[dict[str, float]], list[dict[str, float]]],
) -> None:
    nodes[0].append(HEAD)
    options = ResourceOptions(label_actors=9, train_workers=9)
    [said] = check_demands(options.needed("label"))
    assert said == "resources.label_actors asks for 9 at 2 CPUs each; there is room for 4 now"
    with pytest.raises(
        UserError, match="resources.train_workers asks for 9 at 1 CPU each, and this Ray has room for 8"
    ):
        check_demands(options.needed("train-student"))


def test_a_cluster_that_grows_is_asked_what_it_may_become(
    nodes: tuple[list[dict[str, float]], list[dict[str, float]]],
) -> None:
    nodes[0].append(HEAD)
    nodes[1].extend([GPU_NODE, GPU_NODE])
    options = ResourceOptions(train_workers=16, train_on_gpu=True)
    [said] = check_demands(options.needed("train-student"))
    assert said.endswith(
        "16 at 1 CPU, 1 GPU each; there is room for 0 now, and the others wait for the cluster to grow"
    )
    nodes[1].pop()
    with pytest.raises(UserError, match="has room for 8 even when it has grown as far as it may"):
        check_demands(options.needed("train-student"))


def test_a_resource_needs_a_name_and_an_amount() -> None:
    with pytest.raises(
        ValueError, match="label_resources: GPU 1 is no amount above 0 of a resource of your own naming"
    ):
        ResourceOptions(label_resources={"GPU": 1})
    with pytest.raises(ValueError, match="train_resources: students 0 is no amount above 0"):
        ResourceOptions(train_resources={"students": 0})
