"""Servers that `--serve` starts: real processes on loopback, asked through the real client."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_server import Server, completion
from processes import environment
from tiny import save_model

from sampo.cli import main
from sampo.evaluation.answers.answers import read_answers
from sampo.evaluation.endpoint import Endpoint
from sampo.evaluation.server_process import ServerProcess

SERVER = Path(__file__).parents[1] / "support" / "model_server.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a b {'c ' * i}"}) + "\n" for i in range(5)))
    return str(path)


def serve(port):
    return shlex.join([sys.executable, str(SERVER), "{model}", str(port)])


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(there, seconds=60):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_started_server_gives_the_answers_of_this_process_and_is_gone_afterwards(model, port, prompts, tmp_path):
    sampling = ["--prompts", prompts, "--samples", "2", "--temperature", "1", "--max_tokens", "9"]
    assert main(["generate", model, *sampling, "--device", "cpu", "--out", str(tmp_path / "here.jsonl")]) == 0
    words = ["generate", model, *sampling, "--url", f"http://127.0.0.1:{port}/v1", "--serve", serve(port)]
    words += ["--out", str(tmp_path / "there.jsonl")]
    assert main(words) == 0
    assert not is_listening(port)
    log = tmp_path / "there.server.log"
    assert log.read_text() == f"serving {model}\n"
    here, there = (read_answers(tmp_path / name) for name in ("here.jsonl", "there.jsonl"))
    assert len(here) == 10
    assert [(one.answer, one.tokens, one.stop) for one in here] == [
        (one.answer, one.tokens, one.stop) for one in there
    ]
    assert main(words) == 0  # nothing is missing, so nothing is started
    assert log.read_text() == f"serving {model}\n"


def test_a_server_that_answers_already_is_not_taken_for_the_started_one(model, prompts, tmp_path):
    with Server(lambda request, number: completion("x")) as other:
        words = ["generate", model, "--prompts", prompts, "--url", other.url, "--serve", serve(other.port)]
        with pytest.raises(SystemExit, match=r"got one that runs at .* already\. Stop it"):
            main([*words, "--out", str(tmp_path / "a.jsonl")])
    assert not other.requests
    assert not (tmp_path / "a.server.log").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([sys.executable, "-c", "print('no GPU'); raise SystemExit(1)"], "got one that ended.*ends with: no GPU"),
        (["no-such-program"], "got one that ended.*No such file"),
        ([sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(99)"], "within 3 s.*loading"),
    ],
)
def test_a_server_that_does_not_come_up_is_an_error_with_its_last_lines(command, said, port, tmp_path):
    server = ServerProcess(shlex.join(command), "m", tmp_path / "log", limit=3)
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "m", server=server)
    with pytest.raises(ValueError, match=said.replace(" ", r"[\s\S]*?")):
        list(endpoint.for_each([1], str))
    endpoint.close()


def test_the_server_and_its_processes_end_with_the_command_that_was_killed(model, port, prompts, tmp_path):
    words = [sys.executable, "-m", "sampo.cli", "generate", model, "--prompts", prompts, "--max_tokens", "100000"]
    words += ["--url", f"http://127.0.0.1:{port}/v1", "--serve", serve(port), "--out", str(tmp_path / "a.jsonl")]
    for sign in (signal.SIGKILL, signal.SIGINT):
        run = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
        wait_until(lambda: is_listening(port))
        os.kill(run.pid, sign)
        error = run.communicate()[1]
        wait_until(lambda: not is_listening(port))
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["judge", "--system", "S", "--baseline", "B", "--judge", "longer", "--serve", "x"], "`serve` goes with"),
        (["generate", "M", "--serve", "x"], "`serve` must go with the `url`"),
        (["generate", "M", "--url", "http://localhost:1/v1", "--serve", " "], "`serve` must be a command line.*none"),
        (["generate", "M", "--url", "http://localhost:1/v1", "--serve", "a 'b"], "`serve` must be a command line"),
    ],
)
def test_what_cannot_be_served_is_refused(words, said, prompts, tmp_path):
    for name in ("S", "B"):
        (tmp_path / name).write_text('{"prompt": "p", "answer": "a"}\n')
    words = [str(tmp_path / word) if word in ("S", "B") else word for word in words]
    words += ["--prompts", prompts] if words[0] == "generate" else []
    with pytest.raises(SystemExit, match=said):
        main([*words, "--out", str(tmp_path / "o.jsonl")])
