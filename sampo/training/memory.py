"""Memory per GPU of a training run, computed from the shape of the model: to choose an engine by, not a measurement.

    weights + gradients + master + adam + copies + reference + activations + buffers

Each of the first five is a number of bytes for each trainable parameter (`ENGINES`), divided by the number of GPUs
where the engine spreads it. tests/training/test_memory.py compares them with the tensors of real runs, and the
activations with what autograd keeps; docs/scale.md has the table and lists what is omitted.

1. Full fine-tuning on one GPU or with DDP holds the weights in float32 and computes in bf16 by autocast, which keeps a
   bf16 copy of each weight until the end of the forward pass. ZeRO and FSDP2 compute in bf16 and keep the float32
   weights that steps of 1e-6 need: ZeRO as `master` in addition to bf16 weights, FSDP2 as the weights themselves.
2. LoRA and QLoRA hold the frozen weights in bf16 or in 4 bits. The reference is the model with the adapter switched
   off, and costs nothing.
3. Activations are those of gradient checkpointing: the input of every layer, and one recomputed layer. Log-probs
   come from TRL's fused head, which never holds the logits of all tokens.
"""

from dataclasses import dataclass
from typing import Any

MEMORY_METHODS = ("full", "lora", "qlora")
MEMORY_REFERENCES = ("live", "cached")
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # constants: 8 bits for 64 weights, 32 for 256 of these
DEEPSPEED_BUCKET = 500_000_000  # parameters; DeepSpeed's `reduce_bucket_size`
DEEPSPEED_LIVE = 1_000_000_000  # parameters; DeepSpeed's `stage3_max_live_parameters`


@dataclass(frozen=True)
class Shape:
    """What of a decoder's shape matters; the attributes are those of its configuration in transformers."""

    model: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool = False
    qkv_bias: bool = True
    head_dim: int | None = None  # where it is not hidden_size / num_attention_heads

    @property
    def q_size(self) -> int:
        """Width of the queries of all heads."""
        return (self.head_dim or self.hidden_size // self.num_attention_heads) * self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return self.q_size // self.num_attention_heads * self.num_key_value_heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Input and output width of the linear layers of one block: q, k, v, o, gate, up, down."""
        h, q, kv, i = self.hidden_size, self.q_size, self.kv_size, self.intermediate_size
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks: what QLoRA stores in 4 bits."""
        return self.num_hidden_layers * sum(a * b for a, b in self.linears)

    @property
    def block_parameters(self) -> int:
        """All parameters of one block."""
        bias = self.q_size + 2 * self.kv_size if self.qkv_bias else 0
        return sum(a * b for a, b in self.linears) + bias + 2 * self.hidden_size

    @property
    def root_parameters(self) -> int:
        """Embedding, LM head and last norm."""
        return (1 if self.tied else 2) * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.num_hidden_layers * self.block_parameters + self.root_parameters

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of LoRA matrices on every linear layer of the blocks."""
        return self.num_hidden_layers * sum(rank * (a + b) for a, b in self.linears)


SHAPES = {
    "0.5B": Shape("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151_936, tied=True),
    "1.5B": Shape("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 151_936, tied=True),
    "3B": Shape("Qwen2.5-3B", 36, 2048, 11_008, 16, 2, 151_936, tied=True),
    "7B": Shape("Qwen2.5-7B", 28, 3584, 18_944, 28, 4, 152_064),
    "8B": Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128_256, qkv_bias=False),
    "14B": Shape("Qwen2.5-14B", 48, 5120, 13_824, 40, 8, 152_064),
    "32B": Shape("Qwen2.5-32B", 64, 5120, 27_648, 40, 8, 152_064),
    "70B": Shape("Llama-3.1-70B", 80, 8192, 28_672, 64, 8, 128_256, qkv_bias=False),
}
UNEXPLAINED = 0.01  # of a model's parameters, that the formula may miss


def read_shape(model: str) -> Shape:
    """The shape of a model, from its configuration alone.

    Args:
        model: a name in `SHAPES`, a folder, a configuration file, or a model id on the hub.

    Raises:
        ValueError: there is no configuration, or the model is not a dense decoder of the kind of Llama and Qwen2.
    """
    if model in SHAPES:
        return SHAPES[model]
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
        with torch.device("meta"):  # names and shapes, no weights
            parameters = dict(transformers.AutoModelForCausalLM.from_config(config).named_parameters())
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"`model` must be one of {list(SHAPES)}, or a folder, a file or a hub id with the configuration of a "
            f"decoder, got {model!r}: {error}"
        ) from None
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in names}
    if missing := [name for name, size in sizes.items() if not isinstance(size, int)]:
        raise ValueError(f"`model` must be a decoder with {', '.join(missing)} in its configuration, got {model!r}.")
    shape = Shape(
        model,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=any(name.endswith("q_proj.bias") for name in parameters),
        head_dim=getattr(config, "head_dim", None),
        **sizes,
    )
    true = sum(parameter.numel() for parameter in parameters.values())
    if abs(shape.parameters - true) > UNEXPLAINED * true:
        raise ValueError(
            f"`model` must be a dense decoder with the layers of Llama or Qwen2, got {model!r} of type "
            f"{config.model_type} with {true:,} parameters, where the formula has {shape.parameters:,}. Measure it."
        )
    return shape


@dataclass(frozen=True)
class Engine:
    """How an engine stores what it trains; bytes for each trainable parameter.

    Attributes:
        copies: for full fine-tuning: bf16 weights of autocast, gradient buckets of DDP.
        spread: which parts are divided by the number of GPUs; `frozen` are weights under an adapter, and `reference` a
            reference model.
        on_cpu: the spread parts lie in the memory of the machine.
    """

    weights: int
    gradients: int
    master: int
    adam: int = 8  # two moments in float32
    copies: int = 0
    spread: frozenset[str] = frozenset()
    on_cpu: bool = False


_ALL = frozenset({"weights", "gradients", "master", "adam", "frozen", "reference"})
ENGINES = {
    "single": Engine(4, 4, 0, copies=2),
    "multi_gpu": Engine(4, 4, 0, copies=2 + 4),
    "zero1": Engine(2, 2, 4, spread=frozenset({"master", "adam"})),
    "zero2": Engine(2, 2, 4, spread=frozenset({"gradients", "master", "adam"})),
    "zero3": Engine(2, 2, 4, spread=_ALL),
    "zero3_offload": Engine(2, 4, 4, spread=_ALL, on_cpu=True),
    "fsdp2": Engine(4, 4, 0, spread=_ALL),
}
QLORA_ENGINES = ("single", "multi_gpu", "zero1", "zero2")  # the others cannot spread 4-bit weights as TRL loads them


def gpu_bytes(
    shape: Shape,
    engine: str,
    method: str = "full",
    *,
    reference: str = "live",
    gpus: int = 8,
    tokens: int = 4096,
    lora_r: int = 16,
) -> dict[str, float]:
    """Bytes of each part on each GPU.

    Args:
        shape: of the model.
        engine: one of `ENGINES`.
        method: one of `MEMORY_METHODS`.
        reference: `live`, a model in memory; `cached`, its log-probs were stored before.
        gpus: how many share the work.
        tokens: in one micro-batch of one GPU, padding included, chosen and rejected rows together.
        lora_r: rank of the adapter, which sits on all linear layers.

    Raises:
        ValueError: an unknown name, or QLoRA with an engine that spreads the weights.
    """
    for name, value, known in [
        ("engine", engine, tuple(ENGINES)),
        ("method", method, MEMORY_METHODS),
        ("reference", reference, MEMORY_REFERENCES),
    ]:
        if value not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}.")
    if method == "qlora" and engine not in QLORA_ENGINES:
        raise ValueError(f"`engine` must be one of {list(QLORA_ENGINES)} for `method: qlora`, got {engine!r}.")
    kind, full = ENGINES[engine], method == "full"
    gpus = 1 if engine == "single" else gpus
    trained = shape.parameters if full else shape.adapter_parameters(lora_r)
    parts: dict[str, float] = {
        name: getattr(kind, name) * trained for name in ("weights", "gradients", "master", "adam")
    }
    parts["copies"] = kind.copies * trained if full else 0
    parts["frozen"] = 0 if full else _frozen_bytes(shape, method)
    parts["reference"] = _reference_bytes(shape, engine) if full and reference == "live" else 0
    for name in kind.spread:
        parts[name] = 0 if kind.on_cpu else parts[name] / gpus
    parts["activations"] = tokens * activation_bytes(shape, float32=full and not kind.spread)
    parts["buffers"] = _buffer_bytes(shape, engine, trained, live=full and reference == "live")
    return parts


def machine_bytes(shape: Shape, method: str = "full", *, reference: str = "live", lora_r: int = 16) -> float:
    """Bytes of main memory that `zero3_offload` takes, over all machines together."""
    kind = ENGINES["zero3_offload"]
    trained = shape.parameters if method == "full" else shape.adapter_parameters(lora_r)
    total = (kind.weights + kind.gradients + kind.master + kind.adam) * trained
    if method != "full":
        return total + _frozen_bytes(shape, method)
    return total + (_reference_bytes(shape, "zero3_offload") if reference == "live" else 0)


def activation_bytes(shape: Shape, *, float32: bool = False) -> float:
    """Bytes a token with gradient checkpointing.

    Args:
        shape: of the model.
        float32: the stream between the layers is in float32, as it is where the weights are.
    """
    h, q, kv, i = shape.hidden_size, shape.q_size, shape.kv_size, shape.intermediate_size
    kept = shape.num_hidden_layers * h * (4 if float32 else 2)
    # Two norms: each computes in float32. In float32 autocast makes a copy of its result for each linear layer.
    norms = 3 * 4 * h + 5 * 2 * h if float32 else 2 * (4 + 2 + 2) * h
    attention = 2 * (q + 2 * kv) + 2 * q  # queries, keys and values; the result
    feed_forward = 2 * 4 * i  # gate, up, the activation of gate, its product with up
    return kept + norms + attention + feed_forward


def _frozen_bytes(shape: Shape, method: str) -> float:
    if method == "lora":
        return 2 * shape.parameters
    return NF4_BYTES * shape.linear_parameters + 2 * (shape.parameters - shape.linear_parameters)


def _reference_bytes(shape: Shape, engine: str) -> float:
    """A copy of the model as it was loaded; in float32 it is cast layer by layer into copies that autocast keeps."""
    return (4 + 2 if engine in ("single", "multi_gpu") else 2) * shape.parameters


def _buffer_bytes(shape: Shape, engine: str, trained: int, live: bool) -> float:
    """The bf16 values that the engines gather, or reduce, at a time."""
    bucket = 2 * min(trained, DEEPSPEED_BUCKET)
    if engine in ("zero1", "zero2"):
        return bucket
    if engine in ("zero3", "zero3_offload"):
        return bucket + 2 * min(shape.parameters, DEEPSPEED_LIVE)
    if engine == "fsdp2":  # the group in use and the next; TRL makes one group of the full reference
        return 2 * (shape.block_parameters + shape.root_parameters) + (2 * shape.parameters if live else 0)
    return 0
