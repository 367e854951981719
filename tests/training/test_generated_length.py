"""Answers to held-out prompts during training: their lengths, and that nothing else changes."""

import json
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from resume_worker import LORA, make_run, outcome
from tiny import make_pairs, make_tokenizer, save_model, training_options

from sampo import SamPOConfig, SamPOTrainer
from sampo.checkpointing import files as checkpoints
from sampo.cli import main
from sampo.training.generated_length import find_distinct_prompts

END, TURN_END, LIMIT = 1, 3, 12  # <eos>, <|im_end|>; tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def make_trainer(model, out, *, lora=False, eval_dataset=None, **options) -> SamPOTrainer:
    options = {"generate_every": 2, "generate_max_tokens": LIMIT, "max_steps": 3, "pair_stream": "false"} | options
    return SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(out, **options)),
        train_dataset=make_pairs(24, conversational=True),
        eval_dataset=make_pairs(9, seed=5, conversational=True) if eval_dataset is None else eval_dataset,
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def generated(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "length/generated" in entry]


@torch.no_grad()
def greedy_lengths(model, prompts: list[str]) -> list[tuple[int, bool]]:
    """Token by token, one prompt at a time, without padding and without a cache."""
    model.eval()
    tokenizer, found = make_tokenizer(), []
    for prompt in prompts:
        text = f"<|im_start|> user {prompt} <|im_end|> \n <|im_start|> assistant "
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer: list[int] = []
        while len(answer) < LIMIT and not (answer and answer[-1] in (END, TURN_END)):
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
        found.append((len(answer), answer[-1] in (END, TURN_END)))
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_lengths_are_those_of_a_naive_greedy_loop(folder, tmp_path, lora, stream):
    pairs = make_pairs(9, seed=5, conversational=True)
    prompts = [row[0]["content"] for row in pairs["prompt"]][:7]
    trainer = make_trainer(
        folder,
        tmp_path,
        lora=lora,
        pair_stream=stream,
        generate_prompts=7,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
    )
    start = greedy_lengths(trainer.model, prompts)
    trainer.train()
    assert trainer.passes.packed == (stream == "true")
    entries = generated(trainer)
    assert [entry["step"] for entry in entries] == [0, 2, 3]
    for entry, lengths in ((entries[0], start), (entries[-1], greedy_lengths(trainer.model, prompts))):
        assert entry["length/generated"] == pytest.approx(sum(n for n, _ in lengths) / 7)
        assert entry["length/generated_ended"] == pytest.approx(sum(ended for _, ended in lengths) / 7)
        assert entry["length/generated_ratio"] == pytest.approx(
            sum(n for n, _ in lengths) / sum(n for n, _ in start), rel=1e-12
        )
    assert 0 < entries[0]["length/generated_ended"] < 1
    assert entries[0]["length/generated"] != entries[-1]["length/generated"]


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_trains_the_same_weights_with_it_to_the_bit_and_logs_the_same(folder, tmp_path, lora):
    def run(name, **options):
        trainer = make_run(
            folder, tmp_path / name, lora=lora, disable_dropout=False, eval_strategy="steps", eval_steps=2, **options
        )
        trainer.train()
        return outcome(trainer)

    without = run("without")
    with_it = run("with", generate_every=1, generate_max_tokens=LIMIT)
    logged = [entry for entry in with_it["log"] if "length/generated" in entry]
    assert [entry["step"] for entry in logged] == list(range(8))
    with_it["log"] = [entry for entry in with_it["log"] if "length/generated" not in entry]
    assert with_it == without


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(folder, tmp_path):
    options = {"generate_every": 2, "generate_max_tokens": LIMIT}
    whole = make_run(folder, tmp_path / "whole", **options)
    whole.train()
    assert [entry["step"] for entry in generated(whole)] == [0, 2, 4, 6, 7]
    for step in (3, 4):
        resumed = make_run(folder, tmp_path / f"resumed-{step}", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert outcome(resumed) == outcome(whole)


def test_a_resumed_run_with_other_prompts_starts_from_a_length_of_its_own(folder, tmp_path, caplog):
    make_run(folder, tmp_path / "a", generate_every=2, generate_max_tokens=LIMIT).train()
    resumed = make_run(folder, tmp_path / "b", generate_every=2, generate_max_tokens=LIMIT, generate_prompts=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    steps = [(entry["step"], entry["length/generated_ratio"]) for entry in generated(resumed)]
    assert [step for step, _ in steps] == [0, 2, 3, 4, 6, 7]
    assert steps[2][1] == 1
    assert "refers to step 3 instead of 0" in caplog.text


def test_it_stops_above_the_ratio_with_a_checkpoint_and_stays_stopped_until_the_limit_is_raised(folder, tmp_path):
    options = {"generate_every": 1, "generate_max_tokens": LIMIT, "save_steps": 100, "learning_rate": 1e-2}
    options["gradient_accumulation_steps"] = 1  # or a resumed run that does not stop at once breaks off within a step
    free = make_run(folder, tmp_path / "free", **options)
    free.train()
    ratios = {entry["step"]: entry["length/generated_ratio"] for entry in generated(free)}
    step = next(step for step, ratio in ratios.items() if ratio > 1 and 0 < step < 7)
    limit = (1 + ratios[step]) / 2
    assert free.run_state.stop_reason is None

    stopped = make_run(folder, tmp_path / "stopped", max_length_ratio=limit, **options)
    stopped.train()
    assert stopped.state.global_step == step
    assert f"Stopped at step {step} of 7: the generated answers are {ratios[step]:.2f} times as long" in (
        stopped.run_state.stop_reason
    )
    checkpoint = checkpoints.find_complete_checkpoint(tmp_path / "stopped").path
    assert checkpoint.name == f"checkpoint-{step}"

    again = make_run(folder, tmp_path / "stopped", max_length_ratio=limit, **options)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, again.run_state.stop_reason) == (step, stopped.run_state.stop_reason)
    assert outcome(again) == outcome(stopped)

    on = make_run(folder, tmp_path / "on", max_length_ratio=100.0, **options)
    on.train(resume_from_checkpoint=str(checkpoint))
    assert outcome(on)["weights"] == outcome(free)["weights"]


def test_the_first_distinct_prompts_that_fit_are_taken():
    def data(*prompts):
        return Dataset.from_dict({"prompt_ids": list(prompts), "other": [0] * len(prompts)})

    first, second = data([1, 2], [3], [1, 2], [4, 5, 6], []), data([3], [7])
    assert list(find_distinct_prompts(first)) == [[1, 2], [3], [4, 5, 6]]
    assert list(find_distinct_prompts(first.to_iterable_dataset(), longest=2)) == [[1, 2], [3]]
    assert list(find_distinct_prompts({"a": first, "b": second}, longest=2)) == [[1, 2], [3], [7]]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "issue"),
    [
        ({"generate_every": 0}, "`generate_every` must be a whole number of steps of at least 1, or unset, got 0."),
        ({"generate_every": 2, "generate_prompts": 0}, "`generate_prompts` must be a whole number of at least 1"),
        ({"generate_every": 2, "generate_max_tokens": 0}, "`generate_max_tokens` must be a whole number of at least"),
        ({"generate_every": 2, "max_length_ratio": 1.0}, "`max_length_ratio` must be a finite number above 1"),
        ({"max_length_ratio": 1.2}, "`max_length_ratio: 1.2` compares lengths that are measured every"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, options, issue):
    with pytest.raises(ValueError, match=re.escape(issue)):
        SamPOConfig(**training_options(tmp_path, **options))


def test_without_evaluation_data_it_is_refused_before_a_model_is_loaded(tmp_path):
    args = SamPOConfig(**training_options(tmp_path, generate_every=2))
    with pytest.raises(ValueError, match="`generate_every: 2` needs evaluation data to take prompts from, got none"):
        SamPOTrainer(model="/no/such/model", args=args, train_dataset=make_pairs(8))


def test_prompts_without_room_for_an_answer_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"room for `generate_max_tokens: 256` within 256 positions .* got none"):
        make_trainer(folder, tmp_path, generate_max_tokens=256)


# --- on the command line ---------------------------------------------------------------------------------------------


def command(folder, tmp_path, **more) -> list[str]:
    make_pairs(40, conversational=True).to_json(tmp_path / "pairs.jsonl")
    options = {"model_name_or_path": folder, "dataset_name": tmp_path / "pairs.jsonl", "output_dir": tmp_path / "out"}
    options |= {"use_cpu": True, "bf16": False, "max_steps": 6, "logging_steps": 2, "pair_stream": "false"}
    options |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no", "eval_fraction": 0.3}
    options |= {"eval_strategy": "steps", "eval_steps": 100, "generate_every": 1, "generate_max_tokens": LIMIT} | more
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_sampo_train_prints_the_lengths_and_why_it_has_stopped(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path, max_length_ratio=1.0001)) == 0
    printed = capsys.readouterr().out
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in log if "length/generated" in entry]
    last = entries[-1]
    assert 0 < last["step"] < 6
    for entry in entries:
        values = [f"{entry[f'length/generated{name}']:{form}}" for name, form in (("", ".1f"), ("_ended", ".2f"))]
        line = f"gen  {entry['step']}/6  answers {values[0]}  ended {values[1]}  "
        assert f"{line}ratio {entry['length/generated_ratio']:.2f}  {entry['generate_runtime']:.1f} s\n" in printed
    assert f"{last['step']}/6 steps in " in printed
    assert printed.index("Model saved to") < printed.index(f"Stopped at step {last['step']} of 6: the generated")
    assert any("eval_loss" in entry for entry in log)  # as after the last step
    assert math.isclose(last["length/generated_ratio"] * entries[0]["length/generated"], last["length/generated"])


def test_sampo_train_without_an_evaluation_says_what_to_set(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(folder, tmp_path, eval_strategy="no", eval_fraction=0))
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "`generate_every: 1` needs evaluation pairs to take prompts from, got `eval_strategy: no`." in said
