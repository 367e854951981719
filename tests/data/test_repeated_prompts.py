"""Responses that begin with their prompt: found in every form, cut on request, and never found where there is none."""

import json
import random

import pytest
from datasets import Dataset
from tiny import make_tokenizer, save_model, training_options

from sampo import SamPOConfig, SamPOTrainer
from sampo.audit.audit import audit_preferences
from sampo.commands import audit, cache, diagnose, train
from sampo.data.issues import PreferenceDataError
from sampo.data.load import load_preference_splits, load_preferences
from sampo.data.repeated_prompts import are_many, split_response
from sampo.data.validate import check_preferences

SYSTEM = {"role": "system", "content": "Be brief."}

# style -> (text up to the answer, text behind it), of a prompt
STYLES = {
    "ChatML": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "ChatML with a default system message": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Llama 2": ("<s>[INST] {} [/INST] ", " </s>"),
    "Llama 2 with a system message": ("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{} [/INST] ", "</s>"),
    "Gemma": ("<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
    "Zephyr": ("<|system|>\n</s>\n<|user|>\n{}</s>\n<|assistant|>\n", "</s>\n"),
    "Phi 3": ("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>\n<|endoftext|>"),
    "DeepSeek": ("<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "Alpaca": ("### Instruction:\n{}\n\n### Response:\n", ""),
    "Alpaca with its preface": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{}\n\n### Response:\n",
        "",
    ),
    "transcript": ("Human: {}\n\nAssistant: ", ""),
    "User": ("User: {}\nAssistant: ", "</s>"),
    "Vicuna": ("USER: {} ASSISTANT: ", "</s>"),
    "plain": ("{}\n", ""),
    "plain with other blanks": ("  {}  \n\n", ""),
}
WORD_TAGS = {"Alpaca", "Alpaca with its preface", "transcript", "User", "Vicuna"}
PLAIN = {"plain", "plain with other blanks"}


def texts(n=12, seed=0):
    """Random (prompt, good answer, bad answer), none of which begins as another."""
    rng = random.Random(seed)
    words = ["colour", "river,", "what", "is", "(the)", "Oslo?", "two\nlines", "naïve", "A:", "x = [1]"]
    return [[f"{mark}{i} " + " ".join(rng.choices(words, k=rng.randint(3, 9))) for mark in "PCR"] for i in range(n)]


def repeated(style, rows):
    before, after = STYLES[style]
    return [
        {"prompt": p, "chosen": before.format(p) + c + after, "rejected": before.format(p) + r + after}
        for p, c, r in rows
    ]


def kinds(call, *args, **options):
    with pytest.raises(PreferenceDataError) as caught:
        call(*args, **options)
    return {(issue.kind, issue.column): issue.count for issue in caught.value.issues}


BOTH = {("repeated_prompt", "chosen"): 12, ("repeated_prompt", "rejected"): 12}


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_that_the_responses_repeat_is_refused_and_cut_in_every_style(style):
    rows = texts()
    data = Dataset.from_list(repeated(style, rows))
    assert kinds(load_preferences, data) == BOTH
    assert kinds(check_preferences, data) == BOTH
    assert kinds(audit_preferences, data) == BOTH
    assert kinds(load_preferences, data, on_bad_rows="drop") == BOTH  # nothing is left
    cut = load_preferences(data, repeated_prompt="cut")
    assert [[row["prompt"], row["chosen"].strip(), row["rejected"].strip()] for row in cut] == rows
    if style not in PLAIN:
        assert cut["chosen"][0] == rows[0][1]
    assert audit_preferences(data, repeated_prompt="cut").overall.pairs == 12


@pytest.mark.parametrize("style", sorted(set(STYLES) - PLAIN))
def test_a_prompt_that_is_rendered_itself_gets_the_tag_that_opens_the_answer(style):
    before, _ = STYLES[style]
    for whole in (True, False):  # with the tag of the assistant behind it, and without
        rows = repeated(style, texts(4))
        opener = before.split("{}")[1]
        for row in rows:
            row["prompt"] = before.format(row["prompt"]) if whole else before.format(row["prompt"])[: -len(opener)]
        data = Dataset.from_list(rows)
        assert set(kinds(load_preferences, data)) == set(BOTH)
        for row, was in zip(load_preferences(data, repeated_prompt="cut"), rows, strict=True):
            assert row["chosen"].startswith("C")
            assert (row["prompt"] + row["chosen"]).strip() == was["chosen"].strip()  # nothing is lost


@pytest.mark.parametrize("style", STYLES)
def test_answers_alone_and_a_single_quotation_are_left_alone(style):
    rows = texts(40, seed=1)
    good = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    assert load_preferences(Dataset.from_list(good), repeated_prompt="cut").to_list() == good
    if style in PLAIN | WORD_TAGS:
        one = Dataset.from_list([*repeated(style, rows[:1]), *good[1:]])
        assert load_preferences(one).to_list() == one.to_list()
        assert load_preferences(one, repeated_prompt="cut").to_list() == one.to_list()
        check_preferences(one)
        assert not audit_preferences(one).has_issues


def test_repeats_that_begin_late_are_counted_alike_by_loader_and_audit():
    good, late = texts(1100, seed=2), texts(200, seed=3)
    rows = [
        *repeated("ChatML", good[:1]),
        *(dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in good),
    ]
    data = Dataset.from_list([*rows, *repeated("plain", late)])  # the first thousand rows have one repeat, in tags
    counts = {(issue.kind, issue.column): issue.count for issue in audit_preferences(data).scans[0].issues}
    assert counts == kinds(load_preferences, data) == dict.fromkeys(BOTH, 201)


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_that_only_looks_like_a_template_stays_plain_text(style):
    rows = [[f"Question: {p}", c, r] for p, c, r in texts()]
    cut = load_preferences(Dataset.from_list(repeated(style, rows)), repeated_prompt="cut")
    assert [[row["prompt"].strip(), row["chosen"].strip(), row["rejected"].strip()] for row in cut] == rows


def test_what_begins_like_a_prompt_is_no_repeated_prompt():
    for prompt, response in [
        ("Hi", "High above the sea."),
        ("Name a colour.", "Name a colourful bird? A parrot."),
        ("What is 2 + 2?", "The question `What is 2 + 2?` is easy: 4."),
        ("Say A: or B:", "B: is my answer"),
        ("<|im_start|>user\nHi<|im_end|>\n", "Hello there"),
    ]:
        assert split_response(prompt, response) is None


@pytest.mark.parametrize(
    ("rows", "total", "many"),
    [(1, 1, True), (1, 2, False), (2, 2, True), (1, 5, False), (9, 100, False), (10, 100, True), (10, 201, False)],
)
def test_many_is_more_than_half_or_ten_rows_that_are_five_per_cent(rows, total, many):
    assert are_many(rows, total) is many


def test_answers_to_greetings_tell_nothing_but_are_cut_with_the_others():
    greetings = [{"prompt": "Hello", "chosen": f"Hello! {i}", "rejected": f"Hello, you {i}"} for i in range(3)]
    data = Dataset.from_list(greetings)
    assert load_preferences(data, repeated_prompt="cut").to_list() == greetings
    check_preferences(data)
    assert not audit_preferences(data).has_issues
    others = repeated("plain", texts(4))
    hello = {"prompt": "Hello", "chosen": "Hello\nC", "rejected": "Hello\n"}
    mixed = Dataset.from_list([hello, *others])
    assert kinds(load_preferences, mixed, repeated_prompt="cut") == {("empty", "rejected"): 1}
    assert len(load_preferences(mixed, repeated_prompt="cut", on_bad_rows="drop")) == 4
    assert kinds(load_preferences, mixed) == {("repeated_prompt", side): 5 for side in ("chosen", "rejected")}


def test_a_question_of_few_letters_in_chinese_is_a_question():
    rows = [
        {"prompt": f"{i}是什么颜色", "chosen": f"{i}是什么颜色蓝", "rejected": f"{i}是什么颜色不"} for i in range(3)
    ]
    cut = load_preferences(Dataset.from_list(rows), repeated_prompt="cut")
    assert [[row["chosen"], row["rejected"]] for row in cut] == [["蓝", "不"]] * 3


def as_messages(row, *, system=False, repeat="all"):
    prompt = [SYSTEM] * system + [{"role": "user", "content": row[0]}]
    head = {"all": prompt, "question": prompt[-1:], "none": []}[repeat]
    sides = ([*head, {"role": "assistant", "content": text}] for text in row[1:])
    return dict(zip(("prompt", "chosen", "rejected"), (prompt, *sides), strict=True))


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("repeat", ["all", "question"])
def test_a_conversation_that_the_responses_repeat_is_refused_and_cut(system, repeat):
    rows = texts()
    data = Dataset.from_list([as_messages(row, system=system, repeat=repeat) for row in rows])
    for call in (load_preferences, check_preferences, audit_preferences):
        assert kinds(call, data) == BOTH
    cut = load_preferences(data, repeated_prompt="cut")
    assert cut.to_list() == [as_messages(row, system=system, repeat="none") for row in rows]
    assert load_preference_splits(data, repeated_prompt="cut")["train"].to_list() == cut.to_list()


def test_another_system_or_user_message_in_front_of_an_answer_cannot_be_cut():
    row = as_messages(["question", "good", "bad"])
    for role in ("system", "developer", "user"):
        bad = row | {"chosen": [{"role": role, "content": "else"}, *row["chosen"]]}
        found = kinds(load_preferences, Dataset.from_list([row, bad]), repeated_prompt="cut")
        assert found == {("prompt_role", "chosen"): 1}


@pytest.mark.parametrize("style", sorted(set(STYLES) - PLAIN - WORD_TAGS))
def test_a_rendered_conversation_inside_a_message_is_refused_and_cut(style):
    before, after = STYLES[style]
    rows = texts(3)
    data = [as_messages([p, *(before.format(p) + side + after for side in sides)]) for p, *sides in rows]
    data = [row | {side: row[side][-1:] for side in ("chosen", "rejected")} for row in data]
    assert set(kinds(load_preferences, Dataset.from_list(data))) == set(BOTH)
    cut = load_preferences(Dataset.from_list(data), repeated_prompt="cut")
    assert [[row["chosen"][0]["content"], row["rejected"][0]["content"]] for row in cut] == [row[1:] for row in rows]


@pytest.mark.parametrize("style", sorted(set(STYLES) - PLAIN - WORD_TAGS))
def test_the_tag_of_the_assistant_alone_is_refused_and_cut(style):
    before, after = STYLES[style]
    opener = before.split("{}")[1].split("\n", 1)[-1] if style != "Llama 3" else before.split("{}")[1]
    row = {"prompt": "A question", "chosen": opener + "Yes." + after, "rejected": opener + "No." + after}
    found = kinds(load_preferences, Dataset.from_list([row]))
    assert found == {("role_tags", "chosen"): 1, ("role_tags", "rejected"): 1}
    cut = load_preferences(Dataset.from_list([row]), repeated_prompt="cut")[0]
    assert cut == {"prompt": "A question", "chosen": "Yes.", "rejected": "No."}


def test_several_turns_in_a_response_stay_as_they_are():
    row = as_messages(["Hi", "Hello!", "What?"])
    more = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Blue."}]
    row |= {"chosen": [*row["chosen"][-1:], *more], "rejected": [*row["rejected"][-1:], *more]}
    data = Dataset.from_list([row])
    assert load_preferences(data, repeated_prompt="cut").to_list() == [row]


def test_what_is_empty_after_the_cut_is_a_bad_row_of_its_own_kind():
    rows = repeated("ChatML", texts(3))
    rows[1]["chosen"] = STYLES["ChatML"][0].format(rows[1]["prompt"]) + "<|im_end|>"
    data = Dataset.from_list(rows)
    assert kinds(load_preferences, data, repeated_prompt="cut") == {("empty", "chosen"): 1}
    assert len(load_preferences(data, repeated_prompt="cut", on_bad_rows="drop")) == 2
    plain = repeated("plain", texts(3))
    plain[1]["chosen"] = plain[1]["prompt"] + " \n"
    data = Dataset.from_list(plain)
    assert kinds(load_preferences, data, repeated_prompt="cut") == {("empty", "chosen"): 1}
    kept = load_preferences(data, repeated_prompt="cut", on_bad_rows="drop")
    assert [row["chosen"].strip() for row in kept] == [texts(3)[0][1], texts(3)[2][1]]


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match=r"`repeated_prompt` must be one of \['error', 'cut'\], got 'cutt'"):
        load_preferences(Dataset.from_list(repeated("plain", texts())), repeated_prompt="cutt")


def test_the_trainer_refuses_before_it_looks_for_a_model(tmp_path):
    args = SamPOConfig(**training_options(tmp_path))
    with pytest.raises(PreferenceDataError, match="the prompt again at the start of `chosen`"):
        SamPOTrainer("no-such-model", args=args, train_dataset=Dataset.from_list(repeated("plain", texts())))


def test_every_command_refuses_and_cuts(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    rows = [{"prompt": f"w{i} w1 w2 w5 w6 ", "chosen": f"w3 w{i} ", "rejected": f"w4 w{i} w6 "} for i in range(8)]
    full = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in full))
    train = ["--model_name_or_path", model, "--dataset_name", str(data), "--use_cpu", "--bf16", "false"]
    commands = {
        "train": [*train, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--save_strategy", "no"],
        "cache": [*train, "--output_dir", str(tmp_path / "out2"), "--ref_cache_dir", str(tmp_path / "cache")],
        "diagnose": ["--policy", model, "--data", str(data), "--use_cpu", "--out", str(tmp_path / "diagnosis")],
        "audit": [str(data), "--tokenizer", model],
    }
    for name, words in commands.items():
        for extra in ([], ["--repeated_prompt", "cut"]):
            status, said = run_command(name, [*words, *extra], capsys)
            assert (status == 0) is bool(extra), (name, said)
            if not extra:
                assert "8 of 8 pairs have the prompt again at the start of `chosen`" in said


def run_command(name, words, capsys):
    """Exit status and what was printed."""
    module = {"train": train, "cache": cache, "diagnose": diagnose, "audit": audit}[name]
    said = ""
    try:
        launched = name in ("train", "cache")
        status = module.start(words) if launched else module.main(module.make_parser().parse_args(words))
    except SystemExit as stop:
        status, said = 1, str(stop)
    return status or 0, said + "".join(capsys.readouterr())


def test_the_cut_gives_the_tokens_that_the_answers_alone_give(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"w{i} w1 w2 w5 w6 ", "chosen": f"w3 w{i} ", "rejected": f"w4 w{i} w6 "} for i in range(8)]
    full = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    found = [
        audit_preferences(load_preferences(Dataset.from_list(data), repeated_prompt="cut"), tokenizer=tokenizer)
        for data in (rows, full)
    ]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].overall == found[1].overall


def test_responses_that_repeat_a_rendered_prompt_in_two_ways_are_refused():
    before = STYLES["ChatML"][0].format("What is it?")
    rendered, preface = before.split("<|im_start|>assistant")[0], "<|im_start|>system\nBe kind.<|im_end|>\n"
    row = {"prompt": rendered, "chosen": before + "C<|im_end|>", "rejected": preface + before + "R<|im_end|>"}
    found = kinds(load_preferences, Dataset.from_list([row]), repeated_prompt="cut")
    assert found == {("repeated_prompt", "chosen"): 1, ("repeated_prompt", "rejected"): 1}
