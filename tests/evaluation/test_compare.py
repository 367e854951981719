"""`sampo compare`: each number against a loop over the files, and what must not be compared."""

import csv
import json
import math
import random
from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from sampo.cli import main
from sampo.evaluation.answers.answers import Answer, read_answers, write_answers
from sampo.evaluation.judging.judges import Judgement, drawn_prompts
from sampo.evaluation.results.comparing import compare as compare_runs
from sampo.evaluation.results.comparing import shared_prompts
from sampo.evaluation.results.difficulty import difficulty_from
from sampo.evaluation.results.judged import AnswerFile, Judged, read_judged
from sampo.evaluation.results.length_control import length_controlled
from sampo.evaluation.results.verdicts import compare_orders
from sampo.io import records as results

N = 80
SYSTEMS = {"dpo": (0.55, 6), "sampo": (0.75, 3), "sft": (0.5, 4)}  # share of right answers, words of chatter


def answers(name: str, right: float, chatter: int, prompts: int = N) -> list[Answer]:
    rng = random.Random(name)
    found = []
    for i in range(prompts):
        words = [f"town{i}" if rng.random() < right else "nowhere", *["so"] * rng.randint(0, 2 * chatter)]
        more = {"tokens": len(words) + 1, "tokenizer": "words", "stop": "length" if rng.random() < 0.1 else "eos"}
        found.append(Answer(prompt=f"where is {i}?", answer=" ".join(words), extra={"reference": f"town{i}"}, **more))
    return found


def judge(folder: Path, name: str, judge_: str = "contains", baseline: str = "sft") -> str:
    out = folder / f"{name}-{judge_}.jsonl"
    words = {"system": folder / f"{name}.jsonl", "baseline": folder / f"{baseline}.jsonl", "out": out}
    assert main(["judge", *(str(w) for k, v in words.items() for w in (f"--{k}", v)), "--judge", judge_]) == 0
    return str(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    for name, (right, chatter) in {**SYSTEMS, "third": (0.6, 4)}.items():
        write_answers(place / f"{name}.jsonl", answers(name, right, chatter))
    for name in ("dpo", "sampo", "third"):
        judge(place, name)
    return place


def compare(folder: Path, *words: str, names=("dpo", "sampo", "third"), out: Path | None = None) -> dict:
    out = out or folder / "comparison"
    files = [str(folder / f"{name}-contains.jsonl") for name in names]
    assert main(["compare", "--judgements", *files, "--out", str(out), *words]) == 0
    return json.loads((out.parent / f"{out.name}.json").read_text())


def scores(folder: Path, name: str) -> dict[str, float]:
    """By the rule itself: who names the town."""
    ours, base = ({a.prompt: a for a in read_answers(folder / f"{which}.jsonl")} for which in (name, "sft"))
    right = [{p: a.extra["reference"] in a.answer.split() for p, a in side.items()} for side in (ours, base)]
    return {p: 0.5 + (right[0][p] - right[1][p]) / 2 for p in ours}


def test_every_number_is_that_of_a_loop_over_the_answers(folder, capsys):
    found = compare(folder)
    rows = {row["system"]: row for row in found["systems"]}
    assert list(rows) == ["dpo", "sampo", "third", "sft"]
    base = {a.prompt: a for a in read_answers(folder / "sft.jsonl")}
    for name in ("dpo", "sampo", "third"):
        row, own, ours = rows[name], scores(folder, name), read_answers(folder / f"{name}.jsonl")
        assert row["win_rate"] == pytest.approx(np.mean(list(own.values())))
        assert row["wins"] == sum(score == 1 for score in own.values())
        logs = [math.log(a.tokens / base[a.prompt].tokens) for a in ours]
        assert row["tokens_ratio"] == pytest.approx(math.exp(sum(logs) / N))
        assert row["tokens_ratio_low"] < row["tokens_ratio"] < row["tokens_ratio_high"]
        assert row["characters_longer"] == pytest.approx(np.mean([a.chars > base[a.prompt].chars for a in ours]))
        assert row["cut"] == pytest.approx(np.mean([a.stop == "length" for a in ours]))
        silent = [0.0 if a.extra["reference"] in a.answer.split() else 0.5 for a in base.values()]
        assert row["win_rate/control_empty"] == pytest.approx(np.mean(silent))
    assert rows["sft"]["words_mean"] == pytest.approx(np.mean([a.words for a in base.values()]))
    out = capsys.readouterr().out
    for name, row in rows.items():
        lines = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert len(lines) == {"sft": 1, "dpo": 5, "sampo": 4, "third": 3}[name]  # rates, doubts, lengths, duels
        assert name == "sft" or f"{100 * row['win_rate']:.1f}" in lines[0]


def test_every_two_systems_are_compared_prompt_by_prompt_and_p_is_adjusted(folder):
    duels = compare(folder)["duels"]
    assert [(duel["first"], duel["second"]) for duel in duels] == list(combinations(("dpo", "sampo", "third"), 2))
    p_values = []
    for duel in duels:
        a, b = scores(folder, duel["first"]), scores(folder, duel["second"])
        better, worse = sum(a[p] > b[p] for p in a), sum(a[p] < b[p] for p in a)
        assert (duel["better"], duel["worse"], duel["equal"]) == (better, worse, N - better - worse)
        assert duel["difference"] == pytest.approx(np.mean([a[p] - b[p] for p in a]))
        assert duel["difference_low"] < duel["difference"] < duel["difference_high"]
        p_values.append(stats.binomtest(better, better + worse).pvalue)
        assert duel["p_value"] == pytest.approx(p_values[-1])
    ranks = sorted(range(3), key=lambda i: p_values[i])
    largest = 0.0
    for place, i in enumerate(ranks):
        largest = max(largest, min(1.0, (3 - place) * p_values[i]))
        assert duels[i]["p_holm"] == pytest.approx(largest)
    assert any(duel["p_holm"] > duel["p_value"] for duel in duels)


def test_systems_that_never_differ_take_no_part_in_the_adjustment(folder, tmp_path):
    same = [replace(answer, answer=answer.answer + " indeed") for answer in read_answers(folder / "dpo.jsonl")]
    write_answers(folder / "twin.jsonl", same)
    judge(folder, "twin")
    duels = compare(folder, names=("dpo", "twin", "sampo"), out=tmp_path / "c")["duels"]
    assert (duels[0]["p_value"], duels[0]["p_holm"], duels[0]["difference"]) == (None, None, 0.0)
    assert duels[1]["p_holm"] == pytest.approx(min(1.0, 2 * duels[1]["p_value"]))


def test_files_hold_every_number_with_what_it_depends_on(folder, monkeypatch):
    found = compare(folder, "--n", "50", "--seed", "3", out=folder / "c")
    with open(folder / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, whole in zip(rows, found["systems"], strict=True):
        assert {k: v for k, v in row.items() if v} == {k: str(v) for k, v in whole.items() if v not in (None, "")}
    kept = results.read(folder / "c.records.jsonl")
    by_key = {(r.name, r.config.get("system")): r for r in kept if "first" not in r.config}
    for row in found["systems"][:3]:
        record = by_key["win_rate", row["system"]]
        assert (record.value, record.interval) == (row["win_rate"], (row["win_rate_low"], row["win_rate_high"]))
        assert record.config["n"] == record.n == 50
        assert record.seed == 3
        assert record.config["judged_by"] == {"name": "contains"}
        assert by_key["verbosity/cut", row["system"]].value == row["cut"]
    adjusted = [record.value for record in kept if record.name == "paired/p_holm"]
    assert adjusted == [duel["p_holm"] for duel in found["duels"]]
    assert kept[0].command == found["command"]
    monkeypatch.chdir(folder)
    assert main(found["command"].split()[1:]) == 0  # and gives the same again
    assert json.loads((folder / "c.json").read_text()) == found


def test_n_prompts_are_drawn_by_the_seed_and_the_same_for_all(folder, tmp_path):
    ids = {a.prompt_id: a.prompt for a in read_answers(folder / "dpo.jsonl")}
    values = defaultdict(set)
    for seed in (0, 1):
        kept = [ids[i] for i in drawn_prompts(ids, 20, seed)]
        found = compare(folder, "--n", "20", "--seed", str(seed), out=tmp_path / "c")
        for row in found["systems"][:3]:
            own = scores(folder, row["system"])
            assert row["win_rate"] == pytest.approx(np.mean([own[p] for p in kept]))
            assert row["prompts"] == 20
            values[row["system"]].add(row["win_rate"])
        base = {a.prompt: a for a in read_answers(folder / "sft.jsonl")}
        silent = [0.0 if base[p].extra["reference"] in base[p].answer.split() else 0.5 for p in kept]
        assert found["systems"][0]["win_rate/control_empty"] == pytest.approx(np.mean(silent))
        assert found["systems"][3]["words_mean"] == pytest.approx(np.mean([base[p].words for p in kept]))
    assert any(len(seen) == 2 for seen in values.values())


def test_difficulty_comes_from_the_other_systems_alone(folder, tmp_path):
    found = compare(folder, "--difficulty", out=tmp_path / "c")
    plain = compare(folder, out=tmp_path / "d")
    runs = {
        n: compare_orders(read_judged(folder / f"{n}-contains.jsonl").verdicts()) for n in ("dpo", "sampo", "third")
    }
    for row, without in zip(found["systems"][:3], plain["systems"], strict=False):
        others = [run for name, run in runs.items() if name != row["system"]]
        expected = length_controlled(runs[row["system"]], difficulty=difficulty_from(others)).rate.value
        assert row["win_rate/equal_length"] == pytest.approx(expected, abs=1e-12)
        assert row["win_rate/equal_length"] != without["win_rate/equal_length"]
    with pytest.raises(SystemExit, match="`difficulty` needs the verdicts on other systems"):
        compare(folder, "--difficulty", names=("dpo",))


def of_difficulty(correlation: float, n: int = 500) -> dict[str, Judged]:
    """Two systems whose answers are longer on hard prompts, as far as the correlation goes."""
    rng, runs = np.random.default_rng(1), {}
    hard = rng.normal(size=n)
    for name, strength in (("one", -0.5), ("two", 0.3)):
        difference = 300 * (0.3 + correlation * hard + math.sqrt(1 - correlation**2) * rng.normal(size=n))
        wins = rng.random(n) < expit(np.tanh(difference / 300) + 1.5 * hard + strength)
        lengths = {f"{side}_{unit}": 3000 for side in ("system", "baseline") for unit in ("tokens", "words", "chars")}
        rows = [
            Judgement(
                prompt_id=str(i), sample=0, order=order, preference=float(wins[i]), failure=None, detail="", judge="j",
                **{**lengths, "system_chars": 3000 + int(difference[i])}, system_stop="eos", baseline_stop="eos",
            )
            for i in range(n) for order in ("ab", "ba")
        ]  # fmt: skip
        files = AnswerFile(f"{name}.jsonl", name, None), AnswerFile("base.jsonl", "base", None)
        runs[name] = Judged(system=files[0], baseline=files[1], judge={"name": "j"}, n=None, seed=0, rows=rows)
    return runs


def test_length_that_goes_with_difficulty_is_said_with_the_rate_that_knows_of_it():
    runs = of_difficulty(0.6)
    plain, known = compare_runs(runs)[0], compare_runs(runs, difficulty=True)[0]
    for one, other in zip(plain, known, strict=True):
        (note,) = [note for note in one.notes if "difficulty" in note]
        assert f"With `difficulty`, which removes a part of it, it is {other.controlled.rate.value:.1%}." in note
        assert "removes only a part" in " ".join(other.notes)
    assert not any("difficulty" in note for one in compare_runs(of_difficulty(0.0))[0] for note in one.notes)


def test_answers_alone_are_compared_by_length(folder, tmp_path, capsys):
    files = [str(folder / f"{name}.jsonl") for name in ("sft", "dpo")]
    assert main(["compare", "--answers", *files, "--baseline", files[0], "--out", str(tmp_path / "c")]) == 0
    rows = json.loads((tmp_path / "c.json").read_text())["systems"]
    with_judge = compare(folder, out=tmp_path / "d")["systems"][0]
    assert rows[1]["tokens_ratio"] == with_judge["tokens_ratio"]
    assert "tokens_ratio" not in rows[0]
    assert "Win rates" not in capsys.readouterr().out.split("Written")[0]


def test_nothing_is_written_without_out(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--judgements", str(folder / "dpo-contains.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "Win rates" in said
    assert "Written" not in said
    assert list(tmp_path.iterdir()) == []


def test_answers_that_have_moved_are_named_and_others_are_not_taken(folder, tmp_path):
    for name in SYSTEMS:
        write_answers(tmp_path / f"{name}.jsonl", read_answers(folder / f"{name}.jsonl"))
    judge(tmp_path, "dpo")
    words = ["compare", "--judgements", str(tmp_path / "dpo-contains.jsonl"), "--out", str(tmp_path / "c")]
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "dpo.jsonl").rename(moved)
    with pytest.raises(SystemExit, match=r"it does not exist\. Name theirs with `answers`"):
        main(words)
    (tmp_path / "dpo.jsonl").write_bytes((folder / "sampo.jsonl").read_bytes())
    with pytest.raises(SystemExit, match="it holds other answers"):
        main(words)
    assert main([*words, "--answers", str(moved)]) == 0


def other_baseline(folder, place):
    write_answers(place / "base2.jsonl", answers("other", 0.5, 4))
    return judge(place, "sampo", baseline="base2")


def fewer_prompts(folder, place):
    for name in ("sampo", "sft"):
        write_answers(place / f"{name}.jsonl", read_answers(folder / f"{name}.jsonl"))
    out = place / "few.jsonl"
    files = ["--system", str(place / "sampo.jsonl"), "--baseline", str(place / "sft.jsonl"), "--out", str(out)]
    assert main(["judge", *files, "--judge", "contains", "--n", "70"]) == 0
    return str(out)


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        (other_baseline, "must stand against the same baseline"),
        (
            lambda folder, place: judge(place, "sampo", "exact"),
            "the same judge, got contains .* which differ in `name`",
        ),
        (fewer_prompts, "must have the same prompts, got 70 that all have, and 10 further ones in dpo, 0 further"),
        (lambda folder, place: str(folder / "dpo-contains.jsonl"), "must be of different systems"),
        (lambda folder, place: str(folder / "dpo.jsonl"), "must be what `sampo judge` wrote"),
    ],
)
def test_what_must_not_be_compared_is_refused(second, fault, folder, tmp_path):
    write_answers(tmp_path / "sampo.jsonl", read_answers(folder / "sampo.jsonl"))
    write_answers(tmp_path / "sft.jsonl", read_answers(folder / "sft.jsonl"))
    other = second(folder, tmp_path)
    words = ["compare", "--judgements", str(folder / "dpo-contains.jsonl"), other, "--out", str(tmp_path / "c")]
    with pytest.raises(SystemExit, match=fault):
        main(words)
    assert not (tmp_path / "c.csv").exists()
    if second is fewer_prompts:
        assert main([*words, "--matched_only"]) == 0
        rows = json.loads((tmp_path / "c.json").read_text())["systems"]
        assert [row["prompts"] for row in rows] == [70, 70, 70]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "got neither"),
        (["--answers", "A", "--difficulty"], "`difficulty` goes with `judgements`"),
        (["--answers", "A", "--agreement", "x.agreement.jsonl"], "`agreement` goes with `judgements`"),
        (["--answers", "A", "--baseline", "b.jsonl"], "`baseline` must be one of `answers`"),
        (["--judgements", "J", "--baseline", "A"], "`baseline` goes with `answers` alone"),
        (
            ["--judgements", "J", "--n", "99"],
            "`n` must be at least 1 and at most the number of prompts, got 99",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(words, fault, folder, tmp_path):
    files = {"A": str(folder / "dpo.jsonl"), "J": str(folder / "dpo-contains.jsonl")}
    with pytest.raises(SystemExit, match=fault):
        main(["compare", *(files.get(word, word) for word in words), "--out", str(tmp_path / "c")])


def test_prompts_without_one_in_common_are_refused_even_if_some_may_be_left_out():
    with pytest.raises(ValueError, match="got 0 that all have, and 1 further ones in a, 2 further ones in b"):
        shared_prompts({"a": "x", "b": "yz"}, True)
    assert shared_prompts({"a": "xz", "b": "zz"}, True) == {"z"}


@pytest.mark.slow
def test_models_of_the_lab_are_judged_by_the_truth_from_end_to_end(tmp_path, monkeypatch):
    """Trained, asked, judged and compared by the commands; the truth is computed from the answers by the world."""
    from sampo.lab.settings import Settings
    from sampo.lab.world import WORDS, World

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import lab_judged

    lab_judged.main(["--tiny", "--seed", "1", "--out", str(tmp_path)])
    world, number = World(1), {word: i for i, word in enumerate(WORDS)}
    asked = {" ".join(WORDS[i] for i in q.prompt): q for q in world.evaluation_questions(Settings().questions)}

    def qualities(name):
        found = read_answers(tmp_path / f"{name}.jsonl")
        return [world.quality(asked[a.prompt], [number[word] for word in a.answer.split()]) for a in found]

    rows = json.loads((tmp_path / "comparison-lab.json").read_text())["systems"]
    base = qualities("sft")
    for row in rows[:3]:
        expected = np.mean([0.5 + 0.5 * np.sign(a - b) for a, b in zip(qualities(row["system"]), base, strict=True)])
        assert row["win_rate"] == pytest.approx(expected)
        assert row["tokens_ratio"] is not None  # models in folders of their own have the tokenizer of the start
