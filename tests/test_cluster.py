"""A real job on a real cluster: nodes as processes, S3 by moto's server, `ray job submit`. `make cluster-test` runs it.

The tests go in order, each from where the one before left the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml
from local_cluster import SECRET, TOKEN, LocalCluster, asked, configuration, labels_at
from tiny_chain import cli

from relevance_ray.storage import CommitLog, exists, join, listdir, read_json

pytestmark = pytest.mark.cluster
PAIRS = 8000
RUN = "s3://bucket/run"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Iterator[LocalCluster]:
    """A node for generation and training, one for the teacher, and `config.yaml` where jobs are submitted from."""
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as made, pytest.MonkeyPatch.context() as patch:
        (made.work / "config.yaml").write_text(yaml.safe_dump(configuration(RUN, encoder, PAIRS)))
        for name, value in made.environment.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        made.add_node("cpu", 2, '{"cpu_node": 2, "student": 2}')
        made.add_node("teacher", 2, '{"teacher": 2}')
        yield made
    s3fs.S3FileSystem.clear_instance_cache()


def num_labeled() -> int:
    folders = [name for name in listdir(RUN) if name.startswith("label-")] if exists(RUN) else []
    return len(CommitLog(join(RUN, folders[0])).committed()) if folders else 0


def metrics_of(cluster: LocalCluster) -> str:
    return asked(cluster.metrics)


def test_what_no_node_has_is_said_before_anything_is_run(cluster: LocalCluster) -> None:
    done = cluster.run("label", "config.yaml", "--set", "resources.label_resources={tpu: 1}")
    assert done.returncode == 2, done.stdout
    assert "error: resources.label_actors asks for 2 at 1 CPU, 1 tpu each, and this Ray has room for 0" in done.stdout
    assert "2 CPUs, 2 teacher" in done.stdout
    assert not exists(join(RUN, "latest.json"))


def test_pairs_are_generated_where_the_cpus_are(cluster: LocalCluster) -> None:
    done = cluster.run("generate", "config.yaml")
    assert done.returncode == 0, done.stdout
    assert f"generate: {PAIRS:,} of {PAIRS:,} pairs" in done.stdout
    assert (cluster.folder / "cache-cpu" / "mirror").exists()
    assert not (cluster.folder / "cache-teacher" / "mirror").exists()


def test_labeling_survives_the_loss_of_its_node_and_of_its_driver(cluster: LocalCluster, tmp_path: Path) -> None:
    twice = [cluster.submit("label", "config.yaml") for _ in range(2)]  # at the same instant: one runs, both follow it
    until(lambda: num_labeled() >= 4)
    cluster.kill_node("teacher")
    cluster.kill_driver("label")
    for job in twice:
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 4, said
        assert "label-config-2 lost its driver" in said
    before = num_labeled()
    assert 4 <= before < PAIRS // 200

    cluster.add_node("another", 2, '{"teacher": 2}')
    done = cluster.run("label", "config.yaml")
    assert done.returncode == 0, done.stdout
    assert f"label: {PAIRS:,} of {PAIRS:,} pairs" in done.stdout
    assert "generate: done already, skipped" in done.stdout
    alone = str(tmp_path / "alone")
    config = str(cluster.work / "config.yaml")
    teacher = read_json(join(RUN, "latest.json"))["teacher"]
    one = cli("label", config, "--set", f"storage.root={alone}", "--set", f"label.model={teacher}")
    assert one.returncode == 0, one.stderr
    assert labels_at(RUN) == pytest.approx(labels_at(alone), abs=1e-4)


def test_a_student_is_trained_on_its_own_nodes_and_tells_how_far_it_is(cluster: LocalCluster) -> None:
    job = cluster.submit("train-student", "config.yaml", "--set", "student.fit.epochs=20")
    shown: list[str] = []
    asked_for = {f"ray_relevance_ray_{name}" for name in ("done", "total", "per_second", "loss")}

    def told() -> bool:
        shown.append(metrics_of(cluster))
        lines = [line for line in shown[-1].splitlines() if 'step="train-student"' in line]
        return asked_for <= {line.split("{")[0] for line in lines}

    until(lambda: told() or job.poll() is not None)
    assert told()
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert exists(join(read_json(join(RUN, "latest.json"))["student"], "model.safetensors"))


def test_no_secret_is_in_a_log_or_an_object(cluster: LocalCluster) -> None:
    secrets = [SECRET.encode(), TOKEN.encode()]
    jobs = asked(f"{cluster.jobs}/api/jobs/")
    assert "train-student-config-1" in jobs
    told = {"the dashboard": jobs.encode()} | {path.name: path.read_bytes() for path in cluster.logs()}
    store = s3fs.S3FileSystem()
    told |= {name: store.cat_file(name) for name in store.find("bucket")}
    assert len(told) > 100
    assert not [name for name, text in told.items() if any(secret in text for secret in secrets)]


def test_a_cluster_that_does_not_answer_or_refuses_is_one_sentence(cluster: LocalCluster) -> None:
    cluster.environment["RAY_AUTH_TOKEN"] = "another0123456789another0123456789"
    done = cluster.run("label", "config.yaml")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1), done.stdout
    assert f"error: {cluster.jobs} refuses the token: " in done.stdout
    cluster.environment["RAY_AUTH_TOKEN"] = TOKEN
    for arguments in (("label", "nowhere.yaml"), ("--id", "a/b", "label", "config.yaml"), ("labl", "config.yaml")):
        done = cluster.run(*arguments)
        assert (done.returncode, "error: " in done.stdout) == (2, True), done.stdout
    cluster.jobs = "http://127.0.0.1:9"
    done = cluster.run("label", "config.yaml")
    assert (done.returncode, done.stdout.count("\n")) == (4, 1), done.stdout
    assert "error: http://127.0.0.1:9 does not answer" in done.stdout


def until(there: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.2)
