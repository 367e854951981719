"""What can be known to be wrong with a model, its tokenizer and its tokens before anything is trained.

Each function returns sentences, one a fault; nothing is changed, and no weights are loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .chat import LIMIT, time_limit

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")


def faults_of_model_folder(
    name: str, *, trust_remote_code: bool = False, option: str = "model_name_or_path"
) -> list[str]:
    """Of a local folder: its configuration, its tokenizer, and its weights, by their headers. A hub id has none here.

    Args:
        name: What the user gave.
        trust_remote_code: Whether the folder may bring code of its own.
        option: By which it was given.
    """
    folder = Path(name).expanduser()

    def fault(what: str) -> str:
        return f"`{option}` must be a folder with a model, or a model id on the hub, got {name!r}, and {what}"

    if not folder.exists():
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        return [fault("there is no such folder. Check the spelling.")] if looks_like_path else []
    if not folder.is_dir():
        return [fault("it is a file. Name the folder that holds the model.")]
    faults = [fault(what) for what in _faults_of_json(folder)]
    weights = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    if not weights:
        faults.append(fault(f"it holds no weights ({', '.join(_WEIGHTS)}). Save the model there again."))
    for path in weights:
        if path.suffix == ".safetensors" and (damage := _fault_of_safetensors(path)):
            faults.append(fault(f"{path.name} is damaged: {damage}. Fetch or save it again."))
    if faults or any(path.suffix == ".gguf" for path in weights):
        return faults
    return [fault(what) for what in _faults_of_kind(folder, trust_remote_code)]


def _faults_of_json(folder: Path) -> list[str]:
    faults = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            faults.append(f"{path.name} is no valid JSON: {error}. Fetch or save it again.")
            continue
        lists = isinstance(content, dict) and path.name.endswith(".index.json")
        shards = set(content.get("weight_map", {}).values()) if lists else set()
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            faults.append(f"{missing} of {path.name} are missing. Fetch or save them again.")
    return faults


def _faults_of_kind(folder: Path, trust_remote_code: bool) -> list[str]:
    """No configuration, a model that brings its own code or that nobody knows, no tokenizer."""
    from transformers import CONFIG_MAPPING

    if (folder / "adapter_config.json").is_file():
        return []
    if not (folder / "config.json").is_file():
        return ["it has no config.json. Save model and tokenizer there with `save_pretrained`."]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    faults = []
    if "auto_map" in config and kind not in CONFIG_MAPPING and not trust_remote_code:
        faults.append("it brings code of its own. Read that code, and set `trust_remote_code: true` if it may run.")
    elif kind not in CONFIG_MAPPING and not trust_remote_code:
        faults.append(
            f"its `model_type` is {kind!r}, which this version of transformers does not know. Check config.json, or "
            "use a newer transformers."
        )
    if not any([*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("*.model")]):
        faults.append("it has no tokenizer. Save it there with `tokenizer.save_pretrained`.")
    return faults


def _fault_of_safetensors(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)


def faults_of_tokenizer(tokenizer: Any) -> list[str]:
    """No end token; a chat template that cannot be read or does not show what is said."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import SecurityError

    faults = []
    if tokenizer.eos_token_id is None:
        faults.append(
            "The tokenizer must have an end token, got none: responses would have no end to learn. Set `eos_token` in "
            "its tokenizer_config.json."
        )
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return faults
    said = ["A question?", "An answer."]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    try:
        with time_limit(LIMIT):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        faults.append(f"The chat template must be valid Jinja, got at line {error.lineno}: {reason}.")
    except SecurityError as error:
        reason = str(error).rstrip(".")
        faults.append(f"The chat template must not reach for Python, got: {reason}. Use one from a source you trust.")
    except TimeoutError as error:
        faults.append(f"The chat template must come to an end, got: {error}. Use one from a source you trust.")
    except Exception:
        pass  # for other roles or contents, or whatever a template can raise; the data will tell
    else:
        lost = [each for each in said if each not in text]
        if lost:
            faults.append(
                "The chat template must show what is said, got one that makes "
                f"{text if len(text) < 60 else text[:57] + '...'!r} of a conversation with {' and '.join(lost)!r}. "
                "If `chat_template` is meant to be a file, check its path."
            )
    return faults


def faults_of_tokens(datasets: Mapping[str, Any], *, vocabulary: int | None, tokenizer: Any) -> list[str]:
    """Of tokenised pairs: none left, ids that the model does not know, two begin tokens.

    Args:
        datasets: Name -> data set with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        vocabulary: Number of ids that the model knows, or None if that is unknown.
        tokenizer: Has made them.
    """
    import pyarrow.compute as pc

    faults = []
    bos = getattr(tokenizer, "bos_token_id", None)
    largest = max((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), default=-1)
    for name, dataset in datasets.items():
        if not len(dataset):
            faults.append(
                f"The {name} data must have at least one pair after tokenisation, got none: each prompt alone fills "
                "`max_length`. Raise it."
            )
        doubled: list[int] = []
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        for number, batch in enumerate(dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000)):
            for column in columns:
                top = pc.max(pc.list_flatten(batch.column(column))).as_py()
                largest = max(largest, -1 if top is None else top)
            doubled += [
                1000 * number + row for row, ids in enumerate(batch.column("prompt_ids")) if _begins_twice(ids, bos)
            ]
        if doubled:
            faults.append(
                f"A prompt must begin with one {tokenizer.bos_token}, got two in {len(doubled)} of {len(dataset)} "
                f"pairs of the {name} data, first at rows {doubled[:10]} of the tokenised set. The tokenizer adds it: "
                "take it out of the text."
            )
    if vocabulary is not None and largest >= vocabulary:
        faults.append(
            f"The tokenizer must be that of the model, got the token id {largest} ({tokenizer.decode([largest])!r}) "
            f"and a model that knows the ids below {vocabulary}. Use the model's own tokenizer, or give the model "
            "more ids with `resize_token_embeddings`."
        )
    return faults


def _begins_twice(ids: Any, bos: int | None) -> bool:
    return bos is not None and len(ids) > 1 and ids[0].as_py() == bos and ids[1].as_py() == bos


def faults_of_reference(vocabulary: int | None, ref_vocabulary: int | None) -> list[str]:
    """Policy and reference must give probabilities to the same tokens."""
    if None in (vocabulary, ref_vocabulary) or vocabulary == ref_vocabulary:
        return []
    return [
        f"Policy and reference must have one vocabulary, got {vocabulary} and {ref_vocabulary} token ids. Choose a "
        "`ref_model` of the same family, or bring both to one size with `resize_token_embeddings`."
    ]
