"""Every command and code block of README and docs is run, or, marked `# needs …`, at least parsed."""

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list:
    found = []
    for path in DOCUMENTS:
        for i, (kind, text) in enumerate(FENCE.findall(path.read_text(encoding="utf-8"))):
            if kind == language:
                found.append(pytest.param(text, id=f"{path.name}-{i}"))
    return found


def test_the_documents_have_code_to_test():
    assert len(blocks("python")) >= 2
    assert len(blocks("bash")) >= 3


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, request):
    ast.parse(code)
    # those of data.md are run by test_data.py, with the files that they speak of
    if code.startswith("# needs") or "[data.md" in request.node.name:
        for node in ast.walk(ast.parse(code)):  # parsed only: but the names that it imports from us must exist
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "sampo":
                module = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names)
        return
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def commands(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    variables: dict[str, str] = {}
    found = []
    for line in lines:
        if assigned := re.fullmatch(r'([A-Z_]+)=("[^"]*"|\S+)', line):
            variables[assigned[1]] = assigned[2].strip('"')
            continue
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        found.append(shlex.split(line, comments=True))
    return [words for words in found if words]


@pytest.mark.parametrize("text", blocks("bash"))
def test_shell_blocks_name_commands_targets_options_and_files_that_exist(text):
    seen = [check(words) for words in commands(text) if words]
    assert seen


def check(words: list[str]) -> bool:
    environment = re.compile(r"^[A-Z_]+=")
    while environment.match(words[0]):
        words = words[1:]
    words = words[: next((i for i, word in enumerate(words) if word in ("<", ">")), None)]  # without redirections
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif words[0] == "sampo":
        check_sampo(words[1:])
    elif words[:2] == ["accelerate", "launch"] or words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).is_file(), words
        for word in words[:script]:
            assert not word.endswith(".yaml") or (ROOT / word).is_file(), words
        check_train(words[script + 1 :])
    elif words[0] == "sbatch":
        script = next(word for word in words[1:] if not word.startswith("-"))
        assert (ROOT / script).is_file(), words
        check_train(words[words.index(script) + 1 :])
    elif words[:2] == ["kubectl", "apply"]:
        assert (ROOT / words[words.index("-f") + 1]).is_file(), words
    elif words[0] == "docker":
        check_docker(words[1:])
    elif words[0] == "uvx":
        assert words[1:4] == ["--from", ".", "sampo"], words
    elif words[0] == "python":
        if words[1:3] == ["-m", "studies.run"]:
            from studies.run import make_parser

            make_parser().parse_args(words[3:])
        elif words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in ("pip", "uv", "git", "cd", "tensorboard", "vllm"), f"say in this test how to check {words}"
    return True


def check_docker(words: list[str]) -> None:
    """The image is built with arguments that the Dockerfile has, and runs a command of sampo."""
    if words[0] == "build":
        known = re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
        given = [words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--build-arg"]
        assert set(given) <= set(known), words
        assert words[-1] == ".", words
    else:
        assert words[0] == "run", words
        check_sampo(words[words.index("sampo") + 1 :])


def check_sampo(words: list[str]) -> None:
    from sampo.cli import COMMANDS
    from sampo.commands import iterate, sweep_options

    words = words[: words.index(">")] if ">" in words else words
    assert words[0] in COMMANDS or words[0].startswith("-"), words
    if "--plugin" in words:  # the file is the reader's own, and so is its method
        place = words.index("--plugin")
        words = ["sampo" if word == "last_half" else word for word in [*words[:place], *words[place + 2 :]]]
    if words[0] in ("train", "cache"):
        from sampo.commands.cache import make_parser

        check_train(words[1:] if words[0] == "train" else make_parser().parse_known_args(words[1:])[1])
    elif words[0] == "sweep":
        rest = sweep_options.make_parser().parse_known_args(words[1:])[1]
        check_train(rest)
    elif words[0] == "iterate":
        check_train(iterate.make_parser().parse_known_args(words[1:])[1], iterate=True)
    elif words[0] in COMMANDS:
        module = __import__(f"sampo.{COMMANDS[words[0]][0]}", fromlist=["make_parser"])
        module.make_parser().parse_args(words[1:])


def check_train(words: list[str], iterate: bool = False) -> None:
    from sampo.commands.launch import accelerate_config, split_options
    from sampo.commands.options import ITERATE_OPTIONS, make_parser

    launch, rest = split_options(words)
    if "accelerate_config" in launch and "/" not in launch["accelerate_config"]:
        assert accelerate_config(launch["accelerate_config"]).is_file()
    if "--help" in rest:
        return
    if "--config" in rest:
        config = rest[rest.index("--config") + 1]
        if config.startswith("recipes/"):
            assert (ROOT / config).is_file(), config
            rest = [str(ROOT / word) if word == config else word for word in rest]
        else:
            rest = [word for word in rest if word not in ("--config", config)]  # the reader's own file
    parser = make_parser()
    parser.not_ours = set(ITERATE_OPTIONS) if iterate else set()
    assert not parser.find_unknown(rest)


def test_the_generated_parts_are_what_the_code_says():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr


def test_links_between_documents_lead_to_files():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_papers_has_an_entry_for_every_source_in_the_registry():
    from sampo.weighting import WEIGHTINGS

    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    missing = {
        name: identifier
        for name, method in WEIGHTINGS.items()
        for identifier in re.findall(r"\d{4}\.\d{5}", method.source)
        if identifier not in papers or (f"`{name}`" not in papers and f"`token_weighting: {name}`" not in papers)
    }
    assert not missing, f"add to docs/papers.md: {missing}"


def test_every_arxiv_id_has_an_entry_in_papers():
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    folders = ("docs", "recipes", "notebooks", "sampo", "benchmarks")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".yaml", ".py")
    ]
    missing = {
        f"{path.relative_to(ROOT)}: {identifier}"
        for path in [ROOT / "README.md", *files]
        for identifier in re.findall(r"(?i)arxiv[: \n#]+(\d{4}\.\d{5})", path.read_text(encoding="utf-8"))
        if identifier not in papers
    }
    assert not missing, f"add to docs/papers.md: {sorted(missing)}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_modules_and_files_that_the_documents_name_exist():
    missing = set()
    for path in [*DOCUMENTS, ROOT / "AGENTS.md"]:
        text = path.read_text(encoding="utf-8")
        names = set(re.findall(r"`(sampo(?:\.\w+)+)", text)) - {"sampo.weightings"}  # a group of entry points
        missing |= {f"{path.name}: {name}" for name in names if not resolves(name)}
        files = re.findall(r"`((?:sampo|tests|benchmarks|scripts|docs|configs|notebooks)/[\w./-]+\.\w+)`", text)
        missing |= {f"{path.name}: {name}" for name in files if not (ROOT / name).exists()}
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## Unreleased")[1].split("\n## ")[0]
    for row in re.findall(r"^\| `sampo.*\| (.*) \|$", changes, re.MULTILINE):  # old modules | new modules
        missing |= {f"CHANGELOG.md: {name}" for name in re.findall(r"`(sampo[\w.]+)`", row) if not resolves(name)}
    assert not missing
