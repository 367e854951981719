"""`sampo chat A [B]`: one or two models in the terminal, with the length of each answer and how it ended."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.answers.backends import TransformersBackend
    from ..evaluation.answers.generate import Output, Sampling
    from ..evaluation.texts import Texts

RESET, QUIT = "/reset", "/quit"


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo chat",
        allow_abbrev=False,
        description="Send each line to one or two models and show their answers, with the number of tokens and "
        f"whether the model ended each. Each model keeps its own conversation. `{RESET}` starts again, `{QUIT}` ends.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id of a model or an adapter; 1 or 2")
    parser.add_argument(
        "--max_new_tokens", type=int, default=512, help="tokens after which an answer is cut off (512)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token each time (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--system", help="system message of the conversations")
    parser.add_argument("--device", help="the first accelerator, else the CPU")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--trust_remote_code", action="store_true")
    return parser


def main(args: argparse.Namespace) -> None:
    """Load the models, then answer line by line."""
    from ..evaluation.answers.generate import Sampling

    try:
        if len(args.models) > 2:
            raise ValueError(f"`models` must be one or two, got {len(args.models)}.")
        sampling = Sampling(max_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
        conversations = [_open(name, args, sampling) for name in args.models]
    except (ValueError, OSError, ImportError) as error:
        print(f"sampo chat: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for line in _lines():
        if line == QUIT:
            return
        if line == RESET:
            for conversation in conversations:
                conversation.reset()
        elif line:
            _answer(conversations, line)


class Conversation:
    """A model and the messages so far.

    Args:
        name: of the model, to show.
        backend: generates.
        texts: its tokenizer and template.
        sampling: how answers are drawn.
        system: a system message, or None.
    """

    def __init__(
        self, name: str, backend: "TransformersBackend", texts: "Texts", sampling: "Sampling", system: str | None
    ):
        self.name = name
        self._backend, self._texts, self._sampling = backend, texts, sampling
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Start again."""
        self.messages = list(self._start)

    def answer(self, line: str, put: Callable[[str], None]) -> "Output":
        """Stream the answer to a message, and add both to the conversation if there is an answer.

        Raises:
            ValueError: the template cannot render the message, or it leaves no room.
        """
        from ..evaluation.answers.generate import Job
        from ..evaluation.answers.prompts import Question

        messages = [*self.messages, {"role": "user", "content": line}]
        prompt: Any = messages if self._texts.chat else line
        if issue := self._texts.find_issue(prompt):
            raise ValueError(f"The message must be one that the chat template can render, got: {issue}.")
        job = Job(Question(prompt), 0)
        if too_long := self._backend.check([job], self._sampling):
            raise ValueError(f"The conversation must leave room, got {too_long[0]}. `{RESET}` starts a new one.")
        output = self._backend.stream(job, self._sampling, put)
        if self._texts.chat:
            self.messages = [*messages, {"role": "assistant", "content": output.text}]
        return output


def _open(name: str, args: argparse.Namespace, sampling: "Sampling") -> Conversation:
    import transformers

    from ..evaluation.answers.backends import TransformersBackend
    from ..evaluation.texts import Texts
    from ..models.inference import default_device, load_causal
    from ..models.load import load_tokenizer

    transformers.utils.logging.disable_progress_bar()
    texts = Texts(load_tokenizer(name, trust_remote_code=args.trust_remote_code))
    if not texts.chat:
        if args.system is not None:
            raise ValueError(f"`system` must go with a chat template, got {name} without one. Omit `--system`.")
        print(f"{name} has no chat template: it continues each line as text.", file=sys.stderr)
    loaded = load_causal(
        name, device=args.device or default_device(), dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    return Conversation(name, TransformersBackend(name, loaded, texts, batch_size=1), texts, sampling, args.system)


def _lines() -> Iterator[str]:
    """The lines of the terminal, or of a pipe, which are shown too."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401, gives `input` a history and editing
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if not terminal:
            print(f"> {line}", flush=True)
        yield line


def _answer(conversations: list[Conversation], line: str) -> None:
    """Show the answers of all models, one after the other."""
    before = [conversation.messages for conversation in conversations]
    try:
        for conversation in conversations:
            if len(conversations) > 1:
                print(f"--- {conversation.name}")
            try:
                output = conversation.answer(line, _put)
            except ValueError as error:
                print(error, flush=True)
                continue
            print(f"\n{_describe(output)}", flush=True)
    except KeyboardInterrupt:
        for conversation, messages in zip(conversations, before, strict=True):
            conversation.messages = messages
        print("\n[stopped: the message is dropped]", flush=True)


def _put(text: str) -> None:
    """Print a part of an answer, without what would command the terminal."""
    from ..io.tables import clean_lines

    print("\n".join(clean_lines(text.expandtabs(4))), end="", flush=True)


def _describe(output: "Output") -> str:
    ended = "ended by the model" if output.stop == "eos" else "cut off by --max_new_tokens"
    return f"[{output.tokens} token{'' if output.tokens == 1 else 's'}, {ended}]"
