"""What wins over what, what a path means, and what is refused, with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polopt.errors import CallError
from polopt.overrides import Layer, apply_override, resolve, schema
from polopt.part import Can
from polopt.paths import Leaf, canonical, coerce, method_leaves, replace_at
from polopt.registry import get_method
from polopt.settings import CollectSettings, PolicySettings, Settings


class Lab:
    """A task that needs no package and offers everything."""

    name, domain = "lab", "text"
    offers = frozenset(Can)

    def __init__(self, preset: dict | None = None) -> None:
        self.asked: list[str] = []
        self._preset = {"collect.envs": 4, "lr": 0.02, "epochs": 3} if preset is None else preset

    def preset(self, method):
        self.asked.append(method.name)
        return self._preset


def refused(method, task, **user) -> str:
    with pytest.raises(CallError) as error:
        resolve(method, task, user, sources="command line")
    return str(error.value)


# -------------------------------------------------------------------- precedence
def test_user_wins_over_preset_wins_over_default():
    r = resolve("ppo", Lab(), {"lr": "0.5"})
    assert r.method.update().rule.lr == 0.5
    assert r.method.update().epochs == 3
    assert r.settings.collect.envs == 4
    assert r.settings.collect.steps == CollectSettings().steps
    assert (r.origin["updates.policy.rule.lr"], r.origin["updates.policy.epochs"]) == ("user", "task")
    assert (r.origin["collect.envs"], r.origin["collect.steps"]) == ("task", "default")


def test_user_setting_equal_to_the_default_still_wins_over_the_preset():
    r = resolve("ppo", Lab(), {"collect.envs": "8", "updates.policy.epochs": 10})
    assert (r.settings.collect.envs, r.method.update().epochs) == (8, 10)
    assert r.origin["collect.envs"] == "user"


def test_task_sees_the_method_with_the_users_parts_and_settings():
    class Curious(Lab):
        def preset(self, method):
            return {"collect.prompts": 64 // method.sampler.group_size}

    assert resolve("grpo", Curious(), {"group_size": 16}).settings.collect.prompts == 4


def test_preset_does_not_reach_into_a_part_that_the_user_replaced():
    r = resolve("ppo", Lab({"surrogate.high": 0.9}), {"surrogate": "clip-higher"})
    assert r.method.surrogate.high == 0.28


def test_preset_for_a_setting_that_the_method_lacks_is_skipped_but_an_unknown_run_setting_is_not():
    assert resolve("trpo", Lab({"lr": 0.1})).method.update().rule.name == "natural-gradient"
    with pytest.raises(CallError, match=r"unknown setting 'collect.env' \(preset of lab\), did you mean 'collect.envs'"):
        resolve("ppo", Lab({"collect.env": 1}))


def test_preset_may_choose_parts_unless_the_user_did():
    assert resolve("ppo", Lab({"aggregate": "seq-mean-token-sum"})).method.aggregate.name == "seq-mean-token-sum"
    chosen = resolve("ppo", Lab({"aggregate": "seq-mean-token-sum"}), {"aggregate": "token-mean"})
    assert chosen.method.aggregate.name == "token-mean"


def test_order_of_options_does_not_matter():
    a = resolve("ppo", Lab(), {"surrogate.high": 0.5, "surrogate": "clip-higher"}).method
    b = resolve("ppo", Lab(), {"surrogate": "clip-higher", "surrogate.high": 0.5}).method
    assert a == b
    assert (a.surrogate.low, a.surrogate.high) == (0.2, 0.5)


def test_later_layers_win_and_take_the_settings_of_replaced_parts_with_them():
    file = Layer({"surrogate": "clip", "surrogate.low": 0.1, "lr": 0.3}, "file")
    r = resolve("ppo", Lab(), [file, Layer({"surrogate": "clip-higher", "updates.policy.rule.lr": 0.4}, "command line")])
    assert r.method.surrogate.low == 0.2
    assert r.method.update().rule.lr == 0.4


def test_one_setting_under_two_names_is_refused():
    assert "'updates.policy.rule.lr' and 'lr' both set" in refused("ppo", Lab(), **{"lr": 1, "updates.policy.rule.lr": 2})


# -------------------------------------------------------------------- paths
@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("lr", "updates.policy.rule.lr"),
        ("rule.lr", "updates.policy.rule.lr"),
        ("rule", "updates.policy.rule"),
        ("epochs", "updates.policy.epochs"),
        ("target_kl", "updates.policy.target_kl"),
        ("group_size", "sampler.group_size"),
        ("surrogate.high", "surrogate.high"),
        ("penalty.coef", "penalty.kl-ref.coef"),
        ("penalty.kl-ref.coef", "penalty.kl-ref.coef"),
        ("task.min_len", "options.min_len"),
        ("collect.envs", "collect.envs"),
    ],
)
def test_shorthands(path, full):
    assert canonical(path, get_method("grpo")) == full


def test_updates_by_name():
    r = resolve("trpo", Lab({}), {"updates.critic.epochs": "7", "updates.critic.rule.lr": "1e-2"})
    assert (r.method.update("critic").epochs, r.method.update("critic").rule.lr) == (7, 0.01)
    assert r.method.update("policy") == get_method("trpo").update("policy")


def test_dashes_for_underscores():
    assert resolve("grpo", Lab({}), {"group-size": "4", "collect.max-new-tokens": "9"}).settings.collect.max_new_tokens == 9


def test_plural_slots():
    r = resolve("ppo", Lab({}), {"penalty": "kl-ref, entropy", "penalty.kl-ref.coef": "0.5"})
    assert [p.name for p in r.method.penalty] == ["kl-ref", "entropy"]
    assert r.method.penalty[0].coef == 0.5
    assert resolve("grpo", Lab({}), {"penalty": "none"}).method.penalty == ()
    assert "ambiguous: penalty.kl-ref.coef or penalty.entropy.coef" in refused(
        "ppo", Lab({}), **{"penalty": "kl-ref,entropy", "penalty.coef": "1"}
    )


def test_optional_slots_may_be_emptied_others_not():
    assert resolve("ppo", Lab({}), {"critic": "none", "advantage": "returns-to-go"}).method.critic is None
    assert "the slot cannot be empty" in refused("ppo", Lab({}), advantage="none")


def test_an_update_can_override_a_slot_and_its_settings():
    r = resolve("ppo", Lab({}), {"updates.policy.surrogate": "clip-higher", "updates.policy.surrogate.high": "0.4"})
    assert r.method.update().surrogate.high == 0.4
    assert r.method.surrogate == get_method("ppo").surrogate
    deeper = apply_override(r.method, "surrogate.low", 0.1)  # the acting part, not the method's idle one
    assert deeper.update().surrogate.low == 0.1


def test_method_set():
    assert get_method("ppo").set("surrogate.high", 0.3).surrogate.high == 0.3
    assert get_method("ppo").set("lr", 1).update().rule.lr == 1.0
    assert get_method("ppo").set("surrogate", "clip-higher").surrogate.high == 0.28
    assert get_method("ppo").surrogate.high == 0.2
    with pytest.raises(CallError, match="is a setting of the run"):
        get_method("ppo").set("collect.envs", 3)


def test_options_reach_the_task(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from polopt.part import Can\n"
        "class Mine:\n"
        "    name, domain, offers = 'mine', 'text', frozenset(Can)\n"
        "    def __init__(self, size=1, tags=()): self.size, self.tags = size, tags\n"
        "    def preset(self, method): return {}\n"
    )
    r = resolve("ppo", f"{file}:Mine", {"options.size": "3", "task.tags": "[a,b]"})
    assert (r.task.size, r.task.tags) == (3, ["a", "b"])
    assert "unexpected keyword argument 'colour'" in refused("ppo", f"{file}:Mine", **{"options.colour": "red"})


# -------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("policy.hidden", "64,32", (64, 32)),
        ("policy.hidden", "[64, 32]", (64, 32)),
        ("policy.hidden", "64", (64,)),
        ("policy.hidden", 64, (64,)),
        ("policy.hidden", "", ()),
        ("collect.stop", "a, b", ("a", "b")),
        ("collect.envs", "1e2", 100),
        ("collect.top_p", "1", 1.0),
        ("threads", "none", None),
        ("threads", "2", 2),
        ("policy.shared", "true", True),
        ("policy.shared", False, False),
        ("checkpoint.seconds", "inf", float("inf")),
        ("seed", 3.0, 3),
        ("advantage.scale", "none", "none"),
        ("policy.log_std", "-0.5", -0.5),
    ],
)
def test_values(path, text, value):
    r = resolve("grpo", Lab({}), {path: text})
    found = r.leaves()[path].value
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False, min_value=0), st.integers(min_value=0))
def test_numbers_survive_as_text(x, n):
    rate = Leaf("lr", float, 0.0)
    assert coerce(rate, repr(x)) == x
    assert coerce(Leaf("seed", int, 0), str(n)) == n


@given(st.sampled_from(["lr", "epochs", "surrogate.high", "advantage.gamma"]), st.floats(0, 1))
def test_replacing_touches_nothing_else(path, value):
    method = get_method("ppo")
    leaf = method_leaves(method)[canonical(path, method)]
    changed = method_leaves(replace_at(method, leaf.path.split("."), value if path != "epochs" else 1 + int(9 * value)))
    before = method_leaves(method)
    assert changed.keys() == before.keys()
    held = ("surrogate", "advantage", "updates.policy.rule")
    assert all(changed[k].value == before[k].value for k in before if k != leaf.path and k not in held)


# -------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("method", "user", "words"),
    [
        ("grop", {}, "unknown method 'grop', did you mean 'grpo'?"),
        (
            "ppo",
            {"surrogate": "clip-highr"},
            "surrogate (command line): unknown surrogate 'clip-highr', did you mean 'clip-hig",
        ),
        ("ppo", {"surrogate": "gae"}, "('gae' is a advantage)"),
        ("ppo", {"surogate": "clip"}, "unknown setting 'surogate' (command line), did you mean 'surrogate'?"),
        ("ppo", {"surrogate.hihg": "1"}, "unknown setting 'surrogate.hihg' (command line), did you mean 'surrogate.high'?"),
        ("ppo", {"gama": "1"}, "did you mean 'advantage.gamma'?"),
        ("ppo", {"envs": "1"}, "did you mean 'collect.envs'?"),
        ("ppo", {"learning_rat": "1"}, "unknown setting 'learning_rat'"),
        ("ppo", {"collect": "1"}, "'collect' (command line) is a section; set one of collect.envs"),
        ("ppo", {"updates.crtic.epochs": "1"}, "unknown setting 'updates.crtic.epochs'"),
        ("ppo", {"collect.envs": "0"}, "collect.envs = '0' (command line): must be >= 1 (expected integer, >= 1)"),
        ("ppo", {"collect.envs": "2.5"}, "collect.envs = '2.5' (command line): expected integer, >= 1"),
        ("ppo", {"collect.envs": "none"}, "collect.envs = 'none' (command line): expected integer"),
        ("ppo", {"collect.envs": True}, "collect.envs = True (command line): expected integer"),
        ("ppo", {"lr": "fast"}, "lr = 'fast' (command line): expected number, >= 0"),
        ("ppo", {"lr": "nan"}, "not a number"),
        ("ppo", {"lr": "-1"}, "must be >= 0"),
        ("ppo", {"policy.activation": "gelu"}, "expected tanh|relu|elu|silu"),
        ("ppo", {"policy.hidden": "64,x"}, "policy.hidden = '64,x' (command line): expected integers a,b,..."),
        ("ppo", {"policy.shared": "maybe"}, "expected true or false"),
        ("ppo", {"budget": "5-apples"}, "budget '5-apples' is not understood; write e.g. 200k-decisions"),
        ("ppo", {"budget": 500}, "budget = 500 (command line): expected text"),
        ("ppo", {"device": "gpu"}, "device = 'gpu' (command line): expected cpu, cuda or cuda:0"),
        ("ppo", {"device": "cuda:99"}, "CUDA devices; use cpu"),
        ("rloo", {"group_size": "1"}, "sampler.group_size = 1"),
        ("ppo", {"advantage": "/nowhere/mine.py:A"}, "there is no file /nowhere/mine.py"),
    ],
)
def test_refusals_name_value_source_and_fix(method, user, words):
    message = refused(method, Lab({}), **user)
    assert words in message


def test_parts_that_the_task_cannot_serve_are_refused_with_the_reason():
    text = Lab({})
    text.offers = frozenset(Can) - {Can.KL}
    assert "'natural-gradient' needs a closed-form KL divergence" in refused("trpo", text)
    control = Lab({})
    control.offers = frozenset(Can) - {Can.REFILL, Can.GROUPS}
    message = refused("dapo", control)
    assert "dapo cannot run on lab" in message
    assert "needs" in message


def test_real_tasks_refuse_what_cannot_work():
    assert "needs a closed-form KL divergence" in refused("trpo", "text:chain_sum")
    assert "dapo cannot run on gym:CartPole-v1" in refused("dapo", "gym:CartPole-v1")
    assert "did you mean 'CartPole-v1'" in refused("ppo", "gym:CartPole-v")
    assert "did you mean 'chain_sum'" in refused("grpo", "text:chain_sun")
    assert "unknown task 'gim:CartPole-v1'" in refused("ppo", "gim:CartPole-v1")
    assert "unknown task 'CartPole-v1'" in refused("ppo", "CartPole-v1")


# -------------------------------------------------------------------- a user's own code
OWN = """
from dataclasses import dataclass
from typing import Annotated
import torch
from polopt.method import Method
from polopt.part import Part, Range
from polopt.parts.advantage.gae import GAE
from polopt.registry import get_method

@dataclass(frozen=True)
class Half(Part):
    share: Annotated[float, Range(ge=0, le=1), "of the reward"] = 0.5
    def __call__(self, batch):
        return torch.full_like(batch.mask, self.share, dtype=torch.float32)

class More(GAE):
    pass

MINE = get_method("ppo").but("mine", epochs=2)
NUMBER = 3
"""


@pytest.fixture
def own(tmp_path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def test_own_parts_and_methods(own):
    r = resolve(f"{own}:MINE", Lab({}), {"advantage": f"{own}:Half", "advantage.share": "0.25", "critic": "none"})
    assert (r.method.name, r.method.update().epochs) == ("mine", 2)
    assert (r.method.advantage.share, r.method.advantage.kind, r.method.advantage.name) == (0.25, "advantage", "Half")
    assert resolve("ppo", Lab({}), {"advantage": f"{own}:More"}).method.advantage.describe().startswith("More(gamma")
    assert "must be <= 1" in refused(f"{own}:MINE", Lab({}), **{"advantage": f"{own}:Half", "advantage.share": "2"})


def test_own_code_that_is_something_else(own):
    assert "expected a Part" in refused("ppo", Lab({}), advantage=f"{own}:NUMBER")
    assert "expected a Method" in refused(f"{own}:NUMBER", Lab({}))
    assert "has no 'Halff', did you mean 'Half'" in refused("ppo", Lab({}), advantage=f"{own}:Halff")
    broken = own.with_name("broken.py")
    broken.write_text("1/0")
    assert "raised ZeroDivisionError" in refused("ppo", Lab({}), advantage=f"{broken}:X")


def test_parts_as_values_and_mappings():
    clip = get_method("ppo").surrogate.but(high=0.7)
    assert resolve("ppo", Lab({}), {"surrogate": clip}).method.surrogate is clip
    r = resolve("ppo", Lab({}), {"penalty": [{"part": "entropy", "coef": "0.5"}], "collect": {"envs": 2}})
    assert (r.method.penalty[0].coef, r.settings.collect.envs) == (0.5, 2)
    assert "got int" in refused("ppo", Lab({}), surrogate=3)


# -------------------------------------------------------------------- schema, cost
def test_schema_lists_every_setting_with_type_range_and_origin():
    found = {f.path: f for f in schema("ppo", Lab({"collect.envs": 2}), {"lr": 1})}
    envs = found["collect.envs"]
    assert (envs.type, envs.range, envs.default, envs.current, envs.origin) == ("integer", ">= 1", 8, 2, "task")
    assert "parallel environments" in envs.help
    assert found["surrogate"].type == "surrogate part"
    assert found["updates.policy.rule.lr"].origin == "user"
    assert found["surrogate.dual"].type == "number or none"
    every = {"policy." + k for k in PolicySettings.__dataclass_fields__}
    assert every <= found.keys()
    assert Settings.__dataclass_fields__.keys() - {"options"} <= {p.partition(".")[0] for p in found}


HEAVY = ("transformers", "datasets", "peft", "matplotlib", "tensorboard", "rich", "plotly", "mujoco", "tokenizers")


def imported_by(calls: list[list[str]], forbidden: tuple[str, ...]) -> list[str]:
    """Exit statuses of the calls, in one fresh process, and which of the forbidden modules are loaded then."""
    code = (
        "import sys\nfrom polopt.cli import main\n"
        f"print(*[main(c) for c in {calls!r}], [m for m in {forbidden!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1].split(maxsplit=len(calls))


def test_help_and_incomplete_calls_do_not_import_torch():
    calls = [["--version"], ["--help"], ["train", "--help"], ["train", "ppo"], ["trian"]]
    assert imported_by(calls, ("torch", "numpy", "yaml", *HEAVY)) == ["0", "0", "0", "2", "2", "[]"]


def test_wrong_calls_are_refused_before_anything_heavy_is_imported():
    calls = [
        ["train", "grop", "text:chain_sum"],
        ["train", "grpo", "text:chain_sun"],
        ["train", "grpo", "text:chain_sum", "--lr", "x"],
        ["train", "trpo", "text:chain_sum"],
        ["train", "grpo", "data:nowhere.jsonl", "--options.reward", "exact"],
    ]
    assert imported_by(calls, (*HEAVY, "gymnasium", "reasoning_gym")) == ["2"] * len(calls) + ["[]"]
    assert imported_by([["train", "ppo", "gym:CartPole-v1", "--epochs", "0"]], (*HEAVY, "reasoning_gym")) == ["2", "[]"]
