"""Tiny random language models for tests."""

from __future__ import annotations

from typing import Any

import torch

from polopt.policies.lm import Backbone, LMPolicy, wrap

KINDS = ("qwen2", "llama", "qwen3", "mistral")
EOS, PAD = 1, 0


def tokenizer(vocabulary: int = 24) -> Any:
    """<pad>, <eos>, then letters: one token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789"][:vocabulary]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def causal(kind: str = "qwen2", vocabulary: int = 24, seed: int = 0, scale: float = 1.0, **changes: Any) -> Any:
    """A model of two layers and width 32 whose logits are spread out by `scale`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": PAD,
        "eos_token_id": EOS, "bos_token_id": None, **changes,
    }  # fmt: skip
    if kind == "qwen3":
        settings["head_dim"] = 8
    if kind == "gpt2":
        settings = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": EOS}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.15 * scale)
    return model


def backbone(kind: str = "qwen2", *, lora: int = 0, **changes: Any) -> Backbone:
    """A wrapped random model."""
    model = causal(kind, **changes)
    return wrap(model, tokenizer(changes.get("vocabulary", 24)), lora=lora)


def policy(kind: str = "qwen2", *, lora: int = 0, model: dict[str, Any] | None = None, **settings: Any) -> LMPolicy:
    """A random policy."""
    return LMPolicy(backbone(kind, lora=lora, **(model or {})), max_new_tokens=settings.pop("max_new_tokens", 6), **settings)
