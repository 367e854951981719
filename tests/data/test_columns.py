"""Columns and spellings of other collections: the same pairs from loading, training, audit and generation."""

import json
import random

import pytest
from datasets import Dataset, IterableDataset
from tiny import WORDS, save_model

from sampo import audit_preferences, load_preferences
from sampo.commands import train
from sampo.commands.options import make_parser
from sampo.data.columns import pairs_of_stream, read_columns
from sampo.data.issues import PreferenceDataError
from sampo.data.validate import check_preferences
from sampo.evaluation.answers.prompts import load_prompts

USER, BLUE, RED = "Name a colour.", "Blue.", "Red, perhaps, or green."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def shared(speaker, text):
    return {"from": speaker, "value": text}


# name: (row, `columns`, prompt, chosen)
CASES = {
    "a system column beside text": (
        {"system": "Be brief.", "prompt": USER, "chosen": BLUE, "rejected": RED},
        {},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "Orca": (
        {"system": "Be brief.", "question": USER, "chosen": BLUE, "rejected": RED},
        {"prompt": "question"},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "another name of it": (
        {"system_prompt": "Be brief.", "prompt": USER, "chosen": BLUE, "rejected": RED},
        {},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "a name of the user's own": (
        {"persona": "Be brief.", "prompt": USER, "chosen": BLUE, "rejected": RED},
        {"system": "persona"},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "a system column beside messages": (
        {"system": "Be brief.", "prompt": [user(USER)], "chosen": [assistant(BLUE)], "rejected": [assistant(RED)]},
        {},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "the same system message twice": (
        {
            "system": "Be brief.",
            "prompt": [system("Be brief."), user(USER)],
            "chosen": [assistant(BLUE)],
            "rejected": [assistant(RED)],
        },
        {},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "a system column beside whole conversations": (
        {"system": "Be brief.", "chosen": [user(USER), assistant(BLUE)], "rejected": [user(USER), assistant(RED)]},
        {},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "UltraFeedback with a system message": (
        {
            "prompt": USER,
            "chosen": [system("Be brief."), user(USER), assistant(BLUE)],
            "rejected": [system("Be brief."), user(USER), assistant(RED)],
        },
        {},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "a system column left out": (
        {"system": "Be brief.", "prompt": USER, "chosen": BLUE, "rejected": RED},
        {"system": ""},
        USER,
        BLUE,
    ),
    "an empty system column": ({"system": " ", "prompt": USER, "chosen": BLUE, "rejected": RED}, {}, USER, BLUE),
    "Alpaca": (
        {"instruction": "Translate.", "input": "Hund", "chosen": "dog", "rejected": "cat"},
        {"prompt": "instruction"},
        "Translate.\nHund",
        "dog",
    ),
    "Dolly's context": (
        {"instruction": "Sum up.", "context": "A text.", "chosen": "dog", "rejected": "cat"},
        {"prompt": "instruction"},
        "Sum up.\nA text.",
        "dog",
    ),
    "an input that is asked for": (
        {"prompt": "Translate.", "input": "Hund", "chosen": "dog", "rejected": "cat"},
        {"input": "input"},
        "Translate.\nHund",
        "dog",
    ),
    "an input that is left out": (
        {"prompt": "Translate.", "input": "Hund", "chosen": "dog", "rejected": "cat"},
        {"input": ""},
        "Translate.",
        "dog",
    ),
    "ShareGPT": (
        {
            "conversations": [shared("system", "Be brief."), shared("human", USER)],
            "chosen": shared("gpt", BLUE),
            "rejected": shared("gpt", RED),
        },
        {},
        [system("Be brief."), user(USER)],
        [assistant(BLUE)],
    ),
    "ShareGPT in lists": (
        {"prompt": [shared("user", USER)], "chosen": [shared("assistant", BLUE)], "rejected": [shared("gpt", RED)]},
        {},
        [user(USER)],
        [assistant(BLUE)],
    ),
    "ShareGPT, whole conversations": (
        {
            "chosen": [shared("human", USER), shared("gpt", BLUE)],
            "rejected": [shared("human", USER), shared("gpt", RED)],
        },
        {},
        [user(USER)],
        [assistant(BLUE)],
    ),
    "ShareGPT with responses of text": (
        {"conversations": [shared("human", USER)], "chosen": BLUE, "rejected": RED},
        {},
        [user(USER)],
        [assistant(BLUE)],
    ),
    "one message a side": (
        {"conversations": [user(USER)], "chosen": assistant(BLUE), "rejected": assistant(RED)},
        {},
        [user(USER)],
        [assistant(BLUE)],
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(messages):
    """Without the nulls that Arrow fills in."""
    if isinstance(messages, str):
        return messages
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_a_row_becomes_the_pair_that_was_meant(tmp_path, name, kind):
    row, columns, prompt, chosen = CASES[name]
    source = write(tmp_path / "pairs.jsonl", [row])
    if kind != "jsonl":
        source = Dataset.from_list([row])
    if kind == "parquet":
        source.to_parquet(tmp_path / "pairs.parquet")
        source = tmp_path / "pairs.parquet"
    (pair,) = load_preferences(source, columns=columns)
    assert plain(pair["prompt"]) == prompt
    assert plain(pair["chosen"]) == chosen


@pytest.mark.parametrize("name", CASES)
def test_audit_generation_and_streams_have_the_same_pair(tmp_path, name):
    row, columns, prompt, chosen = CASES[name]
    path = write(tmp_path / "pairs.jsonl", [row])
    audit = audit_preferences(path, columns=columns)
    # the same pair, loaded and written in our own spelling, has the same hashes
    loaded = load_preferences(path, columns=columns)
    ours = write(
        tmp_path / "ours.jsonl",
        [{side: plain(pair[side]) for side in ("prompt", "chosen", "rejected")} for pair in loaded],
    )
    assert audit.fingerprint == audit_preferences(ours).fingerprint
    (question,) = load_prompts(path, columns=columns)
    assert plain(question.prompt) == prompt
    stream = pairs_of_stream(IterableDataset.from_generator(lambda: iter([row])), columns)
    (streamed,) = stream
    if "prompt" in streamed and not (isinstance(prompt, list) and isinstance(streamed["prompt"], str)):
        assert plain(streamed["prompt"]) == prompt
        assert plain(streamed["chosen"]) == chosen


def test_prompts_that_differ_in_the_system_message_or_the_input_alone_are_two(tmp_path):
    rows = [{"instruction": "Translate.", "input": word, "output": ""} for word in ("Hund", "Katze")]
    assert [q.prompt for q in load_prompts(write(tmp_path / "a.jsonl", rows))] == [
        "Translate.\nHund",
        "Translate.\nKatze",
    ]
    rows = [{"system": text, "prompt": USER} for text in ("Be brief.", "Be kind.", "")]
    found = load_prompts(write(tmp_path / "b.jsonl", rows))
    assert [q.prompt for q in found] == [[system("Be brief."), user(USER)], [system("Be kind."), user(USER)], USER]
    assert len({q.prompt_id for q in found}) == 3


BAD = {
    "unknown_speaker": {
        "prompt": [shared("alien", USER)],
        "chosen": shared("gpt", BLUE),
        "rejected": shared("gpt", RED),
    },
    "bad_call": {
        "conversations": [shared("human", USER), shared("function_call", "{}")],
        "chosen": shared("gpt", BLUE),
        "rejected": shared("gpt", RED),
    },
    "bad_system": {
        "system": "Be kind.",
        "prompt": [system("Be brief."), user(USER)],
        "chosen": [assistant(BLUE)],
        "rejected": [assistant(RED)],
    },
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_and_can_be_dropped(tmp_path, kind):
    good = {**BAD[kind]}
    first = "prompt" if "prompt" in good else "conversations"
    good[first] = [user(USER)]
    path = write(tmp_path / "pairs.jsonl", [good, BAD[kind], good])
    with pytest.raises(PreferenceDataError) as error:
        load_preferences(path)
    (issue,) = error.value.issues
    assert (issue.kind, issue.rows, issue.count) == (kind, [1], 1)
    assert "row 1 (" in str(error.value)
    assert len(load_preferences(path, on_bad_rows="drop")) == 2
    (scan,) = audit_preferences(path).scans
    assert [(issue.kind, issue.rows) for issue in scan.issues] == [(kind, [1])]


def test_a_function_call_becomes_a_tool_call(tmp_path):
    call = {"name": "look_up", "arguments": {"word": "Hund"}}
    turns = [shared("human", USER), shared("function_call", json.dumps(call)), shared("observation", "dog")]
    row = {"conversations": turns, "chosen": shared("gpt", BLUE), "rejected": shared("gpt", RED)}
    (pair,) = load_preferences(write(tmp_path / "pairs.jsonl", [row]))
    _, called, seen = pair["prompt"]
    assert called["tool_calls"][0]["function"]["name"] == "look_up"
    assert (seen["role"], seen["content"]) == ("tool", "dog")


def test_an_input_beside_a_prompt_is_an_error_that_offers_both(tmp_path):
    row = {"prompt": "Translate.", "input": "Hund", "chosen": "dog", "rejected": "cat"}
    path = write(tmp_path / "pairs.jsonl", [row])
    for read in (load_preferences, audit_preferences, load_prompts):
        with pytest.raises(PreferenceDataError, match=r"`columns` input=input .* `columns` input=\."):
            read(path)


def test_a_system_column_without_a_prompt_names_the_column_that_is_meant(tmp_path):
    row = {"system": "Be brief.", "question": USER, "chosen": BLUE, "rejected": RED}
    with pytest.raises(PreferenceDataError, match="`columns` prompt=question"):
        load_preferences(write(tmp_path / "pairs.jsonl", [row]))


@pytest.mark.parametrize("name", ["a system column beside text", "ShareGPT", "one message a side"])
def test_a_trainer_refuses_what_it_would_lose(name):
    row = CASES[name][0]
    with pytest.raises(PreferenceDataError, match=r"must be in TRL.s format.*load_preferences"):
        check_preferences(Dataset.from_list([row]))


def test_rows_at_random_keep_their_system_message_and_their_order():
    rng = random.Random(0)
    rows, expected = [], []
    for _ in range(200):
        prompt, chosen, rejected = (" ".join(rng.choices(WORDS, k=5)) for _ in range(3))
        text = rng.choice([None, "", "w1", "w2 w3"])
        rows.append({"system": text, "prompt": prompt, "chosen": chosen, "rejected": rejected + " w0"})
        expected.append(([system(text)] if text else []) + [user(prompt)])
    loaded = load_preferences(Dataset.from_list(rows))
    assert [plain(prompt) for prompt in loaded["prompt"]] == expected


def test_columns_come_from_the_command_line_and_from_a_mapping(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\ncolumns: {prompt: question, system: ''}\n"
    )
    parsed = make_parser().parse_args_and_config(["--config", str(config), "--use_cpu", "--bf16", "false"])
    assert read_columns(parsed[0].columns) == {"prompt": "question", "system": ""}
    words = ["--columns", "prompt=question", "chosen=better"]
    parsed = make_parser().parse_args_and_config(
        [
            *words,
            "--model_name_or_path",
            "m",
            "--dataset_name",
            "d",
            "--output_dir",
            "o",
            "--use_cpu",
            "--bf16",
            "false",
        ]
    )
    assert read_columns(parsed[0].columns) == {"prompt": "question", "chosen": "better"}


@pytest.mark.parametrize("streamed", [False, True])
def test_the_command_trains_on_columns_that_it_is_told(tmp_path, streamed, capsys):
    rows = [
        {"system": "w1", "question": f"w{i}", "better": f"w{i} w3", "rejected": f"w{i + 1} w4 w5"}
        for i in range(2, 10)
    ]
    write(tmp_path / "train.jsonl", rows)
    words = ["--model_name_or_path", save_model(tmp_path / "model"), "--dataset_name", str(tmp_path / "train.jsonl")]
    if streamed:
        words[-1] = str(tmp_path)
        words += ["--dataset_streaming", "true", "--length_penalty", "0.0"]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false", "--max_steps", "1"]
    words += ["--report_to", "none", "--save_strategy", "no", "--columns"]
    assert train.start([*words, "prompt=question", "chosen=better"]) == 0
    assert train.start([*words, "prompt=questoin", "chosen=better"]) == 2
    assert "Did you mean 'question'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.start([*words, "question"])
    assert "`columns` must be given as OURS=THEIRS" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["Q?", [{"role": "user", "content": "Q?"}]])
@pytest.mark.parametrize("name", ["input", "context"])
def test_what_may_be_part_of_a_prompt_of_another_name_is_asked_for_and_never_lost(prompt, name):
    sides = ["a", "b"] if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in "ab"]
    row = {"prompt": prompt, name: "The sky is green.", "chosen": sides[0], "rejected": sides[1]}
    with pytest.raises(PreferenceDataError, match=f"`columns` input={name} "):
        load_preferences(Dataset.from_list([row]))
    assert load_preferences(Dataset.from_list([row]), columns={"input": ""})["prompt"][0] == prompt


def test_an_input_beside_whole_conversations_is_an_error_for_they_are_the_prompt():
    sides = [[{"role": "user", "content": "Q?"}, {"role": "assistant", "content": text}] for text in "ab"]
    row = {"instruction": "Q?", "input": "Sky", "chosen": sides[0], "rejected": sides[1]}
    with pytest.raises(PreferenceDataError, match="what the conversations share, without `input`"):
        load_preferences(Dataset.from_list([row]), columns={"prompt": "instruction"})


def test_a_system_message_does_not_hide_an_empty_prompt():
    row = {"system": "Be brief.", "prompt": " ", "chosen": "a", "rejected": "b"}
    with pytest.raises(PreferenceDataError) as caught:
        load_preferences(Dataset.from_list([row]))
    assert [(issue.kind, issue.column) for issue in caught.value.issues] == [("empty", "prompt")]
