"""The files of a run of `sampo judge`, written and read back: new statistics need no new judgements.

Other files beside `judgements.jsonl` (one row per prompt and order):

- `judgements.control.jsonl`: the same for an empty answer instead of the system's;
- `judgements.summary.json`: what all of it depends on, the result, failures, cost;
- `judgements.csv`: the result as one flat row;
- `judgements.records.jsonl`: each number as a record (`sampo.io.records`).
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...io.files import write_atomic
from ...io.hashing import hash_file
from ...io.records import lines
from ...io.schemas import WrongFile, read_json
from ...stats.intervals import Estimate, codes_of, prompt_means, rate_interval, undefined
from ..answers.answers import Answer
from ..judging.judges import ONCE, Judgement, drawn_prompts, read_judgements, write_judgements
from ..server_text import visible
from .judge_checks import JudgeCheck, check_sentence, judge_name
from .style import StyleTable
from .summary import Summary, records, summarise
from .verdicts import Verdicts

SUMMARY_SCHEMA = 1
AGAIN = "Run `sampo judge` again with the same cache: no request is sent twice"
ORDERLESS = frozenset({"reward", "implicit", "longer", "exact", "contains", "lab"})  # judges that see no order


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers: where it is, what is in it, and whose tokens it counts (None: unknown, or several)."""

    file: str
    sha256: str
    tokenizer: str | None

    @classmethod
    def of(cls, path: str | Path, answers: Sequence[Answer]) -> "AnswerFile":
        """Of a file that was just read."""
        tokenizers = {answer.tokenizer for answer in answers}
        return cls(str(path), content_hash(path), tokenizers.pop() if len(tokenizers) == 1 else None)

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return visible(Path(self.file).stem)


@dataclass(frozen=True)
class JudgedFile:
    """The part of the summary file that is read back; `Judged` has the meanings."""

    schema: int
    judgements_sha256: str
    system: AnswerFile
    baseline: AnswerFile
    judge: dict[str, Any]
    n: int | None
    seed: int
    cost: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.judge.get("name"), str):
            raise ValueError(f"`judge` must have a text in `name`, got {str(self.judge.get('name'))[:40]}")


def sees_no_order(judge: Mapping[str, Any]) -> bool:
    """Whether the verdicts of a judge, or of all members of a panel, cannot depend on the order of the answers."""
    members = judge.get("members") or []
    return judge["name"] in ORDERLESS or (bool(members) and all(map(sees_no_order, members)))


def content_hash(path: str | Path) -> str:
    """Sixteen hex digits of what a file holds."""
    return hash_file(path)[:16]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The judgements of one judge on a system and a baseline.

    Attributes:
        system: the answers of the system.
        baseline: the answers that they were compared with.
        judge: name of the judge and all its settings.
        n: prompts that were drawn; None for all.
        seed: of that draw.
        rows: the judgements.
        empty: judgements on empty answers instead of the system's; none without that control.
        cost: requests, tokens and price of the judgements, or None where they cost nothing.
        checks: what is known about the judge's agreement with people.
        style: features of the answers, for the win rate at equal style; None without it.
    """

    system: AnswerFile
    baseline: AnswerFile
    judge: Mapping[str, Any]
    n: int | None
    seed: int
    rows: Sequence[Judgement]
    empty: Sequence[Judgement] = ()
    cost: Mapping[str, Any] | None = None
    checks: Sequence[JudgeCheck] = ()
    style: StyleTable | None = None

    @property
    def judge_name(self) -> str:
        """The judge for a reader: its kind, and the model behind it."""
        return judge_name(self.judge)

    @property
    def paid(self) -> Mapping[str, Any] | None:
        """Tokens and price of all replies that the judgements rest on, those of earlier runs too; None if free."""
        return self.cost and self.cost.get("all_runs", self.cost)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that its numbers depend on."""
        return {
            "system_answers": self.system.sha256,
            "baseline_answers": self.baseline.sha256,
            "judged_by": dict(self.judge),
            "n": self.n,
            **({"style": list(self.style.names)} if self.style else {}),
        }

    def _cut(self) -> tuple[Estimate, Estimate] | None:
        """Share of the system's and of the baseline's answers that were cut; None where no stop reason is known."""
        shares = []
        for whose in ("system", "baseline"):
            stops = {(row.prompt_id, row.sample): getattr(row, f"{whose}_stop") for row in self.rows}
            known = [(key[0], stop == "length") for key, stop in stops.items() if stop in ("eos", "length")]
            codes = codes_of([prompt for prompt, _ in known])[0]
            values = np.array([float(cut) for _, cut in known])
            shares.append(rate_interval(prompt_means(values, codes)) if known else undefined(0))
        return (shares[0], shares[1]) if any(share.value is not None for share in shares) else None

    @property
    def failures(self) -> dict[str, int]:
        """Judgements that failed, by reason."""
        return dict(Counter(row.failure for row in self.rows if row.failure))

    def on(self, prompts: set[str]) -> "Judged":
        """The same on some prompts only."""
        kept = [row for row in self.rows if row.prompt_id in prompts]
        return replace(self, rows=kept, empty=[row for row in self.empty if row.prompt_id in prompts])

    def drawn(self, n: int | None, seed: int) -> "Judged":
        """The same on `n` of its prompts, drawn by a hash of `seed`."""
        if n is None:
            return self
        return replace(self.on(drawn_prompts((row.prompt_id for row in self.rows), n, seed)), n=n, seed=seed)

    def verdicts(self, length_unit: str = "characters") -> Verdicts:
        """What the statistics are made from, with lengths in `characters`, `words` or `tokens`."""
        if length_unit == "tokens" and (
            self.system.tokenizer is None or self.system.tokenizer != self.baseline.tokenizer
        ):
            raise ValueError(
                f"`length_unit` tokens must be of one tokenizer, got {self.system.tokenizer} and "
                f"{self.baseline.tokenizer}. Use `characters` or `words`."
            )
        verdicts = Verdicts.of(self.rows, length_unit=length_unit)
        if self.style:
            verdicts = replace(verdicts, style=self.style.of_judgements(self.rows, verdicts.lengths))
        if sees_no_order(self.judge) or any(row.detail == ONCE for row in self.rows):
            return replace(verdicts, order=None)  # one verdict fills both rows, so their agreement means nothing
        return verdicts

    def summary(
        self, name: str = "", *, length_unit: str = "characters", difficulty: Mapping[Any, float] | None = None
    ) -> Summary:
        """The statistics of the judgements, with both controls."""
        once = {(row.prompt_id, row.sample): row.order for row in self.rows if row.detail == ONCE}
        pairs = len({(row.prompt_id, row.sample) for row in self.rows if row.preference is not None})
        remarks = []
        if once:
            first = sum(order == "ba" for order in once.values())
            remarks.append(
                f"{len(once)} of {pairs} pairs were shown in one order only, {first} of them with the system's answer "
                "first. A preference for a position cannot be seen, and averages out only if that is about one half."
            )
        return summarise(
            self.verdicts(length_unit),
            cut=self._cut(),
            order_note=f"{len(once)} of {pairs} pairs shown in one order only" if once else "",
            remarks=remarks,
            system=name or self.system.name,
            baseline=self.baseline.name,
            judge=self.judge_name,
            judge_check=check_sentence(self.judge, self.checks),
            empty=Verdicts.of(self.empty) if self.empty else None,
            difficulty=difficulty,
        )


def _output_paths(out: Path) -> dict[str, Path]:
    endings = {"control": "control.jsonl", "summary": "summary.json", "table": "csv", "records": "records.jsonl"}
    return {what: out.with_suffix(f".{ending}") for what, ending in endings.items()}


def write(out: Path, judged: Judged, summary: Summary, *, more: Mapping[str, Any], command: str) -> list[Path]:
    """Write the files of one run; each write is atomic.

    Args:
        out: file of the judgements; the others lie beside it.
        judged: the run.
        summary: its results.
        more: further entries of the summary file.
        command: that gives the same again.

    Returns:
        The files.
    """
    paths = _output_paths(out)
    write_judgements(out, judged.rows)
    write_judgements(paths["control"], judged.empty)
    about = {
        "schema": SUMMARY_SCHEMA,
        "judgements_sha256": content_hash(out),
        **{name: asdict(getattr(judged, name)) for name in ("system", "baseline")},
        **{name: getattr(judged, name) for name in ("judge", "n", "seed", "failures", "cost")},
        "result": summary.row(),
        "sentence": summary.sentence(),
        **more,
    }
    write_atomic(paths["summary"], json.dumps(about, indent=2) + "\n")
    write_atomic(paths["table"], csv_text([summary.row()]))
    made = records(summary, config=judged.config, seed=judged.seed, command=command)
    write_atomic(paths["records"], lines(made))
    return [out, *paths.values()]


def read_judged(path: str | Path) -> Judged:
    """A run that was written.

    Raises:
        FileNotFoundError: the judgements or the files beside them are missing.
        ValueError: they do not belong together.
    """
    path = Path(path)
    paths = _output_paths(path)
    for needed in (path, paths["summary"], paths["control"]):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{path} must be what `sampo judge` wrote, with its other files beside it, and {needed} is not there. "
                f"{AGAIN}."
            )
    about = read_json(paths["summary"], JudgedFile, AGAIN, ignore_unknown=True)
    if about.schema != SUMMARY_SCHEMA or about.judgements_sha256 != content_hash(path):
        raise WrongFile(
            f"{paths['summary']} must be of schema {SUMMARY_SCHEMA} and written with {path}, got schema "
            f"{about.schema}{' and other judgements' if about.schema == SUMMARY_SCHEMA else ''}. {AGAIN}."
        )
    return Judged(
        **{name: getattr(about, name) for name in ("system", "baseline", "judge", "n", "seed", "cost")},
        rows=read_judgements(path),
        empty=read_judgements(paths["control"]),
    )


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with the columns of all of them in the order of their first appearance; None is an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
