"""The batch API of OpenAI's shape for `judge_server.Server(other=Batches())`: files, batches, results in any order."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from judge_server import Reply, judge


@dataclass
class Batches:
    """Answers each request of a batch by `rule`; `ends` says how, and after how many looks, a batch ends.

    Attributes:
        rule: as of `Server`, with the number of the request within its batch.
        ends: status of each batch in the order of their creation; the last one is that of all further ones.
        looks: how often a batch is `in_progress` before it ends.
        lost: batches (by number) that are made, but whose creation the client does not hear of.
    """

    rule: Callable[[dict, int], Reply] = lambda request, number: judge(request)
    ends: tuple[str, ...] = ("completed",)
    looks: int = 1
    lost: tuple[int, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)
    batches: list[dict] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def requests(self) -> list[dict]:
        """The requests of all batches."""
        return [json.loads(line) for batch in self.batches for line in self.files[batch["input_file_id"]].splitlines()]

    def __call__(self, method: str, path: str, body: bytes) -> Reply:
        url = urlsplit(path)
        where = url.path.removeprefix("/v1/")
        self.calls.append((method, where))
        if (method, where) == ("POST", "files"):
            assert b'name="purpose"\r\n\r\nbatch' in body
            lines = [line for line in body.splitlines(keepends=True) if line.startswith(b'{"custom_id"')]
            return self._json(self._file(b"".join(lines)))
        if (method, where) == ("POST", "batches"):
            return self._make(json.loads(body))
        if where == "batches":
            return self._list(parse_qs(url.query))
        name = where.split("/")[1]
        if where.endswith("/content"):
            return Reply(self.files[name])
        return self._look(next(batch for batch in self.batches if batch["id"] == name))

    def _json(self, value: dict) -> Reply:
        return Reply(json.dumps(value).encode())

    def _file(self, content: bytes) -> dict:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return {"id": name, "object": "file", "bytes": len(content), "purpose": "batch"}

    def _make(self, options: dict) -> Reply:
        assert options["endpoint"] == "/v1/chat/completions"
        assert options["completion_window"] == "24h"
        number = len(self.batches)
        batch = {"id": f"batch_{number}", "object": "batch", "status": "validating", "looks": 0, **options}
        self.batches.append(batch)
        return Reply(b"", 500) if number in self.lost else self._json(batch)

    def _list(self, query: dict) -> Reply:
        """The newest first, one a page."""
        ids = [batch["id"] for batch in reversed(self.batches)]
        start = ids.index(query["after"][0]) + 1 if "after" in query else 0
        page = list(reversed(self.batches))[start : start + 1]
        return self._json({"object": "list", "data": page, "has_more": start + 1 < len(ids)})

    def _look(self, batch: dict) -> Reply:
        batch["looks"] += 1
        lines = self.files[batch["input_file_id"]].splitlines()
        if batch["looks"] <= self.looks:
            batch["status"] = "in_progress"
        elif batch["status"] in ("validating", "in_progress"):
            self._end(batch, lines, self.ends[min(self.batches.index(batch), len(self.ends) - 1)])
        return self._json({**batch, "request_counts": {"total": len(lines), "completed": 0, "failed": 0}})

    def _end(self, batch: dict, lines: list[bytes], status: str) -> None:
        batch["status"] = status
        if status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "bad", "message": "invalid model", "line": 1}]}
            return
        good, bad = [], []
        if status == "expired":  # only the first half was processed
            lines, rest = lines[: len(lines) // 2], lines[len(lines) // 2 :]
            expired = {"code": "batch_expired", "message": "This request could not be executed in time."}
            bad += [{"custom_id": json.loads(line)["custom_id"], "response": None, "error": expired} for line in rest]
        for number, line in enumerate(lines):
            row = json.loads(line)
            reply = self.rule(row["body"], number)
            response = {"status_code": reply.status, "request_id": "r", "body": json.loads(reply.body)}
            made = {"id": f"r{number}", "custom_id": row["custom_id"], "response": response, "error": None}
            (good if reply.status == 200 else bad).append(made)
        for what, rows in (("output_file_id", good), ("error_file_id", bad)):
            random.Random(0).shuffle(rows)  # results have no order
            if rows:
                batch[what] = self._file("".join(json.dumps(row) + "\n" for row in rows).encode())["id"]
