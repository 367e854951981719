import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def env(*words: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sampo.cli", "env", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={"HOME": "/nonexistent", **variables}, cwd=ROOT
    )


def test_env_names_the_installed_version_of_every_requirement_and_every_extra(tmp_path):
    found = json.loads(env("--json", PATH="/usr/bin:/bin", SAMPO_CACHE=str(tmp_path)).stdout)
    names = [Requirement(line).name for line in PROJECT["dependencies"]]
    assert found["packages"] == {name: metadata.version(name) for name in names}
    assert set(found["extras"]) == set(PROJECT["optional-dependencies"])
    assert found["extras"]["judge"] == "installed"
    assert found["cache"] == {"reference log-probs": str(tmp_path / "ref_logps"), "caches": 0}


def test_env_says_what_an_engine_lacks(tmp_path):
    text = env(PATH=str(tmp_path)).stdout  # no compiler on the path
    assert "g++: missing" in text
    if not torch.accelerator.is_available():  # on a GPU DeepSpeed builds nothing to communicate
        assert "DeepSpeed ZeRO 1, 2, 3: missing g++, ninja" in text
    assert "one process: yes" in text
