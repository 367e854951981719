"""A judge's agreement with people as a record in a file, found again for every win rate of that judge.

`sampo judge --labelled` writes `OUT.agreement.jsonl`: one record per number, each with all settings of the judge. A
win rate takes the record only if its own judge has the very same settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io import records as record_file
from ...io.names import readable_name
from ...io.records import Record
from ...io.schemas import WrongFile
from ...stats.intervals import Estimate, kept_estimate
from ..server_text import visible
from .cells import percent

ENDING = ".agreement.jsonl"
PREFIX = "agreement/"
# rules, controls and people: whether they agree with people is no open question
NOT_TO_CHECK = frozenset({"longer", "exact", "contains", "lab", "human"})
UNCHECKED = "Nobody has checked this judge against people."


@dataclass(frozen=True, kw_only=True)
class JudgeCheck:
    """How far one judge agrees with people on one set of pairs.

    Attributes:
        judge: all its settings.
        data: name of the set.
        pairs: pairs in which people prefer one response and the judge has verdicts.
        accuracy: share of them in which the judge prefers the same one.
        kappa: Cohen's κ.
    """

    judge: Mapping[str, Any]
    data: str
    pairs: int
    accuracy: Estimate
    kappa: Estimate

    @property
    def phrase(self) -> str:
        """`agrees with people in 81.0 % [77.0, 84.5] of 419 pairs (llmbar), κ 0.62`."""
        kappa = "–" if self.kappa.value is None else f"{self.kappa.value:.2f}"
        return f"agrees with people in {percent(self.accuracy)} of {self.pairs:,} pairs ({self.data}), κ {kappa}"


def judge_name(judge: Mapping[str, Any]) -> str:
    """The judge for a reader: its kind, and the model behind it."""
    kind, model = str(judge["name"]), judge.get("model")
    return visible(f"{kind} {readable_name(str(model))}" if model else kind)


def data_name(path: str | Path) -> str:
    """A set of pairs for a reader: the name of its file without endings."""
    return visible(Path(path).name.split(".")[0])


def check_sentence(judge: Mapping[str, Any], checks: Sequence[JudgeCheck]) -> str:
    """What is known about a judge, in one sentence; nothing for rules and people."""
    if checks:
        return f"The judge {'; it '.join(check.phrase for check in checks)}."
    return "" if judge["name"] in NOT_TO_CHECK else UNCHECKED


def read_checks(records: Sequence[Record], file: str | Path) -> list[JudgeCheck]:
    """The checks among the records of a file; a set of pairs that was judged again counts by its last records.

    Raises:
        WrongFile: there is none.
    """
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        judge, data = record.config.get("judged_by"), record.config.get("data")
        if record.name.startswith(PREFIX) and isinstance(judge, dict) and isinstance(judge.get("name"), str):
            key = record_file.config_key(judge), str(data)
            found.setdefault(key, {})[record.name.removeprefix(PREFIX)] = record
    if not found or any({"accuracy", "kappa", "count/pairs"} - numbers.keys() for numbers in found.values()):
        raise WrongFile(
            f"{file} must hold the records of `sampo judge --labelled`, got others. Name its {ENDING} file."
        )
    return [
        JudgeCheck(
            judge=numbers["accuracy"].config["judged_by"],
            data=data,
            pairs=int(numbers["count/pairs"].value or 0),
            **{
                name: kept_estimate(numbers[name].value, numbers[name].interval, numbers[name].n)
                for name in ("accuracy", "kappa")
            },
        )
        for (_, data), numbers in found.items()
    ]


def checks_of(judge: Mapping[str, Any], files: Sequence[Path], folder: Path) -> tuple[JudgeCheck, ...]:
    """What is known about a judge.

    Args:
        judge: all its settings.
        files: with records of it; none: the files of agreement in `folder`, of which those of other judges are
            passed over.
        folder: of the judgements.

    Raises:
        ValueError: a file of `files` holds records of other judges only.
    """
    if not files:
        beside = [check for path in sorted(folder.glob(f"*{ENDING}")) for check in _checks_in(path)]
        return tuple(check for check in beside if _same(check.judge, judge))
    found: list[JudgeCheck] = []
    for path in files:
        checks = _checks_in(path)
        own = [check for check in checks if _same(check.judge, judge)]
        if not own:
            raise ValueError(_of_another_judge(path, checks[0].judge, judge))
        found += own
    return tuple(found)


def _checks_in(path: Path) -> list[JudgeCheck]:
    if not path.is_file():
        raise FileNotFoundError(f"`agreement` must be a file of `sampo judge --labelled`, and {path} is not there.")
    return read_checks(record_file.read(path), path)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return record_file.config_key(one) == record_file.config_key(other)


def _of_another_judge(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    return (
        f"{path} must be about the judge of these judgements, {judge_name(ours)}, got {judge_name(theirs)}, which "
        f"differs in {', '.join(f'`{key}`' for key in differing)}. Check this judge with `sampo judge --labelled`."
    )
