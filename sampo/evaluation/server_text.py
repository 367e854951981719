r"""Text from a server is not trusted: remove the key, check numbers, and hide control characters.

A server that was given the key may send it back: as it is, escaped (`\u0073k-`, `%73k-`, `&#115;k-`), in base64 or
hexadecimal digits, or in parts. `Redaction` finds it in all of these.
"""

import base64
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

MOST_TOKENS = 10**8  # a reply that reports more is not believed
ESCAPE = re.compile(
    r"\\+u(?P<u>[0-9a-f]{4})|\\+x(?P<x>[0-9a-f]{2})|%(?P<p>[0-9a-f]{2})|&#x0*(?P<h>[0-9a-f]{1,4});|&#0*(?P<d>\d{1,5});"
    r"|\\+(?P<c>[/\"\\])|.",
    re.IGNORECASE | re.DOTALL,
)
LAYERS = 3  # of escapes inside each other


class Redaction:
    """Takes a key out of texts; without a key it changes nothing.

    Args:
        key: The secret. Of one with 8 characters or more, any part is taken out that is a quarter of it and has 8
            characters (16 of a long one), in upper and lower case.
    """

    def __init__(self, key: str | None):
        self._parts: list[str] = []
        if not key:
            return
        if len(key) < 8:
            self._parts = [key]
            return
        raw = key.encode()
        coded = [(base64.b64encode(b"\0" * skip + raw).decode(), skip) for skip in range(3)]
        inner = [text[(0, 2, 3)[skip] : len(text) - 4] for text, skip in coded]  # what does not depend on neighbours
        forms = [key, raw.hex(), *inner, *(text.translate(str.maketrans("+/", "-_")) for text in inner)]
        forms = [form for form in (*forms, *(form[::-1] for form in forms)) if len(form) >= 8]
        sizes = {form: min(16, max(8, len(form) // 4)) for form in forms}
        self._parts = sorted({form[i : i + n].lower() for form, n in sizes.items() for i in range(len(form) - n + 1)})

    def __call__(self, text: str) -> str:
        """The text with the key replaced by `[key]`."""
        if not self._parts or not text:
            return text
        found: list[tuple[int, int]] = []
        spans = [(i, i + 1) for i in range(len(text))]
        layer = text
        for _ in range(LAYERS):
            found += self._find(layer, spans)
            decoded = [(_character(token), token.start(), token.end()) for token in ESCAPE.finditer(layer)]
            if len(decoded) == len(layer):
                break
            spans = [(spans[start][0], spans[end - 1][1]) for _, start, end in decoded]
            layer = "".join(character for character, _, _ in decoded)
        else:
            found += self._find(layer, spans)
        return _cut_out(text, found)

    def _find(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if len(self._parts[0]) >= 8:
            lowered = text.lower()
            text = lowered if len(lowered) == len(text) else text.translate(LOWER)
        found = []
        for part in self._parts:
            position = text.find(part)
            while position >= 0:
                found.append((spans[position][0], spans[position + len(part) - 1][1]))
                position = text.find(part, position + 1)
        return found


LOWER = {ord(c): c.lower() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def _character(token: re.Match[str]) -> str:
    for base, names in ((16, "uxph"), (10, "d")):
        for name in names:
            if token[name] is not None:
                return chr(int(token[name], base))
    return token["c"] or token[0]


def _cut_out(text: str, spans: list[tuple[int, int]]) -> str:
    kept: list[str] = []
    end = 0
    for start, stop in sorted(spans):
        if start >= end:
            kept += [text[end:start], "[key]"] if start > end or not kept else []
        end = max(end, stop)
    return "".join([*kept, text[end:]]) if spans else text


def visible(text: str) -> str:
    """The text in one line, without characters that control a terminal or the direction of text."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split())
    )


def read_reply(body: str) -> tuple[dict[str, Any] | None, str]:
    """(first choice of a chat completion, "") or (None, what is wrong with the body)."""
    try:
        text = body.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return None, "not_utf8"
    try:
        choice = json.loads(text)["choices"][0]
        choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None, "broken_reply"
    return choice, ""


def usage_of(body: str) -> tuple[int, int]:
    """Tokens read and written, as the reply reports; zeros where it reports nothing possible."""
    try:
        usage = json.loads(body)["usage"]
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return 0, 0
    tokens = [n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_TOKENS else 0 for n in counts]
    return tokens[0], tokens[1]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, 0 or more; None where no such header can be read."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / per_second
        except (KeyError, ValueError):
            continue
        return None if math.isnan(seconds) else max(seconds, 0.0)
    try:
        date = email.utils.parsedate_tz(headers.get("retry-after"))
        return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)
    except (ValueError, OverflowError, TypeError):
        return None
