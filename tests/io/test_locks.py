"""One process at a time in a folder: real processes that start twice, are killed, or run on another machine."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from kill_campaign import start_server
from processes import environment
from tiny import make_pairs, save_model

from sampo.checkpointing.files import STAGING, find_complete_checkpoint
from sampo.commands import audit, cache, compare, diagnose, train
from sampo.io import locks
from sampo.io import records as results
from sampo.io.locks import LOCK, FolderInUseError, Owner, alone_at, alone_in
from studies import run as study

HOLDER = """
import sys, time
from pathlib import Path
from sampo.io.locks import alone_in
with alone_in(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "SILENCE", 0.4)


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(FolderInUseError) as refused, alone_in(tmp_path):
        pass
    said = str(refused.value)
    assert f"can write into {tmp_path}, got a second one while process {holder.pid} on {socket.gethostname()}" in said
    assert "Wait for it or stop it; or choose another folder." in said
    assert (tmp_path / LOCK).exists()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder, caplog):
    (tmp_path / ".sampo-0-0.part").write_text("half a file")
    holder.kill()
    holder.wait()
    with caplog.at_level("INFO", logger="sampo"), alone_in(tmp_path):
        assert not (tmp_path / ".sampo-0-0.part").exists()
    assert f"was in use by process {holder.pid} on" in caplog.text
    assert "has ended" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_while_another_waits_hands_the_folder_on(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 30)
    threading.Timer(0.3, holder.kill).start()
    with alone_in(tmp_path):
        assert typed_owner(tmp_path).pid == os.getpid()


def typed_owner(folder):
    return Owner(**json.loads((folder / LOCK).read_text()))


def test_another_thread_of_the_process_is_another_one(tmp_path):
    refused = []

    def enter():
        try:
            with alone_in(tmp_path):
                refused.append(False)
        except FolderInUseError:
            refused.append(True)

    with alone_in(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    enter()
    assert refused == [True, False]


def test_within_a_thread_a_second_block_joins_the_first(tmp_path):
    with alone_in(tmp_path) as outer:
        with alone_in(tmp_path / ".." / tmp_path.name) as inner:
            assert inner == outer
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path):
    """As a data loader's worker that outlives the training for some seconds."""
    code = HOLDER.replace('    print("mine"', '    import os\n    if os.fork() == 0: time.sleep(20)\n    print("mine"')
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "mine\n"
        process.kill()
        process.wait()
        with alone_in(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_a_folder_that_was_made_for_the_lock_and_stays_empty_is_removed(tmp_path):
    with alone_in(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with alone_in(tmp_path / "new"):
        (tmp_path / "new" / "file").write_text("text")
    with alone_in(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / "file").exists()


def test_a_link_in_the_place_of_the_lock_is_refused_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(FolderInUseError, match="must be a file, got a link"), alone_in(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_no_secret_of_the_command_line_is_in_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sampo", "train", "--hub_token", "hf_secret"])
    with alone_in(tmp_path):
        assert typed_owner(tmp_path).command == "sampo train"
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token=hf_secret"])
    with alone_in(tmp_path):
        assert typed_owner(tmp_path).command == "train.py"


# --- another machine, and file systems without locks -----------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """The lock of a process on another machine."""
    owner = replace(Owner.me(), host="node17", machine="another boot", pid=4711)
    (tmp_path / LOCK).write_text(json.dumps(asdict(owner)))
    return tmp_path / LOCK


def test_a_living_owner_on_another_machine_is_seen_by_its_touch(tmp_path, elsewhere):
    over = threading.Event()

    def beat():
        while not over.wait(0.05):
            os.utime(elsewhere)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUseError) as refused, alone_in(tmp_path):
            pass
    finally:
        over.set()
        thread.join()
    assert "while process 4711 on node17" in str(refused.value)
    assert f"or remove {elsewhere} if that machine is gone" in str(refused.value)


def test_a_silent_owner_on_another_machine_is_taken_for_dead_with_a_warning(tmp_path, elsewhere, caplog):
    with alone_in(tmp_path):
        assert typed_owner(tmp_path).pid == os.getpid()
    assert "was in use by process 4711 on node17" in caplog.text
    assert "no longer responds; continuing" in caplog.text
    assert not elsewhere.exists()


def test_without_locks_of_the_kernel_a_living_owner_is_still_seen(tmp_path, monkeypatch):
    """On file systems without `flock` nothing but the file tells."""
    monkeypatch.setattr(locks, "fcntl", None)
    first = locks.LockFile(tmp_path / LOCK)
    first.take()
    with pytest.raises(FolderInUseError, match="One process at a time"), alone_in(tmp_path):
        pass
    first.released.set()  # as if it were killed
    with alone_in(tmp_path):
        pass


def test_many_processes_that_start_together_enter_one_after_the_other(tmp_path):
    """Each reads a number and writes the next one; a number that is lost shows two that were there at a time."""
    code = """
import random, sys, time
from pathlib import Path
from sampo.io import locks
rng, file = random.Random(int(sys.argv[2])), Path(sys.argv[1]) / "number"
for _ in range(20):
    with locks.alone_in(file.parent):
        number = int(file.read_text())
        time.sleep(rng.uniform(0, 0.002))
        file.write_text(str(number + 1))
    time.sleep(rng.uniform(0, 0.01))
"""
    (tmp_path / "number").write_text("0")
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(seed)], env=environment())
        for seed in range(5)
    ]
    assert [process.wait(100) for process in started] == [0] * 5
    assert (tmp_path / "number").read_text() == "100"


def test_processes_that_append_to_one_file_of_records_lose_none(tmp_path):
    code = """
import sys
from pathlib import Path
from sampo.io import records as results
for i in range(50):
    record = results.Record(name=f"{sys.argv[2]}-{i}", value=1.0, n=1, config={"x": "y" * 9000})
    results.append(Path(sys.argv[1]), [record])
"""
    path = tmp_path / "records.jsonl"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(seed)], env=environment()) for seed in range(3)
    ]
    assert [process.wait(100) for process in started] == [0] * 3
    assert len({record.name for record in results.read(path)}) == 150


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_commands_whose_folder_is_in_use_say_so_in_one_line(tmp_path, holder, model, capsys):
    data = tmp_path / "pairs.jsonl"
    make_pairs(8).to_json(data)
    words = ["--model_name_or_path", model, "--dataset_name", str(data), "--output_dir", str(tmp_path), "--use_cpu"]
    assert train.start([*words, "--report_to", "none", "--bf16", "false"]) == 2
    assert "sampo train: error: One process at a time can write into" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="sampo audit: error: One process at a time"):
        audit.main(audit.make_parser().parse_args([str(data), "--out", str(tmp_path)]))
    with pytest.raises(SystemExit, match="study: error: One process at a time"):
        study.main(study.make_parser().parse_args(["--report", "--out", str(tmp_path)]))
    with pytest.raises(SystemExit, match="sampo diagnose: error: One process at a time"):
        diagnose.main(
            diagnose.make_parser().parse_args(["--policy", model, "--data", str(data), "--out", str(tmp_path)])
        )


def test_one_output_is_locked_and_its_neighbour_is_not(tmp_path):
    code = HOLDER.replace("alone_in", "alone_at")
    out = tmp_path / "both"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout.readline() == "mine\n"
        (tmp_path / "answers.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
        words = ["--answers", str(tmp_path / "answers.jsonl"), "--out"]
        with pytest.raises(SystemExit, match="sampo compare: error: One process at a time"):
            compare.main(compare.make_parser().parse_args([*words, str(out)]))
        compare.main(compare.make_parser().parse_args([*words, str(tmp_path / "other")]))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert (tmp_path / "other.csv").exists()
    with alone_at(out):
        pass


def test_a_cache_that_is_being_filled_is_not_deleted(tmp_path, capsys, monkeypatch):
    from filelock import FileLock

    from sampo.reference_cache import store as ref_logps

    folder = tmp_path / ("a" * 24)
    folder.mkdir()
    monkeypatch.setattr(ref_logps, "WAIT_S", 0.1)
    with FileLock(f"{folder}.lock"):
        assert cache.run(["--ref_cache_dir", str(tmp_path), "--rm", "all"]) == 2
    assert "must not be deleted while a run fills it" in capsys.readouterr().err
    assert cache.run(["--ref_cache_dir", str(tmp_path), "--rm", "all"]) == 0
    assert not folder.exists()


# --- training that is started twice ----------------------------------------------------------------------------------


def start(model: str, folder: str, name: str, patience: float) -> None:
    """One of two starts of the same command; how it ended goes to a file."""
    import torch
    from resume_worker import make_run, outcome

    torch.set_num_threads(1)
    locks.PATIENCE = patience
    trainer = make_run(model, Path(folder) / "run", max_steps=25, save_total_limit=2, disable_tqdm=True)
    try:
        trainer.train(resume_from_checkpoint="auto")
        end = outcome(trainer)
    except FolderInUseError as error:
        end = {"refused": str(error)}
    (Path(folder) / f"{name}.json").write_text(json.dumps(end))


def run_double_starts(model, folder, trials, seed):
    """Whether each second start was refused; all that finish must equal a run that was alone."""
    context, rng = multiprocessing.get_context("forkserver"), random.Random(seed)
    start_server()

    def process(place, name, patience):
        place.mkdir(exist_ok=True)
        started = context.Process(target=start, args=(model, str(place), name, patience))
        started.start()
        return started

    process(folder / "alone", "first", 1).join()
    expected = json.loads((folder / "alone" / "first.json").read_text())
    refused = []
    for trial in range(trials):
        place = folder / str(trial)
        patience = rng.choice([0.05, 30])
        both = [process(place, "first", patience)]
        time.sleep(rng.choice([0, rng.uniform(0, 0.1), rng.uniform(0, 1.5)]))
        both.append(process(place, "second", patience))
        for one in both:
            one.join(100)
        assert [one.exitcode for one in both] == [0, 0]
        ends = [json.loads((place / f"{name}.json").read_text()) for name in ("first", "second")]
        done = [end for end in ends if "refused" not in end]
        assert done
        assert all(end == expected for end in done)
        assert find_complete_checkpoint(place / "run").path == place / "run" / "checkpoint-25"
        assert not (place / "run" / STAGING).exists()
        assert not (place / "run" / LOCK).exists()
        refused.append(len(done) == 1)
    return refused


@pytest.mark.slow
def test_of_two_starts_one_trains_to_the_end_and_the_other_waits_or_is_refused(model, tmp_path):
    assert len(run_double_starts(model, tmp_path, 4, seed=0)) == 4


@pytest.mark.slow
def test_of_many_double_starts_none_loses_a_run(model, tmp_path):
    refused = run_double_starts(model, tmp_path, 40, seed=1)
    assert 3 < sum(refused) < 37


# --- launchers that are killed ---------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def wait_until(there, limit_s):
    end = time.monotonic() + limit_s
    while not there():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at the death of a parent is Linux's")
def test_a_process_of_a_killed_launcher_gets_sigterm(tmp_path):
    worker = """
import os, signal, sys, time
from sampo.io.locks import end_with_launcher
def save(*_):
    open(sys.argv[1], "w").write("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {worker!r}, sys.argv[1]]))"
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(LOCAL_RANK="0"),
    )
    worker_pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not is_alive(worker_pid), 20)
    assert out.read_text() == "saved"


def test_a_process_whose_launcher_was_gone_before_it_asked_ends_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = "from sampo.io.locks import end_with_launcher; end_with_launcher(); print('goes on')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(SAMPO_LAUNCHER=str(gone.pid)), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (143, b"")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the signal at the death of a parent is Linux's")
def test_a_killed_launcher_takes_its_processes_along_and_the_same_command_goes_on(model, tmp_path):
    make_pairs(40).to_json(tmp_path / "pairs.jsonl")
    out = tmp_path / "run"
    words = ["train", "--accelerate_config", "cpu_ddp", "--model_name_or_path", model, "--resume", "auto"]
    words += ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(out), "--max_steps", "60"]
    words += ["--save_steps", "1", "--save_total_limit", "2", "--report_to", "none", "--bf16", "false"]
    command = [sys.executable, "-m", "sampo.cli", *words]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=said)
        wait_until(lambda: find_complete_checkpoint(out).path is not None, 120)
        workers = children_of(process.pid)
        assert len(workers) == 2
        process.kill()
        process.wait()
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(map(is_alive, workers))
    assert "Resuming from" in done.stderr
    assert find_complete_checkpoint(out).path == out / "checkpoint-60"
