"""What requests cost: their tokens, the price of these, and a cap in money that no request is made beyond.

Before a request is sent, the most that it can cost is set aside; its reply says what it did cost. A request that was
given up without a reply may have been billed, so what was set aside for it counts as spent; a request that the server
refused costs nothing.
"""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

BYTES_PER_TOKEN = 3  # of UTF-8: English has about 4, and a Chinese character about 3 with one token
LIMITS = ("max_tokens", "max_completion_tokens")  # fields of a request that bound its reply


class Spending:
    """Tokens and money of the requests of one run.

    Args:
        price_in: of a million tokens that the model reads.
        price_out: of a million tokens that it writes.
        max_cost: cap on the price of all requests together, in the unit of the prices; None for no cap.

    Attributes:
        tokens_in: read, as the replies report.
        tokens_out: written.
    """

    def __init__(
        self, price_in: float | None = None, price_out: float | None = None, *, max_cost: float | None = None
    ):
        if (price_in is None) != (price_out is None):
            raise ValueError("`price_in` and `price_out` must be given together, got one of them. Give both.")
        if max_cost is not None and price_in is None:
            raise ValueError("`max_cost` must come with `price_in` and `price_out`, got none. Give all three.")
        for name, value in (("price_in", price_in), ("price_out", price_out), ("max_cost", max_cost)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be 0 or more and finite, got {value}.")
        self._prices = None if price_in is None or price_out is None else (price_in, price_out)
        self.max_cost = max_cost
        self.tokens_in = self.tokens_out = 0
        self._taken, self._in_flight = 0.0, 0  # money spent or set aside; requests without an outcome yet
        self._changed = threading.Condition()

    def price(self, tokens_in: int, tokens_out: int) -> float | None:
        """Of so many tokens; None without prices."""
        if self._prices is None:
            return None
        return (tokens_in * self._prices[0] + tokens_out * self._prices[1]) / 1e6

    def row(self) -> dict[str, Any]:
        """Tokens and price of this run's replies."""
        price = self.price(self.tokens_in, self.tokens_out)
        return {"tokens_in": self.tokens_in, "tokens_out": self.tokens_out, "price": price}

    def most(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> float:
        """The most that a request can cost, its tokens to read estimated from above; 0 without a cap.

        Raises:
            ValueError: there is a cap, and no field of the request bounds its reply.
        """
        if self.max_cost is None:
            return 0.0
        limit = next((options[name] for name in LIMITS if options.get(name)), None)
        if limit is None:
            raise ValueError(
                f"`max_cost` needs requests whose reply is bounded by one of {list(LIMITS)}, got {sorted(options)}. "
                "Set one of them in `options`."
            )
        size = len(json.dumps(list(messages), ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return self.price(math.ceil(size / BYTES_PER_TOKEN), limit) or 0.0

    def reserve(self, most: float, *, wait: bool = True) -> bool:
        """Set money aside for a request; False if the cap leaves no room for it.

        Args:
            most: that the request can cost.
            wait: for requests on their way, which may turn out cheaper.
        """
        with self._changed:
            while self.max_cost is not None and self._taken + most > self.max_cost:
                if not (wait and self._in_flight):
                    return False
                self._changed.wait()
            self._taken += most
            self._in_flight += 1
            return True

    def add(self, tokens_in: int, tokens_out: int) -> None:
        """Tokens for which nothing was set aside, as of a batch that an earlier run has made."""
        with self._changed:
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out
            self._taken += self.price(tokens_in, tokens_out) or 0.0

    def settle(self, most: float, usage: tuple[int, int] | None = None, *, billed: bool = True) -> None:
        """The outcome of a request.

        Args:
            most: that was set aside.
            usage: tokens read and written; None without a reply, and (0, 0) where the reply does not say.
            billed: without a reply: whether the request may have been billed.
        """
        tokens_in, tokens_out = usage or (0, 0)
        with self._changed:
            self._in_flight -= 1
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out
            if tokens_in or tokens_out:
                self._taken += (self.price(tokens_in, tokens_out) or 0.0) - most
            elif not billed:
                self._taken -= most
            self._changed.notify_all()
