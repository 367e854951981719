"""Damaged and foreign files: rows, or one error that names the file; never another exception, and in bounded time."""

import contextlib
import gzip
import json
import os
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sampo.audit.audit import audit_preferences
from sampo.data import load_preferences
from sampo.evaluation.answers import read_answers
from sampo.evaluation.prompt_files import load_prompts
from sampo.pair_rows import MAX_DEPTH, PreferenceDataError


def text_rows(n: int = 12) -> list[dict]:
    return [
        {"prompt": f"Question {i} é", "chosen": f"good {i}", "rejected": f"bad\n{i}", "score": i / 2} for i in range(n)
    ]


def message_rows(n: int = 12) -> list[dict]:
    def said(role: str, text: str) -> dict:
        return {"role": role, "content": text}

    return [
        {
            "prompt": [said("user", f"Question {i} é")],
            "chosen": [said("assistant", f"good {i}")],
            "rejected": [said("assistant", "\U0001f642" * (i + 1))],
        }
        for i in range(n)
    ]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict], **options) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue().to_pybytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- mutations -------------------------------------------------------------------------------------------------------

WHOLE = {
    "text.jsonl": jsonl(text_rows()),
    "messages.jsonl": jsonl(message_rows()),
    "utf16.jsonl": jsonl(text_rows()).decode().encode("utf-16"),
    "list.json": json.dumps(text_rows()).encode(),
    "pretty.json": "\n".join(json.dumps(row, indent=1) for row in message_rows()).encode(),
    "text.jsonl.gz": gzip.compress(jsonl(text_rows()), mtime=0),
    "text.parquet": parquet(text_rows(), row_group_size=5),
    "messages.parquet": parquet(message_rows(), compression="none", write_page_checksum=True),
    "packed.parquet.gz": gzip.compress(parquet(text_rows()), mtime=0),
}


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three changes: bits, random bytes, a cut, lines or blocks in another place, blocks repeated or lost."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        if not data:
            break
        kind, place = draw.randrange(8), draw.randrange(len(data))
        size = min(draw.choice((1, 2, 7, 40)), len(data) - place)
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + size] = draw.randbytes(size)
        elif kind == 2:
            data[place:place] = draw.randbytes(size)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            lines = data.splitlines(keepends=True)
            draw.shuffle(lines)
            data = bytearray(b"".join(lines))
        elif kind == 5:
            del data[place : place + size]
        elif kind == 6:
            data[place:place] = data[place : place + size] * draw.choice((1, 3, 50))
        else:
            data[place:place] = draw.choice((b"\0" * 50, b"\n", b"[" * 40, b'{"a":' * 40, b"\\ud83d", b"1" * 5000))
    return bytes(data)


def reads_or_says_why(path: Path) -> str:
    """What became of a file: `rows`, or the name of an exception that is meant for the user and names the file."""
    readers = {
        "load": lambda: load_preferences(path, on_bad_rows="drop"),
        "audit": lambda: audit_preferences(path),
        "prompts": lambda: load_prompts(path, on_bad_rows="drop"),
        "answers": lambda: read_answers(path),
    }
    said = []
    for name, read in readers.items():
        began = time.perf_counter()
        try:
            read()
            said.append("rows")
        except (ValueError, FileNotFoundError) as error:  # PreferenceDataError is a ValueError
            assert type(error) in (ValueError, PreferenceDataError, FileNotFoundError), repr(error)
            # an audit of one file calls its columns those of `train`
            assert path.name in str(error) or str(error).startswith("Split `train` must have both"), f"{name}: {error}"
            said.append("error")
        assert time.perf_counter() - began < 20, name
    return said[0]


@pytest.mark.parametrize("name", WHOLE)
def test_a_mutated_file_gives_rows_or_an_error_that_names_it(name, tmp_path):
    path = write(tmp_path / name, WHOLE[name])
    assert reads_or_says_why(path) == "rows"
    runs = int(os.environ.get("SAMPO_MUTATIONS", "25"))  # a few thousand by hand
    draw = random.Random(f"{name} {os.environ.get('SAMPO_MUTATION_SEED', '0')}")
    results = []
    for number in range(runs):
        content = mutate(WHOLE[name], draw)
        path = write(tmp_path / f"{number}.{name}", content)
        try:
            results.append(reads_or_says_why(path))
        except BaseException as error:
            if keep := os.environ.get("SAMPO_MUTATIONS_KEPT"):
                write(Path(keep) / path.name, content)
            error.add_note(f"mutation {number} of {name}: {content[:300]!r}")
            raise
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    assert len(results) == runs
