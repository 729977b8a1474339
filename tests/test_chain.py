"""The chain as its users drive it: whole, again, grown, interrupted, and fed what cannot work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_chain import cli, heed_interrupts, values
from tiny_training import COLORS, THINGS, agreement
from tiny_writers import writer_folder

from relevance_ray import storage
from relevance_ray.chain.folders import STEPS, StepFolders
from relevance_ray.chain.planning import plan_labeling
from relevance_ray.config import build_config
from relevance_ray.data.market import products
from relevance_ray.data.market_queries import judgments, queries
from relevance_ray.data.market_truth import MARKET_SCALE
from relevance_ray.errors import UserError
from relevance_ray.steps import Chain
from relevance_ray.storage import CommitLog


def stored(folder: str) -> float:
    """Gigabytes of a step's data."""
    return sum(path.stat().st_size for path in (Path(folder) / "data").iterdir()) / 1e9


@pytest.mark.usefixtures("ray_cluster")
def test_a_plan_counts_what_a_language_model_as_it_comes_reads(tmp_path: Path, encoder: Path) -> None:
    writer = writer_folder(tmp_path / "writer")
    members = [{"kind": "query_likelihood", "model": str(writer), "max_tokens": 48}, {"kind": "bm25"}]
    config = build_config({**values(tmp_path / "root", encoder), "teacher": {"kind": "ensemble", "members": members}})
    plan = plan_labeling(config, seconds=0.2)
    outcome = Chain(config).run("label")
    assert plan.tokens == pytest.approx(outcome.summaries["label"]["tokens"], rel=0.1)
    assert plan.shards == outcome.summaries["label"]["shards"]
    kept = [path for step in ("generate", "label") for path in Path(outcome.folders[step]).rglob("*") if path.is_file()]
    assert plan.objects == pytest.approx(len(kept), rel=0.2)
    teacher = {"label.model": f"{outcome.folders['train-teacher']}/model"}
    given = build_config(values(tmp_path / "root", encoder), [f"{key}={value}" for key, value in teacher.items()])
    assert plan_labeling(given, seconds=0.2).tokens_per_pair == pytest.approx(plan.tokens_per_pair, rel=0.1)


@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_chain_is_skipped_and_growth_does_only_what_is_new(tmp_path: Path, encoder: Path) -> None:
    said: list[str] = []
    plan = plan_labeling(build_config(values(tmp_path / "root", encoder)), gpu_hour_price=2.0, seconds=0.2)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
    tmp_path = tmp_path / "root"
    first = Chain(build_config(values(tmp_path, encoder)), said.append).run()
    assert [line.split(":")[0] for line in said if "running (" in line] == list(STEPS)
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert set(latest) == {*STEPS, "teacher", "student"}
    assert (Path(latest["student"]) / "relevance.json").is_file()
    report = json.loads((Path(latest["evaluate"]) / "report.json").read_text())
    assert {"student", "teacher", "human_only", "bm25", "random"} <= set(report["splits"]["test"]["models"])
    assert (Path(latest["evaluate"]) / "report.md").is_file()
    assert list((Path(latest["train-student"]) / "tensorboard").glob("events.*"))

    # What was planned against what it took.
    took = first.summaries["label"]
    assert plan.pairs == took["pairs"] == 800
    assert plan.tokens == pytest.approx(took["tokens"], rel=0.1)
    assert plan.label_gigabytes == pytest.approx(stored(first.folders["label"]), rel=0.35)
    assert plan.generate_gigabytes == pytest.approx(stored(first.folders["generate"]), rel=0.35)
    assert plan.pairs_per_second is not None
    assert plan.hours == pytest.approx(800 / plan.pairs_per_second / 3600)
    assert (plan.gpu_hours, plan.cost) == (0.0, 0.0)
    after = plan_labeling(build_config(values(tmp_path, encoder, num_pairs=1000)), pairs_per_second=50.0)
    assert after.sample == "what is generated"
    assert after.pairs_labeled == 800
    assert after.hours == pytest.approx(200 / 50 / 3600)
    assert after.tokens_per_pair == pytest.approx(took["tokens"] / 800, rel=0.02)

    student = Path(first.folders["train-student"])
    hidden = student.rename(tmp_path / "hidden")  # the curve asks for labels alone
    curve, path = Chain(build_config(values(tmp_path, encoder)), said.append).measure_scaling(num_sizes=3)
    hidden.rename(student)
    assert [row["pairs"] for row in curve["sizes"]] == [200, 400, 800]
    assert curve["baselines"].keys() == {"teacher", "human_only", "bm25"}
    assert "Scaling curve" in Path(path).read_text()
    assert "How many pairs it takes" not in (Path(latest["evaluate"]) / "report.html").read_text(), (
        "no student, no report"
    )
    said.clear()
    # The run's own student takes the place of the curve's largest, and is the same.
    assert Chain(build_config(values(tmp_path, encoder)), said.append).measure_scaling(num_sizes=3)[0] == curve
    assert not said, "all students were there"
    assert "How many pairs it takes" in (Path(latest["evaluate"]) / "report.html").read_text()
    assert json.loads((Path(latest["evaluate"]) / "report.json").read_text())["scaling"]["sizes"] == curve["sizes"]

    said.clear()
    again = Chain(build_config(values(tmp_path, encoder)), said.append).run()
    assert len(said) == len(STEPS)
    assert all("done already, skipped" in line for line in said)
    assert again.folders == first.folders

    said.clear()
    before = CommitLog(first.folders["label"]).committed()
    beside = build_config(
        values(tmp_path, encoder, num_pairs=1000), [f"evaluate.models={{of-800: {latest['student']}}}"]
    )
    grown = Chain(beside, said.append).run()
    assert {name: grown.folders[name] == first.folders[name] for name in STEPS} == {
        "prepare": True,
        "train-teacher": True,
        "generate": True,
        "label": True,
        "train-student": False,
        "evaluate": False,
    }
    assert "label: 4 of 5 shards were labeled before and were skipped" in said
    assert before.items() <= CommitLog(grown.folders["label"]).committed().items()
    assert not any("human labels alone" in line for line in said), "the baseline does not depend on the pairs"
    compared = json.loads((Path(grown.folders["evaluate"]) / "report.json").read_text())["splits"]["test"]["models"]
    assert compared["of-800"]["metrics"] == report["splits"]["test"]["models"]["student"]["metrics"]
    assert compared["of-800"]["metrics"] != compared["student"]["metrics"]
    moved = tmp_path / "moved"
    shutil.copytree(latest["student"], moved)
    beside = build_config(values(tmp_path, encoder, num_pairs=1000), [f"evaluate.models={{of-800: {moved}}}"])
    assert StepFolders(beside).folder("evaluate") == grown.folders["evaluate"]
    (moved / "changed").touch()
    assert StepFolders(beside).folder("evaluate") != grown.folders["evaluate"]

    said.clear()
    back = Chain(build_config(values(tmp_path, encoder)), said.append).run()
    assert back.folders == first.folders
    assert not any("human labels alone" in line for line in said)

    given = values(tmp_path, encoder)
    given["label"] = {"model": latest["teacher"]}
    labeled = Chain(build_config(given), said.append).run("label")
    assert list(labeled.folders) == ["prepare", "generate", "label"]
    tables = [
        CommitLog(folder).read(sorted(before)[0]) for folder in (labeled.folders["label"], first.folders["label"])
    ]
    assert tables[0].equals(tables[1])
    info = json.loads((Path(latest["teacher"]) / "relevance.json").read_text())
    info["scale"]["gains"][1] = 0.2
    other = tmp_path / "other_scale"
    shutil.copytree(latest["teacher"], other)
    (other / "relevance.json").write_text(json.dumps(info))
    given["label"] = {"model": str(other)}
    with pytest.raises(UserError, match="give a model of the same scale"):
        Chain(build_config(given), said.append).run("label")
    said.clear()
    fresh = build_config(values(tmp_path / "fresh", encoder), [f"evaluate.models={{other: {other}}}"])
    with pytest.raises(UserError, match=r"evaluate\.models\.other .* give a model of the same scale"):
        Chain(fresh, said.append).run()
    assert [line.split(":")[0] for line in said] == ["prepare"]


def write_shop(folder: Path, num_new: int) -> None:
    """A shop's files: 400 products with their judgments, and so many new products before and between them, with new
    queries of the log."""
    folder.mkdir()
    catalog = products(0, 0, 400 + num_new)
    order = [*range(400, 400 + num_new // 2), *range(200), *range(400 + num_new // 2, 400 + num_new), *range(200, 400)]
    pq.write_table(catalog.take(order), folder / "products.parquet")
    judged = judgments(0, 400)
    pq.write_table(judged.select(["query_id", "query", "product_id", "grade"]), folder / "judgments.parquet")
    texts = queries(0, 500, 700 + num_new)
    pq.write_table(pa.table({"query": texts, "frequency": [1] * len(texts)}), folder / "log.parquet")


@pytest.mark.usefixtures("ray_cluster")
def test_a_nightly_catalog_keeps_its_teacher_and_labels_only_what_is_new(tmp_path: Path, encoder: Path) -> None:
    runs = []
    for night, num_new in enumerate((0, 8)):
        shop = tmp_path / f"night-{night}"
        write_shop(shop, num_new)
        run = values(tmp_path / "root", encoder, source="log", num_pairs=1200)
        run["resources"]["train_workers"] = 1
        run["data"] = {
            "format": "generic",
            "path": str(shop),
            "queries": str(shop / "log.parquet"),
            "scale": MARKET_SCALE.to_dict(),
        }
        runs.append(Chain(build_config(run)).run("label"))
    first, second = runs
    assert second.folders["prepare"] != first.folders["prepare"]
    assert second.folders["train-teacher"] == first.folders["train-teacher"]
    assert second.folders["label"] == first.folders["label"]
    summary = second.summaries["label"]
    assert summary["pairs"] == 1200
    # 2% of the products and 4% of the queries are new.
    assert 0.85 * 1200 < summary["reused"] < 1200


@pytest.mark.usefixtures("ray_cluster")
def test_ctrl_c_while_labeling_loses_nothing_that_was_committed(tmp_path: Path, encoder: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values(tmp_path / "root", encoder, num_pairs=4000, groups_per_shard=5)))
    command = [sys.executable, "-m", "relevance_ray.cli", "label", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "root").glob("label-*/commits/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; the same command goes on from here" in output
    assert "Traceback" not in output
    (folder,) = (tmp_path / "root").glob("label-*")
    kept = CommitLog(str(folder)).committed()
    assert 0 < len(kept) < 100

    done = cli("label", str(config))
    assert done.returncode == 0, done.stderr
    assert "train-teacher: done already, skipped" in done.stdout
    assert f"label: {len(kept)} of 100 shards were labeled before and were skipped" in done.stdout
    after = CommitLog(str(folder)).committed()
    assert kept.items() <= after.items()
    assert sum(record["pairs"] for record in after.values()) == 4000


@pytest.mark.usefixtures("ray_cluster")
def test_pairs_and_labels_of_ones_own_replace_generation_and_teacher(tmp_path: Path, encoder: Path) -> None:
    """The README's way into the chain; one pair without a label is one failed row, and exit code 3 says so."""
    shop = tmp_path / "shop"
    shop.mkdir()
    products = [f"{color} {thing}" for color in COLORS for thing in THINGS]
    (shop / "products.csv").write_text("product_id,title\n" + "".join(f"{title},{title}\n" for title in products))
    judged = [(query, product, agreement(query, product)) for query in products for product in products[::3]]
    rows = [f"{query},{product},{int(grade == 2)}\n" for query, product, grade in judged]
    (shop / "judgments.csv").write_text("query,product_id,grade\n" + "".join(rows))
    typed = [f"the {title}" for title in products]
    pairs = [(query, product) for query in typed for product in products[:8]]
    (shop / "pairs.csv").write_text("query,product_id\n" + "".join(f"{q},{p}\n" for q, p in pairs))
    labels = [f"{q},{p},{float(agreement(q, p))}\n" for q, p in pairs]
    (shop / "labels.csv").write_text("query,product_id,logit\n" + "".join(labels))
    config = tmp_path / "run.yaml"
    settings = values(tmp_path / "root", encoder) | {
        "data": {"format": "generic", "path": str(shop), "scale": "binary"},
        "generate": {"source": "file", "pairs_file": str(shop / "pairs.csv"), "num_pairs": 8, "groups_per_shard": 4},
        "label": {"engine": "file", "path": str(shop / "labels.csv")},
    }
    settings.pop("teacher")
    config.write_text(yaml.safe_dump(settings))
    refused = cli("label", str(config), "--set", "generate.num_pairs=100000")
    assert refused.returncode == 2
    assert "num_pairs" in refused.stderr

    number = settings["generate"]["num_pairs"]
    assert cli("label", str(config)).returncode == 0
    (folder,) = (tmp_path / "root").glob("label-*")
    (record,) = CommitLog(str(folder)).committed().values()
    assert (record["pairs"], record["errors"]) == (number, 0)

    first = CommitLog(str(folder)).read(next(iter(CommitLog(str(folder)).committed()))).to_pylist()[0]
    missing = f"{first['query']},{first['products'][0]['product_id']},"
    (shop / "labels.csv").write_text(
        "query,product_id,logit\n" + "".join(line for line in labels if not line.startswith(missing))
    )
    failed = cli("label", str(config))
    assert failed.returncode == 3, failed.stderr
    assert "1 rows could not be labeled" in failed.stderr

    (shop / "labels.csv").write_text("query,product\nred,1\n")
    broken = cli("label", str(config))
    assert broken.returncode == 2
    assert "labels.csv lacks the column product_id" in broken.stderr
    assert "Traceback" not in broken.stderr


@pytest.mark.slow
def test_a_chain_lives_on_s3(s3_server: None, tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "run.yaml"
    workers = {"train_workers": 2, "cpus_per_label_actor": 1}
    run = values(tmp_path, encoder) | {"storage": {"root": "s3://bucket/chain"}, "resources": workers}
    config.write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "relevance_ray.cli", "run", str(config)]  # its Ray knows this S3
    first = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert first.returncode == 0, first.stderr
    latest = storage.read_json("s3://bucket/chain/latest.json")
    assert (storage.localize(latest["student"]) / "relevance.json").is_file()
    assert storage.exists(storage.join(latest["evaluate"], "report.md"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done already, skipped") == len(STEPS)


@pytest.mark.usefixtures("ray_cluster")
def test_what_failed_is_told_by_status_and_retried_alone(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**values(root, encoder), "label": {"engine": "oracle"}}))
    assert cli("generate", str(config)).returncode == 0
    chain = Chain(build_config(yaml.safe_load(config.read_text())))
    given_up, *others = chain.at.shards()
    failed = Path(chain.at.folder("label"), "failed", f"{given_up.label_name}.json")
    storage.write_json(str(failed), {"error": "RuntimeError: out of memory", "run": "x"})

    first = cli("label", str(config))
    assert first.returncode == 3, first.stderr
    assert f"1 shards were set aside ({given_up.label_name}: RuntimeError: out of memory)" in first.stderr
    assert f"relevance-ray retry-failed {root}" in first.stderr
    shown = cli("status", str(root))
    assert shown.returncode == 0, shown.stderr
    label_line = next(line for line in shown.stdout.splitlines() if line.startswith("label"))
    assert f"{len(others)} shards" in label_line
    assert "1 shards set aside" in label_line
    assert "no driver is at work" in shown.stdout

    # A retry that is killed leaves a step that is not done, and still knows what failed.
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("relevance_ray.labeling.pipeline.label", die)
        patch.setattr("relevance_ray.chain.tools.StepTools.ray", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            chain.retry_failed()
    refused = cli("retry-failed", str(root))
    assert (refused.returncode, "is not finished yet" in refused.stderr) == (2, True)
    assert cli("label", str(config)).returncode == 3

    again = cli("retry-failed", str(root), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert not failed.exists()
    assert len(chain.at.labeled_shards()) == len(others) + 1
    assert cli("label", str(config)).returncode == 0
