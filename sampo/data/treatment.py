"""Changes of a pair on request: cut repeated prompts and role tags, turn text into messages."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .issues import PreferenceDataError, RowIssues
from .layouts import PAIR_COLUMNS, READERS, Pair
from .repeated_prompts import (
    PROMPT_ROLES,
    Response,
    cut_texts,
    is_rendered,
    repeated_messages,
    split_response,
    without_end_tags,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

REPEATED_PROMPT = ("error", "cut")


@dataclass(frozen=True)
class Treatment:
    """The changes of a pair after it is read.

    Attributes:
        repeated_prompt: `error`, or `cut` a prompt that the responses repeat, and role tags in front of them.
        text_as_messages: make a user and an assistant message of text.
    """

    repeated_prompt: str = "error"
    text_as_messages: bool = False

    def __post_init__(self) -> None:
        if self.repeated_prompt not in REPEATED_PROMPT:
            raise ValueError(
                f"`repeated_prompt` must be one of {list(REPEATED_PROMPT)}, got {self.repeated_prompt!r}."
            )

    def check_layout(self, layout: str) -> None:
        """Raise an error for messages of text whose prompt is whatever the two responses share, letter by letter.

        Raises:
            PreferenceDataError: such a layout.
        """
        if self.text_as_messages and layout == "shared_text":
            raise PreferenceDataError(
                "`text_as_messages` needs a column `prompt`, got `chosen` and `rejected` alone: what they share can "
                "end inside a word of the answer. Name the column of the prompts with `columns`, or add one."
            )

    @property
    def cuts(self) -> bool:
        """Whether repeated prompts are cut."""
        return self.repeated_prompt == "cut"

    def apply(self, pair: Pair, issues: RowIssues, *, plain_repeats: bool = False) -> tuple[Pair, RowIssues]:
        """Return the pair as it will be used, or its issues.

        Args:
            pair: as a reader returns it.
            issues: likewise.
            plain_repeats: whether the data set repeats prompts in plain text (`are_many`); tags are always looked for.
        """
        if self.cuts and (again := [column for kind, column in issues if kind == "repeated_prompt"]):
            pair, issues = _cut_messages(pair, again)
        if not issues:
            pair, issues = self._remove_heads(pair, plain_repeats)
        if not issues and self.text_as_messages and isinstance(pair[0], str):
            return _as_messages(pair)
        return pair, issues

    def _remove_heads(self, pair: Pair, plain_repeats: bool) -> tuple[Pair, RowIssues]:
        heads = find_heads(pair)
        found = {column: head for column, head in heads.items() if head is not None and head.tagged}
        if not found and plain_repeats:
            found = {column: head for column, head in heads.items() if head is not None} if all(heads.values()) else {}
        if not found:
            return pair, []
        issues = [("repeated_prompt" if head.repeats else "role_tags", column) for column, head in found.items()]
        return _cut_heads(pair, found, issues) if self.cuts else (pair, issues)


def find_heads(pair: Pair) -> dict[str, Response | None]:
    """Find the text before the answer of each response, if it is the repeated prompt or a role tag."""
    prompt, *responses = pair
    if not isinstance(prompt, str):  # the last message before the answer
        prompt = next((m["content"] for m in reversed(prompt) if m["role"] in PROMPT_ROLES), None)
        responses = [each[0].get("content") if each[0]["role"] == "assistant" else None for each in responses]
    return {
        column: split_response(prompt, response) if isinstance(prompt, str) and isinstance(response, str) else None
        for column, response in zip(("chosen", "rejected"), responses, strict=True)
    }


def plain_repeat_bytes(pair: Pair) -> int:
    """Return the non-blank bytes of the prompt that both responses repeat without tags of a template; 0 for others.

    Bytes and not letters, because a question takes fewer letters in Chinese.
    """
    heads = find_heads(pair).values()
    if not all(head is not None and head.repeats and not head.tagged for head in heads):
        return 0
    return min(len("".join(head.head.split()).encode()) for head in heads if head is not None)


def _cut_messages(pair: Pair, columns: list[str]) -> tuple[Pair, RowIssues]:
    prompt, *responses = pair
    responses = [
        response[repeated_messages(prompt, response) :] if column in columns else response
        for column, response in zip(("chosen", "rejected"), responses, strict=True)
    ]
    return READERS["messages"](prompt, *responses)


def _cut_heads(pair: Pair, found: dict[str, Response], issues: RowIssues) -> tuple[Pair, RowIssues]:
    prompt, *responses = pair
    columns = dict(zip(("chosen", "rejected"), responses, strict=True))
    if isinstance(prompt, str):
        heads = [found.get(column, Response("", text, False, False)) for column, text in columns.items()]
        cut = cut_texts(prompt, *heads)
        return READERS["text"](*cut) if cut is not None else (pair, issues)
    for column, head in found.items():
        first, *others = columns[column]
        columns[column] = [{**first, "content": without_end_tags(head.answer).strip()}, *others]
    return READERS["messages"](prompt, columns["chosen"], columns["rejected"])


def _as_messages(pair: Pair) -> tuple[Pair, RowIssues]:
    """Make one user and one assistant message of text, without the blanks at its ends."""
    tagged: RowIssues = [
        ("rendered_text", column) for column, text in zip(PAIR_COLUMNS, pair, strict=True) if is_rendered(text)
    ]
    roles = ("user", "assistant", "assistant")
    made = [[{"role": role, "content": text.strip()}] for role, text in zip(roles, pair, strict=True)]
    return (pair, tagged) if tagged else READERS["messages"](*made)


def apply_treatment(dataset: "Dataset", treatment: Treatment, plain_repeats: bool, label: str) -> "Dataset":
    """Apply a treatment to the good rows; returns the data set itself if there is nothing to do."""
    if treatment == Treatment():
        return dataset
    before, is_text = dataset, isinstance(dataset[0]["prompt"], str)
    features = dict(dataset.features)
    if is_text and treatment.text_as_messages:
        from datasets import List, Value

        features |= dict.fromkeys(PAIR_COLUMNS, List({"role": Value("string"), "content": Value("string")}))
    dataset = dataset.with_format(None).map(
        _apply_to_batch,
        batched=True,
        fn_kwargs={"treatment": treatment, "plain_repeats": plain_repeats},
        features=type(dataset.features)(features),
        desc="Cutting repeated prompts and role tags, making messages",
    )
    if treatment.cuts:
        both = zip(before["chosen"], dataset["chosen"], strict=True)
        cut = sum(
            (old.strip() != new[0]["content"]) if type(old) is not type(new) else old != new for old, new in both
        )
        logger.info("%s: repeated prompts or role tags cut in %s of %s pairs", label, f"{cut:,}", f"{len(dataset):,}")
    if treatment.text_as_messages:
        what = "made into one user and one assistant message each" if is_text else "messages already"
        logger.info("%s: %s pairs %s (`text_as_messages`)", label, f"{len(dataset):,}", what)
    return dataset


def _apply_to_batch(batch: dict[str, list], treatment: Treatment, plain_repeats: bool) -> dict[str, list]:
    reader = READERS["text" if isinstance(batch["prompt"][0], str) else "messages"]
    pairs = []
    for row in zip(*(batch[column] for column in PAIR_COLUMNS), strict=True):
        pair, issues = treatment.apply(*reader(*row), plain_repeats=plain_repeats)
        assert not issues, issues  # bad rows are out
        pairs.append(pair)
    return dict(zip(PAIR_COLUMNS, map(list, zip(*pairs, strict=True)), strict=True))
