"""`point:<variant>`: point robots in the square [-1.25, 1.25]^2, with goals, walls and two routes, sparse or dense rewards."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from polopt.part import Range, check_fields
from polopt.tasks.equations import EquationTask, Floats, Rng, World, box

EDGE = 1.25
#: walls as boxes (x from, x to, y from, y to)
WALLS: Mapping[str, tuple[tuple[float, float, float, float], ...]] = {
    "none": (),
    "block": ((-0.15, 0.15, -0.7, 0.7),),  # one obstacle with a route on either side
    "bends": ((-0.5, -0.35, -EDGE, 0.6), (0.35, 0.5, -0.6, EDGE)),  # one route with two bends
}


@dataclass(frozen=True)
class PointOptions:
    """Dials of the point world."""

    goals: Annotated[int, Range(ge=1), "goals, evenly on the unit circle, the first at (1, 0)"] = 1
    pays: Annotated[
        Literal["any", "shown", "hidden"],
        "which goals pay: any; one of each episode, shown; or one that is not shown (a wrong one sends back to the start)",
    ] = "any"
    reward: Annotated[Literal["sparse", "dense"], "sparse: 1 at a goal; dense: also minus the distance to it at every decision"] = (
        "sparse"
    )
    cost: Annotated[float, Range(ge=0), "subtracted at every decision"] = 0.0
    walls: Annotated[Literal["none", "block", "bends"], "none, a block with a route on either side, or a path with two bends"] = (
        "none"
    )
    start: Annotated[float, Range(ge=-1, le=1), "where episodes start on the x axis"] = 0.0
    spread: Annotated[float, Range(ge=0, le=1), "start positions are uniform within this distance in x and y"] = 0.0
    speed: Annotated[float, Range(gt=0), "distance per decision at full action"] = 0.2
    drag: Annotated[float, Range(gt=0, le=1), "1: the action is the velocity; less: velocity lasts, and is seen"] = 1.0
    radius: Annotated[float, Range(gt=0), "of goals"] = 0.15
    robots: Annotated[int, Range(ge=1), "robots that one policy moves; rewards are their mean"] = 1
    horizon: Annotated[int, Range(ge=1), "decisions after which an episode is cut"] = 30

    def __post_init__(self) -> None:
        check_fields(self, "options")


class Point:
    """v' = (1 - drag) v + drag speed a,  p' = p + v' unless that enters a wall or leaves the square (then v' = 0), |a_i| <= 1.

    State by robot: position, velocity, whether it arrived; and the goal that pays (of the episode). An episode ends when all
    robots have arrived at a goal that pays.
    """

    def __init__(self, options: PointOptions) -> None:
        o = self.options = options
        self.horizon, self.action = o.horizon, box(2 * o.robots)
        angle = 2 * math.pi * np.arange(o.goals) / o.goals
        self.goals: Floats = np.stack([np.cos(angle), np.sin(angle)], 1)
        self.sight = o.robots * (2 + 2 * (o.drag < 1) + (o.robots > 1)) + o.goals * (o.pays == "shown")

    def start(self, n: int, rng: Rng) -> Floats:
        o = self.options
        state = np.zeros((n, 5 * o.robots + 1))
        robots = state[:, :-1].reshape(n, o.robots, 5)
        robots[..., 0] = o.start
        if o.spread:
            robots[..., :2] += rng.uniform(-o.spread, o.spread, (n, o.robots, 2))
        if o.pays != "any":
            state[:, -1] = rng.integers(0, o.goals, n)
        return state

    def observe(self, state: Floats) -> Floats:
        o = self.options
        robots = state[:, :-1].reshape(len(state), o.robots, 5)
        columns = [0, 1, *((2, 3) if o.drag < 1 else ()), *((4,) if o.robots > 1 else ())]
        seen = robots[..., columns].reshape(len(state), -1)
        return np.concatenate([seen, np.eye(o.goals)[state[:, -1].astype(int)]], 1) if o.pays == "shown" else seen

    def step(self, state: Floats, action: NDArray[Any], rng: Rng) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        o, n = self.options, len(state)
        robots = state[:, :-1].reshape(n, o.robots, 5).copy()
        before = robots[..., 4].astype(bool)  # those that had arrived stay
        move = np.clip(np.asarray(action, dtype=np.float64), -1, 1).reshape(n, o.robots, 2)
        velocity = (1 - o.drag) * robots[..., 2:4] + o.drag * o.speed * move
        velocity[before | self.blocked(robots[..., :2], velocity)] = 0
        place = robots[..., :2] + velocity
        touch = np.linalg.norm(place[:, :, None] - self.goals, axis=-1) <= o.radius  # [n,robots,goals]
        right = np.ones((n, o.goals), bool) if o.pays == "any" else np.eye(o.goals, dtype=bool)[state[:, -1].astype(int)]
        arrived = before | (touch & right[:, None]).any(2)
        back = ~arrived & touch.any(2) & (o.pays == "hidden")
        if back.any():
            place[back], velocity[back] = (o.start, 0.0), 0.0
        reward = (arrived & ~before).astype(np.float64).mean(1) - o.cost
        if o.reward == "dense":
            far = np.linalg.norm(place[:, :, None] - self.goals, axis=-1)
            reward -= np.where(arrived, 0.0, np.where(right[:, None], far, np.inf).min(2)).mean(1)
        robots[..., :2], robots[..., 2:4], robots[..., 4] = place, velocity, arrived
        return np.concatenate([robots.reshape(n, -1), state[:, -1:]], 1), reward, arrived.all(1)

    def blocked(self, place: Floats, move: Floats) -> NDArray[np.bool_]:
        """Whether the segment from `place` [...,2] by `move` leaves the square or touches a wall (slab test)."""
        out = np.asarray((np.abs(place + move) > EDGE).any(-1))
        still = np.where(np.abs(move) < 1e-12, 1e-12, move)
        for x0, x1, y0, y1 in WALLS[self.options.walls]:
            a, b = (np.array((x0, y0)) - place) / still, (np.array((x1, y1)) - place) / still
            enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
            out |= (enter <= leave) & (leave >= 0) & (enter <= 1)
        return out


class PointTask(EquationTask):
    """Point robots by equation."""

    prefix = "point"
    kind = PointOptions
    variants: ClassVar = {
        "open": ({"start": -1.0, "reward": "dense", "drag": 0.2, "horizon": 60}, "one goal, dense, with inertia"),
        "two": ({"goals": 2, "cost": 0.02}, "two symmetric goals, sparse; the start is a saddle"),
        "hidden": ({"goals": 2, "pays": "hidden", "cost": 0.02, "horizon": 60}, "two goals, of which one pays and is not shown"),
        "ring": ({"goals": 8, "pays": "shown", "cost": 0.02}, "eight goals, the right one shown"),
        "routes": ({"start": -1.0, "walls": "block", "reward": "dense", "horizon": 40}, "a goal behind a block, two routes"),
        "bends": ({"start": -1.0, "walls": "bends", "cost": 0.01, "spread": 0.1, "horizon": 60}, "a path with two bends, sparse"),
        "team": ({"goals": 3, "robots": 3, "spread": 0.5, "reward": "dense"}, "three robots moved by one policy"),
    }
    presets: ClassVar = {"evaluate.episodes": 32}

    @functools.cached_property
    def world(self) -> World:
        """The world with these options."""
        return Point(self.dials)


__all__ = ["EDGE", "WALLS", "Point", "PointOptions", "PointTask"]
