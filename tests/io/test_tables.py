"""Tables on screens of every width: no number is cut, no column dropped, no name shortened."""

import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections import Counter
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from tiny import make_pairs

from sampo.audit import report as audit_report
from sampo.audit.audit import audit_preferences
from sampo.commands.diagnose_page import Checkpoint, tables
from sampo.diagnostics.findings import PLAIN, Finding
from sampo.evaluation.answers.answers import Answer, write_answers
from sampo.evaluation.results.comparing import compare, duel_table
from sampo.evaluation.results.judged import read_judged
from sampo.evaluation.results.summary import summary_table
from sampo.io import records as results
from sampo.io.tables import Table, clean, screen_width
from sampo.lab import report as lab_report
from sampo.stats.intervals import Estimate

WIDTHS = (20, 40, 60, 80, 120, 200)
NUMBER = re.compile(r"[-+]?\d[\d,.]*")
LONG = "qwen2.5-7b-instruct-ultrafeedback-sampo-onesided-lr5e-7-beta0.1-seed"  # a prefix that two names share


def numbers(text: str) -> Counter:
    return Counter(NUMBER.findall(text))


def assert_whole(table: Table, width: int | None) -> None:
    """Every word of every cell is there, as often as in the data, and lines fit."""
    text = table.text(width)
    words = text.split()
    cells = [row[table.keys :] for row in table.rows if row]
    data = Counter(word for row in cells for cell in row for line in cell for word in line.split())
    names = [line for row in table.rows if row for cell in row[: table.keys] for line in cell]
    found = Counter(words)
    assert all(found[word] >= times for word, times in data.items()), (width, data - found)
    for head in table.heads:
        assert set(head.split()) <= {word.removesuffix(":") for word in words}, (width, head)
    squeezed = " ".join(words)
    assert all(" ".join(name.split()) in squeezed for name in names)
    assert "…" not in text or "…" in table.text()
    for line in text.splitlines():
        assert width is None or cell_len(line) <= width or len(line.split()) == 1, (width, line)


VALUE = st.one_of(
    st.floats(-1e6, 1e6).map("{:+.3f}".format),
    st.integers(0, 10**9).map("{:,}".format),
    st.tuples(st.floats(0, 100), st.floats(0, 100)).map(lambda b: f"{b[0]:.1f}\n{b[0]:.1f}–{b[1]:.1f}"),
    st.just("–"),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_width_cuts_a_number_drops_a_column_or_shortens_a_name(data):
    keys = data.draw(st.integers(1, 2))
    n = data.draw(st.integers(1, 12))
    name = st.sampled_from(["dpo", "a system", LONG + "1", LONG + "2", "長い名前", "[bold]x[/bold]"])
    table = Table("A title of 3 words", [*["system", "method"][:keys], *(f"head\n{i}, %" for i in range(n))], keys)
    for _ in range(data.draw(st.integers(1, 4))):
        table.add(*(data.draw(name) for _ in range(keys)), *(data.draw(VALUE) for _ in range(n)))
        if data.draw(st.booleans()):
            table.end_section()
    assert_whole(table, data.draw(st.one_of(st.none(), st.integers(20, 220))))


def test_a_wide_table_is_split_with_the_names_repeated_and_stacked_where_they_leave_no_room():
    table = Table("Win rates", ["system", "prompts", "win\nrate", "ties"])
    table.add("dpo", "1,000", "55.1\n50.2–60.0", "17")
    assert table.text() == (
        "Win rates\n\n"
        "                       win\n"
        "system  prompts       rate  ties\n"
        "────────────────────────────────\n"
        "dpo       1,000       55.1    17\n"
        "                 50.2–60.0\n"
    )
    assert table.text(32) == table.text()
    assert table.text(31).count("system") == 2
    assert table.text(31).count("dpo") == 2
    stacked = ["  prompts:", "    1,000", "  win rate:", "    55.1", "    50.2–60.0", "  ties: 17"]
    assert table.text(13) == "\n".join(["Win rates", "", "system: dpo", *stacked, ""])


def test_what_would_command_a_terminal_is_replaced_and_markup_is_text():
    table = Table("of \x1b]0;x\x07", ["system", "n"])
    table.add("\x1b[31m[red]a[/red]", "1")
    assert "\x1b" not in table.text()
    assert "[red]a[/red]" in table.text()
    assert clean("a\x9bb\u202ec") == "a�b�c"
    with pytest.raises(ValueError, match="at most 2 cells, got 3"):
        table.add("a", "1", "2")


# --- the tables of the commands -------------------------------------------------------------------------------------


def answers(seed: int, prompts: int = 60) -> list[Answer]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(["town", *["so"] * rng.integers(1, 30)]) for _ in range(prompts)]
    return [Answer(prompt=f"where is {i}?", answer=text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> list[Path]:
    """Judgements of three systems, two of them with long names of one prefix."""
    from sampo.cli import main

    folder = tmp_path_factory.mktemp("judged")
    names = ["base", "dpo", LONG + "1", LONG + "2"]
    for seed, name in enumerate(names):
        write_answers(folder / f"{name}.jsonl", answers(seed))
    made = []
    for name in names[1:]:
        made.append(folder / f"{name}.judged.jsonl")
        words = ["--system", folder / f"{name}.jsonl", "--baseline", folder / "base.jsonl", "--out", made[-1]]
        assert main(["judge", *map(str, words), "--judge", "longer"]) == 0
    return made


def page(name: str, seed: int) -> Checkpoint:
    rng = np.random.default_rng(seed)

    def finding(quantity: str, **labels: object) -> Finding:
        value = float(rng.normal())
        return Finding(quantity, labels, Estimate(value, 0.1, value - 0.2, value + 0.2, 321))

    methods, groups = (PLAIN, "sampo", "expected + learned penalty"), ("all", "chosen longer", "chosen shorter")
    found = [finding("pressure", method=m, group=g) for m in methods for g in groups]
    found += [finding("accuracy", method=m, group=g) for m in methods for g in groups]
    found += [finding(name, method=m) for m in methods for name in ("margin_correlation", "margin_partial")]
    found += [finding("reward", **{"from": low, "to": 2 * low}) for low in (64, 128)]
    found += [finding(name) for name in ("reward_slope", "reward_r2")]
    found += [finding("log_ratio_of", side=s, **{"class": "end"}) for s in ("chosen", "rejected")]
    return Checkpoint(name, found)


def test_every_table_of_every_command_is_whole_at_every_width(judged, tmp_path):
    runs = {path.name.removesuffix(".judged.jsonl"): read_judged(path) for path in judged}
    summaries, duels = compare(runs)
    made = [summary_table(summaries), duel_table(duels)]
    made += tables([page(LONG + "1", 1), page(LONG + "2", 2)])
    records = results.read(Path(__file__).parents[2] / "measurements" / "lab.jsonl")
    made.append(lab_report.table(lab_report.collect_lines(lab_report.outcomes_of(records))))
    make_pairs(40).to_json(tmp_path / "pairs.jsonl")
    made += audit_report.make_tables(audit_preferences(str(tmp_path / "pairs.jsonl")))
    assert len(made) >= 8
    for table in made:
        for width in (*range(20, 201, 7), None):
            assert_whole(table, width)


def through_terminal(width: int | None, run, *, echo: list[str]) -> int:
    """Call `run(fd)` with the end of a real terminal of that many columns; what was written goes to `echo`."""
    ours, theirs = pty.openpty()
    if width is not None:
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    parts: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            parts.append(part)

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        code = run(theirs)
    finally:
        os.close(theirs)
        reader.join(timeout=20)
        os.close(ours)
    echo.append(b"".join(parts).decode().replace("\r\n", "\n"))
    return code


def compare_in(judged, tmp_path, monkeypatch, width: int | None) -> str:
    """What `sampo compare` writes to a terminal of that width."""
    from sampo.cli import main

    def run(fd: int) -> int:
        with os.fdopen(os.dup(fd), "w", encoding="utf-8") as screen, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", screen)
            return main(["compare", "--judgements", *map(str, judged), "--out", str(tmp_path / "c")])

    echo: list[str] = []
    assert through_terminal(width, run, echo=echo) == 0
    return echo[0]


def test_compare_shows_the_same_numbers_in_a_pipe_and_on_terminals_of_all_widths(
    judged, tmp_path, monkeypatch, capsys
):
    from sampo.cli import main

    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["compare", "--judgements", *map(str, judged), "--out", str(tmp_path / "c")]) == 0
    piped = capsys.readouterr().out
    for name in (LONG + "1", LONG + "2"):
        assert sum(line.startswith(f"{name} ") for line in piped.splitlines()) >= 2  # win rates and lengths
    for width in WIDTHS:
        shown = compare_in(judged, tmp_path, monkeypatch, width)
        assert not numbers(piped) - numbers(shown), width
        assert "…" not in shown
        assert all(name in shown for name in (LONG + "1", LONG + "2"))
        part = shown.split("Intervals are")[0]
        wide = [line for line in part.splitlines() if len(line) > width and len(line.split()) > 1]
        wide = [line for line in wide if not line.startswith("Note:")]
        assert wide == [], width
    monkeypatch.setenv("COLUMNS", "60")  # outranks the terminal
    assert compare_in(judged, tmp_path, monkeypatch, 200) == compare_in(judged, tmp_path, monkeypatch, 60)


def test_the_width_is_columns_then_the_terminal_then_none(monkeypatch, tmp_path):
    monkeypatch.delenv("COLUMNS", raising=False)
    with (tmp_path / "log").open("w") as file:
        assert screen_width(file) is None
        monkeypatch.setenv("COLUMNS", "70")
        assert screen_width(file) == 70
        for wrong in ("", "0", "-3", "wide"):
            monkeypatch.setenv("COLUMNS", wrong)
            assert screen_width(file) is None
    monkeypatch.delenv("COLUMNS")

    def width_of(fd: int) -> int:
        with os.fdopen(os.dup(fd), "w") as screen:
            return screen_width(screen)

    for columns, expected in ((40, 40), (200, 200), (None, 80), (3, 20)):
        assert through_terminal(columns, width_of, echo=[]) == expected

    class Notebook(io.StringIO):  # says that it is a terminal, and has none behind it
        def isatty(self) -> bool:
            return True

    assert screen_width(Notebook()) == 80


def test_a_command_started_in_a_terminal_of_40_columns_is_whole(judged, tmp_path):
    """The command itself, as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    words = ["compare", "--judgements", *map(str, judged), "--out", str(tmp_path / "c")]
    start = [sys.executable, "-c", "import sys; from sampo.cli import main; sys.exit(main(sys.argv[1:]))", *words]
    piped = subprocess.run(start, capture_output=True, text=True, check=True, env=environment, timeout=120).stdout
    echo: list[str] = []
    run = lambda fd: subprocess.run(start, stdout=fd, check=True, env=environment, timeout=120).returncode  # noqa: E731
    assert through_terminal(40, run, echo=echo) == 0
    assert not numbers(piped) - numbers(echo[0])
