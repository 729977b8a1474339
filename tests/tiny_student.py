"""Real but tiny students with random weights, saved and finished as training would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tiny_training import build_tiny_encoder
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from relevance_ray.calibration import OrdinalCalibration
from relevance_ray.engines.bi_encoder import build_bi_encoder_folder
from relevance_ray.model_folder import ModelInfo, finish_folder, read_model_info, write_model_info
from relevance_ray.schema import SCALES
from relevance_ray.templates import Template

WORDS = "red blue green running shoe shoes leather wallet phone case nike acme for with and a cotton shirt 1 2 3 9"


def build_tiny_student(folder: Path, template: Template | None = None, calibrated: bool = True, seed: int = 7) -> Path:
    """Write a cross-encoder of the ESCI scale whose logits spread widely enough to differ between products."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    calibration = OrdinalCalibration(1.5, (-1.0, 0.0, 1.0)) if calibrated else None
    template = template or Template(max_tokens=32)
    finish_folder(folder, ModelInfo("cross_encoder", SCALES["esci"], template, calibration))
    return folder


def build_tiny_two_tower(folder: Path) -> Path:
    """Write a two-tower of the ESCI scale that reads 16 tokens."""
    encoder = build_tiny_encoder(folder.with_name(f"{folder.name}-encoder"))
    tower = build_bi_encoder_folder(encoder, SCALES["esci"], folder, Template(max_tokens=16), bias=0.25)
    write_model_info(tower, replace(read_model_info(tower), calibration=OrdinalCalibration(1.0, (-1.0, 0.0, 1.0))))
    return tower
