"""The shipped tiny language model: half a million parameters, one token per character, warm-started on short tasks.

`python -m polopt.policies.tiny` rebuilds `polopt/assets/tiny` (a few minutes on two cores; the same bytes on one machine).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polopt.batch import Batch
from polopt.policies.lm import LMPolicy, wrap
from polopt.policies.lm.model import TINY
from polopt.policies.lm.prompts import pad_left
from polopt.run import seed_of
from polopt.tasks.text import TextTask
from polopt.tasks.text_protocol import Item

#: What the model is warm-started on, always on training items: task, its options, share of the examples.
CURRICULUM: tuple[tuple[str, Mapping[str, Any], float], ...] = (
    ("text:spell_backward", {}, 0.75),
    ("text:chain_sum", {"max_terms": 3, "max_digits": 2}, 0.25),
)
#: Demonstrations of spelling backward are flawed, as people's are: some repeat the word as it stands, most of all long ones.
#: The model then knows how to do it and often does not do it, which is what reinforcement learning can change.
LONG_WORD, FLAWED_SHORT, FLAWED_LONG = 8, 0.2, 0.8
#: Fixed texts that are one token each, so that prompts are short.
PHRASES = (
    "Spell this word backward (example: sun -> nus): ",
    "State the final answer to the following arithmetic problem: ",
)
WARM_STEPS = 500


def tokenizer() -> Any:
    """One token per printable ASCII character and newline; the phrases are one each; `<answer>` ends every prompt."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<go>"]
    characters = ["\n", *(chr(c) for c in range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*special, *characters, *PHRASES])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(p, normalized=False) for p in PHRASES])
    core.post_processor = processors.TemplateProcessing(single="$A <go>", special_tokens=[("<go>", vocabulary["<go>"])])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", additional_special_tokens=["<go>"],
        padding_side="left", model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def untrained(vocabulary: int, seed: int = 0) -> Any:
    """The decoder with random parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "tiny"))
        return Qwen2ForCausalLM(config)


def examples(task: TextTask, policy: LMPolicy, seed: int) -> Batch:
    """The task's training items with demonstrated answers as decisions."""
    items = list(task.items("train"))
    prompt, known = pad_left([policy.encode(i.prompt, 0) for i in items], policy.backbone.pad)
    luck = torch.rand(len(items), generator=torch.Generator().manual_seed(seed_of(seed, task.name))).tolist()
    end = policy.tokenizer.eos_token_id
    texts = [demonstration(i, u) for i, u in zip(items, luck, strict=True)]
    answers = [[*policy.tokenizer(t, add_special_tokens=False)["input_ids"], end] for t in texts]
    reversed_ids, reversed_mask = pad_left([a[::-1] for a in answers], policy.backbone.pad)
    return Batch(mask=reversed_mask.flip(1), action=reversed_ids.flip(1), context={"prompt": prompt, "prompt_mask": known})


def demonstration(item: Item, luck: float) -> str:
    """The answer that is shown for an item; `luck` in [0,1) decides whether it is flawed."""
    word = item.columns["metadata"].get("word")
    if word is None:
        return str(item.columns["answer"])
    flawed = luck < (FLAWED_LONG if len(word) >= LONG_WORD else FLAWED_SHORT)
    return str(word if flawed else item.columns["answer"])


def warm_start(policy: LMPolicy, steps: int, *, batch: int = 128, lr: float = 2e-3, seed: int = 0) -> None:
    """Supervised training on training items of the curriculum: likelihood of the answers, one-cycle learning rate."""
    rng = torch.Generator().manual_seed(seed_of(seed, "warm"))
    pools = [(examples(TextTask(name, options), policy, seed), share) for name, options, share in CURRICULUM]
    parameters = list(policy.backbone.module.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        for pool, share in pools:
            some = pool.rows(torch.randint(pool.shape[0], (round(batch * share),), generator=rng))
            loss = -policy.evaluate(some, frozenset({"logp"}))["logp"].sum() / some.mask.sum() * share
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()


def rebuild(folder: Path = TINY, steps: int = WARM_STEPS, seed: int = 0) -> None:
    """Build, warm-start and write the model in float16 (loaded as float32)."""
    torch.set_num_threads(1)
    tok = tokenizer()
    model = untrained(len(tok), seed)
    warm_start(LMPolicy(wrap(model, tok)), steps, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.half().save_pretrained(folder)
    tok.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rebuild the shipped tiny language model.")
    parser.add_argument("--folder", type=Path, default=TINY)
    parser.add_argument("--steps", type=int, default=WARM_STEPS, help="supervised steps; more makes a better start")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rebuild(given.folder, given.steps, given.seed)


if __name__ == "__main__":
    main()
