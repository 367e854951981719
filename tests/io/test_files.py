"""Atomic writes: a complete file or none, under a random name, never through a link, with the usual permissions."""

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment
from tiny import make_pairs

import sampo
from sampo.commands import audit, compare, judge, recipes, report
from sampo.io import files
from sampo.io import records as results
from sampo.io.files import (
    disk_is_full,
    new_folder,
    open_to_append,
    remove_left_overs,
    replacing,
    write_atomic,
)
from sampo.io.journal import Journal


def test_a_link_at_the_target_is_replaced_and_what_it_points_to_stays(tmp_path):
    victim, target = tmp_path / "victim", tmp_path / "out" / "report.html"
    victim.write_text("mine")
    target.parent.mkdir()
    target.symlink_to(victim)
    write_atomic(target, "page")
    assert (victim.read_text(), target.read_text(), target.is_symlink()) == ("mine", "page", False)


def test_temporary_names_cannot_be_foreseen_and_nothing_that_lies_there_is_used(tmp_path, monkeypatch):
    names = []
    real = os.open

    def watched(path, flags, *rest):
        if str(path).endswith(".part"):
            names.append(Path(path).name)
            assert flags & os.O_EXCL
            assert flags & os.O_NOFOLLOW
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", watched)
    for _ in range(3):
        write_atomic(tmp_path / "x", "content")
    assert len(set(names)) == 3
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)  # an attacker who can foresee them
    write_atomic(tmp_path / "y", "content")
    left = tmp_path / f".sampo-{files.mark_of(tmp_path / 'y')}-{'0' * 16}.part"
    left.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "y", "other")
    assert (victim.read_text(), (tmp_path / "y").read_text()) == ("mine", "content")


def test_a_name_as_long_as_a_name_can_be_is_written(tmp_path):
    path = tmp_path / ("é" * 127)
    write_atomic(path, "text")
    assert path.read_text() == "text"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask_and_a_replaced_one_keeps_its_own(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "new", "text")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
        (tmp_path / "new").chmod(0o640)
        write_atomic(tmp_path / "new", "other")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
        with new_folder(tmp_path / "folder") as aside:
            (aside / "file").write_text("text")
        assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    finally:
        os.umask(before)


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail(context, write):
        with context as new:
            write(new)
            _ = 1 / 0

    write_atomic(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError):
        fail(replacing(tmp_path / "x"), lambda file: file.write(b"half"))
    with pytest.raises(ZeroDivisionError):
        fail(new_folder(tmp_path / "folder"), lambda aside: (aside / "half").write_text("half"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_what_killed_writers_leave_is_removed_of_one_target_or_of_a_folder(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from sampo.io.files import new_folder, replacing
with replacing(Path("a.html")) as file, new_folder(Path("merged")) as folder:
    file.write(b"half"); file.flush()
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    remove_left_overs(tmp_path, tmp_path / "merged")
    assert [path.is_file() for path in tmp_path.iterdir()] == [True]
    remove_left_overs(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_grows_is_no_link(tmp_path):
    """An unfinished last line is cut off, which would be that of any file."""
    victim = tmp_path / "victim"
    victim.write_text("a line without an end")
    for name in ("records.jsonl", "answers.jsonl"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=r"`.*records.jsonl` must be a file to append to, got a symbolic link"):
        results.append(tmp_path / "records.jsonl", [])
    with pytest.raises(OSError, match=r"`.*answers.jsonl` must be a file to append to, got a symbolic link"):
        Journal(tmp_path / "answers.jsonl")
    assert victim.read_text() == "a line without an end"
    with open_to_append(tmp_path / "new" / "file") as file:
        file.write(b"x")
    assert (tmp_path / "new" / "file").read_bytes() == b"x"


def test_a_journal_that_was_rewritten_appends_at_its_end_and_stays_locked(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append({"n": 1}, {"n": 2})
        journal.rewrite([{"n": 2}])
        journal.append({"n": 3})
        with pytest.raises(BlockingIOError):
            Journal(tmp_path / "j")
    assert (tmp_path / "j").read_text() == '{"n": 2}\n{"n": 3}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["j"]


# --- commands in a folder that somebody else has prepared ------------------------------------------------------------


def outputs(tmp_path, out):
    """Each command that writes files, and the names of what it writes below `out`."""
    make_pairs(12).to_json(tmp_path / "pairs.jsonl")
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": "a" * i}) + "\n" for i in range(9)))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": "b" * 9}) + "\n" for i in range(9)))
    words = {
        report: [str(tmp_path / "nothing"), "--out", f"{out}/report.html"],
        audit: [str(tmp_path / "pairs.jsonl"), "--out", str(out)],
        judge: ["--system", str(answers), "--baseline", str(other), "--judge", "longer", "--out", f"{out}/j.jsonl"],
        compare: ["--answers", str(answers), str(other), "--out", f"{out}/both"],
    }
    (tmp_path / "nothing").mkdir()
    names = {
        report: ["report.html"],
        audit: ["audit.json", "records.jsonl", "pairs.parquet"],
        judge: ["j.jsonl", "j.control.jsonl", "j.summary.json", "j.csv", "j.records.jsonl"],
        compare: ["both.csv", "both.json", "both.records.jsonl"],
    }
    return words, names


@pytest.mark.parametrize("command", [report, audit, judge, compare], ids=lambda module: module.__name__)
def test_a_command_writes_through_no_link_in_a_foreign_folder(tmp_path, command):
    out = tmp_path / "foreign"
    out.mkdir()
    words, names = outputs(tmp_path, out)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in names[command]:
        for link in (name, f".{name}.part", f"{name}.part", f".{name}.tmp"):
            (out / link).symlink_to(victim)
    command.main(command.make_parser().parse_args(words[command]))
    assert victim.read_text() == "mine"
    for name in names[command]:
        assert not (out / name).is_symlink()
        assert (out / name).stat().st_size > 0
    assert not list(out.glob(".sampo-*"))


def test_a_recipe_is_not_copied_through_a_link(tmp_path):
    (tmp_path / "recipe.yaml").symlink_to(tmp_path / "victim")
    name = next(iter(recipes.recipes()))
    with pytest.raises(SystemExit, match="must not exist yet"):
        recipes.main(recipes.make_parser().parse_args(["cp", name, str(tmp_path / "recipe.yaml")]))
    assert not (tmp_path / "victim").exists()


def test_a_run_does_not_write_through_a_link_in_its_output_folder(tmp_path):
    """transformers and TRL would."""
    from sampo.checkpointing.files import find_output_folder_issue

    (tmp_path / "README.md").symlink_to(tmp_path / "victim")
    assert "must have no links to files, got ['README.md']" in find_output_folder_issue(tmp_path)


WRITERS = re.compile(r"\.write_text\(|\.write_bytes\(|\bopen\([^)]*[\"'][wax]|\.open\([\"'][wax]|copyfile\(|savefig\(")
ALLOWED = {
    "io/files.py",
    "training/merge.py",  # into a folder that `new_folder` has made
    "evaluation/harness.py",  # into a temporary folder
    "report/svg.py",  # into memory
    "lab/report.py",  # into a file of `replacing`
    "sweep/frontier.py",  # so does this
    "sweep/processes.py",  # logs of child processes, which grow
    "sweep/slurm.py",  # the same
    "evaluation/server_process.py",  # the same
    "commands/sweep.py",  # into a temporary folder
    "commands/init.py",  # so does this
}


def test_nothing_else_writes_files():
    root = Path(sampo.__file__).parent
    found = {path for path in root.rglob("*.py") if WRITERS.search(path.read_text(encoding="utf-8"))}
    assert {path.relative_to(root).as_posix() for path in found} == ALLOWED, "use `sampo.io.files` to write"


def test_a_full_disk_is_told_from_other_errors():
    assert disk_is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk_is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert disk_is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    error = RuntimeError("cannot write")
    error.__cause__ = OSError(errno.ENOSPC, "x")
    assert disk_is_full(error)
    assert not disk_is_full(OSError(errno.EFBIG, "File too large"))
    assert not disk_is_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk_is_full(RuntimeError("size mismatch: os error 280"))
