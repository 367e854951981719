"""AlpacaEval 2's numbers: against a transcription of its formula, and against its package where that is installed."""

import csv
import importlib.util
import json
import warnings

import numpy as np
import oracles
import pytest
from scipy import optimize, stats
from scipy.special import expit

from sampo.cli import main
from sampo.evaluation.results.alpaca_eval import Gamed, alpaca_eval, length_controlled_rate

N = 300  # instructions of the made-up set


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`df_gamed.csv` and `instruction_difficulty.csv` of a made-up set, in AlpacaEval's columns."""
    folder = tmp_path_factory.mktemp("alpaca_eval")
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 1.2, N)
    with (folder / "df_gamed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
        )
        for model, shift in (("verbose", -0.9), ("concise", 0.9)):
            length = rng.normal(shift, 1, N)
            preference = expit(-1.4 * np.tanh(length) + rng.normal(0, 2, N))
            for i in range(N):
                writer.writerow([model, i, preference[i], length[i], difficulty[i], False])
    with (folder / "instruction_difficulty.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "0"])
        writer.writerows((i, difficulty[i]) for i in range(N))
    return folder


def annotations(seed: int, files, *, missing=0, draws=0, failures=0) -> list[dict]:
    """One model's annotations in AlpacaEval's form."""
    rng = np.random.default_rng(seed)
    with (files / "df_gamed.csv").open(newline="") as file:
        hard = np.array([float(row["instruction_difficulty"]) for row in csv.DictReader(file)][:N])
    kept = np.sort(rng.permutation(N)[: N - missing])
    base = rng.integers(400, 2500, len(kept))
    ours = np.maximum(1, base * np.exp(rng.uniform(-0.8, 0.5) + rng.normal(0, 0.5, len(kept)))).astype(int)
    difference = base - ours
    eta = -1.4 * np.tanh(difference / difference.std()) + 0.7 * hard[kept] + rng.uniform(-2, 1.5)
    preference = 1 + expit(eta + rng.normal(0, 2.5, len(kept)))
    values: list[float | None] = [float(p) for p in preference]
    places = iter(rng.permutation(len(kept)))
    for _ in range(draws):
        values[next(places)] = 0.0
    for _ in range(failures):
        values[next(places)] = None
    return [
        {
            "instruction": f"instruction {i}",
            "output_1": "b" * int(b),
            "output_2": "m" * int(m),
            "preference": value,
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "judge",
        }
        for i, b, m, value in zip(kept, base, ours, values, strict=True)
    ]


def table(rows, files, align):
    """Features, labels and weights as AlpacaEval's description has them."""
    with (files / "df_gamed.csv").open(newline="") as file:
        gamed = list(csv.DictReader(file))
    hard = [float(row["instruction_difficulty"]) for row in gamed[:N]]
    delta = np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows], dtype=float)
    length = np.tanh(delta / delta.std(ddof=1))
    place = [i if align == "row" else int(r["instruction"].split()[1]) for i, r in enumerate(rows)]
    own = [[length[i], hard[place[i]], 1.0] for i in range(len(rows))]
    label = [None if r["preference"] is None else (r["preference"] or 1.5) - 1 for r in rows]
    known = [i for i, y in enumerate(label) if y is not None]
    features = [own[i] for i in known]
    features += [[np.tanh(float(g["std_delta_len"])), float(g["instruction_difficulty"]), 0.0] for g in gamed]
    labels = [label[i] for i in known] + [float(g["preference"]) for g in gamed]
    return own, features, labels, [1.0] * len(known) + [0.1] * len(gamed)


@pytest.mark.parametrize(
    ("seed", "kind"),
    [
        (0, {}),
        (1, {"missing": 3}),
        (2, {"draws": 4}),
        (3, {"failures": 5}),
        (4, {"missing": 40, "draws": 2, "failures": 2}),
    ],
)
@pytest.mark.parametrize("align", ["row", "prompt"])
def test_both_numbers_are_those_of_the_published_formula(seed, kind, align, files):
    rows = annotations(seed, files, **kind)
    found = alpaca_eval(
        rows,
        gamed=files / "df_gamed.csv",
        difficulty=files / "instruction_difficulty.csv",
        instructions=[f"instruction {i}" for i in range(N)],
        align=align,
    )
    known = [(r["preference"] or 1.5) - 1 for r in rows if r["preference"] is not None]
    assert found.win_rate.value == pytest.approx(100 * sum(known) / len(known), abs=1e-9)
    assert found.win_rate.se == pytest.approx(100 * stats.sem(known), abs=1e-9)
    assert found.failed == len(rows) - len(known)
    assert int(found.mean_length) == sum(len(r["output_2"]) for r in rows) // len(rows)
    own, features, labels, weights = table(rows, files, align)
    b = oracles.alpaca_eval_fit(features, labels, weights, 5, optimize.minimize)
    expected = 100 * np.mean([expit(b[1] * row[1] + b[2]) for row in own])
    # two penalties side by side may be equally good on the rows left out, and then optimisers choose differently
    assert found.length_controlled.value == pytest.approx(expected, abs=0.1)
    assert found.slope == pytest.approx(b[0], abs=0.02)


def test_row_numbers_and_instructions_differ_where_rows_are_missing(files):
    rows = annotations(7, files, missing=30)
    instructions = [f"instruction {i}" for i in range(N)]
    by_prompt = alpaca_eval(rows, gamed=files / "df_gamed.csv", instructions=instructions)
    by_row = alpaca_eval(rows, gamed=files / "df_gamed.csv", align="row")
    assert abs(by_prompt.length_controlled.value - by_row.length_controlled.value) > 0.05
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    again = alpaca_eval(shuffled, gamed=files / "df_gamed.csv", instructions=instructions)
    assert again.length_controlled.value == pytest.approx(by_prompt.length_controlled.value, abs=1e-7)


def test_an_instruction_that_comes_twice_has_the_difficulty_of_its_own_place(files):
    rows = annotations(8, files)
    instructions = [f"instruction {i // 2}" for i in range(N)]  # in pairs, whose two difficulties differ
    rows = [{**row, "instruction": text} for row, text in zip(rows, instructions, strict=True)]
    by_prompt = alpaca_eval(rows, gamed=files / "df_gamed.csv", instructions=instructions)
    by_row = alpaca_eval(rows, gamed=files / "df_gamed.csv", align="row")
    assert by_prompt.length_controlled == by_row.length_controlled


@pytest.mark.parametrize("noise", [True, False], ids=["noisy judge", "judge that follows the difficulty"])
def test_the_interval_holds_the_uncertainty_that_a_bootstrap_of_the_models_rows_finds(files, noise):
    rows = annotations(9, files)
    y = np.array([row["preference"] - 1 for row in rows])
    if not noise:  # then all that is uncertain is which instructions were drawn
        hard = Gamed.read(files / "df_gamed.csv").difficulty_by_number
        y = expit(2.0 * np.array([hard[i] for i in range(N)]))
        rows = [{**row, "preference": 1 + float(value)} for row, value in zip(rows, y, strict=True)]
    difference = np.array([float(len(row["output_1"]) - len(row["output_2"])) for row in rows])
    gamed = Gamed.read(files / "df_gamed.csv")
    hard = np.array([gamed.difficulty_by_number[i] for i in range(N)])
    found = alpaca_eval(rows, gamed=files / "df_gamed.csv", align="row").length_controlled
    rng = np.random.default_rng(0)
    values = []
    for drawn in rng.integers(0, N, (60, N)):
        values.append(100 * length_controlled_rate(y[drawn], difference[drawn], hard[drawn], gamed, 0.95)[0].value)
    assert found.se == pytest.approx(np.std(values, ddof=1), rel=0.25)


def test_without_the_files_there_is_the_raw_rate_alone(files, tmp_path):
    rows = annotations(0, files)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    found = alpaca_eval(path)
    assert found.length_controlled is None
    assert found == alpaca_eval(rows)


def test_what_does_not_fit_is_refused(files, tmp_path):
    rows = annotations(0, files)
    gamed = files / "df_gamed.csv"
    with pytest.raises(ValueError, match="`instructions` must be given"):
        alpaca_eval(rows, gamed=gamed)
    with pytest.raises(ValueError, match="got none of 'instruction 299'"):
        alpaca_eval(rows, gamed=gamed, instructions=[f"instruction {i}" for i in range(N - 1)])
    with pytest.raises(ValueError, match="own 805 instructions"):
        alpaca_eval([*rows, {**rows[0], "instruction": "one more"}], gamed=gamed, align="row")
    with pytest.raises(ValueError, match="columns"):
        alpaca_eval(rows, gamed=files / "instruction_difficulty.csv", align="row")
    with pytest.raises(ValueError, match=r"`preference` must lie in \[1, 2\]"):
        alpaca_eval([{**rows[0], "preference": 0.7}])
    other = tmp_path / "other.csv"
    other.write_text("".join(["i,0\n", *(f"{i},0.5\n" for i in range(N))]))
    with pytest.raises(ValueError, match="one revision"):
        alpaca_eval(rows, gamed=gamed, difficulty=other, align="row")


def small(n: int = 12, **changes) -> list[dict]:
    """The form of annotations.json, with a preference that goes up and down."""
    rows = [
        {"instruction": f"i{i}", "output_1": "base answer", "output_2": "model answer " * (1 + i % 3),
         "preference": 1 + (i % 4) / 3, "generator_1": "b", "generator_2": "m"}
        for i in range(n)
    ]  # fmt: skip
    return [{**row, **changes} for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_path_may_be_a_string_and_the_file_may_begin_with_a_mark(encoding, tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(small()), encoding=encoding)
    found = alpaca_eval(str(path))
    assert found == alpaca_eval(path) == alpaca_eval(small())
    assert found.win_rate.value == pytest.approx(50.0)
    assert found.model == "m"


def test_an_output_of_none_is_an_empty_one():
    rows = small()
    rows[3]["output_2"] = rows[4]["output_1"] = None
    found = alpaca_eval(rows)
    rows[3]["output_2"] = rows[4]["output_1"] = ""
    assert found == alpaca_eval(rows)
    assert "1 outputs of the model are empty." in found.notes


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (small(preference=None), "got none in all 12"),
        (small(preference=float("nan")), "got none in all 12"),
        (small(preference="1.5"), "`preference` must be a number or None, got '1.5' in row 1"),
        (small(preference=True), "must be a number"),
        (
            [{k: v for k, v in row.items() if k != "preference"} for row in small()],
            r"got no \['preference'\] in row 1",
        ),
        ([{k: v for k, v in row.items() if k != "output_1"} for row in small()], r"no \['output_1'\]"),
        (small(output_2=7), "`output_2` must be a text, got int"),
        (small(instruction=None), "`instruction` must be a text, got NoneType"),
        ([*small(), *small()[:2]], "got several of 2, first 'i0'"),
        ([*small(), {**small(13)[-1], "generator_2": "other"}], r"`generator_2` must be one .* got \['m', 'other'\]"),
        (["text"], "must have the fields"),
        ([], "at least one row"),
    ],
)
def test_rows_that_are_no_annotations_are_named(rows, fault, files):
    for more in ({}, {"gamed": files / "df_gamed.csv", "align": "row"}):
        with pytest.raises(ValueError, match=fault):
            alpaca_eval(rows, **more)


@pytest.mark.parametrize("content", ["{}", "nonsense", '"x"', "[" * 100_000, ""])
def test_a_file_that_is_no_list_is_named(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json must be a JSON list"):
        alpaca_eval(path)


def test_the_baseline_against_itself_is_at_fifty(files):
    rows = [{**row, "output_2": row["output_1"], "preference": 1.5} for row in annotations(3, files)]
    found = alpaca_eval(rows, gamed=str(files / "df_gamed.csv"), align="row")
    assert found.win_rate.value == found.length_controlled.value == 50.0
    assert found.length_controlled.interval == (50.0, 50.0)
    assert "50 % by construction" in " ".join(found.notes)


def test_differences_that_are_all_the_same_control_nothing(files):
    rows = [{**row, "output_1": "b" * 50, "output_2": "m" * 80} for row in annotations(3, files)]
    with pytest.raises(ValueError, match="must vary for a control, got -30 characters in all 300"):
        alpaca_eval(rows, gamed=files / "df_gamed.csv", align="row")
    same = [{**row, "output_2": "m" * 50} for row in rows]
    assert 0 < alpaca_eval(same, gamed=files / "df_gamed.csv", align="row").length_controlled.value < 100


def test_a_few_looping_outputs_are_noted(files):
    rows = annotations(4, files)
    assert not alpaca_eval(rows).notes
    looping = [{**row, "output_2": "m" * 30_000} if i % 50 == 0 else row for i, row in enumerate(rows)]
    (note,) = alpaca_eval(looping).notes
    assert "(6 of 300)" in note
    assert "its control hardly works here" in note


def test_the_command_says_both_numbers_of_each_model(files, tmp_path, capsys):
    names = {}
    for seed in (0, 4):
        path = tmp_path / f"model-{seed}.json"
        path.write_text(json.dumps([{**row, "generator_2": f"m{seed}"} for row in annotations(seed, files)]))
        names[str(path)] = alpaca_eval(path, gamed=files / "df_gamed.csv", align="row")
    instructions = tmp_path / "alpaca_eval.json"
    instructions.write_text(json.dumps([{"instruction": f"instruction {i}", "output": "b"} for i in range(N)]))
    out = tmp_path / "out.json"
    more = ["--gamed", str(files / "df_gamed.csv"), "--instructions", str(instructions), "--out", str(out)]
    assert main(["alpaca_eval", *names, *more]) == 0
    said = capsys.readouterr().out
    kept = json.loads(out.read_text())
    for model, (path, found) in zip(kept["models"], names.items(), strict=True):
        assert model["annotations"] == path
        assert model["win_rate"]["value"] == found.win_rate.value
        assert model["length_controlled"]["value"] == pytest.approx(found.length_controlled.value)  # no row is missing
        assert f"{found.model}: win rate {found.win_rate.value:.2f} [" in said
        assert f"; length-controlled {found.length_controlled.value:.2f} [" in said
    assert kept["command"].startswith("sampo alpaca_eval ")
    assert main(["alpaca_eval", next(iter(names))]) == 0
    assert "needs AlpacaEval's df_gamed.csv" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: `instructions` must be given"):
        main(["alpaca_eval", *names, "--gamed", str(files / "df_gamed.csv")])


HEADS = ",win_rate,standard_error,n_total,mode,avg_length,length_controlled_winrate,lc_standard_error"


def leaderboard(folder, **rows) -> str:
    """A file in the shape of AlpacaEval's: name=(rate, annotations, characters, controlled)."""
    lines = [f"{name},{r},1.2,{n},community,{chars},{lc},0.5" for name, (r, n, chars, lc) in rows.items()]
    (folder / "leaderboard.csv").write_text("\n".join([HEADS, *lines]) + "\n")
    return str(folder / "leaderboard.csv")


def test_numbers_stand_beside_the_published_ones_and_what_is_missing_is_named(files, tmp_path, capsys):
    rows = [{**row, "generator_2": "m"} for row in annotations(7, files, missing=30, failures=2)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    instructions = tmp_path / "alpaca_eval.json"
    instructions.write_text(json.dumps([f"instruction {i}" for i in range(N)]))
    out = tmp_path / "out.json"
    by_row = alpaca_eval(rows, gamed=files / "df_gamed.csv", align="row")
    raw, controlled = by_row.win_rate.value, by_row.length_controlled.value
    place = leaderboard(
        tmp_path, m=(raw, 268, int(by_row.mean_length), controlled), other=(50.0, 300, 100, ""), n=(raw + 1, 300, 9, 1)
    )
    words = ["--gamed", str(files / "df_gamed.csv"), "--instructions", str(instructions), "--leaderboard", place]
    assert main(["alpaca_eval", str(path), *words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"On the leaderboard: win rate {raw:.2f} (ours +0.00), length-controlled {controlled:.2f}" in said
    assert "(ours by row number +0.00)" in said
    assert "268 annotations: the same numbers." in said
    assert "against baseline, annotated by judge" in said
    there = {row["instruction"] for row in rows}
    missing = [i + 1 for i in range(N) if f"instruction {i}" not in there]
    failed = [number for number, row in enumerate(rows, 1) if row["preference"] is None]
    assert (
        f"30 of 300 instructions have no annotation: numbers {', '.join(map(str, missing[:10]))} and 20 more" in said
    )
    assert f"left out of the win rate: rows {failed[0]}, {failed[1]}." in said
    assert f"From row {missing[0]} on the row number is not the number of the instruction" in said
    assert f"goes by row number: {controlled:.2f}, which is what its leaderboard has" in said
    (model,) = json.loads(out.read_text())["models"]
    assert model["missing"] == missing
    assert model["by_row"]["value"] == pytest.approx(controlled)
    assert model["length_controlled"]["value"] != pytest.approx(controlled, abs=0.01)
    assert model["published"]["win_rate"] == pytest.approx(raw)
    assert main(["alpaca_eval", str(path), *words, "--align", "row"]) == 0
    said = capsys.readouterr().out
    assert f"length-controlled {controlled:.2f} [" in said
    assert "these rows have the difficulty of other instructions" in said
    for name, phrase in (("n", "These are not the annotations of the leaderboard"), ("om", "nearest name is m")):
        path.write_text(json.dumps([{**row, "generator_2": name} for row in rows]))
        assert main(["alpaca_eval", str(path), "--leaderboard", place]) == 0
        assert phrase in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("model,score\nm,1\n", "must be a leaderboard of AlpacaEval"),
        ("", "must be a leaderboard of AlpacaEval"),
        (f"{HEADS}\nm,much,1,2,x,3,4,5\n", "line 2, `win_rate` must be a number, got 'much'"),
        (f"{HEADS}\nm,,1,2,x,3,4,5\n", "line 2: `win_rate` must be a number, got none"),
        (f"{HEADS}\nm,nan,1,2,x,3,4,5\n", "must be a number"),
    ],
)
def test_a_file_that_is_no_leaderboard_is_named(text, fault, tmp_path):
    (tmp_path / "leaderboard.csv").write_text(text)
    with pytest.raises(SystemExit, match=fault):
        main(["alpaca_eval", "annotations.json", "--leaderboard", str(tmp_path / "leaderboard.csv")])


# `pip install alpaca-eval==0.6.6 'setuptools<81'` beside this package runs it
@pytest.mark.skipif(importlib.util.find_spec("alpaca_eval") is None, reason="the package alpaca-eval is not installed")
def test_both_numbers_are_those_of_the_package(files, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pandas as pd
        from alpaca_eval.metrics import glm_winrate

        monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda repo_id, filename, **_: str(files / filename))
        errors = []
        for seed in range(12):
            rows = annotations(seed, files, missing=3 * (seed % 2), failures=2 * (seed % 3), draws=seed % 2)
            official = glm_winrate.get_length_controlled_winrate(pd.DataFrame(rows), save_weights_dir=None)
            found = alpaca_eval(rows, gamed=files / "df_gamed.csv", align="row")
            assert found.win_rate.value == pytest.approx(official["win_rate"], abs=1e-6)
            errors.append(abs(found.length_controlled.value - official["length_controlled_winrate"]))
    print(f"length-controlled, ours against the package: mean {np.mean(errors):.3f}, largest {max(errors):.3f} points")
    assert max(errors) <= 0.15
    assert np.mean(errors) <= 0.06
