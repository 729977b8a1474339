"""Collating groups, building a student, distilling it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_training import SCALE, agreement, build_tiny_encoder, judged_groups, labeled_groups, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, DistilBertModel

from relevance_ray import storage
from relevance_ray.calibration import IsotonicCalibration, logit_of_classes
from relevance_ray.cluster.workers import Workers
from relevance_ray.engines.encoding import PairEncoder
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.schema import LABELED_GROUP
from relevance_ray.student import collate
from relevance_ray.student.cross_encoder import CrossReader, build_cross_encoder
from relevance_ray.student.reading import Reader
from relevance_ray.student.token_files import GroupFiles, groups_bytes, read_groups
from relevance_ray.student.two_tower import TowerReader, build_two_tower
from relevance_ray.templates import Template
from relevance_ray.training.ingest import IngestSpec, ingest
from relevance_ray.training.options import FitOptions, StudentOptions
from relevance_ray.training.ray_ingest import ray_ingest
from relevance_ray.training.student import StudentRequest, train_student
from relevance_ray.training.torchrun import student_options as student_options_of


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def reader(encoder_folder: Path) -> CrossReader:
    return CrossReader(PairEncoder(AutoTokenizer.from_pretrained(encoder_folder), Template(max_tokens=16)))


def student_options(model: Path, **changes: object) -> StudentOptions:
    fit = FitOptions(epochs=15, learning_rate=5e-3, batch_size=16, max_batch_tokens=512, checkpoint_every=1000)
    return StudentOptions(**{"model": str(model), "max_tokens": 16, "fit": fit, **changes})


def encode(table: pa.Table, reader: Reader, max_group_products: int = 8) -> collate.TrainingGroups:
    groups = collate.encode_groups(table, reader, SCALE, max_group_products)
    assert groups is not None
    return groups


def test_pairs_are_packed_as_the_tokenizer_would_encode_them(reader: CrossReader) -> None:
    groups = encode(labeled_groups(3), reader).take(np.array([2, 0]))
    flat = collate.flatten_groups(labeled_groups(3))
    rows = [*range(8, 12), *range(4)]
    assert groups.place.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    texts = [flat.products[row]["title"] for row in rows]
    queries = [flat.queries[row] for row in rows]
    expected = reader.encoder.tokenizer(queries, texts, padding=True, return_tensors="np")
    found = groups.pairs.texts.pad(groups.pairs.product)
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(found["token_type_ids"], expected["token_type_ids"])
    assert "attention_mask" not in found  # all of one length: nothing is padded
    np.testing.assert_array_equal(groups.num_tokens, [28, 28])
    np.testing.assert_array_equal(groups.target, [3 * agreement(q, t) - 3 for q, t in zip(queries, texts, strict=True)])


def test_a_two_tower_reads_both_sides_apart_and_each_text_once(encoder_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    reader = TowerReader(tokenizer, Template(max_tokens=16))
    tokens = reader.pack(["red shoe", "red shoe", " "], [{"title": "red"}, {"title": "red shoe"}, {"title": "red"}])
    assert tokens.query is not None
    texts = [tokenizer.decode(ids) for ids in np.split(tokens.texts.token_ids, tokens.texts.offsets[1:-1])]
    assert texts == ["[CLS] red shoe [SEP]", "[CLS] red [SEP]"]
    assert (tokens.query.tolist(), tokens.product.tolist()) == ([0, 0, -1], [1, 0, -1])
    assert tokens.lengths.tolist() == [3, 4, 0]


def test_padding_is_masked(reader: CrossReader) -> None:
    pairs = reader.pack(["red shoe", "red"], [{"title": "red"}, {"title": "blue"}])
    found = pairs.texts.pad(np.array([1, 0]))
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert found["input_ids"][0, -1] == reader.encoder.pad_token_id


def test_pairs_without_a_usable_label_and_groups_left_with_one_are_left_out(reader: CrossReader) -> None:
    rows = labeled_groups(3).to_pylist()
    rows[0]["products"][1]["error"] = "timed out"
    rows[0]["products"][2]["logit"] = float("inf")
    rows[1]["products"][0]["logit"] = None
    for product in rows[2]["products"][1:]:
        product["fields"]["title"] = None
    table = pa.Table.from_pylist(rows, schema=LABELED_GROUP)
    groups = encode(table, reader)
    assert groups.sizes.tolist() == [2, 3]
    labels = [product["logit"] for row in rows for product in row["products"]]
    assert groups.target.tolist() == [labels[row] for row in (0, 3, 5, 6, 7)]


def test_large_groups_are_cut_into_even_parts_that_lose_no_pair(reader: CrossReader) -> None:
    groups, whole = (encode(labeled_groups(2, products=10), reader, size) for size in (4, 16))
    assert groups.sizes.tolist() == [4, 3, 3, 4, 3, 3]
    assert sorted(groups.target[:10]) == sorted(whole.target[:10])
    again = encode(labeled_groups(2, products=10), reader, 4)
    np.testing.assert_array_equal(groups.pairs.texts.token_ids, again.pairs.texts.token_ids)


@pytest.mark.parametrize("kind", ["cross_encoder", "two_tower"])
def test_groups_of_files_are_those_that_were_written_across_files(
    encoder_folder: Path, tmp_path: Path, kind: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    template = Template(max_tokens=16)
    reader: Reader = (
        TowerReader(tokenizer, template) if kind == "two_tower" else CrossReader(PairEncoder(tokenizer, template))
    )
    tables = [labeled_groups(3), labeled_groups(4, seed=5)]
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    for table, path in zip(tables, paths, strict=True):
        groups = collate.encode_groups(table, reader, SCALE, 8, with_classes=True)
        assert groups is not None
        path.write_bytes(groups_bytes(groups))
    together = encode(pa.concat_tables(tables), reader)
    files = GroupFiles(paths)
    assert files.num_classes == 2
    assert files.sizes.tolist() == [4] * 7
    assert files.num_tokens.tolist() == together.num_tokens.tolist()
    order = np.array([6, 0, 3, 2])
    found, expected = files.take(order), together.take(order)
    assert found.target.tolist() == expected.target.tolist()
    assert found.classes is not None
    assert found.classes[:, 1].tolist() == found.target.tolist()

    def texts(groups: collate.TrainingGroups) -> list[list[int]]:
        packed = groups.pairs.texts
        ids = np.split(packed.token_ids, packed.offsets[1:-1])
        return [ids[row].tolist() for row in groups.pairs.product]

    assert texts(found) == texts(expected)
    assert GroupFiles(paths, max_pairs=19).sizes.tolist() == [4] * 4
    assert GroupFiles(paths, max_pairs=3).sizes.tolist() == [4], "a large first group is not nothing"


def test_judged_groups_become_log_odds_of_their_soft_target(reader: CrossReader) -> None:
    table = judged_groups(4)
    groups = encode(table, reader)
    p = collate.flatten_groups(table).floats("soft_target")
    np.testing.assert_allclose(1 / (1 + np.exp(-groups.target)), p, rtol=1e-5)
    grades = collate.flatten_groups(table).values("grade")
    assert groups.grade.tolist() == [SCALE.grades.index(grade) for grade in grades]


def test_tokens_are_made_once_and_files_without_a_usable_group_are_left_out(
    encoder_folder: Path, tmp_path: Path
) -> None:
    options = student_options(encoder_folder)
    build_cross_encoder(options, SCALE, tmp_path / "start", 0)
    how = IngestSpec(str(tmp_path / "start"), options)
    sources = [
        write(tmp_path / "a.parquet", labeled_groups(3)),
        write(tmp_path / "none.parquet", labeled_groups(0)),
        write(tmp_path / "b.parquet", labeled_groups(2)),
    ]
    seen: list[tuple[int, int]] = []
    found = ingest(how, sources, tmp_path / "tokens", on_file=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [len(read_groups(Path(file)).sizes) for file in found] == [3, 2]
    Path(found[0]).unlink()
    seen.clear()
    assert ingest(how, sources, tmp_path / "tokens", on_file=lambda done, of: seen.append((done, of))) == found
    assert seen == [(1, 1)]
    with pytest.raises(UserError, match="no group with two labeled products"):
        ingest(how, sources[1:2], tmp_path / "tokens")


def test_many_files_share_a_token_file_in_their_order(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = student_options(encoder_folder, kl_weight=1.0)
    build_cross_encoder(options, SCALE, tmp_path / "start", 0)
    how = IngestSpec(str(tmp_path / "start"), options)
    sources = [write(tmp_path / f"{n}.parquet", labeled_groups(n, seed=n)) for n in (3, 0, 2, 5, 1)]
    alone = GroupFiles([Path(file) for file in ingest(how, sources, tmp_path / "alone")])
    monkeypatch.setattr("relevance_ray.training.ingest.MAX_FILES", 3)
    found = ingest(how, sources, tmp_path / "shared")
    assert len(found) == 3
    shared = GroupFiles([Path(file) for file in found])
    assert shared.sizes.tolist() == alone.sizes.tolist()
    everything = np.arange(len(alone.sizes))
    assert groups_bytes(shared.take(everything)) == groups_bytes(alone.take(everything))


def test_tokens_made_by_actors_are_those_made_in_turn(encoder_folder: Path, tmp_path: Path, ray_cluster: None) -> None:
    options = student_options(encoder_folder, kind="two_tower", kl_weight=1.0)
    build_two_tower(options, SCALE, tmp_path / "start", 0)
    how = IngestSpec(str(tmp_path / "start"), options)
    sources = [write(tmp_path / f"{n}.parquet", labeled_groups(5, seed=n)) for n in range(3)]
    alone = ingest(how, sources, tmp_path / "alone")
    spread = ingest(how, sources, tmp_path / "spread", ray_ingest(Workers(2)))
    assert [Path(file).read_bytes() for file in alone] == [Path(file).read_bytes() for file in spread]


def test_the_seed_decides_the_head_and_depth_is_cut(encoder_folder: Path, tmp_path: Path) -> None:
    options = student_options(encoder_folder, num_layers=1)
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_cross_encoder(options, SCALE, tmp_path / name, seed)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert model.config.num_hidden_layers == 1
        assert model.config.num_labels == 1
        assert model.config.hidden_dropout_prob == 0.0
        heads.append(model.classifier.weight.tolist())
    assert heads[0] == heads[1] != heads[2]


def test_more_layers_or_tokens_than_the_model_has_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_layers is 9, but model .* has 2 layers"):
        build_cross_encoder(student_options(encoder_folder, num_layers=9), SCALE, tmp_path / "out", 0)
    # Its file has no num_hidden_layers.
    distil = DistilBertConfig(vocab_size=99, dim=8, hidden_dim=8, n_heads=2, n_layers=2)
    DistilBertModel(distil).save_pretrained(tmp_path / "distil")
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path / "distil")
    with pytest.raises(UserError, match="num_layers is 3, but model .* has 2 layers"):
        build_cross_encoder(student_options(tmp_path / "distil", num_layers=3), SCALE, tmp_path / "out", 0)
    with pytest.raises(UserError, match="max_tokens is 100, but model .* reads 64"):
        build_cross_encoder(student_options(encoder_folder, max_tokens=100), SCALE, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


OBJECTIVES: dict[str, dict[str, object]] = {
    "margins": {},
    "differing margins": {"margins": "differing"},
    "pointwise": {"margin_weight": 0.0, "level_weight": 0.0, "bce_weight": 1.0},
    "classes": {"margin_weight": 0.0, "level_weight": 0.0, "kl_weight": 1.0},
    "two-tower": {"kind": "two_tower"},
    "two-tower with contrast": {"kind": "two_tower", "infonce_weight": 0.1},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distillation_ends_in_a_calibrated_folder_that_ranks_like_its_teacher(
    encoder_folder: Path, tmp_path: Path, objective: str
) -> None:
    files = [
        write(tmp_path / "a.parquet", labeled_groups(100)),
        write(tmp_path / "b.parquet", labeled_groups(60, seed=9)),
    ]
    judged_file = write(tmp_path / "judged.parquet", judged_groups(30))
    out, work = tmp_path / "student", tmp_path / "work"
    options = student_options(encoder_folder, **OBJECTIVES[objective])
    seen: list[dict] = []
    summary = train_student(StudentRequest(options, SCALE, files, judged_file, out, work), on_progress=seen.append)

    assert summary["steps"] == 150
    assert summary["pairs"] == 160 * 4 * 15
    assert summary["dev"]["ndcg"] > 0.97
    assert seen[-1]["step"] == 150
    lines = [json.loads(line) for line in (work / "fit" / "log.jsonl").read_text().splitlines()]
    assert lines == seen
    assert not (work / "fit" / "checkpoints").exists()

    info = read_model_info(out)
    assert info.kind == ("bi_encoder" if options.kind == "two_tower" else "cross_encoder")
    assert info.calibration is not None
    model = load_pair_model(out)
    titles = ["red shoe", "blue shoe", "red lamp", "blue lamp"]
    whole, *halves, none = model.logits(["red shoe"] * 4, [{"title": title} for title in titles])
    logits = np.asarray([whole, np.mean(halves), none])
    assert logits[0] > logits[1] > logits[2]
    probability = info.calibration.probability(logits, SCALE.relevant_index)
    assert probability[0] > 0.5 > probability[2]
    if objective == "margins":
        np.testing.assert_allclose(logits - logits.mean(), [3, 0, -3], atol=1.0)

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train_student(StudentRequest(options, SCALE, files, judged_file, out, work)) == summary
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_the_baseline_learns_from_human_judgments_alone(encoder_folder: Path, tmp_path: Path) -> None:
    judged_file = write(tmp_path / "judged.parquet", judged_groups(60))
    summary = train_student(
        StudentRequest(student_options(encoder_folder), SCALE, None, judged_file, tmp_path / "out", tmp_path / "work")
    )
    assert summary["labels"] == "human judgments"
    assert summary["dev"]["ndcg"] > 0.8  # an untrained one has .7


def test_an_isotonic_calibration_of_few_judgments_is_refused_before_training(
    encoder_folder: Path, tmp_path: Path
) -> None:
    judged_file = write(tmp_path / "judged.parquet", judged_groups(60))
    options = replace(student_options(encoder_folder), calibration="isotonic")
    with pytest.raises(UserError, match=r"calibration=isotonic .* dev pairs, and it takes 1,000; leave it at ordinal"):
        train_student(StudentRequest(options, SCALE, None, judged_file, tmp_path / "out", tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_the_chosen_calibration_stands_in_the_folder(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relevance_ray.training.finish.MIN_ISOTONIC", 10)
    judged_file = write(tmp_path / "judged.parquet", judged_groups(60))
    options = replace(student_options(encoder_folder), calibration="isotonic")
    train_student(StudentRequest(options, SCALE, None, judged_file, tmp_path / "out", tmp_path / "work"))
    assert isinstance(read_model_info(tmp_path / "out").calibration, IsotonicCalibration)


def test_a_judged_file_without_dev_queries_is_refused_before_training(encoder_folder: Path, tmp_path: Path) -> None:
    table = judged_groups(10)
    train = table.filter([split == "train" for split in table["split"].to_pylist()])
    judged_file = write(tmp_path / "judged.parquet", train)
    with pytest.raises(UserError, match=r"judged\.parquet has no query of split dev"):
        train_student(
            StudentRequest(
                student_options(encoder_folder), SCALE, None, judged_file, tmp_path / "out", tmp_path / "work"
            )
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["cross_encoder", "two_tower"])
def test_predictions_of_training_are_those_of_the_loaded_folder(
    encoder_folder: Path, tmp_path: Path, kind: str
) -> None:
    judged_file = write(tmp_path / "judged.parquet", judged_groups(30))
    files = [write(tmp_path / "a.parquet", labeled_groups(40))]
    options = student_options(encoder_folder, kind=kind)
    train_student(StudentRequest(options, SCALE, files, judged_file, tmp_path / "out", tmp_path / "work"))
    flat = collate.flatten_groups(collate.read_judged_split(judged_file, "dev"))
    trained = logit_of_classes(np.load(tmp_path / "work" / "fit" / "predictions.npy"), (0.0, 1.0))
    served = load_pair_model(tmp_path / "out").logits(flat.queries, flat.products)
    np.testing.assert_allclose(served, trained, atol=1e-5)


def test_sentence_transformers_reads_the_folder_and_gives_our_logits(encoder_folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    judged_file = write(tmp_path / "judged.parquet", judged_groups(30))
    files = [write(tmp_path / "a.parquet", labeled_groups(40))]
    train_student(
        StudentRequest(student_options(encoder_folder), SCALE, files, judged_file, tmp_path / "out", tmp_path / "work")
    )
    pairs = [("red shoe", "red shoe"), ("red shoe", "blue lamp"), ("green case", "green shirt")]
    ours = load_pair_model(tmp_path / "out").logits([q for q, _ in pairs], [{"title": t} for _, t in pairs])
    theirs = CrossEncoder(str(tmp_path / "out"), device="cpu").predict(pairs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_torchrun_trains_the_student_that_one_process_trains(encoder_folder: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / f"labels-{n}.parquet", labeled_groups(20, seed=n)) for n in range(2)]
    judged_file = write(tmp_path / "judged.parquet", judged_groups(30))
    storage.write_json(str(tmp_path / "scale.json"), SCALE.to_dict())
    settings = [f"model={encoder_folder}", "max_tokens=16", "fit.epochs=2", "fit.learning_rate=0.003"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "relevance_ray.training.torchrun", "--labels", str(tmp_path / "labels-*.parquet")]
    command += ["--judged", judged_file, "--scale", str(tmp_path / "scale.json"), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    options = student_options_of(settings)
    train_student(StudentRequest(options, SCALE, files, judged_file, tmp_path / "one", tmp_path / "work"))
    products = [{"title": title} for title in ("red shoe", "blue shoe", "blue lamp")]
    logits = [load_pair_model(tmp_path / name).logits(["red shoe"] * 3, products) for name in ("one", "two")]
    np.testing.assert_allclose(*logits, atol=1e-3)
    (work,) = tmp_path.glob("two.work-*")
    assert not (work / "tokens").exists()


def test_an_unknown_option_of_torchrun_is_one_sentence() -> None:
    with pytest.raises(UserError, match="--set fit.epoch=2: give key=value"):
        student_options_of(["fit.epoch=2"])
    with pytest.raises(UserError, match=r"--set fit: .*epochs 0 must be at least 1"):
        student_options_of(["fit.epochs=0"])
    with pytest.raises(UserError, match=r"--set kind: Input should be 'cross_encoder' or 'two_tower'"):
        student_options_of(["kind=two-tower"])
    with pytest.raises(UserError, match="--set fit={epochs: 5}: give key=value"):
        student_options_of(["fit={epochs: 5}"])
    with pytest.raises(UserError, match=r"--set fields=\[title: the value is not YAML"):
        student_options_of(["fields=[title"])
    assert student_options_of(["fit.learning_rate=1e-4"]).fit.learning_rate == 1e-4
