"""The worlds of `table:<name>` and their options. Everything is drawn from the task's own seed, not the run's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from polopt.errors import CallError, unknown
from polopt.part import Range, check_fields
from polopt.run import seed_of
from polopt.tasks.table_tree import Tree, calibrated, tilted
from polopt.tasks.table_world import World, spread_out

LARGEST = 20_000_000  # entries of the policy's table


@dataclass(frozen=True)
class TableOptions:
    """Options of every world."""

    prompts: Annotated[int, Range(ge=1), "prompts"] = 16
    symbols: Annotated[int, Range(ge=2), "symbols; the last one ends an answer where answers differ in length"] = 4
    roughness: Annotated[float, Range(ge=0), "deviation of the random logits at the start"] = 1.0
    families: Annotated[int, Range(ge=0), "prompts with the same right answers form a family; 0: each prompt is its own"] = 0
    share: Annotated[float, Range(ge=0, le=1), "weight of a table that the prompts of a family share"] = 0.0
    noise: Annotated[float, Range(ge=0), "chance of a flipped verdict; deviation of noise on graded rewards"] = 0.0
    seed: Annotated[int, Range(ge=0), "of the world and of the policy at the start"] = 0

    def __post_init__(self) -> None:
        check_fields(self, "options")


@dataclass(frozen=True)
class ArmsOptions(TableOptions):
    """A bandit: an answer is one symbol."""

    prompts: Annotated[int, Range(ge=1), "prompts"] = 8
    symbols: Annotated[int, Range(ge=2), "arms"] = 8
    hardest: Annotated[float, Range(gt=0, lt=1), "initial chance of a right answer to the hardest prompt"] = 0.05
    easiest: Annotated[float, Range(gt=0, lt=1), "and to the easiest; the others lie between, evenly in log-odds"] = 0.5
    reward: Annotated[Literal["binary", "graded"], "1 for right arms, or a number for each arm, 1 for the best"] = "binary"
    right: Annotated[int, Range(ge=1), "right arms (binary)"] = 1


@dataclass(frozen=True)
class TreeOptions(TableOptions):
    """Strings with few right answers."""

    length: Annotated[int, Range(ge=1), "most decisions of an answer, the ending one included"] = 5
    hardest: Annotated[float, Range(gt=0, lt=1), "initial chance of a right answer to the hardest prompt"] = 0.02
    easiest: Annotated[float, Range(gt=0, lt=1), "and to the easiest; the others lie between, evenly in log-odds"] = 0.2
    right: Annotated[int, Range(ge=1), "right answers of each prompt"] = 2
    traps: Annotated[int, Range(ge=0), "answers that pay a little and are likely at the start"] = 0
    trap_start: Annotated[float, Range(gt=0, lt=1), "initial chance of a trap"] = 0.3
    trap_reward: Annotated[float, Range(ge=0, lt=1), "what a trap pays"] = 0.3
    dense: Annotated[float, Range(ge=0, le=1), "share of the reward that is paid along the way"] = 0.0


@dataclass(frozen=True)
class BankOptions(TreeOptions):
    """Many prompts, from nearly hopeless to nearly solved."""

    prompts: Annotated[int, Range(ge=1), "prompts"] = 200
    length: Annotated[int, Range(ge=1), "most decisions of an answer, the ending one included"] = 3
    hardest: Annotated[float, Range(gt=0, lt=1), "initial chance of a right answer to the hardest prompt"] = 0.005
    easiest: Annotated[float, Range(gt=0, lt=1), "and to the easiest; the others lie between, evenly in log-odds"] = 0.99
    right: Annotated[int, Range(ge=1), "right answers of each prompt"] = 1
    families: Annotated[int, Range(ge=0), "skills: prompts with the same right answers; 0: each prompt is its own"] = 20
    share: Annotated[float, Range(ge=0, le=1), "weight of a table that the prompts of a skill share"] = 1.0


@dataclass(frozen=True)
class LengthsOptions(TableOptions):
    """Right answers of several lengths."""

    prompts: Annotated[int, Range(ge=1), "prompts"] = 8
    symbols: Annotated[int, Range(ge=2), "symbols; the last one ends an answer"] = 3
    length: Annotated[int, Range(ge=3), "most decisions of an answer, the ending one included"] = 8
    hardest: Annotated[float, Range(gt=0, lt=1), "initial chance of a right answer to the hardest prompt"] = 0.1
    easiest: Annotated[float, Range(gt=0, lt=1), "and to the easiest; the others lie between, evenly in log-odds"] = 0.4
    each: Annotated[int, Range(ge=1), "right answers of each length (fewer where there are not as many)"] = 1
    bias: Annotated[float, Range(), "weight of length at the start: above 0, long answers are likelier than by chance"] = 0.0
    dense: Annotated[float, Range(ge=0, le=1), "share of the reward that is paid along the way"] = 0.0


@dataclass(frozen=True)
class StyleOptions(TableOptions):
    """Strings with a hidden score, and a proxy of it that can be gamed."""

    prompts: Annotated[int, Range(ge=1), "prompts"] = 4
    symbols: Annotated[int, Range(ge=3), "symbols; the first is the tic that the proxy overrates, the last ends an answer"] = 4
    length: Annotated[int, Range(ge=2), "most decisions of an answer, the ending one included"] = 6
    proxy: Annotated[float, Range(ge=0, le=1), "share of the proxy in the reward; the rest is the true (gold) score"] = 0.0
    hack: Annotated[float, Range(ge=0), "what the proxy pays for each tic, where the true score loses by their square"] = 2.0
    target: Annotated[int, Range(ge=1), "length (symbols before the end) that the score likes best"] = 4
    dense: Annotated[float, Range(ge=0, le=1), "share of the reward that is paid along the way"] = 0.0


# -------------------------------------------------------------------- making them
def _rng(options: TableOptions, what: str) -> Generator:
    return torch.Generator().manual_seed(seed_of(options.seed, f"table/{what}"))


def _family(options: TableOptions) -> Int[Tensor, " P"]:
    """Prompts take turns in their families."""
    return torch.arange(options.prompts) % (options.families or options.prompts)


def _tree(options: TableOptions, horizon: int, *, eos: bool = True) -> Tree:
    """The tree of answers; raises `CallError` when its tables would be too large."""
    tree = Tree(options.symbols, horizon, eos)
    if options.prompts * tree.nodes * tree.symbols > LARGEST:
        shape = f"{options.prompts} prompts x {tree.nodes} prefixes x {tree.symbols} symbols"
        raise CallError(f"a table of {shape} is too large: lower options.prompts, options.symbols or options.length")
    return tree


def _rough(tree: Tree, options: TableOptions) -> Float[Tensor, "P N V"]:
    shape = (options.prompts, tree.nodes, tree.symbols)
    return options.roughness * torch.randn(shape, generator=_rng(options, "initial"), dtype=torch.float64)


def chances(prompts: int, hardest: float, easiest: float) -> Float[Tensor, " P"]:
    """Chances of success of the prompts at the start, from the hardest to the easiest, evenly in log-odds."""
    odds = torch.tensor([hardest, easiest], dtype=torch.float64).logit()
    steps = torch.linspace(0, 1, prompts, dtype=torch.float64) if prompts > 1 else torch.full((1,), 0.5, dtype=torch.float64)
    return (odds[0] + (odds[1] - odds[0]) * steps).sigmoid()


def _pick(
    candidates: Bool[Tensor, "N V"], count: int, family: Int[Tensor, " P"], rng: Generator, what: str
) -> Bool[Tensor, "P N V"]:
    """`count` distinct last decisions for each family, from those that may be taken."""
    places = candidates.reshape(-1).nonzero().squeeze(1)
    if count > len(places):
        raise CallError(f"options.{what} = {count}, but only {len(places)} answers can be chosen")
    chosen = torch.zeros(int(family.max()) + 1, candidates.numel(), dtype=torch.bool)
    for row in chosen:
        row[places[torch.randperm(len(places), generator=rng)[:count]]] = True
    return chosen.view(-1, *candidates.shape)[family]


def _paid(tree: Tree, reward: Float[Tensor, "P N V"], dense: float) -> Float[Tensor, "P N V 1"]:
    return (spread_out(reward, tree, dense) if dense else reward)[..., None]


def arms(o: ArmsOptions) -> World:
    """One decision; `right` right arms, or a graded reward with one best arm."""
    tree = _tree(o, 1, eos=False)
    if o.right >= o.symbols:
        raise CallError(f"options.right = {o.right} must be below options.symbols = {o.symbols}")
    family = _family(o)
    right = _pick(tree.ends(), 1 if o.reward == "graded" else o.right, family, _rng(o, "right"), "right")
    value = right.double()
    if o.reward == "graded":
        grades = torch.rand(int(family.max()) + 1, 1, o.symbols, generator=_rng(o, "grades"), dtype=torch.float64)[family]
        value = torch.where(right, 1.0, 0.8 * grades)
    initial = calibrated(tree, _rough(tree, o), [(right, chances(o.prompts, o.hardest, o.easiest))])
    kind: Literal["flip", "gauss"] = "gauss" if o.reward == "graded" else "flip"
    return World(tree, value[..., None], right, {"score": value}, initial, family, share=o.share, noise=o.noise, noise_kind=kind)


def tree(o: TreeOptions) -> World:
    """`right` right answers that end before the limit, `traps` that pay a little."""
    shape = _tree(o, o.length)
    family, rng = _family(o), _rng(o, "right")
    # at least three decisions, and none at the limit, where some methods punish length; fewer where the limit allows no more
    deepest = max(o.length - 2, 0)
    whole = shape.ends() & ~shape.cut() & ((shape.depths() >= min(2, deepest)) & (shape.depths() <= deepest))[:, None]
    both = _pick(whole, o.right + o.traps, family, rng, "right and traps")
    # of a family's chosen answers, `right` random ones are right
    rank = torch.where(both, torch.rand(int(family.max()) + 1, *whole.shape, generator=rng, dtype=torch.float64)[family], -1.0)
    limit = rank.flatten(1).topk(o.right, 1).values[:, -1]
    right = both & (rank >= limit[:, None, None])
    trap = both & ~right
    classes = [(right, chances(o.prompts, o.hardest, o.easiest))]
    if o.traps:
        classes.append((trap, torch.full((o.prompts,), o.trap_start, dtype=torch.float64)))
    if o.traps and max(o.hardest, o.easiest) + o.trap_start >= 1:
        raise CallError(f"options.easiest + options.trap_start = {o.easiest + o.trap_start:g} leave nothing to other answers")
    value = right.double() + o.trap_reward * trap
    initial = calibrated(shape, _rough(shape, o), classes)
    scores = {"score": right.double(), **({"trap": trap.double()} if o.traps else {})}
    return World(shape, _paid(shape, value, o.dense), right, scores, initial, family, share=o.share, noise=o.noise)


def lengths(o: LengthsOptions) -> World:
    """Right answers of every length from 1 symbol to the limit; the policy at the start may lean towards long ones."""
    shape = _tree(o, o.length)
    family, rng = _family(o), _rng(o, "right")
    whole = shape.ends() & ~shape.cut()
    right = torch.zeros(o.prompts, *whole.shape, dtype=torch.bool)
    for depth in range(1, o.length):
        here = whole & (shape.depths() == depth)[:, None]
        right |= _pick(here, min(o.each, int(here.sum()) - 1) or 1, family, rng, "each")
    # cut answers are as long as the longest whole ones
    size = (shape.depths() + 1)[:, None] * shape.ends()
    leaning = tilted(shape, _rough(shape, o), (o.bias * size).expand(right.shape).double())
    initial = calibrated(shape, leaning, [(right, chances(o.prompts, o.hardest, o.easiest))])
    paid = _paid(shape, right.double(), o.dense)
    return World(shape, paid, right, {"score": right.double()}, initial, family, share=o.share, noise=o.noise)


def style(o: StyleOptions) -> World:
    """A hidden score of strings, standardised to mean 0 and deviation 1 under the policy at the start, and a proxy of it.

    Both count bigrams and like a certain length. For each tic the proxy pays `hack`, the true score loses a quarter of the square
    of their number: near the start more of one is more of the other, far from it the proxy rises while the score falls.
    """
    shape = _tree(o, o.length)
    family, rng = _family(o), _rng(o, "score")
    _, action, mask = shape.answers()
    w = shape.width
    bigram = torch.randn(int(family.max()) + 1, w, w, generator=rng, dtype=torch.float64)[family]
    symbol = mask & (action < w)
    pairs = symbol[:, 1:] & symbol[:, :-1]
    kinds = action[:, :-1].clamp(max=w - 1) * w + action[:, 1:].clamp(max=w - 1)
    counted = (bigram.flatten(1)[:, kinds] * pairs).sum(-1)  # [P,A]
    size, tics = symbol.sum(1).double(), (symbol & (action == 0)).sum(1).double()
    common = counted - 0.25 * (size - o.target).square()
    initial = _rough(shape, o).log_softmax(-1)
    raw = {"gold": common - 0.25 * tics.square(), "proxy": common + o.hack * tics}
    last_node, last_action = shape.last()
    scores = {}
    for name, x in raw.items():
        table = torch.zeros_like(initial)
        table[:, last_node, last_action] = x
        mean = shape.backward(initial.exp(), table)[1][:, 0]
        square = shape.backward(initial.exp(), table.square())[1][:, 0]
        scale = (square - mean.square()).sqrt()[:, None, None]
        scores[name] = torch.where(shape.ends(), (table - mean[:, None, None]) / scale, 0.0)
    weights = {"gold": 1 - o.proxy, "proxy": o.proxy}
    reward = torch.cat([_paid(shape, weights[k] * scores[k], o.dense) for k in scores], -1)
    # an answer counts as right that is better than one in twenty at the start
    right = (scores["gold"] > 1.64) & shape.ends()
    kinds_of = ("gold", "proxy")
    return World(shape, reward, right, scores, initial, family, kinds_of, share=o.share, noise=o.noise, noise_kind="gauss")


#: name -> (options, world, what it is)
WORLDS: dict[str, tuple[type[TableOptions], Callable[[Any], World], str]] = {
    "arms": (ArmsOptions, arms, "a bandit: one decision, one or several right arms or graded rewards"),
    "tree": (TreeOptions, tree, "short strings with few right answers, and traps"),
    "bank": (BankOptions, tree, "many prompts, from nearly hopeless to nearly solved, that share skills"),
    "lengths": (LengthsOptions, lengths, "right answers of every length"),
    "style": (StyleOptions, style, "strings with a hidden score and a proxy of it that can be gamed"),
}


def options_of(name: str) -> type[TableOptions]:
    """The options of a world; unknown names are refused."""
    if name not in WORLDS:
        raise unknown("table task", name, WORLDS)
    return WORLDS[name][0]
