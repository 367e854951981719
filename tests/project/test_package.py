"""What a user gets who has the wheel and nothing of the repository."""

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import sampo

TINY = ["--methods", "dpo", "sampo", "--groups", "all", "--steps", "3", "--pairs", "64", "--sft_steps", "5"]
TINY += ["--questions", "16", "--judged_pairs", "50"]
ROOT = Path(__file__).resolve().parents[2]


def run(*command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the source archive, built as for a release (the wheel out of the archive)."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """`bin` of a fresh environment with the wheel in it. The dependencies are lent by the environment of the tests."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    wheel = next(built.glob("*.whl"))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=home)
    # A path in a .pth is only added; the .pth files in it, the editable install's among them, are not read.
    packages = next((home / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return home / "bin"


def test_the_wheel_holds_code_recipes_configurations_and_licence_and_no_tests(built):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()

    def inside(folder, suffix=".yaml"):
        return {name.removeprefix(folder) for name in names if name.startswith(folder) and name.endswith(suffix)}

    for kind in ("recipes", "configs"):
        ours = {path.relative_to(ROOT / kind).as_posix() for path in (ROOT / kind).rglob("*") if path.is_file()}
        assert inside(f"sampo/_data/{kind}/", (".yaml", ".json")) == ours
        assert ours
    assert {"sampo/report/page.html.j2", "sampo/report/page.css"} <= set(names)
    code = {path.relative_to(ROOT / "sampo").as_posix() for path in (ROOT / "sampo").rglob("*.py")}
    assert inside("sampo/", ".py") == code
    assert {name.split("/")[0] for name in names} == {"sampo", f"sampo_dpo-{sampo.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_archive_can_be_tested(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "Makefile",
        "constraints.txt",
        "tests/project/test_package.py",
        "scripts/launch.slurm",
        "README.md",
    } <= names


def test_the_commands_work_from_an_empty_folder(installed, tmp_path):
    place = run(installed / "python", "-c", "import sampo; print(sampo.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)
    assert "recipes" in run(installed / "sampo", "--help", cwd=tmp_path)
    listed = run(installed / "sampo", "recipes", "ls", cwd=tmp_path).splitlines()
    assert len(listed) == len(list((ROOT / "recipes").rglob("*.yaml")))
    run(installed / "sampo", "recipes", "cp", listed[0].split()[0], tmp_path, cwd=tmp_path)
    assert (tmp_path / f"{listed[0].split()[0].split('/')[1]}.yaml").is_file()


def test_the_lab_runs_from_an_empty_folder(installed, tmp_path):
    printed = run(installed / "sampo", "lab", "--fast", *TINY, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "DPO" in printed
    assert "SamPO" in printed
    assert any((tmp_path / "lab-results").rglob("*.json*"))


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
)
def test_files_for_tools_are_valid_yaml(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_has_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == sampo.__version__
