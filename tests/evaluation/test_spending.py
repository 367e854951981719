"""What requests cost, and that no cap in money is passed."""

import random
import threading
import time

import pytest
from judge_server import Reply, Server, completion

from sampo.cli import main
from sampo.evaluation.answers.answers import Answer, write_answers
from sampo.evaluation.endpoint import Endpoint, Unanswered
from sampo.evaluation.spending import Spending

ASKED = [{"role": "user", "content": "x" * 300}]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"price_in": 1.0}, "`price_in` and `price_out` must be given together"),
        ({"max_cost": 1.0}, "`max_cost` must come with"),
        ({"price_in": -1.0, "price_out": 1.0}, "`price_in` must be 0 or more"),
        ({"price_in": 1.0, "price_out": 1.0, "max_cost": float("nan")}, "`max_cost` must be 0 or more and finite"),
    ],
)
def test_settings_without_a_meaning_are_errors(settings, words):
    with pytest.raises(ValueError, match=words):
        Spending(**settings)


def test_the_most_that_a_request_can_cost_is_above_what_it_costs():
    spending = Spending(3, 15, max_cost=1)
    for text in ("word " * 200, "字" * 200, "😀" * 50, "{}[]();" * 100):
        tokens = len(text.encode()) / 3  # no common tokenizer makes more of these
        most = spending.most([{"role": "user", "content": text}], {"max_tokens": 100})
        assert most >= spending.price(int(tokens), 100)
    assert Spending(3, 15).most(ASKED, {}) == 0
    with pytest.raises(ValueError, match="bounded by one of"):
        spending.most(ASKED, {"temperature": 0})


def test_a_cap_is_never_passed_and_money_that_was_not_spent_is_free_again():
    spending, most, over = Spending(1, 1, max_cost=1.0), 0.3, []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while spending.reserve(most):
            time.sleep(0.001)
            tokens = rng.randint(1, 60_000)  # 0.06 at most
            spending.settle(most, (tokens, 0))
            if spending.price(spending.tokens_in, 0) > 1.0:
                over.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert not over
    assert 0.7 - 1e-9 < spending.row()["price"] <= 1.0  # less than one more request fits


@pytest.mark.parametrize(
    ("usage", "billed", "left"),
    [((100_000, 0), True, 0.9), ((0, 0), True, 0.5), (None, True, 0.5), (None, False, 1.0)],
)
def test_what_has_no_reply_counts_as_far_as_it_may_have_been_billed(usage, billed, left):
    spending = Spending(1, 1, max_cost=1.0)
    assert spending.reserve(0.5)
    spending.settle(0.5, usage, billed=billed)
    assert spending.reserve(left - 1e-9, wait=False)
    assert not spending.reserve(1e-6, wait=False)


def endpoint_at(server: Server, **settings) -> Endpoint:
    spending = Spending(10, 100, max_cost=settings.pop("max_cost", None))
    return Endpoint(server.url, "m", backoff=0.01, timeout=1.0, spending=spending, **settings)


def test_a_capped_endpoint_stops_before_the_cap_and_says_so():
    with Server(lambda request, number: completion("fine")) as server:
        endpoint = endpoint_at(server, max_cost=0.02)  # 100 and 7 tokens: 0.0017; at most a bit above 0.0111
        for _ in range(6):
            endpoint.ask(ASKED, {"max_tokens": 100})
        with pytest.raises(Unanswered, match="not_asked"):
            endpoint.ask(ASKED, {"max_tokens": 100})
        endpoint.close()
    assert len(server.requests) == 6
    assert "`max_cost` of 0.02 has no room for a request that may cost 0.01" in endpoint.why_stopped
    assert endpoint.spending.row() == {"tokens_in": 600, "tokens_out": 42, "price": pytest.approx(0.0102)}


def test_requests_that_the_server_refuses_cost_nothing_and_lost_ones_do():
    def rule(request, number):
        return Reply(b"", 500) if number < 3 else completion("fine")

    with Server(rule) as server:
        endpoint = endpoint_at(server, max_cost=0.0125, retries=5)
        endpoint.ask(ASKED, {"max_tokens": 100})
        endpoint.close()
        assert len(server.requests) == 4
    with Server(lambda request, number: Reply(b"", drop=True)) as server:
        endpoint = endpoint_at(server, max_cost=0.03, retries=5)
        with pytest.raises(Unanswered, match="not_asked"):
            endpoint.ask(ASKED, {"max_tokens": 100})
        endpoint.close()
        assert len(server.requests) == 2


def test_generate_knows_the_cap_and_reports_the_cost(tmp_path, capsys):
    write_answers(tmp_path / "prompts.jsonl", [Answer(prompt=f"q{i}", answer="-") for i in range(6)])
    words = ["generate", "m", "--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    prices = ["--price_in", "10", "--price_out", "100", "--max_tokens", "50"]
    with Server(lambda request, number: completion("fine")) as server:
        with pytest.raises(SystemExit) as stopped:
            main([*words, *prices, "--url", server.url, "--max_cost", "0.01"])
        assert stopped.value.code == 4
        capped = len(server.requests)
        assert 0 < capped < 6
        assert f"{capped} requests; {100 * capped} tokens read, {7 * capped} written, price 0.00" in (
            capsys.readouterr().out
        )
        assert main([*words, *prices, "--url", server.url]) == 0
        assert len(server.requests) == 6


def test_a_cap_without_prices_is_an_error(tmp_path):
    write_answers(tmp_path / "a.jsonl", [Answer(prompt="q", answer="-")])
    words = ["generate", "m", "--prompts", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit, match="`max_cost` must come with `price_in` and `price_out`"):
        main([*words, "--url", "http://127.0.0.1:9/v1", "--max_cost", "1"])
