"""Requests to one OpenAI-compatible server, and to no other: counted, capped, retried a bounded number of times.

The `openai` client sends the requests, but takes nothing from the environment: no `OPENAI_BASE_URL`, no proxy, no
organisation, no headers. Redirects are not followed. The reply is handed over as the bytes that came, so that it can
be kept before anything tries to read it.
"""

import importlib
import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from .server_process import ServerProcess
from .server_text import Redaction, retry_after, usage_of, visible
from .spending import Spending

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
MAX_BODY = 16 * 2**20  # bytes of one reply
MAX_FILE = 2**30  # bytes of the results of a batch
MAX_WAIT = 120.0  # seconds between two attempts; if a server asks for more, the request fails
HEADERS = frozenset(
    {
        "host",
        "accept",
        "accept-encoding",
        "connection",
        "content-type",
        "content-length",
        "user-agent",
        "authorization",
    }
    | {"x-stainless-raw-response"}  # tells the client to return the reply unparsed
)


class Unanswered(Exception):
    """A request without a reply.

    Attributes:
        reason: One word for the count: `timeout`, `connection`, `rate_limited`, `server_error`, `rejected`,
            `too_large`, `not_asked`.
        detail: What happened, for people; without the key, in one line that commands no terminal.
        fatal: No other request can succeed.
    """

    def __init__(self, reason: str, detail: str, *, fatal: bool = False, wait: float | None = None):
        detail = visible(detail)
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.fatal, self.wait = reason, detail, fatal, wait

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later."""
        return not self.fatal and self.reason in ("timeout", "connection", "rate_limited", "server_error")


def key_from_environment(url: str, name: str | None) -> str | None:
    """The key for an endpoint, from the variable `name`; without a name, OpenAI's key for OpenAI's own URL only.

    Raises:
        ValueError: there is no such variable, or OpenAI's URL is asked without a key.
    """
    if name is None:
        if urlsplit(url).hostname != urlsplit(OPENAI_URL).hostname:
            return None  # a key is not sent where it does not belong
        name = OPENAI_KEY
    if not os.environ.get(name, "").strip():
        raise ValueError(f"`api_key_env` must name a variable that holds the key, got {name}, which is empty.")
    return os.environ[name].strip()


class Endpoint:
    """A model behind an OpenAI-compatible URL.

    Args:
        url: Up to and including `/v1`.
        model: Name of the model there.
        api_key: Sent in a header, and never logged or written; see [`key_from_environment`].
        timeout: Seconds for one request, from the connection to the last byte of the reply.
        retries: Further attempts after a time-out, a lost connection, 408, 409, 429 or 5xx.
        max_requests: Cap on requests in all, attempts included; None for no cap.
        concurrency: Requests at a time.
        give_up_after: Requests in a row that fail with all their attempts before the rest is not asked any more.
        proxy: URL of a proxy; those in the environment are not used.
        backoff: Seconds before the first further attempt, doubled each time, unless the server sends `Retry-After`.
        spending: Counts tokens and money, and may cap the latter.
        server: Started before the first item of `for_each`, and ended by `close`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        max_requests: int | None = None,
        concurrency: int = 8,
        give_up_after: int = 5,
        proxy: str | None = None,
        backoff: float = 1.0,
        spending: Spending | None = None,
        server: ServerProcess | None = None,
    ):
        self.url, self.model = _checked_url(url), model
        for name, value, least in (
            ("retries", retries, 0),
            ("max_requests", max_requests or 0, 0),
            ("concurrency", concurrency, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be {least} or more, got {value}.")
        if not 0 < timeout < math.inf:
            raise ValueError(f"`timeout` must be above 0 and finite, got {timeout}.")
        self.retries, self.max_requests, self.concurrency = retries, max_requests, concurrency
        self.give_up_after, self.backoff = give_up_after, backoff
        self.requests = 0
        self.spending = spending or Spending()
        self._key, self._timeout, self._server = api_key, timeout, server
        self.redact = Redaction(api_key)
        self._client = self._connect(timeout, proxy)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._why_stopped: str | None = None
        self._failed_in_a_row, self._succeeded = 0, False
        self.stopped_for_good = False  # the same requests cannot succeed later
        self._random = random.Random(0)  # spreads further attempts; no result depends on it

    def _connect(self, timeout: float, proxy: str | None) -> Any:
        try:
            import openai
        except ImportError:
            raise ImportError(
                'An endpoint needs the package `openai`, which is not installed: pip install "sampo-dpo[judge]".'
            ) from None
        if (self._key or proxy) and urlsplit(self.url).scheme == "http" and not _is_local(self.url):
            logger.warning("%s is not encrypted: all on the way can read the key and the texts", self.url)
        # they log headers and first lines of replies, which may hold the key
        for library in ("httpcore", "httpcore2", "httpx", "httpx2", "openai"):
            if (theirs := logging.getLogger(library)).level == logging.NOTSET:
                theirs.setLevel(logging.WARNING)
        streams = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
        transport = openai.DefaultHttpxClient(
            trust_env=False,
            follow_redirects=False,
            timeout=timeout,
            proxy=proxy,
            event_hooks={"request": [self._only_ours], "response": [_bounded(streams, timeout)]},
        )
        return openai.OpenAI(
            base_url=self.url,
            api_key=self._key or "none",
            organization="",
            project="",
            max_retries=0,  # ours are counted, and stop at the cap
            timeout=timeout,
            http_client=transport,
        )

    def _only_ours(self, request: Any) -> None:
        """Send requests to this URL alone, without headers that the client found elsewhere."""
        if not str(request.url).startswith(f"{self.url}/"):
            raise RuntimeError(f"requests must go to {self.url}, and one was to go to {request.url.host}")
        for name in [name for name in request.headers if name.lower() not in HEADERS]:
            del request.headers[name]
        request.headers["accept-encoding"] = "identity"  # else a small reply can unpack to a large one
        request.headers["authorization"] = f"Bearer {self._key or 'none'}"

    @property
    def why_stopped(self) -> str | None:
        """Why no more requests are made; None as long as they are."""
        return self._why_stopped

    def stop(self, why: str) -> None:
        """Make no more requests; the first reason is kept."""
        with self._lock:
            self._why_stopped = self._why_stopped or why
        self._stop.set()

    def close(self) -> None:
        """Close the connections, and end the server that was started."""
        self._client.close()
        if self._server is not None:
            self._server.stop()

    def _is_up(self) -> bool:
        """Whether a server answers at all."""
        try:
            self._send(lambda client: client.models.list())
        except Unanswered as failure:
            return not failure.passing  # a server without this list answers too
        return True

    def ask(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """One chat completion; the body of the reply as it came.

        Bytes that are no UTF-8 come as lone surrogates (`surrogateescape`).

        Args:
            messages: The conversation.
            options: All other fields of the request.

        Raises:
            Unanswered: there is no reply, after all attempts.
        """
        most = self.spending.most(messages, options)
        for attempt in range(self.retries + 1):
            self.admit(most)
            try:
                content = self._send(
                    lambda client: client.chat.completions.create(
                        model=self.model, messages=list(messages), extra_body=dict(options)
                    )
                )
            except Unanswered as failure:
                self.spending.settle(most, billed=failure.reason in ("timeout", "connection", "too_large"))
                if failure.passing and attempt < self.retries and self._pause(failure, attempt):
                    continue
                self._count_failure(failure)
                raise
            with self._lock:
                self._failed_in_a_row, self._succeeded = 0, True
            body = self.redact(content.decode("utf-8", "surrogateescape"))
            self.spending.settle(most, usage_of(body))
            return body
        raise AssertionError("the last attempt returns or raises")

    def call(self, send: Callable[[Any], Any], *, retries: int | None = None) -> bytes:
        """A request that costs nothing, such as one about a batch: retried, but neither counted nor capped.

        Args:
            send: makes the request with the client, whose replies come unparsed.
            retries: further attempts; those of the endpoint without it.

        Raises:
            Unanswered: there is no reply, after all attempts.
        """
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            try:
                return self._send(send)
            except Unanswered as failure:
                if not (failure.passing and attempt < retries and self._pause(failure, attempt)):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def admit(self, most: float, *, wait: bool = True) -> None:
        """Count a request that costs at most `most`, or refuse to make it; with `wait` as in `Spending.reserve`."""
        if not self.spending.reserve(most, wait=wait):
            self.stop(f"`max_cost` of {self.spending.max_cost:g} has no room for a request that may cost {most:.4g}")
            raise Unanswered("not_asked", self._why_stopped or "")
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                self._why_stopped = self._why_stopped or f"`max_requests` of {self.max_requests} are made"
                self._stop.set()
            if self._why_stopped is None:
                self.requests += 1
                return
        self.spending.settle(most, billed=False)
        raise Unanswered("not_asked", self._why_stopped)

    def _send(self, send: Callable[[Any], Any]) -> bytes:
        """One request, given up when its time is over, whatever the server is doing then.

        The time-outs of the client are those of one read: a server that sends a byte a second never meets them.
        """
        outcome: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                outcome.put(self._send_now(send))
            except BaseException as error:
                outcome.put(error)

        threading.Thread(target=work, daemon=True).start()  # if given up, it ends with its connection
        try:
            found = outcome.get(timeout=self._timeout)
        except queue.Empty:
            raise Unanswered("timeout", f"no complete reply from {self.url} in {self._timeout:g} s") from None
        if isinstance(found, BaseException):
            raise found
        return found

    def _send_now(self, send: Callable[[Any], Any]) -> bytes:
        import openai

        try:
            content: bytes = send(self._client.with_raw_response).content
            return content
        except openai.APITimeoutError:
            raise Unanswered("timeout", f"no reply from {self.url} in time") from None
        except _TooLargeError as error:
            raise Unanswered("too_large", f"{self.url}: {error}") from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, _TooLargeError):
                raise Unanswered("too_large", f"{self.url}: {error.__cause__}") from None
            cause = self.redact(f"{type(error.__cause__).__name__}: {error.__cause__}")
            raise Unanswered("connection", f"{self.url}: {cause}") from None
        except openai.APIStatusError as error:
            raise self._of_status(error) from None

    def _of_status(self, error: Any) -> Unanswered:
        status = error.status_code
        body = " ".join(self.redact(error.response.text).split())[:300]
        text = f"{self.url} answers {status} for model `{self.model}`: {body or 'nothing more'}"
        if 300 <= status < 400:
            where = self.redact(error.response.headers.get("location", "nowhere"))
            return Unanswered("rejected", f"{text}. It redirects to {where}, which is not asked", fatal=True)
        if status in (401, 403, 404, 405):
            return Unanswered("rejected", text, fatal=True)
        if status == 429:
            spent = "insufficient_quota" in body
            return Unanswered("rate_limited", text, fatal=spent, wait=retry_after(error.response.headers))
        if status in (408, 409) or status >= 500:
            return Unanswered("server_error", text, wait=retry_after(error.response.headers))
        return Unanswered("rejected", text)

    def _pause(self, failure: Unanswered, attempt: int) -> bool:
        """Wait before the next attempt; False if it is not worth it."""
        if failure.wait is not None and failure.wait > MAX_WAIT:
            return False
        grown = min(self.backoff * 2**attempt, MAX_WAIT) * (0.75 + 0.5 * self._random.random())
        seconds = grown if failure.wait is None else failure.wait
        logger.info("%s; attempt %d of %d in %.1f s", failure.detail, attempt + 2, self.retries + 1, seconds)
        return not self._stop.wait(seconds)

    def _count_failure(self, failure: Unanswered) -> None:
        with self._lock:
            if failure.reason in ("rejected", "too_large") and self._succeeded and not failure.fatal:
                return  # only this request is wrong
            self._failed_in_a_row += 1
            stop = failure.fatal or self._failed_in_a_row >= self.give_up_after
        if stop:
            self.stopped_for_good = self.stopped_for_good or (self._why_stopped is None and not failure.passing)
            self.stop(failure.detail)

    def for_each(self, items: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        """(number of the item, result) as they come, several at a time.

        When the caller stops early, no request is begun any more, and those under way are waited for.

        Raises:
            ValueError: the server could not be started.
        """
        if items and self._server is not None:
            self._server.start(self.url, self._is_up)
        with ThreadPoolExecutor(self.concurrency) as pool:
            numbers = {pool.submit(work, item): number for number, item in enumerate(items)}
            try:
                for future in as_completed(numbers):
                    yield numbers[future], future.result()
            except BaseException:
                self.stop("interrupted")
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class _TooLargeError(Exception):
    pass


def _bounded(streams: Any, timeout: float) -> Callable[[Any], None]:
    """A hook on replies: `streams` is the package of the client, which knows its own kind of stream only."""

    class Bounded(streams.SyncByteStream):
        def __init__(self, stream: Any, largest: int):
            self._stream, self._end, self._largest = stream, time.monotonic() + timeout, largest

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in self._stream:
                size += len(chunk)
                if size > self._largest:
                    raise _TooLargeError(f"a reply must have at most {self._largest / 2**20:g} MiB, got more")
                if time.monotonic() > self._end:
                    raise streams.ReadTimeout("the reply is not complete in time")
                yield chunk

        def close(self) -> None:
            self._stream.close()

    def bound(response: Any) -> None:
        response.headers.pop("content-encoding", None)  # nothing is unpacked: what we did not ask for is unreadable
        response.headers["content-type"] = "application/json"  # a strange charset is none
        is_file = response.request.url.path.endswith("/content")
        response.stream = Bounded(response.stream, MAX_FILE if is_file else MAX_BODY)

    return bound


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise ValueError(
            "`url` must look like https://host/v1 or http://localhost:8000/v1, without user, password and query, got "
            f"{parts.scheme}://{parts.hostname or ''}{parts.path}. A key goes in a variable that `api_key_env` names."
        )
    return url.rstrip("/")


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
