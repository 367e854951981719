"""Interrupted and resumed runs against runs that were not; checkpoints that are whole or absent."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_campaign import run_campaign
from resume_worker import Interrupted, make_run, outcome
from tiny import make_model, make_pairs, save_model
from transformers import TrainerCallback

from sampo.checkpointing import files as checkpoints
from sampo.checkpointing.files import MANIFEST, STAGING, CheckpointNotSavedError, find_complete_checkpoint
from sampo.checkpointing.fingerprint import FREE, ROUNDING_OPTIONS, describe_data, hash_weight_samples
from sampo.checkpointing.resume import ResumeRefusedError
from sampo.checkpointing.signals import Preempted
from sampo.commands import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(model, folder, *, resume=None, **options):
    """What a launch saw, micro-batch by micro-batch, and what came out; None where it was interrupted."""
    seen = []
    trainer = make_run(model, folder, see=seen.append, **options)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Interrupted:
        return seen, None
    return seen, outcome(trainer)


def is_continued_by(before, after, whole):
    """Whether the micro-batches of the steps that count, of both launches, are those of the whole run."""
    first = after[0]["step"] if after else math.inf
    return [line for line in before if line["step"] < first] + after == whole


# --- exactness -------------------------------------------------------------------------------------------------------

# options of a run, and the numbers of micro-batches after which it is interrupted
KINDS = {
    "full": ({"eval_strategy": "steps", "eval_steps": 3}, (0, 1, 3, 4, 7, 11)),
    "LoRA with dropout": ({"lora": True}, (4, 5)),
    "cached reference": ({"precompute_ref_log_probs": True}, (6,)),
    "full micro-batches": ({"pair_stream": "true", "max_tokens_per_forward": 60}, (9,)),
    "several subsets": ({"mask_samples": 3, "max_steps": 4, "save_total_limit": 1}, (3,)),
}


def compare_interrupted(model, folder, options, stops):
    """Weights, theta, data order, subsets, losses and the whole log; 2.5 steps an epoch, so over epoch borders too."""
    whole, end = run(model, folder / "whole", **options)
    for stop_at in stops:
        before, nothing = run(model, folder / str(stop_at), stop_at=stop_at, **options)
        assert nothing is None
        after, resumed_end = run(model, folder / str(stop_at), resume="auto", **options)
        assert len(before) == stop_at
        assert is_continued_by(before, after, whole), stop_at
        assert resumed_end == end, stop_at
        shutil.rmtree(folder / str(stop_at))
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_interrupted_in_a_micro_batch_goes_on_to_the_same_bits(model, tmp_path, kind):
    compare_interrupted(model, tmp_path, *KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "LoRA with dropout"])
def test_a_run_interrupted_in_any_micro_batch_goes_on_to_the_same_bits(model, tmp_path, kind):
    whole = compare_interrupted(model, tmp_path, KINDS[kind][0], range(12))
    assert len({line["rows"] for line in whole}) == len(whole) == 12  # each third step ends an epoch with one


def test_a_checkpoint_within_a_line_of_the_log_keeps_what_was_measured(model, tmp_path):
    """Of seven steps and lines of three, all checkpoints but one have a line half filled."""
    options = {"logging_steps": 3}
    _, end = run(model, tmp_path / "whole", **options)
    assert [line["step"] for line in end["log"]] == [3, 6]
    for step in (2, 4):
        _, resumed = run(model, tmp_path / str(step), resume=str(tmp_path / "whole" / f"checkpoint-{step}"), **options)
        assert resumed["log"] == end["log"]
    assert end["log"][1]["num_tokens"] > end["log"][0]["num_tokens"] > 0


def test_after_a_resume_it_is_known_how_many_rows_of_the_last_batch_count(model, tmp_path):
    """Processes fill it up with rows of the first batch, which are in no metric; accelerate alone forgets how many."""
    seen = []

    class Remainders(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, trainer.accelerator.gradient_state.remainder))

    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_run(model, tmp_path, pairs=18, max_steps=5)
        trainer.add_callback(Remainders())
        trainer.train(resume_from_checkpoint=resume)
    assert seen[:5] == [(step, 18 % 4) for step in range(1, 6)]
    assert seen[5:] == seen[2:5]


def test_a_finished_run_trains_nothing_more(model, tmp_path):
    """Within an epoch transformers would train another step."""
    options = {"lr_scheduler_type": "constant"}
    _, end = run(model, tmp_path / "steps", **options)
    seen, again = run(model, tmp_path / "steps", resume=True, **options)
    assert (seen, again) == ([], end)
    assert (end["step"], checkpoints.numbered_checkpoints(tmp_path / "steps")[-1].name) == (7, "checkpoint-7")

    options |= {"max_steps": -1, "num_train_epochs": 2}
    _, end = run(model, tmp_path / "epochs", **options)
    seen, again = run(model, tmp_path / "epochs", resume=True, **options)
    assert (seen, again) == ([], end)
    assert end["step"] == 6


def test_a_finished_run_goes_on_when_it_is_made_longer(model, tmp_path, caplog):
    options = {"lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 2}
    _, end = run(model, tmp_path / "whole", **options)
    run(model, tmp_path / "short", **options | {"max_steps": 4})
    seen, longer = run(model, tmp_path / "short", resume=True, **options)
    assert seen[0]["step"] == 4
    assert longer == end
    assert "follows the schedule of the new length" not in caplog.text
    run(model, tmp_path / "linear", max_steps=4)
    run(model, tmp_path / "linear", max_steps=5, resume=True)
    assert "`max_steps` was 4 and is 5: from here on the learning rate follows the schedule" in caplog.text


# --- whole or absent -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run of four steps with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(model, folder, max_steps=4, save_steps=2)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGES = {
    "a file cut off": (lambda f: cut(f / "model.safetensors"), "model.safetensors has .* bytes in place of"),
    "an empty file": (lambda f: (f / "optimizer.pt").write_bytes(b""), "optimizer.pt has 0 bytes in place of"),
    "a bit flipped": (lambda f: flip(f / "optimizer.pt"), "the content of optimizer.pt is not what was written"),
    "the scheduler lost": (lambda f: (f / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "the random state lost": (lambda f: (f / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"it has no {MANIFEST}: it is incomplete, or was not"),
    "half a manifest": (lambda f: cut(f / MANIFEST), f"its {MANIFEST} cannot be read"),
    "a number of the run changed": (
        lambda f: edit(f / MANIFEST, '"`seed`": 7', '"`seed`": 8'),
        "its entries must have the checksum",
    ),
    "a key of the run lost": (lambda f: edit(f / MANIFEST, '"must"', '"most"'), "its entries must have the checksum"),
    "the checksum lost": (lambda f: edit(f / MANIFEST, '"sha256_of_the_rest"', '"sha256"'), "must have the checksum"),
    "another format": (lambda f: edit(f / MANIFEST, '"format": 2', '"format": 1'), "without other keys than"),
    "a manifest that is a list": (lambda f: (f / MANIFEST).write_text("[]"), "must be an object, got a list of 0"),
    "a manifest nested too deep": (
        lambda f: (f / MANIFEST).write_text("[" * 100_000 + "]" * 100_000),
        "must be JSON that is not nested deeper",
    ),
    "an empty folder": (lambda f: [path.unlink() for path in f.iterdir()], f"it has no {MANIFEST}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_refused_by_name(finished, tmp_path, damage):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    do, reason = DAMAGES[damage]
    assert find_complete_checkpoint(folder).path == folder / "checkpoint-4"
    do(folder / "checkpoint-4")
    found = find_complete_checkpoint(folder)
    assert found.path == folder / "checkpoint-2"
    assert list(found.skipped) == [folder / "checkpoint-4"]
    assert re.search(reason, found.skipped[folder / "checkpoint-4"])


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_says_which_it_skips_and_why(
    model, finished, tmp_path, caplog
):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ResumeRefusedError, match=r"got .*checkpoint-4, and scheduler.pt is missing\. With `true`"):
        run(model, folder, resume=str(folder / "checkpoint-4"), max_steps=4, save_steps=2)
    with caplog.at_level("INFO", logger="sampo"):
        seen, _ = run(model, folder, resume=True, max_steps=4, save_steps=2)
    assert [line["step"] for line in seen] == [2, 3, 3]
    assert "checkpoint-4 is skipped: scheduler.pt is missing." in caplog.text
    assert f"Resuming from {folder / 'checkpoint-2'}." in caplog.text
    assert find_complete_checkpoint(folder).path == folder / "checkpoint-4"  # written anew over the damaged one


@pytest.mark.parametrize("last", ["4", "nowhere"])
def test_a_checkpoint_that_is_a_link_is_gone_on_from_and_replaced_as_a_link(model, finished, tmp_path, last):
    """Whatever is replaced or removed is the link; what it points to stays as it is."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (2, 4):
        (folder / f"checkpoint-{step}").rename(elsewhere / str(step))
    (folder / "checkpoint-2").symlink_to(elsewhere / "2")
    (folder / "checkpoint-4").symlink_to(elsewhere / last)
    (folder / STAGING).symlink_to(elsewhere)
    before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}
    options = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    assert find_complete_checkpoint(folder).path == folder / f"checkpoint-{'4' if last == '4' else '2'}"
    seen, _ = run(model, folder, resume=str(folder / "checkpoint-2"), **options)
    assert [line["step"] for line in seen] == [2, 3, 3]
    left = [path for path in folder.iterdir() if path.name.startswith(("checkpoint-", "_"))]
    assert [(path.name, path.is_symlink()) for path in left] == [("checkpoint-4", False)]
    assert {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")} == before


def test_without_a_whole_checkpoint_true_is_refused_and_auto_begins(model, tmp_path):
    with pytest.raises(
        ResumeRefusedError, match=r"needs a complete checkpoint in `output_dir`, got none in .*`resume_from"
    ):
        run(model, tmp_path, resume=True)
    seen, _ = run(model, tmp_path, resume="auto", max_steps=1)
    assert [line["step"] for line in seen] == [0, 0]


def test_weights_without_the_state_of_the_training_are_no_checkpoint_to_go_on_from(model, tmp_path):
    run(model, tmp_path, max_steps=1, save_only_model=True)
    with pytest.raises(ResumeRefusedError, match="saved with `save_only_model` and has no optimizer state"):
        run(model, tmp_path, resume=True, max_steps=2)


def test_what_a_killed_process_had_written_whole_gets_its_name_and_what_is_half_is_cleared(model, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / STAGING).mkdir()
    (folder / "checkpoint-4").rename(folder / STAGING / "checkpoint-4")
    checkpoints.finish_interrupted(folder)
    assert find_complete_checkpoint(folder).path == folder / "checkpoint-4"

    (folder / "checkpoint-4").rename(folder / STAGING / "checkpoint-4")
    (folder / STAGING / "checkpoint-4" / MANIFEST).unlink()
    found = find_complete_checkpoint(folder)
    assert found.path == folder / "checkpoint-2"
    assert found.skipped == {folder / STAGING / "checkpoint-4": "it was still being written when its run ended"}
    run(model, folder, resume=True, max_steps=4, save_steps=2)
    assert not (folder / STAGING).exists()


@pytest.mark.parametrize("limit", [1, 2])
def test_older_checkpoints_go_only_when_the_new_one_is_whole(model, tmp_path, limit, monkeypatch):
    """Looked at whenever a folder gets or loses its name: at least one complete checkpoint is always there."""
    there = []
    rename = os.rename

    def watched(source, target):
        rename(source, target)
        there.append([path.name for path in checkpoints.numbered_checkpoints(tmp_path) if (path / MANIFEST).exists()])

    monkeypatch.setattr(os, "rename", watched)
    run(model, tmp_path, max_steps=4, save_total_limit=limit)
    assert len(there) == 4 + 4 - limit
    assert all(there)
    assert there[-1] == [f"checkpoint-{step}" for step in range(5 - limit, 5)]


def test_half_checkpoints_go_first_and_the_best_and_the_new_one_stay(tmp_path):
    for step in (1, 2, 3, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 9:
            checkpoints.write_manifest(tmp_path / f"checkpoint-{step}", checkpoints.RunRecord())
    new, best = tmp_path / "checkpoint-3", tmp_path / "checkpoint-1"
    assert checkpoints.remove_older(new, None) == checkpoints.remove_older(new, 4) == []
    assert checkpoints.remove_older(new, 3, keep=str(best)) == [tmp_path / "checkpoint-9"]
    assert checkpoints.remove_older(new, 1, keep=str(best)) == [tmp_path / "checkpoint-2"]
    assert checkpoints.numbered_checkpoints(tmp_path) == [best, new]


def test_the_best_checkpoint_is_found_under_its_name(model, tmp_path):
    """Training that makes the loss worse: the first checkpoint is the best."""
    options = {"max_steps": 3, "learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "save_total_limit": 2, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make_run(model, tmp_path, **options)
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert find_complete_checkpoint(tmp_path).path == tmp_path / "checkpoint-3"
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(best)
    assert checkpoints.find_checkpoint_issue(best) is None


FULL_DISK = """
import os, shutil, subprocess, sys
sys.path[:0] = {paths!r}
import test_resume
test_resume.run_until_full({model!r}, {folder!r}, lambda: test_resume.fill_disk({folder!r}), "Free some space, and")
"""


def run_until_full(model, folder, fill, advice):
    """Saves the checkpoints 1 and 2, of which the last stays, and fails at 3."""

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                fill()

    trainer = make_run(model, Path(folder) / "run", save_total_limit=1)
    trainer.add_callback(Fill())
    with pytest.raises(CheckpointNotSavedError) as failed:
        trainer.train()
    said = str(failed.value)
    assert said.startswith("checkpoint-3 must be written completely, got ")
    assert f"checkpoint-2 in {folder}/run are unchanged. {advice} resume with `resume_from_check" in said
    assert ("MB are free now" in said) == ("Free some space" in said)
    left = Path(folder) / "run"
    assert [path.name for path in checkpoints.numbered_checkpoints(left)] == ["checkpoint-2"]
    assert not (left / STAGING).exists()
    assert find_complete_checkpoint(left).path == left / "checkpoint-2"


def fill_disk(folder):
    """Leave less room than a checkpoint takes."""
    (Path(folder) / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - 150_000))


def test_a_file_that_cannot_grow_ends_in_one_error_and_the_former_checkpoint_stays(model, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, before[1]))  # noqa: E731
        run_until_full(model, tmp_path, limit, "Fix the cause, and")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_in_one_error_and_the_former_checkpoint_stays(model, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    code = FULL_DISK.format(paths=paths, model=model, folder=str(folder))
    mount = f'mount -t tmpfs -o size=4m tmpfs {folder} || exit 9; exec {sys.executable} -c "$0"'
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", mount, code], capture_output=True, text=True, timeout=300)
    if done.returncode == 9 or "unshare" in done.stderr:
        pytest.skip("this system lets nobody mount a file system")
    assert done.returncode == 0, done.stderr[-2000:]


# --- the same run ----------------------------------------------------------------------------------------------------

CHANGES = {
    "another data set": ({"data_seed": 1}, "the training data was"),
    "fewer pairs": ({"pairs": 19}, "the training data was"),
    "another weighting": ({"token_weighting": "expected"}, '`token_weighting` was "sampo" and is "expected"'),
    "another option": ({"keep_end_token": True}, "`keep_end_token` was false and is true"),
    "another seed": ({"seed": 8}, "`seed` was 7 and is 8"),
    "another learning rate": ({"learning_rate": 2e-3}, "`learning_rate` was 0.001 and is 0.002"),
    "another batch": ({"per_device_train_batch_size": 2}, "the pairs per step was 8 and is 4"),
    "another cut": ({"max_length": 20}, "`max_length` was 1024 and is 20"),
    "an adapter": ({"lora": True}, "`r` of the adapter was null and is 4"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_has_changed_is_refused_and_the_change_is_named(model, finished, change):
    options, named = CHANGES[change]
    with pytest.raises(ResumeRefusedError) as refused:
        run(model, finished, resume=True, **{"max_steps": 4, "save_steps": 2} | options)
    assert named in str(refused.value)
    assert "Restore it, or start a new run in another `output_dir`" in str(refused.value)


def test_another_model_is_refused_though_it_has_the_same_shape(finished, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(ResumeRefusedError, match="the weights of model and reference was"):
        run(other, finished, resume=True, max_steps=4, save_steps=2)
    wider = save_model(tmp_path / "wider", intermediate_size=64)
    with pytest.raises(ResumeRefusedError, match="`intermediate_size` of the model was 48 and is 64"):
        run(wider, finished, resume=True, max_steps=4, save_steps=2)


def test_what_does_not_change_the_result_may_change_and_rounding_is_warned_of(model, finished, tmp_path, caplog):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    moved = shutil.copytree(model, tmp_path / "moved")
    options = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "run_name": "again", "report_to": "none"}
    run(str(moved), folder, resume=str(folder / "checkpoint-2"), **options)
    assert "except for rounding" not in caplog.text
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    run(model, folder, resume=str(folder / "checkpoint-2"), **options | split)
    assert "equals an uninterrupted one except for rounding: " in caplog.text
    assert "`per_device_train_batch_size` was 4 and is 2" in caplog.text
    assert "`gradient_checkpointing` was false and is true" in caplog.text


def test_a_run_whose_reference_moves_cannot_be_resumed(model, tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 2}
    run(model, tmp_path, **options)
    with pytest.raises(ResumeRefusedError, match="its reference has moved"):
        run(model, tmp_path, resume=True, **options)


def test_the_options_that_are_not_compared_exist():
    from sampo import SamPOConfig

    assert SamPOConfig.__dataclass_fields__.keys() >= FREE | ROUNDING_OPTIONS
    assert not FREE & ROUNDING_OPTIONS


def test_the_hash_of_the_data_is_that_of_the_token_lists_whatever_the_arrow_table_looks_like():
    from datasets import Dataset, concatenate_datasets

    rows = [{"prompt_ids": [i], "chosen_ids": [1] * i, "rejected_ids": [2, i]} for i in range(7)]
    plain = describe_data(Dataset.from_list(rows))
    shuffled = Dataset.from_list(rows[::-1]).select(range(6, -1, -1))
    chunked = concatenate_datasets([Dataset.from_list(rows[:3]), Dataset.from_list(rows[3:])])
    assert (
        plain
        == describe_data(shuffled)
        == describe_data(chunked)
        == describe_data(Dataset.from_list(rows).add_column("x", rows))
    )
    moved = [dict(row) for row in rows]
    moved[0]["chosen_ids"], moved[1]["chosen_ids"] = [1], []  # the same tokens, in other rows
    assert describe_data(Dataset.from_list(moved)) != plain != describe_data(Dataset.from_list(rows[::-1]))


def test_the_hash_of_the_weights_sees_any_tensor():
    one, same = make_model(), make_model()
    assert hash_weight_samples([one]) == hash_weight_samples([same]) != hash_weight_samples([one, same])
    with torch.no_grad():
        next(reversed(list(same.parameters()))).add_(1e-3)
    assert hash_weight_samples([one]) != hash_weight_samples([same])


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["in a micro-batch", "in a save"])
def test_sigterm_saves_and_stops_with_143_and_the_run_goes_on_to_the_same_bits(
    model, tmp_path, moment, monkeypatch, caplog
):
    options = {"save_steps": 3, "eval_strategy": "steps", "eval_steps": 6}
    whole, end = run(model, tmp_path / "whole", **options)
    seen = []

    def see(line):
        seen.append(line)
        if moment == "in a micro-batch" and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_run(model, tmp_path / "run", see=see, **options)
    if moment == "in a save":
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), rename(*args)))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is handler
    step = 2 if moment == "in a micro-batch" else 3
    assert stopped.value.code == 143
    assert isinstance(stopped.value, Preempted)
    assert stopped.value.checkpoint == tmp_path / "run" / f"checkpoint-{step}"
    assert checkpoints.numbered_checkpoints(tmp_path / "run") == [stopped.value.checkpoint]
    after, resumed = run(model, tmp_path / "run", resume="auto", **options)
    assert is_continued_by(seen, after, whole)
    assert resumed == end


def test_without_checkpoints_sigterm_is_left_alone(model, tmp_path):
    handlers = []
    trainer = make_run(model, tmp_path, save_strategy="no", max_steps=1)
    trainer._compute_loss, compute = (
        lambda *args: handlers.append(signal.getsignal(signal.SIGTERM)) or compute(*args),
        trainer._compute_loss,
    )
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert handlers == [before] * 2


def test_transformers_own_checkpoint_at_sigterm_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="`enable_jit_checkpoint` must be off, got true"):
        make_run(model, tmp_path, enable_jit_checkpoint=True)


def command_line(model, folder, *more):
    make_pairs(20).to_json(folder / "pairs.jsonl")
    return [
        *(
            "--model_name_or_path",
            model,
            "--dataset_name",
            str(folder / "pairs.jsonl"),
            "--use_cpu",
            "--bf16",
            "false",
        ),
        *("--output_dir", str(folder / "out"), "--logging_steps", "1", "--per_device_train_batch_size", "4"),
        *("--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--save_steps", "100000"),
        *more,
    ]


def test_a_command_stopped_by_sigterm_exits_with_143_and_the_same_command_goes_on(model, tmp_path):
    words = command_line(model, tmp_path, "--resume", "auto")
    command = [sys.executable, "-m", "sampo.cli", "train", *words]
    with subprocess.Popen([*command, "--max_steps", "100000"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait(120) == 143
    (checkpoint,) = checkpoints.numbered_checkpoints(tmp_path / "out")
    step = checkpoints.step_of(checkpoint)
    assert not (tmp_path / "out" / "model.safetensors").exists()  # a model that is not trained is not saved as one
    assert train.start([*words, "--max_steps", str(step + 2)]) == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, step + 3))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_command_refuses_to_begin_among_the_checkpoints_of_another_run(model, tmp_path, capsys):
    words = command_line(model, tmp_path, "--max_steps", "2")
    assert train.start(words) == 0
    assert train.start(words) == 2
    said = capsys.readouterr().err
    assert "must not mix its checkpoints with those of another one" in said
    assert "checkpoint-2. Set `resume: auto` to resume" in said
    assert train.start([*words, "--resume", "auto", "--seed", "8"]) == 2
    assert "`seed` was 42 and is 8" in capsys.readouterr().err
    assert train.start([*words, "--resume", "auto"]) == 0  # it is finished


def test_the_command_takes_one_way_of_resuming(model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.start(command_line(model, tmp_path, "--resume", "auto", "--resume_from_checkpoint", "true"))
    assert stopped.value.code == 2
    assert "`resume` and `resume_from_checkpoint` exclude each other" in capsys.readouterr().err


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def check_campaign(result, kills):
    assert result.differences == []
    assert result.half_checkpoints == 0
    assert result.kills == kills
    assert result.kills_in_save > 0


def test_a_run_killed_twice_at_random_moments_comes_to_the_same_bits(model, tmp_path):
    result = run_campaign(model, tmp_path, kills=2, seed=3, max_steps=25, save_total_limit=2)
    check_campaign(result, 2)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_run_killed_thirty_times_at_random_moments_comes_to_the_same_bits(model, tmp_path, lora):
    check_campaign(run_campaign(model, tmp_path, kills=30, seed=4, max_steps=450, save_total_limit=2, lora=lora), 30)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_twenty_times_come_to_the_same_bits(model, tmp_path):
    result = run_campaign(
        model,
        tmp_path,
        kills=20,
        seed=5,
        processes=2,
        max_steps=300,
        save_total_limit=2,
    )
    check_campaign(result, 20)


@pytest.mark.slow
def test_sigterm_to_a_launcher_of_two_processes_saves_one_checkpoint_and_the_same_command_goes_on(model, tmp_path):
    words = command_line(model, tmp_path, "--resume", "auto", "--per_device_train_batch_size", "2")
    command = [sys.executable, "-m", "sampo.cli", "train", "--accelerate_config", "cpu_ddp", *words, "--max_steps"]
    with subprocess.Popen([*command, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGTERM)
                break
        said = process.communicate(timeout=120)[1]
        assert process.returncode != 0, said[-3000:]
    (checkpoint,) = checkpoints.numbered_checkpoints(tmp_path / "out")
    assert checkpoints.find_checkpoint_issue(checkpoint) is None
    step = checkpoints.step_of(checkpoint)
    done = subprocess.run([*command, str(step + 2)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, step + 3))
