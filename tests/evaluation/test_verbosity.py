"""Verbosity: measures against slow loops, systems beside a baseline, the table, and the adapters for `evaluate`."""

import importlib
import io
import math
import pickle
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from sampo.evaluation.results.summary import records
from sampo.evaluation.results.verbosity import (
    System,
    compare_verbosity,
    compression_ratio,
    distinct_n,
    repeated_sentences,
    verbosity,
    verbosity_table,
)

WORDS = ["the", "a", "small", "large", "answer", "question", "says", "more", "less", "twice", "never", "always"]


def random_texts(rng, n, longest=60):
    texts = []
    for _ in range(n):
        words = list(rng.choice(WORDS, size=rng.integers(1, longest)))
        for place in rng.integers(0, len(words), size=len(words) // 6):
            words[place] += rng.choice([".", "!", "\n"])
        texts.append(" ".join(words))
    return texts


def system(name, texts, **columns):
    return System(name=name, prompt=columns.pop("prompt", range(len(texts))), text=texts, **columns)


# ---------------------------------------------------------------------------------------------------------------------
# measures of a text


def test_distinct_n_of_known_texts():
    assert distinct_n("a b a b a", 2) == pytest.approx(2 / 4)
    assert distinct_n("A a", 1) == 0.5
    assert distinct_n("one two", 3) is None
    assert distinct_n("", 1) is None


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_is_that_of_a_slow_loop(n):
    for text in random_texts(np.random.default_rng(n), 30):
        words = text.lower().split()
        seen = []
        for i in range(len(words) - n + 1):
            seen.append(" ".join(words[i : i + n]))
        expected = len([g for i, g in enumerate(seen) if g not in seen[:i]]) / len(seen) if seen else None
        assert distinct_n(text, n) == expected


def test_compression_tells_a_loop_from_prose_and_leaves_short_texts_out():
    prose = " ".join(random_texts(np.random.default_rng(0), 30))
    loop = "I am sorry, I cannot do that. " * 60
    assert compression_ratio(loop) > 15
    assert compression_ratio(prose) < 5
    assert compression_ratio(prose) == len(prose.encode()) / len(zlib.compress(prose.encode(), level=9))
    assert compression_ratio("x" * 200) is None
    assert compression_ratio("x" * 201) > 5
    assert compression_ratio("\ud800" * 300) > 1  # half a surrogate pair, as a cut answer may end


def test_repeated_sentences_of_known_texts():
    assert repeated_sentences("Yes. No. yes.  \nNo.") == pytest.approx(0.5)
    assert repeated_sentences("One sentence only.") is None
    assert repeated_sentences("- a\n- b\n- a") == pytest.approx(1 / 3)
    assert repeated_sentences("是的。不是。是的。") == pytest.approx(1 / 3)
    assert repeated_sentences("Version 1.2 is out. It is 3.5 times faster.") == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# measures of a system


def test_lengths_are_counted_per_unit_and_prompts_weigh_the_same():
    texts = ["one two", "one", "ä ö ü", "x" * 9]
    one = system("s", texts, prompt=["a", "a", "b", "c"], tokens=[4, 2, 6, 10], tokenizer="tiny")
    found = verbosity(one).measures
    assert found["words_mean"].value == pytest.approx(((2 + 1) / 2 + 3 + 1) / 3)
    assert found["characters_mean"].value == pytest.approx(((7 + 3) / 2 + 5 + 9) / 3)
    assert found["tokens_mean"].value == pytest.approx((3 + 6 + 10) / 3)
    assert found["tokens_median"].value == 6
    assert found["tokens_mean"].n == 3


def test_mean_median_and_p90_tell_a_few_endless_answers_from_long_ones():
    lengths = [30] * 95 + [2000] * 5
    found = verbosity(system("s", ["x" * n for n in lengths])).measures
    assert found["characters_mean"].value == pytest.approx(128.5)
    assert found["characters_median"].value == found["characters_p90"].value == 30
    assert found["characters_mean"].high - 128.5 > 128.5 - found["characters_mean"].low > 0


def test_cut_answers_are_counted_among_those_whose_end_is_known():
    stops = ["length", "eos", "unknown", "eos", "length"]
    found = verbosity(system("s", ["x"] * 5, stop=stops))
    assert found.measures["cut"].value == pytest.approx(2 / 4)
    assert found.measures["cut"].n == 4
    assert "no stop reason" in " ".join(found.notes)
    none = verbosity(system("s", ["x"] * 5))
    assert none.measures["cut"].value is None
    assert "no stop reason" in " ".join(none.notes)
    assert verbosity(system("s", ["x"] * 5, stop=["eos"] * 5)).notes == ()


def test_empty_answers_are_counted():
    found = verbosity(system("s", ["", "  \n", "x", "y"])).measures
    assert found["empty"].value == 0.5
    assert found["distinct_1"].n == 2
    assert found["compression_mean"].value is None


def test_the_tail_of_the_compression_shows_what_its_median_does_not():
    rng = np.random.default_rng(0)
    prose = [" ".join(random_texts(rng, 6)) + "x" * 100 for _ in range(97)]
    found = verbosity(system("s", prose + ["again and again. " * 100] * 3)).measures
    assert found["compression_p99"].value > 20
    assert found["compression_median"].value < 6
    assert found["repeated_sentences"].n >= 90


# ---------------------------------------------------------------------------------------------------------------------
# beside a baseline


def test_the_ratio_is_the_geometric_mean_over_shared_prompts_with_its_paired_interval():
    rng = np.random.default_rng(1)
    base = rng.integers(50, 500, 80)
    ours = np.maximum(1, (base * np.exp(rng.normal(0.2, 0.3, 80))).astype(int))
    a = system("ours", ["x" * n for n in ours], prompt=range(80))
    b = system("base", ["x" * n for n in base[10:]] + ["x"], prompt=[*range(10, 80), "other"])
    found = verbosity(a, b)
    logs = np.log(ours[10:] / base[10:])
    ratio = found.measures["characters_ratio"]
    assert ratio.value == pytest.approx(stats.gmean(ours[10:] / base[10:]))
    expected = np.exp(stats.t.interval(0.95, 69, loc=logs.mean(), scale=stats.sem(logs)))
    assert ratio.interval == pytest.approx(tuple(expected), rel=0.01)  # but for the correction of skewness
    assert found.measures["characters_longer"].value == pytest.approx(np.mean(ours[10:] > base[10:]))
    assert ratio.n == 70
    assert "11 prompts that only one" in " ".join(found.notes)


def test_the_ratio_turned_round_is_its_inverse():
    rng = np.random.default_rng(2)
    a, b = (system(name, random_texts(rng, 40)) for name in "ab")
    one, other = verbosity(a, b).measures["words_ratio"], verbosity(b, a).measures["words_ratio"]
    assert one.value == pytest.approx(1 / other.value)
    assert one.interval == pytest.approx((1 / other.high, 1 / other.low))


def test_the_paired_interval_is_narrower_than_that_of_unpaired_means():
    rng = np.random.default_rng(3)
    base = np.exp(rng.normal(5, 1, 100))
    ours = base * np.exp(rng.normal(0.1, 0.1, 100))
    a, b = (system(name, ["x" * int(n) for n in lengths]) for name, lengths in (("a", ours), ("b", base)))
    found = verbosity(a, b).measures["characters_ratio"]
    assert found.low > 1.05
    unpaired = math.hypot(*(stats.sem(np.log(np.floor(lengths))) for lengths in (ours, base)))
    assert found.se < unpaired / 3


def test_samples_of_a_prompt_meet_all_answers_of_the_baseline():
    a = system("a", ["xx", "xxxxxxxx"], prompt=["p", "p"])
    b = system("b", ["xxxx"], prompt=["p"])
    found = verbosity(a, b).measures
    assert found["characters_ratio"].value == pytest.approx(1.0)
    assert found["characters_longer"].value == 0.5


def test_an_answer_as_long_as_the_baselines_is_not_longer():
    ours, theirs = (System(name=n, prompt=[0, 1], text=t) for n, t in (("a", ["xx", "xxx"]), ("b", ["yy", "y"])))
    assert verbosity(ours, theirs).measures["characters_longer"].value == 0.5


def test_prompts_with_an_empty_answer_have_no_ratio_and_are_counted():
    found = verbosity(system("a", ["", "xx"]), system("b", ["x", "x"]))
    assert found.measures["characters_ratio"].value == pytest.approx(2.0)
    assert found.measures["characters_ratio"].n == 1
    assert found.measures["characters_longer"].value == 0.5
    assert "1 prompts with an empty answer" in " ".join(found.notes)


def test_tokens_of_two_tokenizers_are_not_compared_until_counted_anew():
    a = system("a", ["x y", "z"], tokens=[2, 1], tokenizer="one")
    b = system("b", ["x", "z"], tokens=[9, 9], tokenizer="two")
    found = verbosity(a, b)
    assert found.measures["tokens_ratio"].value is None
    assert "do not compare" in " ".join(found.notes)
    both = [s.counted_by("words", lambda text: len(text.split())) for s in (a, b)]
    assert verbosity(*both).measures["tokens_ratio"].value == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": [1]}, "`tokenizer` must be named"),
        ({"stop": ["eos", "eos"]}, "one row per answer"),
    ],
)
def test_wrong_columns_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        system("s", ["x"], **columns)


def test_answer_records_become_a_system():
    def answer(**over):
        row = {"prompt_id": "p", "answer": "x y", "tokens": 3, "tokenizer": "t", "stop": "eos"}
        return SimpleNamespace(**{**row, **over})

    whole = System.of("s", [answer(), answer(prompt_id="q")])
    assert (whole.tokens, whole.tokenizer, list(whole.prompt)) == ([3, 3], "t", ["p", "q"])
    for other in ({"tokens": None}, {"tokenizer": "u"}, {"tokenizer": None}):
        assert System.of("s", [answer(), answer(**other)]).tokens is None


def test_any_number_of_systems_has_rows_a_table_and_records():
    from rich.console import Console

    rng = np.random.default_rng(0)
    systems = [system(name, random_texts(rng, 30), stop=["eos"] * 30) for name in ("base", "dpo", "sampo")]
    found = compare_verbosity(systems, "base")
    rows = [one.row() for one in found]
    assert [set(row) - set(rows[0]) for row in rows[1:]] == [
        {
            f"{unit}_{what}{bound}"
            for unit in ("tokens", "words", "characters")
            for what in ("ratio", "longer")
            for bound in ("", "_low", "_high")
        }
    ] * 2
    assert rows[1]["words_ratio_low"] < rows[1]["words_ratio"] < rows[1]["words_ratio_high"]
    console = Console(width=140, file=io.StringIO())
    console.print(verbosity_table(found))
    text = console.file.getvalue()
    assert "Length in characters" in text
    assert f"{rows[2]['characters_mean']:.0f}" in text
    made = records(found[1], config={"file": "dpo.jsonl"}, command="sampo compare")
    ratio = next(record for record in made if record.name == "verbosity/words_ratio")
    assert ratio.value == rows[1]["words_ratio"]
    assert ratio.config["baseline"] == "base"
    with pytest.raises(ValueError, match="different names"):
        compare_verbosity([systems[0], systems[0]])
    with pytest.raises(ValueError, match="must be one of"):
        compare_verbosity(systems, "sft")


# ---------------------------------------------------------------------------------------------------------------------
# adapters


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    pytest.importorskip("evaluate")
    import evaluate.config

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    from sampo.evaluation.results import metrics

    return metrics


def test_the_adapters_give_the_numbers_of_the_functions(metrics):
    from sampo.evaluation.results.length_control import length_controlled
    from sampo.evaluation.results.verdicts import Comparisons
    from sampo.evaluation.results.win_rate import win_rate

    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(50, 300, 60).astype(float), rng.integers(50, 300, 60).astype(float)
    scores, ids = rng.random(60), [f"p{i // 2}" for i in range(60)]
    c = Comparisons(prompt=ids, preference=scores, system_length=ours, baseline_length=theirs)
    found = metrics.WinRate().compute(predictions=[*scores, None], prompt_ids=[*ids, "p0"])
    expected = win_rate(c).rate
    assert found["win_rate"] == pytest.approx(expected.value)
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(expected.interval)
    assert (found["prompts"], found["failed"]) == (30, 1)
    columns = {"predictions": scores, "prompt_ids": ids, "lengths": ours, "baseline_lengths": theirs}
    controlled = metrics.LengthControlledWinRate().compute(**columns)
    assert controlled["win_rate_at_equal_length"] == pytest.approx(length_controlled(c).rate.value)
    texts = random_texts(rng, 20)
    lengths = metrics.Verbosity().compute(data=texts)
    assert lengths["words_mean"] == pytest.approx(np.mean([len(text.split()) for text in texts]))


def test_the_adapters_take_batches_combine_and_pickle(metrics):
    import evaluate

    one = metrics.WinRate()
    one.add_batch(predictions=[1.0, 0.0], prompt_ids=["a", "b"])
    one.add(predictions=1.0, prompt_ids="c")
    assert one.compute()["win_rate"] == pytest.approx(2 / 3)
    assert pickle.loads(pickle.dumps(metrics.WinRate)) is metrics.WinRate
    both = evaluate.combine({"raw": metrics.WinRate(), "at_equal_length": metrics.LengthControlledWinRate()})
    rng = np.random.default_rng(0)
    found = both.compute(
        predictions=rng.random(50),
        prompt_ids=[str(i) for i in range(50)],
        lengths=rng.integers(1, 99, 50),
        baseline_lengths=rng.integers(1, 99, 50),
    )
    assert {"raw_win_rate", "at_equal_length_win_rate", "win_rate_at_equal_length"} <= set(found)


def test_without_the_package_the_adapters_say_what_to_install(metrics, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, metrics.__name__)  # imported anew, no class is made yet
    monkeypatch.setattr("sampo.evaluation.results.metrics", metrics)  # importing again replaces it there
    fresh = importlib.import_module(metrics.__name__)
    with pytest.raises(ImportError, match=r"pip install 'sampo-dpo\[metrics\]'"):
        _ = fresh.WinRate
    with pytest.raises(AttributeError, match="has no attribute `Winrate`"):
        _ = fresh.Winrate
