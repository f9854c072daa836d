"""Language models as policies: any causal model of transformers, with adapters, value head, reference and two engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from polopt.errors import CallError, PoloptError
from polopt.interfaces import Task
from polopt.method import Method
from polopt.policies.lm.generate import Drawn
from polopt.policies.lm.model import Backbone, load_backbone, resolve, wrap
from polopt.policies.lm.policy import LMPolicy, ValueHead
from polopt.policies.lm.sampling import Sampling
from polopt.settings import Settings

__all__ = ["Backbone", "Drawn", "LMPolicy", "Sampling", "ValueHead", "build", "check", "load_backbone", "load_pretrained", "wrap"]


def check(settings: Settings) -> None:
    """Raise `CallError` for a model folder that does not exist; loads nothing."""
    resolve(settings.policy.model)


def build(task: Task, settings: Settings, method: Method, seed: int) -> LMPolicy:
    """The language model of the settings, with the value head and the frozen reference that the method's parts need."""
    p, c = settings.policy, settings.collect
    backbone = load_backbone(p.model, device=settings.device, lora=p.lora, lora_alpha=p.lora_alpha, seed=seed)
    if backbone.context is not None and c.max_new_tokens >= backbone.context:
        raise CallError(f"collect.max_new_tokens = {c.max_new_tokens} must be below the context of {p.model}, {backbone.context}")
    return LMPolicy(
        backbone,
        sampling=Sampling(c.temperature, c.top_p, c.top_k, c.min_p, tuple(c.stop)),
        max_new_tokens=c.max_new_tokens,
        engine=p.engine,
        value="value" in method.nets(),
        reference=any(n.endswith("@ref") for n in method.needs()),
        dtype=p.dtype,
        seed=seed,
    )


def load_pretrained(folder: Path | str, device: str = "cpu") -> LMPolicy:
    """A policy saved with `save_pretrained`, ready to predict."""
    folder = Path(folder)
    try:
        about: dict[str, Any] = json.loads((folder / "polopt.json").read_text())
    except (OSError, ValueError) as error:
        raise PoloptError(f"{folder / 'polopt.json'} cannot be read: {error}") from error
    how = Sampling(about["temperature"], about["top_p"], about["top_k"], about["min_p"], tuple(about["stop"]))
    policy = LMPolicy(
        load_backbone(str(folder), device=device), sampling=how, max_new_tokens=about["max_new_tokens"], value=about["value"]
    )
    if policy.value_head is not None:
        from safetensors.torch import load_file

        policy.value_head.load_state_dict({k: v.to(torch.float32) for k, v in load_file(str(folder / "value.safetensors")).items()})
    return policy
