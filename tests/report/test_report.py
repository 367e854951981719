"""`sampo report`: what stands on the page is what was measured, and nothing that comes from data or a model runs."""

import base64
import hashlib
import html
import http.server
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_up_scores import made_up

from sampo.cli import COMMANDS, main
from sampo.diagnostics.findings import findings
from sampo.evaluation.answers.answers import Answer, write_answers
from sampo.io import records as results
from sampo.lab.section import lab_section
from sampo.report import evaluation_figures, training_figures
from sampo.report.build import build_report
from sampo.report.collect import collect, plain

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</style></svg></pre><img src=x onerror=\"document.title='taken'\"> &amp; &lt;b&gt;",
    "[a](javascript:document.title='taken') <a href=\"javascript:alert(1)\">b</a> https://example.invalid/x.png",
    "half of a pair \ud83d, a control \x00\x1b[31m, a whole one 🙂",
    "\u202eשלום עולם, مرحبا بالعالم\u202c $\\frac{1}{0}$ `code` {{ 7 * 7 }} {% raw %}",
    "word" * 3000,
]
NAME = "<b>&\"'{{ 7*7 }}$x^2$"  # of a group, a run, a policy
OTHER = "<b>other`<i>`"  # of a system
PROMPTS = 24


class Page(HTMLParser):
    """Tags with their attributes in order, texts by tag, and the texts of what was said."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.said: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.depth_of_said = None
        self.feed(text)
        self.close()
        assert not self.open, "every element that is opened is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if dict(attrs).get("class") == "said":
            self.depth_of_said = len(self.open)
            self.said.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if self.depth_of_said is not None and len(self.open) < self.depth_of_said:
            self.depth_of_said = None

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.depth_of_said is not None:
            self.said[-1] += data

    def of(self, *tags: str) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag in tags]

    def text(self) -> str:
        return " ".join(" ".join(data for _, data in self.texts).split())


def write_audit(folder: Path) -> None:
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"q{i}",
            "chosen": "so " * rng.randint(1, 60) + "yes",
            "rejected": "so " * rng.randint(1, 40) + "no",
            "source": NAME if i % 3 else "other",
        }
        for i in range(60)
    ]
    rows[7]["chosen"] = ""
    data = folder / "pairs.json"
    data.write_text(json.dumps(rows))
    with pytest.raises(SystemExit):  # exit code 3: a faulty row
        main(["audit", str(data), "--by", "source", "--label", NAME, "--out", str(folder / "audit")])


def write_run(folder: Path, *, steps: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    names = [name for curve in training_figures.CURVES.values() for name in curve.metrics]
    log = [
        {"step": step, "epoch": 1.0, **dict(zip(names, rng.random(len(names)), strict=True))}
        for step in range(1, steps)
    ]
    log.append({"step": steps, "eval_loss": 0.5, "eval_held_accuracies/chosen_longer": 0.25, "loss": math.nan})
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": log}))
    return log


def write_diagnosis(folder: Path) -> list[results.Record]:
    scores, _ = made_up(90)
    found = findings(scores, beta=0.1, by={"source": np.array(["x", NAME, "y"] * 30)}, resamples=100)
    config = {"reference": "base", "data": NAME, "beta": 0.1, "policy": f"out/{NAME}", "pairs": "ab12"}
    records = [
        results.Record(
            name=f"diagnose/{f.quantity}",
            value=f.estimate.value,
            n=f.estimate.n,
            interval=f.estimate.interval,
            config=config | f.labels,
            command="sampo diagnose --policy <p>",
            **results.provenance(),
        )
        for f in found
    ]
    results.append(folder / "records.jsonl", records)
    return records


def write_answers_and_judgements(folder: Path) -> None:
    rng = random.Random(1)
    for name in ("mine", OTHER, "base"):
        answers = [
            Answer(
                prompt=HOSTILE[i % len(HOSTILE)] + f" {i}",
                answer=f"{HOSTILE[(i + 4 + (name == OTHER)) % len(HOSTILE)]} town{i if rng.random() < 0.6 else ''}",
                extra={"reference": f"town{i}"},
                model=NAME,
            )
            for i in range(PROMPTS)
        ]
        write_answers(folder / f"{name}.jsonl", answers)
    for name in ("mine", OTHER):
        files = [str(folder / f"{n}.jsonl") for n in (name, "base")]
        out = str(folder / f"{name}-judged.jsonl")
        assert main(["judge", "--system", files[0], "--baseline", files[1], "--judge", "contains", "--out", out]) == 0
    rows = [
        {"prompt": f"q{i}", "chosen": "so " * (i % 7 + 1), "rejected": "so " * (i % 5 + 2), "subset": NAME}
        for i in range(30)
    ]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    pairs = folder / "people.json"
    pairs.write_text(json.dumps(rows))
    assert main(["judge", "--labelled", str(pairs), "--judge", "longer", "--out", str(folder / "check.jsonl")]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Outputs of all commands, small, with hostile contents."""
    place = tmp_path_factory.mktemp("outputs")
    write_audit(place)
    write_run(place / "runs" / "dpo", steps=9)
    write_run(place / "runs" / NAME.replace("/", ""), steps=9, seed=1)
    write_run(place / "runs" / "dpo" / "checkpoint-5", steps=5)
    write_diagnosis(place / "diagnosis")
    write_answers_and_judgements(place)
    judged = [str(place / f"{name}-judged.jsonl") for name in ("mine", OTHER)]
    assert main(["compare", "--judgements", *judged, "--out", str(place / "both")]) == 0
    (place / "lab").mkdir()
    lab = (ROOT / "measurements" / "lab.jsonl").read_text().splitlines(keepends=True)
    (place / "lab" / "records.jsonl").write_text("".join(line for line in lab if json.loads(line)["seed"] == 0))
    other = results.Record(name="speed", value=1.5, n=3, config={"what": NAME}, **results.provenance())
    bench = results.Record(name="mmlu/acc", value=0.25, n=9, config={"benchmark": "mmlu", "model": NAME})
    results.append(place / "numbers.jsonl", [other, bench])
    return place


@pytest.fixture(scope="module")
def report(folder):
    return build_report(folder, lab_section=lab_section)


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(report.html)


# --- what stands on it


def test_everything_that_is_there_has_a_section_and_no_file_is_left_out(report):
    assert report.shown == [
        *(
            "Preference data",
            "Training",
            "Length pressure and rewards of a model",
            "Win rate and verbosity",
            "Judges",
            "Answers",
        ),
        *("The lab", "Benchmarks", "Other records"),
    ]
    assert report.problems == []
    assert report.missing == []


def cells(page: Page, head: str) -> list[str]:
    """Texts of the first row that begins with `head`."""
    texts = [(tag, " ".join(data.split())) for tag, data in page.texts if data.strip()]
    start = texts.index(("th", head))
    row = []
    for tag, text in texts[start + 1 :]:
        if tag != "td":
            break
        row.append(text)
    return row


def test_the_tables_hold_the_numbers_of_the_records(page, folder):
    audit = {
        r.name: r for r in results.read(folder / "audit" / "records.jsonl") if not set(r.config) & {"split", "group"}
    }
    longer = audit["audit/longer"]
    assert cells(page, "chosen is longer")[0] == f"{100 * longer.value:.1f} %"
    assert longer.n == 59
    row = json.loads((folder / "both.json").read_text())["systems"][0]
    low, high = row["win_rate_low"], row["win_rate_high"]
    found = cells(page, "mine")
    assert found[:2] == [str(PROMPTS), f"{100 * row['win_rate']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"]
    kept = {r.name: r for r in results.read(folder / "check.agreement.jsonl")}
    accuracy, size = kept["agreement/accuracy"], kept["agreement/count/pairs"].value
    bounds = f"({100 * accuracy.interval[0]:.1f} to {100 * accuracy.interval[1]:.1f})"
    assert cells(page, "all pairs") == [f"{size:.0f}", f"{100 * accuracy.value:.1f} % {bounds}"]
    assert f"The judge agrees with people in {100 * accuracy.value:.1f} % [" in page.text()
    assert cells(page, f"subset={NAME}")[0] == f"{size:.0f}"
    assert f"{kept['agreement/kappa'].value:.2f} (" in cells(page, "Cohen's κ")[0]
    diagnosed = results.read(folder / "diagnosis" / "records.jsonl")
    pressure = next(r for r in diagnosed if r.name == "diagnose/pressure" and r.config["group"] == "all")
    assert f"{pressure.value:+.3f} ({pressure.interval[0]:.3f} to {pressure.interval[1]:.3f})" in page.text()


def test_every_figure_and_table_says_of_how_many_and_from_what(page, folder, report):
    rows = [attrs["id"] for attrs in page.of("tr") if "id" in attrs]
    assert rows == [f"origin-{n}" for n in range(1, len(rows) + 1)]
    captions = re.findall(r"<figcaption>.*?</figcaption>", report.html, re.DOTALL)
    assert len(captions) == len(page.of("svg")) > 20
    for caption in captions:
        assert re.search(r"\d[\d,]* [a-z]+", caption), caption
        assert re.search(r'href="#origin-\d+"', caption), caption
    record = results.read(folder / "diagnosis" / "records.jsonl")[0]
    text = page.text()
    assert "sampo diagnose --policy <p>" in text
    assert record.created[:10] in text
    assert f"numpy {record.versions['numpy']}" in text
    if record.commit:
        assert record.commit[:12] in text


def test_answers_stand_side_by_side_as_they_were_given(page, folder):
    answers = {}
    for name in ("mine", OTHER, "base"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        answers |= {row["answer"]: row for row in rows} | {row["prompt"]: row for row in rows}
    limits = {plain(text)[:4000] for text in answers} | {plain(text)[:2000] for text in answers}
    assert len(page.said) == 6 * 4
    assert set(page.said) <= limits
    assert any("<script>" in text for text in page.said)
    assert any(len(text) == 4000 for text in page.said)


def test_experiments_of_the_lab_with_other_settings_are_shown_each_by_itself(folder, tmp_path):
    records = results.read(folder / "lab" / "records.jsonl")
    others = [replace(r, config=r.config | {"beta": 0.5}) for r in records if r.config["method"] != "sft"]
    results.append(tmp_path / "records.jsonl", [*records, *others])
    made = build_report(tmp_path, lab_section=lab_section)
    assert (made.shown, made.problems) == (["The lab"], [])
    text = Page(made.html).text()
    assert text.count("Methods against the truth") == text.count("SFT (start) –") == 2
    assert "beta 0.1," in text
    assert "beta 0.5," in text


def test_without_the_section_of_the_lab_its_records_are_among_the_others(folder, tmp_path):
    results.append(tmp_path / "records.jsonl", results.read(folder / "lab" / "records.jsonl"))
    made = build_report(tmp_path)
    assert (made.shown, made.problems) == (["Other records"], [])
    assert "win_rate" in Page(made.html).text()


# --- the conclusion


def conclusion(made) -> list[str]:
    """Its sentences, as text."""
    part = made.html.split('<h2 id="conclusion">')[1].split("</section>")[0]
    return [html.unescape(re.sub("<[^>]+>", "", item)) for item in re.findall(r"<li>(.*?)</li>", part, re.DOTALL)]


def test_the_conclusion_comes_first_and_decides_by_the_intervals_of_the_records(report, folder):
    assert re.findall(r'<h2 id="([^"]+)"', report.html)[0] == "conclusion"
    sentences = conclusion(report)
    row = json.loads((folder / "mine-judged.summary.json").read_text())["result"]
    (sentence,) = (one for one in sentences if one.startswith("mine against base by contains"))

    def shown(key):
        return f"{100 * row[key]:.1f} % ({100 * row[f'{key}_low']:.1f} to {100 * row[f'{key}_high']:.1f})"

    assert (
        f"{PROMPTS} prompts: wins {shown('win_rate')}, at equal length {shown('win_rate/equal_length')};" in sentence
    )
    decided = [row[f"{key}_low"] > 0.5 or row[f"{key}_high"] < 0.5 for key in ("win_rate", "win_rate/equal_length")]
    assert ("undecided" in sentence) == (not all(decided))
    verdict = json.loads((folder / "audit" / "audit.json").read_text())["verdict"].replace("`", "")
    assert sentences[0].endswith(verdict)
    assert sum(one.startswith("Run ") and "do not name model and data" in one for one in sentences) == 2
    assert not [one for one in sentences if one.startswith(("Forecast", "Outcome", "Not measured"))]


RESULTS = {  # bounds of the raw win rate and of that at equal length -> the words
    ((0.6, 0.7), (0.55, 0.7)): "Raw and at equal length: a wins.",
    ((0.6, 0.7), (0.45, 0.6)): "Raw: a wins. At equal length: undecided, the interval holds 50 %. Length may be",
    ((0.4, 0.55), (0.3, 0.45)): "Raw: undecided, the interval holds 50 %. At equal length: b wins.",
    ((0.2, 0.4), None): "Raw: b wins. There is no win rate at equal length, so length may be the reason.",
    ((0.4, 0.6), (0.4, 0.6)): "Raw and at equal length: undecided, the interval holds 50 %.",
}


@pytest.mark.parametrize("bounds", RESULTS, ids=str)
def test_a_result_is_decided_only_where_the_interval_excludes_half(tmp_path, bounds):
    row = {"system": "a", "baseline": "b", "judge": "reward", "prompts": 99, "length_unit": "characters"}
    for key, pair in zip(("win_rate", "win_rate/equal_length"), bounds, strict=True):
        if pair:
            row |= {key: sum(pair) / 2, f"{key}_low": pair[0], f"{key}_high": pair[1]}
    content = {"command": "sampo compare", "systems": [row], "duels": [], "configs": {}}
    (tmp_path / "c.json").write_text(json.dumps(content))
    results.append(tmp_path / "c.records.jsonl", [results.Record(name="win_rate", value=0.5, n=99, config={})])
    sentence, *lacking = conclusion(build_report(tmp_path))
    assert RESULTS[bounds] in sentence
    missing = build_report(tmp_path).missing
    assert [one.partition(". sampo ")[0] for one in lacking] == [f"Not measured here: {what}" for what in missing]
    assert any("sampo train" in one for one in lacking)
    row["judge"] = "longer"
    (tmp_path / "c.json").write_text(json.dumps(content))
    sentence = conclusion(build_report(tmp_path))[0]
    assert "a control, which shows nothing about quality" in sentence
    assert "Raw" not in sentence


CARD = """\
This model is a fine-tuned version of `base`.

## Method

Trained with sampo. Method: SamPO (`token_weighting: sampo`, arXiv 2406.10957, Eq. 10){more}.
Reference: a copy of the initial policy. Beta 0.1, loss ['sigmoid'].

## Data

`pairs.jsonl`: 60 pairs, 9.0 chosen and 8.0 rejected tokens on average; at max_length 1024: 0 dropped.
"""


def write_chain(folder: Path, *, start: str = "base", more: str = "") -> None:
    """A diagnosis of `base`, a run from it, and answers of both, those of the run longer."""
    write_run(folder / "runs" / "mine", steps=4)
    (folder / "runs" / "mine" / "README.md").write_text(CARD.format(more=more))
    pressure = {"policy": "/models/base", "reference": None, "group": "all", "data": "d", "beta": 0.1, "pairs": "ab"}
    made = [
        results.Record(
            name="diagnose/pressure", value=v, interval=(v - 1, v + 1), n=9, config=pressure | {"method": m}
        )
        for m, v in {"sampo": -2.0, "prefix": 2.0, "all": 0.5}.items()
    ]
    results.append(folder / "records.jsonl", made)
    for name, model, words in (("after", "runs/mine", 9), ("start", start, 3)):
        answers = [Answer(prompt=f"q{i}", answer="so " * (words + i % 2), model=model) for i in range(24)]
        write_answers(folder / f"{name}.jsonl", answers)
    files = [str(folder / f"{name}.jsonl") for name in ("after", "start")]
    words = ["judge", "--system", files[0], "--baseline", files[1], "--judge", "longer"]
    assert main([*words, "--out", str(folder / "j.jsonl")]) == 0


def test_a_forecast_stands_beside_its_outcome_where_the_files_name_one_model(tmp_path):
    write_chain(tmp_path)
    sentences = conclusion(build_report(tmp_path))
    assert (
        "Forecast for base: by the length pressure, a first step lengthens with sampo; it shortens with prefix; it "
        "has no sure direction with all." in sentences
    )
    (run,) = (one for one in sentences if one.startswith("Run runs/mine"))
    assert (
        "4 steps from base with SamPO (token_weighting: sampo, arXiv 2406.10957, Eq. 10), on pairs.jsonl: 60 pairs"
        in run
    )
    (outcome,) = (one for one in sentences if one.startswith("Outcome for runs/mine (sampo): 28 "))
    assert "longer than the start's 10 " in outcome
    assert outcome.endswith("The forecast was: longer.")


def test_the_lengths_of_generated_answers_stand_beside_the_pressure_and_the_forecast(tmp_path):
    write_chain(tmp_path)
    path = tmp_path / "runs" / "mine" / "trainer_state.json"
    answers = [(0, 20.0, 0.75), (10, 25.0, 0.5), (20, 34.0, 0.25)]
    log = [{"step": s, "length/generated": n, "length/generated_ended": share} for s, n, share in answers]
    log.insert(1, {"step": 5, "loss": 0.5, "length_gap/pressure": -0.152})
    path.write_text(json.dumps({"global_step": 20, "log_history": log}))
    sentences = conclusion(build_report(tmp_path))
    assert (
        "Answers of runs/mine to held-out prompts: 20.0 tokens at step 0 and 34.0 at step 20, 1.70 times as many; "
        "25% of the last ones ended. Its first length pressure was -0.152; below 0 lengthens." in sentences
    )
    assert (
        "Answers of runs/mine (sampo) in training: in the end 1.70 times as many tokens as at the start. The forecast "
        "was: longer." in sentences
    )


@pytest.mark.parametrize("other", [{"start": "another"}, {"more": ", `sampled_sides: rejected`"}], ids=str)
def test_a_forecast_of_something_else_has_no_outcome(tmp_path, other):
    write_chain(tmp_path, **other)
    sentences = conclusion(build_report(tmp_path))
    assert [one for one in sentences if one.startswith("Forecast for base")]
    assert not [one for one in sentences if one.startswith("Outcome")]


# --- nothing runs, nothing is loaded


def test_no_element_can_run_or_load_anything(page, report):
    allowed = {
        *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "div", "span", "p"),
        *("h1", "h2", "h3", "h4", "ul", "li", "a", "code", "strong", "figure", "figcaption", "table", "caption"),
        *(
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "svg",
            "g",
            "path",
            "use",
            "defs",
            "clippath",
            "rect",
            "text",
            "tspan",
            "desc",
        ),
    }
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "style", "srcset", "action")], (
            tag
        )
        assert attrs.get("href", "#").startswith("#")
        assert all("url(" not in value or value.startswith("url(#") for value in attrs.values() if value)
    assert len(page.of("style")) == 1
    (style,) = re.findall(r"<style>(.*?)</style>", report.html, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (attrs["content"] for attrs in page.of("meta") if attrs.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_hostile_names_are_text_in_tables_and_figures(page, report):
    assert NAME in page.text()
    assert "<b>" not in report.html
    assert "<i>" not in report.html
    assert "<b>other <i> wins " in page.text()  # what stands in backticks is code, and text all the same
    drawn = [data for tag, data in page.texts if tag == "text"]
    assert any(NAME in text for text in drawn)


# --- who reads it


def test_ids_are_unique_and_everything_that_is_pointed_at_is_there(page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 100
    for _, attrs in page.tags:
        pointed = attrs.get("aria-labelledby", "").split()
        for name in ("href", "xlink:href", "clip-path", "fill"):
            pointed += re.findall(r"#([^)]+)\)?$", attrs.get(name) or "") if "#" in (attrs.get(name) or "") else []
        assert {one for one in pointed if not re.fullmatch("[0-9a-f]{6}", one)} <= set(ids)


def test_every_picture_has_a_name_and_a_description(report):
    pictures = re.findall(r"<svg .*?</svg>", report.html, re.DOTALL)
    assert pictures
    titles = []
    for picture in pictures:
        title = re.search(r'<title id="([^"]+)">([^<]+)</title><desc id="([^"]+)">([^<]{40,})</desc>', picture)
        assert title, picture[:300]
        assert f'role="img" aria-labelledby="{title[1]} {title[3]}"' in picture
        titles.append(title[2])
    assert "Verbosity and win rate against base" in titles


def test_headings_are_in_order_and_tables_have_heads(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {attrs.get("scope") for attrs in page.of("th")} == {"row", "col"}
    assert len(page.of("caption")) == len(page.of("table")) - 1  # the last one is called by its heading
    assert page.of("html") == [{"lang": "en"}]


def test_the_same_files_give_the_same_page_also_beside_an_earlier_one(folder, report):
    for _ in range(2):
        assert main(["report", str(folder)]) == 0
        assert (folder / "report.html").read_text(encoding="utf-8") == report.html


# --- what is not there, or not what it should be


def test_an_empty_folder_names_what_is_missing_and_commands_that_exist(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--title", "<i>", "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<title>&lt;i&gt;</title>" in text
    commands = re.findall(r"<code>sampo (\w+) ", text)[1:]  # the first is its own
    assert commands == ["audit", "train", "diagnose", "judge", "judge", "generate", "lab"]
    assert set(commands) <= set(COMMANDS)
    assert "nothing was found to show" in capsys.readouterr().out


def test_what_is_no_folder_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="must be a folder with outputs"):
        main(["report", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="`out` must name a file"):
        main(["report", str(tmp_path), "--out", str(tmp_path)])


BROKEN = {
    "audit/audit.json": b'{"data": "x", "splits": [], "conclusion": "y"}',
    "run/trainer_state.json": b'{"log_history": [1]}',
    "step/trainer_state.json": b'{"log_history": [], "global_step": "<b>"}',
    "other/trainer_state.json": b"\xff\xfe{",
    "deep/trainer_state.json": b"[" * 100_000,
    "x.summary.json": b'{"result": 1}',
    "y.records.jsonl": b'{"schema": 99, "name": "a", "value": 1, "config": {}}\n',
    "types.jsonl": (
        json.dumps({**json.loads(results.lines([results.Record(name="a", value=1.0, n=1, config={})])), "config": [1]})
        + "\n"
    ).encode(),
    "answers.jsonl": b'{"prompt": "a", "answer": "b"}\n{"prompt": 3, "answer": "b"}\n',
    "bytes.jsonl": b'{"prompt": "a", "answer": "\xff"}\n',
    "judgements.jsonl": b'{"prompt_id": "a", "order": "ab", "preference": 1}\n',
}


def test_broken_files_are_named_and_the_others_are_shown(tmp_path):
    write_run(tmp_path / "whole", steps=4)
    for name, content in BROKEN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "audit" / "records.jsonl").write_text("")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    made = build_report(tmp_path)
    assert made.shown == ["Training"]
    assert sorted(problem.file for problem in made.problems) == sorted(BROKEN)
    assert "<b>" not in made.html
    text = Page(made.html).text()
    for problem in made.problems:
        assert problem.file in text
        assert problem.reason
        assert "\n" not in problem.reason
        assert str(tmp_path) not in problem.reason
    assert "model.bin" in text


def test_what_is_inside_of_a_file_may_be_anything(folder, tmp_path):
    """One value of a file after the other is replaced by another kind of value; there is always a page."""
    rng = random.Random(0)
    junk = [None, True, -1, 1e308, "x" * 300, "\ud800", [], [[1]], {}, {"a": {"b": []}}, math.nan]
    kinds = ("audit/audit.json", "audit/records.jsonl", "runs/dpo/trainer_state.json", "diagnosis/records.jsonl")
    kinds += (
        "mine-judged.summary.json",
        "both.json",
        "both.records.jsonl",
        "lab/records.jsonl",
        "mine.jsonl",
        "check.agreement.jsonl",
    )

    def spoil(value):
        if isinstance(value, dict) and value and rng.random() < 0.9:
            key = rng.choice(list(value))
            return {**value, key: spoil(value[key])}
        if isinstance(value, list) and value and rng.random() < 0.9:
            place = rng.randrange(len(value))
            return [*value[:place], spoil(value[place]), *value[place + 1 :]]
        return rng.choice(junk)

    for _ in range(12):
        name = rng.choice(kinds)
        place = tmp_path / "one"
        shutil.rmtree(place, ignore_errors=True)
        (place / name).parent.mkdir(parents=True)
        start = "*" if "/" in name else name.split(".")[0].split("-")[0] + "*"
        for beside in (folder / name).parent.glob(start):
            if beside.is_file():
                shutil.copy(beside, (place / name).parent)
        lines = (folder / name).read_text().splitlines() if name.endswith("jsonl") else [(folder / name).read_text()]
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(spoil(json.loads(lines[number])))
        (place / name).write_text("\n".join(lines) + "\n")
        Page(build_report(place, lab_section=lab_section).html)


def test_only_so_much_is_looked_at(tmp_path, monkeypatch):
    deep = tmp_path.joinpath(*"abcdefghi")
    write_run(deep, steps=3)
    write_run(tmp_path / "near", steps=3)
    (tmp_path / ".hidden").mkdir()
    write_run(tmp_path / ".hidden" / "run", steps=3)
    (tmp_path / "link").symlink_to(tmp_path / "near", target_is_directory=True)
    found = collect(tmp_path)
    assert [run.name for run in found.runs] == ["near"]
    assert "more than 8 below" in found.notes[0]
    monkeypatch.setattr("sampo.report.collect.MAX_BYTES", 10)
    assert "at most 10 bytes" in collect(tmp_path).problems[0].reason
    monkeypatch.setattr("sampo.report.collect.MAX_FILES", 0)
    assert collect(tmp_path).runs == []


# --- figures


def test_curves_are_the_log_of_the_run_and_checkpoints_do_not_repeat_it(folder):
    runs = {run.name: run.log for run in collect(folder).runs}
    assert list(runs) == sorted(["runs/dpo", f"runs/{NAME}"])
    ax = training_figures.training_curve(runs, "lengths")
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    for run, log in runs.items():
        for side in ("chosen", "rejected"):
            expected = [(entry["step"], entry[f"length/{side}"]) for entry in log if f"length/{side}" in entry]
            assert lines[f"{run}, {side}"].tolist() == [list(map(float, point)) for point in expected]
            assert len(expected) == 8
    evaluated = training_figures.points(runs["runs/dpo"], "accuracies/chosen_longer", evaluation=True)
    assert evaluated == ([9.0], [0.25])
    assert 9.0 not in training_figures.points(runs["runs/dpo"], "loss")[0]  # it is NaN there
    with pytest.raises(ValueError, match="got none of them"):
        training_figures.training_curve({"a": [{"step": 1}]}, "theta")


def test_the_frontier_has_each_system_at_its_length_and_win_rate():
    rng = np.random.default_rng(3)
    rows = []
    for i in range(3):
        length, rate, fair = rng.uniform(10, 90), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)
        row = {"system": f"s{i}", "baseline": "b", "length_unit": "words", "length/baseline": 40.0}
        row |= {"length/system": length, "length/system_low": length - 2, "length/system_high": length + 3}
        row |= {"win_rate": rate, "win_rate_low": rate - 0.1, "win_rate_high": rate + 0.2}
        rows.append(row | {"win_rate/equal_length": fair if i else None})
    ax = evaluation_figures.frontier(rows)
    for row, container in zip(rows, ax.containers, strict=True):
        line, _, (across, up) = container
        assert (line.get_xdata()[0], line.get_ydata()[0]) == (row["length/system"], row["win_rate"])
        assert across.get_segments()[0][:, 0] == pytest.approx([row["length/system_low"], row["length/system_high"]])
        assert up.get_segments()[0][:, 1] == pytest.approx([row["win_rate_low"], row["win_rate_high"]])
    hollow = [line.get_ydata()[0] for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert hollow == [row["win_rate/equal_length"] for row in rows[1:]]
    assert "words" in ax.get_xlabel()
    with pytest.raises(ValueError, match="must have a length and a win rate"):
        evaluation_figures.frontier([{"system": "s", "win_rate": 0.5}])


def test_win_rates_by_ratio_stand_in_the_order_of_the_ratios():
    rates = {"2_inf": 0.7, "0_0.5": 0.1, "0.8_1.25": 0.4}
    row = {"system": "s", **{f"win_rate/length_ratio_{name}": rate for name, rate in rates.items()}}
    row["win_rate/length_ratio_0.5_0.8"] = None
    ax = evaluation_figures.win_rate_by_length_ratio([row])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["< 0.5×", "0.8–1.25×", "≥ 2×"]
    assert ax.containers[0].lines[0].get_ydata().tolist() == [0.1, 0.4, 0.7]


@pytest.mark.parametrize("scale", [8, 400])
def test_the_histogram_of_answers_holds_every_answer_once(scale):
    rng = np.random.default_rng(0)
    lengths = {"a": rng.integers(0, scale, 300), "b": rng.integers(1, 2 * scale, 500)}
    ax = evaluation_figures.answer_lengths(lengths, unit="words")
    for values, patch in zip(lengths.values(), ax.patches, strict=True):
        vertices = patch.get_path().vertices
        heights, edges = vertices[1:-1:2, 1], np.unique(vertices[:, 0])
        expected = np.histogram(np.minimum(values, edges.max()), edges)[0] / len(values)
        assert heights == pytest.approx(expected)
        assert heights.sum() == pytest.approx(1)


# --- in a browser

CHROMIUM = shutil.which("chromium")
HARNESS = """<!doctype html><title>harness</title><pre id="found"></pre><script>
const frame = document.createElement("iframe");
frame.width = 400; frame.height = 900; frame.src = "/page.html";
frame.onload = () => {
  const inner = frame.contentDocument, root = inner.documentElement;
  const pictures = [...inner.querySelectorAll(".paper svg")];
  document.getElementById("found").textContent = JSON.stringify({
    title: inner.title, wide: root.scrollWidth, elements: inner.querySelectorAll("script, img, iframe, b, i").length,
    said: [...inner.querySelectorAll(".said")].map(one => one.textContent),
    drawn: pictures.filter(svg => svg.getBoundingClientRect().height > 100).length,
    background: frame.contentWindow.getComputedStyle(inner.body).backgroundColor,
  });
};
document.body.append(frame);
</script>"""


@pytest.fixture(scope="module")
def server(report, tmp_path_factory):
    """The page and the harness on the loop-back, and the paths that are asked for."""
    asked: list[str] = []
    contents = {"/page.html": report.html, "/harness.html": HARNESS}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = contents.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((content or "").encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def browse(tmp_path: Path, url: str, *options: str) -> subprocess.CompletedProcess:
    """A fresh headless browser that can reach the loop-back alone; what it wrote, and its console among the errors."""
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    words += " --disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --v=0"
    words += " --proxy-server=127.0.0.1:9 --virtual-time-budget=20000"  # nobody listens there; loop-back goes past it
    command = [CHROMIUM, *words.split(), f"--user-data-dir={tmp_path / 'profile'}", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def console(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("scheme", "background"), [(1, "rgb(255, 255, 255)"), (0, "rgb(22, 24, 27)")])
def test_a_browser_runs_nothing_asks_for_nothing_and_finds_no_fault(server, page, tmp_path, scheme, background):
    url, asked = server
    asked.clear()
    dark = f"--blink-settings=preferredColorScheme={scheme}"
    done = browse(tmp_path, f"{url}/harness.html", "--dump-dom", dark, "--window-size=1000,1000")
    assert console(done) == []
    assert [path for path in asked if path != "/favicon.ico"] == ["/harness.html", "/page.html"]
    dumped = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    found = json.loads(html.unescape(dumped[1]))
    assert found["title"].startswith("sampo report")
    assert found["elements"] == 0
    assert found["said"] == page.said
    assert found["wide"] <= 400, "no sideways scrolling on a small screen"
    assert found["drawn"] == len(page.of("svg"))
    assert found["background"] == background


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_it_opens_from_the_disk_and_prints(report, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(report.html, encoding="utf-8")
    printed = tmp_path / "page.pdf"
    done = browse(tmp_path, file.as_uri(), f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    assert console(done) == []
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert 5 < len(re.findall(rb"/Type\s*/Page\b", content)) < 80
