"""A published leaderboard of AlpacaEval as a CSV, and our two numbers beside its own."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ...io.schemas import WrongFile
from .alpaca_eval import AlpacaEval

LEADERBOARD_COLUMNS = ("win_rate", "avg_length", "n_total")
CONTROLLED = "length_controlled_winrate"  # not on the leaderboards of AlpacaEval 1
SAME_RAW = 0.01  # points of the raw rate, which is computed alike: more means other annotations
SAME_CONTROLLED = 0.5  # points of the controlled rate, whose penalty each optimiser chooses a little differently


@dataclass(frozen=True)
class Published:
    """A row of a leaderboard; None where it is empty.

    Attributes:
        win_rate: in points.
        length_controlled: in points.
        mean_length: of the outputs in characters, rounded down.
        rows: annotations that count.
    """

    win_rate: float
    length_controlled: float | None
    mean_length: float | None
    rows: int | None


def read_leaderboard(path: str | Path) -> dict[str, Published]:
    """The rows of a leaderboard's file by the name of the model.

    Raises:
        WrongFile: it is no CSV with a model in its first column and AlpacaEval's other columns.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            heads, *rows = list(csv.reader(file)) or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise WrongFile(f"{path} must be a CSV in UTF-8, got: {error}. Download the leaderboard again.") from None
    if missing := [name for name in LEADERBOARD_COLUMNS if name not in heads[1:]]:
        raise WrongFile(
            f"{path} must be a leaderboard of AlpacaEval, with models in its first column and the columns "
            f"{LEADERBOARD_COLUMNS}, got no {missing}. Take a file of its `leaderboards` folder."
        )
    found = {}
    for number, row in enumerate((row for row in rows if row), 2):
        cells = dict(zip(heads[1:], row[1:], strict=False))
        values = {
            name: _number(cells.get(name, ""), f"{path}, line {number}, `{name}`")
            for name in (*LEADERBOARD_COLUMNS, CONTROLLED)
        }
        if values["win_rate"] is None:
            raise WrongFile(f"{path}, line {number}: `win_rate` must be a number, got none.")
        total = values["n_total"]
        found[row[0]] = Published(
            values["win_rate"], values[CONTROLLED], values["avg_length"], None if total is None else int(total)
        )
    return found


def _number(text: str, position: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise WrongFile(f"{position} must be a number, got {text[:40]!r}.")
    return value


def beside_leaderboard(found: AlpacaEval, leaderboard: Mapping[str, Published]) -> str:
    """One sentence: what is published of the model, and how far our numbers are from it.

    The published length-controlled rate aligns difficulty by row number, so ours is compared in that alignment.
    """
    if found.model not in leaderboard:
        near = get_close_matches(found.model, leaderboard, n=1)
        hint = f" The nearest name is {near[0]}." if near else ""
        return f"Not on the leaderboard: {found.model or 'a model without `generator_2`'}.{hint}"
    published = leaderboard[found.model]
    raw = (found.win_rate.value or 0.0) - published.win_rate
    text = f"On the leaderboard: win rate {published.win_rate:.2f} (ours {raw:+.2f})"
    ours = found.by_row or found.length_controlled
    differs = abs(raw) > SAME_RAW
    if published.length_controlled is not None:
        text += f", length-controlled {published.length_controlled:.2f}"
        if ours is not None and ours.value is not None:
            text += (
                f" (ours{' by row number' if found.by_row else ''} {ours.value - published.length_controlled:+.2f})"
            )
            differs |= abs(ours.value - published.length_controlled) > SAME_CONTROLLED
    if published.mean_length is not None:
        text += f", {published.mean_length:.0f} characters"
        differs |= abs(int(found.mean_length) - published.mean_length) > 1
    if published.rows is not None:
        text += f", {published.rows} annotations"
    counted = found.rows - found.failed
    if not differs:
        return f"{text}: the same numbers."
    return f"{text}. These are not the annotations of the leaderboard: ours are {counted} with a preference."
