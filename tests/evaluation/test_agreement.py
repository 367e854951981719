"""A judge beside people: each number against a loop, scikit-learn or a hand count; the record that win rates show."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from judge_server import Server, completion, goods, judge, shown
from scipy import optimize
from scipy.special import expit
from tiny import save_model

from sampo.cli import main
from sampo.evaluation.answers.answers import Answer, write_answers
from sampo.evaluation.judging.judges import Comparison, Verdict, judge_pairs, read_judgements
from sampo.evaluation.judging.labelled import LabelledPairs, label_meanings, read_labelled
from sampo.evaluation.results.agreement import Agreement, cohen_kappa, krippendorff_alpha, measure_agreement
from sampo.evaluation.results.judge_checks import UNCHECKED, checks_of, read_checks
from sampo.evaluation.results.judged import AnswerFile, Judged, read_judged
from sampo.io import records as results
from sampo.report.build import build_report

LLMBAR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "llmbar.jsonl.gz"
FILE = AnswerFile("pairs.jsonl", "0" * 16, None)


class Told:
    """A judge that says what it is told for the two texts in the order shown."""

    name, about = "told", {}

    def __init__(self, rule):
        self.rule = rule

    def judge(self, comparisons: list[Comparison], progress=None) -> list[Verdict]:
        found = [self.rule(shown.answer_a, shown.answer_b) for shown in comparisons]
        return [Verdict(None, "silent") if p is None else Verdict(p) for p in found]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled_rows(n: int, seed: int, annotators: int = 3) -> list[dict]:
    """Pairs with labels of several annotators, some missing, some ties; several pairs of a prompt."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        texts = ["so " * rng.randint(1, 30) + f"{name}{i}" for name in "xy"]
        better = rng.random() < 0.5
        row = {"prompt": f"q{i // 2}", "one": texts[0], "two": texts[1], "kind": rng.choice(["easy", "hard"])}
        for k in range(annotators):
            right, wrong = ("A", "B") if better else ("B", "A")
            row[f"person{k}"] = rng.choices([right, wrong, "tie", None], [6, 2, 1, 1])[0]
        rows.append(row)
    return rows


def measured(path: Path, rule, **options) -> tuple[Agreement, LabelledPairs, list]:
    labelled = read_labelled(path, **options)
    rows = judge_pairs(Told(rule), [each.pair for each in labelled.pairs])
    run = Judged(system=FILE, baseline=FILE, judge={"name": "told"}, n=None, seed=0, rows=rows)
    return measure_agreement(labelled, run), labelled, rows


def noisy(seed: int, tie: float = 0.1, fail: float = 0.1):
    """A judge of positions, lengths and chance, the same for the same texts."""

    def rule(a: str, b: str) -> float | None:
        rng = random.Random(f"{seed} {a} {b}")
        if rng.random() < fail:
            return None
        if rng.random() < tie:
            return 0.5
        return float(rng.random() < expit(0.5 + 0.1 * (len(a.split()) - len(b.split()))))

    return rule


# --- κ and α against others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    one, two = rng.integers(0, 3, (2, 60))
    two = np.where(rng.random(60) < 0.5, one, two)
    table = np.zeros((3, 3))
    np.add.at(table, (one, two), 1)
    assert cohen_kappa(table) == pytest.approx(metrics.cohen_kappa_score(one, two))
    assert math.isnan(cohen_kappa(np.diag([5.0, 0.0, 0.0])))


def alpha_by_pairs(units: list[list[str]]) -> float:
    """Krippendorff's α from its definition: every ordered pair of labels of a unit, and of all labels."""
    units = [labels for labels in units if len(labels) > 1]
    total = sum(map(len, units))
    observed = sum(
        (a != b) / (len(labels) - 1)
        for labels in units
        for i, a in enumerate(labels)
        for j, b in enumerate(labels)
        if i != j
    )
    every = [label for labels in units for label in labels]
    chance = sum(a != b for i, a in enumerate(every) for j, b in enumerate(every) if i != j) / (total - 1)
    return 1 - observed / chance


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_that_of_its_definition(seed):
    rng = random.Random(seed)
    units = [[rng.choice("aab-") for _ in range(rng.randint(1, 5))] for _ in range(25)]
    votes = np.array([[labels.count(name) for name in "ab-"] for labels in units], dtype=float)
    assert krippendorff_alpha(votes) == pytest.approx(alpha_by_pairs(units))
    weight = np.array([[rng.randint(0, 3) for _ in units]], dtype=float)
    drawn = [labels for labels, times in zip(units, weight[0], strict=True) for _ in range(int(times))]
    assert krippendorff_alpha(votes, weight) == pytest.approx(alpha_by_pairs(drawn))


def test_alpha_of_the_published_example():
    """Krippendorff 2011, example C: four observers, twelve units, missing values; nominal α = 0.743."""
    observers = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    units = [[label for label in unit if label != "."] for unit in zip(*map(str.split, observers), strict=True)]
    votes = np.array([[labels.count(name) for name in "12345"] for labels in units], dtype=float)
    assert krippendorff_alpha(votes) == pytest.approx(0.743, abs=5e-4)


# --- every number against a loop -------------------------------------------------------------------------------------


def prompt_mean(values: dict[str, list[float]]) -> float:
    return float(np.mean([np.mean(some) for some in values.values()]))


@pytest.mark.parametrize("seed", range(3))
def test_every_number_is_that_of_a_loop(seed, tmp_path):
    rows = labelled_rows(80, seed)
    path = write(tmp_path / "pairs.jsonl", rows)
    labels = ["person0", "person1", "person2"]
    rule = noisy(seed)
    found, labelled, judgements = measured(path, rule, responses=("one", "two"), labels=labels, by=["kind"])
    assert [row.preference is None for row in judgements].count(True) > 0
    parts: dict[str, dict[str, list[float]]] = {}
    both: dict[str, list[float]] = {}
    agreeing: dict[str, list[float]] = {}
    as_one: dict[str, list[float]] = {}
    units, with_judge, one_way = [], [], []
    tied = failed = unlabelled = 0
    xs, judge_says, people_say = [], [], []
    for row in rows:
        votes = [row[name] for name in labels if row[name]]
        if not votes:
            unlabelled += 1
            continue
        first, second = rule(row["one"], row["two"]), rule(row["two"], row["one"])
        if first is None or second is None:
            failed += 1
            continue
        p = (first + 1 - second) / 2
        verdict = "A" if p > 0.5 else "B" if p < 0.5 else "tie"
        lead = votes.count("A") - votes.count("B")
        people = "A" if lead > 0 else "B" if lead < 0 else "tie"
        one_way.append((row["prompt"], people, verdict))
        swap = {"A": "B", "B": "A", "tie": "tie"}
        units += [votes, [swap[v] for v in votes]]
        with_judge += [[*votes, verdict], [swap[v] for v in (*votes, verdict)]]
        if len(votes) > 1:
            pairs = [(a, b) for i, a in enumerate(votes) for b in votes[i + 1 :]]
            agreeing.setdefault(row["prompt"], []).append(np.mean([a == b for a, b in pairs]))
        as_one.setdefault(row["prompt"], []).append(np.mean([v == verdict for v in votes]))
        xs.append(math.log2(len(row["one"]) / len(row["two"])))
        judge_says.append({"A": 1.0, "tie": 0.5, "B": 0.0}[verdict])
        people_say.append({"A": 1.0, "tie": 0.5, "B": 0.0}[people])
        if people == "tie":
            tied += 1
            continue
        right = 0.5 if verdict == "tie" else float(verdict == people)
        both.setdefault(row["prompt"], []).append(right)
        good, bad = (row["one"], row["two"]) if people == "A" else (row["two"], row["one"])
        length = "longer" if len(good) > len(bad) else "shorter" if len(good) < len(bad) else "equal"
        in_order = {"first": rule(good, bad), "second": 1 - rule(bad, good)}
        for name, value in {length: right, f"kind={row['kind']}": right, **in_order}.items():
            parts.setdefault(name, {}).setdefault(row["prompt"], []).append(value)
    numbers = found.numbers
    assert (found.tied, found.failed, labelled.unlabelled) == (tied, failed, unlabelled)
    assert found.pairs == sum(map(len, both.values()))
    assert numbers["accuracy"].value == pytest.approx(prompt_mean(both))
    assert {name for name in numbers if name.startswith("accuracy/")} == {f"accuracy/{name}" for name in parts}
    for name, values in parts.items():
        assert numbers[f"accuracy/{name}"].value == pytest.approx(prompt_mean(values)), name
    for name, size in found.sizes.items():
        assert size == sum(map(len, parts[name].values()))
    assert numbers["annotators/each_other"].value == pytest.approx(prompt_mean(agreeing))
    assert numbers["annotators/judge"].value == pytest.approx(prompt_mean(as_one))
    assert numbers["alpha/people"].value == pytest.approx(alpha_by_pairs(units))
    assert numbers["alpha/with_judge"].value == pytest.approx(alpha_by_pairs(with_judge))
    assert numbers["kappa"].value == pytest.approx(kappa_by_counting(one_way))
    for name, y in (("judge", judge_says), ("people", people_say)):
        assert numbers[f"slope/{name}"].value == pytest.approx(slope_by_search(xs, y), rel=1e-4)
    difference = numbers["slope/judge"].value - numbers["slope/people"].value
    assert numbers["slope/difference"].value == pytest.approx(difference)
    assert all(one.low <= one.value <= one.high for one in numbers.values() if one.interval)


def kappa_by_counting(triples: list[tuple[str, str, str]]) -> float:
    """κ of (prompt, people, judge) in both directions, each prompt of weight 1."""
    swap = {"A": "B", "B": "A", "tie": "tie"}
    times = {prompt: sum(p == prompt for p, _, _ in triples) for prompt, _, _ in triples}
    cells: dict[tuple[str, str], float] = {}
    for prompt, people, judge_ in triples:
        for cell in ((people, judge_), (swap[people], swap[judge_])):
            cells[cell] = cells.get(cell, 0.0) + 1 / times[prompt]
    total = sum(cells.values())
    observed = sum(count for (a, b), count in cells.items() if a == b) / total
    chance = sum(
        sum(n for (a, _), n in cells.items() if a == name) * sum(n for (_, b), n in cells.items() if b == name)
        for name in swap
    )
    return (observed - chance / total**2) / (1 - chance / total**2)


def slope_by_search(x: list[float], y: list[float]) -> float:
    x_, y_ = np.array(x), np.array(y)
    return optimize.minimize_scalar(
        lambda b: (np.logaddexp(0, b * x_) - y_ * b * x_).sum(), bounds=(-20, 20), method="bounded"
    ).x


def test_swapping_the_responses_of_pairs_changes_no_number(tmp_path):
    rows = labelled_rows(60, 4)
    swap = {"A": "B", "B": "A", "tie": "tie", None: None}
    other = [
        {**row, "one": row["two"], "two": row["one"], **{f"person{k}": swap[row[f"person{k}"]] for k in range(3)}}
        if i % 3
        else row
        for i, row in enumerate(rows)
    ]
    options = {"responses": ("one", "two"), "labels": ["person0", "person1", "person2"]}
    found = [measured(write(tmp_path / "p.jsonl", some), noisy(4), **options)[0].numbers for some in (rows, other)]
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        # a tie of people keeps the order of the file, so what depends on who is first among them may move
        assert found[1][name].value == pytest.approx(one.value), name


def test_kappa_without_ties_is_twice_the_accuracy_less_one_and_a_judge_of_positions_has_none(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "subset": "x"} for i in range(40)]
    path = write(tmp_path / "pairs.jsonl", rows)
    found, _, _ = measured(
        path,
        lambda a, b: (
            float(random.Random(min(a, b)).random() < 0.7)
            if a < b
            else 1 - float(random.Random(min(a, b)).random() < 0.7)
        ),
    )
    accuracy = found.numbers["accuracy"].value
    assert 0 < accuracy < 1
    assert found.numbers["kappa"].value == pytest.approx(2 * accuracy - 1)
    assert found.sizes["subset=x"] == 40
    position, _, _ = measured(path, lambda a, b: 1.0)
    numbers = position.numbers
    assert numbers["accuracy"].value == 0.5
    assert numbers["kappa"].value == 0.0
    assert (numbers["accuracy/first"].value, numbers["accuracy/second"].value) == (1.0, 0.0)
    assert numbers["order/first_shown"].value == 1.0
    assert numbers["order/consistent"].value == 0.0


def test_calibration_is_that_of_a_loop_over_probabilities(tmp_path):
    rng = random.Random(5)
    rows = [{"prompt": f"q{i}", "chosen": f"{rng.random()} c", "rejected": f"{rng.random()} r"} for i in range(300)]
    path = write(tmp_path / "pairs.jsonl", rows)

    def rule(a, b):
        first = expit(4 * (float(a.split()[0]) - float(b.split()[0])))
        return float(first)

    found, _, _ = measured(path, rule)
    p = [rule(row["chosen"], row["rejected"]) for row in rows]
    assert found.numbers["calibration/brier"].value == pytest.approx(np.mean([(1 - x) ** 2 for x in p]))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for x in p:
        bins.setdefault(min(int((max(x, 1 - x) - 0.5) * 10), 4), []).append((max(x, 1 - x), x > 0.5))
    error = sum(abs(sum(s for s, _ in some) - sum(r for _, r in some)) for some in bins.values()) / len(p)
    assert found.numbers["calibration/error"].value == pytest.approx(error)
    assert len([name for name in found.numbers if "accuracy_at" in name]) == len(bins)
    hard, _, _ = measured(path, lambda a, b: float(a > b))
    assert not any(name.startswith("calibration") for name in hard.numbers)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_labels_in_other_words_messages_and_missing_labels_are_read(tmp_path):
    rows = [
        {"instruction": "q0", "output_1": "x", "output_2": "y", "label": 2},
        {"instruction": "q0", "output_1": "z", "output_2": "y", "label": 1},
        {"instruction": "q1", "output_1": "x", "output_2": "y", "label": 0},
        {"instruction": "q2", "output_1": "x", "output_2": "y", "label": None},
    ]
    options = {"columns": {"prompt": "instruction"}, "responses": ("output_1", "output_2"), "labels": ["label"]}
    path = write(tmp_path / "pairs.jsonl", rows)
    found = read_labelled(path, **options, label_values=label_meanings(["A=1", "B=2", "tie=0"]))
    assert found.unlabelled == 1
    shown_ = [(each.pair.system.answer, each.pair.baseline.answer, each.pair.system.sample) for each in found.pairs]
    assert shown_ == [("y", "x", 0), ("z", "y", 1), ("x", "y", 0)]
    assert [each.tied for each in found.pairs] == [False, False, True]
    with pytest.raises(ValueError, match=r"must be A, B or tie, got \['2', '1', '0'\] in 3 cells, first in row 1"):
        read_labelled(path, **options)
    messages = [
        {"prompt": [{"role": "user", "content": "q"}], **{n: [{"role": "assistant", "content": n}] for n in PAIR}}
    ]
    (pair,) = read_labelled(write(tmp_path / "m.jsonl", messages)).pairs
    assert (pair.pair.system.answer, pair.pair.baseline.answer) == PAIR
    assert pair.pair.system.prompt_id == Answer(prompt="q", answer="").prompt_id


PAIR = ("chosen", "rejected")


@pytest.mark.parametrize(
    ("rows", "words", "fault"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": ""}], [], r"empty"),
        ([{"prompt": "q", "chosen": "a"}], [], r"rejected"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], ["--by", "kind"], r"columns \['kind'\]"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], ["--labels", "l"], "must be given together"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], ["--label_values", "C=1"], "must be given as A=VALUE"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], ["--system", "x"], "`labelled` excludes `system`"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], ["--length_unit", "tokens"], "characters or words"),
        (
            [{"prompt": "q", "a": "a", "b": "b", "l": None}],
            ["--responses", "a", "b", "--labels", "l"],
            "at least one row",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(rows, words, fault, tmp_path):
    path = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(SystemExit, match=fault) as stop:
        main(["judge", "--labelled", str(path), "--judge", "longer", "--out", str(tmp_path / "o.jsonl"), *words])
    assert str(stop.value.code).startswith("sampo judge: error: ")
    assert not list(tmp_path.glob("o.*"))


def test_options_of_labelled_pairs_need_them(tmp_path):
    with pytest.raises(SystemExit, match="`system` and `baseline` must name files of answers, or `labelled`"):
        main(["judge", "--judge", "longer"])
    with pytest.raises(SystemExit, match="`by` must go with `labelled`"):
        main(["judge", "--judge", "longer", "--system", "a", "--baseline", "b", "--by", "x"])


# --- the command, and the record beside win rates --------------------------------------------------------------------


def town_pairs(n: int, seed: int = 0) -> list[dict]:
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        texts = [" ".join(rng.choices(["good", "plain", "bad"], k=rng.randint(1, 7))) for _ in range(2)]
        if texts[0] != texts[1]:
            rows.append(
                {"prompt": f"q{len(rows)}", "chosen": texts[0], "rejected": texts[1], "subset": f"s{len(rows) % 2}"}
            )
    return rows


def answer_files(folder: Path) -> list[str]:
    rng = random.Random(1)
    for name in ("a", "b"):
        answers = [Answer(prompt=f"p{i}", answer="good " * rng.randint(1, 6) + name, stop="eos") for i in range(25)]
        write_answers(folder / f"{name}.jsonl", answers)
    return ["judge", "--system", str(folder / "a.jsonl"), "--baseline", str(folder / "b.jsonl")]


def endpoint_words(server: Server, folder: Path, model: str = "m") -> list[str]:
    return ["--judge", "endpoint", "--url", server.url, "--model", model, "--cache", str(folder / "cache.jsonl")]


def test_a_judge_is_checked_once_and_every_win_rate_of_it_says_so(tmp_path, capsys):
    rows = town_pairs(30)
    pairs = write(tmp_path / "people.jsonl", rows)
    judgement = [*answer_files(tmp_path), "--out", str(tmp_path / "j.jsonl")]
    with Server() as server:
        ours = endpoint_words(server, tmp_path)
        assert main([*judgement, *ours]) == 0
        assert UNCHECKED in capsys.readouterr().out
        labelled = ["judge", "--labelled", str(pairs), "--out", str(tmp_path / "check.jsonl")]
        assert main([*labelled, *ours, "--dry_run"]) == 0
        assert "60 are missing" in capsys.readouterr().out  # both orders, and no control
        with pytest.raises(SystemExit) as stop:
            main([*labelled, *ours, "--max_requests", "20"])
        assert stop.value.code == 4  # stopped
        made = len(server.requests)
        assert main([*labelled, *ours]) == 0  # and resumed
        assert len(server.requests) == made + 40
        assert main([*labelled, *ours]) == 0
        assert len(server.requests) == made + 40
        said = capsys.readouterr().out
        right = [0.5 + np.sign(goods(r["chosen"]) - goods(r["rejected"])) / 2 for r in rows]
        phrase = f"agrees with people in {100 * np.mean(right):.1f} % ["
        assert phrase in said
        assert "of 30 pairs (people), κ " in said
        kept = {r.name: r for r in results.read(tmp_path / "check.agreement.jsonl")}
        assert kept["agreement/accuracy"].value == pytest.approx(np.mean(right))
        assert kept["agreement/accuracy/subset=s1"].value == pytest.approx(np.mean(right[1::2]))
        assert kept["agreement/accuracy"].config["judged_by"]["template_hash"]
        assert [row.preference for row in read_judgements(tmp_path / "check.jsonl")] == np.repeat(right, 2).tolist()
        assert main([*judgement, *ours]) == 0  # found beside the judgements
        assert phrase in capsys.readouterr().out
        summary = json.loads((tmp_path / "j.summary.json").read_text())
        assert phrase in summary["sentence"]
        assert phrase in summary["result"]["judge_check"]
        elsewhere = tmp_path / "elsewhere"
        assert main([*judgement[:-1], str(elsewhere / "j.jsonl"), *ours]) == 0
        assert UNCHECKED in capsys.readouterr().out
        file = str(tmp_path / "check.agreement.jsonl")
        assert main([*judgement[:-1], str(elsewhere / "j.jsonl"), *ours, "--agreement", file]) == 0
        assert phrase in capsys.readouterr().out
        for one, more in ((tmp_path, []), (elsewhere, ["--agreement", file])):
            assert main(["compare", "--judgements", str(one / "j.jsonl"), *more]) == 0
            said = capsys.readouterr().out
            assert f"The judge {phrase}" in said
            assert "Reliability of the verdicts" in said
        (tmp_path / "later").mkdir()
        assert main([*judgement[:-1], str(tmp_path / "later" / "j.jsonl"), *ours]) == 0
        shutil.copy(file, tmp_path / "later")  # checked after the win rate: the page knows, the old sentence does not
        assert UNCHECKED in (tmp_path / "later" / "j.summary.json").read_text()
        page = build_report(tmp_path / "later").html
        assert UNCHECKED not in page
        assert page.count(phrase) >= 2
        other = endpoint_words(server, tmp_path, model="another")
        made = len(server.requests)
        with pytest.raises(SystemExit, match="got endpoint m, which differs in `model`"):
            main([*judgement, *other, "--agreement", file])
        assert len(server.requests) == made  # nothing was spent
        assert main([*judgement, *other]) == 0
        assert UNCHECKED in capsys.readouterr().out


def test_compare_refuses_the_record_of_another_judge_and_other_files(tmp_path):
    pairs = write(tmp_path / "people.jsonl", town_pairs(10))
    judgement = [*answer_files(tmp_path), "--out", str(tmp_path / "j.jsonl"), "--judge", "longer"]
    assert main(judgement) == 0
    policy, reference = (save_model(tmp_path / name, seed=seed) for seed, name in enumerate(("policy", "reference")))
    implicit = ["--judge", "implicit", "--model", policy, "--ref_model", reference, "--device", "cpu"]
    assert main(["judge", "--labelled", str(pairs), *implicit, "--out", str(tmp_path / "implicit.jsonl")]) == 0
    compare = ["compare", "--judgements", str(tmp_path / "j.jsonl"), "--agreement"]
    with pytest.raises(
        SystemExit, match="must be about the judge of these judgements, longer, got implicit policy, which"
    ):
        main([*compare, str(tmp_path / "implicit.agreement.jsonl")])
    with pytest.raises(SystemExit, match="is not there"):
        main([*compare, str(tmp_path / "none.agreement.jsonl")])
    with pytest.raises(SystemExit, match="must hold the records of `sampo judge --labelled`"):
        main([*compare, str(tmp_path / "j.records.jsonl")])
    with pytest.raises(SystemExit, match="must not be the name of another run's judgements"):
        main(["judge", "--labelled", str(pairs), "--judge", "longer", "--out", str(tmp_path / "j.jsonl")])
    assert read_judged(tmp_path / "j.jsonl").judge["name"] == "longer"


def test_several_sets_and_a_repeated_check_are_told_apart(tmp_path):
    for name, n in (("one", 10), ("two", 12)):
        pairs = write(tmp_path / f"{name}.jsonl", town_pairs(n))
        out = ["--out", str(tmp_path / f"check-{name}.jsonl")]
        assert main(["judge", "--labelled", str(pairs), "--judge", "longer", *out]) == 0
    judge_ = {"name": "longer", "unit": "characters"}
    found = checks_of(judge_, [], tmp_path)
    assert [(check.data, check.pairs) for check in found] == [("one", 10), ("two", 12)]
    assert checks_of({**judge_, "unit": "words"}, [], tmp_path) == ()
    twice = [*results.read(tmp_path / "check-one.agreement.jsonl")] * 2
    assert len(read_checks(twice, "file")) == 1


def test_failures_are_counted_by_kind_and_are_no_ties(tmp_path, capsys):
    rows = town_pairs(20)
    pairs = write(tmp_path / "people.jsonl", rows)

    def rule(request, number):
        texts = shown(request)
        return completion("no idea") if texts["prompt"] in ("q3", "q7") else judge(request)

    out = ["--out", str(tmp_path / "check.jsonl")]
    with Server(rule) as server, pytest.raises(SystemExit) as stop:
        main(["judge", "--labelled", str(pairs), *out, *endpoint_words(server, tmp_path)])
    assert stop.value.code == 3
    said = capsys.readouterr().out
    assert "failed: 4 judgements, unparseable" in said
    kept = {r.name: r.value for r in results.read(tmp_path / "check.agreement.jsonl")}
    right = [
        0.5 + np.sign(goods(r["chosen"]) - goods(r["rejected"])) / 2 for r in rows if r["prompt"] not in ("q3", "q7")
    ]
    assert kept["agreement/accuracy"] == pytest.approx(np.mean(right))
    assert (kept["agreement/count/pairs"], kept["agreement/count/failed"]) == (18, 2)


def test_the_implicit_reward_of_a_model_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    folders = [save_model(tmp_path / name, seed=seed) for seed, name in enumerate(("policy", "reference"))]
    pairs = write(tmp_path / "people.jsonl", town_pairs(24))
    words = ["--judge", "implicit", "--model", folders[0], "--ref_model", folders[1], "--device", "cpu"]
    assert main(["judge", "--labelled", str(pairs), "--out", str(tmp_path / "check.jsonl"), *map(str, words)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if len(line) > 80 and " " in line.strip()] == []
    rows = read_judgements(tmp_path / "check.jsonl")
    kept = {r.name: r.value for r in results.read(tmp_path / "check.agreement.jsonl")}
    assert kept["agreement/accuracy"] == pytest.approx(np.mean([row.preference > 0.5 for row in rows[::2]]))
    assert kept["agreement/calibration/brier"] == pytest.approx(np.mean([(1 - row.preference) ** 2 for row in rows]))
    assert "agreement/order/consistent" not in kept  # each answer is scored by itself


@pytest.mark.skipif(not LLMBAR.is_file(), reason="LLMBar is not at hand")
def test_the_longer_answer_is_a_bad_judge_of_llmbar(tmp_path):
    words = ["judge", "--labelled", str(LLMBAR), "--judge", "longer", "--out", str(tmp_path / "longer.jsonl")]
    assert main(words) == 0
    kept = {r.name: r for r in results.read(tmp_path / "longer.agreement.jsonl")}
    assert kept["agreement/count/pairs"].value == 419
    parts = {
        name.rpartition("=")[2]: r.value for name, r in kept.items() if name.startswith("agreement/count/pairs/s")
    }
    assert parts["neighbor"] == 134
    assert kept["agreement/accuracy/longer"].value == 1
    assert kept["agreement/slope/people"].interval[1] < 0  # the better answer is often the shorter one here
