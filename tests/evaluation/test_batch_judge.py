"""Batches: the same verdicts as by single requests, from the same cache, and no batch is lost or made twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_server import Batches
from judge_server import Reply, Server, completion, goods, judge

from sampo.cli import main
from sampo.evaluation.answers.answers import Answer, write_answers
from sampo.evaluation.endpoint import Endpoint
from sampo.evaluation.judging import batch_judge, templates
from sampo.evaluation.judging.batch_judge import BatchJudge
from sampo.evaluation.judging.endpoint_judge import EndpointJudge
from sampo.evaluation.judging.judges import AnswerPair, judge_pairs
from sampo.evaluation.spending import Spending
from sampo.io.journal import Journal, read_rows

KEY = "sk-do-not-tell-0123456789"
N = 12


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def pairs(n: int = N) -> list[AnswerPair]:
    texts = ["good", "good good", "plain", "bad", "good plain good good"]
    return [
        AnswerPair(
            Answer(prompt=f"question {i}", answer=texts[i % 5]),
            Answer(prompt=f"question {i}", answer=texts[(i + 1) % 4]),
        )
        for i in range(n)
    ]


def truths(n: int = N) -> list[float]:
    """Of both orders of each pair."""
    counts = [(goods(pair.system.answer), goods(pair.baseline.answer)) for pair in pairs(n)]
    return [0.5 if a == b else float(a > b) for a, b in counts for _ in range(2)]


def asking(url: str, cache: Path, *, kind=BatchJudge, attempts: int = 2, spending=None, key=None, **settings):
    endpoint = Endpoint(url, "judge-1", api_key=key, backoff=0.01, timeout=5.0, spending=spending, **settings)
    more = {"poll_seconds": 0.01} if kind is BatchJudge else {}
    return kind(endpoint, templates.load("helpfulness"), cache, attempts=attempts, **more)


def judged(batches: Batches, cache: Path, n: int = N, **settings):
    """(rows, judge) of one run against a server of its own, whose address is always the same to the cache."""
    with Server(other=batches, port=settings.pop("port", 0)) as server:
        made = asking(server.url, cache, **settings)
        try:
            return judge_pairs(made, pairs(n)), made, server
        finally:
            made.close()


def test_a_batch_says_what_single_requests_say_and_each_finds_the_others_replies(tmp_path):
    batches = Batches()
    with Server(other=batches) as server:
        one, other = asking(server.url, tmp_path / "a"), asking(server.url, tmp_path / "b", kind=EndpointJudge)
        rows, single = judge_pairs(one, pairs()), judge_pairs(other, pairs())
        assert [row.preference for row in rows] == truths()
        assert rows == single
        assert one.about == other.about
        one.close()
        other.close()
        assert len(batches.batches) == 1
        bodies = sorted(json.dumps(row["body"], sort_keys=True) for row in batches.requests)
        assert bodies == sorted(json.dumps(request, sort_keys=True) for request in server.requests)
        for cache, kind in (("a", EndpointJudge), ("b", BatchJudge)):
            again = asking(server.url, tmp_path / cache, kind=kind)
            assert judge_pairs(again, pairs()) == rows
            assert again.endpoint.requests == 0
            again.close()
        assert len(batches.batches) == 1
        assert len(server.requests) == 2 * N


def test_the_file_of_requests_is_what_the_batch_api_wants(tmp_path):
    batches = Batches()
    judged(batches, tmp_path / "c", 3)
    rows = batches.requests
    assert {(row["method"], row["url"]) for row in rows} == {("POST", "/v1/chat/completions")}
    assert len({row["custom_id"] for row in rows}) == 6
    assert all(len(row["custom_id"]) <= 64 for row in rows)
    assert {row["body"]["model"] for row in rows} == {"judge-1"}


def test_a_reply_that_cannot_be_read_is_asked_for_again_in_a_second_batch(tmp_path):
    seen: Counter[str] = Counter()

    def rule(request, number):
        text = request["messages"][-1]["content"]
        seen[text] += 1
        return completion("I cannot say.") if seen[text] == 1 and number % 3 == 0 else judge(request)

    batches = Batches(rule)
    rows, _, _ = judged(batches, tmp_path / "c")
    assert [row.preference for row in rows] == truths()
    assert [len(batches.files[b["input_file_id"]].splitlines()) for b in batches.batches] == [2 * N, 8]
    never = Batches(lambda request, number: completion("I cannot say."))
    rows, _, _ = judged(never, tmp_path / "d", 2)
    assert {row.failure for row in rows} == {"unparseable"}
    assert len(never.batches) == 2  # `attempts`


def test_requests_that_fail_are_no_ties_and_are_asked_for_by_the_next_run(tmp_path):
    def rule(request, number):
        return Reply(b'{"error": {"message": "slow down"}}', 429) if number in (1, 4) else judge(request)

    batches = Batches(rule)
    with Server(other=batches) as server:
        one = asking(server.url, tmp_path / "c")
        rows = judge_pairs(one, pairs())
        one.close()
        failed = [row for row in rows if row.failure]
        assert [row.failure for row in failed] == ["rate_limited"] * 2
        assert "slow down" in failed[0].detail
        batches.rule = lambda request, number: judge(request)
        one = asking(server.url, tmp_path / "c")
        rows = judge_pairs(one, pairs())
        one.close()
    assert [row.preference for row in rows] == truths()
    assert len(batches.requests) == 2 * N + 2


def test_an_expired_batch_gives_what_it_has_and_the_rest_is_asked_for_later(tmp_path):
    batches = Batches(ends=("expired", "completed"))
    with Server(other=batches) as server:
        for number in range(2):
            one = asking(server.url, tmp_path / "c")
            rows = judge_pairs(one, pairs())
            one.close()
            failed = [row.failure for row in rows if row.failure]
            assert failed == (["not_asked"] * N if number == 0 else [])
    assert [row.preference for row in rows] == truths()
    assert len(batches.requests) == 3 * N


def test_a_refused_batch_ends_the_run_and_says_why(tmp_path):
    rows, one, _ = judged(Batches(ends=("failed",)), tmp_path / "c")
    assert {row.failure for row in rows} == {"rejected"}
    assert "invalid model" in rows[0].detail
    assert one.endpoint.stopped_for_good
    with Server(other=lambda method, path, body: Reply(b"no such thing", 404)) as server:
        one = asking(server.url, tmp_path / "d")
        rows = judge_pairs(one, pairs(2))
        one.close()
    assert {row.failure for row in rows} == {"rejected"}
    assert one.endpoint.stopped_for_good


def test_a_batch_whose_creation_was_not_heard_of_is_found_and_not_made_again(tmp_path):
    batches = Batches(lost=(0,))
    batches.batches.append({"id": "batch_of_another", "object": "batch", "status": "completed", "metadata": None})
    batches.lost = (1,)
    rows, _, _ = judged(batches, tmp_path / "c")
    assert [row.preference for row in rows] == truths()
    assert len(batches.batches) == 2


class StopNowError(Exception):
    pass


@pytest.mark.parametrize("moment", range(1, 6))  # upload, create, look, look, results
def test_a_run_that_ends_at_any_moment_is_continued_without_a_second_batch(moment, tmp_path, monkeypatch):
    """The run ends at call number `moment`, after the server has done what it asks for, or before."""
    for after in (False, True):
        batches = Batches()
        calls = 0
        real = Endpoint.call

        def call(self, send, after=after, real=real, **more):
            nonlocal calls
            calls += 1
            if calls == moment:
                if after:
                    real(self, send, **more)
                raise StopNowError
            return real(self, send, **more)

        with Server(other=batches) as server:
            monkeypatch.setattr(Endpoint, "call", call)
            one = asking(server.url, tmp_path / f"{after}")
            try:
                judge_pairs(one, pairs())
            except StopNowError:
                pass
            finally:
                one.close()
            monkeypatch.setattr(Endpoint, "call", real)
            one = asking(server.url, tmp_path / f"{after}")
            rows = judge_pairs(one, pairs())
            one.close()
        assert calls >= moment
        assert [row.preference for row in rows] == truths()
        assert len(batches.batches) == 1
        assert len(read_rows(tmp_path / f"{after}")) == 2 * N


def test_results_whose_reading_was_interrupted_are_not_kept_twice(tmp_path, monkeypatch):
    batches = Batches()
    with Server(other=batches) as server:
        one = asking(server.url, tmp_path / "c")
        monkeypatch.setattr(Journal, "append", stop_at_the_end(Journal.append))
        with pytest.raises(StopNowError):
            judge_pairs(one, pairs())
        one.close()
        monkeypatch.undo()
        lines = (tmp_path / "c").read_bytes().splitlines(keepends=True)
        assert len(lines) == 2 * N
        (tmp_path / "c").write_bytes(b"".join(lines[:7]))  # as if the power had failed then
        one = asking(server.url, tmp_path / "c")
        rows = judge_pairs(one, pairs(N + 1))
        one.close()
    assert [row.preference for row in rows] == truths(N + 1)
    assert len(batches.requests) == 2 * N + 2
    assert len(read_rows(tmp_path / "c")) == 2 * N + 2


def stop_at_the_end(append):
    def stopped(self, *rows):
        if any("status" in row for row in rows):  # the row that says that a batch was read
            raise StopNowError
        append(self, *rows)

    return stopped


def test_many_requests_are_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_judge, "MAX_BATCH_REQUESTS", 10)
    batches = Batches()
    rows, _, _ = judged(batches, tmp_path / "c")
    assert [row.preference for row in rows] == truths()
    assert [len(batches.files[b["input_file_id"]].splitlines()) for b in batches.batches] == [10, 10, 4]


def test_the_caps_hold_for_batches_too(tmp_path):
    batches = Batches()
    rows, one, _ = judged(batches, tmp_path / "c", max_requests=5)
    assert len(batches.requests) == 5
    assert sum(row.failure == "not_asked" for row in rows) == 2 * N - 5
    assert "max_requests" in one.endpoint.why_stopped
    spending = Spending(10, 100, max_cost=0.3)  # a request may cost a bit more than 512 × 100 / 1e6
    batches = Batches()
    rows, one, _ = judged(batches, tmp_path / "d", spending=spending)
    assert len(batches.requests) == 5
    assert "max_cost" in one.endpoint.why_stopped
    assert spending.row() == {"tokens_in": 500, "tokens_out": 35, "price": pytest.approx(0.0085)}


def test_a_key_that_comes_back_is_not_kept(tmp_path):
    batches = Batches(lambda request, number: completion(f"Your key is {KEY}.\nPreferred: A"))
    _, _, server = judged(batches, tmp_path / "c.jsonl", 2, key=KEY)
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in map(lower, server.headers))
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text()


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@pytest.mark.parametrize(
    "content", [b"", b"not JSON\n", b'{"custom_id": "x"}\n', b"[]\n\xff\xfe\n", b'{"custom_id": 7, ']
)
def test_results_that_cannot_be_read_are_failures(content, tmp_path):
    batches = Batches()
    real = batches._end

    def end(batch, lines, status):
        real(batch, lines, status)
        batches.files[batch["output_file_id"]] = content

    batches._end = end
    rows, _, _ = judged(batches, tmp_path / "c", 2)
    assert {row.failure for row in rows} == {"not_asked"}


# --- the command ---------------------------------------------------------------------------------------------------


def words_of(folder: Path, url: str) -> list[str]:
    for name, which in (("ours", "system"), ("base", "baseline")):
        write_answers(folder / f"{name}.jsonl", [getattr(pair, which) for pair in pairs()])
    files = ["--system", str(folder / "ours.jsonl"), "--baseline", str(folder / "base.jsonl")]
    files += ["--out", str(folder / "out.jsonl"), "--cache", str(folder / "cache.jsonl")]
    return ["judge", *files, "--judge", "endpoint", "--url", url, "--model", "m", "--batch", "--poll_seconds", "0.05"]


def test_the_command_asks_for_pairs_and_control_in_one_batch_and_counts_the_cost(tmp_path, capsys):
    batches = Batches()
    with Server(other=batches) as server:
        prices = ["--price_in", "10", "--price_out", "100"]
        assert main([*words_of(tmp_path, server.url), *prices]) == 0
        assert main([*words_of(tmp_path, server.url), *prices]) == 0
    assert len(batches.batches) == 1
    cost = json.loads((tmp_path / "out.summary.json").read_text())["cost"]
    made = len(batches.requests)
    assert (cost["requests"], cost["tokens_in"]) == (0, 0)
    assert cost["all_runs"] == {
        "replies": made,
        "tokens_in": 100 * made,
        "tokens_out": 7 * made,
        "price": pytest.approx(1700 * made / 1e6),
    }
    assert f"with earlier runs: {made} requests" in capsys.readouterr().out


def test_a_killed_command_continues_its_batch(tmp_path):
    batches = Batches(looks=10**9)
    with Server(other=batches) as server:
        words = words_of(tmp_path, server.url)
        process = subprocess.Popen([sys.executable, "-m", "sampo.cli", *words], env=os.environ.copy())
        while ("GET", "batches/batch_0") not in batches.calls:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        batches.looks = 0
        assert main(words) == 0
    assert len(batches.batches) == 1


def test_batches_need_a_judge_that_makes_requests(tmp_path):
    words = words_of(tmp_path, "http://127.0.0.1:9/v1")
    words[words.index("endpoint")] = "longer"
    with pytest.raises(SystemExit, match="`batch` goes with `judge` endpoint, got longer"):
        main(words)
