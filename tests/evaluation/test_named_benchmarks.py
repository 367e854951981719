"""Questions and answers of named benchmarks, by small files of the official shapes."""

import json
from pathlib import Path

import pytest
from judge_server import Server, completion

from sampo.cli import main
from sampo.evaluation.answers import benchmarks
from sampo.evaluation.answers.answers import Answer, read_answers, write_answers
from sampo.evaluation.answers.prompts import load_prompts
from sampo.evaluation.judging import templates
from sampo.evaluation.judging.judges import match

LINES = {
    "arena_hard_v2": [
        {"uid": f"u{i}", "category": category, "subcategory": "x", "prompt": f"question {i}?"}
        for i, category in enumerate(["hard_prompt", "creative_writing", "hard_prompt"])
    ],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Start each line with A."]},
        {"question_id": 101, "category": "math", "turns": ["What is 2+2?", "And 3+3?"], "reference": ["4", "6"]},
    ],
    "wildbench": [
        {
            "id": "1",
            "session_id": f"s{i}",
            "conversation_input": [
                {"role": "user", "content": "hello", "language": "English", "redacted": False, "toxic": False},
                {"role": "assistant", "content": "hi", "language": "English", "redacted": False, "toxic": False},
                {"role": "user", "content": f"question {i}", "language": "English", "redacted": False, "toxic": False},
            ],
            "references": {"gpt-4": "…"},
            "checklist": ["Is it right?", "Is it short?"],
            "length": 3,
            "primary_tag": "Math",
            "secondary_tags": [],
            "intent": "to know",
        }
        for i in range(2)
    ],
}
ALPACA = [{"dataset": "koala", "instruction": f"do {i}", "output": "x", "generator": "davinci"} for i in range(3)]
OFFICIAL = {
    "arena_hard_v2": [
        {
            "uid": f"u{i}",
            "ans_id": "a",
            "model": "o3-mini",
            "messages": [
                {"role": "user", "content": f"question {i}?"},
                {"role": "assistant", "content": {"answer": f"answer {i}"} if i else f"answer {i}"},
            ],
            "tstamp": 1.0,
            "metadata": {},
        }
        for i in range(3)
    ],
    "mt_bench": [
        {"question_id": q, "answer_id": "a", "model_id": "gpt", "choices": [{"index": 0, "turns": t}], "tstamp": 1.0}
        for q, t in ((81, ["a post", "A post"]), (101, ["four", "six"]))
    ],
    "wildbench": [
        {"session_id": f"s{i}", "chat_history": [], "output": [f"answer {i}"], "generator": "haiku", "dataset": "w"}
        for i in range(2)
    ],
}


def write(path: Path, rows: list[dict]) -> Path:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def file_of(folder: Path, name: str) -> Path:
    if name == "alpaca_eval_2":
        return write(folder / "alpaca_eval.json", ALPACA)
    return write(folder / "question.jsonl", LINES[name])


def convert(folder: Path, name: str, *words: object, out: str = "out.jsonl") -> Path:
    questions = ["--questions", str(file_of(folder, name)), "--out", str(folder / out)]
    assert main(["prompts", "convert", name, *questions, *map(str, words)]) == 0
    return folder / out


@pytest.mark.parametrize("name", benchmarks.benchmark_names())
def test_settings_name_a_template_and_where_we_differ(name, capsys):
    found = benchmarks.load_benchmark(name)
    assert found.name == name
    assert templates.load(found.template).name == found.template
    assert found.differs
    assert main(["prompts", "show", name]) == 0
    out = capsys.readouterr().out
    for part in (found.title, found.orders, found.differs[0], str(found.questions)):
        assert part in out


def test_the_official_settings_are_those_of_the_sources():
    """Each compared by hand with the file that `source` names."""
    turns = benchmarks.load_benchmark("mt_bench")
    assert turns.generation["temperature"]["roleplay"] == 0.7
    assert turns.generation["temperature"]["stem"] == 0.1
    assert turns.generation["temperature"]["coding"] == 0
    assert (turns.generation["max_tokens"], turns.judge["max_tokens"]) == (1024, 2048)
    arena = benchmarks.load_benchmark("arena_hard_v2")
    assert arena.baseline["creative_writing"] == "gemini-2.0-flash-001"
    assert {arena.baseline[name] for name in ("hard_prompt", "coding", "math")} == {"o3-mini-2025-01-31"}
    assert benchmarks.load_benchmark("alpaca_eval_2").judge["temperature"] == 1
    assert benchmarks.load_benchmark("wildbench").generation == {"temperature": 0, "top_p": 1, "max_tokens": 4096}


@pytest.mark.parametrize("name", benchmarks.benchmark_names())
def test_prompts_are_what_generate_reads(name, tmp_path):
    questions = load_prompts(convert(tmp_path, name))
    if name == "alpaca_eval_2":
        assert [q.prompt for q in questions] == ["do 0", "do 1", "do 2"]
        assert {q.extra["dataset"] for q in questions} == {"koala"}
    if name == "arena_hard_v2":
        assert [(q.prompt, q.extra["id"]) for q in questions] == [(f"question {i}?", f"u{i}") for i in range(3)]
    if name == "mt_bench":
        assert [q.prompt for q in questions] == ["Write a post.", "What is 2+2?"]
        assert [q.extra.get("reference") for q in questions] == [None, "4\n\n6"]
    if name == "wildbench":
        assert questions[1].prompt == [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "question 1"},
        ]
        assert questions[1].extra == {"id": "s1", "dataset": "Math", "reference": "- Is it right?\n- Is it short?"}


@pytest.mark.parametrize("name", LINES)
def test_official_answers_match_ours_by_prompt(name, tmp_path):
    ours = [
        Answer(prompt=question.prompt, answer="mine", extra=question.extra)
        for question in load_prompts(convert(tmp_path, name))
    ]
    theirs = read_answers(convert(tmp_path, name, "--answers", write(tmp_path / "model.jsonl", OFFICIAL[name])))
    matched = match(ours, theirs)
    assert (len(matched.pairs), matched.system_only, matched.baseline_only) == (len(LINES[name]), 0, 0)
    assert theirs[0].model in ("o3-mini", "gpt", "haiku")
    first = {"arena_hard_v2": "answer 0", "mt_bench": "a post", "wildbench": "answer 0"}[name]
    assert matched.pairs[0].baseline.answer == first


def test_alpaca_evals_outputs_are_answers_of_a_model(tmp_path):
    theirs = read_answers(convert(tmp_path, "alpaca_eval_2", "--answers", write(tmp_path / "m.json", ALPACA)))
    assert [(a.prompt, a.answer, a.model) for a in theirs] == [(f"do {i}", "x", "davinci") for i in range(3)]


def test_categories_are_kept_alone(tmp_path):
    kept = load_prompts(convert(tmp_path, "arena_hard_v2", "--categories", "hard_prompt"))
    assert [question.extra["id"] for question in kept] == ["u0", "u2"]
    with pytest.raises(SystemExit, match=r"`categories` must be some of \['creative_writing', 'hard_prompt'\], got"):
        convert(tmp_path, "arena_hard_v2", "--categories", "easy")


def test_two_turns_are_generated_one_after_the_other_and_judged_together(tmp_path):
    def rule(request, number):
        return completion(f"reply to: {request['messages'][-1]['content']}")

    first = convert(tmp_path, "mt_bench", out="turn1.jsonl")
    with Server(rule) as server:
        asked = ["--url", server.url, "--out"]
        assert main(["generate", "m", "--prompts", str(first), *asked, str(tmp_path / "a1.jsonl")]) == 0
        second = convert(tmp_path, "mt_bench", "--first_turn", tmp_path / "a1.jsonl", out="turn2.jsonl")
        assert main(["generate", "m", "--prompts", str(second), *asked, str(tmp_path / "a2.jsonl")]) == 0
    roles = {tuple(message["role"] for message in request["messages"]) for request in server.requests}
    assert roles == {("user",), ("user", "assistant", "user")}
    messages = {tuple(m["content"] for m in r["messages"]) for r in server.requests if len(r["messages"]) == 3}
    assert ("What is 2+2?", "reply to: What is 2+2?", "And 3+3?") in messages
    turns = ["--first_turn", tmp_path / "a1.jsonl", "--answers", tmp_path / "a2.jsonl"]
    ours = read_answers(convert(tmp_path, "mt_bench", *turns, out="ours.jsonl"))
    official = write(tmp_path / "gpt.jsonl", OFFICIAL["mt_bench"])
    theirs = read_answers(convert(tmp_path, "mt_bench", "--answers", official, "--turn", 2, out="base.jsonl"))
    assert len(match(ours, theirs).pairs) == 2
    assert [m["content"] for m in ours[1].prompt] == ["What is 2+2?", "And 3+3?"]
    assert ours[1].answer == f"reply to: What is 2+2?{benchmarks.SECOND}reply to: And 3+3?"
    assert theirs[1].answer == f"four{benchmarks.SECOND}six"
    assert ours[1].tokens == 14
    assert ours[1].extra["reference"] == "4\n\n6"

    def better(request, number):
        content = request["messages"][-1]["content"]
        assert "And 3+3?" in content or "Start each line" in content
        assert "4\n\n6" in content or "(none is given)" in content
        return completion("It is.\n[[A]]")

    with Server(better) as server:
        words = ["--system", tmp_path / "ours.jsonl", "--baseline", tmp_path / "base.jsonl", "--judge", "endpoint"]
        words += ["--url", server.url, "--model", "j", "--template", "mt_bench", "--cache", tmp_path / "cache.jsonl"]
        assert main(["judge", *map(str, words), "--out", str(tmp_path / "judged.jsonl")]) == 0
    result = json.loads((tmp_path / "judged.summary.json").read_text())["result"]
    assert (result["win_rate"], result["order/first_shown"]) == (0.5, 1.0)


def test_answers_that_are_missing_are_named(tmp_path):
    official = write(tmp_path / "gpt.jsonl", OFFICIAL["mt_bench"][:1])
    with pytest.raises(SystemExit, match="`answers` must answer every question, got no answer to question 101"):
        convert(tmp_path, "mt_bench", "--answers", official)
    write_answers(tmp_path / "a1.jsonl", [Answer(prompt="What is 2+2?", answer="4")])
    with pytest.raises(SystemExit, match="`first_turn` must answer every question, got no answer to question 81"):
        convert(tmp_path, "mt_bench", "--first_turn", tmp_path / "a1.jsonl")
    with pytest.raises(SystemExit, match="must have two turns for this"):
        convert(tmp_path, "arena_hard_v2", "--first_turn", tmp_path / "a1.jsonl")


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("arena_hard_v2", {"uid": 7, "category": "x", "prompt": "q"}, r"row 2: `uid` must be a string, got 7"),
        ("arena_hard_v2", {"uid": "u9", "category": "x"}, r"row 2: it must be an object with \['prompt'\]"),
        ("arena_hard_v2", LINES["arena_hard_v2"][0], "must have each question once, got the same in rows 1 and 2"),
        ("mt_bench", {"question_id": 1, "category": "x", "turns": []}, "row 2: `turns` must be one or two questions"),
        (
            "wildbench",
            {"session_id": "s", "conversation_input": [], "checklist": []},
            "must end with a message of the",
        ),
    ],
)
def test_a_row_of_another_shape_is_named(name, row, words, tmp_path):
    path = write(tmp_path / "q.jsonl", [LINES[name][0], row])
    with pytest.raises(SystemExit, match=words):
        main(["prompts", "convert", name, "--questions", str(path), "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(SystemExit, match="`questions` must name a file"):
        main(["prompts", "convert", "mt_bench"])
    with pytest.raises(SystemExit, match=r"`benchmark` must be one of \['alpaca_eval_2', "):
        main(["prompts", "show", "mtbench"])
