"""What a user gets who has the wheel and nothing of the repository."""

import fnmatch
import os
import re
import shlex
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import sampo

TINY = ["--methods", "dpo", "sampo", "--groups", "all", "--steps", "3", "--pairs", "64", "--sft_steps", "5"]
TINY += ["--questions", "16", "--judged_pairs", "50"]
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


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


# --- the README on PyPI ----------------------------------------------------------------------------------------------


def test_links_of_the_readme_lead_to_the_repository():
    pytest.importorskip("hatchling")
    from hatch_build import absolute_links

    text = '[a](docs/a.md#b) ![c](docs/c.svg) [d](https://e/f) [g](#h) <img src="docs/i.svg"> [`j`](sampo/j.py)'
    text += " [![k](https://l/m)](docs/n.md)"
    assert absolute_links(text, "https://x/y") == (
        "[a](https://x/y/blob/main/docs/a.md#b) ![c](https://x/y/raw/main/docs/c.svg) [d](https://e/f) [g](#h) "
        '<img src="https://x/y/raw/main/docs/i.svg"> [`j`](https://x/y/blob/main/sampo/j.py) '
        "[![k](https://l/m)](https://x/y/blob/main/docs/n.md)"
    )


def test_the_readme_of_the_wheel_has_no_relative_link(built):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata, readme = wheel.read(name).decode().split("\n\n", 1)
    assert "Description-Content-Type: text/markdown" in metadata
    assert f"Project-URL: Repository, {PROJECT['urls']['Repository']}" in metadata
    assert readme.startswith("# sampo")
    assert re.findall(r"\]\((?!https?://|#)[^)]*\)", readme) == []


def test_twine_and_check_wheel_contents_find_nothing(built):
    pytest.importorskip("twine")
    pytest.importorskip("check_wheel_contents")
    files = [str(path) for path in built.iterdir()]
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=ROOT)
    run(sys.executable, "-m", "check_wheel_contents", *(f for f in files if f.endswith(".whl")), cwd=ROOT)


# --- the image -------------------------------------------------------------------------------------------------------


def instructions():
    """Instructions of the Dockerfile: word, rest."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_dockerfile_copies_what_exists_and_is_sent_to_the_builder():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert set(sources) == set(allowed)
    assert [name for name in sources if not (ROOT / name).exists()] == []
    build = {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "sampo", "recipes", "configs"}  # of the wheel
    assert build | {"constraints.txt"} == set(sources)
    assert not any(fnmatch.fnmatch(name, "**/__pycache__") for name in sources)


def test_the_dockerfile_runs_sampo_with_extras_and_shell_that_exist():
    found = instructions()
    assert [word for word, _ in found][:2] == ["ARG", "FROM"]
    assert [rest for word, rest in found if word == "ENTRYPOINT"] == ['["sampo"]']
    assert "sampo" in PROJECT["scripts"]
    arguments = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    assert set(arguments["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    given = set(re.findall(r"\$\{(\w+)\}", " ".join(rest for _, rest in found)))
    assert given == set(arguments)
    for word, rest in found:
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
            assert shlex.split(rest)


def test_the_kubernetes_template_names_the_image_and_lets_its_user_write():
    text = (ROOT / "configs" / "kubernetes" / "pytorchjob.yaml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"of the Dockerfile, with EXTRAS=(\S+)", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (user,) = (int(rest) for word, rest in instructions() if word == "USER")
    for replica in yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"].values():
        assert replica["template"]["spec"]["securityContext"]["fsGroup"] == user
    assert f"sampo:{sampo.__version__}" in text


# --- a release -------------------------------------------------------------------------------------------------------


def release_folder(folder, **changes):
    """The files that a release looks at, ready for 1.2.3."""
    files = {
        "sampo/__init__.py": '__version__ = "1.2.3"\n',
        "CITATION.cff": "title: x\nversion: 1.2.3\n",
        "CHANGELOG.md": "# Changelog\n\n## 1.2.3 (2030-01-02)\n\n## 1.2.2 (2030-01-01)\n",
        "pyproject.toml": '[project.urls]\nRepository = "https://github.com/people/sampo"\n',
    }
    (folder / "sampo").mkdir()
    for name, text in (files | changes).items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "tag", "found"),
    [
        ({}, "v1.2.3", None),
        ({}, "v1.2.4", "The tag must be v1.2.3"),
        ({"CITATION.cff": "version: 1.2.2\n"}, "v1.2.3", "CITATION.cff"),
        ({"CHANGELOG.md": "\n## 1.2.3 (unreleased)\n"}, "v1.2.3", "a section `## 1.2.3 (YYYY-MM-DD)`"),
        ({"CHANGELOG.md": "\n## Unreleased\n\n## 1.2.3 (2030-01-02)\n"}, "v1.2.3", "no section `## Unreleased`"),
        ({"pyproject.toml": '[project.urls]\nRepository = "https://github.com/OWNER/x"\n'}, "v1.2.3", "`Repository`"),
    ],
)
def test_a_release_is_checked(changes, tag, found, tmp_path):
    from check_release import issues

    said = issues(tag, release_folder(tmp_path, **changes))
    assert (not said) if found is None else (len(said) == 1 and found in said[0])


def test_the_training_script_installs_this_checkout_until_there_is_a_release():
    text = (ROOT / "scripts" / "train_sampo.py").read_text(encoding="utf-8")
    header = re.match(r"# /// script\n(.*?)# ///\n", text, re.DOTALL)[1]
    about = tomllib.loads("".join(line[2:] or "\n" for line in header.splitlines(keepends=True)))
    assert about["requires-python"] == PROJECT["requires-python"]
    assert set(about["dependencies"]) == {PROJECT["name"], "trackio"}
    place = ROOT / "scripts" / about["tool"]["uv"]["sources"][PROJECT["name"]]["path"]
    assert (place / "pyproject.toml").samefile(ROOT / "pyproject.toml")
