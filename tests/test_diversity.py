"""Diversity of generated groups: figures by hand, drift that is planted, memory, scripts, labels, the report's files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from small_catalog import BRANDS, COLORS, TYPES, make_products, product_table
from typer.testing import CliRunner

from relevance_ray import storage
from relevance_ray.chain.diversity import report_diversity
from relevance_ray.cli import app
from relevance_ray.config import build_config
from relevance_ray.generate.diversity.measure import Diversity, measure_diversity
from relevance_ray.generate.diversity.plots import drawable
from relevance_ray.generate.diversity.report import render_markdown, twenty_groups, warning_lines, write_diversity
from relevance_ray.schema import GROUP, LABELED_GROUP, QUERY, SCALES
from relevance_ray.steps import Chain

PRODUCTS = make_products()
CATALOG = product_table(PRODUCTS)


def group(
    query: str, products: list[dict], source: str = "log", origins: list[list[tuple[str, int]]] | None = None
) -> dict:
    found = origins or [[("bm25", rank)] for rank in range(1, len(products) + 1)]
    return {
        "query_id": query,
        "query": query,
        "query_source": source,
        "products": [
            {
                "pair_id": 0,
                "product_id": product["product_id"],
                "fields": {key: product.get(key) for key in ("title", "brand", "color", "category")},
                "origins": [{"name": name, "rank": rank} for name, rank in names],
            }
            for product, names in zip(products, found, strict=True)
        ],
    }


def groups_of(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=GROUP)


def log_of(queries: list[str], frequencies: list[int] | None = None) -> pa.Table:
    rows = [
        {"query": query, "frequency": frequencies[index] if frequencies else 1} for index, query in enumerate(queries)
    ]
    return pa.Table.from_pylist(rows, schema=QUERY)


def usual_queries(count: int, seed: int) -> list[str]:
    """Different queries as one shop's customers would type them."""
    rng = random.Random(seed)
    out: set[str] = set()
    while len(out) < count:
        words = [rng.choice(COLORS), rng.choice(TYPES)]
        if rng.random() < 0.3:
            words.insert(0, rng.choice(BRANDS).lower())
        if rng.random() < 0.2:
            words.append(f"size {rng.randrange(30, 50)}")
        if rng.random() < 0.3:
            words.append(rng.choice(["for kids", "cheap", "sale", "new", "waterproof", "used", "xl"]))
        out.add(" ".join(words))
    return sorted(out, key=lambda query: rng.random())


def random_groups(queries: list[str], seed: int, products: list[dict] = PRODUCTS, source: str = "log") -> pa.Table:
    rng = random.Random(seed)
    return groups_of([group(query, rng.sample(products, 4), source) for query in queries])


# The report


def test_figures_of_a_small_set_by_hand() -> None:
    catalog = product_table(
        [
            {"product_id": "a", "title": "A", "brand": "Acme", "category": "Home > Lamps"},
            {"product_id": "b", "title": "B", "brand": "ACME", "category": "Home > Rugs"},
            {"product_id": "c", "title": "C", "brand": "Bolt", "category": "Garden > Hoses"},
            {"product_id": "d", "title": "D"},
        ]
    )
    a, b, _, d = catalog.to_pylist()
    table = groups_of(
        [
            group("acme lamps", [a, b], origins=[[("bm25", 1), ("dense", 7)], [("category", 0)]]),
            group("Red Hose", [a, d], "titles", [[("bm25", 12)], []]),
        ]
    )
    report = measure_diversity([table.slice(0, 1), table.slice(1)], [catalog.slice(0, 2), catalog.slice(2)], log_of([]))
    assert (report["groups"], report["pairs"], report["catalog_products"]) == (2, 4, 4)
    products = report["products"]
    assert (products["different"], products["exact"], products["catalog_share"], products["max_uses"]) == (
        3,
        True,
        0.75,
        2,
    )
    assert products["top_1_percent_share"] == 0.5
    assert report["origins"] == {
        "first": {"bm25": 2, "category": 1, "none": 1},
        "any": {"bm25": 2, "category": 1, "dense": 1},
    }
    assert report["ranks"] == {"bm25": {"1": 1, "11-30": 1}, "category": {"no rank": 1}, "none": {"no rank": 1}}
    leaf, top, brands = report["categories"]["leaf"], report["categories"]["top"], report["brands"]
    assert (leaf["in_catalog"], leaf["used"], leaf["coverage"]) == (3, 2, pytest.approx(2 / 3))
    assert (top["coverage"], top["coverage_of_products"]) == (0.5, pytest.approx(2 / 3))
    assert top["under"] == [{"name": "Garden", "catalog": pytest.approx(1 / 3), "candidates": 0.0}]
    assert top["over"][0]["name"] == "Home"
    assert (brands["in_catalog"], brands["used"]) == (2, 1)
    everything = report["queries"]["all"]
    assert everything["length"]["words"]["mean"] == 2
    assert everything["length"]["chars"]["mean"] == 9
    assert everything["types"]["brand"] == everything["types"]["category"] == 0.5
    assert report["queries"]["source titles"]["types"]["brand"] == 0
    assert report["grades"] is None
    assert report["not_checked"] == "there is no query log, so drift from it could not be checked"


def test_groups_like_the_log_and_the_catalog_are_not_warned_of() -> None:
    queries = usual_queries(900, seed=0)
    report = measure_diversity([random_groups(queries[:300], 0)], [CATALOG], log_of(queries[300:]))
    assert report["warnings"] == []
    assert not report["not_checked"]
    assert warning_lines(report) == ["no drift from the query log or the catalog's categories was found"]
    assert len(report["checks"]) == 9


def test_queries_of_one_word_are_warned_of() -> None:
    queries = usual_queries(600, seed=0)
    short = [f"{color}{kind.split()[0]}" for color in COLORS for kind in TYPES]
    report = measure_diversity([random_groups(short, 0)], [CATALOG], log_of(queries))
    drifting = {check["figure"] for check in report["checks"] if check["drifts"]}
    assert {"length in words", "type single word", "vocabulary"} <= drifting
    assert any("1.0 words on average" in sentence for sentence in report["warnings"])
    assert any('100% of the generated queries are of type "single word"' in sentence for sentence in report["warnings"])


def test_category_that_is_left_out_is_warned_of_by_name() -> None:
    products = [product | {"category": f"{product['color']} things > x"} for product in PRODUCTS[:-1]]
    queries = usual_queries(900, seed=0)
    kept = [product for product in products if product["color"] != "pink"]
    report = measure_diversity(
        [random_groups(queries[:300], 0, kept)], [product_table(products)], log_of(queries[300:])
    )
    assert report["warnings"] == ['Category "pink things" holds 16.3% of the catalog and 0.0% of the candidates.']


def test_source_that_drifts_within_a_set_that_does_not_is_named() -> None:
    queries = usual_queries(900, seed=0)
    odd = [f"{word}{number}" for word in ("zz", "yy") for number in range(10)]
    tables = [random_groups(queries[:400], 0), random_groups(odd, 1, source="llm")]
    report = measure_diversity(tables, [CATALOG], log_of(queries[400:]))
    assert report["warnings"] == []
    assert list(report["source_warnings"]) == ["llm"]
    assert "of source llm alone: " in render_markdown(report)


@pytest.mark.parametrize("count", [0, 10])
def test_log_that_is_missing_or_too_small_is_said(count: int) -> None:
    report = measure_diversity([random_groups(["red lamp"], 0)], [CATALOG], log_of(usual_queries(count, 0)))
    assert "could not be checked" in report["not_checked"]
    assert report["not_checked"] in render_markdown(report)


def test_memory_stays_within_its_bounds_for_ten_times_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from relevance_ray.generate.diversity import measure, query_figures

    monkeypatch.setattr(measure, "PRODUCTS_KEPT", 256)
    monkeypatch.setattr(measure, "NAMES_KEPT", 64)
    monkeypatch.setattr(query_figures, "MAX_TEXTS", 128)

    def tables(count: int) -> Iterator[pa.Table]:
        for part in range(count):
            rows = []
            for index in range(part * 50, part * 50 + 50):
                numbered = {"title": "t", "brand": f"brand{index}", "category": f"c{index % 7} > leaf{index}"}
                rows.append(group(f"query {index}", [numbered | {"product_id": f"{index}-{i}"} for i in range(4)]))
            yield groups_of(rows)

    def kept(measured: Diversity) -> int:
        samples = (measured._uses, measured._found.leaf, measured._found.brand, measured._queries.sample)
        return sum(len(sample.counts) for sample in samples)

    bound = 256 + 2 * 64 + 128
    for count in (10, 100):
        measured = Diversity([CATALOG], log_of([]))
        for table in tables(count):
            measured.add(table)
        assert kept(measured) <= bound
        report = measured.report()
        assert report["groups"] == 50 * count
        assert report["products"]["different"] == pytest.approx(200 * count, rel=0.3)
        assert not report["products"]["exact"]
        assert "about " in render_markdown(report)


def labeled(rows: list[dict], logits: list[list[list[float] | None]]) -> pa.Table:
    for row, found in zip(rows, logits, strict=True):
        for product, classes in zip(row["products"], found, strict=True):
            product |= {
                "class_logits": classes,
                "logit": classes and classes[-1],
                "error": None if classes else "timed out",
            }
    return pa.Table.from_pylist(rows, schema=LABELED_GROUP)


def test_grades_by_origin_source_and_rank() -> None:
    a, b, c = PRODUCTS[:3]
    origins = [[("bm25", 1)], [("bm25", 2)], [("random", 0)]]
    rows = [group("red lamp", [a, b, c], "log", origins), group("wool hat", [a, b, c], "titles", origins)]
    best, worst = [-9.0, -9.0, 9.0], [9.0, -9.0, -9.0]
    table = labeled(rows, [[best, worst, worst], [best, best, None]])
    grades = measure_diversity([table.slice(0, 1), table.slice(1)], [CATALOG], log_of([]), SCALES["wands"])["grades"]
    assert (grades["labeled"], grades["failed"], grades["groups"]) == (5, 1, 2)
    assert grades["grades"] == {"Irrelevant": 2, "Partial": 0, "Exact": 3}
    assert grades["by"]["origin"]["bm25"]["grades"] == {"Irrelevant": 1, "Partial": 0, "Exact": 3}
    assert grades["by"]["origin"]["bm25"]["mean_gain"] == pytest.approx(0.75, abs=1e-3)
    assert grades["by"]["origin"]["random"]["pairs"] == 1
    assert grades["by"]["source"]["titles"]["grades"]["Exact"] == 2
    assert list(grades["by"]["rank"]) == ["no rank", "1", "2-3"]
    assert grades["one_grade_share"] == 0.5
    assert grades["one_grade_share_by_source"] == {"log": 0.0, "titles": 1.0}
    assert grades["mean_logit_range"] == pytest.approx(9.0)


def test_report_files_are_written_and_tell_the_same(tmp_path: Path) -> None:
    rows = [group(query, PRODUCTS[:2]) for query in usual_queries(40, 0)]
    table = labeled(rows, [[[0.0, 2.0, 1.0], [1.0, 0.0, 0.5]]] * 40)
    report = measure_diversity([table], [CATALOG], log_of(usual_queries(200, 1)), SCALES["wands"])
    path = write_diversity(report, str(tmp_path / "out"), about={"read": "everything"})
    assert Path(path) == tmp_path / "out" / "diversity.md"
    loaded = json.loads((tmp_path / "out" / "diversity.json").read_text())
    assert loaded == json.loads(json.dumps({"about": {"read": "everything"}, **report}))
    pictures = {file.name for file in (tmp_path / "out").glob("*.png")}
    assert pictures == {"lengths.png", "types.png", "categories.png", "origins.png", "grades.png"}
    markdown = Path(path).read_text()
    assert all(f"]({name})" in markdown for name in pictures)
    assert "| origin | bm25 | 80 | 50.0% | 50.0% | 0.0% |" in markdown
    unlabeled = measure_diversity([random_groups(["red lamp"], 0)], [CATALOG], log_of([]))
    write_diversity(unlabeled, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "grades.png").exists()


def test_japanese_and_spanish_catalog_is_reported_and_drawn(tmp_path: Path) -> None:
    products = [
        {"product_id": "1", "title": "赤い靴 27cm", "brand": "ソニー", "category": "ファッション | 靴 > 赤"},
        {"product_id": "2", "title": "Zapatillas de niño $5$", "brand": "Niño", "category": "Moda_$x$ > Zapatos"},
    ]
    table = groups_of([group("ソニー 赤い靴 用", products), group("zapatillas para niño", products, "titles")])
    report = measure_diversity([table], [product_table(products)], log_of(["赤い靴", "zapatillas niño"]))
    write_diversity(report, str(tmp_path))
    assert (
        report["queries"]["source log"]["types"]["brand"] == report["queries"]["source titles"]["types"]["brand"] == 1
    )
    assert report["queries"]["all"]["types"]["question or use"] == 1
    assert "ファッション \\| 靴" in (tmp_path / "diversity.md").read_text()
    assert drawable("靴", 3) == "no. 3 of the table"
    assert drawable("Niño", 3) == "Niño"
    assert (tmp_path / "categories.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_generated_is_reported_without_a_crash(tmp_path: Path) -> None:
    report = measure_diversity([groups_of([])], [CATALOG], log_of(usual_queries(60, 0)))
    assert report["groups"] == 0
    write_diversity(report, str(tmp_path))
    one = groups_of([group("red lamp", [])])
    write_diversity(measure_diversity([one], [CATALOG], log_of(usual_queries(60, 0))), str(tmp_path))


def test_groups_to_read_are_seeded_and_show_origins_and_grades() -> None:
    queries = usual_queries(200, 0)
    tables = [random_groups(queries[:100], 0), random_groups(queries[100:], 0)]
    text = twenty_groups(tables, n=5, seed=1)
    assert text == twenty_groups(tables, n=5, seed=1) != twenty_groups(tables, n=5, seed=2)
    assert text.count("[log]") == 5
    assert "<- bm25 1" in text
    rows = [group("red lamp", PRODUCTS[:2])]
    graded = twenty_groups([labeled(rows, [[[0.0, 0.0, 3.0], None]])], scale=SCALES["wands"])
    assert "  Exact +3.00" in graded
    assert "  failed" in graded


# The command


@pytest.mark.usefixtures("ray_cluster", "s3_server")
def test_command_reports_what_was_generated_and_later_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path / "cache"))
    root = str(tmp_path / "root")
    config = {
        "data": {"market_size": 300},
        "storage": {"root": root},
        "generate": {"num_pairs": 800, "groups_per_shard": 10, "quotas": {"bm25": 4, "category": 2, "random": 2}},
        "label": {"engine": "oracle"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    ran = CliRunner().invoke(app, ["diversity", str(path)])
    assert ran.exit_code == 0, ran.output
    chain = Chain(build_config(config))
    folder = storage.join(chain.at.folder("generate"), "diversity")
    assert f"report: {folder}/diversity.md" in ran.output
    report = storage.read_json(storage.join(folder, "diversity.json"))
    assert (report["groups"], report["pairs"], report["grades"]) == (100, 800, None)
    summary = storage.read_json(storage.join(chain.at.folder("generate"), "step.json"))["summary"]
    assert report["origins"]["first"] == summary["origins"]
    assert storage.read_bytes(storage.join(folder, "groups.txt")).count(b"<-") == 20 * 8

    chain.run("label")
    part, _ = report_diversity(chain.at, max_pairs=240)
    assert part["read"] == {"shards": 3, "of_shards": 10, "labeled_shards": 3, "seed": 0}
    assert part["pairs"] == part["grades"]["labeled"] == 240
    assert {"diversity.json", "diversity.md", "grades.png", "groups.txt"} <= set(storage.listdir(folder))
    assert "3 of 10 shards" in storage.read_bytes(storage.join(folder, "diversity.md")).decode()
    assert chain.at.is_done("generate")

    storage.publish_folder(Path(root), "s3://bucket/diversity")
    remote = Chain(build_config(config | {"storage": {"root": "s3://bucket/diversity"}}))
    there, markdown = report_diversity(remote.at, max_pairs=240)
    assert there == part
    assert markdown.startswith("s3://bucket/diversity/generate-")
    assert storage.read_bytes(markdown).startswith(b"# Diversity")
