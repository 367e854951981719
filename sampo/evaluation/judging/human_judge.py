"""People as judges: write a sheet for annotations, and read the annotations."""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from ...io.files import write_atomic
from ...io.hashing import hash_file
from ...io.progress import Progress
from ..answers.answers import prompt_text
from .judges import ONCE, ORDERS, AnswerPair, Comparison, Verdict

SHEET = ("prompt_id", "prompt", "answer_a", "answer_b", "preferred")
FORMULA = ("=", "+", "-", "@")  # what begins a formula
LONGEST = 32_000  # characters that are compared; Excel keeps 32,767 of a cell
PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}


class HumanJudge:
    """Annotations from a CSV with `answer_a`, `answer_b`, `preferred` and `prompt` or `prompt_id`.

    They belong to the texts and not to a row number: changed answers have no annotation. Blanks around a text do not
    matter. Several annotations of a pair are averaged. Where only one order was shown to people, it serves for both.

    Raises:
        ValueError: columns are missing, or a `preferred` is neither A, B, tie, empty nor a number from 0 to 1.
    """

    name = "human"

    def __init__(self, path: str | Path):
        self.about = {"annotations": hash_file(path)[:16]}
        self._given: dict[tuple[str, str, str], list[float]] = {}
        rows = _read_csv(Path(path))
        names = rows.fieldnames or ()
        if {"answer_a", "answer_b", "preferred"} - set(names) or not {"prompt", "prompt_id"} & set(names):
            raise ValueError(
                f"{path} must have the columns `answer_a`, `answer_b`, `preferred` and `prompt` or `prompt_id`, "
                f"got {names}."
            )
        try:
            for row in rows:
                self._add(row, f"{path}, line {rows.line_num}")
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num} must be a row of a CSV, got: {error}.") from None

    def _add(self, row: Mapping[str, str], position: str) -> None:
        given = (row["preferred"] or "").strip().lower()
        if not given:
            return
        try:
            value = PREFERRED[given] if given in PREFERRED else float(given.replace(",", "."))
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ValueError(
                f"{position}: `preferred` must be A, B, tie, empty or from 0 to 1, got {row['preferred']!r}."
            )
        texts = _normalise(row["answer_a"] or ""), _normalise(row["answer_b"] or "")
        key = (row.get("prompt_id") or "").strip() or _normalise(row.get("prompt") or "")
        self._given.setdefault((key, *texts), []).append(value)

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison."""
        return [self._verdict(shown) for shown in comparisons]

    def _verdict(self, shown: Comparison) -> Verdict:
        texts = _normalise(shown.answer_a), _normalise(shown.answer_b)
        names = shown.prompt_id, _normalise(prompt_text(shown.prompt))
        for (key, forward), name in product(((texts, True), (texts[::-1], False)), names):
            if given := self._given.get((name, *key)):
                mean = sum(given) / len(given)
                return Verdict(mean) if forward else Verdict(1 - mean, detail=ONCE)
        return Verdict(None, "not_annotated", f"prompt {shown.prompt_id}")


def _read_csv(path: Path) -> csv.DictReader:
    """The rows of a CSV as table programs write it: UTF-8 or UTF-16 with their marks, else Windows' own encoding."""
    content = path.read_bytes()
    encodings = ("utf-16",) if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = content.decode(encoding)
            break
        except UnicodeDecodeError as error:
            issue = error
    else:
        raise ValueError(f"{path} must be a CSV in UTF-8, got: {issue}. Save it as `CSV UTF-8`.")
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # of this process; answers may be long
    head = text.partition("\n")[0]
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))


def _normalise(text: str) -> str:
    """Undo what table programs do to a text: they change line ends, mark formulas, and cut long cells."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return (plain[1:] if plain[:1] == "'" and plain[1:2] in FORMULA else plain)[:LONGEST].strip()


def _escape_formula(text: str) -> str:
    """Put a quote before a text that a table program would take for a formula."""
    return f"'{text}" if text.lstrip()[:1] in FORMULA and text.strip() else text


def write_sheet(path: str | Path, pairs: Sequence[AnswerPair], seed: int = 0) -> None:
    """Write a CSV for people to fill in `preferred` (A, B or tie); the order is drawn for each pair."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(SHEET)
    for pair in pairs:
        first = hashlib.sha256(f"{seed} sheet {pair.system.key}".encode()).digest()[0] % 2
        shown = pair.comparison(ORDERS[first])
        texts = (prompt_text(shown.prompt), shown.answer_a, shown.answer_b)
        table.writerow([shown.prompt_id, *map(_escape_formula, texts), ""])
    write_atomic(Path(path), "\ufeff" + text.getvalue())  # without the mark Excel takes UTF-8 for something else
