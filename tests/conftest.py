"""Fixtures that tests share: the real data where it is present, and one Ray cluster for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from relevance_ray.quiet import quiet_libraries

quiet_libraries()
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; a test that needs it is skipped, with this message, where it is absent."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("RELEVANCE_RAY_TEST_DATA", default)).resolve()
    if not (folder / "esci").is_dir():
        pytest.skip(f"real data not found in {folder}; set RELEVANCE_RAY_TEST_DATA to the folder that holds esci/")
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of one random layer."""
    from tiny_training import build_tiny_encoder

    return build_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder", num_layers=1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests: 4 logical CPUs, so that a pool of actors never starves the stage that feeds it."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The root of a labeling job (`labeling_job.py`) that nothing disturbed."""
    from labeling_runs import finish, start

    root = str(tmp_path_factory.mktemp("undisturbed"))
    finish(start(root, 0.0))
    return root


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """An S3 of our own with an empty bucket `bucket`, and the environment that points to it."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
