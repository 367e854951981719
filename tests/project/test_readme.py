"""README's steps, followed as a stranger would: one shell script, on a tiny model, judged by a server on loopback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import Server
from processes import ROOT, environment
from tiny import make_pairs, save_model

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    (found,) = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
    return found


def follow(script: str, folder: Path, model: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script of README, with another model, in a folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-e", "-c", f"MODEL={model}\n{script}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        env=environment(PATH=path, **more),
    )


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder after all steps, and what they printed."""
    folder = tmp_path_factory.mktemp("stranger")
    save_model(folder / "model", max_position_embeddings=1024)  # `sampo generate` writes up to 512
    pairs = make_pairs(60, conversational=True)
    pairs.select(range(40)).to_json(folder / "pairs.jsonl")
    rows = [{"prompt": prompt} for prompt in pairs[40:]["prompt"]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Server() as server:
        script, models = re.subn(r"^MODEL=.*\n", "", block("steps"), flags=re.MULTILINE)
        script, urls = re.subn(r"https://api\.openai\.com/v1", server.url, script)
        assert (models, urls) == (1, 1)
        done = follow(script, folder, folder / "model", OPENAI_API_KEY="none")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done.stdout


def test_a_stranger_gets_from_pairs_to_a_judged_comparison_of_two_trained_models(followed):
    folder, said = followed
    assert {path.name for path in (folder / "runs").iterdir()} == {"ours", "ours-merged", "dpo", "dpo-merged"}
    assert "Nothing was written." in said  # by the dry run
    assert "ours" in said
    assert "against dpo by" in said
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("pairs", "ours", "dpo"):
        assert part in page
    assert "the log of a training run" not in said  # nor is anything else of the steps missing on the page


def test_the_two_models_differ_by_the_method_alone(followed):
    folder, _ = followed
    cards = [(folder / "runs" / name / "README.md").read_text(encoding="utf-8") for name in ("ours", "dpo")]
    assert "sampled_sides: rejected" in cards[0]
    assert "sampled_sides: rejected" not in cards[1]
    assert "Direct Preference Optimization" in cards[1]


def test_the_readme_is_short_and_its_first_screen_has_picture_install_and_swap():
    lines = README.splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:40])
    assert first.index("docs/lab/bars.svg") < first.index("pip install") < first.index("SamPOTrainer(")


@pytest.mark.slow
def test_the_sweep_runs_on_the_recipe_of_the_third_step(tmp_path):
    save_model(tmp_path / "model", max_position_embeddings=1024)
    make_pairs(240, conversational=True).to_json(tmp_path / "pairs.jsonl")
    (init,) = re.findall(r"^sampo init .*$", block("steps"), re.MULTILINE)
    done = follow(f"{init}\n{block('sweep')}", tmp_path, tmp_path / "model")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    page = (tmp_path / "sweep" / "table.md").read_text(encoding="utf-8")
    assert "equal budget" in page
    assert len(re.findall(r"^\| \S+-s4[234] \| \d+ \|", page, re.MULTILINE)) == 12  # runs with their steps
