"""Digests that recorded runs, caches and judged answers hold keep their value; damage is found and named."""

import hashlib
import json

import pytest

from sampo.io.files import write_atomic
from sampo.io.hashing import (
    Content,
    find_changed_file,
    hash_contents,
    hash_file,
    hash_file_samples,
    hash_files,
    hash_json,
    seal,
    unseal,
)


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_names_sizes_and_contents_are_what_is_hashed(tmp_path):
    write_atomic(tmp_path / "a", "hello")
    one = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert hash_file(tmp_path / "a") == one
    assert hash_files([("a", tmp_path / "a")]) == hash_text(f"a {one}\n")
    assert hash_files([("a", tmp_path / "a")], separator="\n") == hash_text(f"a\n{one}\n")
    assert hash_file_samples([tmp_path / "a"]) == hash_text("a 5\n" + 64 * "hello")


def test_a_json_value_has_one_digest_in_any_order_of_its_keys():
    assert hash_json({"b": 1, "a": "é"}) == hash_text('{"a": "\\u00e9", "b": 1}') == hash_json({"a": "é", "b": 1})
    assert hash_json({"a": {1}}, default=list) == hash_json({"a": [1]})


def test_a_file_that_is_not_as_it_was_written_is_named_with_the_reason(tmp_path):
    for name in ("a", "b/c"):
        write_atomic(tmp_path / name, name * 5)
    known = hash_contents(tmp_path, ["a", "b/c"])
    assert known["a"] == Content(5, "ed968e840d10d2d313a870bc131a4e2c311d7ad09bdf32b3418147221f51a6e2")
    assert find_changed_file(tmp_path, known) is None
    write_atomic(tmp_path / "b/c", "b/c" * 4 + "b/d")
    assert find_changed_file(tmp_path, known) == "the content of b/c is not what was written"
    write_atomic(tmp_path / "b/c", "b/c")
    assert find_changed_file(tmp_path, known) == "b/c has 3 bytes in place of 15"
    (tmp_path / "a").unlink()
    assert find_changed_file(tmp_path, known) == "a is missing"


def test_a_seal_breaks_with_any_change_of_what_it_seals():
    content = {"a": 1, "b": {"c": [1.5, None, "ü"]}, "n": {1: 2}}
    text = seal(content)
    assert unseal(json.loads(text)) == {**content, "n": {"1": 2}}
    for old, new in (('"a": 1', '"a": 2'), ("1.5", "1.25"), ('"c"', '"d"'), ("null", "false"), ("\\u00fc", "u")):
        assert old in text
        with pytest.raises(ValueError, match="it was damaged or edited"):
            unseal(json.loads(text.replace(old, new)))
    with pytest.raises(ValueError, match="it was damaged or edited"):
        unseal(content)
