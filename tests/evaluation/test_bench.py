"""`sampo bench`: lm-evaluation-harness on data made on the spot, with models that answer by a known rule."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer

from sampo.cli import main
from sampo.commands import bench
from sampo.evaluation import harness
from sampo.io import records as results

pytest.importorskip("lm_eval")
from lm_eval.api.model import LM

# lm-eval, its metrics and NLTK warn of things of their own when they are imported and when they are used
pytestmark = pytest.mark.filterwarnings("ignore")
SUBJECTS = {"anatomy": 5, "astronomy": 9}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def gsm8k(i: int) -> dict:
    return {"question": f"w{i} and w{i + 1} ?", "answer": f"w{i} so #### {i}"}


def piqa(i: int) -> dict:
    return {"goal": f"w{i} w3", "sol1": f"w{i} w7 w8", "sol2": f"w{i} w9", "label": i % 2}


def mmlu(subject: str, i: int) -> dict:
    return {"question": f"{subject} {i}", "choices": [f"w{i + k}" for k in range(4)], "answer": i % 4}


def ifeval(i: int) -> dict:
    """Two instructions where i is even: no commas, and (in all) at least three words."""
    words = {"num_words": 3, "relation": "at least"}
    rules = [("punctuation:no_comma", {}), ("length_constraints:number_words", words)][i % 2 :]
    return {
        "key": i,
        "prompt": f"Write {i}.",
        "instruction_id_list": [name for name, _ in rules],
        "kwargs": [{"num_words": None, "relation": None} | options for _, options in rules],
    }


def truthfulqa(i: int) -> dict:
    return {"question": f"is w{i} ?", "mc1_targets": {"choices": [f"w{i}", f"w{i + 1} w2"], "labels": [1, 0]}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, numbers in (("train", range(20, 32)), ("test", range(6))):
        write(folder / "gsm8k" / f"{split}.jsonl", [gsm8k(i) for i in numbers])
    for split, numbers in (("train", range(20, 30)), ("validation", range(7))):
        write(folder / "piqa" / f"{split}.jsonl", [piqa(i) for i in numbers])
    write(folder / "ifeval" / "train.jsonl", [ifeval(i) for i in range(5)])
    write(folder / "truthfulqa" / "validation.jsonl", [truthfulqa(i) for i in range(6)])
    for subject, n in SUBJECTS.items():
        write(folder / "mmlu" / subject / "dev.jsonl", [mmlu(subject, i) for i in range(40, 45)])
        write(folder / "mmlu" / subject / "test.jsonl", [mmlu(subject, i) for i in range(n)])
    return folder


class RuleModel(LM):
    """Prefers the shorter continuation, or the letter B; writes `answer(prompt)`. Keeps what it was asked."""

    def __init__(self, answer=lambda text: ""):
        super().__init__()
        self.answer, self.seen = answer, []

    def loglikelihood(self, requests):
        pairs = [request.args for request in requests]
        self.seen += [context for context, _ in pairs]
        return [(float(-len(text) + 5 * (text == " B")), True) for _, text in pairs]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        self.seen += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]


def question(text: str) -> str:
    return text.split("Question: ")[-1].split("\n")[0]


def run(name, lm, data, **more):
    return harness.run(name, lm, data=data, **more)


def test_a_score_is_the_share_that_the_rule_gets_right(data):
    right = RuleModel(lambda text: f"so #### {re.search('w([0-9]+)', question(text))[1]}")
    found = run("gsm8k", right, data)
    assert (found.score.value, found.score.n, found.score.high) == (1.0, 6, 1.0)
    some = RuleModel(lambda text: "#### 3" if "w3 and" in question(text) else "no number")
    assert run("gsm8k", some, data).score.value == pytest.approx(1 / 6)
    found = run("piqa", RuleModel(), data)  # prefers the shorter one, which is the second
    assert found.score.value == pytest.approx(np.mean([i % 2 for i in range(7)]))
    assert found.others["acc_norm"] == pytest.approx(np.mean([i % 2 == 0 for i in range(7)]))
    assert run("truthfulqa", RuleModel(), data).score.value == 1.0
    found = run("mmlu", RuleModel(), data)  # always says B
    expected = np.mean([i % 4 == 1 for n in SUBJECTS.values() for i in range(n)])
    assert (found.score.value, found.score.n) == (pytest.approx(expected), sum(SUBJECTS.values()))


def test_instructions_are_counted_one_by_one_and_their_interval_is_over_prompts(data):
    def answer(text):
        return {"0": "a, b c", "1": "a b", "2": "a b", "3": "a b c", "4": "a, b"}[re.search("[0-9]", text)[0]]

    found = run("ifeval", RuleModel(answer), data)
    followed = [[False, True], [False], [True, False], [True], [False, False]]
    flat = [hit for hits in followed for hit in hits]
    assert found.score.value == pytest.approx(np.mean(flat))
    assert found.others["prompt_level_strict_acc"] == pytest.approx(np.mean([all(hits) for hits in followed]))
    assert found.score.low < found.score.value < found.score.high
    assert found.score.n == 5


@pytest.mark.parametrize(("name", "used"), [("gsm8k", 8), ("piqa", 3), ("ifeval", 0), ("truthfulqa", 0), ("mmlu", 0)])
def test_the_shots_in_the_record_are_those_in_the_prompts(name, used, data):
    lm = RuleModel()
    found = run(name, lm, data)
    marks = {
        "gsm8k": "Question: ",
        "piqa": "Question: ",
        "ifeval": "Write ",
        "truthfulqa": "\n\nQ: is ",
        "mmlu": "Answer:",
    }
    assert {text.count(marks[name]) for text in lm.seen} == {used + 1}
    assert (found.shots_used, found.shots_asked) == (used, harness.BENCHMARKS[name].shots)
    assert bool(found.note) == (name in ("ifeval", "truthfulqa"))


def test_other_shots_and_a_limit_are_what_they_say(data):
    lm = RuleModel()
    found = run("piqa", lm, data, shots=1, limit=4)
    assert {text.count("Question: ") for text in lm.seen} == {2}
    assert (found.shots_used, found.shots_asked, found.score.n) == (1, 1, 4)


def test_the_definitions_of_the_harness_are_where_they_are_looked_for():
    from lm_eval import tasks

    for benchmark in harness.BENCHMARKS.values():
        folder = (Path(tasks.__file__).parent / benchmark.definition).parent
        assert benchmark.task in tasks.TaskManager(include_path=str(folder), include_defaults=False).all_tasks


# --- the command ---------------------------------------------------------------------------------------------------


def quick_to_end() -> torch.nn.Module:
    """A model that ends its answers soon, with room for long prompts."""
    tiny = make_model()
    tiny.config.max_position_embeddings = 4096
    with torch.no_grad():
        tiny.lm_head.weight[1] *= 8
    return tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    quick_to_end().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def words(model, data, out, *more) -> list[str]:
    return ["bench", model, "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def test_the_command_records_what_the_model_itself_says_and_does_not_run_it_again(model, data, tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    line = words(model, data, out, "--tasks", "piqa", "--num_fewshot", "0")
    assert main(line) == 0
    tiny, tokenizer = quick_to_end(), make_tokenizer()

    def logp(context, text):
        ids, start = tokenizer(context + text)["input_ids"], len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logps = tiny(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
        return sum(float(logps[t - 1, ids[t]]) for t in range(start, len(ids)))

    right = []
    for row in map(piqa, range(7)):
        sums = [logp(f"Question: {row['goal']}\nAnswer:", f" {row[sol]}") for sol in ("sol1", "sol2")]
        right.append(int(np.argmax(sums) == row["label"]))
    *_, score = results.read(out)
    assert score.name == "bench/piqa"
    assert (score.value, score.n) == (pytest.approx(np.mean(right)), 7)
    assert (score.config["shots_asked"], score.config["shots_used"], score.config["limit"]) == (0, 0, None)
    assert score.config["weights"].startswith("sha256:")
    assert score.config["metric"] == "acc,none"
    names = [Path(word).name if os.path.isabs(word) else word for word in line[1:]]  # without folders of this machine
    assert bench.make_parser().parse_args(score.command.split()[2:]) == bench.make_parser().parse_args(names)

    before = out.read_bytes()
    capsys.readouterr()
    assert main(line) == 0
    assert out.read_bytes() == before
    shown = capsys.readouterr().out
    assert f"its record is in {out}" in shown
    assert f"{100 * score.value:.1f}" in shown
    for number, other in enumerate((["--limit", "3"], ["--seed", "5"], ["--apply_chat_template"]), 2):
        assert main([*line, *other]) == 0
        assert [record.name for record in results.read(out)].count("bench/piqa") == number


def test_a_run_that_stopped_between_tasks_goes_on_with_the_next(model, data, tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    broken = tmp_path / "data"
    write(broken / "piqa" / "train.jsonl", [piqa(i) for i in range(20, 30)])
    write(broken / "piqa" / "validation.jsonl", [piqa(i) for i in range(3)])
    write(broken / "truthfulqa" / "validation.jsonl", [{"question": "no choices"}])
    line = words(model, broken, out, "--tasks", "piqa", "truthfulqa")
    with pytest.raises(Exception, match="mc1_targets"):
        main(line)
    assert results.read(out)[-1].name == "bench/piqa"
    with out.open("ab") as file:
        file.write(b'{"name": "bench/truthf')  # and was killed while it wrote
    write(broken / "truthfulqa" / "validation.jsonl", [truthfulqa(i) for i in range(3)])
    capsys.readouterr()
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "piqa: its record is in" in shown
    assert "truthfulqa: done. Note: truthfulqa was run with 0 shots, not with 3" in shown
    assert [record.name for record in results.read(out)].count("bench/piqa") == 1


@pytest.mark.slow
def test_an_adapter_is_benchmarked_as_what_it_makes_of_its_model(model, data, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    scores = []
    for name in ("adapter", "merged"):
        line = words(str(tmp_path / name), data, tmp_path / "o.jsonl", "--tasks", "piqa", "truthfulqa", "gsm8k")
        assert main(line) == 0
        kept = [r for r in results.read(tmp_path / "o.jsonl") if r.config["model"] == str(tmp_path / name)]
        scores.append([(record.name, record.value) for record in kept])
    assert scores[0] == scores[1]
    assert len(scores[0]) >= 3


@pytest.mark.slow
def test_all_five_run_offline_with_a_model_and_show_their_shots(model, data, tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    assert main(words(model, data, out, "--limit", "3")) == 0
    scores = {r.config["benchmark"]: r for r in results.read(out) if r.name.count("/") == 1}
    assert list(scores) == list(bench.TASKS)
    assert {name: r.config["shots_used"] for name, r in scores.items()} == {
        **{"gsm8k": 8, "ifeval": 0, "piqa": 3, "mmlu": 0, "truthfulqa": 0}
    }
    assert {name: r.n for name, r in scores.items()} == {name: 6 if name == "mmlu" else 3 for name in scores}
    shown = capsys.readouterr().out
    assert "ifeval, truthfulqa: the harness fixes the number of shots" in shown
    assert "this is a trial, not a result" in shown


def test_the_names_of_the_command_are_those_of_the_benchmarks():
    assert list(bench.TASKS) == list(harness.BENCHMARKS)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda folder: write(folder / "mmlu" / "knitting" / "test.jsonl", []),
            "parts that the harness knows, got mmlu/kn",
        ),
        (lambda folder: (folder / "mmlu").mkdir(parents=True), "one JSONL file per split of mmlu"),
        (lambda folder: (folder / "mmlu" / "anatomy").mkdir(parents=True), "got none in .*anatomy"),
    ],
)
def test_data_that_are_not_there_are_said_in_one_line(change, fault, model, tmp_path):
    change(tmp_path / "data")
    with pytest.raises(SystemExit, match=fault):
        main(words(model, tmp_path / "data", tmp_path / "o", "--tasks", "mmlu"))


def test_ifeval_is_refused_before_it_runs_where_it_would_fail_after(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    rows = [ifeval(i) for i in range(3)]
    write(tmp_path / "ifeval" / "train.jsonl", rows)
    harness.check_nltk(tmp_path)  # none of these needs it
    rows[1]["instruction_id_list"] = ["length_constraints:number_sentences"]
    write(tmp_path / "ifeval" / "train.jsonl", rows)
    with pytest.raises(ValueError, match="which 1 of 3 prompts cannot be checked without"):
        harness.check_nltk(tmp_path)
    with pytest.raises(ValueError, match="which it cannot be checked without"):
        harness.check_nltk(None)


def test_what_needs_nltks_data_is_what_the_harness_splits_with_it(tmp_path, monkeypatch):
    """Each instruction of IFEval is checked without NLTK's data; those that fail are the ones we name."""
    import nltk
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    failing = set()
    for name, kind in INSTRUCTION_DICT.items():
        instruction = kind(name)
        more = {"prompt_to_repeat": "Say it."} if name == "combination:repeat_prompt" else {}
        more |= {"original_message": "a *b*"} if name == "keywords:rephrase" else {}
        instruction.build_description(**more)
        try:
            instruction.check_following("One sentence here. TWO of them.\n\nA third, and more.")
        except LookupError:
            failing.add(name)
    assert failing == set(harness.NEED_NLTK)
