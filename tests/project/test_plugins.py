"""Weightings from outside: registered by a file, used by train, diagnose and lab; errors are one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import make_pairs, save_model, training_options

from sampo import Weighting, plugins, register_weighting
from sampo.io import records as results
from sampo.weighting import WEIGHTINGS

DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"
MICRO = "--sft_steps 6 --steps 2 --pairs 64 --questions 24 --judged_pairs 40 --groups all --methods last_half"
START = "import sys; from sampo.cli import main; sys.exit(main(sys.argv[1:]))"


def sampo(*words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != plugins.VARIABLE} | more
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    start = [sys.executable, "-c", START, *words]
    return subprocess.run(start, capture_output=True, text=True, check=False, timeout=170, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the plugin of the docs, a model, pairs and a configuration."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "mine.py").write_text(DOCS.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0])
    save_model(folder / "model")
    make_pairs(16).to_json(folder / "pairs.jsonl")
    options = training_options(folder / "out", max_steps=1, token_weighting="last_half")
    options |= {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "pairs.jsonl")}
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return folder


def test_train_takes_a_method_of_a_file_and_refuses_to_go_on_with_another_file(place):
    config = str(place / "run.yaml")
    more = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    done = sampo("train", "--plugin", "mine.py", "--config", config, *more, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    without = sampo("train", "--config", config, cwd=place)
    assert without.returncode == 2
    assert "`token_weighting` in" in without.stderr
    shutil.rmtree(place / "out" / "checkpoint-2")
    (place / "other.py").write_text((place / "mine.py").read_text().replace("2 * position", "3 * position"))
    other = sampo("train", "--plugin=other.py", "--config", config, *more, "--resume", "auto", cwd=place)
    assert other.returncode == 2
    assert "the file of the plugin's weighting" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [("cache",), ("iterate", "--rounds", "1", "--use_cpu")])
def test_cache_and_iterate_take_a_method_of_a_file(place, tmp_path, command):
    words = ["--config", str(place / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    words += ["--ref_cache_dir", str(tmp_path / "cache")]
    done = sampo(*command, "--plugin", "mine.py", *words, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_command_that_takes_a_plugin_says_so_in_its_help_and_in_the_docs():
    said = DOCS.read_text(encoding="utf-8")
    for name in plugins.COMMANDS_WITH_PLUGINS:
        page = DOCS.parent / "commands" / f"{name}.md"
        assert "| `--plugin` |" in page.read_text(encoding="utf-8"), name
        assert f"`{name}`" in said.split("`--plugin FILE` is an option")[1].split(". It may be")[0]
    others = [page.stem for page in (DOCS.parent / "commands").glob("*.md") if "| `--plugin` |" in page.read_text()]
    assert sorted(others) == sorted(plugins.COMMANDS_WITH_PLUGINS)


def test_the_completion_script_has_the_method(place):
    done = sampo("completion", "--plugin", "mine.py", "bash", cwd=place)
    assert "'train --token_weighting') values='all column decay expected last_half " in done.stdout, done.stderr


@pytest.mark.slow
def test_diagnose_and_lab_show_the_method_beside_ours(place):
    words = ["--policy", str(place / "model"), "--data", str(place / "pairs.jsonl"), "--out", str(place / "diagnosis")]
    done = sampo("diagnose", "--plugin", "mine.py", *words, "--use_cpu", "--resamples", "100", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    methods = {r.config.get("method") for r in results.read(place / "diagnosis" / "records.jsonl")}
    assert {"last_half", "all", "sampo"} <= methods
    lab = sampo("lab", "--plugin", "mine.py", *MICRO.split(), "--seeds", "1", "--out", str(place / "lab"), cwd=place)
    assert lab.returncode == 0, lab.stderr[-2000:]
    assert "second half" in lab.stdout


def test_a_process_that_another_one_starts_loads_the_same_files(place):
    code = "from sampo.weighting import REGISTERED; print(list(REGISTERED))"
    environment = os.environ | {plugins.VARIABLE: str(place / "mine.py")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "['last_half']"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "`plugin` must be a Python file, got 'broken.py'"),
        ("1 / 0", "got BROKEN with ZeroDivisionError: division by zero"),
        ("def", "with SyntaxError"),
        ("import sampo; sampo.register_weighting('all', sampo.WEIGHTINGS['all'])", "must be new, got 'all'"),
        ("import sampo; sampo.register_weighting('a b', sampo.WEIGHTINGS['all'])", "letters, digits and underscores"),
        ("import sampo; sampo.register_weighting('mine', print)", "must be a `sampo.Weighting`"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_sentence(text, says, tmp_path):
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    done = sampo("diagnose", "--plugin", "broken.py", "--policy", "m", "--data", "d", cwd=tmp_path)
    assert done.returncode == 2
    assert says.replace("BROKEN", str(file)) in done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("sampo diagnose: error: `plugin` must be")]
    assert len(ours) == 1
    assert "Traceback" not in done.stderr


def test_weights_of_a_wrong_shape_are_refused(monkeypatch):
    import torch

    from sampo import weighting

    monkeypatch.setattr(weighting, "REGISTERED", {})
    monkeypatch.setattr(weighting, "WEIGHTINGS", dict(WEIGHTINGS))
    register_weighting("one_row", Weighting(lambda tokens: tokens.mask[:1].float(), "one row", "", ""))
    with pytest.raises(ValueError, match=r"`one_row` must have the shape of `mask`, \(2, 3\), got \(1, 3\)"):
        weighting.token_weights("one_row", torch.ones(2, 3, dtype=torch.bool))
