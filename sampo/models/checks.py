"""Checks of a model, its tokenizer and its tokens before training.

Each function returns sentences, one per issue. Nothing is changed, and no weights are loaded.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.chat import LIMIT, time_limit
from ..data.token_ids import ID_COLUMNS
from ..io.schemas import parse_json, typed

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, sorted; `training_args.bin`, for example, is none."""
    return sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})


def find_model_folder_issues(
    name: str, *, trust_remote_code: bool = False, option: str = "model_name_or_path", tokenizer: bool = True
) -> list[str]:
    """Check a local folder: configuration, tokenizer, and the headers of the weights. A hub id gives no issues.

    Args:
        name: What the user gave.
        trust_remote_code: Whether the folder may bring code of its own.
        option: By which it was given.
        tokenizer: Whether one must be there.
    """
    folder = Path(name).expanduser()

    def issue(what: str) -> str:
        return _not_a_model(name, option, what)

    if issues := find_path_issues(name, option=option):
        return issues
    if not folder.is_dir():
        return []
    issues = [issue(what) for what in _find_json_issues(folder)]
    weights = weight_files(folder)
    if not weights:
        issues.append(issue(f"it holds no weights ({', '.join(_WEIGHTS)}). Save the model there again."))
    for path in weights:
        if path.suffix == ".safetensors" and (damage := _find_safetensors_issue(path)):
            issues.append(issue(f"{path.name} is damaged: {damage}. Fetch or save it again."))
    if issues or any(path.suffix == ".gguf" for path in weights):
        return issues
    return [issue(what) for what in _find_config_issues(folder, trust_remote_code, tokenizer)]


def find_path_issues(name: str, *, option: str = "model_name_or_path") -> list[str]:
    """Check a name that looks like a path: the folder is missing, or only its sub-folders hold models."""
    folder = Path(name).expanduser()
    if not folder.exists() and not _is_path(name):
        return []
    if not folder.exists():
        what = f"there is no such folder.{_near(folder)} Check the spelling."
    elif not folder.is_dir():
        what = "it is a file. Name the folder that holds the model."
    elif inside := _models_inside(folder):
        what = f"it holds no model itself; {', '.join(inside)} below it {_do(inside)}. Name {_one(inside)}."
    else:
        return []
    return [_not_a_model(name, option, what)]


def _not_a_model(name: str, option: str, what: str) -> str:
    return f"`{option}` must be a folder with a model, or a model id on the hub, got {name!r}, and {what}"


def _is_path(name: str) -> bool:
    """Whether a name cannot be a model id: by its form, or because its first part is a local folder."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return True
    first, slash, _ = name.partition("/")
    return bool(slash) and Path(first).is_dir()


def _near(folder: Path) -> str:
    """Suggest the neighbouring folder with the nearest name."""
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, beside, n=1)
    return f" Did you mean {str(folder.parent / close[0])!r}?" if close else ""


def _models_inside(folder: Path) -> list[str]:
    """Names of the sub-folders with a model or an adapter, of a folder that holds none itself."""
    marks = ("config.json", "adapter_config.json")
    if any((folder / mark).is_file() for mark in marks) or any(folder.glob("*.gguf")):
        return []
    inside = [path for path in folder.iterdir() if any((path / mark).is_file() for mark in marks)]
    by_number = sorted(inside, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)] or [-1])
    return [path.name for path in by_number][-5:]


def _do(names: list[str]) -> str:
    return "does" if len(names) == 1 else "do"


def _one(names: list[str]) -> str:
    return "that one" if len(names) == 1 else "one of them"


@dataclass(frozen=True)
class ModelKind:
    """What is read of a model's configuration."""

    model_type: str | None = None
    auto_map: dict[str, Any] | None = None


@dataclass(frozen=True)
class WeightIndex:
    """What is read of an index of weights in several files: the file of each tensor."""

    weight_map: dict[str, str] = field(default_factory=dict)


def _find_json_issues(folder: Path) -> list[str]:
    issues = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = parse_json(path.read_bytes())
            if path.name == "config.json":
                typed(ModelKind, content, ignore_unknown=True)
            if path.name.endswith(".index.json"):
                shards = set(typed(WeightIndex, content, ignore_unknown=True).weight_map.values())
                if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
                    issues.append(f"{missing} of {path.name} are missing. Fetch or save them again.")
        except (OSError, ValueError) as error:
            issues.append(f"{path.name} is not as it must be: {error}. Fetch or save it again.")
    return issues


def _find_config_issues(folder: Path, trust_remote_code: bool, tokenizer: bool) -> list[str]:
    """Check that there is a configuration of a known model type without custom code, and a tokenizer."""
    from transformers import CONFIG_MAPPING

    if (folder / "adapter_config.json").is_file():
        return []
    if not (folder / "config.json").is_file():
        return ["it has no config.json. Save model and tokenizer there with `save_pretrained`."]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    issues = []
    if "auto_map" in config and kind not in CONFIG_MAPPING and not trust_remote_code:
        issues.append("it contains custom code. Read that code, and set `trust_remote_code: true` if it may run.")
    elif kind not in CONFIG_MAPPING and not trust_remote_code:
        issues.append(
            f"its `model_type` is {kind!r}, which this version of transformers does not know. Check config.json, or "
            "use a newer transformers."
        )
    if tokenizer and not any([*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("*.model")]):
        issues.append("it has no tokenizer. Save it there with `tokenizer.save_pretrained`.")
    return issues


def _find_safetensors_issue(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)


def find_tokenizer_issues(tokenizer: Any) -> list[str]:
    """Check that there is an EOS token, and that the chat template renders and contains the messages."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import SecurityError

    issues = []
    if tokenizer.eos_token_id is None:
        issues.append(
            "The tokenizer must have an end token, got none: the model would not learn where a response ends. Set "
            "`eos_token` in its tokenizer_config.json."
        )
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return issues
    texts = ["A question?", "An answer."]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    try:
        with time_limit(LIMIT):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        issues.append(f"The chat template must be valid Jinja, got at line {error.lineno}: {reason}.")
    except SecurityError as error:
        reason = str(error).rstrip(".")
        issues.append(f"The chat template must not access Python, got: {reason}. Use one from a source you trust.")
    except TimeoutError as error:
        issues.append(f"The chat template must terminate, got: {error}. Use one from a source you trust.")
    except Exception:
        pass  # a template may need other roles or contents; the data is checked later
    else:
        lost = [each for each in texts if each not in text]
        if lost:
            issues.append(
                "The chat template must contain the messages, got one that renders "
                f"{text if len(text) < 60 else text[:57] + '...'!r} from a conversation with {' and '.join(lost)!r}. "
                "If `chat_template` is meant to be a file, check its path."
            )
    return issues


def find_token_issues(
    datasets: Mapping[str, Any], *, vocabulary: int | None, tokenizer: Any, columns: Sequence[str] = ID_COLUMNS
) -> list[str]:
    """Check tokenised pairs: none left, ids outside the vocabulary of the model, two BOS tokens.

    Args:
        datasets: Name -> data set with these columns.
        vocabulary: Number of ids that the model knows, or None if that is unknown.
        tokenizer: Has made them.
        columns: Of token ids, those of the prompts first.
    """
    import pyarrow.compute as pc

    issues = []
    bos = getattr(tokenizer, "bos_token_id", None)
    largest = max((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), default=-1)
    for name, dataset in datasets.items():
        if not len(dataset):
            issues.append(
                f"The {name} data must have at least one pair after tokenisation, got none: each prompt alone fills "
                "`max_length`. Raise it."
            )
        doubled: list[int] = []
        batches = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000)
        for number, batch in enumerate(batches):
            for column in columns:
                top = pc.max(pc.list_flatten(batch.column(column))).as_py()
                largest = max(largest, -1 if top is None else top)
            doubled += [
                1000 * number + row for row, ids in enumerate(batch.column(columns[0])) if _begins_twice(ids, bos)
            ]
        if doubled:
            issues.append(
                f"A prompt must begin with one {tokenizer.bos_token}, got two in {len(doubled)} of {len(dataset)} "
                f"pairs of the {name} data, first at rows {doubled[:10]} of the tokenised set. The tokenizer adds it: "
                "remove it from the text."
            )
    if vocabulary is not None and largest >= vocabulary:
        issues.append(
            f"The tokenizer must be that of the model, got the token id {largest} ({tokenizer.decode([largest])!r}) "
            f"and a model that knows the ids below {vocabulary}. Use the model's own tokenizer, or give the model "
            "more ids with `resize_token_embeddings`."
        )
    return issues


def differing_tokens(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """Describe how another vocabulary differs from ours, ignoring tokens that only the larger one has.

    Training adds special tokens at the end, which do not change the ids of the others.
    """
    shared = ours.keys() & theirs.keys()
    differ = sorted(token for token in shared if ours[token] != theirs[token])
    only = min(len(ours), len(theirs)) - len(shared)
    if not differ and only <= 0:
        return ""
    if differ:
        first = differ[0]
        return f"{len(differ):,} tokens of other numbers, the first: {first!r} is {theirs[first]}, not {ours[first]}"
    return f"{only:,} tokens that are not in the other vocabulary"


def _begins_twice(ids: Any, bos: int | None) -> bool:
    return bos is not None and len(ids) > 1 and ids[0].as_py() == bos and ids[1].as_py() == bos


def find_vocabulary_issues(vocabulary: int | None, ref_vocabulary: int | None) -> list[str]:
    """Check that policy and reference have the same number of token ids."""
    if None in (vocabulary, ref_vocabulary) or vocabulary == ref_vocabulary:
        return []
    return [
        f"Policy and reference must have one vocabulary, got {vocabulary} and {ref_vocabulary} token ids. Choose a "
        "`ref_model` of the same family, or bring both to one size with `resize_token_embeddings`."
    ]
