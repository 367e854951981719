"""`sampo pairs` from answers to pairs, with every kind of judge, and `sampo filter`."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from judge_server import Reply, Server, completion, goods, judge
from tiny import WORDS, make_pairs, save_model, training_options

from sampo import SamPOConfig, SamPOTrainer, cli, load_preferences
from sampo.evaluation.answers.answers import Answer, prompt_id, write_answers
from sampo.evaluation.judging.rule_judges import RuleJudge, longer_judge
from sampo.io.journal import read_rows
from sampo.pairs import scores
from sampo.pairs.make import STATUSES, sort_answers


def words(rng, n=8):
    return " ".join(rng.choice(["good", "plain", "bad", "fine"]) for _ in range(rng.randint(1, n)))


def answers_to(prompts, samples, seed=0, model="m"):
    rng = random.Random(seed)
    return [
        Answer(prompt=f"question {p}", answer=f"{words(rng)} {model}{s}", sample=s, model=model)
        for p in range(prompts)
        for s in range(samples)
    ]


def groups_of(answers):
    return [list(group) for _, group in itertools.groupby(answers, key=lambda answer: answer.prompt_id)]


def run(*arguments, code=0):
    """Run a command of sampo in this process."""
    try:
        found = cli.main([str(word) for word in arguments])
    except SystemExit as error:
        found = error.code
    assert found == code


def account(out):
    return read_rows(out.with_suffix(".account.jsonl"))


# --- from a model to a trained model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_answers_of_a_model_become_pairs_that_it_is_trained_on(tmp_path, name):
    model, prompts, out = save_model(tmp_path / "model"), tmp_path / "prompts.jsonl", tmp_path / name
    rng = random.Random(0)
    asked = {" ".join(rng.choices(WORDS, k=5)) for _ in range(12)}
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    drawn = ["--samples", 4, "--temperature", 1, "--max_tokens", 60, "--device", "cpu"]
    run("generate", model, "--prompts", prompts, "--out", tmp_path / "answers.jsonl", *drawn)
    run("pairs", "--answers", tmp_path / "answers.jsonl", "--judge", "longer", "--out", out)
    pairs = load_preferences(out)
    assert 4 <= len(pairs) <= 12
    answers = read_rows(tmp_path / "answers.jsonl")
    by_text = {(row["prompt"], row["answer"]): row for row in answers}
    for row in pairs:
        assert [message["role"] for message in row["prompt"] + row["chosen"]] == ["user", "assistant"]
        mine = [a for a in answers if a["prompt"] == row["prompt"][0]["content"] and a["stop"] == "eos"]
        texts = [a["answer"] for a in mine if a["answer"].strip()]
        assert len(row["chosen"][0]["content"]) == max(map(len, texts)) == row["chosen_score"]
        assert len(row["rejected"][0]["content"]) == min(map(len, texts)) == row["rejected_score"]
        made_of = by_text[row["prompt"][0]["content"], row["chosen"][0]["content"]]
        assert (row["chosen_length"], row["length_unit"]) == (made_of["tokens"], "tokens")
        assert json.loads(row["chosen_sampling"])["temperature"] == 1
        assert (row["judge"], row["choice"], row["seed"]) == ("longer", "best_worst", 0)
    used = [one for one in account(out) if one["status"] == "used"]
    assert len(used) == len(pairs)
    assert len(account(out)) == 12
    config = SamPOConfig(**training_options(tmp_path / "out", max_steps=1))
    trainer = SamPOTrainer(model=model, args=config, train_dataset=pairs)
    assert np.isfinite(trainer.train().training_loss)


# --- what can be used ------------------------------------------------------------------------------------------------


def test_every_prompt_has_one_status_and_every_answer_one_place(tmp_path):
    rows = [
        *(("used", text, "eos") for text in ("a", "bb", "a", "  ", "cccc")),  # one repeated, one empty
        *(("cut", "a", "eos"), ("cut", "bbb", "length")),
        *(("too few", "a", "eos"), ("too few", "a", "eos")),
        *(("no spread", "aa", "eos"), ("no spread", "bb", "eos")),
        *(("no pair", "a", "eos"), ("no pair", "b" * 50, "eos")),
    ]
    answers = [Answer(prompt=p, answer=t, stop=s, sample=i) for i, (p, t, s) in enumerate(rows)]
    write_answers(tmp_path / "a.jsonl", answers)
    missing = [("cut", 2), ("unanswered", 0), ("unanswered", 1)]
    lost = [{"prompt_id": prompt_id(p), "sample": i, "reason": "timeout", "detail": ""} for p, i in missing]
    (tmp_path / "a.missing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lost))
    out = tmp_path / "pairs.jsonl"
    words = ["--judge", "longer", "--choice", "capped", "--limit", 10, "--length_unit", "characters", "--out", out]
    run("pairs", "--answers", tmp_path / "a.jsonl", *words)
    names = {answer.prompt_id: answer.prompt for answer in answers} | {prompt_id("unanswered"): "unanswered"}
    found = {names[one["prompt_id"]]: one for one in account(out)}
    assert {name: one["status"].replace("_", " ") for name, one in found.items()} == {name: name for name in found}
    for name, one in found.items():
        assert one["usable"] + one["cut"] + one["empty"] + one["repeated"] == sum(row[0] == name for row in rows)
    assert (found["used"]["repeated"], found["used"]["empty"], found["cut"]["cut"]) == (1, 1, 1)
    assert {name: one["missing"] for name, one in found.items() if one["missing"]} == {"cut": 1, "unanswered": 2}
    (pair,) = load_preferences(out)
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["margin"]) == ("used", "cccc", "a", 3)
    run("pairs", "--answers", tmp_path / "a.jsonl", *words, "--use_cut")
    assert {names[one["prompt_id"]]: one["status"] for one in account(out)}["cut"] == "used"
    page = out.with_suffix(".md").read_text()
    assert all(text in page for text in STATUSES.values())
    assert "| all | 6 |" in page
    assert "Not generated: 3 further answers." in page
    (tmp_path / "a.missing.jsonl").write_text('{"prompt_id": "x", "sample": 0, "reason": "timeout"}\n')
    with pytest.raises(SystemExit, match=r"a\.missing\.jsonl.*line 1.*detail.*generate again"):
        cli.main(["pairs", "--answers", str(tmp_path / "a.jsonl"), *map(str, words)])


def test_answers_that_the_judge_cannot_score_are_counted_and_the_rest_is_used(tmp_path):
    answers = [
        Answer(prompt=p, answer=text, sample=i, extra=extra)
        for p, extra in (("known", {"reference": "town1"}), ("unknown", {}))
        for i, text in enumerate(("it is town1", "it is town2"))
    ]
    write_answers(tmp_path / "a.jsonl", answers)
    out = tmp_path / "pairs.jsonl"
    run("pairs", "--answers", tmp_path / "a.jsonl", "--judge", "contains", "--out", out, code=3)
    assert [one["status"] for one in account(out)] == ["used", "failed"]
    assert [one["failed"] for one in account(out)] == [0, 2]
    (pair,) = load_preferences(out)
    assert (pair["chosen"], pair["rejected"]) == ("it is town1", "it is town2")


def test_the_order_of_files_and_samples_does_not_decide_ties():
    """With equal scores the first counts, so which one is first must be drawn."""
    systems = [answers_to(400, 1, model="a"), answers_to(400, 1, model="b")]
    first = [one.usable[0].model for one in sort_answers(systems, use_cut=False, seed=0)]
    assert 150 < first.count("a") < 250
    again = [one.usable[0].model for one in sort_answers([each[::-1] for each in systems], use_cut=False, seed=0)]
    assert again == first[::-1]
    assert first != [one.usable[0].model for one in sort_answers(systems, use_cut=False, seed=1)]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_scorer_sees_each_answer_once_and_continues_where_it_was_stopped(tmp_path):
    seen = []

    def rule(prompt, answer, reference):
        if len(seen) == 700:
            raise KeyboardInterrupt
        seen.append((prompt, answer))
        return len(answer)

    counting = RuleJudge("counting", rule)
    groups = groups_of(answers_to(300, 4))
    journal = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scores.score_once(counting, groups, journal)
    assert len(read_rows(journal)) == scores.AT_ONCE  # one part is complete, the other one is lost
    begun = [*seen]
    seen.clear()
    found = scores.score_once(counting, groups[:250], journal)
    assert set(seen).isdisjoint(begun[: scores.AT_ONCE])
    assert found.groups == [[float(len(answer.answer)) for answer in group] for group in groups[:250]]
    seen.clear()
    assert scores.score_once(counting, groups[:250], journal).groups == found.groups
    assert not seen
    other = RuleJudge("counting", rule, about={"other": "settings"})
    scores.score_once(other, groups[:1], journal)
    assert len(seen) == 4  # the settings of a judge are part of the key


def quality(text):
    return goods(text) - text.split().count("bad")


class ByQuality:
    """A judge of two answers that prefers the first one shown by .1; `broken` answers cannot be judged."""

    name, about = "by_quality", {}

    def __init__(self):
        self.asked = []

    def judge(self, comparisons, progress=None):
        from sampo.evaluation.judging.judges import Verdict

        self.asked += [(c.prompt_id, c.answer_a, c.answer_b) for c in comparisons]
        made = []
        for c in comparisons:
            p = 1 / (1 + np.exp(quality(c.answer_b) - quality(c.answer_a)))
            broken = "broken" in (c.answer_a.split()[0], c.answer_b.split()[0])
            made.append(Verdict(None, "broken") if broken else Verdict(min(1.0, p + 0.1)))
        return made


def mean_preference(a, b):
    def first(x, y):
        return min(1.0, 1 / (1 + np.exp(quality(y) - quality(x))) + 0.1)

    return (first(a, b) + 1 - first(b, a)) / 2


def test_the_schedule_of_all_pairs_equals_a_loop():
    groups, asked = groups_of(answers_to(20, 5)), ByQuality()
    found = scores.compare_all(asked, groups)
    for group, row in zip(groups, found.groups, strict=True):
        texts = [answer.answer for answer in group]
        expected = [np.mean([mean_preference(a, b) for b in texts if b != a]) for a in texts]
        assert row == pytest.approx(expected)
    assert len(asked.asked) == len(set(asked.asked)) == 2 * found.asked == 20 * 5 * 4
    assert 0 < found.orders_agree < 1


def test_the_schedule_of_the_best_finds_it_with_fewer_comparisons():
    groups, asked = groups_of(answers_to(40, 8, seed=3)), ByQuality()
    found = scores.compare_best(asked, groups)
    assert 40 * 7 <= found.asked <= 40 * 13
    assert len(asked.asked) == len(set(asked.asked)) == 2 * found.asked
    for group, row in zip(groups, found.groups, strict=True):
        texts = [answer.answer for answer in group]
        best = next(text for text in texts if quality(text) == max(map(quality, texts)))
        assert row == pytest.approx([mean_preference(text, best) if text != best else 0.5 for text in texts])


def test_comparisons_that_failed_are_left_out_and_counted():
    group = [Answer(prompt="p", answer=text, sample=i) for i, text in enumerate(("good", "bad", "broken x", "fine"))]
    for schedule in scores.SCHEDULES.values():
        found = schedule(ByQuality(), [group], None)
        assert found.groups[0][2] == scores.NOT_COMPARED
        assert found.groups[0][0] > found.groups[0][3] > found.groups[0][1]
        assert found.failures["broken"] >= 2


def test_a_judge_behind_a_url_is_asked_once_and_a_cap_stops_it(tmp_path):
    write_answers(tmp_path / "a.jsonl", answers_to(6, 3))
    out = tmp_path / "pairs.jsonl"
    with Server() as server:
        words = [
            "pairs",
            "--answers",
            tmp_path / "a.jsonl",
            "--judge",
            "endpoint",
            "--url",
            server.url,
            "--model",
            "m",
        ]
        words += ["--out", out, "--cache", tmp_path / "replies.jsonl", "--control_n", 2, "--retries", 0]
        run(*words, "--dry_run")
        assert not server.requests
        run(*words, "--max_requests", 7, code=4)
        assert not out.exists()
        assert len(server.requests) == 7
        run(*words)
        asked = len(server.requests)
        assert asked == 6 * 3 * 2 + 2 * 2  # every two answers and two empty ones, in both orders
        run(*words, "--choice", "all_above")
        assert len(server.requests) == asked  # another choice asks for nothing
    for row in load_preferences(out):
        assert goods(row["chosen"]) > goods(row["rejected"]) or row["margin"] > 0
        assert json.loads(row["judge_settings"])["template"] == "helpfulness"
    assert "Control, an empty answer: wins " in out.with_suffix(".md").read_text()


def test_a_server_that_cannot_be_read_leaves_prompts_without_scores(tmp_path):
    write_answers(tmp_path / "a.jsonl", answers_to(4, 2))
    out = tmp_path / "pairs.jsonl"

    def rule(request, number) -> Reply:
        return completion("no verdict") if "question 0" in json.dumps(request) else judge(request)

    with Server(rule) as server:
        words = ["--judge", "endpoint", "--url", server.url, "--model", "m", "--cache", tmp_path / "c.jsonl"]
        run("pairs", "--answers", tmp_path / "a.jsonl", *words, "--out", out, "--control_n", 0, code=3)
    statuses = [one["status"] for one in account(out)]
    assert statuses[0] == "failed"
    assert "failed" not in statuses[1:]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--margin", 1], "`margin` goes with `choice` all_above, got best_worst"),
        (["--choice", "capped", "--share", 0.2], "`share` goes with `choice` max_margin, got capped"),
        (["--limit", 3], "`limit` goes with `choice` length_matched or capped"),
        (["--choice", "capped", "--limit", "x"], "must be a number such as 100"),
        (["--length_unit", "tokens"], "`length_unit: tokens` must have counts of one tokenizer"),
        (["--out", "pairs.csv"], r"`out` must end in one of \['.jsonl', '.parquet'\]"),
        (["--n", 99], "`n` must be at least 1 and at most the number of prompts"),
        (["--dry_run"], "`dry_run` goes with `judge` endpoint"),
    ],
)
def test_options_that_do_not_go_together_are_refused_and_nothing_is_written(tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    write_answers(Path("a.jsonl"), answers_to(3, 2))
    with pytest.raises(SystemExit, match=text):
        cli.main(["pairs", "--answers", "a.jsonl", "--judge", "longer", *map(str, words)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_prompts_are_drawn_by_the_seed_and_messages_stay_messages(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    answers = [Answer(prompt=prompt, answer=text, sample=i) for i, text in enumerate(("a", "bb"))]
    write_answers(tmp_path / "a.jsonl", answers)
    write_answers(tmp_path / "b.jsonl", answers_to(8, 2))
    out = tmp_path / "pairs.jsonl"
    run("pairs", "--answers", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--judge", "longer", "--out", out)
    rows = read_rows(out)
    assert rows[0]["prompt"] == prompt
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "bb"}]
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)  # one layout in a file
    assert len(load_preferences(out)) == len(rows)
    run("pairs", "--answers", tmp_path / "b.jsonl", "--judge", "longer", "--out", out, "--n", 3)
    assert len(account(out)) == 3


# --- filter ----------------------------------------------------------------------------------------------------------


def lengths(rows):
    return [tuple(len(row[side].split()) for side in ("chosen", "rejected")) for row in rows]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_filter_keeps_the_rows_that_a_loop_keeps_with_all_their_columns(tmp_path, name, capsys):
    pairs = make_pairs(60).add_column("source", [f"s{i}" for i in range(60)])
    pairs.to_json(tmp_path / "pairs.jsonl")
    rows = read_rows(tmp_path / "pairs.jsonl")
    out = tmp_path / name
    run("filter", tmp_path / "pairs.jsonl", "--cap", 4, "--match", "50%", "--out", out)
    by_cap = [abs(c - r) <= 4 for c, r in lengths(rows)]
    kept = [cap and abs(c - r) <= max(c, r) / 2 for cap, (c, r) in zip(by_cap, lengths(rows), strict=True)]
    expected = [row for row, keep in zip(rows, kept, strict=True) if keep]
    assert [dict(row) for row in load_preferences(out)] == expected
    assert 0 < len(expected) < 60
    said = capsys.readouterr().out
    table = {line.split("  ")[0]: line.split() for line in said.splitlines() if line.strip()}
    assert table["before"][-1] == "60"
    assert int(table["lost by cap 4"][4]) == 60 - sum(by_cap)
    assert int(table["lost by match 50%"][4]) == sum(by_cap) - len(expected)
    assert table["after"][-1] == str(len(expected))
    assert "| chosen is longer |" in out.with_suffix(".md").read_text()


def test_a_balanced_filter_has_both_sides_in_tokens(tmp_path):
    model = save_model(tmp_path / "model")
    mixed = [
        *make_pairs(60, longer="chosen", conversational=True),
        *make_pairs(20, seed=1, longer="rejected", conversational=True),
    ]
    Dataset.from_list(mixed).to_json(tmp_path / "pairs.jsonl")
    out = tmp_path / "out.jsonl"
    run("filter", tmp_path / "pairs.jsonl", "--balance", "--tokenizer", model, "--out", out)
    gaps = [
        len(row["chosen"][0]["content"].split()) - len(row["rejected"][0]["content"].split())
        for row in load_preferences(out)
    ]
    assert sum(gap > 0 for gap in gaps) == sum(gap < 0 for gap in gaps) > 5
    first = out.read_text()
    run("filter", tmp_path / "pairs.jsonl", "--balance", "--tokenizer", model, "--out", out)
    assert out.read_text() == first
    run("filter", tmp_path / "pairs.jsonl", "--balance", "--tokenizer", model, "--out", out, "--seed", 1)
    assert out.read_text() != first


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "A filter must be given"),
        (["--cap", "20%"], "`cap` must be a number, got 20%"),
        (["--match", "20"], "`match` must be a share such as 20%, got 20"),
        (["--cap", "0"], "must leave a pair, got none of 4"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(tmp_path, words, text):
    make_pairs(4, longer="chosen").to_json(tmp_path / "pairs.jsonl")
    with pytest.raises(SystemExit, match=text):
        cli.main(["filter", str(tmp_path / "pairs.jsonl"), *words, "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_the_longer_judge_scores_what_it_compares():
    group = [Answer(prompt="p", answer="a" * n, sample=n) for n in (3, 9, 5)]
    assert longer_judge().score(group) == [3, 9, 5]
