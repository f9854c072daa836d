"""The same 1.05M-parameter Qwen2, tokenizer, prompts and reward for every GRPO contender."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY, PROMPTS, GROUP, NEW_TOKENS = 512, 16, 8, 48


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for c in map(chr, range(32, 127)):
        vocabulary[c] = len(vocabulary)
    while len(vocabulary) < VOCABULARY:
        vocabulary[f"<x{len(vocabulary)}>"] = len(vocabulary)
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, padding_side="left", **special)


def model() -> Qwen2ForCausalLM:
    """Four layers of width 128."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def prompts(n: int) -> list[str]:
    """Random strings of 8 to 24 characters."""
    rng = random.Random(0)
    return ["".join(rng.choice("abcdefghij0123456789+-= ") for _ in range(rng.randint(8, 24))) for _ in range(n)]


def digits(completions: list[str], **_: object) -> list[float]:
    """Share of digits in a completion."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
