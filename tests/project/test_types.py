"""The types that the package ships, used from outside as a project would that checks its own code."""

import subprocess
import sys
from pathlib import Path

import pytest

import sampo

RIGHT = """
from datasets import Dataset
from torch import Tensor

from sampo import PairTokens, SamPOConfig, SamPOTrainer, Weighting, load_preferences, register_weighting

config = SamPOConfig(output_dir="out", token_weighting="sampo", length_penalty="learned", mask_samples=2)
learned: bool = config.learns_length_penalty
data: Dataset = load_preferences("pairs.jsonl", on_bad_rows="drop")
trainer = SamPOTrainer("model", args=config, train_dataset=data)
trainer.train(resume_from_checkpoint="auto")
selected: Tensor = trainer.prepare_batch({}).positions


def first_half(tokens: PairTokens) -> Tensor:
    return tokens.mask * (tokens.mask.cumsum(dim=1) <= tokens.lengths[:, None] / 2)


register_weighting("first_half", Weighting(first_half, "First half", "1 on the first T / 2 tokens", "an example"))
"""
WRONG = """
from sampo import SamPOConfig

config = SamPOConfig(output_dir="out", mask_samples="two")
missing = config.length_penality
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What mypy finds in the two files, run once."""
    pytest.importorskip("mypy")
    folder, root = tmp_path_factory.mktemp("project"), Path(sampo.__file__).parents[1]
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\nignore_missing_imports = True\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--follow-imports=silent"]
    environment = {"MYPYPATH": str(root), "PATH": "/usr/bin:/bin", "MYPY_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [*command, "right.py", "wrong.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not done.stderr
    return done.stdout


def test_the_marker_of_types_is_part_of_the_package():
    assert (Path(sampo.__file__).parent / "py.typed").exists()


def test_correct_uses_of_the_public_names_pass(found):
    assert "right.py" not in found


def test_wrong_uses_are_found(found):
    assert 'wrong.py:4: error: Argument "mask_samples" to "SamPOConfig" has incompatible type "str"' in found
    assert 'wrong.py:5: error: "SamPOConfig" has no attribute "length_penality"' in found
