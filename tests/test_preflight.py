"""What Ray cannot hold is said before it is waited for."""

from __future__ import annotations

import pytest

from relevance_ray.cluster import preflight
from relevance_ray.cluster.preflight import Node, check_demands, room
from relevance_ray.cluster.workers import Demand, Workers
from relevance_ray.config import ResourceOptions
from relevance_ray.errors import UserError

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
    assert room([HEAD], Demand(Workers(8), "key", 1, beside=Workers(6))) == 2
    assert room([HEAD, GPU_NODE], Demand(Workers(9, resources={"teacher": 1}), "key", 1)) == 8


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes of a cluster."""
    there: list[Node] = []
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(preflight, "_nodes", lambda: there)
    monkeypatch.setattr(preflight, "in_local_session", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    return there


def test_what_no_node_holds_is_refused_with_the_nodes_that_are_there(nodes: list[Node]) -> None:
    nodes.extend([HEAD, HEAD, {"CPU": 4.0}, {"memory": 1e9}])
    wanted = ResourceOptions(label_actors=4, gpus_per_label_actor=1, label_resources={"teacher": 1}).needed("label")
    with pytest.raises(
        UserError,
        match=r"resources.label_actors asks for 4 at 2 CPUs, 1 GPU, 1 teacher each, and this Ray has room for 0 "
        r"\(its nodes: 1 with 4 CPUs; 2 with 8 CPUs\); .* or set resources.autoscaling where the cluster starts them",
    ):
        check_demands(wanted)
    nodes.append(GPU_NODE)
    assert check_demands(wanted) == []


def test_actors_begin_with_what_there_is_and_training_with_all_or_nothing(nodes: list[Node]) -> None:
    nodes.append(HEAD)
    options = ResourceOptions(label_actors=9, train_workers=9)
    [said] = check_demands(options.needed("label"))
    assert said == "resources.label_actors asks for 9 at 2 CPUs each; there is room for 4 now"
    with pytest.raises(
        UserError, match="resources.train_workers asks for 9 at 1 CPU each, and this Ray has room for 8"
    ):
        check_demands(options.needed("train-student"))


def test_search_actors_and_what_writes_beside_them_are_counted_together(nodes: list[Node]) -> None:
    nodes.append({"CPU": 6.0, "cpu_node": 4.0})
    options = ResourceOptions(
        search_actors=4, generate_resources={"cpu_node": 1}, write_actors=2, cpus_per_write_actor=3
    )
    with pytest.raises(UserError, match="resources.search_actors asks for 5 at 1 CPU, 1 cpu_node each, .* room for 4"):
        check_demands(options.needed("generate", writes=True))
    nodes.append({"CPU": 1.0, "cpu_node": 1.0})
    with pytest.raises(
        UserError, match="write_actors asks for 2 at 3 CPUs each beside 4 others of the step, .* room for 0"
    ):
        check_demands(options.needed("generate", writes=True))


def test_a_cluster_that_starts_nodes_is_waited_for(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ResourceOptions(train_workers=16, train_on_gpu=True).needed("train-student")
    [said] = check_demands(wanted, autoscaling=True)
    assert said.endswith(
        "16 at 1 CPU, 1 GPU each; there is room for 0 now, and the others wait for the cluster to grow"
    )
    monkeypatch.delenv("RAY_ADDRESS")  # the same configuration on one machine
    with pytest.raises(UserError, match="has room for 0"):
        check_demands(wanted, autoscaling=True)


def test_a_cluster_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:9", "127.0.0.1:99999", "[::1]:9"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError) as told:
            check_demands(ResourceOptions().needed("label"))
        assert str(told.value).startswith(f"RAY_ADDRESS {address} does not answer (")
        assert str(told.value).endswith("unset it for a local Ray")


def test_a_resource_needs_a_name_and_an_amount() -> None:
    with pytest.raises(ValueError, match="label_resources: GPU 1 is no amount .* of a resource you named"):
        ResourceOptions(label_resources={"GPU": 1})
    with pytest.raises(ValueError, match="train_resources: students 0 is no amount \\(0.0001 or more\\)"):
        ResourceOptions(train_resources={"students": 0})
    for resource in ("object_store_memory", "", "node:10.0.0.1"):
        with pytest.raises(ValueError, match="of a resource you named"):
            ResourceOptions(label_resources={resource: 1})
    with pytest.raises(ValueError, match="label_resources: teacher nan"):
        ResourceOptions(label_resources={"teacher": float("nan")})
