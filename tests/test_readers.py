"""The public layouts as published, real and in small, and every way in which data can be bad."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from relevance_ray.chain.folders import StepFolders
from relevance_ray.config import Config, StorageOptions
from relevance_ray.data.files import blocks, query_log
from relevance_ray.data.prepare import iter_products, prepare, read_judged, read_queries, read_scale
from relevance_ray.data.readers import files_read, open_source
from relevance_ray.data.source import DataOptions
from relevance_ray.data.splits import check_no_leak
from relevance_ray.errors import UserError
from relevance_ray.row_files import RowReader
from relevance_ray.schema import JUDGED_GROUP, JUDGMENT, PRODUCT, QUERY, pair_id

NUM_QUERIES = 60
QUERIES = [f"{animal} number{chr(97 + i)}{i * 37}" for i, animal in enumerate(["cat", "dog", "emu", "fox"] * 15)]


def esci_judgments(**changes: list[Any]) -> pa.Table:
    columns = {
        "query_id": list(range(NUM_QUERIES)),
        "query": QUERIES,
        "product_id": [f"B{i % 5}" for i in range(NUM_QUERIES)],
        "product_locale": ["us"] * NUM_QUERIES,
        "esci_label": ["E", "S", "C", "I"] * 15,
        "split": ["test"] * 10 + ["train"] * 50,
    }
    return pa.table(columns | changes)


def esci_products(num: int = 5, **changes: list[Any]) -> pa.Table:
    columns = {
        "product_id": [f"B{i}" for i in range(num)],
        "product_title": [f"thing {i}" for i in range(num)],
        "product_description": [None] * num,
        "product_bullet_point": ["soft\nwarm"] * num,
        "product_brand": ["Acme"] * num,
        "product_color": ["red"] * num,
        "product_locale": ["us"] * num,
    }
    return pa.table(columns | changes)


def write_esci(folder: Path, judgments: pa.Table | None = None, products: pa.Table | None = None) -> DataOptions:
    folder.mkdir(exist_ok=True)
    pq.write_table(
        esci_judgments() if judgments is None else judgments, folder / "shopping_queries_dataset_examples.parquet"
    )
    pq.write_table(
        esci_products() if products is None else products, folder / "shopping_queries_dataset_products.parquet"
    )
    return DataOptions(format="esci", path=str(folder))


def test_prepare_writes_every_file_in_its_schema(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = prepare(write_esci(tmp_path / "esci"), out)
    assert pq.read_table(out / "judgments.parquet").schema.equals(JUDGMENT)
    groups = read_judged(out)
    assert groups.schema.equals(JUDGED_GROUP)
    assert read_queries(out).schema.equals(QUERY)
    products = list(iter_products(out))
    assert [table.schema.equals(PRODUCT) for table in products] == [True]
    assert products[0].slice(0, 1).to_pylist()[0]["bullets"] == "soft\nwarm"
    assert read_scale(out).grades == ("I", "C", "S", "E")
    assert summary["products"] == 5
    assert summary["queries_by_split"]["test"] == 10
    assert sum(summary["queries_by_split"].values()) == groups.num_rows == NUM_QUERIES
    row = groups.slice(0, 1).to_pylist()[0]
    assert row["products"][0]["pair_id"] == pair_id(row["query"], "B0", "us")
    assert row["products"][0]["soft_target"] == pytest.approx(0.9 + 0.1 * 0.1)  # E, a tenth of it leaked to S
    assert row["products"][0]["origins"] == [{"name": "human", "rank": 0}]
    assert sorted(path.name for path in out.iterdir()) == [
        "held_out_log.parquet", "judged_groups.parquet", "judgments.parquet", "products", "queries.parquet", "scale.json",
    ]  # fmt: skip


def test_judgments_that_repeat_a_pair_are_counted_and_other_grades_named(tmp_path: Path) -> None:
    once = esci_judgments()
    other = esci_judgments(esci_label=["I"] * NUM_QUERIES)
    judged = pa.concat_tables([once, once.slice(7, 3), other.slice(20, 1)])
    summary = prepare(write_esci(tmp_path / "esci", judgments=judged), tmp_path / "out")
    assert summary["repeated_judgments_dropped"] == 4
    conflict = summary["of_another_grade"]
    assert conflict["count"] == 1
    assert conflict["first"][0].endswith(f"row 64: query {QUERIES[20]!r}, product 'B0' is I, in row 21 E")
    assert summary["judgments"] == NUM_QUERIES


def test_prepare_twice_gives_the_same_files(tmp_path: Path) -> None:
    options = write_esci(tmp_path / "esci")
    assert prepare(options, tmp_path / "a") == prepare(options, tmp_path / "b") == prepare(options, tmp_path / "a")
    for name in ("judged_groups.parquet", "queries.parquet", "products/products-00000.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_log_holds_no_held_out_query_nor_its_near_duplicates(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(f"query,frequency\nred shoes,7\nRED  shoes,3\n{QUERIES[0].upper()},9\nnumbera0 - cat,5\n,4\n")
    options = write_esci(tmp_path / "esci")
    summary = prepare(DataOptions(format="esci", path=options.path, queries=str(log)), tmp_path / "out")
    queries = read_queries(tmp_path / "out").to_pylist()
    assert queries[0] == {"query": "red shoes", "frequency": 7, "locale": None}
    assert QUERIES[0] not in {row["query"].lower() for row in queries}
    assert summary["log_queries_held_back"] == 2


BAD_ESCI = {
    "missing column": (
        lambda f: write_esci(f, judgments=esci_judgments().drop_columns(["esci_label"])),
        r"examples.parquet lacks the column 'esci_label'",
    ),
    "unknown grade": (
        lambda f: write_esci(f, judgments=esci_judgments(esci_label=["E"] * 16 + ["X"] + ["S"] * 43)),
        r"examples.parquet, row 17: grade 'X' is none of I, C, S, E",
    ),
    "no title anywhere": (
        lambda f: write_esci(f, products=esci_products(product_title=[" "] * 5)),
        r"none of the \d+ products has a title; name the column that holds it in data.columns",
    ),
    "empty catalog": (lambda f: write_esci(f, products=esci_products(0)), r"products.parquet holds no product"),
    "no judgment": (lambda f: write_esci(f, judgments=esci_judgments().slice(0, 0)), "holds no judgment"),
    "product not in the catalog": (
        lambda f: write_esci(f, products=esci_products(4)),
        r"row 5: product 'B4' is not in .*products.parquet; add the product or drop",
    ),
    "empty query": (
        lambda f: write_esci(f, judgments=esci_judgments(query=[*QUERIES[:2], "  ", *QUERIES[3:]])),
        r"examples.parquet, row 3: the query is empty",
    ),
    "not parquet": (
        lambda f: (write_esci(f), (f / "shopping_queries_dataset_products.parquet").write_text("hello")),
        r"products.parquet is no readable Parquet file",
    ),
    "repeated product": (
        lambda f: write_esci(f, products=esci_products(6, product_id=["B0", "B1", "B2", "B3", "B4", "B2"])),
        r"product_id 'B2' is there twice, as products 3 and 6;",
    ),
    "several locales": (
        lambda f: write_esci(f, judgments=esci_judgments(product_locale=["us", "jp"] * 30)),
        r"holds the locales jp, us; set data.locale",
    ),
    "one id for two queries": (
        lambda f: write_esci(f, judgments=esci_judgments(query_id=[0, 0, *range(2, 60)])),
        r"row 2: query_id '0' has the queries",
    ),
    "unknown split": (
        lambda f: write_esci(f, judgments=esci_judgments(split=["test"] * 59 + ["tset"])),
        r"row 60: split 'tset' is none of train, dev, test",
    ),
}


@pytest.mark.parametrize("name", BAD_ESCI)
def test_bad_data_is_refused_in_one_sentence_and_leaves_nothing_written(name: str, tmp_path: Path) -> None:
    write, message = BAD_ESCI[name]
    write(tmp_path / "esci")
    with pytest.raises(UserError, match=message) as caught:
        prepare(DataOptions(format="esci", path=str(tmp_path / "esci")), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for data_format in ("esci", "wands", "homedepot", "chorus"):
        with pytest.raises(UserError, match=r"nowhere.* does not exist; check data.path"):
            open_source(DataOptions(format=data_format, path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="nowhere"):
        open_source(DataOptions(format="generic", path=str(tmp_path / "nowhere"), scale="binary"))


def test_wands_in_its_published_layout(tmp_path: Path) -> None:
    queries = ["query_id\tquery\tquery_class", "0\tsalon chair\tChairs", "1\tsmart lamp\tLamps"]
    labels = ["id\tquery_id\tproduct_id\tlabel", "0\t0\t7\tExact", "1\t0\t8\tIrrelevant", "2\t1\t7\tPartial"]
    (tmp_path / "query.csv").write_text("\n".join(queries) + "\n")
    (tmp_path / "label.csv").write_text("\n".join(labels) + "\n")
    names = ["product_id", "product_name", "product_class", "category hierarchy", "product_description"]
    header = "\t".join([*names, "product_features", "rating_count"]) + "\n"
    features = "overallwidth : 64.7|material : wood|material : foam|broken"
    (tmp_path / "product.csv").write_text(
        header + f'7\tsolid chair\tChairs\tFurniture / Seating / Chairs\t"a chair, with ""arms"""\t{features}\t15.0\n'
        "8\tlamp\tLamps\t\t\t\t\n"
    )
    source = open_source(DataOptions(format="wands", path=str(tmp_path)))
    assert source.judgments["query"].to_pylist() == ["salon chair", "salon chair", "smart lamp"]
    assert source.judgments["grade"].to_pylist() == ["Exact", "Irrelevant", "Partial"]
    chair, lamp = next(source.products()).to_pylist()
    assert chair["category"] == "Furniture > Seating > Chairs"
    assert chair["description"] == 'a chair, with "arms"'
    assert chair["attributes"] == [("overallwidth", "64.7"), ("material", "wood, foam")]
    assert (lamp["category"], lamp["attributes"]) == ("Lamps", None)


def test_home_depot_is_latin_1_with_titles_only(tmp_path: Path) -> None:
    header = '"id","product_uid","product_title","search_term","relevance"\n'
    text = header + '2,1,"5° Br&amp;S","Angle",2.33\n3,1,"other","l",3\n'
    (tmp_path / "train.csv").write_bytes(text.encode("latin-1"))
    source = open_source(DataOptions(format="homedepot", path=str(tmp_path)))
    assert [row["title"] for table in source.products() for row in table.to_pylist()] == ["5° Br&S"]
    assert source.judgments["grade"].to_pylist() == ["2.33", "3"]


def test_chorus_votes_attributes_and_prices(tmp_path: Path) -> None:
    attributes = {"attr_t_product_colour": "Red", "attr_n_weight": 12.0, "attr_b_wifi": True}
    columns = {"id": ["1", "2"], "title": ["a", "b"], "short_description": ["x", None], "supplier": ["HP", "LG"]}
    columns |= {"price": [395, 1000], "attributes": [json.dumps(attributes), None]}
    pq.write_table(pa.table(columns), tmp_path / "products.parquet")
    (tmp_path / "Broad_Query_Set_rated.csv").write_text("query,docid,rating\nlaptop,1,3\nlaptop,2,0\n")
    (tmp_path / "Broad_Query_Set_individual_ratings.csv").write_text(
        "query,docid,name,description,agent_1_rating,agent_2_rating,agent_3_rating,final_rating\nlaptop,1,a,,3,3,1,3\n"
    )
    source = open_source(DataOptions(format="chorus", path=str(tmp_path)))
    assert source.judgments["rater_grades"].to_pylist() == [[3.0, 3.0, 1.0], None]
    first, second = next(source.products()).to_pylist()
    assert first["attributes"] == [("product colour", "Red"), ("weight", "12"), ("wifi", "yes")]
    assert (first["color"], first["brand"], first["price"]) == ("Red", "HP", pytest.approx(3.95))
    assert (second["attributes"], second["price"]) == (None, 10.0)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_generic_files_with_a_column_map(suffix: str, tmp_path: Path) -> None:
    products = [{"sku": f"00{i}", "name": f"thing {i}", "cost": 1.5, "attributes": '{"fit": "slim"}'} for i in range(3)]
    judgments = [{"query": query, "sku": f"00{i % 3}", "label": str(i % 2)} for i, query in enumerate(QUERIES)]
    for name, rows in (("products", products), ("judgments", judgments)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
            path.write_text("\n".join([",".join(rows[0]), *quoted]))
    options = DataOptions(
        format="generic",
        path=str(tmp_path),
        scale={"name": "mine", "grades": ["0", "1"], "gains": [0, 1], "relevant_from": "1"},
        columns={
            "products": {"product_id": "sku", "title": "name", "price": "cost"},
            "judgments": {"product_id": "sku", "grade": "label"},
        },
    )
    prepare(options, tmp_path / "out")
    (product, *_) = next(iter_products(tmp_path / "out")).to_pylist()
    assert (product["product_id"], product["title"], product["price"]) == ("000", "thing 0", 1.5)
    assert product["attributes"] == [("fit", "slim")]
    assert read_judged(tmp_path / "out").num_rows == NUM_QUERIES


def test_generic_refuses_a_pair_judged_two_ways(tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text("product_id,title\n1,a\n")
    (tmp_path / "judgments.csv").write_text("query,product_id,grade\nshoe,1,0\nShoe,1,1\n")
    with pytest.raises(UserError, match=r"rows 1 and 2: product '1' is judged '0' and '1'"):
        open_source(DataOptions(format="generic", path=str(tmp_path), scale="binary"))


def test_generic_names_the_unknown_column_and_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no judgments file .* name it in data.judgments"):
        open_source(DataOptions(format="generic", path=str(tmp_path), scale="binary"))
    (tmp_path / "products.csv").write_text("product_id,title\n1,a\n")
    (tmp_path / "judgments.csv").write_text("query,product_id,grade\nshoe,1,0\n")
    with pytest.raises(UserError, match=r"data.columns.products has 'titel', which is none of"):
        open_source(
            DataOptions(format="generic", path=str(tmp_path), scale="binary", columns={"products": {"titel": "x"}})
        )


def test_options_that_nothing_would_read_are_refused() -> None:
    with pytest.raises(ValueError, match="scale is read for format generic only"):
        DataOptions(format="market", scale="binary")
    with pytest.raises(ValueError, match="path must name the folder"):
        DataOptions(format="esci")
    with pytest.raises(ValueError, match="leave some queries for training"):
        DataOptions(test_percent=50, dev_percent=50)


@pytest.mark.parametrize(
    "name, products, judgments", [("esci", 6764, 4162), ("chorus", 19406, 2499), ("homedepot", 50438, 66862)]
)
def test_real_sets_go_through_without_a_leak(
    name: str, products: int, judgments: int, shared_data: Path, tmp_path: Path
) -> None:
    summary = prepare(DataOptions(format=name, path=str(shared_data / name)), tmp_path)  # type: ignore[arg-type]
    assert (summary["products"], summary["judgments"]) == (products, judgments)
    check_no_leak(pq.read_table(tmp_path / "judgments.parquet"))
    assert all(count > 0 for count in summary["queries_by_split"].values())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"query,frequency\nred shoe,3\nlamp,-3\n", r"log\.csv, row 2: frequency is -3; write how often"),
        (b"query,frequency\nred shoe,inf\n", r"log\.csv, row 1: frequency is inf; write how often"),
        (b"query,frequency\n", r"log\.csv holds no query"),
        (b"query,frequency\n  ,3\n", r"log\.csv holds no query"),
        (b"query,frequency\nlamp,1\ncaf\xe9,3\n", r"log\.csv is not UTF-8 after line \d; save it as UTF-8"),
        ("query,frequency\nlamp,1\n".encode("utf-16"), r"log\.csv is not UTF-8 after line 0; save it as UTF-8"),
        (b"query,frequency\nlamp,1\nred shoe,5,extra\n", r"log\.csv, row 2: 3 cells but 2 columns; quote cells"),
    ],
)
def test_a_log_that_cannot_be_meant_is_refused_with_its_row(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(query_log(str(tmp_path / "log.csv"))())


def test_an_unknown_frequency_is_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a", "b"], "frequency": [float("nan"), 2.0]}), tmp_path / "log.parquet")
    (tmp_path / "log.csv").write_text("query,frequency\na,NaN\nb,2\nc,\n")
    for name, frequencies in (("log.parquet", [1, 2]), ("log.csv", [1, 2, 1])):
        assert pa.concat_tables(query_log(str(tmp_path / name))())["frequency"].to_pylist() == frequencies


def test_products_without_a_title_are_counted(tmp_path: Path) -> None:
    titles = ["", *esci_products()["product_title"].to_pylist()[1:]]
    options = write_esci(tmp_path / "esci", products=esci_products(product_title=titles))
    assert prepare(options, tmp_path / "out")["products_without_title"] == 1


def test_a_mapped_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text("product_id,title\n1,shoe\n")
    (tmp_path / "judgments.csv").write_text("query,product_id,grade\nshoe,1,1\n")
    columns = {"products": {"brand": "maker"}}
    options = DataOptions(format="generic", path=str(tmp_path), scale="binary", columns=columns)
    with pytest.raises(UserError, match="lacks the column 'maker'"):
        list(open_source(options).products())


def test_text_that_is_no_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    titles = pa.array([b"red tent", b"caf\xe9 table"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"product_id": ["1", "2"], "title": titles}), tmp_path / "products.parquet")
    with pytest.raises(UserError, match=r"products.parquet, row 2: title is no UTF-8 text"):
        list(blocks(tmp_path / "products.parquet", ["product_id", "title"]))
    with pytest.raises(UserError, match=r"products.parquet, row 2: title is no UTF-8 text"):
        list(RowReader(tmp_path / "products.parquet").batches(10))
    (tmp_path / "log.jsonl").write_text('{"query": "tent \\u00e9"}\n{"query": "half \\ud83d"}\n')
    with pytest.raises(UserError, match=r"log.jsonl, line 2: an escape is half a character"):
        list(blocks(tmp_path / "log.jsonl", ["query"]))


def test_judgments_of_one_grade_are_refused(tmp_path: Path) -> None:
    options = write_esci(tmp_path / "esci", judgments=esci_judgments(esci_label=["S"] * NUM_QUERIES))
    with pytest.raises(UserError, match=r"all 60 judgments of .* have the grade 'S', which teaches nothing; check"):
        prepare(options, tmp_path / "out")
    assert not (tmp_path / "out" / "judgments.parquet").exists()


def test_only_the_files_that_are_read_make_a_run(tmp_path: Path) -> None:
    options = write_esci(tmp_path / "esci")
    named = [Path(path).name for path in files_read(options)]
    assert sorted(named) == sorted(path.name for path in (tmp_path / "esci").iterdir())

    def key() -> str:
        return StepFolders(Config(data=options, storage=StorageOptions(root=str(tmp_path / "root")))).key("prepare")

    before = key()
    (tmp_path / "esci" / "notes.txt").write_text("of the shop", encoding="utf-8")
    assert key() == before
    write_esci(tmp_path / "esci", products=esci_products(6))
    assert key() != before


@pytest.mark.parametrize("name", ["products", "judgments"])
def test_a_generic_run_is_made_of_its_named_or_found_files(tmp_path: Path, name: str) -> None:
    for file in ("products.csv", "judgments.csv", "other.csv"):
        (tmp_path / file).write_text("x\n", encoding="utf-8")
    options = DataOptions(format="generic", path=str(tmp_path), scale="binary")
    assert sorted(Path(path).name for path in files_read(options)) == ["judgments.csv", "products.csv"]
    given = replace(options, **{name: "other.csv"})
    assert "other.csv" in {Path(path).name for path in files_read(given)}
    assert f"{name}.csv" not in {Path(path).name for path in files_read(given)}


def test_data_on_s3_make_the_same_run_as_on_disk(
    s3_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "log.csv").write_text("query\nred lamp\n", encoding="utf-8")
    options = replace(write_esci(tmp_path / "esci"), queries=str(tmp_path / "log.csv"))
    for name in ("esci", "log.csv"):
        s3fs.S3FileSystem().put(f"{tmp_path}/{name}", f"bucket/shop-data/{name}", recursive=name == "esci")
    remote = replace(options, path="s3://bucket/shop-data/esci", queries="s3://bucket/shop-data/log.csv")

    keys = [StepFolders(Config(data=data)).key("prepare") for data in (remote, options)]
    assert keys[0] == keys[1]
    assert prepare(remote, tmp_path / "remote") == prepare(options, tmp_path / "local")
    remote = replace(remote, path="s3://bucket/nowhere")
    with pytest.raises(UserError, match="there is nothing at s3://bucket/nowhere"):
        open_source(remote)
