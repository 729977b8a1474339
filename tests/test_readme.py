"""What the README tells a new user to type exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
import yaml

from relevance_ray.cli import app
from relevance_ray.config import build_config, describe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_readme_configurations_are_valid(block: str) -> None:
    build_config(yaml.safe_load(block), where="README.md")


def test_readme_commands_and_options_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"relevance-ray ([a-z-]+)([^`\n]*)", README)
    assert {"run", "score", "serve", "config"} <= {command for command, _ in lines}
    for command, arguments in lines:
        known = {name for parameter in commands[command].params for name in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= known, command


def test_readme_configuration_keys_exist() -> None:
    keys = {key for key, *_ in describe()}
    section = README.split("## Configuration")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:data|storage|teacher|generate|label|student)\.[a-z_]+)`", section))
    assert len(named) > 8
    assert named <= keys


def test_readme_files_and_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`((?:relevance_ray|jobs|tests)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
