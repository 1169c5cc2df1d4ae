"""The checkout's folders against what pip installs."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from coeft.cli.catalogue import CONF, options
from coeft.cli.compose import compose

CHECKOUT = Path(__file__).parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))


def packages() -> list[str]:
    found = find_packages(str(CHECKOUT), include=["coeft", "coeft.*"])
    for folder in ("cli", "conf", "recipes"):
        found += [f"coeft.{name}" for name in find_packages(str(CHECKOUT), include=[folder, f"{folder}.*"])]
    return sorted(found)


def test_every_package_is_listed() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == packages()


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {path.parent for folder in ("coeft", "cli") for path in (CHECKOUT / folder).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.parametrize("folder", ["cli", "conf", "recipes"])
def test_folders_do_not_import_as_top_level_packages(folder: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=CHECKOUT, capture_output=True, text=True)
    assert run.returncode != 0 and f"import coeft.{folder}, not {folder}" in run.stderr


def direct() -> list[str]:
    """What the package and its extras need, without the extras that name others of its own."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]
    return [line for line in lines if not line.startswith("coeft[")]


def test_dependencies_have_lower_bounds_only() -> None:
    for line in direct():
        assert ">=" in line and "==" not in line, line
        assert "<" not in line or line.startswith("hydra-core"), line


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}
    names = {line.partition(">=")[0].partition("[")[0].lower().replace("_", "-") for line in direct()}
    assert not names - pinned
    assert all("==" in line and "://" not in line for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("backbone", options("backbone"))
def test_every_backbone_composes(backbone: str) -> None:
    required = ["backbone.name=x"] if backbone in ("hf", "timm") else []
    assert compose([f"backbone={backbone}", *required])[0].config.backbone.name


@pytest.mark.slow
def test_the_wheel_holds_everything_and_nothing_else(tmp_path: Path) -> None:
    """Built from the sdist, as a release is."""
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(CHECKOUT)]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    wanted = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "coeft").rglob("*.py")}
    for folder in ("cli", "conf", "recipes"):
        files = [path for suffix in ("py", "yaml", "md") for path in (CHECKOUT / folder).rglob(f"*.{suffix}")]
        wanted |= {f"coeft/{path.relative_to(CHECKOUT).as_posix()}" for path in files}
    assets = [
        path for path in (CHECKOUT / "coeft" / "assets").iterdir() if path.suffix in (".safetensors", ".json", ".md")
    ]
    wanted |= {"coeft/report/page.html.j2"}
    wanted |= {"coeft/py.typed", *(path.relative_to(CHECKOUT).as_posix() for path in assets)}
    assert names == wanted


def test_hydra_finds_the_installed_config() -> None:
    assert CONF.name == "conf" and (CONF / "train.yaml").is_file()
