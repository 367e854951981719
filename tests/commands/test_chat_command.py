import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tiny import make_model, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sampo import cli


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, an adapter of the first one, and a model without a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder / "a")
    save_model(folder / "b", seed=1)
    save_model(folder / "plain", chat=False)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "a"),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(folder / "adapter")
    return folder


def chat(monkeypatch, capsys, lines, *words):
    """What is printed for these lines from a pipe."""
    reading, writing = os.pipe()
    os.write(writing, "".join(f"{line}\n" for line in lines).encode())
    os.close(writing)
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert cli.main(["chat", *map(str, words), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def turns(printed):
    """(line, [(text, tokens, how it ended)]) of each message."""
    found = []
    for block in re.split(r"^> ", printed, flags=re.MULTILINE)[1:]:
        line, _, rest = block.partition("\n")
        answers = re.findall(r"(?:^--- .*\n)?(.*)\n\[(\d+) tokens?, (.*)\]\n", rest, re.MULTILINE)
        found.append((line, [(text, int(tokens), ended) for text, tokens, ended in answers]))
    return found


def expected(model, messages, n):
    """The greedy answer by a loop over single tokens: (text, tokens, how it ended)."""
    import torch

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    made = []
    while len(made) < n and tokenizer.eos_token_id not in made:
        made.append(int(network(torch.tensor([ids + made])).logits[0, -1].argmax()))
    ended = "ended by the model" if made[-1] == tokenizer.eos_token_id else "cut off by --max_new_tokens"
    return tokenizer.decode(made, skip_special_tokens=True), len(made), ended


def test_two_models_answer_each_with_its_own_conversation(place, monkeypatch, capsys):
    models = [place / "a", place / "b"]
    lines = ["w1 w2", "w3", "/reset", "w3", "/quit", "w4"]
    printed = chat(monkeypatch, capsys, lines, *models, "--max_new_tokens", "6", "--system", "w9")
    said = turns(printed)
    assert [line for line, _ in said] == lines[:5]
    assert all(f"--- {model}\n" in printed for model in models)
    for number, model in enumerate(models):
        history = [{"role": "system", "content": "w9"}]
        for line, answers in said[:2]:
            history.append({"role": "user", "content": line})
            assert answers[number] == expected(model, history, 6)
            history.append({"role": "assistant", "content": answers[number][0]})
        history = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w3"}]
        assert said[3][1][number] == expected(model, history, 6)
    assert said[0][1][0] != said[0][1][1]


def test_an_answer_that_the_model_ends_is_told_from_one_that_is_cut_off(tmp_path, monkeypatch, capsys):
    folder = save_model(tmp_path / "ends")
    network = make_model()
    network.lm_head.weight.data.zero_()  # all logits are equal, so that token 0 is taken
    network.generation_config.eos_token_id = 0  # and ends the answer
    network.save_pretrained(folder)
    said = turns(chat(monkeypatch, capsys, ["w1"], folder, "--max_new_tokens", "5"))
    assert said == [("w1", [("", 1, "ended by the model")])]


def test_sampled_answers_are_those_of_sampo_generate_and_depend_on_the_seed(place, tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "w5 w6"}]}) + "\n")
    drawing = ["--temperature", "0.9", "--seed", "3"]
    words = ["generate", str(place / "adapter"), "--prompts", str(prompts), "--out", str(out), "--max_tokens", "9"]
    assert cli.main([*words, *drawing]) == 0
    answer = json.loads(out.read_text())
    capsys.readouterr()
    words = [place / "adapter", "--max_new_tokens", "9"]
    ((_, [(text, tokens, _)]),) = turns(chat(monkeypatch, capsys, ["w5 w6"], *words, *drawing))
    assert (text.strip(), tokens) == (answer["answer"].strip(), answer["tokens"])
    other = turns(chat(monkeypatch, capsys, ["w5 w6"], *words, *drawing[:3], "4"))
    assert other[0][1][0][0] != text


def test_a_conversation_that_is_full_is_not_cut(place, monkeypatch, capsys):
    lines = ["w1 " * 300, "w2"]  # the model has 256 positions
    printed = chat(monkeypatch, capsys, lines, place / "a", "--max_new_tokens", "5")
    assert "The conversation must leave room, got 30" in printed
    said = turns(printed)
    assert said[0][1] == []
    assert said[1][1] == [expected(place / "a", [{"role": "user", "content": "w2"}], 5)]


def test_a_model_without_a_template_continues_text(place, monkeypatch, capsys):
    said = turns(chat(monkeypatch, capsys, ["w1", "w2", "w1"], place / "plain", "--max_new_tokens", "4"))
    assert said[0][1] == said[2][1] != []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["./nowhere"], "`model`"),
        (["a", "b", "c"], "`models` must be one or two, got 3"),
        (["a", "--temperature", "-1"], "`temperature` -1.0"),
        (["plain", "--system", "w1"], "`system` must go with a chat template"),
    ],
)
def test_bad_input_is_one_sentence(place, monkeypatch, capsys, words, says):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as stop:
        cli.main(["chat", *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("sampo chat: error: ")
    assert says in said


def test_a_terminal_gets_a_prompt_and_ctrl_c_drops_an_answer_alone(place):
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "TERM": "dumb"}
    words = [sys.executable, "-m", "sampo.cli", "chat", str(place / "a"), "--max_new_tokens", "200", "--device", "cpu"]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)

    def read_until(pattern):
        printed = ""
        while not re.search(pattern, printed):
            printed += os.read(ours, 1000).decode()
        return printed

    try:
        read_until("> ")
        os.write(ours, b"w1\n")
        read_until(r"w\d+ w\d+ ")  # a part of the answer
        process.send_signal(signal.SIGINT)
        read_until(r"\[stopped: the message is dropped\]\s+> ")
        os.write(ours, b"/quit\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)
