"""On a terminal of 80 columns no line of a command is wider; only a command to copy and a single long word are."""

import json
import random
import shutil

import pytest
from rich.cells import cell_len
from tiny import make_pairs, save_model

from sampo import cli
from sampo.evaluation.answers.answers import Answer, write_answers

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LONG = "sampo-onesided-beta-0.1-lr-1e-6-seed-42"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs of sources with long names, models with long names, answers."""
    folder, rng = tmp_path_factory.mktemp("wide"), random.Random(0)
    cached = folder / "models--acme--tiny-dpo" / "snapshots" / COMMIT
    save_model(cached)
    shutil.copytree(cached, folder / LONG)
    sources = ["helpful", "a source of pairs whose name is long", "harmless"]
    rows = [{**row, "source": sources[i % 3]} for i, row in enumerate(make_pairs(24))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in (LONG, "base"):
        answers = [
            Answer(prompt=f"q{i}", answer="so " * rng.randint(1, 30) + f"town{i % 3}", extra={"reference": "town1"})
            for i in range(30)
        ]
        write_answers(folder / f"{name}.jsonl", answers)
    return folder


def models(folder):
    return [str(folder / LONG), str(folder / "models--acme--tiny-dpo" / "snapshots" / COMMIT)]


COMMANDS = {
    "audit": lambda f, out: [
        f / "pairs.jsonl",
        "--tokenizer",
        f / LONG,
        "--by",
        "source",
        "--max_length",
        8,
        16,
        1024,
    ],
    "diagnose": lambda f, out: [
        *("--policy", *models(f), "--reference", f / LONG, "--data", f / "pairs.jsonl", "--by", "source"),
        *("--use_cpu", "--resamples", 100, "--out", out / "d", "--ref_cache_dir", out / "cache"),
    ],
    "generate": lambda f, out: [
        *(models(f)[1], "--prompts", f / "base.jsonl", "--out", out / "g.jsonl", "--max_tokens", 2, "--device", "cpu")
    ],
    "judge": lambda f, out: [
        *("--system", f / f"{LONG}.jsonl", "--baseline", f / "base.jsonl", "--out", out / "j.jsonl"),
        *("--judge", "implicit", "--model", models(f)[1], "--ref_model", models(f)[0], "--device", "cpu", "--style"),
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_wider_than_the_terminal(folder, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([name, *map(str, COMMANDS[name](folder, tmp_path))]) == 0
    printed = capsys.readouterr().out.split("Next: ")[0]
    wide = [line for line in printed.splitlines() if cell_len(line) > 80 and " " in line.strip()]
    assert printed
    assert wide == []
    if name in ("diagnose", "judge"):
        shown = printed.replace(str(tmp_path), "")
        assert "tiny-dpo@0123456" in shown
        assert COMMIT not in shown
