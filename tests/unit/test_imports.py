"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coeft

CHECKOUT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("coeft", "cli") for path in (CHECKOUT / folder).rglob("*.py"))
# packages that settings may not pull in: a config error must answer at once
HEAVY = "torch torchvision numpy lightning timm transformers peft datasets sklearn matplotlib torchmetrics"
HEAVY += " wandb PIL optuna ray soundfile soxr"
# package -> the only places that may import it, late or not
PLACES = {
    "hydra": ["cli/"],
    "peft": ["coeft/methods/_hf.py", "coeft/methods/_hf_options.py", "coeft/peft.py"],
    "timm": ["coeft/backbones/", "coeft/attention/"],
    "transformers": ["coeft/backbones/", "coeft/attention/", "coeft/data/"],
    "matplotlib": ["coeft/plots.py", "coeft/report/", "coeft/sweep/plots.py"],
    "datasets": ["coeft/data/"],
    "gguf": ["coeft/backbones/"],
    "wandb": ["coeft/loggers/"],
    "optuna": ["coeft/sweep/"],
    "scipy": ["coeft/report/statistics.py"],
    "jinja2": ["coeft/report/page.py", "coeft/data/_chat.py"],
    "ray": ["coeft/sweep/cluster.py"],
    "soundfile": ["coeft/data/_sound.py"],
    "soxr": ["coeft/data/_sound.py"],
}
# library files that the command line reads before it knows that the config is right
LIGHT = [
    "coeft/__init__.py",
    "coeft/config.py",
    "coeft/errors.py",
    "coeft/report/folders.py",
    "coeft/seeding.py",
    "coeft/sweep/settings.py",
]
# the command line may not import the library's heavy modules at module level either
HEAVY_OWN = [
    "coeft.train",
    "coeft.suite",
    "coeft.ranks",
    "coeft.evaluate",
    "coeft.predict",
    "coeft.export",
    "coeft.dry_run",
    "coeft.run",
    "coeft.sweep.search",
    "coeft.report.page",
    "coeft.report.report",
]


def imports(path: Path, *, late: bool) -> set[str]:
    """Full names of the modules that a file imports, also inside functions if `late`; not those for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(name.name for name in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                found.add(child.module)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not late:
                continue
            else:
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def name(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def packages(path: Path, *, late: bool) -> set[str]:
    return {module.partition(".")[0] for module in imports(path, late=late)}


@pytest.mark.parametrize("package", PLACES)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    users = [name(path) for path in SOURCES if package in packages(path, late=True)]
    strays = [user for user in users if not any(user.startswith(place) for place in PLACES[package])]
    assert not strays


def settings_files() -> list[Path]:
    folders = ["backbones", "methods", "data", "tasks", "optim", "loggers"]
    return [path for folder in folders for path in (CHECKOUT / "coeft" / folder).glob("[!_]*.py")]


@pytest.mark.parametrize("path", settings_files() + [CHECKOUT / light for light in LIGHT], ids=name)
def test_settings_import_nothing_heavy(path: Path) -> None:
    assert not packages(path, late=False) & set(HEAVY.split())


def test_the_command_line_imports_heavy_modules_late() -> None:
    for path in (CHECKOUT / "cli").glob("*.py"):
        early = imports(path, late=False)
        assert not {module.partition(".")[0] for module in early} & set(HEAVY.split()), name(path)
        assert not early & set(HEAVY_OWN), name(path)


def test_the_library_does_not_know_the_command_line() -> None:
    for path in (CHECKOUT / "coeft").rglob("*.py"):
        assert not [module for module in imports(path, late=True) if module.startswith("coeft.cli")], name(path)


def test_methods_know_neither_files_nor_training() -> None:
    for path in (CHECKOUT / "coeft" / "methods").glob("*.py"):
        assert not packages(path, late=True) & {"lightning", "hydra", "omegaconf", "safetensors", "timm"}, name(path)


def test_no_file_is_named_for_nothing() -> None:
    assert not [name(path) for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]


def test_what_the_command_line_reads_first_is_light_when_imported() -> None:
    code = f"""
import sys
import coeft, coeft.config, coeft.seeding, coeft.sweep.settings
from coeft.config import FOLDERS, kinds, settings_class
for group in FOLDERS:
    for kind in kinds(group):
        settings_class(group, kind)
heavy = set({HEAVY.split()!r}) & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", sorted(coeft._LAZY))
def test_every_lazy_attribute_is_there(name: str) -> None:
    assert callable(getattr(coeft, name))
