import dataclasses
import gzip
import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from sampo.commands.lab import main, make_parser
from sampo.commands.lab import run as run_command
from sampo.io import records as results
from sampo.lab import model as lm
from sampo.lab import report
from sampo.lab.experiment import RECORDS, mean_number
from sampo.lab.settings import GROUPS, STUDY_GROUPS, Run, Settings, plan
from sampo.lab.world import BOS, DOT, EOS, NIL, PROMPT_TOKENS, SEP, WORDS, World, preference_probability, text

# --- the world ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return World(0)


def test_lengths_and_preferences_have_the_published_statistics(world):
    answers = world.demonstrations(8000)
    lengths = np.array([len(answer) for _, answer in answers])
    qualities = np.array([world.quality(question, answer) for question, answer in answers])
    assert lengths.mean() == pytest.approx(20.3, abs=0.5)
    assert lengths.std() == pytest.approx(11, abs=0.5)
    assert np.corrcoef(lengths, qualities)[0, 1] == pytest.approx(0.13, abs=0.04)

    pairs = world.annotated_pairs(8000, bias=0.5)
    difference = np.array([pair.length_difference for pair in pairs])
    gain = np.array([world.quality(p.question, p.chosen) - world.quality(p.question, p.rejected) for p in pairs])
    assert (difference > 0).mean() == pytest.approx(0.585, abs=0.025)
    assert (difference < 0).mean() == pytest.approx(0.38, abs=0.025)
    assert difference.mean() == pytest.approx(3.9, abs=0.7)
    assert (gain > 0).mean() == pytest.approx(0.65, abs=0.02)
    assert (gain < 0).mean() == pytest.approx(0.08, abs=0.015)


@pytest.mark.parametrize(("bias", "longer", "shorter"), [(0.0, 0.505, 0.465), (1.0, 0.65, 0.32)])
def test_the_share_of_chosen_longer_pairs_follows_the_annotators_bias(world, bias, longer, shorter):
    difference = np.array([pair.length_difference for pair in world.annotated_pairs(6000, bias=bias)])
    assert (difference > 0).mean() == pytest.approx(longer, abs=0.025)
    assert (difference < 0).mean() == pytest.approx(shorter, abs=0.025)


def test_annotators_choose_the_longer_answer_as_often_as_the_formula_says(world):
    assert preference_probability(1, -10, bias=0.5) == pytest.approx(1 / (1 + np.exp(-1.0)))

    def excess(assumed_bias):
        """Z score of the number of pairs whose longer answer was chosen, under the formula."""
        observed = expected = variance = 0.0
        for pair in world.annotated_pairs(6000, bias=0.5):
            if pair.length_difference == 0:
                continue
            chosen_is_longer = pair.length_difference > 0
            longer, shorter = (pair.chosen, pair.rejected) if chosen_is_longer else (pair.rejected, pair.chosen)
            gap = world.quality(pair.question, longer) - world.quality(pair.question, shorter)
            p = 1 / (1 + np.exp(-(1.5 * gap + assumed_bias * (len(longer) - len(shorter)) / 10)))
            observed, expected, variance = observed + chosen_is_longer, expected + p, variance + p * (1 - p)
        return (observed - expected) / variance**0.5

    assert abs(excess(0.5)) < 4
    assert excess(0.25) > 4  # the test can tell


def naive_quality(world, question, answer):
    """The judge again, word by word, from its description."""
    words = [WORDS[i] for i in answer]
    right, wrong = set(), set()
    for position in range(len(words) - 1):
        attribute, value = words[position], words[position + 1]
        if attribute[0] == "a" and value[0] == "v":
            truth = "v" + str(world.facts[question.entity][int(attribute[1:])])
            if value != truth:
                wrong.add(attribute + value)
            elif int(attribute[1:]) in question.attributes:
                right.add(attribute)
    return len(right) - len(wrong)


def test_the_judge_agrees_with_a_naive_one_on_answers_and_on_nonsense(world):
    rng = np.random.default_rng(5)
    seen = Counter()
    for question, answer in world.demonstrations(1500):
        nonsense = rng.integers(len(WORDS), size=60).tolist()
        statements = rng.integers([6, 30] * 20, [14, 46] * 20).tolist()  # attribute, value, attribute, value, ...
        for ids in (answer, answer[:-1], nonsense, statements, answer + answer, []):
            quality = world.quality(question, ids)
            assert quality == naive_quality(world, question, ids)
            seen[quality] += 1
    assert min(seen) < -5
    assert max(seen) == 4


def test_filler_repeats_true_extras_and_a_missing_end_cost_nothing(world):
    question, answer = next((q, a) for q, a in world.demonstrations(50) if world.quality(q, a) > 0)
    unasked = next(a for a in range(8) if a not in question.attributes)
    extra = [6 + unasked, 30 + int(world.facts[question.entity, unasked]), DOT]
    for padded in (answer[:-1], [46, 47, DOT, *answer], answer[:-1] + answer, extra + answer):
        assert world.quality(question, padded) == world.quality(question, answer)


def test_the_same_seed_makes_the_same_world_whatever_is_drawn_before(world):
    again = World(0)
    again.judged_pairs(7)
    np.random.default_rng(0).random()
    assert again.demonstrations(50) == world.demonstrations(50)
    assert again.annotated_pairs(50, bias=0.5, group="short") == world.annotated_pairs(50, bias=0.5, group="short")
    assert again.judged_pairs(20) == world.judged_pairs(20)
    assert World(1).demonstrations(50) != world.demonstrations(50)
    assert (World(1).facts != world.facts).any()


def test_the_global_generator_is_neither_read_nor_moved(world):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    world.annotated_pairs(20, bias=0.5)
    lm.build_model(0)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


def test_held_out_questions_never_appear_in_training_in_any_order(world):
    def asked(questions):
        return {(question.entity, frozenset(question.attributes)) for question in questions}

    trained = asked(question for question, _ in world.demonstrations(20_000))
    trained |= asked(pair.question for pair in world.annotated_pairs(3000, bias=0.5))
    evaluated = asked(world.evaluation_questions(3000)) | asked(p.question for p in world.judged_pairs(3000))
    assert not trained & evaluated
    assert len(evaluated) / (len(trained) + len(evaluated)) == pytest.approx(0.2, abs=0.03)


def test_groups_are_filters_of_the_same_stream(world):
    everything = list(islice(world.annotated_stream(0.5), 400))
    longer = [pair for pair in everything if len(pair.chosen) > len(pair.rejected)]
    shorter = [pair for pair in everything if len(pair.chosen) < len(pair.rejected)]
    assert world.annotated_pairs(400, bias=0.5, group="all") == everything
    assert world.annotated_pairs(len(longer), bias=0.5, group="long") == longer
    assert world.annotated_pairs(len(shorter), bias=0.5, group="short") == shorter
    equal = [pair for pair in everything if len(pair.chosen) == len(pair.rejected)]
    assert world.annotated_pairs(len(equal), bias=0.5, group="equal") == equal != []
    assert set(STUDY_GROUPS) == {*GROUPS, "equal"} == {"all", "long", "short", "equal"}


def test_judged_pairs_put_the_truly_better_answer_first(world):
    for pair in world.judged_pairs(300):
        assert naive_quality(world, pair.question, pair.chosen) > naive_quality(world, pair.question, pair.rejected)


def test_prompts_have_one_length_and_answers_end(world):
    for question, answer in world.demonstrations(300):
        assert len(question.prompt) == PROMPT_TOKENS
        assert (question.prompt[0], question.prompt[-1]) == (BOS, SEP)
        assert question.prompt.count(NIL) == 4 - len(question.attributes)
        assert answer.index(EOS) == len(answer) - 1
        assert 2 <= len(answer) <= 88


def test_the_tokenizer_reads_the_words_back(world):
    tokenizer = lm.build_tokenizer()
    for question, answer in world.demonstrations(100):
        whole = tokenizer(f"{text(question.prompt)} {text(answer)}")["input_ids"]
        assert whole == question.prompt + answer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, 0)


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(world):
    """A start that has seen so little that its answers end at very different places."""
    rows = [(question.prompt, answer) for question, answer in world.demonstrations(2000)]
    return lm.train_supervised(rows, steps=25, seed=0)


@pytest.fixture(scope="module")
def rows(world):
    return [(question.prompt, answer) for question, answer in world.demonstrations(40)]


def test_the_model_has_the_published_size_and_the_supervised_start_is_repeatable(world, start, rows):
    assert sum(parameter.numel() for parameter in start.parameters()) == 110_784
    few = [(question.prompt, answer) for question, answer in world.demonstrations(200)]
    first, second = (lm.train_supervised(few, steps=3, seed=4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lm.answer_logps(start, rows).mean() > lm.answer_logps(lm.build_model(0), rows).mean() + 10


@torch.no_grad()
def naive_greedy(model, prompt, max_tokens):
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


class Shifted(torch.nn.Module):
    """A model whose end token's logit is raised everywhere."""

    def __init__(self, model, shift):
        super().__init__()
        self.model, self.shift, self.config = model, shift, model.config

    def forward(self, **kwargs):
        output = self.model(**kwargs)
        output.logits = output.logits.clone()
        output.logits[..., EOS] += self.shift
        return output


def test_cached_generation_equals_a_full_forward_per_token(world):
    prompts = [question.prompt for question in world.evaluation_questions(24)]
    wild = lm.build_model(2).eval()  # weights far from their start, so that each answer goes its own way
    with torch.no_grad():
        for parameter in wild.parameters():
            parameter.mul_(4)
    model = Shifted(wild, 4.0)  # and ends somewhere
    answers = lm.sample_answers(model, prompts, seed=None, max_tokens=40)
    assert answers == [naive_greedy(model, prompt, 40) for prompt in prompts]
    assert len({len(answer) for answer in answers}) > 3
    assert any(answer[-1] == EOS for answer in answers)


def test_sampling_follows_the_models_distribution_and_its_seed(world, start):
    prompt = world.evaluation_questions(1)[0].prompt
    answers = lm.sample_answers(start, [prompt] * 3000, seed=1, max_tokens=2)
    with torch.no_grad():
        expected = start(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(0).double().numpy()
    counts = np.bincount([answer[0] for answer in answers], minlength=len(WORDS))
    frequent = expected > 5 / 3000
    assert frequent.sum() > 10
    observed, wanted = counts[frequent], expected[frequent]  # given that a frequent word came
    assert stats.chisquare(observed, wanted / wanted.sum() * observed.sum()).pvalue > 1e-4
    again = lm.sample_answers(start, [prompt] * 3000, seed=1, max_tokens=2)
    assert again == answers
    assert lm.sample_answers(start, [prompt] * 3000, seed=2, max_tokens=2) != answers


@torch.no_grad()
def naive_log_probs(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(dim=1)  # (T, V)


def test_log_probabilities_and_divergence_equal_a_row_by_row_computation(start, rows):
    other = lm.build_model(1)
    logps, divergence = lm.answer_logps(start, rows), lm.divergence(start, other, rows)
    for i, (prompt, answer) in enumerate(rows):
        p, q = naive_log_probs(start, prompt, answer), naive_log_probs(other, prompt, answer)
        assert logps[i] == pytest.approx(float(p[range(len(answer)), answer].sum()), abs=1e-3)
        assert divergence[i] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-3)
    assert np.abs(lm.divergence(start, start, rows)).max() == 0


@torch.no_grad()
def test_the_end_tokens_probability_is_that_of_a_row_by_row_computation(start, rows):
    for (prompt, answer), probs in zip(rows, lm.end_probs(start, rows), strict=True):
        assert probs == pytest.approx(naive_log_probs(start, prompt, answer)[:, EOS].exp().numpy(), abs=1e-5)


# --- numbers and records --------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_students_and_repeats_of_a_question_do_not_narrow_it():
    values = np.random.default_rng(0).normal(size=50)
    low, high = stats.t.interval(0.95, 49, loc=values.mean(), scale=stats.sem(values))
    single = mean_number("x", values, list(range(50)))
    assert single.interval == pytest.approx((low, high))
    repeated = mean_number("x", np.tile(values, 3), list(range(50)) * 3)
    assert repeated.interval == pytest.approx((low, high))
    assert repeated.n == 150
    naive = mean_number("x", np.tile(values, 3), list(range(150)))
    assert naive.interval[1] - naive.interval[0] < 0.7 * (high - low)
    assert mean_number("x", np.array([]), []).value is None


def make_record(**changes):
    about = {"name": "tokens", "value": 20.5, "n": 8, "interval": (19.0, 22.0), "seed": 1, "command": "sampo lab"}
    return results.Record(**{**about, "config": {"b": [1, 2], "a": None}, **results.provenance(), **changes})


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    first, second = make_record(), make_record(value=None, interval=None, config={"a": 1})
    assert results.read(path) == []
    results.append(path, [first])
    results.append(path, [second])
    assert results.read(path) == [first, second]
    assert first.versions["torch"] == torch.__version__.split("+")[0] or first.versions["torch"] == torch.__version__


def test_a_compressed_file_is_read_like_any_other(tmp_path):
    path = tmp_path / "records.jsonl"
    results.append(path, [make_record(seed=1), make_record(seed=2)])
    packed = tmp_path / "records.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert results.read(packed) == results.read(path) != []


def test_a_line_that_was_not_finished_is_left_out_and_then_cut_off(tmp_path):
    path = tmp_path / "records.jsonl"
    results.append(path, [make_record(seed=1), make_record(seed=2)])
    path.write_bytes(path.read_bytes()[:-20])
    assert [record.seed for record in results.read(path)] == [1]
    results.append(path, [make_record(seed=3)])
    assert [record.seed for record in results.read(path)] == [1, 3]


def test_a_broken_or_foreign_line_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    results.append(path, [make_record()])
    good = path.read_text()
    path.write_text(good + "no json\n" + good)
    with pytest.raises(ValueError, match="line 2: it must be JSON"):
        results.read(path)
    path.write_text(json.dumps({**json.loads(good), "schema": 99}) + "\n")
    with pytest.raises(ValueError, match="line 1: `schema` must be 1, got 99"):
        results.read(path)
    with pytest.raises(ValueError, match="must be finite"):
        make_record(value=float("nan"))


def test_the_key_depends_on_every_setting_and_not_on_their_order():
    base = Run(0, "all", "sampo", Settings())
    keys = {results.config_key(base.config)}
    assert results.config_key(dict(reversed(base.config.items()))) in keys
    changed = [
        Run(1, "all", "sampo", Settings()),
        Run(0, "long", "sampo", Settings()),
        Run(0, "all", "dpo", Settings()),
    ]
    for name, value in vars(Settings()).items():
        changed.append(Run(0, "all", "sampo", Settings(**{name: value * 2})))
    keys |= {results.config_key(run.config) for run in changed}
    assert len(keys) == 1 + 3 + len(vars(Settings()))


def test_a_setting_of_the_methods_alone_does_not_repeat_the_start():
    first, second = (Run(0, "", "sft", Settings(**options)).config for options in ({}, {"beta": 0.5, "bias": 1.0}))
    assert first == second
    assert Run(0, "", "sft", Settings(sft_steps=1)).config != first


# --- the experiment -------------------------------------------------------------------------------------------------

MICRO = "--sft_steps 6 --steps 2 --pairs 64 --questions 24 --judged_pairs 40 --methods dpo sampo_rejected_learned"


def run_micro(folder, *more):
    main(
        make_parser().parse_args(
            [*MICRO.split(), "--groups", "long", "short", "--seeds", "1", "--out", str(folder), *more]
        )
    )


def test_an_experiment_runs_from_the_command_resumes_and_repeats_itself(tmp_path, capsys):
    run_micro(tmp_path)
    path = tmp_path / RECORDS
    before, shown = path.read_bytes(), capsys.readouterr().out
    found = {(r.config["group"], r.config["method"], r.name): r for r in results.read(path)}
    assert {key[:2] for key in found} == {
        ("", "sft"),
        *((group, method) for group in ("short", "long") for method in ("dpo", "sampo_rejected_learned")),
    }
    assert "On `long` (pairs whose chosen answer is longer), the answers of SamPO, rejected + learned are" in shown
    assert "must have a true quality above 0.6" in shown  # six steps teach nothing
    long = {name: found["long", "dpo", name] for name in ("tokens", "win_rate", "pressure", "kl")}
    assert long["pressure"].value < 0 < found["short", "dpo", "pressure"].value
    assert found["short", "sampo_rejected_learned", "penalty_per_token"].value < 0
    assert found["long", "sampo_rejected_learned", "penalty_per_token"].value > 0
    assert long["kl"].value > 0
    low, high = long["win_rate"].interval
    assert low < long["win_rate"].value < high
    assert long["tokens"].command == f"sampo lab --seeds 1 --groups short long {_reordered(MICRO)}"
    table = (tmp_path / "table.md").read_text()
    assert f"| long | DPO | {long['tokens'].value:.1f} |" in table
    outcomes = report.outcomes_of(results.read(path))
    assert table == report.markdown(
        report.collect_lines(outcomes), about=report.describe_runs(outcomes, long["tokens"].command)
    )
    assert (tmp_path / "lab.svg").read_text().count("SFT (start)") == 1

    run_micro(tmp_path)
    assert path.read_bytes() == before  # nothing was run again

    lines = before.decode().splitlines(keepends=True)
    long_lines = [line for line in lines if json.loads(line)["config"]["group"] == "long"]
    kept = [line for line in lines if line not in long_lines]
    path.write_text("".join(kept + long_lines[:3]))  # as if killed while it wrote the first run on `long`
    run_micro(tmp_path)
    again = {(r.config["group"], r.config["method"], r.name): r for r in results.read(path)}
    assert again.keys() == found.keys()
    for key, record in found.items():
        if key[2] != "train_seconds":
            assert (again[key].value, again[key].interval) == (record.value, record.interval), key


def _reordered(command):
    """Options in the order in which the lab writes its command."""
    words = command.split(" --")
    words[0] = words[0].removeprefix("--")
    order = ["methods", "steps", "pairs", "sft_steps", "questions", "judged_pairs"]
    return " ".join(f"--{word}" for word in sorted(words, key=lambda word: order.index(word.split()[0])))


def outcome(run, **values):
    return run, [results.Record(name=name, value=value, n=1, config=run.config) for name, value in values.items()]


def test_the_sentences_say_what_the_numbers_say():
    def sentences(sampo_tokens):
        outcomes = []
        for run in plan(Settings(), seeds=len(sampo_tokens), groups=["long"], methods=["dpo", "sampo"]):
            tokens = {"sft": 20.0, "dpo": 40.0, "sampo": sampo_tokens[run.seed]}[run.method]
            outcomes.append(outcome(run, tokens=tokens, stops=1.0, quality=0.8, win_rate=0.5))
        lines = report.collect_lines(outcomes)
        assert report.weak_start(lines) is None
        return " ".join(report.summarise_findings(lines))

    assert "the answers of SamPO are 9.3 tokens longer than those of DPO, 49.3 against 40.0" in sentences([49.3])
    assert "the answers of SamPO are 9.3 tokens shorter than those of DPO, 30.7 against 40.0" in sentences([30.7])
    assert "as long as those of DPO" in sentences([40.01])
    assert "10.0 tokens longer than those of DPO (2 of 3 seeds)" in sentences([60.0, 52.0, 38.0])
    assert "This is one seed" in sentences([50.0])
    assert "This is one seed" not in sentences([50.0, 51.0])


def test_the_published_table_is_made_from_the_published_records():
    root = Path(__file__).parents[2]
    records = results.read(root / "measurements" / "lab.jsonl")
    outcomes = report.outcomes_of(records)
    assert len(outcomes) == 3 * 10  # three seeds of the start and of three methods on three groups
    about = report.describe_runs(outcomes, records[-1].command)
    assert (root / "docs" / "lab" / "table.md").read_text() == report.markdown(
        report.collect_lines(outcomes), about=about
    )
    assert all(record.commit and not record.commit.endswith("-dirty") for record in records)


def test_records_of_different_experiments_make_no_table():
    records = [outcome(Run(0, "all", "dpo", Settings(beta=beta)), tokens=1.0)[1][0] for beta in (0.1, 0.2)]
    records[0] = dataclasses.replace(records[0], config={**records[0].config, "seed": 1})
    with pytest.raises(ValueError, match="must be of one experiment, got 2 different settings"):
        report.outcomes_of(records)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(SystemExit, match="sampo lab: `sft_steps` must be positive and finite, got 0"):
        main(make_parser().parse_args(["--sft_steps", "0"]))
    for name in ("bias", "learning_rate"):
        with pytest.raises(SystemExit, match=f"sampo lab: `{name}` must be .*finite, got nan"):
            main(make_parser().parse_args([f"--{name}", "nan"]))
    with pytest.raises(SystemExit, match="sampo lab: `--seeds` must be at least 1, got 0"):
        main(make_parser().parse_args(["--seeds", "0"]))


def test_the_parser_knows_the_settings_without_loading_torch():
    code = (
        "import sys; from sampo.commands.lab import make_parser; args = make_parser().parse_args(['--beta', '0.5']);"
        "assert args.beta == 0.5 and args.steps == 100; make_parser().format_help();"
        "print([name for name in ('torch', 'transformers', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_study_that_left_the_package_is_named():
    with pytest.raises(SystemExit, match=r"run `python -m studies\.run` in a checkout of the repository"):
        run_command(["study", "--jobs", "2"])
