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
from sampo.data.issues import MAX_NESTING, PreferenceDataError
from sampo.data.layouts import is_blank_text
from sampo.data.load import load_preferences
from sampo.data.sources import MAX_COLUMNS
from sampo.evaluation.answers.answers import Answer, prompt_id, read_answers
from sampo.evaluation.answers.prompts import load_prompts
from sampo.evaluation.judging.judges import match


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


ROWS = text_rows()
LINES = jsonl(ROWS)


# --- what is read ----------------------------------------------------------------------------------------------------


def encodings() -> list[str]:
    return [f"utf-{size}{order}" for size in (16, 32) for order in ("", "-le", "-be")] + ["utf-8-sig"]


@pytest.mark.parametrize("encoding", encodings())
@pytest.mark.parametrize("shape", ["lines", "list", "pretty", "lines.gz"])
def test_json_is_read_in_every_encoding_and_shape(encoding, shape, tmp_path):
    texts = {
        "lines": LINES.decode(),
        "list": json.dumps(ROWS, indent=1, ensure_ascii=False),
        "pretty": "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS),
    }
    content = texts[shape.removesuffix(".gz")].encode(encoding)
    path = write(tmp_path / "x.jsonl", content)
    if shape.endswith(".gz"):
        path = write(tmp_path / "x.jsonl.gz", gzip.compress(content))
    assert load_preferences(path).to_list() == ROWS
    assert len(audit_preferences(path).scans[0].pairs) == len(ROWS)
    assert len(load_prompts(path)) == len(ROWS)


@pytest.mark.parametrize("between", ["\n", "", " \r\n\n", "\n\t"])
def test_pretty_printed_objects_are_read_whatever_stands_between_them(between, tmp_path):
    text = "\n\n" + between.join(json.dumps(row, indent=4) for row in ROWS) + between
    assert load_preferences(write(tmp_path / "x.json", text.encode())).to_list() == ROWS
    broken = text.replace('"bad\\n7"', '"bad', 1).encode()
    with pytest.raises(PreferenceDataError, match=r"x.json is not a complete JSON object \(.* at line \d+"):
        load_preferences(write(tmp_path / "x.json", broken))


def test_a_broken_first_line_does_not_cost_the_others(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"prompt": "cut\n' + LINES)
    with pytest.raises(PreferenceDataError, match=r"1 of 13 pairs is not complete JSON, at rows \[0\]"):
        load_preferences(path)
    assert load_preferences(path, on_bad_rows="drop").to_list() == ROWS


@pytest.mark.parametrize("value", [3, "text", [1], None, True])
def test_files_that_were_joined_keep_the_marks_of_each_and_it_is_no_fault(value, tmp_path):
    path = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf" + LINES + json.dumps(value).encode())
    assert len(load_preferences(path, on_bad_rows="drop")) == 2 * len(ROWS)


# --- nothing can be read ---------------------------------------------------------------------------------------------

PYTHON = "".join(f"{row!r}\n" for row in ROWS).encode()
FOREIGN = {  # name: (content, what is said)
    "python.jsonl": (PYTHON, r"python.jsonl, line 1 \(Python, not JSON: write it with `json.dumps`"),
    "single.jsonl": (PYTHON.splitlines()[0], r"single.jsonl, line 1 \(Python, not JSON"),
    "csv.jsonl": (b"prompt,chosen,rejected\na,b,c\n", r"csv.jsonl, line 1 \(not JSON; if the file is CSV"),
    "words.jsonl": (b"hello\nworld\n", r"words.jsonl, line 1 \(Expecting value"),
    "latin.jsonl": (b'{"prompt": "\xe9"}\n' * 3, r"latin.jsonl, line 1 \(byte 13\)"),
    "list.json": (b'["a", 3]', r"list.json, element 0 \(str\)"),
    "numbers.jsonl": (b"1\n2\n", r"numbers.jsonl, line 1 \(int\)"),
    "nul.jsonl": (b"\0" * 4096, r"nul.jsonl, line 1 \(Expecting value"),
    "page.jsonl": (b"\n<!DOCTYPE html><html>404</html>", "page.jsonl is HTML or XML"),
    "pointer.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        r"pointer.*Git LFS.*`git lfs pull`",
    ),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"pointer.*Git LFS"),
    "page.parquet": (b"<html>", "page.parquet is HTML"),
    "packed.jsonl": (gzip.compress(LINES), r"packed.jsonl is packed with gzip. .* end in `.gz`"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "twice.jsonl.gz is packed with gzip"),
    "plain.jsonl.gz": (LINES, r"plain.jsonl.gz is a damaged .* remove `.gz` from its name"),
    "archive.jsonl": (b"PK\x03\x04" + bytes(40), "archive.jsonl is a zip archive"),
    "zstd.json": (b"\x28\xb5\x2f\xfd" + bytes(40), "zstd.json is packed with zstandard"),
    "rows.jsonl": (parquet(ROWS), r"rows.jsonl is a Parquet file. Let its name end in `.parquet`"),
    "text.parquet": (LINES, "text.parquet is not a complete Parquet file"),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "empty.parquet": (b"", "empty.parquet is not a complete Parquet file"),
    "odd.jsonl": (LINES.decode().encode("utf-16")[:-1], "odd.jsonl is not valid UTF-16"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_without_a_row_says_what_it_is_everywhere(name, tmp_path):
    content, said = FOREIGN[name]
    path = write(tmp_path / name, content)
    readers = [load_preferences, audit_preferences, load_prompts]
    if not name.endswith("parquet") and content:
        readers.append(read_answers)
    for read in readers:
        with pytest.raises(ValueError, match=said) as caught:
            read(path)
        assert "columns are []" not in str(caught.value)
    for read in (load_preferences, load_prompts):
        with pytest.raises(ValueError, match=said):  # nothing is left when bad rows are dropped
            read(path, on_bad_rows="drop")


def test_the_issues_of_a_file_without_a_row_are_counted(tmp_path):
    path = write(tmp_path / "x.jsonl", b"[1]\n" + PYTHON)
    with pytest.raises(PreferenceDataError, match="complete JSON list"):  # the first character says list
        load_preferences(path)
    path = write(tmp_path / "x.jsonl", PYTHON + b"[1]\n")
    with pytest.raises(PreferenceDataError, match=r"none in 13 lines") as caught:
        load_preferences(path)
    found = {issue.kind: (issue.count, issue.rows) for issue in caught.value.issues}
    assert found == {"broken_line": (12, list(range(10))), "not_an_object": (1, [])}


# --- rows that JSON and Parquet allow and nobody means -------------------------------------------------------------


@pytest.mark.parametrize("shape", ["lines", "list", "pretty"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "repeated_key"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": [{"y": {"k": 1, "k": 1}}]}', "repeated_key"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": ' + "[" * 32 + "1" + "]" * 32 + "}", "too_deep"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": ' + '{"a":' * 32 + "1" + "}" * 33, "too_deep"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "x": "\\ud83d"}', "bad_utf8"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "\\udead": 1}', "bad_utf8"),
    ],
)
def test_a_row_that_json_allows_and_nobody_means_is_a_bad_row(text, kind, shape, tmp_path):
    texts = [json.dumps(ROWS[0], indent=1), text.replace(", ", ",\n"), json.dumps(ROWS[1])]
    content = {
        "lines": "\n".join([json.dumps(ROWS[0]), text, json.dumps(ROWS[1])]),
        "list": f"[{','.join(texts)}]",
        "pretty": "\n".join(texts),
    }
    path = write(tmp_path / "x.json", content[shape].encode())
    with pytest.raises(PreferenceDataError) as caught:
        load_preferences(path)
    assert [(issue.kind, issue.rows) for issue in caught.value.issues] == [(kind, [1])]
    assert "x.json, " in str(caught.value)
    assert load_preferences(path, on_bad_rows="drop").to_list() == ROWS[:2]


def test_rows_at_the_limit_of_depth_are_loaded(tmp_path):
    for levels, rows in ((MAX_NESTING - 1, 1), (MAX_NESTING, 0), (5000, 0), (100_000, 0)):
        deep = json.dumps("MARK").join(json.dumps({**ROWS[0], "x": "MARK"}).split('"MARK"'))
        text = '{"a": [' * (levels // 2) + '{"a":' * (levels % 2) + "1" + "}" * (levels % 2) + "]}" * (levels // 2)
        lines = deep.replace('"MARK"', text) + "\n" + json.dumps(ROWS[1])
        loaded = load_preferences(write(tmp_path / "x.jsonl", lines.encode()), on_bad_rows="drop")
        assert len(loaded) == 1 + rows, levels
    with pytest.raises(PreferenceDataError, match=r"x\.json is nested too deeply"):
        load_preferences(write(tmp_path / "x.json", b"[" * 100_000))


def test_a_nested_parquet_file_is_refused_before_its_rows_are_read(tmp_path):
    for levels, said in ((40, f"nests values deeper than {MAX_NESTING} levels"), (200, "not a complete Parquet file")):
        kind = pa.string()
        for _ in range(levels):
            kind = pa.list_(kind)
        table = pa.table({name: pa.array(["a", "b"]) for name in ("prompt", "chosen")} | {"x": pa.nulls(2, kind)})
        pq.write_table(table, tmp_path / "x.parquet")
        for read in (load_preferences, audit_preferences, load_prompts):
            with pytest.raises(ValueError, match=f"x.parquet .*{said}"):
                read(tmp_path / "x.parquet")


def test_two_parquet_columns_or_fields_of_one_name_are_refused(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"]), pa.array(["d"])]
    pq.write_table(pa.Table.from_arrays(columns, ["prompt", "chosen", "rejected", "chosen"]), tmp_path / "x.parquet")
    struct = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], ["role", "role"])
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"], "m": struct}), tmp_path / "y.parquet")
    packed = write(tmp_path / "x.parquet.gz", gzip.compress((tmp_path / "x.parquet").read_bytes()))
    for path, what in (
        (tmp_path / "x.parquet", "column `chosen`"),
        (packed, "column `chosen`"),
        (tmp_path / "y.parquet", "in column `m` the field `role`"),
    ):
        for read in (load_preferences, audit_preferences, load_prompts):
            with pytest.raises(PreferenceDataError, match=f"{path.name} has {what} more than once"):
                read(path)


def test_a_parquet_file_without_rows_is_an_error_alone_and_no_matter_beside_others(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.slice(0, 0), tmp_path / "train-1.parquet")
    for read in (load_preferences, load_prompts):
        with pytest.raises(PreferenceDataError, match=r"train-1.parquet has no rows"):
            read(tmp_path / "train-1.parquet")
    with pytest.raises(PreferenceDataError, match=r"train-1.parquet must have at least one good pair, got none"):
        audit_preferences(tmp_path / "train-1.parquet")
    pq.write_table(table, tmp_path / "train-2.parquet")
    assert load_preferences(tmp_path).to_list() == ROWS
    pq.write_table(pa.table({"prompt": [1], "chosen": [2], "rejected": [3]}), tmp_path / "train-3.parquet")
    with pytest.raises(ValueError, match=r"same columns of the same types, got \['train-1.parquet', "):
        load_preferences(tmp_path)


@pytest.mark.parametrize("checksums", [False, True])
def test_a_parquet_file_with_a_damaged_page_is_named(checksums, tmp_path):
    rows = [{"prompt": f"q{i:05d}", "chosen": f"a{i:05d}", "rejected": f"b{i:05d}"} for i in range(5000)]
    options = {"compression": "none" if checksums else "gzip", "use_dictionary": False}
    whole = parquet(rows, write_page_checksum=checksums, **options)
    path = write(tmp_path / "x.parquet", whole)
    assert len(load_preferences(path)) == 5000
    damaged = bytearray(whole)
    place = len(whole) // 2
    damaged[place] = damaged[place] ^ 1  # another letter: without a checksum or compression nobody could tell
    write(path, bytes(damaged))
    for read in (load_preferences, audit_preferences, load_prompts):
        with pytest.raises(PreferenceDataError, match=r"x.parquet .*(is damaged|rows are lost)"):
            read(path)


def test_a_parquet_text_that_is_no_utf8_is_named(tmp_path):
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"prompt": ["a"], "chosen": bad, "rejected": ["c"]}), tmp_path / "x.parquet")
    for read in (load_preferences, audit_preferences, load_prompts):
        with pytest.raises(PreferenceDataError, match=r"x.parquet is damaged .*UTF8"):
            read(tmp_path / "x.parquet")


INVISIBLE = [
    "\0",
    "\u200b\u200d",
    "\ufeff",
    "\u00ad",
    "\x07\x1b",
    "\ufe0f",
    "\u3164",
    "\u2800\n",
    "\u2028",
    "\U000e0041",
]
VISIBLE = [".", "é", "\u0301", "\ufffd", "\U0001f642\ufe0f", "\u200bx", "\ue000", "\u06dd", "。"]


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_response_without_a_visible_character_is_empty(text, tmp_path):
    for rows in (text_rows(3), message_rows(3)):
        side = text if isinstance(rows[1]["chosen"], str) else [{"role": "assistant", "content": text}]
        rows[1]["chosen"] = side
        path = write(tmp_path / "x.jsonl", jsonl(rows))
        with pytest.raises(PreferenceDataError) as caught:
            load_preferences(path)
        assert [(f.kind, f.column, f.rows) for f in caught.value.issues] == [("empty", "chosen", [1])]
        assert audit_preferences(path).scans[0].issues[0].kind == "empty"
    prompts = write(tmp_path / "p.jsonl", jsonl([{"prompt": "a"}, {"prompt": text}]))
    with pytest.raises(ValueError, match=r"1 of 2 rows \(1 empty\)"):
        load_prompts(prompts)


def test_visible_text_is_not_empty():
    assert not any(map(is_blank_text, VISIBLE))
    assert all(map(is_blank_text, ["", *INVISIBLE]))


def test_keys_that_differ_from_row_to_row_are_no_columns(tmp_path):
    rows = [{**ROWS[0], "chosen": str(i), f"key{i}": 1} for i in range(MAX_COLUMNS)]
    with pytest.raises(PreferenceDataError, match="must have at most 1,000 columns, got 1,004"):
        load_preferences(write(tmp_path / "x.jsonl", jsonl(rows)))


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_read_as_data_files_are(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": f"é {i}"} for i in range(4)]
    whole = [row["answer"] for row in rows]
    texts = [json.dumps(rows), "\n".join(json.dumps(row, indent=1) for row in rows), jsonl(rows).decode()]
    for text in texts:
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
            path = write(tmp_path / "a.jsonl", text.encode(encoding))
            assert [answer.answer for answer in read_answers(path)] == whole
    assert read_answers(write(tmp_path / "none.jsonl", b"")) == []  # of a run that has just begun


def test_an_unfinished_last_answer_is_left_out_and_a_wrong_one_is_not(tmp_path, caplog):
    rows = jsonl([{"prompt": f"p{i}", "answer": "é \U0001f642"} for i in range(3)])
    start = rows.rindex(b"{")
    for end in range(start + 1, len(rows) - 1):
        assert len(read_answers(write(tmp_path / "a.jsonl", rows[:end]))) == 2, rows[start:end]
    assert "unfinished last line" in caplog.text
    for wrong in (
        b"{'prompt': 'a', 'answer': 'b'}",
        b'{"prompt": "a", "prompt": "b", "answer": "c"}',
        b"<html>",
        b"[1]",
    ):
        with pytest.raises(ValueError, match=r"Each row of .*a.jsonl must be a JSON object .*line 4"):
            read_answers(write(tmp_path / "a.jsonl", rows + wrong))


def test_half_a_surrogate_pair_that_a_server_sent_is_an_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"prompt": "a", "answer": "cut \\ud83d"}\n')
    assert read_answers(path)[0].answer == "cut \ud83d"


# --- time ------------------------------------------------------------------------------------------------------------


def seconds_of(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.mark.parametrize(
    "content",
    [
        b"\n" * 300_000 + b'[{"prompt": "a", "chosen": "b", "rejected": "c"}]',
        b" \r\n" * 300_000 + b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
        b'[{"prompt": "a", "chosen": "b", "rejected": "c"}' + b"\n" * 2_000_000 + b"]",
        b"{\n" * 100_000,
        b'{"a":' * 300_000,
        b'{"a": "\n' * 100_000,
        b'{"chosen": "' + b"\\n\\nHuman: a" * 50_000 + b'\\n\\nAssistant: x", "rejected": "'
        + b"\\n\\nHuman: a" * 50_000 + b'\\n\\nAssistant: y"}',
    ],
    ids=["blanks, list", "blanks, line", "blanks in a list", "open braces", "depth", "open strings", "one speaker"],
)  # fmt: skip
def test_no_file_takes_quadratic_time(content, tmp_path):
    path = write(tmp_path / "x.json", content)

    def read() -> None:
        with contextlib.suppress(PreferenceDataError):
            load_preferences(path)

    assert seconds_of(read) < 8  # at most about 1 s each on an idle core; the leading blanks took minutes


class CountedId(str):
    """A prompt's id that counts how often it is compared."""

    compared = 0

    def __eq__(self, other) -> bool:
        CountedId.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("sample", [0, 7])
def test_matching_samples_with_one_answer_of_the_baseline_takes_linear_time(sample):
    def of(prompt: str, number: int) -> Answer:
        answer = Answer(prompt=prompt, answer="x", sample=number)
        object.__setattr__(answer, "prompt_id", CountedId(prompt_id(prompt)))
        return answer

    counts = []
    for prompts in (100, 400):
        system = [of(f"p{i}", number) for i in range(prompts) for number in range(4)]
        baseline = [of(f"p{i}", sample) for i in range(prompts)]
        CountedId.compared = 0
        found = match(system, baseline)
        counts.append(CountedId.compared)
        assert [(p.system.prompt, p.baseline.prompt) for p in found.pairs] == [(a.prompt, a.prompt) for a in system]
        assert (found.system_only, found.baseline_only) == (0, 0)
    assert counts[1] < 6 * counts[0]  # 4 times as many prompts; each with each other would be 16 times


def test_a_damaged_folder_of_save_to_disk_is_named(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    whole = arrow.read_bytes()
    for content in (whole[: len(whole) // 2], b"", whole.replace("é".encode(), b"\xff\xff")):
        write(arrow, content)
        with pytest.raises(PreferenceDataError, match="saved is a damaged or incomplete folder of `save_to_disk`"):
            load_preferences(tmp_path / "saved")
    arrow.unlink()
    with pytest.raises(PreferenceDataError, match="saved is a damaged or incomplete folder of `save_to_disk`"):
        audit_preferences(tmp_path / "saved")


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
        began, caught = time.perf_counter(), None
        try:
            read()
        except (ValueError, FileNotFoundError) as error:  # PreferenceDataError is a ValueError
            caught = error
        assert time.perf_counter() - began < 20, name
        assert not isinstance(caught, UnicodeError | json.JSONDecodeError), repr(caught)  # ValueErrors of others
        # an audit of one file calls its columns those of `train`
        named = path.name in str(caught) or str(caught).startswith("Split `train` must have both")
        assert caught is None or named, f"{name}: {caught}"
        said.append("rows" if caught is None else "error")
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
