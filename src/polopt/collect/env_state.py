"""States of environments as plain numbers and arrays, so that a resumed run continues bit for bit.

A table by family says where an environment keeps what changes: classic control, toy text, MuJoCo. An environment or
vector environment of your own joins by two methods, `save_state() -> dict` of numbers, strings, arrays and lists, and
`load_state(dict)`; they need not cover `np_random`. Any other environment, and any wrapper that is not listed, cannot be saved.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polopt.interfaces import State

#: attributes that change while an environment of the family runs, by the module it comes from
FAMILIES: dict[str, tuple[str, ...]] = {
    "gymnasium.envs.classic_control": ("state", "steps_beyond_terminated", "last_u"),
    "gymnasium.envs.toy_text": (
        "s", "lastaction", "fickle_step", "taxi_orientation",
        "dealer", "player", "dealer_top_card_suit", "dealer_top_card_value_str",
    ),
    "gymnasium.envs.mujoco": ("goal", "goal_pos", "cylinder_pos"),
}  # fmt: skip
#: attributes that change in a wrapper; wrappers without any are listed too, others are unknown
WRAPPERS: dict[str, tuple[str, ...]] = {
    "TimeLimit": ("_elapsed_steps",),
    "OrderEnforcing": ("_has_reset",),
    "PassiveEnvChecker": ("checked_reset", "checked_step"),
    "ClipAction": (), "RescaleAction": (), "FlattenObservation": (), "RescaleObservation": (), "DtypeObservation": (),
    "ReshapeObservation": (), "TransformObservation": (), "TransformAction": (), "TransformReward": (), "ClipReward": (),
    "FilterObservation": (), "GrayscaleObservation": (), "ResizeObservation": (),
}  # fmt: skip
#: native vector environments and their attributes
VECTORS: dict[str, tuple[str, ...]] = {"CartPoleVectorEnv": ("state", "steps", "prev_done", "low", "high")}


def save(env: Any) -> State | None:
    """The state of a Gymnasium environment under its wrappers; None when it cannot be saved."""
    wrappers: list[State] = []
    while env is not env.unwrapped:
        name = type(env).__name__
        if name not in WRAPPERS or not type(env).__module__.startswith("gymnasium."):
            return None
        wrappers.append({"name": name, **{k: getattr(env, k) for k in WRAPPERS[name] if hasattr(env, k)}})
        env = env.env
    found: State = {"wrappers": wrappers, "random": _random(env)}
    if hasattr(env, "save_state") and hasattr(env, "load_state"):
        return {**found, "own": env.save_state()}
    names = _family(env)
    if names is None:
        return None
    found["plain"] = {k: _pack(getattr(env, k)) for k in names if hasattr(env, k)}
    if hasattr(env, "data") and hasattr(env, "model"):
        found["physics"] = _save_physics(env)
    return found


def load(env: Any, state: State) -> None:
    """Restore what `save` returned."""
    for saved in state["wrappers"]:
        for name, value in saved.items():
            if name != "name":
                setattr(env, name, value)
        env = env.env
    _set_random(env, state["random"])
    if "own" in state:
        env.load_state(state["own"])
        return
    for name, value in state["plain"].items():
        setattr(env, name, _unpack(value))
    if "physics" in state:
        _load_physics(env, state["physics"])


def save_vector(venv: Any) -> State | None:
    """The state of a native vector environment; None when it cannot be saved."""
    if hasattr(venv, "save_state") and hasattr(venv, "load_state"):
        return {"own": venv.save_state(), "random": _random(venv)}
    name = type(venv).__name__
    if name not in VECTORS or not type(venv).__module__.startswith("gymnasium."):
        return None
    return {"plain": {k: _pack(getattr(venv, k)) for k in VECTORS[name]}, "random": _random(venv)}


def load_vector(venv: Any, state: State) -> None:
    """Restore what `save_vector` returned."""
    if "own" in state:
        venv.load_state(state["own"])
        _set_random(venv, state["random"])
        return
    for name, value in state["plain"].items():
        setattr(venv, name, _unpack(value))
    _set_random(venv, state["random"])


def _family(env: Any) -> tuple[str, ...] | None:
    return next((names for module, names in FAMILIES.items() if type(env).__module__.startswith(module)), None)


def _random(env: Any) -> State | None:
    generator = env._np_random  # the property would seed an unseeded one
    return None if generator is None else generator.bit_generator.state


def _set_random(env: Any, state: State | None) -> None:
    if state is not None:
        env.np_random.bit_generator.state = state


def _pack(value: Any) -> Any:
    """A value that survives a checkpoint: arrays, numbers, strings, and tuples of them (which would come back as lists)."""
    if isinstance(value, tuple):
        return {"tuple": [_pack(v) for v in value]}
    if isinstance(value, list):
        return {"list": [_pack(v) for v in value]}
    if isinstance(value, np.generic):
        return {"scalar": value.item(), "dtype": value.dtype.str}
    return np.array(value) if isinstance(value, np.ndarray) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_unpack(v) for v in value["tuple"])
        if "list" in value:
            return [_unpack(v) for v in value["list"]]
        return np.dtype(value["dtype"]).type(value["scalar"])
    return np.array(value) if isinstance(value, np.ndarray) else value


# -------------------------------------------------------------------- MuJoCo
#: Results of the last step that an environment may read before the next one (the positions of bodies, say). They belong to
#: the state before the last integration, so recomputing them would give other numbers.
PHYSICS = (
    "xpos", "xquat", "xmat", "xipos", "ximat", "xanchor", "xaxis", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat",
    "subtree_com", "cinert", "cvel", "cacc", "cfrc_ext", "cfrc_int", "qacc", "qfrc_actuator", "qfrc_constraint",
    "actuator_force", "actuator_length", "actuator_velocity", "sensordata", "ten_length", "ten_velocity",
)  # fmt: skip


def _save_physics(env: Any) -> State:
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, spec))
    mujoco.mj_getState(env.model, env.data, state, spec)
    return {"state": state, "arrays": {k: np.array(getattr(env.data, k)) for k in PHYSICS if hasattr(env.data, k)}}


def _load_physics(env: Any, saved: State) -> None:
    import mujoco

    mujoco.mj_setState(env.model, env.data, saved["state"], mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(env.model, env.data)
    mujoco.mj_setState(env.model, env.data, saved["state"], mujoco.mjtState.mjSTATE_INTEGRATION)  # forward moves the warm start
    for name, value in saved["arrays"].items():
        getattr(env.data, name)[...] = value
