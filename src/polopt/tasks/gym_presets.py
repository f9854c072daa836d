"""Presets of control tasks, by the environment's family and the properties of a method."""

from __future__ import annotations

from typing import Any


def preset(env: str, method: Any) -> dict[str, Any]:
    """Dotted settings for environment `env` and a method with these properties."""
    return {"threads": 1, "collect.envs": 8, "collect.steps": 128}
