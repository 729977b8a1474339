"""The lines that hold the house up: imports run one way, cores know neither Ray nor pydantic, light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "relevance_ray"
PARTS = [
    "leaves",
    "data",
    "engines",
    ("teacher", "student"),
    "generate",
    "labeling",
    "training",
    "evaluation",
    "serving",
    "top",
]
LEVEL = {name: level for level, part in enumerate(PARTS) for name in ((part,) if isinstance(part, str) else part)}
TOP = {
    "config",
    "chain",
    "steps",
    "cli",
    "demo",
    "scoring",
}
RAY_SHELLS = {
    "cluster/actor_pool.py",
    "generate/pipeline.py",
    "generate/search_actors.py",
    "labeling/pipeline.py",
    "labeling/compact_pipeline.py",
    "serving/app.py",
    "cli.py",
    "cluster/preflight.py",
    "cluster/session.py",
    "cluster/gauges.py",
}
WIRE = {f"serving/{name}.py" for name in ("http", "bodies", "refusals", "rerank", "embed", "examples")}
PYDANTIC_SHELLS = {"config.py", "training/torchrun.py", *WIRE}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The part a module belongs to, from its path or dotted name below the package."""
    head = module.removesuffix(".py").replace("/", ".").split(".")[0]
    if head in LEVEL:
        return head
    return "top" if head in TOP else "leaves"


def imports(module: str) -> Iterator[str]:
    """Dotted names a module imports at run time, also inside functions (not those for the type checker alone)."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield node.module or ""


@pytest.mark.parametrize("module", MODULES)
def test_a_part_imports_only_what_stands_left_of_it(module: str) -> None:
    own = LEVEL[part_of(module)]
    for name in imports(module):
        if name.startswith("relevance_ray."):
            other = part_of(name.removeprefix("relevance_ray."))
            same = other == part_of(module)
            assert same or LEVEL[other] < own, f"{module} ({part_of(module)}) imports {name} ({other})"


@pytest.mark.parametrize("module", MODULES)
def test_cores_import_neither_ray_nor_pydantic(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(module)}
    if module not in RAY_SHELLS and not module.startswith("training/ray_"):
        assert "ray" not in roots
    if module not in PYDANTIC_SHELLS:
        assert "pydantic" not in roots


@pytest.mark.parametrize("name", ["relevance_ray", "relevance_ray.config", "relevance_ray.cli"])
def test_importing_it_loads_neither_torch_nor_ray(name: str) -> None:
    code = f"import {name}, sys; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_what_the_controller_and_the_board_of_a_training_load_is_light() -> None:
    code = "import relevance_ray.training.ray_worker, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
