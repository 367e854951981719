"""Typed reading of every file that is read back: JSON and YAML against the dataclass that describes it.

A dataclass is the schema: `typed(AnswerFile, value)` checks the types of all fields, those of nested dataclasses too,
and makes the object. For any wrong content, one `WrongFile` names the file, the field, what is expected and what was
found. Known types are those of JSON; a whole number is a float too, true and false are no numbers, and a tuple is a
list in JSON. Ranges and choices that a type cannot express belong in `__post_init__`, as a ValueError.

pydantic was tried instead: strict, it takes no list for a tuple but from JSON text, and from JSON text no half of
a surrogate pair, which answers of models do contain.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
MAX_BYTES_YAML = 2**20  # of a recipe or a judge's prompt
MAX_NODES_YAML = 100_000  # with each alias counted as what it stands for
MAX_DIGITS_YAML = 40
_NO_JSON = {f"tag:yaml.org,2002:{name}" for name in ("binary", "set", "omap", "pairs")}
_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class WrongFile(ValueError):
    """A file has wrong content; the text names the file, the field, what is expected and what was found."""


class WrongShape(ValueError):
    """A value has another type; raised by `typed`. `named` adds the file.

    Attributes:
        field: as in `rounds[1].status`; empty for the value as a whole.
    """

    def __init__(self, field: str, expected: str, got: str):
        super().__init__(f"{f'`{field}`' if field else 'it'} must be {expected}, got {got}")
        self.field = field


# --- files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path, kind: Any, advice: str = "", *, complete: bool = False, ignore_unknown: bool = False) -> Any:
    """What a JSON file holds, as an object of `kind`.

    Args:
        path: the file.
        kind: a dataclass, or a type made of JSON's own.
        advice: a sentence with what to do if the file is wrong.
        complete: as in `typed`.
        ignore_unknown: as in `typed`.

    Raises:
        WrongFile: the file is no JSON in UTF-8, or something else than `kind`.
        OSError: it cannot be read.
    """
    with named(path, advice):
        return typed(kind, parse_json(path.read_bytes()), complete=complete, ignore_unknown=ignore_unknown)


def read_yaml(path: Path, kind: Any, advice: str = "", *, ignore_unknown: bool = False) -> Any:
    """The same of a YAML file, whose aliases, size and depth are bounded."""
    with named(path, advice):
        return typed(kind, parse_yaml(path.read_bytes()), ignore_unknown=ignore_unknown)


@contextlib.contextmanager
def named(path: Path | str, advice: str = "", line: int | None = None) -> Iterator[None]:
    """Add the name of the file, and the line if there is one, to errors of values inside.

    Raises:
        WrongFile: in the place of other ValueErrors.
    """
    try:
        yield
    except WrongFile:
        raise
    except ValueError as error:
        place = f"{path}{'' if line is None else f', line {line}'}"
        end = f". {advice}." if advice else "."
        raise WrongFile(_printable(f"{place}: {str(error).removesuffix('.')}{end}")) from None


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """JSON in UTF-8, with or without a byte order mark.

    Args:
        text: the complete text.
        finite: refuse NaN and infinite numbers, which are no JSON, but which Python writes and reads.

    Raises:
        WrongShape: it is something else, nested too deep, or has a number of thousands of digits.
    """
    try:
        options: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, **options)
    except RecursionError:
        raise WrongShape("", "JSON that is not nested deeper than a few hundred levels", "deeper nesting") from None
    except ValueError as error:
        raise WrongShape("", "JSON in UTF-8", _one_line(error)) from None


def parse_yaml(text: str | bytes) -> Any:
    """YAML in UTF-8.

    Raises:
        WrongShape: it is something else, or too large, too deep, or a bomb of aliases.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Texts, numbers, true and false, null, lists and mappings. A date is the text that stands there."""

    Loader.yaml_constructors = {tag: make for tag, make in Loader.yaml_constructors.items() if tag not in _NO_JSON}
    Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)
    if len(text) > MAX_BYTES_YAML:
        raise WrongShape("", f"YAML of at most {MAX_BYTES_YAML:,} bytes", f"{len(text):,}")
    try:
        loader = Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        node = loader.get_single_node()
        if _size(node, {}) > MAX_NODES_YAML:
            raise WrongShape("", f"YAML of at most {MAX_NODES_YAML:,} values, aliases written out", "more")
        if twice := _keys_given_twice(node):
            raise WrongShape("", "YAML in which each key stands once", ", ".join(twice))
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise WrongShape("", "YAML that is not nested deeper than about a hundred levels", "deeper nesting") from None
    except WrongShape:
        raise
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise WrongShape("", "valid YAML in UTF-8", _one_line(error)) from None  # PyYAML lets several kinds through


def _size(node: Any, known: dict[int, float]) -> float:
    """Number of values below a node, aliases written out; infinite for one that holds itself."""
    import yaml

    if not isinstance(node, yaml.CollectionNode):
        if node is not None and node.tag.endswith(":int") and len(node.value) > MAX_DIGITS_YAML:
            raise WrongShape(
                "", f"YAML with whole numbers of at most {MAX_DIGITS_YAML} digits", f"{len(node.value):,}"
            )
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _keys_given_twice(node: Any) -> list[str]:
    """Keys that stand more than once in a mapping, of which YAML's loader would silently take the last."""
    import yaml

    if not isinstance(node, yaml.CollectionNode):
        return []
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, value) for value in node.value]
    lines: dict[str, list[int]] = {}
    for key, _ in pairs:
        if isinstance(key, yaml.ScalarNode):
            lines.setdefault(key.value, []).append(key.start_mark.line + 1)
    found = [f"`{key}` in lines {numbers}" for key, numbers in lines.items() if len(numbers) > 1]
    return found + [each for _, value in pairs for each in _keys_given_twice(value)]


# --- values ----------------------------------------------------------------------------------------------------------


def typed(kind: Any, value: Any, *, complete: bool = False, ignore_unknown: bool = False, field: str = "") -> Any:
    """The value as an object of `kind`.

    Args:
        kind: a dataclass, or a type made of str, int, float, bool, None, Any, Literal, list, dict, tuple, unions.
        value: what JSON or YAML gave.
        complete: fields with a default must be there too, as in files that only we write.
        ignore_unknown: leave out keys that a dataclass does not have; else they are refused.
        field: where the value stands.

    Raises:
        WrongShape: it is of another type; the first field that is wrong is named.
        ValueError: of the dataclass itself.
    """
    options = {"complete": complete, "ignore_unknown": ignore_unknown}
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, field, options)
    if origin in (Union, types.UnionType):
        return _one_of(kind, value, field, options)
    if origin in (list, Sequence) and isinstance(value, list):
        return [typed(arguments[0], each, field=f"{field}[{i}]", **options) for i, each in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        parts = zip(arguments, value, strict=True)
        return tuple(typed(of, each, field=f"{field}[{i}]", **options) for i, (of, each) in enumerate(parts))
    if origin in (dict, Mapping) and isinstance(value, dict):
        if arguments == (str, Any) and all(type(key) is str for key in value):
            return dict(value)
        keys = [typed(arguments[0], key, field=f"a key of {field}" if field else "a key") for key in value]
        each = (typed(arguments[1], one, field=_below(field, key), **options) for key, one in value.items())
        return dict(zip(keys, each, strict=True))
    if origin is Literal and value in arguments and type(value) in map(type, arguments):
        return value
    if isinstance(kind, type) and type(value) in ((int, float) if kind is float else (kind,)):
        return value
    raise WrongShape(field, expected(kind), shown(value))


def _object(kind: Any, value: Any, field: str, options: dict[str, bool]) -> Any:
    if not isinstance(value, dict):
        raise WrongShape(field, expected(kind), shown(value))
    fields = _fields(kind)
    if not options["ignore_unknown"] and not value.keys() <= fields.keys():
        unknown = [name for name in value if name not in fields]
        near = difflib.get_close_matches(str(unknown[0]), fields, n=1)
        hint = f" (did you mean `{near[0]}`?)" if near else ""
        raise WrongShape(field, f"an object without other keys than {list(fields)}", f"{unknown}{hint}")
    missing = [name for name, f in fields.items() if name not in value and (options["complete"] or not f.optional)]
    if missing:
        raise WrongShape(field, f"an object with {missing}", f"the keys {[str(key)[:40] for key in value][:20]}")
    found = {
        name: value[name]
        if type(value[name]) in f.plain
        else typed(f.kind, value[name], field=_below(field, name), **options)
        for name, f in fields.items()
        if name in value
    }
    return kind(**found)


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of a dataclass: its type, the classes of values that are right as they are, and if it has a default."""

    kind: Any
    plain: frozenset[type]
    optional: bool


@cache
def _fields(kind: Any) -> dict[str, _Field]:
    """The fields of a dataclass; kept, as files have millions of rows."""
    kinds = get_type_hints(kind)
    return {
        f.name: _Field(kinds[f.name], _plain(kinds[f.name]), _has_default(f))
        for f in dataclasses.fields(kind)
        if f.init
    }


def _plain(kind: Any) -> frozenset[type]:
    """Classes whose every value `typed` returns as it is."""
    if get_origin(kind) in (Union, types.UnionType):
        return frozenset().union(*map(_plain, get_args(kind)))
    return frozenset({int, float} if kind is float else {kind} if kind in _NAMES else ())


def _one_of(kind: Any, value: Any, field: str, options: dict[str, bool]) -> Any:
    """The value as the first member of a union that fits; else the error of the only member it could be."""
    inner: WrongShape | None = None
    for each in get_args(kind):
        try:
            return typed(each, value, field=field, **options)
        except WrongShape as error:
            inner = error if error.field != field else inner
    raise inner or WrongShape(field, expected(kind), shown(value))


def expected(kind: Any) -> str:
    """Describe a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(each) for each in arguments)
    if origin is Literal:
        return f"one of {list(arguments)}"
    if origin is tuple:
        return f"a list of {len(arguments)}"
    if origin in (list, Sequence):
        return "a list"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return "an object"
    return _NAMES.get(kind, str(kind))


def shown(value: Any) -> str:
    """A value in an error message: short, in one line."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 38 digits"
    text = ascii(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _below(field: str, key: Any) -> str:
    name = key if isinstance(key, str) and re.fullmatch(r"[\w/@.+-]{1,60}", key) else shown(key)
    return f"{field}.{name}" if field else name


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"numbers must be finite, and {text[:20]} is not")
    return float(text)


def _printable(text: str) -> str:
    """Without control characters and halves of surrogate pairs, which a terminal must not get."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace('"<unicode string>", ', "").split())[:200] or type(error).__name__
