"""Loading a causal language model with its tokenizer, LoRA adapters, and what engines need to know about it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polopt.errors import CallError, PoloptError

ASSETS = Path(__file__).parents[2] / "assets"
TINY = ASSETS / "tiny"
#: Models that come with the library, by name.
SHIPPED = ("tiny", "tiny-chain", "tiny-countdown", "tiny-spell")


@dataclass
class Backbone:
    """A causal language model (perhaps with adapters) and its tokenizer."""

    module: nn.Module  # what is trained: the transformers model, or PEFT's wrapper of it
    tokenizer: Any
    lora: bool = False

    @property
    def causal(self) -> Any:
        """The transformers `...ForCausalLM` itself."""
        return self.module.get_base_model() if self.lora else self.module  # type: ignore[operator]

    @property
    def decoder(self) -> Any:
        """The model below its output layer."""
        causal = self.causal
        return getattr(causal, causal.base_model_prefix)

    @property
    def config(self) -> Any:
        """The text part of the model's configuration."""
        return self.causal.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        return int(self.causal.get_output_embeddings().weight.shape[0])

    @property
    def context(self) -> int | None:
        """Most positions that the model was made for."""
        found = getattr(self.config, "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def pad(self) -> int:
        """The id that fills prompts and completions up; masked everywhere, so any valid id serves."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else (self.ends[0] if self.ends else 0)

    @property
    def ends(self) -> tuple[int, ...]:
        """Token ids that end a completion, as tokenizer and generation settings say."""
        found: list[int] = []
        settings = getattr(self.causal, "generation_config", None)
        for ids in (self.tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)):
            found += [] if ids is None else list(ids) if isinstance(ids, Sequence) else [ids]
        return tuple(dict.fromkeys(int(i) for i in found))

    @property
    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the output layer; None where adapters, scales or caps act on it."""
        layer, config = self.causal.get_output_embeddings(), self.config
        changes = ("logits_scaling", "logit_scale", "final_logit_softcapping")
        plain = type(layer) is nn.Linear and not any(getattr(config, name, None) for name in changes)
        return (layer.weight, layer.bias) if plain else None

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Output layer, with the scaling and soft cap that some architectures put on it."""
        out = self.causal.get_output_embeddings()(hidden)
        config = self.config
        if scale := getattr(config, "logits_scaling", None):  # Granite
            out = out / scale
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            out = out * scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            out = torch.tanh(out / cap) * cap
        return out  # type: ignore[no-any-return]


def resolve(model: str) -> str:
    """The folder or id that `model` names; raises `CallError` for a folder that does not exist."""
    if model in SHIPPED:
        return str(ASSETS / model)
    looks_local = model.startswith((".", "/", "~")) or Path(model).expanduser().exists()
    if not looks_local:
        if not model or model.count("/") > 1 or any(c.isspace() for c in model):
            known = f"an id such as Qwen/Qwen2.5-0.5B, nor one of {', '.join(SHIPPED)}"
            raise CallError(f"policy.model = {model!r} is neither a folder nor {known}")
        return model
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise CallError(
            f"policy.model = {model!r}: there is no {folder / 'config.json'}; expected a folder in the Hugging Face format"
        )
    return str(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without messages and progress bars: polopt shows its own progress."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_backbone(
    model: str, *, device: torch.device | str = "cpu", lora: int = 0, lora_alpha: float = 16.0, seed: int = 0
) -> Backbone:
    """Load model and tokenizer in float32, in evaluation mode; with `lora` > 0 only adapters of that rank are trainable."""
    place = resolve(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            causal: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    except (OSError, ValueError) as error:
        raise PoloptError(f"policy.model = {model!r} could not be loaded: {str(error).splitlines()[0]}") from error
    return wrap(causal.to(torch.device(device)), tokenizer, lora=lora, lora_alpha=lora_alpha, seed=seed)


def wrap(causal: Any, tokenizer: Any, *, lora: int = 0, lora_alpha: float = 16.0, seed: int = 0) -> Backbone:
    """A `Backbone` of a loaded model: dropout off, embedding gradients of PAD kept, adapters added."""
    causal.eval()
    embedding = causal.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None  # it would silence the gradient of every sampled PAD token (often the same id as EOS)
    if not lora:
        return Backbone(causal, tokenizer)
    from peft import LoraConfig, get_peft_model

    from polopt.run import seed_of

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "lora"))
        config = LoraConfig(
            r=lora, lora_alpha=cast(int, lora_alpha), lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        module = get_peft_model(causal, config)
    module.eval()
    return Backbone(module, tokenizer, lora=True)
