"""Chat templates of strangers, and the ends of responses: what is refused or said before a model is loaded."""

import gzip
import json
import logging
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import CHAT_TEMPLATE, make_pairs, make_tokenizer, save_model, training_options

from sampo import SamPOConfig, SamPOTrainer
from sampo.audit import report
from sampo.audit.audit import audit_preferences
from sampo.commands import audit, diagnose, generate, train
from sampo.data import chat
from sampo.data.end_tokens import ResponseEnds, end_token_ids
from sampo.data.issues import PreferenceDataError
from sampo.data.lengths import count_tokens, kept_ids
from sampo.data.load import load_preferences
from sampo.data.tokenize import tokenize_pairs
from sampo.data.validate import check_preferences
from sampo.evaluation.answers.prompts import check_prompts, load_prompts
from sampo.evaluation.texts import Texts
from sampo.models.checks import find_tokenizer_issues
from sampo.weighting import fingerprints, last_end_tokens

ALPACA = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaca_eval_gpt4_pairs.jsonl.gz"
SYSTEM = {"role": "system", "content": "w50 w51"}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
SKIPS_SYSTEM = CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'")
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
NO_END = CHAT_TEMPLATE.replace(" <|im_end|> \n ", " \n ")
CLOSED_BY_THE_NEXT = "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rows_of(n=6, system=()):
    rows = make_pairs(n, conversational=True).to_list()
    for row in system:
        rows[row]["prompt"].insert(0, dict(SYSTEM))
    return rows


def issues_of(call, *args, **options):
    with pytest.raises(PreferenceDataError) as caught:
        call(*args, **options)
    return {(f.kind, f.column): (f.rows, f.count) for f in caught.value.issues}, str(caught.value)


# --- templates that fail, drop, or never end -------------------------------------------------------------------------

BAD_TEMPLATES = {
    "refuses a system message": (NO_SYSTEM + CHAT_TEMPLATE, "not_rendered", "", "no system, please"),
    "drops a system message": (SKIPS_SYSTEM, "system_lost", "prompt", "leaves out"),
    "divides by zero": (
        "{% if messages[0]['role'] == 'system' %}{{ 1/0 }}{% endif %}" + CHAT_TEMPLATE,
        *("not_rendered", "", "ZeroDivisionError: division by zero"),
    ),
    "asks for what is not there": (
        "{% if messages[0]['role'] == 'system' %}{{ nobody.name.first }}{% endif %}" + CHAT_TEMPLATE,
        *("not_rendered", "", "'nobody' is undefined"),
    ),
    "never ends": (
        "{% if messages[0]['role'] == 'system' %}" + ENDLESS + "{% endif %}" + CHAT_TEMPLATE,
        *("not_rendered", "", "more than 0.5 seconds for one conversation"),
    ),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_rows_that_a_template_spoils_are_named_or_dropped_everywhere(name, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(chat, "LIMIT", 0.5)
    template, kind, column, reason = BAD_TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    data = Dataset.from_list(rows_of(system=[2]))
    for call in (load_preferences, check_preferences):
        issues, message = issues_of(call, data, chat_template_of=tokenizer)
        assert issues == {(kind, column): ([2], 1)}
        assert reason in message
        assert "at rows [2]" in message
    with pytest.raises(PreferenceDataError, match=reason):
        SamPOTrainer(
            "no-such-model",
            args=SamPOConfig(**training_options(tmp_path)),
            train_dataset=data,
            processing_class=tokenizer,
        )
    kept = load_preferences(data, chat_template_of=tokenizer, on_bad_rows="drop")
    assert kept.to_list() == [row for i, row in enumerate(data.to_list()) if i != 2]
    assert "dropped 1 of 6 pairs, kept 5" in caplog.text
    found = audit_preferences(data, tokenizer=tokenizer)
    assert [(f.kind, f.column, f.rows) for f in found.scans[0].issues] == [(kind, column, [2])]
    assert reason in found.scans[0].issues[0].describe(6)
    check_preferences(Dataset.from_list(rows_of()), chat_template_of=tokenizer)  # without system messages all is well


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_prompts_that_a_template_spoils_are_refused_before_the_model_is_loaded(name, monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "LIMIT", 0.5)
    template, *_, reason = BAD_TEMPLATES[name]
    folder = tmp_path / "model"
    tokenizer_with(template).save_pretrained(folder)  # there are no weights
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": row["prompt"]} for row in rows_of(system=[2])]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="got issues in 1 of 6 prompts") as stopped:
        generate.main(generate.make_parser().parse_args(words))
    assert reason in str(stopped.value)
    texts = Texts(tokenizer_with(template))
    assert len(check_prompts(load_prompts(prompts), texts.find_issue, "drop")) == 5


def test_a_template_that_never_ends_is_stopped_in_any_thread_and_work_goes_on(monkeypatch):
    monkeypatch.setattr(chat, "LIMIT", 0.3)
    tokenizer, good, said = tokenizer_with(ENDLESS), make_tokenizer(), []
    turn = [{"role": "user", "content": "w1"}]

    def work():
        for each in (tokenizer, good, tokenizer):
            try:
                said.append(chat.render_messages(each, turn))
            except chat.NotRendered as error:
                said.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert time.monotonic() - began < 60
    right = good.apply_chat_template(turn, tokenize=False)
    assert sorted(said) == sorted(
        [right, *(["TimeoutError: it takes more than 0.3 seconds for one conversation"] * 2)] * 3
    )
    assert end_token_ids(tokenizer) == [1]  # EOS has to do
    monkeypatch.setattr("sampo.models.checks.LIMIT", 0.3)
    assert "must terminate" in find_tokenizer_issues(tokenizer)[0]


def never_end():
    with chat.time_limit(0.1):
        while True:
            pass


def test_what_is_in_time_is_never_stopped():
    for _ in range(300):
        with chat.time_limit(0.2):
            assert sum(range(100)) == 4950
    with pytest.raises(TimeoutError, match=r"more than 0\.1 seconds"):
        never_end()
    with pytest.raises(KeyError), chat.time_limit(5):
        raise KeyError("its own")


def test_templates_that_write_a_text_in_another_way_lose_nothing():
    rows = rows_of(system=[0, 1])
    rows[0]["prompt"][0]["content"] = '  w50\n\n"w51" '
    for name, written in {
        "strips": "m['content'] | trim",
        "writes JSON": "m['content'] | tojson",
        "joins blanks": "m['content'].split() | join(' ')",
        "moves thoughts": "m['content'].split('</think>')[-1]",
    }.items():
        tokenizer = tokenizer_with(CHAT_TEMPLATE.replace("m['content']", written))
        rows[2]["chosen"][0]["content"] = "<think>w1 w2</think>\n\nw3 w4"
        assert load_preferences(Dataset.from_list(rows), chat_template_of=tokenizer), name


# --- options of the template -----------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
OPTIONS = {
    "kwargs in some rows only": ([{"enable_thinking": False}, None], "chat_template_kwargs", "bad_kwargs"),
    "a text": ([{"a": 1}, "enable_thinking"], "chat_template_kwargs", "bad_kwargs"),
    "a list": ([{"a": 1}, [{"a": 1}]], "chat_template_kwargs", "bad_kwargs"),
    "other keys": ([{"enable_thinking": False}, {"thinking": False}], "chat_template_kwargs", "uneven_kwargs"),
    "fewer keys": ([{"enable_thinking": False, "a": 1}, {"a": 1}], "chat_template_kwargs", "uneven_kwargs"),
    "one tool": ([json.dumps([TOOL]), json.dumps(TOOL)], "tools", "bad_tools"),
    "names of tools": ([json.dumps([TOOL]), '["look"]'], "tools", "bad_tools"),
    "no JSON": ([json.dumps([TOOL]), "look"], "tools", "bad_tools"),
    "a number": ([[TOOL], 3], "tools", "bad_tools"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("as_text", [False, True])
def test_options_of_the_template_that_trl_cannot_take_are_named_or_dropped(name, as_text, tmp_path):
    values, column, kind = OPTIONS[name]
    rows = make_pairs(2, conversational=not as_text).to_list()
    for row, value in zip(rows, values, strict=True):
        row[column] = value
        if value is None:
            del row[column]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert issues_of(load_preferences, path)[0] == {(kind, column): ([1], 1)}
    assert len(load_preferences(path, on_bad_rows="drop")) == 1
    found = audit_preferences(path)
    assert [(f.kind, f.column, f.rows) for f in found.scans[0].issues] == [(kind, column, [1])]
    try:
        data = Dataset.from_list(rows, on_mixed_types="use_json")
    except (TypeError, ValueError):
        return  # Arrow itself has no place for such a column
    assert issues_of(check_preferences, data)[0] == {(kind, column): ([1], 1)}


def test_rows_without_tools_and_options_of_the_call_itself(tmp_path):
    rows = rows_of(3)
    for row, tools in zip(rows, ([TOOL], None, [TOOL, TOOL]), strict=True):
        row["tools"] = tools
    check_preferences(Dataset.from_list(rows), chat_template_of=make_tokenizer())
    rows = [row | {"chat_template_kwargs": {"tokenize": True}} for row in rows_of(2)]
    issues, message = issues_of(load_preferences, Dataset.from_list(rows), chat_template_of=make_tokenizer())
    assert issues == {("not_rendered", ""): ([0, 1], 2)}
    assert "tokenize" in message


# --- content blocks --------------------------------------------------------------------------------------------------

TAKES_BLOCKS = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "{% endif %}",
)


def in_blocks(row, parts=1):
    def blocks(message):
        words = message["content"].split()
        cut = len(words) // parts or 1
        texts = [" ".join(words[i : i + cut]) for i in range(0, len(words), cut)]
        return message | {"content": [{"type": "text", "text": text} for text in texts]}

    return {name: [blocks(message) for message in part] for name, part in row.items()}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TAKES_BLOCKS])
def test_blocks_of_text_give_the_tokens_of_strings(model, template, tmp_path):
    tokenizer, rows = tokenizer_with(template), rows_of(5, system=[1])
    plain, blocks = Dataset.from_list(rows), Dataset.from_list(list(map(in_blocks, rows)))
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    expected = tokenize_pairs(plain, tokenizer, max_length=None).select_columns(names).to_list()
    assert tokenize_pairs(blocks, tokenizer, max_length=None).select_columns(names).to_list() == expected
    found = [audit_preferences(data, tokenizer=tokenizer).scans[0].pairs for data in (plain, blocks)]
    assert found[0].chosen.tolist() == found[1].chosen.tolist()
    trainer = SamPOTrainer(
        model,
        args=SamPOConfig(**training_options(tmp_path)),
        train_dataset=blocks,
        eval_dataset={"a": blocks},
        processing_class=tokenizer,
    )
    assert trainer.train_dataset.select_columns(names).to_list() == expected
    assert trainer.eval_dataset["a"].select_columns(names).to_list() == expected
    texts = Texts(tokenizer)
    for one, other in zip(rows, blocks, strict=True):
        assert texts.prompt(one["prompt"]) == texts.prompt(other["prompt"])


def test_several_blocks_become_lines_and_other_content_is_refused():
    message = {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]}
    assert chat.join_text_blocks([message]) == [{"role": "user", "content": "w1\nw2"}]
    row = rows_of(1)[0]
    row["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "image", "url": "u"}]}]
    data = Dataset.from_list([row])
    for call in (load_preferences, check_preferences):
        assert issues_of(call, data)[0] == {("not_text", "prompt"): ([0], 1)}
    assert "not text" in Texts(make_tokenizer()).find_issue(row["prompt"])
    pictures = Dataset.from_list([row | {"images": ["p"]}])  # of a vision model: TRL's to judge
    assert len(load_preferences(pictures)) == 1


def test_blocks_that_a_template_prints_as_python_are_a_fault_of_their_own():
    content = [{"type": "text", "text": "w1"}, {"type": "image"}]  # which cannot be joined to a string
    row = rows_of(1)[0]
    row["prompt"] = [{"role": "user", "content": content}]
    template = chat.ChatTemplate(make_tokenizer())
    assert template.find_issue(tuple(row.values()), {}) == ("blocks_as_python", "prompt")


def test_a_template_for_blocks_alone_shows_no_strings_and_is_refused():
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{% for c in m['content'] %}{{ c.text }}{% endfor %}")
    rows = rows_of(3)
    issues, _ = issues_of(load_preferences, Dataset.from_list(rows), chat_template_of=tokenizer_with(template))
    assert issues == {("message_lost", "prompt"): ([0, 1, 2], 3)}
    blocks = Dataset.from_list(list(map(in_blocks, rows)))
    assert len(load_preferences(blocks, chat_template_of=tokenizer_with(template))) == 3


# --- the end of a response -------------------------------------------------------------------------------------------


def several_turns(n=40, seed=3):
    rng = random.Random(seed)

    def turns(k):
        roles = ["assistant", "user"] * k + ["assistant"]
        return [
            {"role": role, "content": " ".join(rng.choices(["w1", "w2", "w3"], k=rng.randint(1, 4)))} for role in roles
        ]

    rows = []
    for _ in range(n):
        chosen, rejected = turns(rng.randint(0, 3)), turns(rng.randint(0, 3))
        rejected[-1] = {"role": "assistant", "content": "w9"}
        rows.append({"prompt": [{"role": "user", "content": "w0 w5"}], "chosen": chosen, "rejected": rejected})
    return rows


@pytest.mark.parametrize("max_length", [9, 14, 17, 23, None])
def test_the_end_of_another_turn_is_no_end_of_the_response(model, max_length, tmp_path):
    tokenizer, rows = make_tokenizer(), several_turns()
    trainer = SamPOTrainer(
        model,
        args=SamPOConfig(**training_options(tmp_path, max_length=max_length, per_device_train_batch_size=40)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    data = trainer.train_dataset.with_format(None)
    inputs = trainer.data_collator(list(data))
    found = trainer.weigher.find_completions(inputs).end.any(dim=1).tolist()
    # the oracle: a response has its end if the whole of it, but for the newline behind, is left by the cut
    whole = [len(row["prompt_ids"]) + len(row[side]) for side in ("chosen_ids", "rejected_ids") for row in data]
    expected = [max_length is None or length - 1 <= max_length for length in whole]
    assert found == expected
    counts = trainer.token_counts["train"]
    assert [counts.endless_chosen, counts.endless_rejected] == [
        expected[:40].count(False),
        expected[40:].count(False),
    ]
    cut = audit_preferences(Dataset.from_list(rows), tokenizer=tokenizer, max_length=max_length or 500).truncations[1]
    assert [cut.without_end_chosen, cut.without_end_rejected] == [counts.endless_chosen, counts.endless_rejected]
    if max_length in (14, 17, 23):
        assert 0 < expected.count(True) < 80
        # without the rows whose end tokens end other turns the answer would be another one
        mask = inputs["completion_mask"][:, 1:].bool()
        ids = torch.tensor(end_token_ids(tokenizer))
        assert last_end_tokens(inputs["input_ids"], mask, ids).any(dim=1).tolist() != expected


def test_after_a_cut_too_no_end_is_kept_where_there_is_none():
    data = make_pairs(6, conversational=True)
    cut = audit_preferences(data, tokenizer=tokenizer_with(NO_END), max_length=18).truncations[1]
    assert cut.bias.pairs
    assert cut.bias.end_chosen is cut.bias.end_rejected is None


def test_the_place_of_the_end_is_that_of_a_loop():
    tokenizer = make_tokenizer()
    ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))
    eos, turn, newline = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>", "\n"])
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.choice([eos, turn, newline, 20, 21]) for _ in range(rng.randint(0, 8))]
        words = [i for i, token in enumerate(ids) if token in (20, 21)]
        behind = [i for i, token in enumerate(ids) if token in (eos, turn) and i > max(words, default=-1)]
        assert ends.find(ids) == max(behind, default=-1)
        for kept in (slice(0, 3), slice(2, None)):
            part = ids[kept]
            inside = ends.find(ids) in range(len(ids))[kept]
            others = "other" if any(i in (eos, turn) for i in part) else "none"
            assert ends.classify(ids, kept) == ("own" if inside else others)


@pytest.mark.parametrize("template", [NO_END, CLOSED_BY_THE_NEXT])
def test_data_without_any_end_are_told_and_options_of_the_end_refused(model, template, tmp_path, caplog):
    tokenizer, data = tokenizer_with(template), make_pairs(6, conversational=True)

    def trainer(name, data=data, **options):
        args = SamPOConfig(**training_options(tmp_path, **options))
        return SamPOTrainer(name, args=args, train_dataset=data, processing_class=tokenizer)

    trainer(model)
    assert "0 of 12 responses of the train data have an end token after truncation" in caplog.text
    for option in ("keep_end_token", "balance_end_token"):
        with pytest.raises(ValueError, match=f"`{option}` needs responses with an end token, got a chat template"):
            trainer("no-such-model", **{option: True})
    found = audit_preferences(data, tokenizer=tokenizer)
    assert found.truncations[0].without_end_chosen == found.truncations[0].without_end_rejected == 6
    assert found.overall.end_chosen is found.overall.end_rejected is None
    said = report.write_conclusion(found)
    assert "keep no end token, since no response has one" in said
    assert "none of 12 responses has an end token" in said


def test_data_whose_ends_are_all_cut_are_told_and_options_of_the_end_refused(model, tmp_path, caplog):
    data = make_pairs(6, conversational=True, min_len=4)

    def trainer(**options):
        args = SamPOConfig(**training_options(tmp_path, max_length=18, **options))
        long = data.map(lambda row: {"chosen": row["chosen"][:1], "rejected": row["rejected"][:1]})
        rows = [
            {
                "prompt": [{"role": "user", "content": "w1"}],
                **{side: [{"role": "assistant", "content": row[side][0]["content"] + " w2" * 20}] for side in
                   ("chosen", "rejected")},
            }
            for row in long
        ]  # fmt: skip
        return SamPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())

    trainer()
    assert "0 of 12 responses of the train data have an end token after truncation" in caplog.text
    assert "6 chosen and 6 rejected responses have no end token" in caplog.text
    with pytest.raises(ValueError, match="`keep_end_token` needs responses with an end token, got none: 0 of 12"):
        trainer(keep_end_token=True)


def test_some_ends_are_counted_and_change_nothing(model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    args = SamPOConfig(**training_options(tmp_path, max_length=16, keep_end_token=True))
    SamPOTrainer(
        model, args=args, train_dataset=make_pairs(30, conversational=True), processing_class=make_tokenizer()
    )
    assert "responses have no end token" in caplog.text
    assert "does not teach" not in caplog.text


# --- text with the tokenizer of a chat model -------------------------------------------------------------------------


def merging_tokenizer():
    """Letters, and pairs of letters that merge across the border of prompt and response."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<eos>", *"abcdefgh .", "ab"]
    model = models.BPE({token: i for i, token in enumerate(letters)}, [("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def merging_rows():
    """Of ten pairs those with an even number merge: `a` at the end of the prompt, `b` at the start of a response."""
    return [
        {"prompt": "cda", "chosen": ("b" if i % 2 == 0 else "c") + "cd", "rejected": "dd" + "e" * i} for i in range(10)
    ]


def test_what_merges_is_said_once_with_its_share(caplog, capsys):
    caplog.set_level(logging.WARNING)
    found = tokenize_pairs(Dataset.from_list(merging_rows()), merging_tokenizer(), max_length=None)
    assert len(found) == 10
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "The pairs are text and the tokenizer has a chat template" in said[0]
    assert "In 5 of 10 pairs (50.0 %) the last token of the prompt merges" in said[0]
    (note,) = audit_preferences(Dataset.from_list(merging_rows()), tokenizer=merging_tokenizer()).scans[0].notes
    assert said[0] in note


def test_a_space_in_front_of_the_response_keeps_the_tokens_apart(caplog):
    rows = [{**row, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]} for row in merging_rows()]
    tokenize_pairs(Dataset.from_list(rows), merging_tokenizer(), max_length=None)
    assert "merges" not in caplog.text


@pytest.mark.parametrize("prompt", ["a ", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"])
def test_rendered_text_and_tokenizers_without_a_template_are_no_chat(prompt, caplog):
    tokenizer = merging_tokenizer()
    if prompt == "a ":
        tokenizer.chat_template = None
    tokenize_pairs(Dataset.from_list([{"prompt": prompt, "chosen": "c", "rejected": "d"}]), tokenizer, max_length=None)
    assert "chat template" not in caplog.text


def test_text_as_messages_makes_a_turn_of_each_text():
    rows = [{"prompt": " w1 w2\n", "chosen": " w3", "rejected": "w4 ", "score": i} for i in range(3)]
    shared = [{"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}]
    made = load_preferences(Dataset.from_list(rows), text_as_messages=True)
    assert made.to_list() == [
        {
            "prompt": [{"role": "user", "content": "w1 w2"}],
            "chosen": [{"role": "assistant", "content": "w3"}],
            "rejected": [{"role": "assistant", "content": "w4"}],
            "score": i,
        }
        for i in range(3)
    ]
    for call in (load_preferences, audit_preferences):
        with pytest.raises(PreferenceDataError, match="`text_as_messages` needs a column `prompt`"):
            call(Dataset.from_list(shared), text_as_messages=True)
    messages = make_pairs(3, conversational=True)
    assert load_preferences(messages, text_as_messages=True).to_list() == messages.to_list()
    rendered = [{"prompt": "<|im_start|>user\nw1<|im_end|>\n", "chosen": "w2", "rejected": "w3"}]
    assert issues_of(load_preferences, Dataset.from_list(rendered), text_as_messages=True)[0] == {
        ("rendered_text", "prompt"): ([0], 1)
    }
    only_blanks_differ = [{"prompt": "w1", "chosen": "w2 ", "rejected": " w2"}]
    assert issues_of(load_preferences, Dataset.from_list(only_blanks_differ), text_as_messages=True)[0] == {
        ("identical", "rejected"): ([0], 1)
    }


def test_every_command_takes_text_as_messages(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    path = tmp_path / "pairs.jsonl"
    make_pairs(8).to_json(path)
    out = ["--use_cpu", "--out", str(tmp_path / "diagnosis")]
    diagnose.main(
        diagnose.make_parser().parse_args(["--policy", model, "--data", str(path), *out, "--text_as_messages"])
    )
    audit.main(audit.make_parser().parse_args([str(path), "--tokenizer", model, "--text_as_messages"]))
    assert "The pairs are text" not in "".join(capsys.readouterr())
    words = ["--model_name_or_path", model, "--dataset_name", str(path), "--use_cpu", "--bf16", "false"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--save_strategy", "no"]
    assert train.start([*words, "--text_as_messages"]) == 0
    ids = load_preferences(path, text_as_messages=True)
    expected = audit_preferences(ids, tokenizer=make_tokenizer()).overall
    assert audit_preferences(path, tokenizer=make_tokenizer(), text_as_messages=True).overall == expected
    assert [type(question.prompt) for question in load_prompts(path)] == [str] * 8
    prompts = load_prompts(path, text_as_messages=True)
    assert [question.prompt for question in prompts] == [row["prompt"] for row in ids]


def test_a_stream_cannot_be_changed_and_another_evaluation_set_is_checked(model, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    make_pairs(4).to_json(path)
    words = ["--model_name_or_path", model, "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    words += ["--use_cpu", "--bf16", "false", "--dataset_streaming", "--text_as_messages", "--repeated_prompt", "cut"]
    with pytest.raises(SystemExit):
        train.start(words)
    said = capsys.readouterr().err
    assert "`text_as_messages` needs all rows" in said
    assert "`repeated_prompt: cut` needs all rows" in said
    trainer = SamPOTrainer(
        model,
        args=SamPOConfig(**training_options(tmp_path)),
        train_dataset=make_pairs(4, conversational=True),
        processing_class=tokenizer_with(SKIPS_SYSTEM),
    )
    with pytest.raises(PreferenceDataError, match="leaves out, at rows"):
        trainer.evaluate(Dataset.from_list(rows_of(4, system=[1])))


@pytest.mark.real_model
@pytest.mark.skipif(not ALPACA.is_file(), reason="the pairs lie beside the repository, not in it")
def test_pairs_of_alpaca_eval_with_a_chat_model(caplog):
    from real_model import smollm2_folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    with gzip.open(ALPACA, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    data = load_preferences(Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]))
    prepared = tokenize_pairs(data, tokenizer, max_length=None)
    (said,) = [record.getMessage() for record in caplog.records if "pairs are text" in record.getMessage()]
    merged = sum(
        len(tokenizer(row["prompt"])["input_ids"]) > len(ids)
        for row, ids in zip(data, prepared["prompt_ids"], strict=True)
    )
    assert f"In {merged:,} of {len(data):,} pairs" in said
    caplog.clear()
    made = load_preferences(data, text_as_messages=True, chat_template_of=tokenizer)
    tokenize_pairs(made, tokenizer, max_length=None)
    assert "merges" not in caplog.text
    assert "in another way" not in caplog.text


def test_counts_are_those_of_a_loop_at_any_cut():
    tokenizer = make_tokenizer()
    ends = ResponseEnds(tokenizer, end_token_ids(tokenizer))
    data = tokenize_pairs(Dataset.from_list(several_turns()), tokenizer, max_length=None)
    for max_length in (None, 8, 13, 20):
        for mode in ("keep_start", "keep_end"):
            counts = count_tokens(data, max_length, mode, ends)
            endless, other = [0, 0], []
            for number, row in enumerate(data):
                for side, name in enumerate(("chosen_ids", "rejected_ids")):
                    whole = row["prompt_ids"] + row[name]
                    kept = kept_ids(whole, max_length, mode)
                    place = len(row["prompt_ids"]) + ends.find(row[name])
                    there = place < len(kept) if mode == "keep_start" else place >= len(whole) - len(kept)
                    endless[side] += not there
                    begin = len(row["prompt_ids"]) if mode == "keep_start" else 0
                    if not there and set(kept[begin:]) & ends.ids:
                        other.append((number, name))
            assert [counts.endless_chosen, counts.endless_rejected] == endless
            assert sorted(counts.other_ends) == sorted(other)
    assert isinstance(int(fingerprints(torch.tensor([[1]]), torch.ones(1, 1))), int)
    assert np.isfinite(counts.rms_difference)
