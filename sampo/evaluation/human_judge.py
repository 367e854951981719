"""People as judges: a sheet for them to fill in, and what they have filled in."""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..whole_files import write_whole
from .answers import prompt_id, prompt_text
from .judges import ONCE, ORDERS, Comparison, Pair, Progress, Verdict

SHEET = ("prompt_id", "prompt", "answer_a", "answer_b", "preferred")
PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}


class HumanJudge:
    """Annotations from a CSV with `answer_a`, `answer_b`, `preferred` and `prompt` or `prompt_id`.

    They belong to the texts and not to a row number: changed answers have no annotation. Several annotations of a pair
    are averaged. Where only one order was shown to people, it serves for both.

    Raises:
        ValueError: columns are missing, or a `preferred` is neither A, B, tie, empty nor a number from 0 to 1.
    """

    name = "human"

    def __init__(self, path: str | Path):
        self.about = {"annotations": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}
        self._given: dict[tuple[str, str, str], list[float]] = {}
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"answer_a", "answer_b", "preferred"} - set(rows.fieldnames or ())
            if missing or not {"prompt", "prompt_id"} & set(rows.fieldnames or ()):
                raise ValueError(
                    f"{path} must have the columns `answer_a`, `answer_b`, `preferred` and `prompt` or `prompt_id`, "
                    f"got {rows.fieldnames}."
                )
            for row in rows:
                self._add(row, f"{path}, line {rows.line_num}")

    def _add(self, row: Mapping[str, str], place: str) -> None:
        said = (row["preferred"] or "").strip().lower()
        if not said:
            return
        try:
            value = PREFERRED[said] if said in PREFERRED else float(said)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ValueError(
                f"{place}: `preferred` must be A, B, tie, empty or from 0 to 1, got {row['preferred']!r}."
            )
        key = row.get("prompt_id") or prompt_id(row["prompt"])
        self._given.setdefault((key, _lines(row["answer_a"]), _lines(row["answer_b"])), []).append(value)

    def judge(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict for each comparison."""
        return [self._verdict(shown) for shown in comparisons]

    def _verdict(self, shown: Comparison) -> Verdict:
        texts = _lines(shown.answer_a), _lines(shown.answer_b)
        for key, forward in ((texts, True), (texts[::-1], False)):
            if given := self._given.get((shown.prompt_id, *key)):
                mean = sum(given) / len(given)
                return Verdict(mean) if forward else Verdict(1 - mean, detail=ONCE)
        return Verdict(None, "not_annotated", f"prompt {shown.prompt_id}")


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").strip()  # table programs change the ends of lines


def write_sheet(path: str | Path, pairs: Sequence[Pair], seed: int = 0) -> None:
    """A CSV for people to fill in `preferred` (A, B or tie); which side the system is on is drawn for each pair."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(SHEET)
    for pair in pairs:
        first = hashlib.sha256(f"{seed} sheet {pair.system.key}".encode()).digest()[0] % 2
        shown = pair.comparison(ORDERS[first])
        table.writerow([shown.prompt_id, prompt_text(shown.prompt), shown.answer_a, shown.answer_b, ""])
    write_whole(Path(path), text.getvalue())
