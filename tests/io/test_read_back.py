"""Every file that is read back, changed at random: one error of ours that names the file, or a right reading."""

import copy
import json
import random
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from tiny import save_model

from sampo.checkpointing.files import MANIFEST, RunRecord, find_checkpoint_issue, write_manifest
from sampo.checkpointing.resume import LOG_WINDOW, LogWindow
from sampo.commands import cache
from sampo.commands.iterate import summarise_round
from sampo.commands.launch import launch_command
from sampo.commands.options import make_parser
from sampo.data.issues import PreferenceDataError
from sampo.diagnostics import pair_scores
from sampo.evaluation.answers.answers import Answer, read_answers, write_answers
from sampo.evaluation.endpoint import Endpoint
from sampo.evaluation.judging import judges, rule_judges, templates
from sampo.evaluation.judging.endpoint_judge import EndpointJudge
from sampo.evaluation.results import judged
from sampo.io import records as results
from sampo.io.hashing import SEAL, seal
from sampo.io.schemas import WrongFile, WrongShape, parse_json, parse_yaml, read_json, read_yaml, typed
from sampo.models.checks import find_model_folder_issues
from sampo.reference_cache import store as ref_logps
from sampo.reference_cache.store import About, RefCacheError, RefManifest, ShardEntry
from sampo.training import rounds as iterate
from sampo.training.rounds import STATE, Plan, RefusedIteration, Round

# these types and none below them
OURS = (WrongFile, PreferenceDataError, RefCacheError, RefusedIteration, ValueError, SystemExit)

# --- typed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"]
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    name: str
    count: int | None
    pair: tuple[float, int]
    inners: dict[str, Inner]
    more: Any = None
    flag: bool = False

    def __post_init__(self):
        if self.count == 13:
            raise ValueError("`count` must not be 13, got 13")


GOOD = {"name": "x", "count": 3, "pair": [1, 2], "inners": {"i": {"kind": "a", "values": [1, 2.5]}}}


def test_what_is_right_becomes_an_object():
    assert typed(Outer, GOOD) == Outer("x", 3, (1, 2), {"i": Inner("a", [1, 2.5])})
    assert typed(Outer, {**GOOD, "count": None, "more": [1], "flag": True}).more == [1]
    assert typed(list[Inner | None], [None, {"kind": "b"}]) == [None, Inner("b")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "`name` must be a string, got 3"),
        ({"count": 2.0}, "`count` must be a whole number or null, got 2.0"),
        ({"count": True}, "`count` must be a whole number or null, got true"),
        ({"count": 13}, "`count` must not be 13, got 13"),
        ({"count": 10**400}, None),
        ({"pair": [1]}, "`pair` must be a list of 2, got a list of 1"),
        ({"pair": [1, "2"]}, "`pair[1]` must be a whole number, got '2'"),
        ({"pair": "12"}, "`pair` must be a list of 2, got '12'"),
        ({"inners": []}, "`inners` must be an object, got a list of 0"),
        ({"inners": {"i": {"kind": "c"}}}, "`inners.i.kind` must be one of ['a', 'b'], got 'c'"),
        ({"inners": {"i": {"kind": "a", "values": [1, None]}}}, "`inners.i.values[1]` must be a number, got null"),
        ({"inners": {"i": {}}}, "`inners.i` must be an object with ['kind'], got the keys []"),
        ({"inners": {"i j": 1}}, "`inners.'i j'` must be an object, got 1"),
        ({"flag": 1}, "`flag` must be true or false, got 1"),
        (
            {"flga": 1},
            "it must be an object without other keys than ['name', 'count', 'pair', 'inners', 'more', 'flag']",
        ),
        (
            {"name": "y" * 99 + "\n\x1b[31m", "count": "\x1b[31m"},
            "`count` must be a whole number or null, got '\\x1b[31m'",
        ),
    ],
)
def test_what_is_wrong_is_named_with_field_expected_and_got(change, said):
    if said is None:
        assert typed(Outer, GOOD | change).count == 10**400
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        typed(Outer, GOOD | change)


def test_a_key_is_missing_an_unknown_one_is_left_out_and_defaults_can_be_refused():
    with pytest.raises(
        WrongShape, match=r"it must be an object with \['pair'\], got the keys \['name', 'count', 'inners'\]"
    ):
        typed(Outer, {name: value for name, value in GOOD.items() if name != "pair"})
    assert typed(Outer, {**GOOD, "new": 1}, ignore_unknown=True) == typed(Outer, GOOD)
    with pytest.raises(WrongShape, match=r"must be an object with \['more', 'flag'\]"):
        typed(Outer, GOOD, complete=True)
    with pytest.raises(WrongShape, match=r"\(did you mean `flag`\?\)"):
        typed(Outer, {**GOOD, "flags": 1})


def test_a_file_is_named_once_with_what_to_do(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"name": 3}')
    with pytest.raises(WrongFile, match=r"^\S*x.json: it must be an object with .* Delete it\.$"):
        read_json(path, Outer, "Delete it")
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path, list[int]) == [1]
    path.write_text("[" * 100_000)
    with pytest.raises(WrongFile, match="must be JSON that is not nested deeper"):
        read_json(path, Any)
    path.write_text("1" * 5000)
    with pytest.raises(WrongFile, match="must be JSON in UTF-8, got Exceeds the limit"):
        read_json(path, Any)


BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "at most 100,000 values, aliases written out"),
        ("a: &a [*a]", "at most 100,000 values, aliases written out"),
        ("a: " + "1" * 5000, "whole numbers of at most 40 digits, got 5,000"),
        ("a: 0x" + "f" * 5000, "whole numbers of at most 40 digits, got 5,002"),
        ("[" * 3000, "not nested deeper than about a hundred levels"),
        ("# " + "x" * 2**20, "at most 1,048,576 bytes"),
        ("a: 1\na: 2", r"each key stands once, got `a` in lines \[1, 2\]"),
        ("a: {b: 1, b: 1}", r"each key stands once, got `b` in lines \[1, 1\]"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable key"),
        ("a: !!int b", "invalid literal"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_yaml_that_is_none_or_a_bomb_is_refused_at_once(text, said):
    with pytest.raises(WrongShape, match=said):
        parse_yaml(text)


def test_yaml_with_aliases_within_bounds_is_read():
    assert parse_yaml("base: &b {x: 1}\nrun: {<<: *b, y: 2026-01-31}") == {
        "base": {"x": 1},
        "run": {"x": 1, "y": "2026-01-31"},
    }
    assert parse_yaml("") is None


# --- every kind of file ----------------------------------------------------------------------------------------------


def manifest_of_checkpoint(folder):
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder, RunRecord({"`seed`": 7, "the training data": "abc"}, {"`bf16`": True}, {"`max_steps`": 4}))

    def read():
        fault = find_checkpoint_issue(folder)
        assert fault is None or isinstance(fault, str)

    return folder / MANIFEST, read


def log_window(folder):
    window = LogWindow(2, [0.5, 0.25], {"rewards/margins": [0.1, 0.2]}, 120, {"n": 4.0})
    (folder / LOG_WINDOW).write_text(json.dumps(asdict(window)))
    return folder / LOG_WINDOW, lambda: read_json(folder / LOG_WINDOW, LogWindow, complete=True)


def iterate_state(folder):
    plan = Plan(2, "full", "previous", str(folder), "m", "main", 1, "float32", False, recipe={"beta": 0.1, "x": [1]})
    rounds = [Round(1, "finished", ["a"], metrics={"steps": 3, "last": {"loss": 1.0}}), Round(2)]
    iterate.save_state(plan, rounds)

    def read():
        state = iterate.read_state(folder / STATE)
        list(iterate.describe_changes(asdict(state.plan), asdict(plan)))

    return folder / STATE, read


def trainer_state(folder):
    log = [{"loss": 0.6, "step": 1}, {"eval_loss": 0.5, "eval_rewards/margins": 0.1}, {"loss": 0.5, "step": 2}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 2, "epoch": 1.0}))
    (folder / "sampo_merge.json").write_text('{"dtype": "float32"}')
    return folder / "trainer_state.json", lambda: summarise_round(
        Round(1, metrics=iterate.read_metrics(folder, folder))
    )


def reference_cache(folder):
    key = {"weights": "a", "storage_dtype": "float32", "max_length": 9}
    about = About("train", "model", "run")
    manifest = RefManifest(ref_logps.KEY_SCHEMA, key, 20, 4, "2026-01-01", about, {"0": ShardEntry("ab", 100, 7)})
    place = folder / ("a" * 24)
    place.mkdir()
    (place / "manifest.json").write_text(seal(asdict(manifest)))

    def read():
        assert cache.run(["--ref_cache_dir", str(folder), "--ls"]) == 0
        ref_logps.read_cache_manifest(place / "manifest.json")

    return place / "manifest.json", read


def diagnosis(folder):
    key = pair_scores.ScoreKey(
        **{"policy": {"weights": "a"}, "reference": None, "data": "d", "weights": None, "max_length": None, "seed": 0},
        **{"gamma": 0.9, "truncation_mode": "keep_start", "end_ids": [1], "end_id": 1, "token_totals": [5, 7]},
        tail_weight=0.5,
    )
    (folder / "rows.parquet").write_bytes(b"rows")
    known = {"rows.parquet": pair_scores.hash_content(b"rows")}
    pair_scores.write_score_manifest(folder, key, known)
    return folder / pair_scores.SCORE_MANIFEST, lambda: pair_scores.read_score_shards(folder, key)


def answers(folder):
    rows = [
        Answer(prompt=f"p{i}", answer="a" * i, tokens=i, stop="eos", sampling={"temperature": 0}) for i in range(3)
    ]
    write_answers(folder / "a.jsonl", rows)
    return folder / "a.jsonl", lambda: [answer.words for answer in read_answers(folder / "a.jsonl")]


def alpaca_outputs(folder):
    rows = [{"instruction": f"p{i}", "output": "a" * i, "generator": "m", "dataset": "d"} for i in range(3)]
    (folder / "outputs.json").write_text(json.dumps(rows))
    return folder / "outputs.json", lambda: [answer.words for answer in read_answers(folder / "outputs.json")]


def write_judged(folder):
    ours, theirs = (
        [Answer(prompt=f"p{i}", answer=letter * (i + 1), model=letter, tokenizer="t", tokens=2) for i in range(4)]
        for letter in "ab"
    )
    write_answers(folder / "a.jsonl", ours)
    write_answers(folder / "b.jsonl", theirs)
    pairs = judges.match(ours, theirs).pairs
    judge = rule_judges.longer_judge()
    files = [judged.AnswerFile.of(folder / f"{name}.jsonl", rows) for name, rows in (("a", ours), ("b", theirs))]
    run = judged.Judged(
        **{
            "system": files[0],
            "baseline": files[1],
            "judge": {"name": judge.name, **judge.about},
            "n": None,
            "seed": 0,
        },
        rows=judges.judge_pairs(judge, pairs),
        empty=judges.judge_pairs(judge, judges.empty_answers(pairs)),
    )
    judged.write(folder / "j.jsonl", run, run.summary(), more={}, command="x")


def summary(folder):
    write_judged(folder)

    def read():
        run = judged.read_judged(folder / "j.jsonl")
        assert run.summary().sentence()
        assert json.dumps(run.config)

    return folder / "j.summary.json", read


def judgements(folder):
    write_judged(folder)
    return folder / "j.control.jsonl", lambda: judged.read_judged(folder / "j.jsonl").summary().sentence()


def records(folder):
    made = [results.Record(name=f"n{i}", value=0.5, n=3, config={"a": [1]}, interval=(0.1, 0.9)) for i in range(3)]
    results.append(folder / "records.jsonl", made)
    return folder / "records.jsonl", lambda: results.lines(results.read(folder / "records.jsonl"))


def replies(folder):
    rows = [{"key": f"k{i}", "prompt_id": "p", "reply": '{"choices": []}', "created": "x"} for i in range(3)]
    (folder / "cache.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read():
        endpoint = Endpoint("http://localhost:1/v1", "m")
        EndpointJudge(endpoint, templates.load(templates.names()[0]), folder / "cache.jsonl").close()

    return folder / "cache.jsonl", read


def template(folder):
    path = folder / "mine.yaml"
    path.write_bytes((templates.FOLDER / f"{templates.names()[0]}.yaml").read_bytes())

    def read():
        prompt = templates.load(path)
        prompt.messages("p", "a", "b")
        choice = {"message": {"content": "Preferred: A"}, "logprobs": {"content": []}, "finish_reason": "stop"}
        prompt.verdict(choice)

    return path, read


def recipe(folder):
    content = {"model_name_or_path": "m", "dataset_name": "d", "beta": 0.1, "max_steps": 3, "env": {"A_B": 1}}
    content |= {"loss_type": ["sigmoid"], "bf16": False, "output_dir": str(folder / "run"), "eval_fraction": 0.1}
    content |= {"eval_strategy": "steps", "datasets": [], "dataset_train_split": "train", "prompt_shard": None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, lambda: make_parser().read(["--config", str(path)])


def launcher(folder):
    path = folder / "ddp.yaml"
    content = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1, "num_processes": 2}
    path.write_text(yaml.safe_dump(content | {"main_process_port": None, "mixed_precision": "no"}))
    return path, lambda: launch_command({"accelerate_config": str(path)}, [])


def model_config(folder):
    save_model(folder)

    def read():
        assert all(isinstance(fault, str) for fault in find_model_folder_issues(str(folder)))

    return folder / "config.json", read


def weight_index(folder):
    save_model(folder)
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json", lambda: find_model_folder_issues(str(folder))


KINDS = [
    *(manifest_of_checkpoint, log_window, iterate_state, trainer_state, reference_cache, diagnosis),
    *(answers, alpaca_outputs, summary, judgements, records, replies),
    *(template, recipe, launcher, model_config, weight_index),
]
ODD = [None, True, 0, -1, 1.5, 1e308, float("nan"), "", "text", "\ud83d", "\x1b[2J", [], {}, [None], {"a": 1}, 10**50]


def places_of(value, path=()):
    """All places in a value, the outermost first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places_of(one, (*path, key))


def spoiled(value, rng):
    """A copy with one change: a part lost, renamed, doubled, or of another type."""
    value = copy.deepcopy(value)
    *outer, last = rng.choice([path for path in places_of(value) if path] or [("x",)])
    parent = value
    for key in outer:
        parent = parent[key]
    change = rng.choice(["drop", "rename", "odd", "odd", "odd", "double"])
    if change == "odd" or not isinstance(parent, dict):
        parent[last] = rng.choice(ODD)
    elif change == "drop":
        del parent[last]
    elif change == "rename":
        parent[f"{last}x"] = parent.pop(last)
    else:
        parent[rng.choice(["new", 7, None])] = copy.deepcopy(parent[last])
    return value


def damaged(content, rng):
    """Bytes that are cut off, flipped, doubled, or something else altogether."""
    place = rng.randrange(len(content))
    return rng.choice(
        [
            content[:place],
            content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :],
            content[:place] + bytes([rng.randrange(256)]) + content[place:],
            content[:place] + b"1" * 5000 + content[place:],
            content[:place] + b"[" * 5000 + content[place:],
            content + content,
            rng.choice([b"", b"null", b"[]", b"{}", b"\x00", b"\xff\xfe", b"3\n", b'"x"\n', b"- a\n"]),
        ]
    )


def changed(path, content, rng):
    """One change of the file, of its text or of what it means."""
    if rng.random() < 0.4:
        return damaged(content, rng)
    if path.suffix == ".yaml":
        return yaml.safe_dump(spoiled(yaml.safe_load(content), rng), allow_unicode=True).encode("utf-8", "replace")
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(spoiled(json.loads(lines[number]), rng)).encode()
        return b"\n".join(lines) + b"\n"
    value = spoiled(json.loads(content), rng)
    if SEAL in json.loads(content) and rng.random() < 0.8:  # as if it had been written so
        return seal({name: one for name, one in value.items() if name != SEAL}).encode()
    return json.dumps(value).encode()


def fuzz(kind, folder, n, seed):
    path, read = kind(folder)
    content, rng = path.read_bytes(), random.Random(seed)
    read()
    refused = 0
    for _ in range(n):
        new = changed(path, content, rng)
        path.write_bytes(new)
        error = error_of(read)
        if error is not None:
            said = f"{new!r} gave {error!r}"
            assert type(error) in OURS, said
            # a ValueError of the statistics is about several files
            assert str(folder) in str(error) or type(error) in (SystemExit, ValueError), said
            assert "\x1b" not in str(error), said
            refused += 1
    return refused


def error_of(read):
    try:
        read()
    except (Exception, SystemExit) as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_changed_file_gives_an_error_of_ours(kind, tmp_path, capsys):
    refused = fuzz(kind, tmp_path, 25 if kind is recipe else 80, seed=1)
    never = (manifest_of_checkpoint, trainer_state, model_config, weight_index)  # they return what is wrong
    assert refused > 10 or kind in never


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_file_changed_in_a_thousand_ways_gives_an_error_of_ours(kind, tmp_path, capsys):
    fuzz(kind, tmp_path, 300 if kind is recipe else 1000, seed=2)


def test_json_is_read_as_before_where_it_is_right():
    assert parse_json('{"a": NaN}')["a"] != 0
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d"}') == {"a": "\ud83d"}
    assert read_yaml(Path(templates.FOLDER) / f"{templates.names()[0]}.yaml", dict[str, Any])["version"] >= 1
