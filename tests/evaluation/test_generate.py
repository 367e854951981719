import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from judge_server import Reply, Server, completion
from processes import environment
from real_model import HH_FILE
from tiny import WORDS, make_tokenizer, save_model
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sampo.cli import main
from sampo.evaluation.answers.answers import (
    Answer,
    prompt_id,
    prompt_text,
    read_answers,
    write_alpaca_eval,
    write_answers,
)
from sampo.evaluation.answers.backends import RowSampler, TransformersBackend, end_tokens
from sampo.evaluation.answers.generate import Sampling, generate, read_missing
from sampo.evaluation.answers.prompts import Question, load_prompts
from sampo.evaluation.texts import Texts, tokenizer_hash
from sampo.io.journal import read_rows
from sampo.models.inference import fingerprint, load_causal
from sampo.models.load import load_tokenizer

DRAWN = Sampling(max_tokens=12, temperature=1.0, seed=3)
GREEDY = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model whose answers end now and then, and whose own settings would make others of them."""
    path = save_model(tmp_path_factory.mktemp("model"), seed=5)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=9.0,
        max_new_tokens=3,
        eos_token_id=[1, 7],
        pad_token_id=0,
    )
    model.save_pretrained(path)
    return path


def questions(n: int, seed: int = 0) -> list[Question]:
    rng = random.Random(seed)
    return [Question(" ".join(rng.choices(WORDS, k=rng.randint(1, 30)))) for _ in range(n)]


def backend(folder: str, batch_size: int = 8, prompt_format: str = "auto", **settings) -> TransformersBackend:
    texts = Texts(load_tokenizer(folder), prompt_format)
    return TransformersBackend(folder, load_causal(folder), texts, batch_size=batch_size, **settings)


def texts_of(path) -> list[str]:
    return [answer.answer for answer in read_answers(path)]


# --- what is generated ---------------------------------------------------------------------------------------------


def by_hand(folder: str, prompt: str, sampling: Sampling, seed: int | None) -> tuple[list[int], str]:
    """Token by token, one prompt, the whole row computed anew each time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    numbers = None if seed is None else np.random.default_rng(seed).integers(2**32, size=sampling.max_tokens) / 2**32
    answer: list[int] = []
    while len(answer) < sampling.max_tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1].double()
        if numbers is None:
            token = int(logits.argmax())
        else:
            shares = np.cumsum(torch.softmax(logits / sampling.temperature, 0).numpy())
            token = int(np.flatnonzero(shares > numbers[len(answer)] * shares[-1])[0])
        answer.append(token)
        if token in (1, 7):
            return answer, "eos"
    return answer, "length"


@pytest.mark.parametrize(
    "sampling", [GREEDY, DRAWN, replace(DRAWN, temperature=0.7)], ids=["greedy", "drawn", "cooler"]
)
def test_answers_are_those_of_a_loop_over_single_tokens(sampling, folder, tmp_path):
    from sampo.evaluation.answers.generate import Job

    asked = questions(12)
    report = generate(asked, backend(folder), sampling, tmp_path / "a.jsonl")
    tokenizer, stops = AutoTokenizer.from_pretrained(folder), []
    for question, answer in zip(asked, read_answers(tmp_path / "a.jsonl"), strict=True):
        seed = None if sampling.greedy else Job(question, 0).seed(sampling)
        ids, stop = by_hand(folder, question.prompt, sampling, seed)
        assert (answer.prompt, answer.tokens, answer.stop) == (question.prompt, len(ids), stop)
        said = ids[:-1] if stop == "eos" else ids
        assert answer.answer == tokenizer.decode(said, skip_special_tokens=True)
        stops.append(stop)
    assert set(stops) == {"eos", "length"} or sampling.greedy
    assert (report.answers, report.reused, report.cut) == (12, 0, stops.count("length"))


@pytest.mark.parametrize("sampling", [GREEDY, replace(DRAWN, samples=2)], ids=["greedy", "drawn"])
def test_an_answer_does_not_depend_on_its_batch_nor_on_the_other_prompts(sampling, folder, tmp_path):
    asked = questions(10)
    for name, size, these in (("one", 1, asked), ("three", 3, asked[::-1]), ("some", 8, asked[2:5])):
        generate(these, backend(folder, size), sampling, tmp_path / name)
    one = {answer.key: answer for answer in read_answers(tmp_path / "one")}
    for name in ("three", "some"):
        for answer in read_answers(tmp_path / name):
            assert answer == one[answer.key]
    assert len({answer.answer for answer in one.values()}) > 5


def test_the_seed_and_the_sample_make_other_answers_and_the_global_generator_none(folder, tmp_path):
    asked = questions(4)
    for name, sampling in (("a", DRAWN), ("again", DRAWN), ("b", replace(DRAWN, seed=4))):
        torch.manual_seed(len(name))
        generate(asked, backend(folder), sampling, tmp_path / name)
    assert texts_of(tmp_path / "a") == texts_of(tmp_path / "again") != texts_of(tmp_path / "b")
    generate(asked, backend(folder), replace(DRAWN, samples=3), tmp_path / "three")
    three = read_answers(tmp_path / "three")
    assert [answer.sample for answer in three] == [0, 1, 2] * 4
    assert [answer.answer for answer in three if answer.sample == 0] == texts_of(tmp_path / "a")
    assert len({answer.answer for answer in three}) > 8


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (4, 1.0, 1.0), (0, 0.7, 1.0), (5, 0.9, 0.5)]
)
def test_tokens_are_drawn_with_their_probabilities(top_k, top_p, temperature):
    rng, n = np.random.default_rng(0), 20_000
    logits = rng.normal(size=9).astype(np.float32) * 1.5
    sampling = Sampling(max_tokens=2, temperature=temperature, top_k=top_k, top_p=top_p)
    draw = RowSampler(list(range(n)), 4, sampling)
    scores = torch.from_numpy(logits).expand(n, 9)
    for step in range(2):
        found = draw(torch.zeros(n, 4 + step, dtype=torch.long), scores)
        assert (torch.isfinite(found).sum(dim=1) == 1).all()
        counts = np.bincount(found.argmax(dim=1).numpy(), minlength=9) / n
        assert np.abs(counts - distribution(logits, top_k, top_p, temperature)).max() < 4 * 0.5 / np.sqrt(n)


def distribution(logits, top_k, top_p, temperature) -> np.ndarray:
    p = np.exp(logits.astype(float) / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    p[order[before >= top_p]] = 0
    return p / p.sum()


def test_a_token_without_probability_is_never_drawn():
    scores = torch.full((200, 6), -torch.inf)
    scores[:, 3] = 0.0
    draw = RowSampler(list(range(200)), 1, Sampling(max_tokens=1, temperature=1.0))
    draw.numbers[0], draw.numbers[1] = 0.0, 1 - 2**-32
    assert (draw(torch.zeros(200, 1, dtype=torch.long), scores).argmax(dim=1) == 3).all()


def test_a_record_says_what_the_answer_depends_on(folder, tmp_path):
    generate([Question("w1 w2", {"reference": "w3"})], backend(folder), replace(DRAWN, top_k=5), tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row.pop("answer")
    assert row.pop("tokens") in range(1, 13)
    assert row.pop("stop") in ("eos", "length")
    assert len(row.pop("template")) == 16
    assert row.pop("weights").startswith("sha256:")
    assert row == {
        "prompt": "w1 w2",
        "prompt_id": prompt_id("w1 w2"),
        "sample": 0,
        "tokenizer": tokenizer_hash(make_tokenizer()),
        "model": folder,
        "backend": "transformers",
        "dtype": "float32",
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 5, "max_tokens": 12},
        "seed": 3,
        "extra": {"reference": "w3"},
    }


def test_a_further_end_token_ends_answers_and_must_exist(folder, tmp_path):
    asked = questions(8)
    generate(asked, backend(folder), DRAWN, tmp_path / "a")
    common = max(WORDS, key=lambda word: sum(word in text.split() for text in texts_of(tmp_path / "a")))
    generate(asked, backend(folder, stop_tokens=[common]), DRAWN, tmp_path / "b")
    for full, cut in zip(texts_of(tmp_path / "a"), texts_of(tmp_path / "b"), strict=True):
        assert cut.split() == full.split()[: full.split().index(common)] if common in full.split() else cut == full
    with pytest.raises(ValueError, match="`stop_tokens` must be tokens of the model"):
        backend(folder, stop_tokens=["nothing"])
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an end token"):
        end_tokens(tokenizer, None)


def test_raw_prompts_go_in_as_they_are_and_conversations_need_a_template(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(Texts(tokenizer, "raw").prompt("w1 w2")) == "w1 w2"
    assert "assistant" in tokenizer.decode(Texts(tokenizer).prompt("w1 w2"))
    bare = make_tokenizer(chat=False)
    assert Texts(bare).template_hash is None
    assert Texts(bare, chat_template="{{ messages[0]['content'] }}").chat
    with pytest.raises(ValueError, match="`format: chat` must have a chat template"):
        Texts(bare, "chat")
    with pytest.raises(ValueError, match="A conversation needs a chat template"):
        Texts(bare).prompt([{"role": "user", "content": "w1"}])


def test_prompts_that_leave_no_room_are_counted_before_anything_is_generated(folder, tmp_path):
    asked = [*questions(3), Question("w1 " * 250)]
    with pytest.raises(ValueError, match=r"got 1 of 4 that do not; the first: 25[0-9] tokens"):
        generate(asked, backend(folder), GREEDY, tmp_path / "a")
    assert not read_rows(tmp_path / "a")
    report = generate(asked, backend(folder), GREEDY, tmp_path / "a", on_long_prompts="drop")
    assert (report.answers, report.failures) == (3, {"too_long": 1})


# --- stop and go on ------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(folder, tmp_path):
    asked = questions(11)
    generate(asked, backend(folder, 2), DRAWN, tmp_path / "whole")

    def stop(done, of):
        if done >= 4:
            raise KeyboardInterrupt

    path = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        generate(asked, backend(folder, 2), DRAWN, path, progress=stop)
    assert len(read_rows(path)) == 4
    path.write_bytes(path.read_bytes()[:-9])  # and killed in the middle of a line
    report = generate(asked, backend(folder, 3), DRAWN, path)
    assert (report.reused, report.answers) == (3, 11)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert [answer.prompt for answer in read_answers(path)] == [question.prompt for question in asked]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": replace(DRAWN, seed=9)}, "`seed`"),
        ({"sampling": replace(DRAWN, max_tokens=13)}, "`sampling`"),
        ({"sampling": GREEDY}, "`sampling`"),
        ({"prompt_format": "raw"}, "`template`"),
        ({"weights": True}, "`weights`"),
        ({"asked": 3}, "1 other prompts"),
    ],
)
def test_answers_of_other_settings_are_not_gone_on_with(change, named, folder, tmp_path):
    generate(questions(4), backend(folder), DRAWN, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    other = folder
    if "weights" in change:
        model, other = AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "other")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.5
        model.save_pretrained(other)
        make_tokenizer().save_pretrained(other)
    model = backend(other, prompt_format=change.get("prompt_format", "auto"))
    model.about |= {"model": folder}
    with pytest.raises(ValueError, match=named):
        generate(questions(4)[: change.get("asked", 4)], model, change.get("sampling", DRAWN), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"samples": 0}, {"top_k": -1}]
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        Sampling(**{"temperature": 1.0} | wrong)


@pytest.mark.parametrize("idle", [{"top_p": 0.9}, {"top_k": 3}, {"samples": 2}])
def test_what_has_no_effect_is_refused(idle):
    with pytest.raises(ValueError, match="nothing is sampled"):
        Sampling(**idle)


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_changes_answers_and_weights_and_may_stand_for_its_model(task, folder, tmp_path):
    """Merged it says the same: the base model's own repetition penalty must not come in under the adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type=task),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapter, asked = str(tmp_path / "adapter"), questions(6)
    texts = Texts(load_tokenizer(folder))
    for name, loaded in (
        ("base", load_causal(folder)),
        ("beside", load_causal(folder, adapter=adapter)),
        ("alone", load_causal(adapter)),
        ("merged", replace(load_causal(folder), model=adapted.merge_and_unload())),
    ):
        before = loaded.model.generation_config
        generate(asked, TransformersBackend("m", loaded, texts), DRAWN, tmp_path / name)
        assert loaded.model.generation_config is before
    assert texts_of(tmp_path / "beside") == texts_of(tmp_path / "alone") == texts_of(tmp_path / "merged")
    assert texts_of(tmp_path / "beside") != texts_of(tmp_path / "base")
    base, beside = (read_answers(tmp_path / name)[0].weights for name in ("base", "beside"))
    assert beside.startswith(f"{base}+sha256:")
    assert load_causal(adapter).base == folder
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(folder).get_vocab()


def test_the_fingerprint_sees_a_changed_weight_and_not_the_name_of_the_folder(tmp_path):
    first = fingerprint(save_model(tmp_path / "a", seed=1), None)
    assert fingerprint(save_model(tmp_path / "b", seed=1), None) == first
    assert fingerprint(save_model(tmp_path / "c", seed=2), None) != first
    (tmp_path / "b" / "training_args.bin").write_bytes(b"names its output folder")
    assert fingerprint(str(tmp_path / "b"), None) == first


def test_tokens_are_those_of_a_tokenizer_wherever_it_lies_and_whatever_special_tokens_it_has(tmp_path):
    save_model(tmp_path / "a")
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    own = tokenizer_hash(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=2)  # leaves its settings in the tokenizer
    tokenizer.save_pretrained(tmp_path / "b")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "b"))) == own
    other = make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_hash(other) != own


# --- prompt files --------------------------------------------------------------------------------------------------


def rows_file(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_prompts_come_from_all_the_formats_and_the_same_ones_have_the_same_id(tmp_path):
    user = [{"role": "user", "content": "Name a river."}]
    formats = {
        "plain": [{"prompt": "Name a river.", "id": 7, "reference": "Elbe", "other": 1}],
        "talk": [{"prompt": user}],
        "alpaca": [{"instruction": "Name a river.", "output": "Elbe", "dataset": "mine"}],
        "messages": [{"messages": [*user, {"role": "assistant", "content": "Elbe"}]}],
        "hh": [{side: f"\n\nHuman: Name a river.\n\nAssistant: {side}" for side in ("chosen", "rejected")}],
        "transcript": [{"prompt": "\n\nHuman: Name a river.\n\nAssistant:"}],
        "pairs": [{s: [*user, {"role": "assistant", "content": s}] for s in ("chosen", "rejected")}],
    }
    found = {name: load_prompts(rows_file(tmp_path / f"{name}.jsonl", rows)) for name, rows in formats.items()}
    assert {len(these) for these in found.values()} == {1}
    assert {these[0].prompt_id for these in found.values()} == {prompt_id("Name a river.")}
    assert found["plain"][0].extra == {"id": 7, "reference": "Elbe"}
    assert found["alpaca"][0].extra == {"dataset": "mine"}
    (tmp_path / "list.json").write_text(json.dumps(formats["alpaca"]))
    assert load_prompts(tmp_path / "list.json") == found["alpaca"]
    assert prompt_text(found["hh"][0].prompt) == "Name a river."


def test_a_transcript_of_several_turns_becomes_messages(tmp_path):
    transcript = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: A colour?\n\nAnd why?\n\nAssistant:"
    path = rows_file(tmp_path / "p.jsonl", [{"prompt": transcript}, {"prompt": "Human: as in a story"}])
    several, story = load_prompts(path)
    assert several.prompt == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "A colour?\n\nAnd why?"},
    ]
    assert story.prompt == "Human: as in a story"


def test_a_prompt_that_comes_twice_is_answered_once(tmp_path):
    path = rows_file(tmp_path / "p.jsonl", [{"prompt": text} for text in ("a", "b", "a", "c")])
    assert [question.prompt for question in load_prompts(path)] == ["a", "b", "c"]
    assert [question.prompt for question in load_prompts(path, split="train[1:3]")] == ["b", "a"]


def test_rows_without_a_prompt_are_counted_and_dropped_only_when_asked(tmp_path, caplog):
    rows = [
        {"prompt": "a"},
        {"prompt": " "},
        {"prompt": None},
        {"prompt": 3},
        {"prompt": [{"content": "x"}]},
        {"prompt": "b"},
    ]
    path = rows_file(tmp_path / "p.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"prompt": "cut o')
    with pytest.raises(ValueError, match=r"got 5 of 7 rows .* first at rows \[1, 2, 3, 4, 6\]"):
        load_prompts(path)
    assert [question.prompt for question in load_prompts(path, on_bad_rows="drop")] == ["a", "b"]
    assert "dropped 5 of 7 rows" in caplog.text
    with pytest.raises(ValueError, match="must stand in a column"):
        load_prompts(rows_file(tmp_path / "q.jsonl", [{"question": "a"}]))


@pytest.mark.skipif(not HH_FILE.is_file(), reason="HH-RLHF pairs lie beside the repository, not in it")
def test_real_transcripts_give_their_prompts():
    found = load_prompts(HH_FILE, split="train[:300]", on_bad_rows="drop")
    assert 250 < len(found) <= 300
    assert {question.prompt[-1]["role"] for question in found} == {"user"}
    assert max(len(question.prompt) for question in found) > 2


# --- answers and AlpacaEval ----------------------------------------------------------------------------------------


def test_answers_survive_the_file(tmp_path):
    answers = [
        Answer(prompt="é\u2028\n", answer="", tokens=0, stop="eos", extra={"a": [1, None]}),
        Answer(prompt=[{"role": "user", "content": "x"}], answer='"\\', sample=2, sampling={"top_p": 0.5}),
    ]
    write_answers(tmp_path / "a", answers)
    assert read_answers(tmp_path / "a") == answers


def test_alpaca_eval_files_are_written_and_read(tmp_path):
    answers = [
        Answer(prompt="Name a river.", answer="Elbe é", model="m", extra={"dataset": "mine"}),
        Answer(prompt=[{"role": "user", "content": "And a city?"}], answer="Oslo", model="m"),
    ]
    path = tmp_path / "outputs.json"
    write_alpaca_eval(path, answers)
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"dataset": "mine", "instruction": "Name a river.", "output": "Elbe é", "generator": "m"},
        {"instruction": "And a city?", "output": "Oslo", "generator": "m"},
    ]
    back = read_answers(path)
    assert [(a.prompt_id, a.answer, a.model, a.extra) for a in back] == [
        (a.prompt_id, a.answer, a.model, a.extra) for a in answers
    ]
    assert {answer.stop for answer in back} == {"unknown"}
    talk = Answer(prompt=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2, answer="z")
    for bad in (talk, replace(answers[0], sample=1)):
        with pytest.raises(ValueError, match="must have one instruction and one output"):
            write_alpaca_eval(path, [bad])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a"}, "must have one of"),
        ({"prompt": "a", "answer": 3}, "`answer` must be a string"),
        ({"prompt": "a", "answer": "b", "prompt_id": "0"}, "`prompt_id` must be the hash"),
        ({"prompt": "a", "answer": "b", "stop": "end"}, "`stop` must be one of"),
        ({"prompt": 3, "answer": "b"}, "`prompt` must be a string or a list"),
        ({"prompt": "ok", "answer": "again"}, "got rows 1 and 2 with the same"),
    ],
)
def test_what_is_no_answer_is_named_with_its_row(row, fault, tmp_path):
    path = rows_file(tmp_path / "a.jsonl", [{"prompt": "ok", "answer": "x"}, row])
    with pytest.raises(ValueError, match="2.*" + fault if "rows 1" not in fault else fault):
        read_answers(path)


def test_somebody_elses_answers_keep_their_fields(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b c", "score": 3, "generator": "m"}])
    (answer,) = read_answers(path)
    assert (answer.answer, answer.words, answer.chars, answer.model, answer.extra) == ("b c", 2, 3, "m", {"score": 3})


# --- a server ------------------------------------------------------------------------------------------------------


def test_a_server_answers_with_seeds_of_its_own_for_each_prompt_and_a_second_run_asks_nothing(tmp_path):
    def rule(request, number):
        assert request["max_tokens"] == 12
        return completion(request["messages"][-1]["content"][::-1], "stop" if number % 2 else "length")

    path = rows_file(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(6)])
    with Server(rule) as server:
        command = ["generate", "m", "--url", server.url, "--prompts", path, "--out", str(tmp_path / "a.jsonl")]
        command += ["--max_tokens", "12", "--temperature", "1", "--options", '{"stop": ["END"]}']
        assert main(command) == 0
        assert main(command) == 0
    assert len(server.requests) == 6
    assert len({request["seed"] for request in server.requests}) == 6
    assert {tuple(request["stop"]) for request in server.requests} == {("END",)}
    answers = read_answers(tmp_path / "a.jsonl")
    assert [answer.answer for answer in answers] == [f"question {i}"[::-1] for i in range(6)]
    assert {answer.tokens for answer in answers} == {7}
    assert {answer.stop for answer in answers} == {"eos", "length"}
    assert answers[0].backend == server.url


def test_what_a_server_does_not_answer_is_missing_and_counted(tmp_path, capsys):
    kinds = {
        0: Reply(b"too long", 400),
        1: Reply(b"not json"),
        2: completion(None, refusal="no"),
        3: completion("x", "content_filter"),
        4: completion(None),
    }
    fault = {"on": True}

    def rule(request, number):
        place = int(request["messages"][-1]["content"].split()[-1])
        return kinds[place] if fault["on"] and place in kinds else completion("fine")

    path = rows_file(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(9, -1, -1)])
    with Server(rule) as server:
        command = ["generate", "m", "--url", server.url, "--prompts", path, "--out", str(tmp_path / "a.jsonl")]
        with pytest.raises(SystemExit) as ended:
            main([*command, "--concurrency", "1"])
        assert ended.value.code == 3
        said = capsys.readouterr().out
        for reason, count in (("rejected", 1), ("broken_reply", 1), ("refused", 2), ("no_text", 1)):
            assert f"{count} answers are missing: {reason}" in said
        answered = {answer.prompt_id for answer in read_answers(tmp_path / "a.jsonl")}
        missing = read_missing(tmp_path / "a.jsonl")
        assert len(answered) == len(missing) == 5
        assert answered | {one.prompt_id for one in missing} == {prompt_id(f"question {i}") for i in range(10)}
        reasons = {one.prompt_id: one.reason for one in missing}
        assert reasons[prompt_id("question 1")] == "broken_reply"
        fault["on"] = False
        assert main(command) == 0
        assert read_missing(tmp_path / "a.jsonl") == []
    assert len(server.requests) == 15
    assert len(read_answers(tmp_path / "a.jsonl")) == 10


def test_a_server_that_is_gone_ends_the_run_with_its_own_code(tmp_path):
    path = rows_file(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(40)])
    with Server(lambda request, number: completion("x") if number < 10 else Reply(b"", 503)) as server:
        command = ["generate", "m", "--url", server.url, "--prompts", path, "--out", str(tmp_path / "a.jsonl")]
        with pytest.raises(SystemExit) as ended:
            main([*command, "--retries", "0", "--concurrency", "2"])
    assert ended.value.code == 4
    assert len(read_answers(tmp_path / "a.jsonl")) == 10
    assert len(server.requests) < 20


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_generates_exports_and_goes_on(folder, tmp_path, capsys):
    path = rows_file(tmp_path / "p.jsonl", [{"instruction": question.prompt} for question in questions(5)])
    command = ["generate", folder, "--prompts", path, "--out", str(tmp_path / "a.jsonl"), "--max_tokens", "6"]
    command += ["--alpaca_eval", str(tmp_path / "o.json"), "--device", "cpu"]
    assert main(command) == 0
    assert "5 answers, 0 of them there before" in capsys.readouterr().out
    assert [row["output"] for row in json.loads((tmp_path / "o.json").read_text())] == texts_of(tmp_path / "a.jsonl")
    assert main(command) == 0
    assert "5 answers, 5 of them there before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--backend", "endpoint"], "`url` goes with `backend` endpoint"),
        (["--top_p", "0.5"], "nothing is sampled"),
        (["--prompts", "nowhere.jsonl"], "does not exist"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(words, fault, folder, tmp_path):
    path = rows_file(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with pytest.raises(SystemExit, match=fault):
        main(["generate", folder, "--prompts", path, "--out", str(tmp_path / "a.jsonl"), *words])


def test_two_processes_give_the_answers_of_one_and_the_first_one_writes_them(folder, tmp_path):
    path = rows_file(tmp_path / "p.jsonl", [{"prompt": question.prompt} for question in questions(11)])
    sampling = ["--prompts", path, "--samples", "2", "--temperature", "1", "--max_tokens", "12", "--batch_size", "4"]
    assert main(["generate", folder, *sampling, "--device", "cpu", "--out", str(tmp_path / "one.jsonl")]) == 0
    rows = (tmp_path / "one.jsonl").read_bytes()
    (tmp_path / "two.jsonl").write_bytes(b"".join(rows.splitlines(keepends=True)[3:7]))  # as if it had been stopped
    words = [sys.executable, "-m", "sampo.cli", "generate", folder, *sampling, "--out", str(tmp_path / "two.jsonl")]
    words += ["--device", "cpu", "--num_processes", "2"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("22 answers, 4 of them there before") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == rows
    done = subprocess.run([*words, "--prompts", "nowhere.jsonl"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("sampo generate: error") == done.stderr.count("error") == 1


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--num_processes", "0"], "`num_processes` must be at least 1, got 0"),
        (["--num_processes", "2", "--url", "http://localhost:1/v1"], "`num_processes` goes with a model of this"),
        (["--num_processes", "2", "--device", "cuda:1"], "`device` names one device for one process"),
        (["--num_processes", "4096"], "must be at most the number of GPUs that torch can use, .*, got 4096"),
        (["--gpu_ids", ",".join(map(str, range(4096)))], "must be at most the number of GPUs .* got 4096"),
    ],
)
def test_processes_that_cannot_be_started_are_refused(words, fault, folder):
    with pytest.raises(SystemExit, match=fault):
        main(["generate", folder, "--prompts", "p.jsonl", "--out", "a.jsonl", *words])


def test_a_server_is_asked_by_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="A server must be asked by one process, got several"):
        main(["generate", "m", "--prompts", "p", "--out", "o", "--url", "http://localhost:1/v1"])


def test_vllm_is_named_as_a_server(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "model", "--prompts", "p.jsonl", "--out", "a.jsonl", "--backend", "vllm"])
    assert "start `vllm serve MODEL` and give `--url http://localhost:8000/v1`" in capsys.readouterr().err


def test_a_wide_vocabulary_is_drawn_from_in_the_order_of_ids():
    """Many tokens of nearly equal weight: the sums must not lose the small ones to rounding."""
    size = 150_000
    scores = torch.zeros(1, size)
    draw = RowSampler([0], 1, Sampling(max_tokens=1, temperature=1.0))
    for share in (0.0, 0.123456789, 0.5, 1 - 2**-32):
        draw.numbers[0, 0] = share
        token = int(draw(torch.zeros(1, 1, dtype=torch.long), scores).argmax())
        assert abs(token - int(share * size)) <= 1
