import gzip
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import trl
from datasets import Dataset, DatasetDict, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer

from sampo.data.issues import KINDS, PreferenceDataError
from sampo.data.load import load_preference_splits, load_preferences
from sampo.data.subsets import split_by_prompt
from sampo.data.validate import check_preferences

ROOT = Path(__file__).parents[2]
HH = ROOT.parent / "shared" / "data" / "hh_rlhf_harmless_test.jsonl.gz"
USER, SYSTEM = {"role": "user", "content": "a colour?"}, {"role": "system", "content": "Be brief."}
BLUE, RED = {"role": "assistant", "content": "Blue."}, {"role": "assistant", "content": "Red."}
MANY = settings(max_examples=60, deadline=None)  # each example writes and reads a file


def row(number=0, **changes):
    return {"prompt": f"Question {number}", "chosen": f"good {number}", "rejected": f"bad {number}"} | changes


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def loaded(rows, **options):
    """Rows as `load_preferences` reads them from a file."""
    with tempfile.TemporaryDirectory() as folder:
        return load_preferences(write_lines(Path(folder) / "rows.jsonl", rows), **options)


def issues_of(call, *args, **options):
    with pytest.raises(PreferenceDataError) as caught:
        call(*args, **options)
    return {(issue.kind, issue.column): issue.rows for issue in caught.value.issues}, str(caught.value)


# --- HH-RLHF ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hh_rows():
    if not HH.exists():
        pytest.skip(f"{HH.name} is not there")
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split_by_hand(text):
    """(all before the last Assistant turn, that turn), without a regular expression."""
    at = text.rindex("\n\nAssistant:")
    return text[:at], text[at + len("\n\nAssistant:") :].strip()


def test_every_pair_of_hh_rlhf_is_accounted_for(hh_rows, caplog):
    halves = [(split_by_hand(r["chosen"]), split_by_hand(r["rejected"])) for r in hh_rows]
    empty = [i for i, (chosen, rejected) in enumerate(halves) if not chosen[1] or not rejected[1]]
    unshared = [i for i, (chosen, rejected) in enumerate(halves) if chosen[0] != rejected[0]]
    assert (len(hh_rows), len(empty), len(unshared)) == (2312, 4, 2312 - 2307)
    issues, message = issues_of(load_preferences, HH)
    assert issues == {("empty", "chosen"): empty, ("prompt_not_shared", "prompt"): unshared}
    assert "4 of 2,312 pairs have an empty `chosen`, at rows [" in message

    with caplog.at_level(logging.INFO, "sampo.data"):
        pairs = load_preferences(HH, on_bad_rows="drop")
    assert "dropped 9 of 2,312 pairs, kept 2,303: 4 have an empty `chosen`; 5 have no shared" in caplog.text
    assert "joined in 4 pairs" in caplog.text
    good = [half for i, half in enumerate(halves) if i not in {*empty, *unshared}]
    assert len(pairs) == len(good)
    for pair, ((prompt, chosen), (_, rejected)) in zip(pairs, good, strict=True):
        assert pair["chosen"] == [{"role": "assistant", "content": chosen}]
        assert pair["rejected"] == [{"role": "assistant", "content": rejected}]
        roles = [message["role"] for message in pair["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        said = [turn.strip() for turn in re.split(r"\n\n(?:Human|Assistant):", prompt)[1:]]
        assert "\n\n".join(message["content"] for message in pair["prompt"]) == "\n\n".join(said)
    check_preferences(pairs)


turns = st.text(alphabet="abc :\nÄ?", min_size=1).map(str.strip).filter(lambda s: s and "\n\n" not in s)


@MANY
@given(st.lists(st.tuples(st.lists(turns, min_size=1, max_size=5), turns, turns), min_size=1, max_size=6))
def test_conversations_come_back_from_transcripts_as_they_were(conversations):
    def transcript(prompt, answer):
        speakers = ["Human" if (len(prompt) - i) % 2 else "Assistant" for i in range(len(prompt))]
        return "".join(f"\n\n{who}: {said}" for who, said in zip(speakers, prompt, strict=True)) + (
            f"\n\nAssistant: {answer}"
        )

    conversations = [(prompt, chosen, rejected) for prompt, chosen, rejected in conversations if chosen != rejected]
    if not conversations:
        return
    pairs = loaded([{"chosen": transcript(p, c), "rejected": transcript(p, r)} for p, c, r in conversations])
    for pair, (prompt, chosen, rejected) in zip(pairs, conversations, strict=True):
        roles = ["user" if (len(prompt) - i) % 2 else "assistant" for i in range(len(prompt))]
        assert [(m["role"], m["content"]) for m in pair["prompt"]] == list(zip(roles, prompt, strict=True))
        assert pair["chosen"] == [{"role": "assistant", "content": chosen}]
        assert pair["rejected"] == [{"role": "assistant", "content": rejected}]


def test_a_transcript_file_names_rows_that_are_none_and_rows_that_end_with_the_human():
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    rows = [good, good | {"chosen": "plain"}, good | {"rejected": "\n\nHuman: a"}, good, good]
    issues, _ = issues_of(loaded, rows)
    assert issues == {("not_a_transcript", "chosen"): [1], ("bad_roles", "rejected"): [2]}


# --- layouts ---------------------------------------------------------------------------------------------------------


@MANY
@given(st.lists(st.tuples(*[st.text(alphabet="ab ", max_size=8)] * 3), min_size=1, max_size=8))
def test_an_implicit_text_prompt_is_cut_where_trl_cuts_it(parts):
    rows = [
        {"chosen": "Q" + shared + chosen, "rejected": "Q" + shared + rejected} for shared, chosen, rejected in parts
    ]
    cut = [trl.extract_prompt(r) for r in rows]
    keep = [
        r["chosen"] != r["rejected"] and all(side.strip() for side in c.values())
        for r, c in zip(rows, cut, strict=True)
    ]
    expected = [c for c, good in zip(cut, keep, strict=True) if good]
    if not expected:
        issues_of(loaded, rows, on_bad_rows="drop")
        return
    assert loaded(rows, on_bad_rows="drop").to_list() == expected


def test_an_implicit_message_prompt_is_cut_where_trl_cuts_it():
    generator = random.Random(0)
    rows = []
    for number in range(50):
        prompt = [SYSTEM] * generator.randint(0, 1)
        for turn in range(generator.randint(0, 2)):
            prompt += [USER | {"content": f"u{number} {turn}"}, BLUE | {"content": f"a{turn}"}]
        prompt.append(USER)
        rows.append({"chosen": [*prompt, BLUE], "rejected": [*prompt, RED], "score": number})
    rows.append({"chosen": [USER, BLUE], "rejected": [USER, RED, USER, RED], "score": -1})
    pairs = loaded(rows)
    assert [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs] == [
        trl.extract_prompt(r) for r in rows
    ]
    assert pairs["score"][:] == [r["score"] for r in rows]


def test_shared_messages_are_found_though_arrow_filled_one_side_with_nulls():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    tool = {"role": "tool", "content": "sky"}
    pairs = loaded([{"chosen": [USER, call, tool, BLUE], "rejected": [USER, RED]}])
    data = Dataset.from_list([{"chosen": [USER, call, tool, BLUE], "rejected": [USER, RED]}])
    for result in (pairs, load_preferences(data)):
        assert [m["role"] for m in result[0]["prompt"]] == ["user"]
        assert [m["role"] for m in result[0]["chosen"]] == ["assistant", "tool", "assistant"]
        check_preferences(result)


def test_a_text_prompt_beside_messages_becomes_a_message():
    whole = {"prompt": "a colour?", "chosen": [USER, BLUE], "rejected": [USER, RED], "prompt_id": "x"}
    answers = whole | {"chosen": [BLUE], "rejected": [RED]}
    expected = {"prompt": [USER], "chosen": [BLUE], "rejected": [RED], "prompt_id": "x"}
    assert loaded([whole, answers]).to_list() == [expected, expected]
    # TRL itself fails on this layout, so data given to the trainer must not pass
    issues, message = issues_of(check_preferences, Dataset.from_list([whole]))
    assert issues == {("wrong_type", "prompt"): [0]}
    assert "`load_preferences` makes a message of" in message


# --- sources ---------------------------------------------------------------------------------------------------------

ROWS = [row(i, score=i / 2, tags=["x"] * (i % 3)) for i in range(5)]


def write_as(form, folder):
    """The five rows as one kind of source."""
    kind, _, packed = form.partition(".gz")
    path = folder / f"some.data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "jsonl":
        path.write_text("\ufeff" + "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n\n", encoding="utf-8")
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "save_to_disk":
        Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "save_to_disk of a dict":
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(path)
    elif kind == "parts":
        path.mkdir()
        write_lines(path / "train-1.jsonl", ROWS[:2])
        (path / "train-2.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[2:]).encode()))
        write_lines(path / "test.jsonl", ROWS[:1])
        (path / "README.md").write_text("not data")
    if packed or form.endswith(".gz"):
        packed_path = path.with_name(path.name + ".gz")
        packed_path.write_bytes(gzip.compress(path.read_bytes()))
        return packed_path
    return path


FORMS = [
    "json",
    "jsonl",
    "parquet",
    "json.gz",
    "jsonl.gz",
    "parquet.gz",
    "save_to_disk",
    "save_to_disk of a dict",
    "parts",
]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_come_out_of_every_kind_of_source(form, tmp_path):
    path = write_as(form, tmp_path)
    assert load_preferences(path).to_list() == ROWS
    assert load_preferences(str(path), split="train[1:3]").to_list() == ROWS[1:3]
    assert load_preferences(path, length_split="equal").to_list() == ROWS


def test_the_files_of_a_folder_are_sorted_into_splits_by_their_names(tmp_path):
    names = {
        "train.jsonl": "train",
        "dev_set.jsonl": "validation",
        "deep/test/part1.jsonl": "test",
        "deep/contest.jsonl": "train",
        "data/prefs-00000-of-00002.jsonl": "prefs",
        "data/prefs-00001-of-00002.jsonl": "prefs",
        "eval2.jsonl": "test",
    }
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / name, [row(number)])
    for split in set(names.values()):
        expected = {f"Question {number}" for number, name in enumerate(names) if names[name] == split}
        assert set(load_preferences(tmp_path, split=split)["prompt"]) == expected
    assert set(load_preferences(tmp_path, name="deep", split="train")["prompt"]) == {"Question 3"}
    with pytest.raises(
        ValueError, match=r"`split` must be one of \['prefs', 'test', 'train', 'validation'\].*'prefs'"
    ):
        load_preferences(tmp_path, split="pref")
    with pytest.raises(ValueError, match="`name` must be a sub-folder"):
        load_preferences(tmp_path, name="shallow")


def test_a_relative_folder_that_looks_like_a_hub_id_is_read_from_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "pairs").mkdir(parents=True)
    write_lines(tmp_path / "owner" / "pairs" / "x.jsonl", ROWS)
    assert len(load_preferences("owner/pairs")) == 5


def test_a_hub_id_goes_through_the_datasets_library(tmp_path):
    # `datasets` finds what it fetched before in its cache, without a hub; the cache is made here, from a local file.
    load_dataset("json", data_files=str(write_lines(tmp_path / "x.jsonl", ROWS)), cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made" / "json").glob("default-*")
    shutil.copytree(made, tmp_path / "cache" / "owner___pairs" / "default")
    for arrow in (tmp_path / "cache").rglob("*.arrow"):
        arrow.rename(arrow.with_name("pairs-train.arrow"))
    code = "from sampo.data.load import load_preferences as l; print(l('owner/pairs', name='default').num_rows)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "5"


@pytest.mark.parametrize("source", ["nothing.jsonl", "./owner/name", "a/b/c", "~/no_such_folder", "data/x.parquet.gz"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match="looks like a path and does not exist"):
        load_preferences(source)


def test_a_hub_id_that_cannot_be_reached_says_what_was_tried():
    with pytest.raises(ConnectionError, match=r"no such path in .*, and the hub gave: .*Check the spelling"):
        load_preferences("owner/no-such-pairs")


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        load_preferences(tmp_path / "pairs.csv")
    with pytest.raises(FileNotFoundError, match="must hold files that end in"):
        load_preferences(tmp_path)
    with pytest.raises(TypeError, match="cannot be checked"):
        load_preferences(Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"`on_bad_rows` must be one of .*Did you mean 'drop'"):
        load_preferences(tmp_path, on_bad_rows="drops")


# --- broken files ----------------------------------------------------------------------------------------------------


def test_broken_lines_are_named_with_file_and_line_and_can_be_dropped(tmp_path, caplog):
    lines = [json.dumps(row(i)).encode() for i in range(8)]
    lines[1] = lines[1].replace(b"good", b"g\xfcd")
    lines[2] = b""
    lines[3] = b"[1, 2]"
    lines[4] = b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}'
    lines[5] = lines[5].replace(b":", b"", 1)
    lines[7] = lines[7][:-9]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines))
    issues, message = issues_of(load_preferences, path)  # rows leave the blank line out, line numbers do not
    assert issues == {("bad_utf8", ""): [1, 3], ("not_an_object", ""): [2], ("broken_line", ""): [4, 6]}
    for place in (
        "line 2 (byte",
        "line 4 (list)",
        "line 5 (half",
        "line 6 (Expecting",
        "line 8 (the file ends inside",
    ):
        assert f"pairs.jsonl, {place}" in message
    assert load_preferences(path, on_bad_rows="drop")["prompt"][:] == ["Question 0", "Question 6"]
    assert (
        "dropped 5 of 7 pairs, kept 2: 2 are not valid UTF-8; 1 is valid JSON but not an object; 2 are not complete "
        "JSON" in caplog.text
    )


@pytest.mark.parametrize("on_bad_rows", ["error", "drop"])
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n \n", "is empty"),
        ("x.json", b"[]", "has no rows"),
        ("x.json", b'[{"prompt": "a"}, {', r"not a complete JSON list \(.* at line 1, column"),
        ("x.json", b'[\n{"prompt": "\xff"}]', "not valid UTF-8 at line 2"),
        ("x.jsonl.gz", gzip.compress(json.dumps(row()).encode() * 99, mtime=0)[:-9], "cut-off gzip"),
        ("x.jsonl.gz", b"\x1f\x8b not gzip at all", "damaged"),
        ("x.jsonl.gz", json.dumps(row()).encode(), "damaged"),
        ("x.parquet", b"PAR1 and then nothing", "not a complete Parquet"),
        ("x.parquet.gz", gzip.compress(b"PAR1 and then nothing", mtime=0), "not a complete Parquet"),
    ],
)
def test_files_that_lost_rows_are_an_error_whatever_is_done_with_bad_rows(
    name, content, complaint, on_bad_rows, tmp_path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreferenceDataError, match=f"{name} .*{complaint}") as caught:
        load_preferences(tmp_path / name, on_bad_rows=on_bad_rows)
    assert [issue.kind for issue in caught.value.issues] == ["unreadable_file"]


# --- issues ----------------------------------------------------------------------------------------------------------


def test_all_faults_are_listed_at_once_with_their_rows():
    rows = [row(i) for i in range(30)]
    rows[2]["prompt"] = None
    del rows[3]["chosen"]
    rows[4]["rejected"] = float("nan")
    rows[5]["chosen"] = 7
    rows[6]["prompt"] = [USER]
    for i in range(7, 19):
        rows[i]["rejected"] = " \n" if i % 2 else ""
    rows[18]["prompt"] = ""
    rows[19]["rejected"] = rows[19]["chosen"]
    issues, message = issues_of(loaded, rows)
    assert issues == {
        ("null", "prompt"): [2],
        ("null", "chosen"): [3],
        ("nan", "rejected"): [4],
        ("wrong_type", "chosen"): [5],
        ("wrong_type", "prompt"): [6],
        ("empty", "rejected"): list(range(7, 17)),
        ("empty", "prompt"): [18],
        ("identical", "rejected"): [19],
    }
    assert (
        "12 of 30 pairs have an empty `rejected`, first at rows [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, …]." in message
    )
    assert "on_bad_rows='drop'" in message


def naive_kind(r):
    """First issue of a text row, column by column, written anew."""
    kinds = []
    for column in ("prompt", "chosen", "rejected"):
        value = r.get(column)
        if value is None:
            kinds.append("null")
        elif isinstance(value, float) and str(value) == "nan":
            kinds.append("nan")
        elif type(value) is not str:
            kinds.append("wrong_type")
        elif value.strip() == "":
            kinds.append("empty")
    if not kinds and r["chosen"] == r["rejected"]:
        kinds.append("identical")
    return kinds[0] if kinds else None


cells = st.sampled_from(["a", "b", "c", " a", "", "  ", None, float("nan"), 3, 2.5, [], {"x": 1}, True])
mostly_text = st.one_of(st.sampled_from(["a", "b", "c"]), st.sampled_from(["a", "b"]), cells)


@MANY
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), mostly_text)), min_size=1))
def test_kept_and_dropped_rows_add_up_as_a_naive_loop_has_them(rows):
    rows = [row(), row(1), row(2), *({**r, "number": i} for i, r in enumerate(rows))]
    kinds = [naive_kind(r) for r in rows]
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("sampo.data").addHandler(handler)
    try:
        pairs = loaded(rows, on_bad_rows="drop")
    finally:
        logging.getLogger("sampo.data").removeHandler(handler)
    good = [r for r, kind in zip(rows, kinds, strict=True) if kind is None]
    assert [(p["prompt"], p["chosen"], p["rejected"], p.get("number")) for p in pairs] == [
        (r["prompt"], r["chosen"], r["rejected"], r.get("number")) for r in good
    ]
    told = "".join(message for message in records if "dropped" in message)
    for kind in ("null", "nan", "wrong_type", "empty", "identical"):
        words = {
            "null": "no value",
            "nan": "NaN",
            "wrong_type": "wrong type",
            "empty": "an empty",
            "identical": "same",
        }
        counts = re.findall(rf"(?:: |; )(\d+) (?:has|have) [^;]*{words[kind]}", told)
        assert sum(map(int, counts)) == kinds.count(kind)


BAD_CONVERSATIONS = {
    "the user speaks twice": ([USER, USER], [BLUE], [RED], ("bad_roles", "prompt")),
    "the prompt ends with an answer": ([USER, BLUE], [BLUE], [RED, USER, BLUE], ("bad_roles", "chosen")),
    "the completion ends with the user": ([USER], [BLUE, USER], [RED], ("bad_roles", "chosen")),
    "the completion repeats the prompt": ([USER], [BLUE], [USER, RED], ("repeated_prompt", "rejected")),
    "a system message in a completion": ([USER], [SYSTEM, BLUE], [RED], ("prompt_role", "chosen")),
    "an image": ([USER], [BLUE], [RED | {"content": [{"type": "image"}]}], ("not_text", "rejected")),
    "an empty list": ([USER], [], [RED], ("empty", "chosen")),
    "an empty prompt": ([], [BLUE], [RED], ("empty", "prompt")),
    "a blank answer": ([USER], [BLUE], [RED | {"content": " \n"}], ("empty", "rejected")),
    "a blank answer in blocks": (
        [USER],
        [BLUE | {"content": [{"type": "text", "text": ""}]}],
        [RED],
        ("empty", "chosen"),
    ),
    "no content": ([USER], [BLUE], [{"role": "assistant"}], ("empty", "rejected")),
    "other keys": ([USER], [{"speaker": "gpt", "text": "Blue."}], [RED], ("wrong_type", "chosen")),
    "text among messages": ([USER], ["Blue."], [RED], ("wrong_type", "chosen")),
    "a string": ([USER], "Blue.", [RED], ("wrong_type", "chosen")),
    "the same": ([USER], [BLUE], [BLUE], ("identical", "rejected")),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_a_bad_conversation_is_found_among_good_ones(name):
    prompt, chosen, rejected, issue = BAD_CONVERSATIONS[name]
    good = {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [RED]}
    rows = [good, good, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, good]
    issues, _ = issues_of(loaded, rows)
    if name == "the prompt ends with an answer":
        assert issues.pop(("bad_roles", "rejected")) == [2]
    assert issues == {issue: [2]}
    assert len(loaded(rows, on_bad_rows="drop")) == 3


def test_one_text_that_looks_like_a_transcript_makes_no_transcripts_of_the_others():
    rows = [{"chosen": f"Q{i}: a", "rejected": f"Q{i}: b"} for i in range(3)]
    rows.append({"chosen": "Human: a colour? Blue.", "rejected": "Human: a colour? Red."})
    assert loaded(rows).to_list() == [trl.extract_prompt(r) for r in rows]


def test_sides_that_share_no_beginning_have_no_prompt():
    rows = [
        {"chosen": "Q: a", "rejected": "Q: b"},
        {"chosen": "xa", "rejected": "yb"},
        {"chosen": " a", "rejected": " b"},
    ]
    issues, _ = issues_of(loaded, rows)
    assert issues == {("prompt_not_shared", "prompt"): [1, 2]}
    assert issues_of(check_preferences, Dataset.from_list(rows))[0] == issues
    rows = [
        {"chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"chosen": [USER, BLUE], "rejected": [SYSTEM, USER, RED]},
    ]
    assert issues_of(loaded, rows)[0] == {("prompt_not_shared", "prompt"): [1]}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *(("prompt", name) for name in ("promt", "Prompt", "question")),
        *(("chosen", name) for name in ("Chosen", "preferred")),
        *(("rejected", name) for name in ("rejcted", "reject")),
    ],
)
def test_a_misnamed_column_is_recognised_and_can_be_renamed(ours, theirs, tmp_path):
    rows = [{theirs if key == ours else key: value for key, value in row(i).items()} for i in range(3)]
    for issues, message in (issues_of(loaded, rows), issues_of(check_preferences, Dataset.from_list(rows))):
        assert next(iter(issues)) == ("missing_column", ours)
        assert (
            f"Did you mean `{theirs}`? Set `columns` {ours}={theirs} (in Python `columns={{'{ours}': '{theirs}'}}`)"
            in message
        )
    for source in (Dataset.from_list(rows), write_lines(tmp_path / "rows.jsonl", rows)):
        pairs = load_preferences(source, columns={ours: theirs})
        assert sorted(pairs.column_names) == ["chosen", "prompt", "rejected"]
        assert [{key: pair[key] for key in row()} for pair in pairs] == [row(i) for i in range(3)]


def test_a_column_that_may_be_the_prompt_is_no_error_where_the_sides_share_their_beginning(caplog):
    rows = [{"chosen": "Q: a", "rejected": "Q: b", "question": "Q"} for _ in range(20)]
    rows[3] = rows[3] | {"chosen": "x"}
    assert len(loaded(rows, on_bad_rows="drop")) == 19
    assert "no column `prompt`, so the beginning that `chosen` and `rejected` share is taken" in caplog.text
    assert issues_of(loaded, rows)[0] == {("prompt_not_shared", "prompt"): [3]}
    rows[:3] = [r | {"chosen": "x"} for r in rows[:3]]
    assert issues_of(loaded, rows, on_bad_rows="drop")[0] == {
        ("missing_column", "prompt"): [],
        ("prompt_not_shared", "prompt"): [0, 1, 2, 3],
    }


def test_missing_columns_are_an_error_also_when_bad_rows_are_dropped():
    rows = [{"prompt": "a", "text": "b"}]
    issues, message = issues_of(loaded, rows, on_bad_rows="drop")
    assert list(issues) == [("missing_column", "chosen"), ("missing_column", "rejected")]
    assert "The columns are ['prompt', 'text']" in message
    assert issues_of(check_preferences, Dataset.from_list(rows))[0] == issues
    # the columns that are there are looked at nevertheless
    issues, _ = issues_of(loaded, [{"prompt": "a", "chosen": "b"}, {"prompt": "", "chosen": None}])
    assert issues == {("missing_column", "rejected"): [], ("empty", "prompt"): [1], ("null", "chosen"): [1]}


@pytest.mark.parametrize(
    "columns", [{"prompt": "nothing"}, {"answer": "score"}, {"chosen": "score", "prompt": "score"}]
)
def test_a_renaming_that_makes_no_sense_is_refused(columns):
    with pytest.raises(ValueError, match="`columns` must map names among"):
        loaded(ROWS, columns=columns)


def test_nothing_left_after_dropping_is_an_error():
    issues, _ = issues_of(loaded, [row(chosen="")], on_bad_rows="drop")
    assert issues == {("empty", "chosen"): [0]}
    with pytest.raises(PreferenceDataError, match="no rows"):
        load_preferences(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))
    with pytest.raises(PreferenceDataError, match="at least one pair, got none"):
        check_preferences(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))


def test_extra_columns_of_mixed_types_are_kept_and_tool_arguments_are_not_filled_with_nulls():
    calls = [{"function": {"name": "f", "arguments": {key: 1}}} for key in "ab"]
    rows = [
        {"prompt": [USER], "chosen": [BLUE | {"tool_calls": [call]}], "rejected": [RED], "score": score}
        for call, score in zip(calls, (1, "high"), strict=True)
    ]
    pairs = loaded(rows)
    assert [p["chosen"][0]["tool_calls"][0]["function"]["arguments"] for p in pairs] == [{"a": 1}, {"b": 1}]
    assert [p["score"] for p in pairs] == [1, "high"]
    implicit = [r | {"chosen": [USER, *r["chosen"]], "rejected": [USER, *r["rejected"]]} for r in rows]
    pairs = loaded([{key: value for key, value in r.items() if key != "prompt"} for r in implicit])
    assert [p["chosen"][0]["tool_calls"][0]["function"]["arguments"] for p in pairs] == [{"a": 1}, {"b": 1}]


def test_repeated_and_contradicting_pairs_are_counted_and_kept(caplog):
    rows = [row(0), row(1), row(0), row(0), {"prompt": "Question 1", "chosen": "bad 1", "rejected": "good 1"}]
    assert len(loaded(rows)) == 5
    assert "2 of 5 pairs repeat an earlier pair, and 2 contradict another one" in caplog.text
    caplog.clear()
    loaded(rows[:2])
    assert not caplog.records


# --- check_preferences -----------------------------------------------------------------------------------------------

WEATHER = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}
PAIR = {"prompt": [USER], "chosen": [BLUE], "rejected": [RED]}
ACCEPTED_BY_TRL = {
    "text": row(),
    "implicit text": {"chosen": "Q: a", "rejected": "Q: b"},
    "messages": PAIR,
    "implicit messages": {"chosen": [USER, BLUE], "rejected": [USER, RED]},
    "a system message": PAIR | {"prompt": [SYSTEM, USER]},
    "a blank system message": PAIR | {"prompt": [SYSTEM | {"content": ""}, USER]},
    "several turns": PAIR | {"prompt": [USER, BLUE, USER], "chosen": [BLUE, USER, BLUE]},
    "tools": PAIR | {"chosen": [CALL | {"content": ""}, {"role": "tool", "content": "sky"}, BLUE], "tools": WEATHER},
    "a tool call without content": PAIR | {"chosen": [CALL]},
    "an answer right after a tool call": PAIR | {"chosen": [CALL, BLUE]},
    "a chain of thought alone": PAIR | {"rejected": [RED | {"content": "", "reasoning_content": "Sky."}]},
    "content in blocks": PAIR | {"chosen": [BLUE | {"content": [{"type": "text", "text": "Blue."}]}]},
    "template options": PAIR | {"chat_template_kwargs": {"enable_thinking": False}},
    "other columns": row(prompt_id="x", question="y", messages=[USER, BLUE], label=True),
    "implicit text beside other columns": {"chosen": "Q: a", "rejected": "Q: b", "prompt_id": "1", "question": "Q"},
}


@pytest.mark.parametrize("name", ACCEPTED_BY_TRL)
def test_what_trl_takes_passes_the_check_unchanged(name):
    data = Dataset.from_list([ACCEPTED_BY_TRL[name]])
    check_preferences(data)
    check_preferences(data.with_format("torch"))
    check_preferences(data.to_iterable_dataset())
    assert len(load_preferences(data)) == 1
    # the oracle: TRL's own preparation goes through, with tokens on both sides
    trainer, tokenizer = trl.DPOTrainer.__new__(trl.DPOTrainer), make_tokenizer()
    trainer._tokenizer = tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] or m['tool_calls'] or '-'")
    arguments = trl.DPOConfig(output_dir="unused", report_to=[], bf16=False)
    prepared = trainer._prepare_dataset(data, tokenizer, arguments, "train")
    assert prepared[0]["chosen_ids"]
    assert prepared[0]["rejected_ids"]
    check_preferences(prepared)


def test_data_that_is_tokenised_already_is_left_alone():
    ids = {"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[]]}
    check_preferences(Dataset.from_dict(ids))
    check_preferences(Dataset.from_dict(ids | {"chosen": [""], "rejected": [""]}))


def test_of_streams_and_images_only_the_columns_are_looked_at():
    empty = [row(chosen="")]
    check_preferences(Dataset.from_list(empty).to_iterable_dataset())
    check_preferences(Dataset.from_list([empty[0] | {"images": [1]}]))
    transformed = Dataset.from_list(empty)
    transformed.set_transform(lambda batch: batch)
    check_preferences(transformed)
    for data in (
        Dataset.from_list([{"prompt": "a", "choosen": "b", "rejected": "c"}]).to_iterable_dataset(),
        Dataset.from_list([{"prompt": "a", "choosen": "b", "rejected": "c", "image": 1}]),
    ):
        issues, message = issues_of(check_preferences, data)
        assert issues == {("missing_column", "chosen"): []}
        assert "`choosen`" in message


def test_the_number_of_rows_named_can_be_chosen():
    data = Dataset.from_list([row(i, chosen="") for i in range(20)])
    assert issues_of(check_preferences, data, max_rows_named=3)[0] == {("empty", "chosen"): [0, 1, 2]}
    with pytest.raises(PreferenceDataError) as caught:
        check_preferences(data, max_rows_named=3)
    assert [issue.count for issue in caught.value.issues] == [20]


@pytest.mark.parametrize("messages", [False, True])
def test_a_hundred_thousand_pairs_are_checked_within_seconds(messages):
    rows = [row(i) for i in range(100_000)]
    if messages:
        rows = [
            {"prompt": [USER], "chosen": [BLUE | {"content": r["chosen"]}], "rejected": [RED]} for r in rows
        ]  # fmt: skip
    data = Dataset.from_list(rows)
    start = time.perf_counter()
    check_preferences(data)
    seconds = time.perf_counter() - start
    assert seconds < 15  # 0.5 s (text) and 2 s (messages) on one idle core; the rest is for busy machines


# --- splits ----------------------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=6).map(" ".join)


@MANY
@given(st.lists(st.tuples(words, words), min_size=1, max_size=20), st.integers(0, 3))
def test_length_splits_keep_what_a_naive_loop_keeps(sides, seed):
    rows = [row(i, chosen="c " + c, rejected="r " + r) for i, (c, r) in enumerate(sides)]
    gaps = [len(c.split()) - len(r.split()) for c, r in sides]
    expected = {
        "long": [r for r, gap in zip(rows, gaps, strict=True) if gap > 0],
        "short": [r for r, gap in zip(rows, gaps, strict=True) if gap < 0],
        "equal": [r for r, gap in zip(rows, gaps, strict=True) if gap == 0],
    }
    for which, kept in expected.items():
        if kept:
            assert loaded(rows, length_split=which).to_list() == kept
        else:
            with pytest.raises(ValueError, match=f"`length_split: {which}` must keep at least one pair"):
                loaded(rows, length_split=which)
    each = min(len(expected["long"]), len(expected["short"]))
    if not each:
        return
    balanced = loaded(rows, length_split="balanced", seed=seed).to_list()
    assert balanced == loaded(rows, length_split="balanced", seed=seed).to_list()
    assert sum(r in expected["long"] for r in balanced) == sum(r in expected["short"] for r in balanced) == each
    assert balanced == [r for r in rows if r in balanced]


def test_the_seed_chooses_the_pairs_of_a_balanced_split():
    rows = [row(i, chosen="a b" if i % 4 else "a", rejected="c" if i % 4 else "c d") for i in range(40)]
    draws = {tuple(loaded(rows, length_split="balanced", seed=seed)["prompt"]) for seed in range(5)}
    assert len(draws) == 5


def test_lengths_are_counted_in_tokens_when_a_tokenizer_is_given(caplog):
    class Characters:
        def __call__(self, texts, add_special_tokens):
            assert add_special_tokens is False
            return {"input_ids": [list(text) for text in texts]}

    rows = [row(0, chosen="a b c", rejected="loooong")]  # longer in words, shorter in characters
    with caplog.at_level(logging.INFO, "sampo.data"):
        assert len(loaded(rows, length_split="long")) == 1
        assert len(loaded(rows, length_split="short", tokenizer=Characters())) == 1
    assert "lengths in whitespace words; 1 long" in caplog.text
    assert "lengths in tokens; 0 long, 1 short" in caplog.text
    chat = [
        {"prompt": [USER], "chosen": [BLUE | {"content": [{"type": "text", "text": "w1 w2 w3"}]}], "rejected": [RED]}
    ]
    assert len(loaded(chat, length_split="long", tokenizer=make_tokenizer())) == 1


prompts = st.lists(st.sampled_from([f"prompt {i}" for i in range(12)]), min_size=1, max_size=30)


@MANY
@given(prompts, st.floats(0, 0.95), st.integers(0, 5), st.randoms(use_true_random=False), st.booleans())
def test_a_prompt_is_on_one_side_whatever_the_order_and_the_other_rows(texts, fraction, seed, generator, messages):
    rows = [row(i, prompt=[USER | {"content": t}] if messages else t) for i, t in enumerate(texts)]
    train, evaluation = (part.to_list() for part in split_by_prompt(Dataset.from_list(rows), fraction, seed))
    assert sorted(train + evaluation, key=lambda r: r["chosen"]) == sorted(rows, key=lambda r: r["chosen"])
    assert not {str(r["prompt"]) for r in train} & {str(r["prompt"]) for r in evaluation}
    shuffled = generator.sample(rows, len(rows))[: generator.randint(1, len(rows))]
    again = split_by_prompt(Dataset.from_list(shuffled), fraction, seed)[1].to_list()
    assert sorted(map(str, again)) == sorted(str(r) for r in shuffled if r in evaluation)


def test_about_the_wanted_share_of_prompts_is_split_off_and_the_seed_matters():
    data = Dataset.from_list([row(i) for i in range(4000)])
    chosen = [set(split_by_prompt(data, 0.1, seed)[1]["prompt"]) for seed in (1, 2)]
    for prompts_kept in chosen:
        assert abs(len(prompts_kept) - 400) < 95  # 5 standard deviations of a binomial
    assert len(chosen[0] & chosen[1]) < 100  # independent draws share about 40
    assert len(split_by_prompt(data, 0.0)[1]) == 0
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1"):
        split_by_prompt(data, 1)
    with pytest.raises(ValueError, match="needs a `prompt` column"):
        split_by_prompt(data.remove_columns("prompt"), 0.1)


def test_the_hash_of_a_message_prompt_ignores_the_nulls_that_arrow_adds():
    plain = [{"prompt": [USER | {"content": str(i)}]} for i in range(50)]
    filled = [{"prompt": [USER | {"content": str(i), "name": None}]} for i in range(50)]
    sides = [
        [p[0]["content"] for p in split_by_prompt(Dataset.from_list(rows), 0.5)[0]["prompt"]]
        for rows in (plain, filled)
    ]
    assert sides[0] == sides[1]


def test_a_run_evaluates_on_the_test_split_or_on_a_part_split_off_by_prompt(tmp_path, caplog):
    both = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list([row(9)])})
    splits = load_preference_splits(both, eval_fraction=0.5, length_split="equal")
    assert {split: len(data) for split, data in splits.items()} == {"train": 5, "test": 1}
    assert set(load_preference_splits(both, test_split=None)) == {"train"}

    path = write_lines(tmp_path / "pairs.jsonl", [row(i, chosen="a b" if i % 2 else "a") for i in range(40)])
    assert set(load_preference_splits(path)) == {"train"}
    splits = load_preference_splits(path, eval_fraction=0.25, seed=7)
    expected = split_by_prompt(load_preferences(path), 0.25, 7)
    assert [splits["train"].to_list(), splits["test"].to_list()] == [part.to_list() for part in expected]
    short = load_preference_splits(path, eval_fraction=0.25, seed=7, length_split="short")
    assert short["test"].to_list() == splits["test"].to_list()
    assert short["train"].to_list() == [r for r in splits["train"].to_list() if r["chosen"] == "a"]

    with pytest.raises(ValueError, match=r"`split` must be one of \['test', 'train'\].*Did you mean 'train'"):
        load_preference_splits(both, train_split="trains")
    with pytest.raises(ValueError, match=r"`split` must be one of .*got 'held_out'"):
        load_preference_splits(both, test_split="held_out")
    with pytest.raises(ValueError, match="`eval_fraction` must leave pairs in both parts"):
        load_preference_splits(Dataset.from_list([row()]), eval_fraction=0.5)


def test_a_folder_that_has_only_a_test_split_is_not_trained_on(tmp_path):
    write_lines(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"must be one of \['test'\].*got 'train'"):
        load_preference_splits(tmp_path)
    assert len(load_preferences(tmp_path)) == 5


# --- documents and imports -------------------------------------------------------------------------------------------


def test_the_code_of_the_document_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    exec("\n".join(blocks), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", text)


def test_the_document_names_every_kind_of_fault():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", text.split("## Issues and fixes")[1].split("## Length")[0], re.MULTILINE)
    assert sorted(documented) == sorted(["kind", *KINDS, "missing_column", "unreadable_file"])


def test_importing_the_module_loads_no_heavy_library():
    code = (
        "import sys, sampo.data.load; heavy = {'torch', 'transformers', 'datasets', 'trl', 'pyarrow', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
