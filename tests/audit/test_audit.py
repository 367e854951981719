"""The audit against slow loops, scipy's minimiser, TRL's own tokenised rows, and files made to break it."""

import gzip
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from tiny import make_pairs, make_tokenizer, save_model, training_options
from tokenizers import processors

from sampo import SamPOConfig, SamPOTrainer, audit_preferences, cli
from sampo.audit import files, report
from sampo.audit.bias import estimate_share, length_bias, preference_auc, preference_slope
from sampo.data.issues import PreferenceDataError
from sampo.io import records as results

ALONE = np.arange


def bias_of(chosen, rejected, prompt_ids=None, prompt=None):
    n = len(chosen)
    return length_bias(
        np.ones(n) if prompt is None else prompt, chosen, rejected, ALONE(n) if prompt_ids is None else prompt_ids
    )


# --- statistics ------------------------------------------------------------------------------------------------------


def auc_by_counting(difference):
    """Every pair shown in both orders; positives against negatives, one by one."""
    wins = 0.0
    for first, second in itertools.product(difference, [-d for d in difference]):
        wins += (first > second) + (first == second) / 2
    return wins / len(difference) ** 2


def slope_by_minimising(difference):
    def loss(b):
        return float(np.logaddexp(0, -b[0] * difference / 100).sum())

    return minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).x[0]


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(lengths)
def test_shares_and_counted_tokens_are_what_a_loop_finds(pairs):
    found = bias_of(*map(list, zip(*pairs, strict=True)))
    n = len(pairs)
    assert found.pairs == n
    assert found.longer.value == pytest.approx(sum(w > loser for w, loser in pairs) / n)
    assert found.equal.value == pytest.approx(sum(w == loser for w, loser in pairs) / n)
    assert found.shorter.value == pytest.approx(sum(w < loser for w, loser in pairs) / n)
    assert found.difference.value == pytest.approx(sum(w - loser for w, loser in pairs) / n)
    assert found.rms_difference == pytest.approx(math.sqrt(sum((w - loser) ** 2 for w, loser in pairs) / n))
    least = [min(pair) for pair in pairs]
    assert found.counted == pytest.approx(2 * sum(least) / sum(map(sum, pairs)))
    assert found.counted_chosen == pytest.approx(sum(least) / sum(w for w, _ in pairs))
    assert found.counted_rejected == pytest.approx(sum(least) / sum(loser for _, loser in pairs))
    assert found.end_chosen == pytest.approx(sum(min(p) / p[0] for p in pairs) / n)
    assert found.end_rejected == pytest.approx(sum(min(p) / p[1] for p in pairs) / n)
    assert found.chosen.longest == max(w for w, _ in pairs)
    assert found.rejected.median == pytest.approx(
        sorted(p[1] for p in pairs)[n // 2] if n % 2 else found.rejected.median
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=40))
def test_the_auc_is_the_share_of_pairs_that_are_ranked_rightly(difference):
    found = preference_auc(np.array(difference), ALONE(len(difference)))
    assert found.value == pytest.approx(auc_by_counting(difference))
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-300, 300), min_size=4, max_size=60))
def test_the_slope_is_the_maximum_of_the_likelihood(difference):
    difference = np.array([*difference, 50, -70])
    found = preference_slope(difference, ALONE(len(difference)))
    assert found.value == pytest.approx(slope_by_minimising(difference), rel=1e-4, abs=1e-5)


def test_the_slope_has_no_value_where_all_differences_have_one_sign():
    for difference in ([5, 3, 0], [-5, -3, 0], [0, 0], []):
        found = preference_slope(np.array(difference, dtype=int), ALONE(len(difference)))
        assert found.value is None
        assert found.interval is None


def test_swapping_the_sides_mirrors_every_number():
    rng = np.random.default_rng(3)
    chosen, rejected, prompts = rng.integers(1, 90, 200), rng.integers(1, 60, 200), rng.integers(0, 50, 200)
    one, other = bias_of(chosen, rejected, prompts), bias_of(rejected, chosen, prompts)
    assert one.prompts == len(set(prompts.tolist()))
    assert other.auc.value == pytest.approx(1 - one.auc.value)
    assert other.auc.interval == pytest.approx((1 - one.auc.high, 1 - one.auc.low))
    assert other.slope.value == pytest.approx(-one.slope.value)
    assert other.slope.interval == pytest.approx((-one.slope.high, -one.slope.low))
    assert (other.longer, other.counted_chosen, other.end_rejected) == (
        one.shorter,
        one.counted_rejected,
        one.end_chosen,
    )


def test_repeating_every_pair_under_its_prompt_leaves_the_intervals_as_they_are():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.integers(1, 90, 100), rng.integers(1, 80, 100)
    once = bias_of(chosen, rejected)
    thrice = bias_of(np.tile(chosen, 3), np.tile(rejected, 3), np.tile(ALONE(100), 3))
    blind = bias_of(np.tile(chosen, 3), np.tile(rejected, 3))
    for name in ("longer", "auc", "slope", "difference"):
        assert getattr(thrice, name).interval == pytest.approx(getattr(once, name).interval)
        assert getattr(blind, name).se < 0.6 * getattr(once, name).se


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Clusters of 1 to 4 pairs whose differences share a part, annotators with slope 1 per 100."""
    rng, held, runs = np.random.default_rng(0), np.zeros(3), 600

    def draw(clusters):
        codes = np.repeat(ALONE(clusters), rng.integers(1, 5, clusters))
        gap = rng.normal(0, 60, clusters)[codes] + rng.normal(0, 60, len(codes))
        right = rng.random(len(codes)) < expit(gap / 100)
        return np.round(np.where(right, gap, -gap)).astype(int), codes

    truth = draw(60_000)
    true_auc, true_share = preference_auc(*truth).value, estimate_share(truth[0] > 0, truth[1]).value
    for _ in range(runs):
        difference, codes = draw(60)
        for place, (found, true) in enumerate(
            [
                (preference_auc(difference, codes), true_auc),
                (estimate_share(difference > 0, codes), true_share),
                (preference_slope(difference, codes), 1.0),
            ]
        ):
            held[place] += found.low <= true <= found.high
    assert np.all((held / runs > 0.92) & (held / runs < 0.98)), held / runs  # 95 % ± 3.4 standard errors


# --- tokens and truncation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def trl_rows(model, data, tmp_path, **options):
    """The rows as TRL's trainer tokenises and keeps them."""
    args = SamPOConfig(**training_options(tmp_path, **options))
    return SamPOTrainer(model=model, args=args, train_dataset=data)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")  # of TRL 1.16
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_lengths_and_cuts_are_those_of_the_trainer(model, tmp_path, conversational, mode):
    data = make_pairs(40, seed=5, conversational=conversational, max_len=9)
    rows = data.to_list()
    for row in rows[:6]:  # alike up to their last word
        side = row["chosen"]
        if conversational:
            longer = side[0]["content"] + " w1 w2 w3"
            row["rejected"] = [{"role": "assistant", "content": longer}]
        else:
            row["rejected"] = side + "w1 w2 w3 "
    data = Dataset.from_list(rows)
    limit = 14 if conversational and mode == "keep_start" else 8
    trainer = trl_rows(model, data, tmp_path, max_length=limit, truncation_mode=mode)
    kept = trainer.train_dataset
    found = audit_preferences(data, tokenizer=make_tokenizer(), max_length=limit, truncation_mode=mode)
    pairs, cut = found.scans[0].pairs, found.truncations[1]
    whole = trl_rows(model, data, tmp_path, max_length=None).train_dataset
    for column in ("prompt", "chosen", "rejected"):
        assert getattr(pairs, column).tolist() == [len(ids) for ids in whole[f"{column}_ids"]]

    counts = dict.fromkeys(report.CUT_COUNTS, 0) | {"dropped": len(data) - len(kept)}
    end = {1, 3}
    differences = []
    for row in kept:
        batch = trainer.data_collator([row])
        sides = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        ends = [bool(end & set(side)) for side in sides]
        differences.append(len(sides[0]) - len(sides[1]))
        counts["cut_chosen"] += len(sides[0]) < len(row["chosen_ids"])
        counts["cut_rejected"] += len(sides[1]) < len(row["rejected_ids"])
        counts["without_end_chosen"] += not ends[0]
        counts["without_end_rejected"] += not ends[1]
        counts["one_sided_end"] += ends[0] != ends[1]
        counts["identical"] += sides[0] == sides[1]
    assert {name: getattr(cut, name) for name in counts} == counts
    assert counts["cut_chosen"]
    if mode == "keep_start":
        assert min(counts["dropped"], counts["one_sided_end"], counts["identical"]) > 0
    assert cut.bias.pairs == len(kept)
    assert cut.bias.difference.value == pytest.approx(np.mean(differences))
    assert found.truncations[0].cut_chosen == 0


def test_a_cut_that_makes_two_sides_alike_is_counted_in_either_direction():
    rows = [{"prompt": "w0 ", "chosen": "w1 w2 w3 w4 ", "rejected": "w1 w2 w5 w6 "}] * 2
    rows += [{"prompt": "w0 ", "chosen": "w1 w5 w6 ", "rejected": "w2 w5 w6 "}]
    data = Dataset.from_list(rows)
    for mode, same in (("keep_start", 2), ("keep_end", 1)):
        found = audit_preferences(data, tokenizer=make_tokenizer(), max_length=3, truncation_mode=mode)
        assert [cut.identical for cut in found.truncations] == [0, same]


def test_the_end_token_is_the_last_one_and_kept_where_the_cut_stops_before_it():
    rows = [{"prompt": "w0 ", "chosen": "w1 <eos> w2 ", "rejected": "w1 w2 w3 w4 "}]
    found = audit_preferences(Dataset.from_list(rows), tokenizer=make_tokenizer(), max_length=4)
    pairs = found.scans[0].pairs
    assert (pairs.chosen_end.tolist(), pairs.rejected_end.tolist()) == ([3], [4])
    assert [cut.without_end_chosen for cut in found.truncations] == [0, 1]
    chat = make_pairs(5, conversational=True)  # a newline token follows the end of a turn
    for length, lost in ((2, 0), (3, 0)):
        options = {"max_length": length, "truncation_mode": "keep_end"}
        cut = audit_preferences(chat, tokenizer=make_tokenizer(), **options).truncations[1]
        assert (cut.without_end_chosen, cut.without_end_rejected) == (lost, lost)


@pytest.mark.parametrize("conversational", [False, True])
def test_a_token_that_the_tokenizer_puts_first_counts_for_texts_only(conversational):
    """As in TRL: a template writes its own beginning."""
    plain, with_bos = make_tokenizer(), make_tokenizer()
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    data = make_pairs(6, conversational=conversational)
    before, after = (audit_preferences(data, tokenizer=each).scans[0].pairs for each in (plain, with_bos))
    assert (after.prompt - before.prompt).tolist() == [0 if conversational else 1] * 6
    assert after.chosen.tolist() == before.chosen.tolist()


def test_words_are_counted_where_no_tokenizer_is_given():
    data = Dataset.from_list([{"prompt": "a b", "chosen": "one two  three", "rejected": "one"}])
    found = audit_preferences(data)
    assert found.unit == "words"
    assert found.truncations == []
    pairs = found.scans[0].pairs
    assert [pairs.prompt[0], pairs.chosen[0], pairs.rejected[0]] == [2, 3, 1]


def test_a_row_that_the_template_refuses_is_a_fault_and_no_end():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + (tokenizer.chat_template)
    )
    rows = make_pairs(3, conversational=True).to_list()
    rows[1]["prompt"] = [{"role": "system", "content": "w1"}, *rows[1]["prompt"]]
    found = audit_preferences(Dataset.from_list(rows), tokenizer=tokenizer)
    assert [(f.kind, f.rows, f.count) for f in found.scans[0].issues] == [("not_rendered", [1], 1)]
    assert found.overall.pairs == 2
    with pytest.raises(ValueError, match="must have a chat template"):
        audit_preferences(Dataset.from_list(rows), tokenizer=make_tokenizer(chat=False))


# --- groups, duplicates, splits --------------------------------------------------------------------------------------


def rows_by_annotator(n=60, seed=0):
    """Annotator `long` always prefers the longer side, `short` the shorter one, and one row has none."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        a, b = "x " * rng.randint(1, 9), "y " * rng.randint(10, 20)
        who = ["long", "short", None][i % 3]
        chosen, rejected = (b, a) if who == "long" else (a, b)
        rows.append({"prompt": f"q{i} ", "chosen": chosen, "rejected": rejected, "who": who})
    return rows


def test_every_group_gets_the_numbers_that_it_would_get_alone():
    rows = rows_by_annotator()
    found = audit_preferences(Dataset.from_list(rows), by="who")
    assert set(found.groups) == {"long", "short", "(no value)"}
    for name, who in (("long", "long"), ("short", "short"), ("(no value)", None)):
        alone = audit_preferences(Dataset.from_list([row for row in rows if row["who"] == who]))
        assert found.groups[name] == alone.overall
    assert found.groups["long"].longer.value == 1
    assert found.groups["short"].auc.value == 0
    with pytest.raises(PreferenceDataError, match=r"`by` must be a column.*Did you mean 'who'\?"):
        audit_preferences(Dataset.from_list(rows), by="whom")


def test_repetitions_contradictions_and_overlaps_are_what_loops_find():
    rng = random.Random(4)

    def rows(n):
        made = [[f"q{rng.randint(0, 20)}", *(f"a{rng.randint(0, 2)}" for _ in "ab")] for _ in range(n)]
        return [row for row in made if row[1] != row[2]]

    parts = {"train": rows(160), "test": rows(30)}
    names = ("prompt", "chosen", "rejected")
    data = DatasetDict({k: Dataset.from_list([dict(zip(names, r, strict=True)) for r in v]) for k, v in parts.items()})
    found = audit_preferences(data)
    for split, part in parts.items():
        assert found.repeats[split].repeated == sum(row in part[:i] for i, row in enumerate(part))
        assert found.repeats[split].contradicted == sum([r[0], r[2], r[1]] in part for r in part)
        assert found.repeats[split].prompts == len({r[0] for r in part})
        assert found.splits[split].pairs == len(part)
    (both,) = found.overlaps
    train, test = parts.values()
    assert both.prompts == len({r[0] for r in train} & {r[0] for r in test})
    assert both.pairs_of_second == sum(r[0] in {t[0] for t in train} for r in test)
    assert both.same_pairs == sum(r in train for r in test) != sum(r in test for r in train)
    assert both.swapped_pairs == sum([r[0], r[2], r[1]] in train for r in test)
    assert both.same_pairs
    assert both.swapped_pairs
    assert found.repeats["train"].contradicted
    assert "Splits share prompts" in report.write_conclusion(found)


def test_nulls_that_arrow_adds_to_messages_make_no_other_prompt(tmp_path):
    row = make_pairs(1, conversational=True)[0]
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    padded = {name: [{**m, "name": None} for m in row[name]] for name in row}
    (tmp_path / "test.jsonl").write_text(json.dumps(padded) + "\n")
    (both,) = audit_preferences(tmp_path).overlaps
    assert both.same_pairs == 1


# --- files, good and bad ---------------------------------------------------------------------------------------------

GOOD = {"prompt": "Name a colour.", "chosen": "Blue, I think.", "rejected": "No."}
BAD_LINES = {
    b'{"prompt": "x", "chosen": "", "rejected": "b"}': ("empty", "chosen"),
    b'{"prompt": null, "chosen": "a", "rejected": "b"}': ("null", "prompt"),
    b'{"prompt": "x", "chosen": 3, "rejected": "b"}': ("wrong_type", "chosen"),
    b'{"prompt": "x", "chosen": "a", "rejected": "a"}': ("identical", "rejected"),
    b'{"prompt": "x", "chosen": "\xff", "rejected": "b"}': ("bad_utf8", ""),
    b'{"prompt": "x", "chosen": "\\ud83d", "rejected": "b"}': ("bad_utf8", ""),
    b'{"prompt": "x", "chosen": NaN, "rejected": "b"}': ("nan", "chosen"),
    b"[1, 2]": ("not_an_object", ""),
    b"{oops": ("broken_line", ""),
    b"[" * 100_000: ("too_deep", ""),
    b'{"prompt": ' + b"9" * 5000 + b"}": ("broken_line", ""),
}


def test_every_bad_row_is_counted_with_its_number_and_the_rest_is_audited(tmp_path):
    path, expected, lines = tmp_path / "pairs.jsonl", {}, []
    rng = random.Random(0)
    for number in range(400):
        if number and rng.random() < 0.4:
            line, issue = rng.choice(list(BAD_LINES.items()))
            expected.setdefault(issue, []).append(number)
        else:
            line = json.dumps(GOOD | {"prompt": f"q{number}"}).encode()
        lines.append(line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = audit_preferences(path)
    (scan,) = found.scans
    assert scan.rows == 400
    assert {(f.kind, f.column): (f.rows, f.count) for f in scan.issues} == {
        issue: (rows[:10], len(rows)) for issue, rows in expected.items()
    }
    bad = sum(map(len, expected.values()))
    assert found.overall.pairs == 400 - bad
    assert set(scan.pairs.row.tolist()) == set(range(400)) - set(itertools.chain(*expected.values()))
    assert found.has_issues
    assert all(issue.fix for issue in scan.issues)


def as_file(rows, path):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    name = path.name
    if "parquet" in name:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
        text = sink.getvalue().to_pybytes()
    elif name.startswith("list"):
        text = json.dumps(rows, indent=1).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.parquet.gz", "list.json", "list.json.gz", "bom.jsonl"]
)
def test_every_format_gives_the_same_audit(tmp_path, name):
    rows = rows_by_annotator(30)
    path = as_file(rows, tmp_path / name)
    if name == "bom.jsonl":
        path.write_bytes(b"\xef\xbb\xbf\n\n" + path.read_bytes().rstrip(b"\n"))
    told = []
    found = audit_preferences(path, by="who", progress=lambda done, of: told.append((done, of)))
    plain = audit_preferences(Dataset.from_list(rows), by="who")
    assert found.overall == plain.overall
    assert found.groups == plain.groups
    assert found.fingerprint == plain.fingerprint
    assert told[-1] == (30, 30)
    assert not found.has_issues


def test_cells_of_the_json_type_are_read_as_what_they_hold(tmp_path):
    """Contents of different types in one column, as `datasets` writes them."""
    rows = make_pairs(4, conversational=True).to_list()
    for row, extra in zip(rows, (1, "text", 2.5, "more"), strict=True):
        row["chosen"][0]["tool_calls"] = [{"f": {"x": extra}}]
        row["rejected"][0]["content"] = "w1 w2"
    rows[0]["rejected"][0]["content"] = [{"type": "text", "text": "w1 w2 w3"}]
    data = Dataset.from_list(rows, on_mixed_types="use_json")
    data.to_parquet(tmp_path / "pairs.parquet")
    found = audit_preferences(tmp_path / "pairs.parquet")
    assert found.scans[0].pairs.rejected.tolist() == [3, 2, 2, 2]
    assert found.fingerprint == audit_preferences(data).fingerprint


def test_a_file_that_breaks_off_is_audited_up_to_there(tmp_path):
    rng = random.Random(0)
    rows = [{**GOOD, "prompt": str(rng.random()), "chosen": str(rng.random()) * 5} for _ in range(3000)]
    whole = as_file(rows, tmp_path / "pairs.jsonl.gz").read_bytes()
    (tmp_path / "pairs.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = audit_preferences(tmp_path / "pairs.jsonl.gz")
    assert 500 < found.overall.pairs < 2500
    assert found.scans[0].issues[0].kind == "unreadable_file"
    assert "cut-off gzip" in report.issue_lines(found)[0]
    text = gzip.decompress(whole)
    (tmp_path / "cut.jsonl").write_bytes(text[: len(text) // 2])
    found = audit_preferences(tmp_path / "cut.jsonl")
    assert [issue.kind for issue in found.scans[0].issues] == ["broken_line"]
    assert "cut off" in found.scans[0].issues[0].fix


def run(*words):
    try:
        return cli.main(["audit", *map(str, words)])
    except SystemExit as stop:
        return stop.code


def test_what_cannot_be_audited_is_said_in_a_sentence(tmp_path, model):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    good = as_file([GOOD], tmp_path / "good.jsonl")
    for words, said in [
        ([file("empty.jsonl", b" \n")], "is empty"),
        ([file("no.gz.jsonl.gz", b"not gzip")], "damaged or cut-off gzip"),
        ([file("no.parquet", b"PAR1 not")], "is not a complete Parquet file"),
        ([file("open.json", b'[{"prompt": "x"')], "not a complete JSON list"),
        ([file("other.jsonl", b'{"question": "x", "choosen": "a", "rejected": "b"}')], "Did you mean `choosen`"),
        ([file("bad.jsonl", b'{"prompt": "x", "chosen": "a", "rejected": "a"}')], "at least one good pair"),
        ([tmp_path / "nothing.jsonl"], "does not exist"),
        ([file("pairs.csv", b"a,b")], "must end in"),
        ([good, "--by", "source"], "`by` must be a column"),
        ([good, "--max_length", "9"], "must come with a `tokenizer`"),
        ([good, "--tokenizer", model, "--max_length", "1"], "at least 2 tokens"),
        ([good, "--splits", "tran"], "Did you mean 'train'?"),
        ([good, "--columns", "prompt"], "OURS=THEIRS"),
        ([good, "--columns", "prompt=qestion"], "`columns` must map"),
    ]:
        code = run(*words)
        assert str(code).startswith("sampo audit: error: "), words
        assert said in code, code


def test_other_column_names_and_several_sources_are_read(tmp_path):
    rows = [{"question": f"q{i}", "prompt": "no", "chosen": "a b", "worse": "c"} for i in range(5)]
    paths = [as_file(rows, tmp_path / name) for name in ("one.jsonl", "two.parquet")]
    found = audit_preferences(*paths, columns={"prompt": "question", "rejected": "worse"})
    assert list(found.splits) == ["one.jsonl", "two.parquet"]
    assert found.overlaps[0].same_pairs == 5
    assert found.overall.longer.value == 1
    assert found.label == "one.jsonl, two.parquet"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_found_and_its_exit_code_tells_faults(tmp_path, model, capsys):
    rows = rows_by_annotator()
    rows[0]["who"] = "[red]\x1b[31m<script>"
    path, out = as_file(rows, tmp_path / "pairs.jsonl"), tmp_path / "out"
    words = [path, "--tokenizer", model, "--by", "who", "--max_length", 12, 30, "--out", out, "--label", "mine"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "[red]" in said
    assert report.clean("a\x1b[31m\x07b") == "a�[31m�b"
    assert "\x1b[31m" not in said
    whole = json.loads((out / "audit.json").read_text())
    found = audit_preferences(path, tokenizer=make_tokenizer(), by="who", max_length=[12, 30])
    assert whole["conclusion"] == report.write_conclusion(found)
    assert whole["conclusion"] in said
    assert said.index(whole["verdict"]) < said.index("AUC of length for the preference") < said.index("longer, after")
    assert whole["overall"]["auc"]["value"] == found.overall.auc.value
    assert [cut["max_length"] for cut in whole["truncations"]] == [None, 12, 30]
    records = results.read(out / "records.jsonl")
    (auc,) = [r for r in records if r.name == "audit/auc" and not {"group", "max_length"} & set(r.config)]
    assert (auc.value, auc.interval, auc.n) == (found.overall.auc.value, found.overall.auc.interval, 60)
    assert auc.config["data"] == "mine"
    assert auc.config["tokenizer"] == Path(model).name
    assert auc.command.startswith("sampo audit ")
    assert "--max_length 12 30" in auc.command
    assert len({(r.name, r.key) for r in records}) == len(records)
    table = pq.read_table(out / "pairs.parquet")
    assert table.column_names == list(files.PARQUET_COLUMNS)
    assert table["chosen"].to_pylist() == found.scans[0].pairs.chosen.tolist()
    assert table["group"].to_pylist()[1:3] == ["short", "(no value)"]
    with path.open("a") as file:
        file.write("{oops\n")
    assert run(*words) == 3
    said = capsys.readouterr().out
    assert "1 of 61 pairs is not complete JSON, at rows [60]. See pairs.jsonl, line 61" in said
    assert said.startswith(
        "\n1 of 61 rows cannot be trained on: correct them as listed below, or set `on_bad_rows: drop`"
    )


@pytest.mark.parametrize(
    ("longer", "found", "reason"),
    [
        (60, "The chosen response is nearly always the longer one", "DPO and plain SamPO lengthened"),
        (45, "The chosen response is more often the longer one", "DPO lengthened the answers"),
        (30, "Length alone does not show which response was chosen", "these pairs are too few"),
        (15, "The chosen response is more often the shorter one", "has more terms to push down"),
        (0, "The chosen response is nearly always the shorter one", "DPO collapsed"),
    ],
)
def test_the_verdict_names_what_was_found_and_what_sampo_init_writes(
    longer, found, reason, tmp_path, monkeypatch, capsys
):
    rows = [("x " * 9, "y") if i < longer else ("x", "y " * 9) for i in range(60)]
    rows = [{"prompt": f"q{i}", "chosen": chosen, "rejected": rejected} for i, (chosen, rejected) in enumerate(rows)]
    monkeypatch.setenv("COLUMNS", "60")
    assert run(as_file(rows, tmp_path / "pairs.jsonl")) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].strip().splitlines()
    assert max(map(len, lines)) <= 60
    verdict = " ".join(lines)
    assert verdict.startswith(f"{found} (60 pairs: {100 * longer / 60:.1f} % longer")
    assert "Start with SamPO with a token budget over the data set" in verdict
    assert "(`token_weighting: sampo`, `sampled_sides: rejected`, `length_penalty: learned`" in verdict
    assert reason in verdict


def test_the_last_sentence_names_the_options_that_the_bias_touches():
    def said(sign):
        rng = random.Random(1)
        rows = []
        for i in range(300):
            gap = rng.randint(1, 9) * (sign if rng.random() < 0.8 else -sign if sign else rng.choice([-1, 1]))
            if not sign:
                gap = rng.choice([-1, 1]) * rng.randint(1, 9)
            chosen, rejected = ("x " * (12 + max(gap, 0)), "y " * (12 + max(-gap, 0)))
            rows.append({"prompt": f"q{i}", "chosen": chosen, "rejected": rejected})
        return report.write_conclusion(audit_preferences(Dataset.from_list(rows)))

    assert "points to the longer" in said(1)
    assert "`sampled_sides: rejected`" in said(1)
    assert "points to the shorter" in said(-1)
    assert "downsample mostly the rejected responses" in said(-1)
    assert "does not distinguish" in said(0)
    assert "`sampled_sides" not in said(0)
    assert all("The data cannot show how" in said(sign) for sign in (-1, 0, 1))


def test_the_statistics_need_neither_torch_nor_transformers(tmp_path):
    path = as_file([GOOD] * 3, tmp_path / "pairs.jsonl")
    code = (
        "import sys, sampo; a = sampo.audit_preferences(sys.argv[1]); "
        "print(a.overall.pairs, [m for m in ('torch', 'transformers', 'trl', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3 []"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.parquet"])
def test_a_hundred_thousand_pairs_take_less_than_a_minute_and_little_memory(tmp_path, name):
    rng = random.Random(0)
    words = [f"word{i}" for i in range(500)]

    def text(n):
        return " ".join(rng.choices(words, k=n))

    def rows(n):
        for i in range(n):
            yield {
                **{"prompt": text(80), "chosen": text(rng.randint(1, 150)), "rejected": text(rng.randint(1, 150))},
                "source": f"s{i % 20}",
            }

    path, n = tmp_path / name, 100_000
    if name.endswith(".gz"):
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(n))
    else:
        first = pa.Table.from_pylist(list(rows(1000)))
        with pq.ParquetWriter(path, first.schema) as writer:
            for _ in range(n // 1000):
                writer.write_table(pa.Table.from_pylist(list(rows(1000))))
    code = (
        "import sys, time, resource, datasets, rich; from sampo.audit.audit import audit_preferences\n"
        "import scipy.stats\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; began = time.process_time()\n"
        "a = audit_preferences(sys.argv[1], by='source'); assert a.overall.pairs == 100_000\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(time.process_time() - began, (after - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    print(f"{name}: {seconds:.1f} s, {megabytes:.0f} MB")
    assert seconds < 60
    assert megabytes < 150  # the rows alone are more than 130 MB as text and several times that as Python objects
