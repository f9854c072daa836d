"""`VectorCollector`: answers requests by acting in vector environments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polopt.batch import Batch, Clock, Final
from polopt.collect.behave import Behaviour
from polopt.collect.envs import Envs, InProcess, Vector
from polopt.collect.episodes import run_episodes
from polopt.collect.rewards import DiscountedReturns, EpisodeCounter
from polopt.errors import CallError, PoloptError
from polopt.interfaces import Recorder, Request, State
from polopt.part import Can, Part
from polopt.policies.mlp import MLPPolicy
from polopt.run import Streams
from polopt.settings import Settings
from polopt.stats import OLD
from polopt.tasks.gym import GymTask

Array = NDArray[Any]
TRAIN_SEEDS = 2**31  # start seeds of training lie below, held-out ones from here on


class VectorCollector:
    """Rows of decisions from environments.

    Fragments (`whole=False`): a row is one of `collect.envs` environments, which keep running, for `collect.steps`
    decisions. Whole episodes: a row is one episode from a start seed (`Request.item`), padded on the right.

    Acting draws all noise of a rollout beforehand and computes only the actor, in NumPy. What is needed besides
    (what the policy says it `recorded`, such as `logp@behaviour`, and the statistics `also`, at the view "old") is computed in
    one pass over the whole rollout, with the same weights and observation statistics, so these are the numbers acted from.
    """

    def __init__(
        self,
        task: GymTask,
        policy: MLPPolicy,
        settings: Settings,
        whole: bool,
        seed: int,
        *,
        gamma: float = 0.99,
        also: frozenset[str] = frozenset(),
        recorded: bool = True,
        explore: Part | None = None,
        start: int = 0,
    ) -> None:
        self.task, self.policy, self.settings, self.whole = task, policy, settings, whole
        self.also, self.recorded = also, recorded
        if whole and settings.collect.vectorize != "sync":
            raise CallError(
                f"collect.vectorize = '{settings.collect.vectorize}': the method needs whole episodes, which are stepped in "
                "this process; use collect.vectorize = 'sync'"
            )
        self.exact = True
        self.streams = Streams(seed)
        self._envs: Envs | None = None
        self._solo: list[Any] = []  # environments for whole episodes and evaluation
        self._obs: NDArray[np.float32] | None = None  # where each running environment stands [n,D]
        self._resetting = np.zeros(settings.collect.envs, dtype=bool)  # the next step only resets (NEXT_STEP)
        self._taken = 0  # steps of each running environment so far
        self._episodes = EpisodeCounter(settings.collect.envs)
        self._rewards = DiscountedReturns(settings.collect.envs, gamma) if settings.policy.normalize_reward else None
        self._costs = {"decisions": 0, "env_steps": 0}
        rng = self.streams.numpy("explore") if explore is not None or start else np.random.default_rng(0)
        self._behave = Behaviour(policy.head, explore, start, settings.collect.envs, rng)

    # ---------------------------------------------------------------- the protocol
    size = 0  # environments and start seeds are not counted

    @property
    def want(self) -> int:
        """Items per iteration: start seeds where episodes are whole, else running environments."""
        return self.settings.collect.episodes if self.whole else self.settings.collect.envs

    def draw(self, n: int) -> list[int | None]:
        """n fresh start seeds, or with fragments n times "any running environment"."""
        if not self.whole:
            return [None] * n
        return [int(s) for s in self.streams.numpy("items").integers(0, TRAIN_SEEDS, n)]

    def answer(self, requests: Sequence[Request], *, clock: Clock) -> Batch:
        """A scored batch with one group per request. Raises `PoloptError` when an environment fails."""
        for r in requests:
            if r.context is not None or r.prefix is not None or r.temperature is not None or r.limit is not None:
                raise CallError("control tasks answer requests of an item and a count alone")
            if (r.item is not None) != self.whole:
                wants = "a start seed as item" if self.whole else "no item (any running environment)"
                raise CallError(f"this collector expects requests with {wants}, got item {r.item}")
        counts = torch.tensor([r.count for r in requests])
        batch = self._whole(requests) if self.whole else self._fragment(int(counts.sum()))
        group = torch.repeat_interleave(torch.arange(len(requests)), counts)
        batch = replace(batch, group=group, units={"group": len(requests)}, clock=clock)
        if self.whole:
            batch = batch.with_key("item", torch.tensor([r.item for r in requests])[group])
        batch = batch.to(self.policy.device)
        if not self.recorded:
            return batch
        if isinstance(self.policy, Recorder):
            batch = batch.adding(self.policy.record(batch, self.streams.torch("record")))
        found = self.policy.evaluate(batch, self.policy.recorded | self.also, OLD)
        # the policy acted with the parameters that the update starts from: both views are this one pass
        drawn = {"logp@behaviour": found["logp"]} if "logp" in found else {}
        return batch.adding({**drawn, **{f"{k}@old": v for k, v in found.items()}})

    def evaluate(self, episodes: int) -> dict[str, float]:
        """Mean return ("score"), its deviation over episodes, and mean length, from the same held-out seeds each time."""
        greedy = self.settings.evaluate.greedy
        rng = np.random.default_rng(TRAIN_SEEDS)
        seeds = range(TRAIN_SEEDS, TRAIN_SEEDS + episodes)
        found = self._run(seeds, rng=None if greedy else rng, keep=False)
        return {
            "score": float(found.returns.mean()),
            "score_std": float(found.returns.std()),
            "episodes": float(episodes),
            "length": float(found.lengths.mean()),
        }

    def report(self) -> dict[str, float]:
        """Mean return and length of the episodes that ended since the last call, and their number."""
        return self._episodes.report()

    def costs(self) -> dict[str, int]:
        """Decisions and environment steps since the last call."""
        spent, self._costs = self._costs, {"decisions": 0, "env_steps": 0}
        return spent

    def close(self) -> None:
        """Close all environments."""
        for env in (*self._solo, *([self._envs] if self._envs else [])):
            env.close()
        self._solo, self._envs = [], None

    # ---------------------------------------------------------------- fragments
    def _start(self) -> Envs:
        """The running environments; made and reset at the first call."""
        if self._envs is None:
            n, how = self.settings.collect.envs, self.settings.collect.vectorize
            observation = self.policy.observation
            if how == "sync":
                self._envs = InProcess([self.task.make() for _ in range(n)], observation, self.task.name)
            else:
                self._envs = Vector(self.task.make_vector(n, how), self.task.name)
            seeds = self.streams.numpy("starts").integers(0, TRAIN_SEEDS, n).tolist()
            self._obs = observation.encode(self._envs.reset(seeds))
            self._resetting[:] = False
        return self._envs

    def _fragment(self, rows: int) -> Batch:
        envs = self._start()
        if rows != envs.n:
            raise CallError(f"requests ask for {rows} rows, but collect.envs = {envs.n} environments run")
        steps, n = self.settings.collect.steps, envs.n
        observation, head, actor = self.policy.observation, self.policy.head, self.policy.actor()
        obs = np.empty((steps + 1, n, observation.size), dtype=np.float32)
        assert self._obs is not None
        obs[0] = self._obs
        noise, behave = head.noise(self.streams.numpy("act"), (steps, n)), self._behave
        actions: list[Array] = []
        reward, ends, cuts = np.empty((steps, n)), np.empty((steps, n), dtype=bool), np.empty((steps, n), dtype=bool)
        last: list[tuple[int, int, Array]] = []
        for t in range(steps):
            action = actor(obs[t], noise[t])
            if not behave.passive:
                action = behave(action)
            actions.append(action)
            try:
                raw, reward[t], ends[t], cuts[t], finished = envs.step(head.outward(action))
            except PoloptError as error:
                self._refuse_bad(obs[: t + 1], reward[:t])  # its cause may be an earlier NaN
                raise PoloptError(f"{error} (in step {self._taken + t})") from error
            observation.encode(raw, obs[t + 1])
            if finished:
                last += [(i, t, o) for i, o in finished.items()]
            if behave.explore is not None:
                behave.ended(ends[t] | cuts[t])
        self._refuse_bad(obs, reward)
        self._obs, self._taken = obs[steps], self._taken + steps
        mask = self._mask(ends | cuts, envs.next_step)
        self._costs["decisions"] += int(mask.sum())
        self._costs["env_steps"] += steps * n
        self._episodes.add(reward * mask, mask, ends | cuts)
        if self._rewards is not None:
            reward = self._rewards.normalise(reward, mask, ends | cuts, self.policy.reward_moments)
        return Batch(
            mask=_rows(mask),
            reward=_rows(reward.astype(np.float32))[..., None],
            terminated=_rows(ends),
            truncated=_rows(cuts),
            obs=_rows(obs[:steps]),
            action=_rows(np.stack(actions)),
            final=self._final(ends, cuts, obs[steps], last),
            horizon=steps,
        )

    def _mask(self, done: Array, next_step: bool) -> Array:
        """Steps that the policy decided: all, but for those that only reset a finished environment."""
        if not next_step:
            return np.ones_like(done)
        resets = np.concatenate([self._resetting[None], done[:-1]])
        self._resetting = done[-1].copy()
        return ~resets

    def _final(self, ends: Array, cuts: Array, after: NDArray[np.float32], last: list[tuple[int, int, Array]]) -> Final:
        """True next observations where rows are cut: at truncations, and at the ends of rows that go on."""
        steps = ends.shape[0]
        kept = [(i, t, o) for i, t, o in last if not ends[t, i]]
        going = (~(ends[-1] | cuts[-1])).nonzero()[0]
        at = [(i, t) for i, t, _ in kept] + [(int(i), steps - 1) for i in going]
        obs = after[going]
        if kept:
            obs = np.concatenate([self.policy.observation.encode(np.stack([o for _, _, o in kept])), obs])
        if not np.isfinite(obs).all():
            i, t = at[int((~np.isfinite(obs).all(1)).nonzero()[0][0])]
            raise PoloptError(
                f"environment {i} of {self.task.name} returned an observation that is not finite at the end in step {t}"
            )
        return Final(torch.tensor(at, dtype=torch.int64).reshape(-1, 2), torch.from_numpy(obs))

    def _refuse_bad(self, obs: Array, reward: Array) -> None:
        """Raise `PoloptError` naming environment and step of the first number that is not finite."""
        for what, bad, first in (("observation", ~np.isfinite(obs).all(-1), -1), ("reward", ~np.isfinite(reward), 0)):
            if bad.any():
                t, i = (int(k) for k in np.argwhere(bad)[0])
                value = (obs if what == "observation" else reward)[t, i]
                raise PoloptError(
                    f"environment {i} of {self.task.name} returned the {what} {value} in step {self._taken + t + first}, "
                    "which is not finite"
                )

    # ---------------------------------------------------------------- whole episodes
    def _run(self, seeds: Sequence[int], rng: np.random.Generator | None, *, keep: bool) -> Any:
        while len(self._solo) < min(len(seeds), max(8, self.settings.collect.envs)):
            self._solo.append(self.task.make())
        head, actor = self.policy.head, self.policy.actor()

        def act(obs: NDArray[np.float32]) -> Array:
            return actor(obs, None if rng is None else head.noise(rng, (obs.shape[0],)))

        return run_episodes(self._solo, seeds, act, head, self.policy.observation, self.task.name, keep=keep)

    def _whole(self, requests: Sequence[Request]) -> Batch:
        seeds = [int(r.item or 0) for r in requests for _ in range(r.count)]
        found = self._run(seeds, self.streams.numpy("act"), keep=True)
        length = torch.from_numpy(found.lengths)
        mask = torch.arange(found.reward.shape[1])[None] < length[:, None]
        terminated = torch.from_numpy(found.terminated)
        at = torch.stack([torch.arange(len(seeds)), length - 1], 1)
        cut = ~terminated[at[:, 0], at[:, 1]]
        bad = cut & ~torch.from_numpy(np.isfinite(found.final).all(1))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise PoloptError(
                f"{self.task.name} returned an observation that is not finite at the end of the episode with start seed "
                f"{seeds[row]}, in step {int(at[row, 1])}"
            )
        truncated = torch.zeros_like(mask)
        truncated[at[cut, 0], at[cut, 1]] = True
        self._costs["decisions"] += int(length.sum())
        self._costs["env_steps"] += int(length.sum())
        self._episodes.ended(found.returns.tolist(), found.lengths.tolist())
        reward = found.reward
        if self._rewards is not None:
            fresh = DiscountedReturns(len(seeds), self._rewards.gamma)
            done = np.zeros(reward.T.shape, dtype=bool)
            reward = fresh.normalise(reward.T, mask.numpy().T, done, self.policy.reward_moments).T
        return Batch(
            mask=mask,
            reward=torch.from_numpy(np.ascontiguousarray(reward, dtype=np.float32))[..., None],
            terminated=terminated,
            truncated=truncated,
            row={"truncated": cut.float()},
            obs=torch.from_numpy(found.obs),
            action=torch.from_numpy(found.action),
            final=Final(at[cut], torch.from_numpy(found.final)[cut]),
            horizon=mask.shape[1],
        )

    # ---------------------------------------------------------------- saving
    def state(self) -> State:
        """Random streams and running environments; `envs` is None when these cannot be saved (then `load` starts new episodes)."""
        found: State = {"streams": self.streams.state(), "started": self._envs is not None and self._obs is not None}
        if found["started"]:
            assert self._envs is not None
            found |= {"envs": self._envs.state(), "obs": self._obs, "resetting": self._resetting, "taken": self._taken}
            found |= {"episodes": self._episodes.state(), "behave": self._behave.state()}
            if self._rewards is not None:
                found["rewards"] = self._rewards.carry
        return found

    def load(self, state: State) -> None:
        """Continue from `state()`, bit for bit, or with fresh episodes and `exact = False` where environments were not saved."""
        self.streams.load(state["streams"])
        if not state["started"]:
            return
        envs = self._start()
        self.streams.load(state["streams"])  # starting drew from them
        self._taken = int(state["taken"])
        if state["envs"] is None:
            self.exact = False
            return
        envs.load(state["envs"])
        self._obs, self._resetting = np.array(state["obs"]), np.array(state["resetting"])
        self._episodes.load(state["episodes"])
        self._behave.load(state["behave"])
        if self._rewards is not None:
            self._rewards.carry = np.array(state["rewards"])


def _rows(x: Array) -> Tensor:
    """Steps first [T,n,...] to rows first [n,T,...], in its own memory."""
    return torch.from_numpy(np.ascontiguousarray(x.swapaxes(0, 1)))


def iteration_size(method: Any, settings: Settings) -> tuple[int, int | None]:
    """Fewest and most decisions of one iteration; whole episodes may take any number (None)."""
    if method.requires() & {Can.EPISODES, Can.GROUPS}:
        return settings.collect.episodes * int(getattr(method.sampler, "group_size", 1)), None
    return (settings.collect.envs * settings.collect.steps,) * 2


def build(task: Any, policy: MLPPolicy, settings: Settings, method: Any, seed: int) -> VectorCollector:
    """The collector for a control task: whole episodes where a part of `method` requires them or groups."""
    whole = bool(method.requires() & {Can.EPISODES, Can.GROUPS})
    names = frozenset(n.removesuffix("@old") for n in method.needs() if n.endswith("@old"))
    also = names & {"value", "value_next", "dist"}
    gamma = float(getattr(method.advantage, "gamma", 0.99))
    return VectorCollector(
        task, policy, settings, whole, seed, gamma=gamma, also=also,
        # transitions are kept without the sampler's numbers: what reads them asks the networks
        recorded=Can.NETS not in method.requires(), explore=method.explore, start=int(getattr(method.source, "start", 0)),
    )  # fmt: skip
