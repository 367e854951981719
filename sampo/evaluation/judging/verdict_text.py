"""A written verdict, read from the last line of a reply: any case and the usual decorations, nothing ambiguous.

The line must be the label and a verdict and nothing else but decoration: `Preferred: A`, `**preferred:** [[a]]`,
`Preferred: Answer A (more precise)`, `Final verdict: <A>`. A line that names two verdicts, negates one or doubts is
unreadable, because a wrong verdict is worse than none.
"""

import re
import unicodedata
from collections.abc import Mapping

PAIRS = ("()", "[]", "{}", "<>", '""', "''", "“”", "‘’", "«»", "__")
WRAPPED = re.compile(r"<(\w+)>(.*)</\1>|\\(?:boxed|text|textbf|mathbf|mathrm)\{(.*)\}", re.IGNORECASE)
NOUN = r"(?:answer|response|output|assistant|summary|option|candidate|model|choice)"
# labels of judges that do not use the given one
LABEL = rf"(?:(?:my|the|our)\s+)?(?:final\s+|overall\s+)?(?:verdict|judge?ment|preference|preferred)(?:\s+{NOUN})?"
REASON = re.compile(r"(?P<verdict>.+?)(?:\s*\((?P<brackets>[^()]*)\)|,?\s+because\b(?P<because>.*))")
DOUBT = re.compile(r"\s*(?:or|and|but|not|no|maybe|perhaps|possibly|unsure)\b|.*(?:\?|\bother\b)", re.IGNORECASE)
BOTH = re.compile(r"\s*(?:both|neither|either)\b", re.IGNORECASE)  # a reason for a tie, and for nothing else
NEGATED = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n't\b", re.IGNORECASE)
RULE = re.compile(r"[\s`~*_=\-]*")  # a line of nothing else is a fence or a rule


def read_verdict(content: str, prefix: str, verdicts: Mapping[str, float]) -> float | None:
    """The preference for answer A, or None if the last line is no verdict.

    Args:
        content: The reply.
        prefix: Label before the verdict; "" if the last line is the verdict alone.
        verdicts: Word → preference. Case does not matter unless words differ by it alone. Where all words stand in
            `[[ ]]`, the only such mark of the last line counts, whatever comes before it.
    """
    line = next((line for line in reversed(content.splitlines()) if not RULE.fullmatch(line)), "")
    text = _unwrapped(_strip_marks(line))
    if all(word.startswith("[[") for word in verdicts):
        marks = set(re.findall(r"\[\[(.*?)\]\]", _strip_marks(line))) or {text}
        return None if len(marks) > 1 or NEGATED.search(text) else _lookup(marks.pop(), verdicts)
    if prefix.strip():
        own = re.escape(_strip_marks(prefix).rstrip(" :=-")).replace(r"\ ", r"\s+")
        found = re.fullmatch(rf"(?:{own}|{LABEL})(?:\s+is)?\s*(?::|=|-|—|–)\s*(?P<rest>.+)", text, re.IGNORECASE)
        if found is None and prefix.rstrip()[-1] not in ":=-":
            found = re.fullmatch(rf"{own}\s+(?P<rest>.+)", text, re.IGNORECASE)
        if found is None:
            return None
        text = found["rest"]
    return _with_reason(text, verdicts)


def _strip_marks(line: str) -> str:
    """Remove marks of emphasis, code, formulas, lists and headings, and invisible characters."""
    visible = "".join(c for c in unicodedata.normalize("NFKC", line) if unicodedata.category(c) not in ("Cf", "Cc"))
    return re.sub(r"^[\s>#\-•]+", "", re.sub(r"[*`$]", "", visible)).strip()


def _unwrapped(text: str) -> str:
    """Remove brackets, quotes, tags and full stops that enclose the text."""
    while True:
        inner = text.strip().rstrip(".!,;").strip()
        if found := WRAPPED.fullmatch(inner):
            inner = found[2] if found[2] is not None else found[3]
        elif (
            len(inner) > 1
            and inner[0] + inner[-1] in PAIRS
            and not set(inner[:1] + inner[-1:]) & set(_without_inner_pairs(inner[1:-1], inner[0], inner[-1]))
        ):
            inner = inner[1:-1]
        if inner == text:
            return text
        text = inner


def _without_inner_pairs(text: str, start: str, end: str) -> str:
    """What is left when innermost `start…end` are taken out: none of the two, if they are balanced."""
    if start == end:
        return ""  # 'A' or 'B' without its ends is no verdict either
    inner = re.compile(rf"{re.escape(start)}[^{re.escape(start)}{re.escape(end)}]*{re.escape(end)}")
    while (shorter := inner.sub("", text)) != text:
        text = shorter
    return text


def _bare(text: str) -> str:
    """The word of a verdict: `Answer (a).` and `[[a]]` are `a`."""
    text = _unwrapped(_strip_marks(text))
    text = re.sub(rf"^(?:(?:it\s+is|it's|the)\s+)?(?:{NOUN}\s+)?(?=\S)", "", text, flags=re.IGNORECASE)
    text = _unwrapped(text)
    return re.sub(r"^an?\s+(?=\w{2})", "", text, flags=re.IGNORECASE)


def _lookup(text: str, verdicts: Mapping[str, float]) -> float | None:
    words = {_bare(word): preference for word, preference in verdicts.items()}
    folded = {word.casefold(): preference for word, preference in words.items()}
    if len(words) < len(verdicts):
        return verdicts.get(text.strip())
    bare = _bare(text)
    return words.get(bare) if len(folded) < len(words) else folded.get(bare.casefold())


def _with_reason(text: str, verdicts: Mapping[str, float]) -> float | None:
    found = _lookup(text, verdicts)
    if found is not None:
        return found
    parts = REASON.fullmatch(_unwrapped(_strip_marks(text)))
    if parts is None:
        return None
    found, reason = _lookup(parts["verdict"], verdicts), parts["brackets"] or parts["because"] or ""
    others = [word for word, preference in verdicts.items() if preference != found]
    named = any(re.search(rf"(?<![^\W_]){re.escape(_bare(word))}(?![^\W_])", reason, _case(word)) for word in others)
    doubted = DOUBT.match(reason) or (found in (0, 1) and BOTH.match(reason))
    return None if named or doubted else found


def _case(word: str) -> int:
    """`a` is an article, so one letter names a verdict in its own case only."""
    return re.IGNORECASE if len(_bare(word)) > 1 else 0
