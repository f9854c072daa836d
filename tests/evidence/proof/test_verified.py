"""The verified difference: it holds for every method of the registry and fails when a part, a value or anything else is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from math import inf

import pytest
import torch
from torch import Tensor

import polopt
from polopt.batch import Batch
from polopt.claim import Neutral
from polopt.cli import main
from polopt.errors import CallError
from polopt.evidence.proof.batches import random_batches
from polopt.evidence.proof.difference import difference, way
from polopt.evidence.proof.sides import losses, with_part
from polopt.evidence.proof.verified import TOLERANCE, Line, Proof, verify
from polopt.method import Method
from polopt.methods.language.cispo import CISPO
from polopt.methods.language.grpo import GRPO
from polopt.methods.language.gspo import GSPO
from polopt.methods.language.ppo_lm import PPO_LM
from polopt.methods.language.rloo import RLOO
from polopt.methods.onpolicy.a2c import A2C
from polopt.methods.onpolicy.a3c import A3C
from polopt.methods.onpolicy.ppo import PPO
from polopt.methods.onpolicy.reinforce import REINFORCE
from polopt.methods.onpolicy.trpo import TRPO
from polopt.parts.advantage.running_mean import RunningMean
from polopt.parts.aggregate import TokenMean
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.reward.kl import KLInReward
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.surrogate.clip import Clip
from polopt.parts.surrogate.score import Ratio
from polopt.update import Update

torch.set_num_threads(1)
CHILDREN = [name for name, m in polopt.methods().items() if m.parent is not None]


@cache
def proof_of(name: str) -> Proof:
    return verify(polopt.method(name))


def line(proof: Proof, slot: str) -> Line:
    return next(x for x in proof.lines if x.slot == slot)


# -------------------------------------------------------------------- every method
@pytest.mark.identity(
    "*", "nothing but its own parts differs from its parent: each part at its neutral value gives the parent's gradient"
)
@pytest.mark.parametrize("name", CHILDREN)
def test_every_method_differs_from_its_parent_in_its_parts_alone(name):
    method = polopt.method(name)
    proof = proof_of(name)
    assert proof.holds, difference(method, method.parent).text()
    assert max(proof.max_loss_difference, proof.max_gradient_difference) < 1e-12
    assert proof.unused == (), f"{name} declares neutral values that nothing needs"
    # a slot without neutral value has to be declared so: neutral={"<slot>": None}
    assert proof.undeclared == (), f"{name}: declare neutral values, or None, for {', '.join(proof.undeclared)}"
    assert set(proof.swapped) == {slot for slot, value in method.neutral.items() if value is None}
    if proof.swapped:
        print(f"no neutral value: {name}: {', '.join(proof.swapped)}")
    for x in proof.lines:  # the batches see every part: as it stands it makes a difference
        if x.status == "proven" and x.slot != "updates":
            assert x.before is not None
            assert x.before > 1e-3


def test_some_methods_equal_their_parents_bit_for_bit():
    assert {n for n in CHILDREN if proof_of(n).bitwise} >= {"reinforce-baseline", "a3c", "a2c", "ppo", "ppo-lm"}


def test_a_pair_takes_less_than_a_second():
    random_batches.cache_clear()
    begin = time.process_time()
    verify(TRPO)
    assert time.process_time() - begin < 1


def test_the_root_has_no_parent():
    with pytest.raises(CallError, match="reinforce is the root"):
        verify(REINFORCE)


# -------------------------------------------------------------------- faults that must be found
def flipped(self: Ratio, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
    return (now["logp"] - batch.stat("logp@old")).exp() * advantage


def test_a_flipped_sign_in_the_parents_part_is_found(monkeypatch):
    monkeypatch.setattr(Ratio, "__call__", flipped)
    proof = verify(PPO)
    assert not proof.holds
    assert line(proof, "surrogate").status == "failed"


@dataclass(frozen=True)
class FlippedClip(Clip):
    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
        return -super().__call__(batch, now, advantage)


@dataclass(frozen=True)
class SteeperClip(Clip):
    """The right loss with twice the gradient."""

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
        right = super().__call__(batch, now, advantage)
        return 2 * right - right.detach()


def test_a_flipped_sign_in_a_subclass_is_found():
    proof = verify(replace(PPO, surrogate=FlippedClip()))
    assert (proof.holds, line(proof, "surrogate").status) == (False, "failed")


def test_gradients_are_compared_not_losses_alone():
    proof = verify(replace(PPO, surrogate=SteeperClip()))
    assert proof.max_loss_difference < TOLERANCE < 1e-2 < proof.max_gradient_difference
    assert not proof.holds


def test_losses_are_compared_not_gradients_alone():
    @dataclass(frozen=True)
    class Shifted(Clip):
        def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
            return super().__call__(batch, now, advantage) + 1

    proof = verify(replace(PPO, surrogate=Shifted()))
    assert proof.max_gradient_difference < TOLERANCE < 1e-2 < proof.max_loss_difference
    assert not proof.holds
    assert verify(
        replace(PPO, surrogate=Shifted(), neutral={"surrogate": Neutral(PPO.neutral["surrogate"].own, equal="gradient")})
    ).holds


def test_a_second_slot_changed_in_silence_is_named():
    @dataclass(frozen=True)
    class Doubled(TokenMean):
        def __call__(self, loss: Tensor, batch: Batch, valid: Tensor, totals: object) -> Tensor:
            return 2 * super().__call__(loss, batch, valid, totals)

    proof = verify(replace(PPO, aggregate=Doubled()))
    assert proof.undeclared == ("aggregate",)
    assert not verify(replace(PPO, aggregate=Doubled(), neutral={**PPO.neutral, "aggregate": Neutral()})).holds


def test_a_difference_outside_the_parts_is_found():
    class Sneaky(Method):
        def loss(self, *args, **kwargs):
            total, info = super().loss(*args, **kwargs)
            return 1.01 * total, info

    sneaky = Sneaky(**{f.name: getattr(GSPO, f.name) for f in fields(GSPO)})
    assert not verify(sneaky).holds
    same = Sneaky(**{f.name: getattr(GRPO, f.name) for f in fields(GRPO)} | {"parent": GRPO, "neutral": {}})
    proof = verify(same)
    assert (proof.holds, proof.lines) == (False, ())
    assert "something else differs" in proof.problem


def test_nan_is_a_difference():
    @dataclass(frozen=True)
    class Broken(Clip):
        def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
            return super().__call__(batch, now, advantage) * torch.nan

    proof = verify(replace(PPO, surrogate=Broken()))
    assert (proof.holds, proof.max_loss_difference) == (False, inf)


@pytest.mark.parametrize(
    ("method", "slot", "neutral"),
    [
        (PPO, "surrogate", Neutral({"low": 0.2, "high": inf})),
        (PPO, "surrogate", Neutral()),
        (A3C, "advantage", Neutral({"gamma": 1.0})),  # bootstraps from the value of an episode that was cut
        (A3C, "advantage", Neutral({"gamma": 0.9}, batch=("whole-episodes",))),
        (A3C, "aggregate", Neutral(batch=("equal-lengths",))),
        (A2C, "penalty.entropy", Neutral(parent={"coef": 1e-4})),
        (TRPO, "surrogate", Neutral(equal="gradient")),
        (TRPO, "surrogate", Neutral(batch=("on-policy",))),  # the losses differ
        (GRPO, "advantage", replace(GRPO.neutral["advantage"], batch=("whole-episodes",))),
        (GRPO, "advantage", replace(GRPO.neutral["advantage"], batch=("value-is-group-mean",))),
        (GRPO, "advantage", replace(GRPO.neutral["advantage"], own={})),
        (GSPO, "surrogate", Neutral(batch=("equal-ratios",))),
        (GSPO, "surrogate", Neutral({"low": 0.2, "high": 0.2})),
        (CISPO, "surrogate", replace(CISPO.neutral["surrogate"], own={"cap": 1.0})),
        (CISPO, "aggregate", Neutral()),
        (RLOO, "advantage", Neutral({"centre": "none"})),
        (RLOO, "reward.kl-in-reward", Neutral({"beta": 1e-3})),
    ],
)
def test_a_wrong_neutral_value_fails_at_its_slot(method, slot, neutral):
    proof = verify(replace(method, neutral={**method.neutral, slot: neutral}))
    assert not proof.holds
    assert [x.slot for x in proof.lines if x.status == "failed" and x.slot != "updates"] == [slot]


@pytest.mark.parametrize(
    ("neutral", "message"),
    [
        ({"surogate": Neutral()}, "did you mean 'surrogate'"),
        ({"surrogate": Neutral({"lo": 0.0})}, "clip.*none called 'lo'.*did you mean 'low'"),
        ({"surrogate": Neutral({"low": -1.0})}, "neutral value of 'surrogate'.*must be >= 0"),
        ({"surrogate": Neutral(PPO.neutral["surrogate"].own, batch=("equal-length",))}, "did you mean 'equal-lengths'"),
        ({"updates": Neutral()}, "only None"),
    ],
)
def test_neutral_values_that_name_nothing_are_refused(neutral, message):
    with pytest.raises(CallError, match=message):
        verify(replace(PPO, neutral=neutral))


def test_a_setting_for_a_part_that_is_not_there_is_refused():
    with pytest.raises(CallError, match="that side has no such part"):
        verify(replace(GRPO, neutral={**GRPO.neutral, "critic": Neutral(own={"coef": 0.0})}))


# -------------------------------------------------------------------- methods of one's own
def test_settings_of_one_kind_of_part_need_no_neutral_value():
    proof = verify(GRPO.but("mine", surrogate=Clip(low=0.1, high=0.4), advantage=GRPO.advantage.but(scale="none"), epochs=3))
    assert proof.holds
    assert proof.bitwise
    assert {x.slot: x.status for x in proof.lines} == {"surrogate": "settings", "advantage": "settings"}
    assert proof.outside == ("epochs",)


def test_a_part_without_neutral_value_is_swapped_and_said_so():
    mine = PPO.but("mine", surrogate=FlippedClip(), penalty=EntropyBonus())
    proof = verify(mine)
    assert proof.holds
    assert proof.swapped == proof.undeclared == ("surrogate", "penalty.entropy")
    text = polopt.diff(PPO, mine)
    assert "no neutral value is declared: clip was put in for clip" in text
    assert "nothing was put in for entropy" in text


def test_none_says_that_no_neutral_value_exists():
    mine = PPO.but(
        "mine", advantage=RunningMean(), critic=None, neutral={"advantage": None, "critic": Neutral(parent={"coef": 0.0})}
    )
    proof = verify(mine)
    assert (proof.holds, proof.swapped, proof.undeclared) == (True, ("advantage",), ())
    assert "no neutral value exists" in polopt.diff("ppo", mine)


def test_neutral_values_are_not_inherited():
    assert PPO.but("mine").neutral == {}


def test_other_losses_on_other_nets():
    main_update = PPO.updates[0]
    forgot = PPO.but("forgot", updates=(replace(main_update, terms=("surrogate",)),))
    assert verify(forgot).undeclared == ("updates",)
    frozen = PPO.but("frozen", updates=(replace(main_update, trains=("policy",)),))
    assert verify(frozen).undeclared == ("updates",)
    assert verify(replace(frozen, neutral={"updates": None})).undeclared == ()
    # two updates that together do what one did
    apart = (replace(main_update, terms=("surrogate", "penalty")), Update("critic", trains=("value",), terms=("critic",)))
    proof = verify(PPO.but("apart", updates=apart))
    assert (proof.holds, proof.swapped, line(proof, "updates").status) == (True, (), "proven")


def test_parts_that_an_update_overrides():
    mine = PPO.but("mine", updates=(replace(PPO.updates[0], surrogate=Clip(low=0.1)),))
    assert verify(mine).undeclared == ("updates.policy.surrogate",)
    back = {"updates.policy.surrogate": Neutral({"low": 0.2})}
    assert verify(replace(mine, neutral=back)).holds
    assert not verify(replace(mine, neutral={"updates.policy.surrogate": Neutral()})).holds
    kl = PPO.but("kl", updates=(replace(PPO.updates[0], penalty=(KLToReference(),)),))
    proof = verify(replace(kl, neutral={"updates.policy.penalty.kl-ref": Neutral({"coef": 0.0})}))
    assert (proof.holds, proof.swapped) == (True, ())


def test_a_part_that_cannot_be_computed_does_not_hold():
    @dataclass(frozen=True)
    class NeedsObservations(Clip):
        def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
            return batch.obs["pixels"]

    proof = verify(replace(PPO, surrogate=NeedsObservations()))
    assert not proof.holds
    assert "TypeError" in proof.problem


def test_a_proof_without_gradient_proves_nothing():
    @dataclass(frozen=True)
    class Nothing(Clip):
        def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
            return 0 * now["logp"]

    dead = PPO.but("dead", surrogate=Nothing(), critic=PPO.critic.but(coef=0.0))
    proof = verify(dead.but("child", epochs=2))
    assert not proof.holds
    assert "nothing is proven" in proof.problem


# -------------------------------------------------------------------- ways between methods
def ways(a: Method, b: Method) -> list[tuple[str, str]]:
    return [(child.name, parent.name) for child, parent in way(a, b) or []]


def test_the_way_goes_through_the_common_ancestor():
    assert ways(PPO, GRPO) == ways(GRPO, PPO) == [("grpo", "ppo")]
    assert ways(CISPO, PPO_LM) == [("cispo", "grpo"), ("grpo", "ppo"), ("ppo-lm", "ppo")]
    assert ways(TRPO, A2C) == [("trpo", "reinforce-baseline"), ("a3c", "reinforce-baseline"), ("a2c", "a3c")]
    assert ways(REINFORCE, A3C) == [("reinforce-baseline", "reinforce"), ("a3c", "reinforce-baseline")]


def test_methods_made_of_the_same_kinds_of_parts_need_no_way():
    assert ways(PPO, PPO.set("surrogate.high", 0.3)) == [("ppo", "ppo")]
    assert ways(GRPO.but("a", epochs=2), GRPO.but("b", penalty=KLToReference(0.1))) == [("b", "a")]
    assert difference(PPO, PPO).links == ()
    (changed,) = difference(PPO, PPO.set("surrogate", "score")).links  # the neutral value of PPO's clip is not that of this
    assert (changed.holds, changed.undeclared) == (True, ("surrogate",))


def test_methods_without_common_ancestor_are_not_compared():
    other = replace(REINFORCE, name="other", surrogate=Ratio())
    found = difference(REINFORCE, other)
    assert (found.related, found.links) == (False, ())
    assert "no common ancestor" in found.text()


def test_words():
    text = polopt.diff("ppo", "grpo")
    for part in (
        "grpo against ppo: proven", "group(scale=none) = gae(gamma=1, lam=1, standardise=False), given", "kl-ref(coef=0) = nothing",
        "nothing = value(coef=0)", "aggregate            seq-mean-token-mean = token-mean, given rows of one length",
        "outside the loss     sampler (group_size), epochs, minibatch, rule (optimizer, lr, eps, max_grad_norm)",
    ):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    assert "gradients equal bit for bit" not in text
    assert "(equal bit for bit)" in polopt.diff("trpo", "ppo")
    assert "in gradient" in polopt.diff("grpo", "cispo")


def test_json_and_exit_status(capsys, tmp_path):
    assert main(["diff", "grpo", "cispo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert found["holds"] is True
    assert any(s.startswith("surrogate: clip") for s in found["settings"])
    (link,) = found["links"]
    assert (link["child"], link["equal"], link["swapped"]) == ("cispo", "gradient", [])
    assert link["lines"][0]["neutral"]["own"] == {"cap": "inf"}
    path = tmp_path / "wrong.py"
    path.write_text(
        "from polopt import method\nfrom polopt.claim import Neutral\nfrom polopt.parts.surrogate.score import Ratio\n"
        "WRONG = method('ppo').but('wrong', surrogate=Ratio(), neutral={'surrogate': Neutral(parent={'low': 0.5})})\n"
        "RIGHT = method('ppo').but('right', surrogate=Ratio(), neutral={'surrogate': Neutral(parent={'low': 1e9, 'high': 1e9})})\n"
    )
    assert main(["diff", "ppo", f"{path}:RIGHT"]) == 0
    assert "ratio = clip(low=1e+09, high=1e+09)" in capsys.readouterr().out
    assert main(["diff", "ppo", f"{path}:WRONG"]) == 1
    assert "FAILED: ratio = clip(low=0.5): they differ" in capsys.readouterr().out


# -------------------------------------------------------------------- what it is made of
def test_losses_add_up_over_updates_and_count_the_nets_that_are_trained():
    batch = random_batches()[0]
    total, gradients = losses(TRPO, batch)
    mask, n = batch.mask, batch.mask.sum()
    advantage, old = TRPO.advantages(batch), batch.stat("value@old")
    ratio = (batch.stat("logp@now") - batch.stat("logp@old")).exp()
    target = TRPO.advantage.returns(batch)
    value = batch.stat("value@now")
    policy, critic = -(ratio * advantage)[mask].sum() / n, (value - target)[mask].square().sum() / n
    torch.testing.assert_close(total, policy + critic)
    torch.testing.assert_close(gradients["logp@now"], -ratio * advantage * mask / n)
    torch.testing.assert_close(gradients["value@now"], 2 * (value - target) * mask / n)
    assert not gradients["entropy@now"].any()
    assert old.dtype == torch.float64
    only = replace(TRPO, updates=(TRPO.updates[0], replace(TRPO.updates[1], trains=("policy",))))
    assert not losses(only, batch)[1]["value@now"].any()


def test_parts_are_put_in_their_place():
    two = PPO.but("two", reward=(KLInReward(), SoftOverlong()))
    one = with_part(two, "reward.kl-in-reward", None)
    assert [p.name for p in one.reward] == ["soft-overlong"]
    back = with_part(one, "reward.kl-in-reward", KLInReward(), ("kl-in-reward", "soft-overlong"))
    assert [p.name for p in back.reward] == ["kl-in-reward", "soft-overlong"]
    last = with_part(
        with_part(two, "reward.soft-overlong", None), "reward.soft-overlong", SoftOverlong(), ("kl-in-reward", "soft-overlong")
    )
    assert last.reward == two.reward
    assert with_part(PPO, "critic", None).critic is None
