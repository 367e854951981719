"""Written verdicts: every decoration that judges are known to add, and nothing that leaves a doubt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampo.evaluation.judging import templates
from sampo.evaluation.judging.verdict_text import read_verdict

VERDICTS = {"A": 1.0, "B": 0.0, "tie": 0.5}
WORDS = {"A": "A", "B": "B", "tie": "Tie"}
AROUND = ("{}", "[{}]", "[[{}]]", "({})", "<{}>", "**{}**", "*{}*", "`{}`", '"{}"', "'{}'", "“{}”", "__{}__", "{}.",
          "{}!", r"\boxed{{{}}}", r"$\boxed{{{}}}$", r"\text{{{}}}", "<answer>{}</answer>", "<b>{}</b>", " {}  ",
          "\u200b{}", "Answer {}", "the response {}", "Output ({})", "Assistant {}", "{} (shorter, and right)",
          "{} because it is to the point")  # fmt: skip
LABELS = ("Preferred: {}", "preferred: {}", "PREFERRED : {}", "**Preferred:** {}", "**Preferred**: {}",
          "> Preferred: {}", "- Preferred: {}", "### Preferred: {}", "Preferred：{}", "Preferred answer: {}",
          "Preferred is: {}", "Final verdict: {}", "My final verdict is: {}", "Verdict: {}", "**Preferred: {}**",
          "`Preferred: {}`",           "Preferred - {}")  # fmt: skip
ONCE = ("Answer {}", "the response {}", "Output ({})", "Assistant {}", "{} (shorter, and right)",
        "{} because it is to the point")  # fmt: skip


def read(line: str) -> float | None:
    return read_verdict(f"Comparison: A says B, B says A.\n{line}\n", "Preferred:", VERDICTS)


@pytest.mark.parametrize("word", VERDICTS)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("around", AROUND)
def test_a_verdict_in_any_decoration_is_read(word, label, around):
    for written in (word.lower(), word.upper(), word.title()):
        assert read(label.format(around.format(written))) == VERDICTS[word]


@given(
    st.sampled_from(sorted(VERDICTS)),
    st.sampled_from(LABELS),
    st.lists(st.sampled_from([around for around in AROUND if around not in ONCE]), max_size=4),
    st.sampled_from(["", "\n```", "\n---", "\n\n  \n", "\n**"]),
)
@settings(deadline=None, max_examples=300)
def test_decorations_inside_each_other_change_nothing(word, label, around, tail):
    text = word
    for one in around:
        text = one.format(text)
    assert read(label.format(text) + tail) == VERDICTS[word]


JOINTS = ("{} or {}", "{}/{}", "{}, {}", "{} and {}", "{} > {}", "{} ({})", "{} (or {})",
          "{} is better than {}",
          "[{}][{}]", "({}) or ({})", "{}. {}", "not {} but {}", "{}: {}", "{} because {} is worse", "{} - {}",
          "either {} or {}", "between {} and {}", "{} (the better one, {} is worse)")  # fmt: skip


@given(
    st.permutations(sorted(VERDICTS)), st.sampled_from(LABELS), st.sampled_from(JOINTS), st.sampled_from(AROUND[:12])
)
@settings(deadline=None, max_examples=400)
def test_a_line_that_names_two_verdicts_is_none(words, label, joint, around):
    assert read(label.format(joint.format(*(around.format(word) for word in words[:2])))) is None


@pytest.mark.parametrize(
    "line",
    ["Preferred: not A", "Preferred: A?", "Preferred: A (?)", "Preferred: A (not sure)", "Preferred: A (or the other)",
     "Preferred: maybe A", "Preferred: neither", "Preferred: both", "Preferred: C", "Preferred: AB", "Preferred: A B",
     "Preferred: tie A", "Preferred: A+",
     "Preferred:", "Preferred: answer", "Not preferred: A", "Dispreferred: A", "Less preferred: A", "Rejected: A",
     "A", "[[A]]", "Answer: A", "I prefer A", "Preferred: A (both are good)", "Preferred: the worse is A",
     "Preferred: \u0410", "Preferred: A\nB is worse, though."],
)  # fmt: skip
def test_what_leaves_a_doubt_is_no_verdict(line):
    assert read(line) is None


@given(st.text(max_size=60), st.sampled_from(["", "Preferred:", "Verdict is"]))
@settings(deadline=None, max_examples=300)
def test_no_text_raises_anything(text, prefix):
    assert read_verdict(f"{prefix} {text}", prefix, VERDICTS) in (None, 1.0, 0.5, 0.0)


ARENA = {"[[A>>B]]": 1.0, "[[A>B]]": 0.75, "[[A=B]]": 0.5, "[[B>A]]": 0.25, "[[B>>A]]": 0.0}
BENCH = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
THEREFORE = {"Output (a) is better": 1.0, "Output (b) is better": 0.0}
BAR = {"Output (a)": 1.0, "Output (b)": 0.0}


@pytest.mark.parametrize(
    ("verdicts", "prefix", "line", "expected"),
    [
        (BENCH, "", "[[A]]", 1.0),
        (BENCH, "", "Final verdict: **[[B]]**", 0.0),
        (BENCH, "", "Assistant A and B are equally good: [[C]].", 0.5),
        (BENCH, "", "[[A]] or [[B]]", None),
        (BENCH, "", "I do not choose [[A]]", None),
        (BENCH, "", "Assistant A is better.", None),
        (ARENA, "", "My final verdict is: Assistant A is slightly better: [[A>B]]", 0.75),
        (ARENA, "", "My final verdict is tie: [[A=B]]", 0.5),
        (ARENA, "", "[[b>>a]]", 0.0),
        (ARENA, "", "[[A>>B]] or [[A>B]]", None),
        (BAR, "", "Output (a)", 1.0),
        (BAR, "", '**"Output (b)"**.', 0.0),
        (BAR, "", "(b)", 0.0),
        (BAR, "", "Output (a) or Output (b)", None),
        (BAR, "", "The output I prefer is unclear", None),
        (THEREFORE, "Therefore,", "Therefore, Output (b) is better.", 0.0),
        ({"m": 1.0, "M": 0.0}, "", "m", 1.0),
        ({"m": 1.0, "M": 0.0}, "", "**M**", 0.0),
        ({"m": 1.0, "M": 0.0}, "", "m or M", None),
    ],
)  # fmt: skip
def test_the_forms_of_published_judges_are_read(verdicts, prefix, line, expected):
    """MT-Bench, Arena-Hard, LLMBar with and without a chain of thought, AlpacaEval's letters."""
    template = templates.JudgePrompt(
        name="x", version=1, description="", source="", reply="text", verdicts=verdicts, prefix=prefix,
        user="$mark $prompt $answer_a $answer_b",
    )  # fmt: skip
    choice = {"message": {"content": f"Both have merits.\n\n{line}"}, "finish_reason": "stop"}
    assert template.verdict(choice) == ((None, "unparseable") if expected is None else (expected, ""))


@pytest.mark.parametrize("logprob", [float("inf"), float("nan"), 3.0, 1e9, None, "x", {}])
def test_a_probability_that_is_none_is_no_verdict(logprob):
    template = templates.load("helpfulness_logprobs")
    top = [{"token": "A", "logprob": logprob}, {"token": "B", "logprob": -1.0}]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    assert template.verdict(choice) == (None, "no_logprobs")
