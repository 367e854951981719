"""What `sampo init` chooses from an audit and the shape of a model, and the text of its recipe. No file is read."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ..audit.advice import advise
from ..audit.report import bias_sentences, format_value
from ..io.tables import clean
from .option_checks import HELD_OUT

if TYPE_CHECKING:
    from ..audit.bias import LengthBias
    from ..training.memory import Shape

COVERED = 0.99  # share of the pairs that `max_length` does not cut
ROUNDED_TO = 128  # tokens
USABLE = 0.85  # share of a GPU's memory: the computation omits CUDA, NCCL and fragmentation
MAX_BATCH = 16
STEPS_PER_EPOCH = 50  # at least, where there are enough pairs
ENGINES_OF = {
    "lora": ("multi_gpu", "zero3"),
    "full": ("multi_gpu", "zero2", "zero3"),
}  # on several GPUs, simplest first


@dataclass(frozen=True)
class RecipeLine:
    """One option of a recipe, with the remark behind it."""

    name: str
    value: Any
    remark: str = ""


@dataclass(frozen=True)
class Sizes:
    """How an optimiser step is divided.

    Attributes:
        engine: one of `sampo.training.memory.ENGINES`.
        batch: pairs of one micro-batch on one device.
        accumulation: micro-batches per step.
        gigabytes: computed memory per GPU; None where it cannot be computed.
        fits: whether that is less than the usable part of the memory.
    """

    engine: str
    batch: int
    accumulation: int
    gigabytes: float | None = None
    fits: bool = True


REMARKS = {
    "sampo": "downsamples, but only",
    "rejected": "rejected responses, and only if these have more tokens in total:",
    "dataset": "then chosen and rejected responses select equally many tokens over the data set",
    "learned": "absorbs the length bias of the pairs in one parameter, so that the policy need not learn it",
    True: "zero length pressure at the start",
    "all": "plain DPO: all tokens count",
}


def choose_method(bias: "LengthBias", *, unit: str) -> tuple[list[RecipeLine], list[str]]:
    """The options that the audit advises, and the sentences that give the reasons.

    Args:
        bias: of the training pairs.
        unit: of its lengths.
    """
    advice = advise(bias, unit=unit)
    accuracy = format_value(float(bias.longer.value or 0) + float(bias.equal.value or 0) / 2, "%")
    reasons = [
        *bias_sentences(bias, unit),
        f"The longer response is the chosen one in {accuracy} of the pairs (equal lengths count half).",
        f"{advice.name}, because {advice.reason}.",
    ]
    if advice.options["token_weighting"] == "sampo" and "balance_end_token" not in advice.options:
        reasons.append("`balance_end_token` is omitted, because no response has an end token.")
    return [RecipeLine(name, value, REMARKS[value]) for name, value in advice.options.items()], reasons


def choose_splits(names: Sequence[str]) -> tuple[str, str | None]:
    """The split to train on and the one to evaluate on, if there is one.

    Raises:
        ValueError: all splits are held-out data by their names.
    """
    usable = [name for name in names if not HELD_OUT & set(re.split(r"[^a-z]+", name.lower()))]
    if not usable:
        raise ValueError(f"`data` must have a split to train on, got {list(names)}.")
    train = min(usable, key=lambda name: (name != "train", "train" not in name, "pref" not in name))
    tests = [train.replace("train", word) for word in ("test", "validation", "eval", "dev")]
    return train, next((name for name in tests if name in names and name != train), None)


def choose_max_length(rows: np.ndarray, limit: int | None) -> tuple[int, int]:
    """`max_length`, and how many pairs are longer.

    Args:
        rows: `(n,)` tokens of the prompt and the longer response of each pair.
        limit: positions of the model; None if unknown.
    """
    covering = int(np.quantile(rows, COVERED, method="inverted_cdf"))
    length = -(-covering // ROUNDED_TO) * ROUNDED_TO
    length = length if limit is None else min(length, limit)
    return length, int((rows > length).sum())


def choose_step(pairs: int) -> int:
    """Pairs per optimiser step: a power of two from 4 to 128 that leaves `STEPS_PER_EPOCH` steps."""
    step = 128
    while step > 4 and step * STEPS_PER_EPOCH > pairs:
        step //= 2
    return step


def choose_sizes(
    shape: "Shape | None", training: str, *, gpus: int, gpu_memory: float | None, max_length: int, pairs: int
) -> Sizes:
    """The first engine in which a pair fits, and the largest micro-batch that fits there.

    Args:
        shape: of the model; None if it cannot be read.
        training: `lora` or `full`.
        gpus: number of GPUs; 0 for the CPU.
        gpu_memory: bytes of each; None if unknown.
        max_length: tokens of prompt and response.
        pairs: to train on.
    """
    from ..training.memory import gpu_bytes

    step, devices = choose_step(pairs), max(gpus, 1)
    engines = ("single",) if gpus < 2 else ENGINES_OF[training]
    largest = min(MAX_BATCH, max(step // devices, 1))
    if shape is None or gpu_memory is None:
        batch = min(largest, 2)
        return Sizes(engines[0], batch, -(-step // (batch * devices)))
    batches = [2**power for power in range(largest.bit_length() - 1, -1, -1)]
    for engine, batch in ((engine, batch) for engine in engines for batch in batches):
        parts = gpu_bytes(shape, engine, training, gpus=devices, tokens=2 * batch * max_length)
        gigabytes = sum(parts.values()) / 1e9
        if fits := gigabytes * 1e9 <= USABLE * gpu_memory:
            break
    return Sizes(engine, batch, -(-step // (batch * devices)), gigabytes, fits)


def choose_learning_rate(shape: "Shape | None", training: str) -> float:
    """As in the packaged recipes: by the size of the model, ten times as much for LoRA."""
    parameters = 1e9 if shape is None else shape.parameters
    rate = 5e-6 if parameters < 0.3e9 else 1e-6 if parameters < 3e9 else 5e-7
    return 10 * rate if training == "lora" else rate


def model_lines(model: str, training: str, engine: str, *, gpus: int) -> list[RecipeLine]:
    """Model, number format and adapter."""
    lines = [RecipeLine("model_name_or_path", model)]
    if training == "lora":
        dtype = "float32" if gpus == 0 else "bfloat16"
        return [
            *lines,
            RecipeLine("dtype", dtype, "the frozen weights; the adapter is in float32"),
            RecipeLine("use_peft", True, "the reference is the model with the adapter switched off"),
            RecipeLine("lora_r", 16),
            RecipeLine("lora_alpha", 32),
            RecipeLine("lora_dropout", 0.0, "dropout would add noise between policy and reference"),
            RecipeLine(
                "lora_target_modules", "all-linear", "all linear layers, not only those that PEFT selects by default"
            ),
        ]
    if engine.startswith("zero"):
        return [*lines, RecipeLine("dtype", "bfloat16", "ZeRO keeps float32 master weights; without ZeRO set float32")]
    return [*lines, RecipeLine("dtype", "float32", "pure bfloat16 would round steps of this size away")]


def evaluation_lines(test_split: str | None, pairs: int, batch: int) -> list[RecipeLine]:
    """How often to evaluate and to save; too few pairs are not divided."""
    saves = [
        RecipeLine("save_steps", 0.25, "fraction of all steps"),
        RecipeLine("save_total_limit", 2, "the last two checkpoints"),
    ]
    if test_split is None and pairs < 200:
        return [RecipeLine("eval_strategy", "no", f"{pairs} pairs are too few to hold some out"), *saves]
    return [
        RecipeLine("eval_strategy", "steps", "reports accuracy separately for chosen-longer and chosen-shorter pairs"),
        RecipeLine("eval_steps", 0.25, "four times per run"),
        RecipeLine("per_device_eval_batch_size", batch, "as in training"),
        *saves,
    ]


def held_out_lines(train_split: str, test_split: str | None, pairs: int) -> list[RecipeLine]:
    """Which pairs are trained on, and which are held out."""
    if test_split is not None:
        return [RecipeLine("dataset_train_split", train_split), RecipeLine("dataset_test_split", test_split)]
    lines = [] if train_split == "train" else [RecipeLine("dataset_train_split", train_split)]
    if pairs >= 200:
        fraction = 0.1 if pairs < 2000 else 0.05
        lines.append(RecipeLine("eval_fraction", fraction, "held out by prompt, since there is no test split"))
    return lines


def write_recipe(title: str, notes: Mapping[str, Sequence[str]], groups: Sequence[Sequence[RecipeLine]]) -> str:
    """The text of a recipe: a header of notes, then groups of options with their remarks."""
    lines = [f"# {clean(title)}", "#"]
    for name, sentences in notes.items():
        text = textwrap.wrap(clean(" ".join(sentences)), 100, break_long_words=False, break_on_hyphens=False)
        lines += [f"# {f'{name}:' if i == 0 else '':<11} {part}" for i, part in enumerate(text)]
    for group in groups:
        lines += ["", *(f"{line.name}: {_scalar(line)}" for line in group)]
    return "\n".join(lines) + "\n"


def _scalar(line: RecipeLine) -> str:
    number = isinstance(line.value, float) and 0 < line.value < 1e-3
    text = (
        f"{line.value:.1e}".replace("e-0", "e-")
        if number
        else yaml.safe_dump(line.value, default_flow_style=True, width=10_000)
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return f"{text}  # {line.remark}" if line.remark else text
