"""Minari datasets in and out: `from_minari` reads one into `Transitions`, `to_minari` writes them. Never uses the network.

A dataset is named by its folder, or by its id below MINARI_DATASETS_PATH (default ~/.minari/datasets).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polopt.collect.transitions import Transitions
from polopt.errors import CallError, nearest
from polopt.policies.mlp_spaces import Action, Observation

Array = NDArray[Any]
ID = re.compile(r"(?:[-_\w][-_\w/]*[-_\w]+/)?[-_\w]+-v\d+")  # an id of Minari's with its version
CHANNELS = "reward_channels"  # info of a step: rewards that were several, one by one
SLACK = 1e-4  # actions may exceed their bounds by so much of the range (rounding)


def datasets_root() -> Path:
    """Where datasets lie by id; it need not exist."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets").expanduser()


def locate(source: str | Path) -> Path | None:
    """The data folder of a dataset given by its folder or id; None when there is none."""
    for folder in (Path(source).expanduser(), datasets_root() / source):
        for data in (folder / "data", folder):
            if (data / "metadata.json").is_file():
                return data
    return None


# -------------------------------------------------------------------- reading
def from_minari(
    source: str | Path, *, observation: Observation | None = None, action: Action | None = None, task: str = ""
) -> Transitions:
    """All transitions of a dataset, checked.

    With the spaces of a `task`, the dataset's must agree with them and observations are encoded as the task's. Raises `CallError`
    naming the dataset and the field for one that is missing, empty, damaged, of other spaces, or that holds NaN or infinity.
    """
    name, data = str(source), locate(source)
    if data is None:
        raise CallError(
            f"there is no Minari dataset '{name}': neither a folder of that name with data/metadata.json, nor an id below "
            f"{datasets_root()}{_known(name)}; get it with 'minari download {name}' or set MINARI_DATASETS_PATH"
        )
    dataset = _open(data, name)
    found_observation = Observation.of(dataset.observation_space, f"dataset '{name}'")
    found_action = Action.of(dataset.action_space, f"dataset '{name}'")
    if dataset.total_episodes == 0 or dataset.total_steps == 0:
        raise CallError(f"dataset '{name}' is empty: it has {dataset.total_episodes} episodes and {dataset.total_steps} steps")
    spec = dataset.env_spec
    empty = Transitions(
        name, found_observation, found_action, *(np.zeros(0),) * 7, env=None if spec is None else _json(spec)
    )  # its columns follow; what can be told from the spaces is told before anything is read
    if observation is not None and action is not None:
        check_spaces(empty, observation, action, task)
        found_observation, found_action = observation, action
    columns: list[tuple[Array, ...]] = []
    for i, episode in enumerate(_episodes(dataset, name)):
        columns.append(_columns(episode, i, name, found_observation, found_action))
    obs, act, reward, ended, cut, after, start = (np.concatenate(c) for c in zip(*columns, strict=True))
    return replace(
        empty, observation=found_observation, action_space=found_action, obs=obs, action=act, reward=reward, terminated=ended,
        truncated=cut, next_obs=after, start=start,
    )  # fmt: skip


def check_spaces(found: Transitions, observation: Observation, action: Action, task: str) -> None:
    """Raise `CallError` when a dataset's spaces are not those of a task."""
    pairs: tuple[tuple[str, Any, Any], ...] = (
        ("observation", found.observation, observation),
        ("action", found.action_space, action),
    )
    for what, has, wants in pairs:
        same = (has.kind, has.shape, has.counts) == (wants.kind, wants.shape, wants.counts)
        same = same and (has.dtype == "|u1") == (wants.dtype == "|u1")
        if same and what == "action":
            same = np.allclose(has.low, wants.low) and np.allclose(has.high, wants.high)
        if not same:
            raise CallError(
                f"dataset '{found.name}' has the {what} space {_space(has)}, but the task {task} has {_space(wants)}: it was not "
                "recorded in this task"
            )


def _space(space: Observation | Action) -> str:
    if space.kind != "box":
        return f"{space.kind} {list(space.counts)}"
    bounds = ""
    if isinstance(space, Action):
        low, high = (f"{v[0]:g}" if len(set(v)) == 1 else str(list(v)) for v in (space.low, space.high))
        bounds = f" within [{low}, {high}]"
    return f"box of shape {space.shape}{bounds}"


def _open(data: Path, name: str) -> Any:
    minari = _minari()
    try:
        return minari.MinariDataset(data)
    except Exception as error:
        raise CallError(f"dataset '{name}' at {data} cannot be read: {type(error).__name__}: {error}") from error


def _minari() -> Any:
    try:
        import h5py  # noqa: F401
        import minari
    except ImportError as error:
        raise CallError(f"Minari datasets need the extra 'offline': pip install 'polopt[offline]' ({error})") from error
    return minari


def _episodes(dataset: Any, name: str) -> Iterator[Any]:
    found = dataset.iterate_episodes()
    while True:
        try:
            episode = next(found)
        except StopIteration:
            return
        except Exception as error:
            raise CallError(f"dataset '{name}' is damaged: {type(error).__name__}: {error}") from error
        yield episode


def _columns(episode: Any, i: int, name: str, observation: Observation, action: Action) -> tuple[Array, ...]:
    """(obs, action, reward, terminated, truncated, next_obs, start) of one episode."""
    steps = len(episode.rewards)
    fields = {
        "observations": (np.asarray(episode.observations), (steps + 1, *observation.shape)),
        "actions": (np.asarray(episode.actions), (steps, *action.shape)),
        "rewards": (np.asarray(episode.rewards), (steps,)),
        "terminations": (np.asarray(episode.terminations), (steps,)),
        "truncations": (np.asarray(episode.truncations), (steps,)),
    }
    for field, (x, expected) in fields.items():
        if x.shape != expected:
            raise CallError(f"dataset '{name}': {field} of episode {i} have shape {x.shape}, expected {expected}")
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            at = tuple(int(k) for k in np.argwhere(~np.isfinite(x))[0])
            raise CallError(f"dataset '{name}': {field} of episode {i} hold {x[at]} in step {at[0]}; expected finite numbers")
    raw, taken, reward, ended, cut = (x for x, _ in fields.values())
    _check_range(raw, observation, f"dataset '{name}': observations of episode {i}")
    _check_range(taken, action, f"dataset '{name}': actions of episode {i}")
    encoded = observation.encode(raw)
    channels = (episode.infos or {}).get(CHANNELS)
    rewards = reward[:, None] if channels is None else np.asarray(channels)[:steps]
    start = np.zeros(steps, dtype=bool)
    start[:1] = True
    flat = taken.reshape(steps, -1) if action.shape else taken
    return (
        encoded[:-1], flat.astype(np.float32 if action.kind == "box" else np.int64), rewards.astype(np.float32),
        ended.astype(bool), cut.astype(bool), encoded[1:], start,
    )  # fmt: skip


def _check_range(x: Array, space: Observation | Action, what: str) -> None:
    """Integers must be of their space, and continuous actions within their bounds (up to rounding)."""
    if space.kind != "box":
        low = np.asarray(space.start if space.shape else space.start[0])
        high = low + np.asarray(space.counts if space.shape else space.counts[0]) - 1
        bad = (x < low) | (x > high)
    elif isinstance(space, Action):
        low, high = (np.reshape(v, space.shape) for v in (space.low, space.high))
        with np.errstate(invalid="ignore"):
            slack = np.where(np.isfinite(high - low), SLACK * (high - low), 0.0)
        bad = (x < low - slack) | (x > high + slack)
    else:
        return
    if bad.any():
        at = tuple(int(k) for k in np.argwhere(bad)[0])
        raise CallError(f"{what} hold {x[at]} in step {at[0]}, which is not in the space {_space(space)}")


def _known(name: str) -> str:
    root = datasets_root()
    if not root.is_dir():
        return ""
    ids = [p.parent.parent.relative_to(root).as_posix() for p in root.glob("**/data/metadata.json")]
    return nearest(name, ids)


# -------------------------------------------------------------------- writing
def to_minari(transitions: Transitions, target: str | Path, *, env: Any = None, description: str = "") -> Path:
    """Write transitions as a new Minari dataset (HDF5), whole or not at all; returns its folder.

    target: an id such as `me/pendulum-v0` (below MINARI_DATASETS_PATH) or a folder. env: the environment's id, spec or JSON of
    its spec, with which the dataset can be evaluated. Rewards of several channels are added up, and kept one by one as infos.
    Raises `CallError` when the target exists or there is nothing to write.
    """
    _minari()
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    if not len(transitions):
        raise CallError(f"nothing to write to {target}: {transitions.name} holds no transitions")
    by_id = isinstance(target, str) and ID.fullmatch(target) is not None
    folder = (datasets_root() / target if by_id else Path(target).expanduser()).absolute()
    if folder.exists():
        raise CallError(f"{folder} exists already; remove it or choose another name for the dataset")
    plain = re.sub(r"[^-_\w]", "-", folder.name)
    name = str(target) if by_id else plain if ID.fullmatch(plain) else f"{plain}-v0"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        (temporary / "data").mkdir(parents=True)
        observation, action = _observation_space(transitions.observation), _action_space(transitions.action_space)
        storage = MinariStorage.new(temporary / "data", observation, action, _spec(env, transitions), jpeg_encoding=False)
        from minari import __version__

        storage.update_metadata({"dataset_id": name, "minari_version": __version__, "description": description or transitions.name})
        storage.update_episodes(EpisodeBuffer(id=None, **e) for e in _buffers(transitions))
        if by_id and "/" in name and (space := name.rpartition("/")[0]) not in list_local_namespaces():
            create_namespace(space)
        temporary.rename(folder)
    except OSError as error:
        raise CallError(f"cannot write the dataset {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _buffers(transitions: Transitions) -> Iterator[dict[str, Any]]:
    """Episodes as Minari keeps them: one observation more than decisions."""
    t = transitions
    for a, b in t.episodes():
        cut = t.truncated[a:b].copy()
        cut[-1] |= not t.terminated[b - 1]
        found = {
            "observations": decode(t.observation, np.concatenate((t.obs[a:b], t.next_obs[b - 1 : b]))),
            "actions": t.action[a:b].reshape(-1, *t.action_space.shape).astype(t.action_space.dtype),
            "rewards": t.reward[a:b].sum(1, dtype=np.float64), "terminations": t.terminated[a:b], "truncations": cut,
        }  # fmt: skip
        yield found | ({"infos": {CHANNELS: t.reward[a:b]}} if t.reward.shape[1] > 1 else {})


def decode(observation: Observation, encoded: NDArray[np.float32]) -> Array:
    """Raw observations [n,...] of encoded ones [n,D]: the inverse of `Observation.encode`."""
    if observation.kind == "box":
        values: Array = np.rint(encoded * 255) if observation.dtype == "|u1" else encoded
        return values.reshape(-1, *observation.shape).astype(observation.dtype)
    parts = np.split(encoded, np.cumsum(observation.counts)[:-1], axis=1)
    raw: Array = np.stack([p.argmax(1) for p in parts], 1) + np.asarray(observation.start)
    found: Array = raw.reshape(-1, *observation.shape).astype(observation.dtype)
    return found


def _observation_space(observation: Observation) -> Any:
    from gymnasium import spaces

    if observation.kind == "box":
        dtype: Any = np.dtype(observation.dtype)
        low, high = (0, 255) if dtype == np.uint8 else (-np.inf, np.inf) if dtype.kind == "f" else (0, 1)
        return spaces.Box(low, high, observation.shape, dtype)
    return _discrete(observation)


def _action_space(action: Action) -> Any:
    from gymnasium import spaces

    if action.kind != "box":
        return _discrete(action)
    dtype: Any = np.dtype(action.dtype)
    low, high = (np.reshape(v, action.shape).astype(dtype) for v in (action.low, action.high))
    return spaces.Box(low, high, dtype=dtype)


def _discrete(space: Observation | Action) -> Any:
    from gymnasium import spaces

    if space.kind == "discrete":
        return spaces.Discrete(space.counts[0], start=space.start[0])
    return spaces.MultiDiscrete(np.array(space.counts), start=np.array(space.start))


def _spec(env: Any, transitions: Transitions) -> Any:
    import gymnasium as gym

    env = transitions.env if env is None else env
    if env is None or isinstance(env, gym.envs.registration.EnvSpec):
        return env
    return gym.envs.registration.EnvSpec.from_json(env) if env.lstrip().startswith("{") else gym.spec(env)


def _json(spec: Any) -> str | None:
    try:
        return str(spec.to_json())
    except Exception:  # wrappers that cannot be written
        return None


def cached(name: str, make: Callable[[], Transitions]) -> Transitions:
    """The dataset `name`, made and written when it is not there yet; not written where that is impossible."""
    version = f"{name}-v0"
    if locate(version) is None:
        found = make()
        try:
            to_minari(found, version)
        except CallError:  # no extra `offline`, no right to write there, or another process was faster
            return found
    return from_minari(version)


__all__ = ["ID", "cached", "check_spaces", "datasets_root", "decode", "from_minari", "locate", "to_minari"]
