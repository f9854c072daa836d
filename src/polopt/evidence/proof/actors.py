"""Random transitions and networks on which losses of actor-critics are compared, in float64 and the same in every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.method import Method
from polopt.part import Can
from polopt.policies.actor_critic import ActorCritic, distribution_of
from polopt.policies.mlp_spaces import Action, Observation
from polopt.settings import PolicySettings

OBS, ACTIONS, ROWS = 3, 2, 16
F64 = torch.float64


def acts(method: Method) -> bool:
    """Whether the method's parts ask networks themselves, so that its losses need some."""
    return Can.NETS in method.requires()


def networks(method: Method) -> ActorCritic:
    """The networks that the method asks for, small; nets of one name and form have the same weights for all methods."""
    discrete = Can.ENUMERATE in method.requires()
    observation = Observation("box", (OBS,), "<f4")
    if discrete:
        action = Action("discrete", (), "<i8", (4,), (0,))
    else:
        action = Action("box", (ACTIONS,), "<f4", low=(-1.0,) * ACTIONS, high=(1.0,) * ACTIONS)
    settings = PolicySettings(hidden=(8,), activation="tanh")
    policy = ActorCritic(observation, action, settings, distribution_of(method), method.networks().values(), method.copies())
    policy = policy.double()
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, slow in sorted(policy.slow.items()):  # slow copies differ from their nets, as in a run
            for p in slow.parameters():
                p.add_(torch.randn(p.shape, generator=rng, dtype=F64), alpha=0.05)
    return policy


def random_transitions(method: Method, count: int) -> Sequence[Batch]:
    """`count` batches of transitions, some of them terminal, folded from one to three decisions."""
    discrete = Can.ENUMERATE in method.requires()
    found = []
    for k in range(count):
        rng = torch.Generator().manual_seed(104_729 + k)

        def normal(*shape: int, rng: torch.Generator = rng) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=F64)

        if discrete:
            action = torch.randint(0, 4, (ROWS, 1), generator=rng)
        else:
            action = torch.rand(ROWS, 1, ACTIONS, generator=rng, dtype=F64) * 2 - 1
        found.append(
            Batch(
                mask=torch.ones(ROWS, 1, dtype=torch.bool),
                reward=normal(ROWS, 1, 1),
                terminated=torch.rand(ROWS, 1, generator=rng) < 0.3,
                truncated=torch.zeros(ROWS, 1, dtype=torch.bool),
                obs=normal(ROWS, 1, OBS),
                next_obs=normal(ROWS, 1, OBS),
                action=action,
                row={"steps": torch.randint(1, 4, (ROWS,), generator=rng).to(F64)},
                clock=Clock(k, k / count),
            )
        )
    return found


def losses(method: Method, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses of all updates, and the gradient of every parameter in the update that trains its net."""
    policy, memory = networks(method), method.memory()
    for slot, part in method.parts().items():
        if hasattr(part, "build"):
            columns = {"obs": batch.obs.flatten(0, 1), "action": batch.action.flatten(0, 1)}
            memory.built[slot] = part.build(columns, policy.standardised)
    total = torch.zeros((), dtype=F64)
    gradients: dict[str, Tensor] = {}
    for update in method.updates:
        loss, info = method.loss(batch, memory, update=update.name, nets=policy, rng=torch.Generator().manual_seed(1))
        batch = batch.adding({k: v for k, v in info.items() if k.endswith("@drawn")})
        total = total + loss.detach()
        for net in update.trains:
            named = dict(policy.nets()[net].named_parameters())
            found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            gradients |= {
                f"{net}.{n}": torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)
            }
    return total, gradients


__all__ = ["acts", "losses", "networks", "random_transitions"]
