"""Each file in bad_inputs/ is one thing that a user can get wrong, and exactly what `sampo train` then says.

Such a file has a text `what`, the `files` of the case (beside a good `pairs.jsonl`), the `model` by its name below
(else a good one), `config` and `options` of the command, and what it `says`. `PYTHONPATH=tests/support python
tests/commands/test_bad_inputs.py` runs all cases, writes what is said now into the files, and leaves it to you to read
the difference.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import random
import re
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import make_model, make_pairs, make_tokenizer, save_model, training_options

from sampo import SamPOConfig, SamPOTrainer
from sampo.commands import train
from sampo.models.checks import find_token_issues

CASES = sorted(Path(__file__).with_name("bad_inputs").glob("*.yaml"))
GOOD = [{"prompt": f"w{i} w1 ", "chosen": f"w2 w{i} w3 ", "rejected": f"w4 w{i} "} for i in range(4)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewritten(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
    )


def lose_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.unlink()


def without_end_token(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


def with_begin_token(folder: Path) -> None:
    """Added by the tokenizer's own post-processor, as in Llama."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer.save_pretrained(folder)
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder)


def with_more_tokens(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more1", "more2"])
    tokenizer.save_pretrained(folder)


REMOTE_CODE = "from pathlib import Path\nPath('was-here').touch()\nclass Model: pass\nclass Config: pass\n"


def with_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Path("was-here")}, folder / "pytorch_model.bin")


def with_remote_code(folder: Path) -> None:
    (folder / "code.py").write_text(REMOTE_CODE)
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", "code.T"]}
    rewritten(folder / "config.json", model_type="mine", auto_map=auto, architectures=["Model"])


# name -> what is done to a good model
MODELS: dict[str, Callable[[Path], Any]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "broken config": lambda folder: cut(folder / "config.json"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut-off weights": lambda folder: cut(folder / "model.safetensors"),
    "lost shard": lose_shard,
    "no tokenizer": lose_tokenizer,
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "no end token": without_end_token,
    "tokenizer with more tokens": with_more_tokens,
    "adds a begin token": with_begin_token,
    "remote code": with_remote_code,
    "pickled weights": with_pickled_weights,
    "unknown kind": lambda folder: rewritten(
        folder / "config.json", model_type="nobody-knows", architectures=["Nobody"]
    ),
}


@contextlib.contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Root may read and write everything: give up that right (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) for a while."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this thread

    def call(function) -> None:
        if function(header, sets) != 0:
            pytest.skip("this system does not let root give up a right")

    call(libc.capget)
    before = sets[0]
    sets[0] &= ~0b110
    call(libc.capset)
    try:
        yield
    finally:
        sets[0] = before
        call(libc.capset)


def set_up(case: dict, folder: Path) -> list[str]:
    """Write the files of a case into the working directory; returns the options of the command."""
    files = {"pairs.jsonl": "".join(json.dumps(row) + "\n" for row in GOOD)} | case.get("files", {})
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    save_model(folder / "model")
    if "model" in case:
        MODELS[case["model"]](folder / "model")
    options = {"model_name_or_path": "model", "dataset_name": "pairs.jsonl", "output_dir": "out", "bf16": "false"}
    options |= {"use_cpu": "true", "save_strategy": "no", "logging_steps": "1"} | case.get("options", {})
    if "config" in case:
        options |= {"config": case["config"]}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_case(case: dict, folder: Path) -> tuple[int, str]:
    """Exit status and what is said; with the folder as the working directory."""
    words = set_up(case, folder)
    closed = [(folder / name, 0o000) for name in case.get("may_not_read", [])]
    closed += [(folder / name, 0o555) for name in case.get("may_not_write", [])]
    said = io.StringIO()
    before = content_of(folder)
    with contextlib.chdir(folder), contextlib.redirect_stderr(said):
        for path, mode in closed:
            path.chmod(mode)
        try:
            with as_an_ordinary_user() if closed else contextlib.nullcontext():
                status = train.start(words)
        except SystemExit as stop:
            status = stop.code
        finally:
            for path, _ in closed:
                path.chmod(0o755)
    after = content_of(folder)
    assert {name: digest for name, digest in after.items() if name in before} == before  # nothing is lost
    assert not after.keys() - before.keys()  # and nothing was trained
    return status, said.getvalue().replace(str(folder), "HERE")


def content_of(folder: Path) -> dict[str, str]:
    """Files and what is in them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_corpus_is_whole():
    assert len(CASES) >= 60
    used = {yaml.safe_load(path.read_text()).get("model") for path in CASES}
    assert used >= MODELS.keys()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_bad_input_ends_in_one_clear_error_before_the_first_step(path, tmp_path):
    case = yaml.safe_load(path.read_text(encoding="utf-8"))
    status, said = run_case(case, tmp_path)
    assert status == 2
    assert last_error(said) == case["says"]


# --- what only Python code can get wrong -----------------------------------------------------------------------------


def make_trainer(model, folder, **kwargs):
    return SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(folder)),
        train_dataset=make_pairs(4),
        processing_class=make_tokenizer(),
        **kwargs,
    )


def test_a_reference_of_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Policy and reference must have one vocabulary, got 69 and 80 token ids"):
        make_trainer(make_model(), tmp_path, ref_model=make_model(vocab_size=80))


def test_tokens_that_the_model_does_not_know_are_refused_in_evaluation_data_too(tmp_path):
    used = max(max(ids) for ids in make_tokenizer()(make_pairs(4)["chosen"][:])["input_ids"])
    with pytest.raises(
        ValueError, match=f"and a model that knows the ids below {used}. Use the model's own tokenizer"
    ):
        make_trainer(save_model(tmp_path / "smaller", vocab_size=used), tmp_path)
    data = Dataset.from_list([{"prompt": "w1 ", "chosen": "w2 ", "rejected": "w59 "}])
    small = save_model(tmp_path / "small", vocab_size=68)  # one less than there are tokens
    train_data = Dataset.from_list([{"prompt": "w1 ", "chosen": "w2 ", "rejected": "w5 "}])
    for evaluation in (data, {"a": train_data, "b": data}):
        with pytest.raises(ValueError, match=r"got the token id 68 \('w59'\)"):
            SamPOTrainer(
                model=small,
                args=SamPOConfig(**training_options(tmp_path)),
                train_dataset=train_data,
                eval_dataset=evaluation,
                processing_class=make_tokenizer(),
            )


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`output_dir` must be a folder that can be written to, got .*/file/out'"):
        SamPOTrainer(model="no-such-model", args=SamPOConfig(**training_options(tmp_path / "file" / "out")))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("seed", range(5))
def test_token_faults_are_those_of_a_loop_over_the_rows(seed):
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    rows = []
    for _ in range(2500):  # more than one batch
        ids = [[rng.choice([bos] * 9 + list(range(60))) for _ in range(rng.randint(0, 4))] for _ in range(3)]
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
    doubled = [i for i, row in enumerate(rows) if row["prompt_ids"][:2] == [bos, bos]]
    data = {"train": Dataset.from_list(rows)}
    assert len(doubled) > 10
    (fault,) = find_token_issues(data, vocabulary=bos + 1, tokenizer=tokenizer)
    assert f"got two in {len(doubled)} of 2500 pairs of the train data, first at rows {doubled[:10]} of" in fault
    _, fault = find_token_issues(data, vocabulary=bos, tokenizer=tokenizer)
    assert f"got the token id {bos} ('<s>') and a model that knows the ids below {bos}" in fault


def last_error(said: str) -> str:
    """The error itself, without warnings of libraries before it."""
    start = said.rfind("sampo train: error: ")
    assert said.count("sampo train: error: ") == 1, said
    return said[start:].strip()


def write_what_is_said() -> None:
    for path in CASES:
        case = yaml.safe_load(path.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            try:
                status, said = run_case(case, Path(folder))
            except Exception:
                print(f"--- {path.stem}: RAISED\n{traceback.format_exc()[-1500:]}\n")
                continue
        print(f"--- {path.stem}: {status}\n{said.strip()}\n")
        if said.count("sampo train: error: ") == 1:
            kept = re.sub(r"^says: .*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
            path.write_text(f"{kept}says: |-\n{textwrap.indent(last_error(said), '  ')}\n", encoding="utf-8")


if __name__ == "__main__":
    write_what_is_said()
