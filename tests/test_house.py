"""The house of docs/design.md: which package may import which, read from the imports themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"minigpt", "parallel", "costs", "simulator", "experiments"}
STANDARD = set(sys.stdlib_module_names)

# package -> what it may import besides the standard library and itself
MAY_IMPORT = {
    "minigpt": {"torch", "numpy", "tokenizers", "datasets", "pyarrow"},
    "costs": {"torch", "numpy"},
    "parallel": {"torch", "minigpt"},
    "simulator": {
        "numpy",
        "minigpt.config",
        "minigpt.finetune",
        "parallel.layout",
        "parallel.rules",
        "parallel.stages",
        "costs.ledger",
        "costs.program",
        "costs.rank_grid",
        "costs.trace",
    },
    "experiments": None,  # everything
}
FILES_THAT_MAY_MORE = {
    "simulator/trace.py": {"torch", "parallel", "minigpt", "costs"},
    # what it is made of: the world, what is written down, what one operator costs
    "simulator/silent_world.py": {"torch", "parallel", "minigpt", "costs"},
    "simulator/trace_recorder.py": {"torch", "costs"},
    "simulator/trace_operators.py": {"torch", "costs"},
    "simulator/trace_streams.py": {"torch"},
    "simulator/trace_kernels.py": {"torch", "parallel", "minigpt"},
    "parallel/through_accelerate.py": {"accelerate"},
    "parallel/float8.py": {"torchao"},
}
PURE = (
    "minigpt/config.py",
    "minigpt/checks.py",
    "minigpt/finetune.py",
    "parallel/layout.py",
    "costs/ledger.py",
    "costs/program.py",
    "costs/outside.py",
    "costs/rank_grid.py",
)
ONLY_IN_EXPERIMENTS = {"hydra", "omegaconf", "wandb", "tensorboard", "rich", "matplotlib"}
ONLY_IN_EXPERIMENTS |= {"plotly", "jinja2"}
# the launcher runs them, and must be fast
TORCH_FREE = (
    "minigpt/corpus.py",
    "minigpt/encoding.py",
    "minigpt/formats.py",
    "minigpt/progress.py",
    "minigpt/reading.py",
    "minigpt/sources.py",
    "parallel/damaged.py",
    "parallel/rules.py",
    "parallel/stages.py",
    "parallel/impl_rules.py",
)


def imports_of(path: Path, parts: bool = False) -> set[str]:
    """Dotted names of all modules that a file imports, at any depth of nesting; with `parts` those
    too of what it takes out of them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if parts:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def allowed(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_keep_the_arrows(package: str) -> None:
    may = MAY_IMPORT[package]
    for path in files(package):
        if may is None:
            continue
        packages = may | {package} | FILES_THAT_MAY_MORE.get(str(path.relative_to(ROOT)), set())
        foreign = {
            name
            for name in imports_of(path)
            if name.split(".")[0] not in STANDARD and not allowed(name, packages)
        }
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


@pytest.mark.parametrize("file", PURE)
def test_pure_data_imports_the_standard_library_and_pure_data_only(file: str) -> None:
    pure = {name.removesuffix(".py").replace("/", ".") for name in PURE}
    names = imports_of(ROOT / file) - pure
    foreign = {n for n in names if n.split(".")[0] not in STANDARD}
    assert not foreign, f"{file} imports {sorted(foreign)}"


@pytest.mark.parametrize("file", TORCH_FREE)
def test_what_the_launcher_runs_is_free_of_torch(file: str) -> None:
    assert not {n for n in imports_of(ROOT / file) if n.split(".")[0] == "torch"}


def test_the_simulator_and_the_launcher_start_without_torch() -> None:
    """Nor do they import what imports it."""
    fast = [str(path.relative_to(ROOT)) for path in files("simulator")]
    fast = [name for name in (*fast, *PURE, *TORCH_FREE) if name not in FILES_THAT_MAY_MORE]
    modules = [name.removesuffix(".py").replace("/", ".") for name in fast]
    asked = f"import importlib, sys; [*map(importlib.import_module, {modules})]; "
    asked += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT).returncode == 0


def test_minigpt_knows_no_rank() -> None:
    for path in files("minigpt"):
        taken = imports_of(path, parts=True)
        assert not {n for n in taken if n.startswith("torch.distributed")}, path
        assert "torch.distributed" not in path.read_text(), path
        if path.name in ("finetune.py", "lora.py"):  # the rank that they know is a matrix's
            continue
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not names & {"rank", "world_size", "local_rank"}, path


@pytest.mark.parametrize("package", OURS)
def test_package_init_is_empty(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_only_experiments_knows_what_a_person_sees() -> None:
    for package in OURS - {"experiments"}:
        for path in files(package):
            found = {n.split(".")[0] for n in imports_of(path)}
            assert not found & ONLY_IN_EXPERIMENTS, path


def test_documents_name_files_that_are_there() -> None:
    """In back-ticks: a path, or a name that one file has."""
    here = {path.name for package in (*OURS, "tests") for path in files(package)}
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for named in re.findall(r"`([\w/]+\.py)`", document.read_text()):
            there = (ROOT / named).exists() if "/" in named else named in here
            assert there, f"{document.name}: {named}"
