"""The models of the small text tasks: a hundred thousand parameters each, one token per symbol, begun on flawed solutions.

`python -m polopt.policies.minis` rebuilds `polopt/assets/tiny-*` (a minute or two each; the same bytes on one machine).

Where a task is learnt from is set by its demonstrations: they are right in the share of cases that the model shall begin with,
and wrong in the ways in which people are. The model then knows how to do it and often does not do it, which is what
reinforcement learning can change.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polopt.batch import Batch
from polopt.policies.lm import LMPolicy, wrap
from polopt.policies.lm.model import ASSETS
from polopt.policies.lm.prompts import pad_left
from polopt.run import seed_of
from polopt.tasks.chain import MARK, partial_results, written
from polopt.tasks.countdown import RETRY, CountdownTask
from polopt.tasks.mini import text_task
from polopt.tasks.text_protocol import Item

#: Every symbol of the small tasks, one token each.
SYMBOLS = "0123456789+-=,;?>" + "abcdefgh" + "ABCDEFGHIJKLMNOPQRST"
#: The last twenty mean nothing in any task.
JUNK = SYMBOLS[-20:]


@dataclass(frozen=True)
class Mini:
    """How a model is begun: on which task, for how many supervised steps, from which demonstrations.

    demonstrate(item, rng) is a flawed answer. flawed: share of the steps, the last ones, that show these; before them, the model
    learns from reference solutions how it is done. hinted: share of examples whose prompt goes on with a piece of the solution.
    """

    task: str
    demonstrate: Callable[[Item, random.Random], str]
    steps: int
    flawed: float = 0.3
    hinted: float = 0.1
    items: int = 20_000
    batch: int = 64
    muon: float = 0.01  # learning rate of matrices
    lr: float = 5e-3  # of everything else
    seed: int = 0


# -------------------------------------------------------------------- demonstrations
#: Chain: chances of guessing the result at once, of a slip in a partial result, of leaving out a minus sign, of a mark at the end.
GUESSED, SLIP, LOST_SIGN, MARKED = 0.35, 0.05, 0.5, 0.3
#: Countdown: chances of another derivation than the dominant one, of a wrong answer to an easy and to a hard question, of a
#: second attempt behind a wrong one, and of a symbol without meaning in front of each symbol.
OTHER, WRONG_EASY, WRONG_HARD, RETRIED, JUNKED = 0.2, 0.65, 0.98, 0.03, 0.02
#: Spell: chance of writing the string as it stands, by its length up to 8, and beyond.
COPIED = {4: 0.3, 5: 0.4, 6: 0.5, 7: 0.65, 8: 0.8}
COPIED_LONG = 0.97


def chain(item: Item, rng: random.Random) -> str:
    """A guess near the result, or partial results with slips, from which it goes on; minus signs are lost most often."""
    truth = partial_results(item.columns["metadata"]["expression"])
    mark = MARK if rng.random() < MARKED else ""
    if rng.random() < GUESSED:
        return f"={truth[-1] + rng.randint(-3, 3)}{mark}"
    shown, off = [], 0
    for total in truth:
        if total + off < 0 and rng.random() < LOST_SIGN:
            off = -total - (total + off)
        elif rng.random() < SLIP:
            off += rng.choice((-1, 1))
        shown.append(total + off)
    return written(shown) + mark


def countdown(item: Item, rng: random.Random) -> str:
    """A right or a wrong derivation, seldom a second attempt, some symbols without meaning.

    Wrong ones take the numbers as they come, and add them up unless that is right. Hard are targets of one digit.
    """
    numbers, target = item.columns["metadata"]["numbers"], item.columns["metadata"]["target"]
    right = str(item.columns["solution"])
    if rng.random() < OTHER:
        terms = re.findall(r"[+-]?\d+", right)
        rng.shuffle(terms)
        terms.sort(key=lambda t: t.startswith("-"))
        right = "".join(t if t[0] in "+-" else f"+{t}" for t in terms).removeprefix("+")
    missed = [s for s in ((1, 1), (1, -1)) if numbers[0] + s[0] * numbers[1] + s[1] * numbers[2] != target]
    wrong = f"{numbers[0]}{missed[0][0] * numbers[1]:+d}{missed[0][1] * numbers[2]:+d}"
    shown = wrong if rng.random() < (WRONG_HARD if target < 10 else WRONG_EASY) else right
    if rng.random() < RETRIED:
        shown = f"{wrong}{RETRY}{right if rng.random() < 0.5 else wrong}"
    symbols = [x for c in shown for x in ((rng.choice(JUNK), c) if rng.random() < JUNKED else (c,))]
    return "".join(symbols)[: CountdownTask.tokens - 1]


def spell(item: Item, rng: random.Random) -> str:
    """The string backward, or `=` and the string as it stands."""
    word = str(item.columns["metadata"]["word"])
    return f"={word}" if rng.random() < COPIED.get(len(word), COPIED_LONG) else str(item.columns["solution"])


MINIS: Mapping[str, Mini] = {
    "tiny-chain": Mini("text:chain", chain, steps=1800),
    "tiny-countdown": Mini("text:countdown", countdown, steps=1500, items=5_000),
    "tiny-spell": Mini("text:spell", spell, steps=700, flawed=0.4),
}


# -------------------------------------------------------------------- building
def tokenizer() -> Any:
    """One token per symbol; `<go>` ends every prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<go>"]
    vocabulary = {token: i for i, token in enumerate([*special, *SYMBOLS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="$A <go>", special_tokens=[("<go>", vocabulary["<go>"])])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", additional_special_tokens=["<go>"],
        padding_side="left", model_max_length=64, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def untrained(vocabulary: int, seed: int) -> Any:
    """A decoder of two layers of width 64 with random parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.08,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "minis"))
        return Qwen2ForCausalLM(config)


def example(mini: Mini, item: Item, rng: random.Random, flawed: bool) -> tuple[str, str]:
    """A prompt and an answer; a hint is always followed by the whole solution."""
    solution = str(item.columns["solution"])
    if rng.random() < mini.hinted:
        return f"{item.prompt}{solution[: rng.randint(1, len(solution))]}", solution
    return str(item.prompt), mini.demonstrate(item, rng) if flawed else solution


def examples(mini: Mini, policy: LMPolicy, flawed: bool) -> Batch:
    """One demonstration for each training item of the task, as decisions."""
    rng = random.Random(seed_of(mini.seed, f"{mini.task}/{flawed}"))
    shown = [example(mini, item, rng, flawed) for item in text_task(mini.task, {"train_items": mini.items}).items("train")]
    pad, end = policy.backbone.pad, policy.tokenizer.eos_token_id
    prompt, known = pad_left([policy.encode(p, 0) for p, _ in shown], pad)
    answers = [[*policy.tokenizer(a, add_special_tokens=False)["input_ids"], end] for _, a in shown]
    reversed_ids, reversed_mask = pad_left([a[::-1] for a in answers], pad)
    return Batch(mask=reversed_mask.flip(1), action=reversed_ids.flip(1), context={"prompt": prompt, "prompt_mask": known})


def warm_start(policy: LMPolicy, mini: Mini, steps: int) -> None:
    """Supervised training: likelihood of the demonstrated answers. Matrices learn by Muon, which needs half the steps of Adam."""
    rng = torch.Generator().manual_seed(seed_of(mini.seed, "warm"))
    named = dict(policy.backbone.module.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=mini.muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=mini.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], total_steps=steps + 1, pct_start=0.1, cycle_momentum=False)
        for o in optimisers
    ]
    for flawed in (False, True):
        pool = examples(mini, policy, flawed)
        for _ in range(round(steps * (mini.flawed if flawed else 1 - mini.flawed))):
            some = pool.rows(torch.randint(pool.shape[0], (mini.batch,), generator=rng))
            loss = -policy.evaluate(some, frozenset({"logp"}))["logp"].sum() / some.mask.sum()
            policy.backbone.module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
            for optimiser, schedule in zip(optimisers, schedules, strict=True):
                optimiser.step()
                schedule.step()


def rebuild(name: str, folder: Path | None = None, steps: int | None = None) -> None:
    """Build, warm-start and write a model in float16 (loaded as float32)."""
    torch.set_num_threads(1)
    mini, folder = MINIS[name], folder or ASSETS / name
    tok = tokenizer()
    model = untrained(len(tok), mini.seed)
    warm_start(LMPolicy(wrap(model, tok)), mini, mini.steps if steps is None else steps)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.half().save_pretrained(folder)
    tok.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rebuild the models of the small text tasks.")
    parser.add_argument("names", nargs="*", choices=[*MINIS, []], default=list(MINIS))
    for name in parser.parse_args().names:
        rebuild(name)


if __name__ == "__main__":
    main()
