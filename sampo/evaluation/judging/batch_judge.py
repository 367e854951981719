"""A judge behind a batch API of OpenAI's shape: a file of requests, a batch, a file of results; nothing is lost.

The replies go into the same cache, under the same keys, as those to single requests, so either way finds what the
other has paid for. Which batch holds which requests is written beside the cache (`CACHE.batches.jsonl`) before the
batch is made: a run that was killed finds its batches again, even one whose creation it did not hear of, and makes no
second one of the same requests. Results are read once; what an interrupted reading has kept is skipped.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ...io.hashing import hash_json
from ...io.journal import Journal
from ...io.progress import Progress
from ...io.schemas import named, parse_json, typed
from ..endpoint import Endpoint, Unanswered
from ..server_text import usage_of
from .endpoint_judge import EndpointJudge, Wanted
from .templates import JudgePrompt

MAX_BATCH_REQUESTS, MAX_BATCH_BYTES = 50_000, 100 * 2**20  # of a batch; OpenAI allows 50,000 and 200 MB
PATH, WINDOW = "/v1/chat/completions", "24h"
ENDED = ("completed", "failed", "expired", "cancelled")
MARK = "sampo_requests"  # in the metadata of a batch: the hash of its requests
PAGES = 20  # of the list of batches that are searched for one whose creation was interrupted


@dataclass(frozen=True)
class BatchEvent:
    """A row of the file of batches: requests to be made, their batch, or that its results are in the cache.

    Attributes:
        requests: hash of the requests.
        keys: their keys, and the prompt of each; of the first row.
        batch: id on the server; None where the server never got these requests.
        status: how the batch ended; of the last row.
    """

    requests: str
    keys: dict[str, str] = field(default_factory=dict)
    batch: str | None = None
    status: str | None = None


@dataclass(frozen=True)
class BatchState:
    """What is read of the server's description of a batch."""

    id: str
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, Any] | None = None
    request_counts: dict[str, Any] | None = None
    errors: dict[str, Any] | None = None


@dataclass
class _Pending:
    """Requests on their way: their keys with the prompt of each, and their batch if it is known."""

    keys: dict[str, str]
    batch: str | None = None


class BatchJudge(EndpointJudge):
    """Asks a batch API, and keeps its replies.

    Args:
        endpoint: Server of the judge.
        template: Prompt of the judge.
        cache: JSONL file of replies; the batches are noted beside it.
        poll_seconds: Between two looks at a batch.
        more: As of `EndpointJudge`.
    """

    def __init__(
        self, endpoint: Endpoint, template: JudgePrompt, cache: str | Path, *, poll_seconds: float = 60.0, **more: Any
    ):
        if not 0 < poll_seconds < math.inf:
            raise ValueError(f"`poll_seconds` must be above 0 and finite, got {poll_seconds}.")
        super().__init__(endpoint, template, cache, **more)
        self._poll_seconds = poll_seconds
        self._given_up: dict[str, Unanswered] = {}  # of this run, which asks for them no more
        self._reserved: dict[str, float] = {}  # money that is set aside, by key
        self._kept_of_batch = {(row["key"], row["batch"]) for row in self._journal.rows if "batch" in row}
        path = Path(cache).with_suffix(".batches.jsonl")
        try:
            self._batches = Journal(path)
        except BaseException:
            super().close()
            raise
        self._pending: dict[str, _Pending] = {}
        try:
            for number, row in enumerate(self._batches.rows, 1):
                with named(path, "Restore it, or delete the line", line=number):
                    self._follow(typed(BatchEvent, row, ignore_unknown=True))
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Release the cache and the file of batches, and close the connections."""
        self._batches.close()
        super().close()

    def _follow(self, event: BatchEvent) -> None:
        if event.keys:
            self._pending[event.requests] = _Pending(event.keys)
        elif event.batch is None or event.status is not None:
            self._pending.pop(event.requests, None)
        elif event.requests in self._pending:
            self._pending[event.requests].batch = event.batch

    def _note(self, requests: str, **more: Any) -> None:
        row = {"requests": requests, **more, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        self._batches.append(row)
        self._follow(typed(BatchEvent, row, ignore_unknown=True))

    def _ask(self, wanted: Sequence[Wanted], progress: Progress | None) -> dict[str, Unanswered]:
        """Wait for batches that hold these requests, make new ones of the rest, until nothing more can be had."""
        requests = {key: (key, messages, prompt) for key, messages, prompt in wanted}
        while missing := [key for key in requests if self._wanted(key) and key not in self._given_up]:
            theirs = set(missing)
            waiting = [mark for mark, one in self._pending.items() if one.keys.keys() & theirs]
            held = {key for mark in waiting for key in self._pending[mark].keys}
            waiting += self._submit([requests[key] for key in missing if key not in held])
            for mark in waiting:
                self._collect(mark, progress)
        return {key: self._given_up[key] for key in requests if key in self._given_up}

    # --- make batches ------------------------------------------------------------------------------------------------

    def _submit(self, requests: Sequence[Wanted]) -> list[str]:
        """Make batches of requests, as far as the caps allow; the hash of each."""
        made = []
        for chunk in _chunks(self._admitted(requests)):
            keys = {key: prompt for key, prompt, _ in chunk}
            mark = hash_json([list(keys), len(self._batches.rows), self.endpoint.url])
            try:
                batch = self._create(mark, keys, "".join(line for *_, line in chunk))
            except Unanswered as failure:
                self._fail(keys, failure)
                continue
            self._note(mark, batch=batch)
            made.append(mark)
        return made

    def _admitted(self, requests: Sequence[Wanted]) -> Iterator[tuple[str, str, str]]:
        """(key, prompt, line of the file) of each request that the caps have room for."""
        for key, messages, prompt in requests:
            most = self.endpoint.spending.most(messages, self.options)
            try:
                self.endpoint.admit(most, wait=False)
            except Unanswered as failure:
                self._given_up[key] = failure
                continue
            self._reserved[key] = most
            body = {"model": self.endpoint.model, "messages": messages, **self.options}
            yield key, prompt, json.dumps({"custom_id": key, "method": "POST", "url": PATH, "body": body}) + "\n"

    def _create(self, mark: str, keys: Mapping[str, str], lines: str) -> str:
        """Upload the requests, note them and make a batch of them; its id."""
        content = ("requests.jsonl", lines.encode("ascii"))
        file = _read_json(self.endpoint.call(lambda client: client.files.create(file=content, purpose="batch")))
        self._note(mark, keys=dict(keys))
        options = {"endpoint": PATH, "completion_window": WINDOW, "metadata": {MARK: mark}}
        try:
            return _state(
                self.endpoint.call(
                    lambda client: client.batches.create(input_file_id=file["id"], **options), retries=0
                )
            ).id
        except Unanswered as failure:
            batch = self._find(mark) if failure.passing else None
            if batch is None:
                self._note(mark)
                raise
            return batch

    def _find(self, mark: str) -> str | None:
        """The batch of these requests, if the server has made one that we did not hear of."""
        after: dict[str, str] = {}
        for _ in range(PAGES):
            page = self.endpoint.call(partial(_list_page, after=after))
            found = _read_json(page)
            states = [_state(row) for row in found["data"]]
            for state in states:
                if (state.metadata or {}).get(MARK) == mark:
                    return state.id
            if not found.get("has_more"):
                return None
            after = {"after": states[-1].id}
        return None

    # --- read results ------------------------------------------------------------------------------------------------

    def _collect(self, mark: str, progress: Progress | None) -> None:
        """Wait for a batch and keep its replies."""
        pending = self._pending[mark]
        failures: dict[str, Unanswered] = {}
        try:
            if pending.batch is None:  # the run was stopped when it made the batch
                self._note(mark, batch=self._find(mark))
                return
            batch = pending.batch
            state = self._wait(batch, progress)
            for file in filter(None, (state.output_file_id, state.error_file_id)):
                content = self.endpoint.call(partial(_file_content, file=file))
                failures |= self._keep_results(batch, pending.keys, content)
        except Unanswered as failure:
            self._fail(pending.keys, failure)
            return
        self._note(mark, batch=batch, status=state.status)
        detail = f"the batch {batch} is {state.status} and has no reply to this request"
        if state.status == "failed":
            detail = f"{self.endpoint.url} refuses the batch {batch}: {self.endpoint.redact(json.dumps(state.errors))}"
            self._fail(pending.keys, Unanswered("rejected", detail[:400]))
            return
        for key in pending.keys:
            if (key, batch) not in self._kept_of_batch:
                self._give_up(key, failures.get(key, Unanswered("not_asked", detail)))

    def _wait(self, batch: str, progress: Progress | None) -> BatchState:
        while True:
            state = _state(self.endpoint.call(lambda client: client.batches.retrieve(batch)))
            counts = state.request_counts or {}
            if progress and counts.get("total"):
                progress(counts.get("completed", 0) + counts.get("failed", 0), counts["total"])
            if state.status in ENDED:
                return state
            time.sleep(self._poll_seconds)

    def _keep_results(self, batch: str, keys: Mapping[str, str], content: bytes) -> dict[str, Unanswered]:
        """Keep the replies of a file of results; why others have none, by their key."""
        replies, failures = [], {}
        for line in content.decode("utf-8", "surrogateescape").splitlines():
            key, reply, failure = self._result(line)
            if key not in keys or (key, batch) in self._kept_of_batch:
                continue
            if failure is not None:
                failures[key] = failure
                continue
            self._kept_of_batch.add((key, batch))
            replies.append((key, keys[key], reply))
        self._keep(replies, batch=batch)
        for key, _, reply in replies:
            self._settle(key, usage_of(reply))
        return failures

    def _result(self, line: str) -> tuple[str, str, Unanswered | None]:
        """(key, reply, None), or (key, "", why there is none); key "" where the line cannot be read."""
        try:
            row = json.loads(line)
            key, response = str(row["custom_id"]), row.get("response") or {}
            status = response.get("status_code")
            if status == 200:
                return key, self.endpoint.redact(json.dumps(response["body"])), None
            error = row.get("error") or response.get("body")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "", "", None
        reason = "rate_limited" if status == 429 else "server_error" if (status or 0) >= 500 else "rejected"
        if "batch_expired" in str(error):
            reason = "not_asked"
        return key, "", Unanswered(reason, self.endpoint.redact(json.dumps(error))[:300])

    def _fail(self, keys: Iterable[str], failure: Unanswered) -> None:
        """No batch can be had: give up its requests, and make no more."""
        self.endpoint.stopped_for_good = self.endpoint.why_stopped is None and not failure.passing
        self.endpoint.stop(failure.detail)
        for key in keys:
            self._give_up(key, failure)

    def _give_up(self, key: str, failure: Unanswered) -> None:
        self._given_up[key] = failure
        self._settle(key, None)

    def _settle(self, key: str, usage: tuple[int, int] | None) -> None:
        """The outcome of a request; for one of an earlier run nothing was set aside."""
        if key in self._reserved:
            self.endpoint.spending.settle(self._reserved.pop(key), usage, billed=usage is not None)
        elif usage is not None:
            self.endpoint.spending.add(*usage)


def _list_page(client: Any, after: dict[str, str]) -> Any:
    return client.batches.list(limit=100, **after)


def _file_content(client: Any, file: str) -> Any:
    return client.files.content(file)


def _chunks(requests: Iterable[tuple[str, str, str]]) -> Iterator[list[tuple[str, str, str]]]:
    chunk: list[tuple[str, str, str]] = []
    size = 0
    for request in requests:
        if chunk and (len(chunk) == MAX_BATCH_REQUESTS or size + len(request[2]) > MAX_BATCH_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(request)
        size += len(request[2])
    if chunk:
        yield chunk


def _read_json(content: bytes) -> dict[str, Any]:
    return dict(typed(dict[str, Any], parse_json(content)))


def _state(content: Any) -> BatchState:
    value = parse_json(content) if isinstance(content, bytes) else content
    state: BatchState = typed(BatchState, value, ignore_unknown=True)
    return state
