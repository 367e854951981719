"""Answers to prompts: one record each, written as they come; an interrupted run continues its file.

What has no answer at the end of a run is listed in a file beside it, with the reason.

A backend turns jobs into texts. The random numbers of an answer depend on the seed, its prompt and its sample number
alone: not on the batch it was in, nor on earlier answers. Two things still differ between batches: the order in which
sums are rounded, which can change a nearly equal choice (seldom in float32, sometimes in bfloat16); and what a server
does, which is not controlled here.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...io.files import write_atomic
from ...io.journal import Journal, read_rows
from ...io.progress import Progress
from ...io.schemas import named, typed
from .answers import Answer, Prompt, as_row
from .prompts import Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_tokens: Tokens after which an answer is cut off.
        temperature: 0 takes the most likely token.
        top_p: Draw from the most likely tokens that together have this probability.
        top_k: Draw from this many of the most likely tokens; 0 for all.
        seed: Of the draws.
        samples: Answers per prompt.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        right = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "samples": self.samples >= 1,
        }
        wrong = [f"`{name}` {getattr(self, name)}" for name, fine in right.items() if not fine]
        if wrong:
            raise ValueError(f"Sampling must be possible, got {', '.join(wrong)}.")
        if self.greedy and (self.top_p < 1 or self.top_k or self.samples > 1):
            raise ValueError("With `temperature` 0 nothing is sampled: omit `top_p`, `top_k` and `samples`.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings in an answer's record."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "max_tokens")}


@dataclass(frozen=True)
class Job:
    """One answer to be written."""

    question: Question
    sample: int

    @property
    def prompt(self) -> Prompt:
        """String or messages."""
        return self.question.prompt

    def seed(self, sampling: Sampling) -> int:
        """31 bits from the seed, the prompt and the sample."""
        text = f"{sampling.seed} {self.question.prompt_id} {self.sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Output:
    """The outcome of a job: text, tokens with the end token, and why it ended; or why there is no answer."""

    text: str = ""
    tokens: int | None = None
    stop: str = "unknown"
    failure: str | None = None
    detail: str = ""


class Backend(Protocol):
    """Generates answers.

    `about` are `model`, `weights`, `backend`, `tokenizer`, `template` and `dtype` of its answers; `options` are
    further settings that they depend on, and are part of `sampling`.
    """

    about: Mapping[str, Any]
    options: Mapping[str, Any]

    def check(self, jobs: Sequence[Job], sampling: Sampling) -> dict[int, str]:
        """Numbers of the jobs that cannot be done, and why; before anything is generated."""
        ...

    def generate(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[tuple[Job, Output]]]:
        """Some jobs at a time, as they are done."""
        ...


@dataclass(frozen=True)
class MissingAnswer:
    """A row of the file of missing answers."""

    prompt_id: str
    sample: int
    reason: str
    detail: str


@dataclass
class GenerationReport:
    """Counts of a run.

    Attributes:
        answers: Answers in the file at the end.
        reused: Of these, those that were there before.
        failures: Reason → number of answers that are missing.
        cut: Answers that were cut by `max_tokens`.
        tokens: Tokens of all answers whose number is known.
        counted: Number of these answers.
        details: Of the first failure of each kind.
        missing: The answers that are missing.
    """

    answers: int = 0
    reused: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    tokens: int = 0
    counted: int = 0
    details: dict[str, str] = field(default_factory=dict)
    missing: list[MissingAnswer] = field(default_factory=list)

    def add_failure(self, job: Job, reason: str, detail: str) -> None:
        """Count an answer that is missing."""
        self.failures[reason] += 1
        self.details.setdefault(reason, detail)
        self.missing.append(MissingAnswer(job.question.prompt_id, job.sample, reason, detail))


def missing_file(out: str | Path) -> Path:
    """The file that lists the missing answers of a file of answers; absent or empty if none is missing."""
    return Path(out).with_suffix(".missing.jsonl")


def read_missing(out: str | Path) -> list[MissingAnswer]:
    """The missing answers of a file of answers.

    Raises:
        WrongFile: the file is no such list.
    """
    path, found = missing_file(out), []
    for number, row in enumerate(read_rows(path) if path.exists() else [], 1):
        with named(path, "Remove it, or generate again", line=number):
            found.append(typed(MissingAnswer, row, complete=True))
    return found


def generate(
    questions: Sequence[Question],
    backend: Backend,
    sampling: Sampling,
    out: str | Path,
    *,
    on_long_prompts: str = "error",
    progress: Progress | None = None,
) -> GenerationReport:
    """Answer all prompts that have no answer in `out` yet; at the end the file has the order of the prompts.

    Raises:
        ValueError: `out` holds answers of other settings or to other prompts, or prompts are too long.
    """
    jobs = [Job(question, sample) for question in questions for sample in range(sampling.samples)]
    report = GenerationReport()
    with Journal(out) as journal:
        there = {answer.key for answer in _checked(journal, backend, sampling, questions)}
        todo = [job for job in jobs if (job.question.prompt_id, job.sample) not in there]
        report.reused = len(there)
        todo = _without_long(todo, backend, sampling, on_long_prompts, report)
        done = 0
        for finished in backend.generate(todo, sampling):
            journal.append(*(as_row(_answer(job, o, backend, sampling)) for job, o in finished if o.failure is None))
            for job, output in finished:
                if output.failure is not None:
                    report.add_failure(job, output.failure, output.detail)
            done += len(finished)
            if progress:
                progress(done, len(todo))
        position = {(job.question.prompt_id, job.sample): number for number, job in enumerate(jobs)}
        ordered = sorted(journal.rows, key=lambda row: position[row["prompt_id"], row["sample"]])
        if ordered != journal.rows:
            journal.rewrite(ordered)
        if report.missing or missing_file(out).exists():
            write_atomic(missing_file(out), "".join(json.dumps(asdict(row)) + "\n" for row in report.missing))
    report.answers = len(ordered)
    report.cut = sum(row["stop"] == "length" for row in ordered)
    counts = [row["tokens"] for row in ordered if row["tokens"] is not None]
    report.tokens, report.counted = sum(counts), len(counts)
    return report


def _answer_settings(backend: Backend, sampling: Sampling) -> dict[str, Any]:
    return {
        **backend.about,
        "sampling": {**sampling.parameters, **backend.options},
        "seed": None if sampling.greedy else sampling.seed,
    }


def _checked(journal: Journal, backend: Backend, sampling: Sampling, questions: Sequence[Question]) -> list[Answer]:
    """The existing answers, which must have these settings and belong to these prompts."""
    answers = []
    for number, row in enumerate(journal.rows, 1):
        with named(journal.path, "Name another file", line=number):
            answers.append(typed(Answer, row, complete=True))
    for name, value in _answer_settings(backend, sampling).items():
        other = next((getattr(answer, name) for answer in answers if getattr(answer, name) != value), None)
        if other is not None:
            raise ValueError(
                f"`out` must be a new file or hold answers of the same settings, got {journal.path} with `{name}` "
                f"{other!r} where this run has {value!r}. Name another file."
            )
    strange = {answer.prompt_id for answer in answers} - {question.prompt_id for question in questions}
    further = sum(answer.sample >= sampling.samples for answer in answers)
    if strange or further:
        raise ValueError(
            f"`out` must hold answers to these prompts alone, got {journal.path} with {len(strange)} other prompts "
            f"and {further} further samples. Name another file."
        )
    return answers


def _without_long(
    jobs: list[Job], backend: Backend, sampling: Sampling, on_long_prompts: str, report: GenerationReport
) -> list[Job]:
    too_long = backend.check(jobs, sampling)
    if not too_long:
        return jobs
    first = next(iter(too_long.values()))
    if on_long_prompts != "drop":
        raise ValueError(
            f"Each prompt must leave room for `max_tokens`, got {len(too_long):,} of {len(jobs):,} that do not; the "
            f"first: {first}. Lower `max_tokens`, or set `on_long_prompts` to `drop`."
        )
    for number, detail in too_long.items():
        report.add_failure(jobs[number], "too_long", detail)
    return [job for number, job in enumerate(jobs) if number not in too_long]


def _answer(job: Job, output: Output, backend: Backend, sampling: Sampling) -> Answer:
    return Answer(
        prompt=job.prompt,
        answer=output.text,
        sample=job.sample,
        tokens=output.tokens,
        stop=output.stop,
        extra=job.question.extra,
        **_answer_settings(backend, sampling),
    )
