"""Settings under which methods learn control tasks, by the environment's family and by what a method is made of."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, Literal

from polopt.part import Can
from polopt.update import Update

#: How a method uses what it collects: whole episodes; fragments in several epochs or minibatches; one step within a trust
#: region; one small gradient step per fragment; or many on transitions that are kept.
Style = Literal["episodes", "reuse", "trust", "online", "replay"]

#: families of environments; the first pattern that fits an id decides
FAMILIES = {
    "CartPole-*": "cartpole",
    "Pendulum-*": "pendulum",
    **dict.fromkeys(("Acrobot-*", "MountainCar*", "LunarLander*"), "sparse"),
    **dict.fromkeys(("HalfCheetah-*", "Hopper-*", "Walker2d-*", "Ant-*", "Humanoid*"), "mujoco"),
    **dict.fromkeys(("Swimmer-*", "Reacher-*", "Pusher-*", "Inverted*"), "mujoco"),
}

SCALED = {"policy.normalize_obs": True, "policy.normalize_reward": True}
#: what a family asks for, whatever the method
ENVIRONMENT: dict[str, dict[str, Any]] = {
    "pendulum": {**SCALED, "advantage.gamma": 0.9},
    "sparse": SCALED,
    # early gaits need their noise: greedy scores say little about the policy that is improved
    "mujoco": {**SCALED, "evaluate.greedy": False, "evaluate.episodes": 16},
}
#: how much one iteration collects, and how fast a method of this style moves
STYLE: dict[Style, dict[str, Any]] = {
    "reuse": {"collect.steps": 128, "minibatch": 256, "rule.lr": 3e-4},
    "trust": {"collect.steps": 128},
    # RMSProp that starts from a mean square of 1 and forgets it over a hundred steps would stand still for most of a short run
    "online": {"collect.steps": 8, "rule.lr": 2e-3, "rule.alpha": 0.9, "policy.normalize_reward": True},
    "episodes": {"collect.episodes": 8, "rule.lr": 3e-3},
    # one environment, and a block of as many rounds of updates as decisions; critics see observations and rewards as they are
    "replay": {
        "collect.envs": 1,
        "collect.steps": 32,
        "policy.hidden": (256, 256),
        "policy.activation": "relu",
        "evaluate.points": 5,  # evaluations also measure the critic, which the first one cannot
    },
}
#: where a family and a style together want something else
BOTH: dict[tuple[str, Style], dict[str, Any]] = {
    ("cartpole", "reuse"): {"rule.lr": 1e-3, "rule.schedule": "linear"},
    ("pendulum", "reuse"): {"collect.steps": 256, "minibatch": 64, "rule.lr": 1e-3},
    ("pendulum", "trust"): {"collect.steps": 256},
    ("mujoco", "reuse"): {"collect.steps": 256, "minibatch": 64, "rule.schedule": "linear"},
    ("mujoco", "trust"): {"collect.steps": 256},
    ("mujoco", "online"): {"rule.lr": 7e-4},
}

#: fields of a rule that matter only with certain values of others
MATTERS: dict[str, Callable[[Any], bool]] = {
    "alpha": lambda rule: str(getattr(rule, "optimizer", "")).startswith("rmsprop"),
}


def style_of(method: Any) -> Style:
    """How `method` uses what it collects."""
    main = method.updates[0] if method.updates else Update()
    if Can.NETS in method.requires():
        return "replay"
    if method.requires() & {Can.EPISODES, Can.GROUPS}:
        return "episodes"
    if not hasattr(main.rule, "lr"):
        return "trust"
    many = main.epochs > 1 or main.minibatch is not None or (main.minibatches or 1) > 1
    return "reuse" if many else "online"


def preset(env: str, method: Any) -> dict[str, Any]:
    """Dotted settings for environment `env` and a method with these properties; only fields that the method has."""
    family = next((name for pattern, name in FAMILIES.items() if fnmatchcase(env, pattern)), "")
    style = style_of(method)
    kept = {k: v for k, v in ENVIRONMENT.get(family, {}).items() if style != "replay" or k not in (*SCALED, "advantage.gamma")}
    wanted = {"threads": 1, "collect.envs": 8, **STYLE[style], **kept, **BOTH.get((family, style), {})}
    main = method.updates[0] if method.updates else Update()
    if style == "episodes" and getattr(method.sampler, "group_size", 1) > 1:
        wanted["collect.episodes"] = 4  # start seeds, each with a group of episodes
    chosen: dict[str, Any] = {}
    for path, value in wanted.items():
        head, _, field = path.partition(".")
        if head == "rule":
            if hasattr(main.rule, field) and MATTERS.get(field, bool)(main.rule):
                chosen[f"updates.{main.name}.{path}"] = value
        elif head == "advantage":
            if hasattr(method.advantage, field):
                chosen[path] = value
        elif head == "minibatch":
            chosen[f"updates.{main.name}.minibatch"] = value
        else:
            chosen[path] = value
    return chosen
