"""A model by its name, loaded only when needed: the key of its log-probs is often known from its files."""

import argparse
import gc
from pathlib import Path
from typing import Any


class LazyModel:
    """A model that is loaded when it is needed.

    Attributes:
        name: folder or hub id, of a model or an adapter.
        base: what an adapter sits on; the name itself otherwise.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        from ..models.load import base_of, has_adapter

        self.name, self._args = name, args
        self._model: Any = None
        self.adapter = has_adapter(name)
        self.base, self._revision = base_of(name) if self.adapter else (name, None)
        # as `sampo train` loads a model: the reference cache has these settings in its key
        self._settings = {
            "revision": self._revision or "main",
            "trust_remote_code": args.trust_remote_code,
            "attn_implementation": None,
            "dtype": args.dtype,
        }

    @property
    def arithmetic(self) -> str:
        """What autocast changes the arithmetic to."""
        return "bf16" if self._args.bf16 else "no"

    def load(self) -> Any:
        """The model, in evaluation mode."""
        from ..models.load import add_adapter, create_model, refuse_weights_not_finite

        if self._model is None:
            model = create_model(self.base, **self._settings)
            self._model = (add_adapter(model, self.name) if self.adapter else model).eval()
            refuse_weights_not_finite(self._model.named_parameters(), self.name)
        return self._model

    def free(self) -> None:
        """Release its memory."""
        self._model = None
        gc.collect()  # the fused head's forward and the model hold each other

    def file_identity(self) -> dict[str, Any] | None:
        """The fields of the key that its log-probs depend on, from its files alone; None if they are not enough."""
        from ..reference_cache.key import identity_of_files

        return None if self.adapter else identity_of_files(self.name, self._settings, self.arithmetic)

    def identity(self) -> dict[str, Any]:
        """The same from the loaded model."""
        from ..reference_cache.key import identity_of_model

        return identity_of_model(self.load(), self.arithmetic, adapter="default")

    def scorer(self) -> Any:
        """A scorer of tokens with this model."""
        from ..scoring.scorer import ModelScorer

        return ModelScorer(self.load(), pair_stream=self._args.pair_stream, bf16=self._args.bf16)

    def tokenizer(self) -> Any:
        """Its own, or that of its base; with the template that was asked for."""
        from ..models.load import load_tokenizer

        found = load_tokenizer(self.name, trust_remote_code=self._args.trust_remote_code)
        template = self._args.chat_template
        if template is not None:
            path = Path(template)
            found.chat_template = (
                path.read_text(encoding="utf-8") if len(template) < 256 and path.is_file() else template
            )
        return found

    def config(self) -> Any:
        """Of the base."""
        from transformers import AutoConfig

        options = {"revision": self._settings["revision"], "trust_remote_code": self._args.trust_remote_code}
        return AutoConfig.from_pretrained(self.base, **options).get_text_config()

    def generation_config(self) -> Any:
        """Of the base, as transformers makes it where there is no file."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.base, revision=self._settings["revision"])
        except OSError:
            return GenerationConfig.from_model_config(self.config())
