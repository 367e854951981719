"""A server that means harm: it keeps a request open, sends too much or nonsense, commands a terminal, has the key."""

import base64
import gzip
import html
import json
import random
import re
import string
import time
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import Reply, Server, completion, judge
from test_judges import KEY, asking, files, judged, pairs, words_of

from sampo.cli import main
from sampo.evaluation import endpoint as endpoint_module
from sampo.evaluation.endpoint import Endpoint
from sampo.evaluation.judging.judges import judge_pairs, read_judgements
from sampo.evaluation.server_text import MOST_TOKENS, Redaction, read_reply, retry_after, usage_of, visible
from sampo.io.journal import read_rows

GOOD = completion("Preferred: A").body


# --- the time and the size of a request ----------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False], ids=["head", "body"])
@pytest.mark.parametrize("status", [200, 500])
def test_a_server_that_drips_is_given_up_after_the_time_of_the_whole_request(head, status, tmp_path):
    dripping = Reply(GOOD, status, drip=0.05, drip_head=head)
    with Server(lambda request, number: dripping) as server:
        began = time.monotonic()
        rows, _ = judged(server, tmp_path / "c", pairs(1), timeout=0.4, retries=0, give_up_after=9)
        assert time.monotonic() - began < 2.5
    assert {row.failure for row in rows} == {"timeout"}
    assert not read_rows(tmp_path / "c")


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_reply_above_the_limit_is_a_failed_verdict_and_not_kept(status, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_BODY", 100_000)

    def rule(request, number):
        return Reply(b" " * 100_001, status) if number % 2 else judge(request)

    with Server(rule) as server:
        rows, endpoint = judged(server, tmp_path / "c", pairs(8), concurrency=1, retries=0)
    assert [row.failure for row in rows] == [None, "too_large"] * 8
    assert endpoint.why_stopped is None
    assert len(read_rows(tmp_path / "c")) == 8
    assert "at most 0.0953674 MiB" in rows[1].detail


def test_nothing_is_unpacked(tmp_path):
    bomb = gzip.compress(GOOD + b" " * 10_000_000)
    with Server(lambda request, number: Reply(bomb, headers={"Content-Encoding": "gzip"})) as server:
        rows, _ = judged(server, tmp_path / "c", pairs(1), attempts=1)
    assert {headers["accept-encoding"] for headers in server.headers} == {"identity"}
    assert {row.failure for row in rows} <= {"not_utf8", "broken_reply"}


@pytest.mark.parametrize("charset", ["rot13", "undefined", "idna", "utf-7", "nonsense"])
@pytest.mark.parametrize("status", [200, 500, 400])
def test_a_strange_charset_ends_no_run(charset, status, tmp_path):
    reply = Reply(GOOD + "é".encode(), status, headers={"Content-Type": f"application/json; charset={charset}"})
    with Server(lambda request, number: reply) as server:
        rows, _ = judged(server, tmp_path / "c", pairs(1), attempts=1, retries=0)
    assert {row.failure for row in rows} == {{200: "broken_reply", 400: "rejected", 500: "server_error"}[status]}


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_must_be_a_time(timeout):
    with pytest.raises(ValueError, match="`timeout` must be above 0"):
        Endpoint("http://localhost:1/v1", "m", timeout=timeout)


# --- nonsense ------------------------------------------------------------------------------------------------------


def with_usage(text: str) -> bytes:
    return GOOD.replace(b'{"prompt_tokens": 100, "completion_tokens": 7}', text.encode())


NONSENSE = {
    "deep list": b"[" * 100_000,
    "deep content": b'{"choices": [{"message": {"content": ' + b"[" * 900 + b"]" * 900 + b"}}]}",
    "deep object": b'{"a":' * 100_000,
    "long number": b'{"choices": ' + b"9" * 5_000 + b"}",
    "a number as choice": b'{"choices": [1e400]}',
    "text as message": b'{"choices": [{"message": "Preferred: A"}]}',
    "object as content": b'{"choices": [{"message": {"content": {"a": NaN}}}]}',
    "lone surrogate": b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": {"a": []}}]}',
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_a_failed_verdict_and_leaves_a_cache_that_can_be_read(name, tmp_path):
    def rule(request, number):
        return Reply(NONSENSE[name]) if number % 2 else judge(request)

    with Server(rule) as server:
        rows, endpoint = judged(server, tmp_path / "c", pairs(4), concurrency=1, attempts=1)
        assert [row.failure in ("broken_reply", "unparseable") for row in rows] == [False, True] * 4
        again, _ = judged(server, tmp_path / "c", pairs(4), attempts=1)
    assert again == rows
    assert endpoint.why_stopped is None
    assert len(read_rows(tmp_path / "c")) == 8


@pytest.mark.parametrize(
    "usage",
    ["{}", "null", "[]", '{"prompt_tokens": 1e400, "completion_tokens": -5}', '{"prompt_tokens": NaN}', '"x"', "7",
     '{"prompt_tokens": "12", "completion_tokens": true}', '{"prompt_tokens": 1.5, "completion_tokens": [[1]]}',
     '{"prompt_tokens": 99999999999999999999999, "completion_tokens": null}'],
)  # fmt: skip
def test_tokens_that_cannot_be_counted_are_none_and_the_verdict_stands(usage, tmp_path):
    assert usage_of(with_usage(usage).decode()) == (0, 0)
    with Server(lambda request, number: Reply(with_usage(usage))) as server:
        judge_ = asking(server, tmp_path / "c")
        rows = judge_pairs(judge_, pairs(2))
        judge_.close()
    assert (judge_.endpoint.spending.tokens_in, judge_.endpoint.spending.tokens_out) == (0, 0)
    assert [row.preference for row in rows] == [1.0, 0.0] * 2


@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda b: b.decode("utf-8", "surrogateescape")))
@settings(deadline=None, max_examples=200)
def test_no_body_raises_anything(body):
    for text in (body, f'{{"choices": [{body}], "usage": {body}}}'):
        read_reply(text)
        assert all(0 <= count <= MOST_TOKENS for count in usage_of(text))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("nan", None), ("-nan", None), ("-5", 0.0), ("1e400", float("inf")), ("soon", None), ("", None), ("0.5", 0.5),
     ("Fri, 31 Dec 99999999999 23:59:59 GMT", None), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("\u0663", 3.0)],
)  # fmt: skip
def test_a_pause_that_cannot_be_is_none(value, expected):
    assert retry_after({"retry-after": value}) == expected


@pytest.mark.parametrize("value", ["nan", "-5", "Fri, 31 Dec 99999999999 23:59:59 GMT", "inf", "9" * 400])
def test_a_strange_pause_ends_no_run(value, tmp_path):
    def rule(request, number):
        return judge(request) if number % 2 else Reply(b"{}", 429, {"Retry-After": value})

    with Server(rule) as server:
        rows, endpoint = judged(server, tmp_path / "c", pairs(2), concurrency=1)
    assert len(rows) == 4
    assert {row.failure for row in rows} <= {None, "rate_limited"}
    assert endpoint.why_stopped is None


# --- the terminal --------------------------------------------------------------------------------------------------

COMMANDS = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eabc\u2066\u200b\r\x00\x08\ud800"


def test_no_text_of_a_server_commands_the_terminal(tmp_path, capfd):
    these = pairs(4)
    files(tmp_path, these)

    def rule(request, number):
        said = COMMANDS.encode("utf-8", "surrogatepass")
        kinds = [
            completion(COMMANDS),
            Reply(said, 400),
            Reply(said),
            Reply(said, 500),
            completion(None, refusal=COMMANDS),
        ]
        return kinds[number % len(kinds)]

    with Server(rule) as server:
        more = ["--url", server.url, "--model", "m\x1b[2J", "--retries", "1", "--concurrency", "1"]
        with pytest.raises(SystemExit):
            main([*words_of(tmp_path), *more])
        main_out = "".join(capfd.readouterr())
        prompts = tmp_path / "p.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(6)))
        with pytest.raises(SystemExit):
            main(["generate", "--prompts", str(prompts), "--out", str(tmp_path / "o.jsonl"), *more])
    for said in (main_out, "".join(capfd.readouterr())):
        assert said
        assert [letter for letter in said if not letter.isprintable() and letter != "\n"] == []
    for row in read_judgements(tmp_path / "out.jsonl"):
        assert row.detail == visible(row.detail)


def test_names_of_files_are_shown_plain_and_are_no_markup(tmp_path, capfd):
    these = pairs(30)
    files(tmp_path, these)
    strange = tmp_path / "a\x1b[2J\u202e[red]x.jsonl"
    (tmp_path / "a.jsonl").rename(strange)
    command = words_of(tmp_path, "longer")
    command[command.index("--system") + 1] = str(strange)
    assert main(command) == 0
    assert main(["compare", "--judgements", str(tmp_path / "out.jsonl"), "--out", str(tmp_path / "c")]) == 0
    out = capfd.readouterr().out
    table = "".join(line for line in out.splitlines() if "Written" not in line)
    assert "\x1b" not in table
    assert "\u202e" not in table
    assert "[red]x" in table


# --- the key -------------------------------------------------------------------------------------------------------


def ways(key: str) -> dict[str, str]:
    escaped = "".join(f"\\u{ord(c):04x}" for c in key)
    raw = key.encode()
    return {
        "plain": key,
        "first letter": f"\\u{ord(key[0]):04x}{key[1:]}",
        "upper escapes": "".join(f"\\u{ord(c):04X}" for c in key),
        "JSON in JSON": escaped.replace("\\", "\\\\"),
        "JSON in JSON in JSON": escaped.replace("\\", "\\\\\\\\"),
        "percent": "".join(f"%{ord(c):02x}" for c in key),
        "percent where needed": quote(key, safe=""),
        "percent twice": quote(quote("".join(f"%{ord(c):02X}" for c in key), safe="")),
        "HTML": "".join(f"&#{ord(c)};" for c in key),
        "HTML, hexadecimal": "".join(f"&#x{ord(c):x};" for c in key),
        "HTML named": html.escape(key),
        "Python": "".join(f"\\x{ord(c):02x}" for c in key),
        "hexadecimal": raw.hex(),
        "base64": base64.b64encode(raw).decode(),
        "base64 after a word": base64.b64encode(b"Bearer " + raw).decode(),
        "base64 in the middle": base64.b64encode(b"x" + raw + b"yz").decode(),
        "base64 for URLs": base64.urlsafe_b64encode(b"ab" + raw).decode(),
        "upper case": key.upper(),
        "backwards": key[::-1],
        "two fields": f'{key[: len(key) // 2]}", "b": "{key[len(key) // 2 :]}',
    }


KEYS = [KEY, "sk-proj-" + "".join(random.Random(0).choices(string.ascii_letters + string.digits + "-_", k=156)),
        "token-abc123", "a+b/c==d%e&f"]  # fmt: skip


def decoded(text: str) -> str:
    """All that a reader can make of it, one below the other."""
    layers = [text]
    for _ in range(4):
        one = unquote(html.unescape(layers[-1]))
        layers.append(re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), one))
    return "\n".join(layers)


@pytest.mark.parametrize(
    ("key", "way"),  # a half of less than 8 characters is not looked for
    [(key, way) for key in KEYS for way in ways(KEY) if way != "two fields" or len(key) >= 16],
)
def test_the_key_is_taken_out_in_whatever_form_it_comes(key, way):
    sent = ways(key)[way]
    found = Redaction(key)(f'{{"a": "before {sent} after"}}')
    assert "[key]" in found
    assert sent not in found
    assert found.startswith('{"a": "')
    assert found.endswith('"}')
    for part in (key[:12], key[-12:], key[len(key) // 3 :][:12]):
        for text in (decoded(found), decoded(found)[::-1]):
            assert part.lower() not in text.lower()


@given(st.text(max_size=60), st.sampled_from([None, *KEYS]))
@settings(deadline=None, max_examples=200)
def test_a_text_without_the_key_is_left_as_it_is(text, key):
    assert Redaction(key)(text) == text


def test_an_escaped_key_is_never_on_the_disk_or_on_the_screen(tmp_path, monkeypatch, capfd):
    """Not after parsing either, in no file and in no answer."""
    monkeypatch.setenv("MY_KEY", KEY)
    forms = list(ways(KEY).values())

    def rule(request, number):
        body = '{"choices": [{"message": {"content": "FORM"}, "finish_reason": "stop"}]}'.replace(
            "FORM", forms[number % len(forms)]
        )
        return Reply(body.encode(), (200, 200, 400, 500)[number % 4], {"X-Key": KEY})

    files(tmp_path, pairs(20))
    with Server(rule) as server:
        more = ["--url", server.url, "--model", "m", "--api_key_env", "MY_KEY", "--retries", "0", "--concurrency", "1"]
        with pytest.raises(SystemExit):
            main([*words_of(tmp_path), *more])
        prompts = tmp_path / "p.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(2 * len(forms))))
        with pytest.raises(SystemExit):
            main(["generate", "--prompts", str(prompts), "--out", str(tmp_path / "o.jsonl"), *more])
    texts = ["".join(capfd.readouterr())]
    texts += [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) >= 5
    for text in texts:
        for part in (KEY[:12], KEY[-12:], KEY[6:18], base64.b64encode(KEY.encode()).decode()[:16]):
            assert part not in decoded(text)
