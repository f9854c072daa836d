"""The fast engine: an own forward for Llama-like decoders, with shared prompts and a static key-value cache.

Three things make it faster than the general engine: a prompt is computed once for all its completions, in training too; the
cache is written in place; and one-token attention is two plain matrix products with heads of a key grouped, nothing repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polopt.policies.lm.engine import Decoding, Lengths, by_bucket
from polopt.policies.lm.model import Backbone
from polopt.policies.lm.prompts import buckets, positions, shared

#: Architectures whose layer is: norm, rotary attention, norm, gated SiLU; Qwen3 also normalises queries and keys.
KNOWN = ("qwen2", "llama", "mistral", "qwen3")
#: Rotary embeddings that depend on the position alone (the others depend on the length of the text).
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def supports(backbone: Backbone) -> bool:
    """Whether the fast engine computes this model's function."""
    config = backbone.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    longest = getattr(config, "max_position_embeddings", 0)
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and window < longest and "full_attention" not in set(getattr(config, "layer_types", None) or [])
    mixed = len(set(getattr(config, "layer_types", None) or [])) > 1
    if config.model_type not in KNOWN or config.hidden_act != "silu" or rope not in STATIC_ROPE or sliding or mixed:
        return False
    layer = backbone.decoder.layers[0]
    linear = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj)
    return all(isinstance(getattr(m, "base_layer", m), nn.Linear) for m in linear)


@dataclass(frozen=True)
class _Shape:
    heads: int  # query heads
    keys: int  # key-value heads
    width: int  # of a head
    scale: float


class FastEngine:
    """Own forward of a Llama-like model; reads the parameters of the transformers module, adapters included."""

    name = "fast"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        config, attention = backbone.config, backbone.decoder.layers[0].self_attn
        self.shape = _Shape(config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling)
        self._rope: tuple[Tensor, Tensor] | None = None

    # ---------------------------------------------------------------- training
    def hidden(
        self, prompt: Int[Tensor, "B P"], prompt_mask: Bool[Tensor, "B P"], action: Int[Tensor, "B T"], lengths: Lengths = None
    ) -> Float[Tensor, "B T H"]:
        """Distinct prompts are computed once; completions attend to their prompt's keys and to themselves.

        Both in groups of similar length, so that little padding is computed.
        """
        first, inverse = shared(prompt, prompt_mask)
        read = self._prompts(prompt[first], prompt_mask[first])
        known = prompt_mask[first]
        if lengths is None:
            return self._completions(known, inverse, *read, action)

        def some(rows: list[int]) -> Tensor:
            whole = len(rows) == len(inverse)
            used = max(1, max(lengths[i] for i in rows))
            return self._completions(
                known, inverse if whole else inverse[rows], *read, (action if whole else action[rows])[:, :used]
            )

        return by_bucket(buckets([max(0, n - 1) for n in lengths]), some, action.shape[1])

    def _prompts(self, prompt: Int[Tensor, "U P"], known: Bool[Tensor, "U P"]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Last output of each prompt [U,H], before the final norm, and keys and values [U,keys,P,D] of each layer."""
        groups = buckets(known.sum(1).tolist())
        if len(groups) == 1:
            read, keys, values = self._read(prompt, known)
            return read[:, -1], keys, values
        width = prompt.shape[1]
        back = torch.tensor([i for rows in groups for i in rows]).argsort().to(prompt.device)
        last, parts = [], []
        for rows in groups:
            skip = width - int(known[rows].sum(1).max())
            read, keys, values = self._read(prompt[rows, skip:], known[rows, skip:])
            last.append(read[:, -1])
            parts.append([F.pad(torch.stack(x), (0, 0, skip, 0)) for x in (keys, values)])
        keys, values = (list(torch.cat(x, 1)[:, back].unbind(0)) for x in zip(*parts, strict=True))
        return torch.cat(last)[back], keys, values

    def _completions(
        self, known: Bool[Tensor, "U P"], inverse: Int[Tensor, " B"], last: Float[Tensor, "U H"],
        keys: list[Tensor], values: list[Tensor], action: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B T H"]:  # fmt: skip
        start = last[inverse][:, None]
        if action.shape[1] == 1:
            return self._norm(self.backbone.decoder.norm, start)
        ids, length = action[:, :-1], action.shape[1] - 1
        place = known.sum(1)[inverse][:, None] + torch.arange(length, device=ids.device)
        own = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        before = known[inverse][:, None, :].expand(-1, length, -1)
        mask = torch.cat([before, own.expand(len(ids), -1, -1)], 2)[:, None]
        rope = self._angles(place)
        x = F.embedding(ids, self._embedding())
        for layer, k_prompt, v_prompt in zip(self.backbone.decoder.layers, keys, values, strict=True):
            q, k, v = self._project(layer, x, rope)
            k, v = torch.cat([k_prompt[inverse], k], 2), torch.cat([v_prompt[inverse], v], 2)
            x = self._finish(layer, x, self._attend(q, k, v, mask))
        return self._norm(self.backbone.decoder.norm, torch.cat([start, x], 1))

    def _read(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Forward over left-padded prompts: last layer's output (before the final norm), keys and values of each layer."""
        length = ids.shape[1]
        eye = torch.eye(length, dtype=torch.bool, device=ids.device)  # padding attends to itself: no row without a key
        seen = (torch.ones_like(eye).tril() & mask[:, None, :] | eye)[:, None]
        rope = self._angles(positions(mask))
        x = F.embedding(ids, self._embedding())
        keys, values = [], []
        for layer in self.backbone.decoder.layers:
            q, k, v = self._project(layer, x, rope)
            keys.append(k)
            values.append(v)
            x = self._finish(layer, x, self._attend(q, k, v, seen))
        return x, keys, values

    def _embedding(self) -> Tensor:
        return self.backbone.decoder.embed_tokens.weight  # type: ignore[no-any-return]

    def _project(self, layer: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B,heads,T,D] and keys, and values [B,keys,T,D]."""
        a, s = layer.self_attn, self.shape
        b, t, _ = x.shape
        h = self._norm(layer.input_layernorm, x)
        q, k, v = a.q_proj(h).view(b, t, s.heads, s.width), a.k_proj(h).view(b, t, s.keys, s.width), a.v_proj(h)
        if hasattr(a, "q_norm"):
            q, k = self._norm(a.q_norm, q), self._norm(a.k_norm, k)
        cos, sin = (r[:, :, None] for r in rope)
        return (
            rotate(q, cos, sin).transpose(1, 2),
            rotate(k, cos, sin).transpose(1, 2),
            v.view(b, t, s.keys, s.width).transpose(1, 2),
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention [B,T,heads*D]; key-value heads serve several query heads."""
        b, _, t, _ = q.shape
        n = self.shape.heads // self.shape.keys
        native = q.device.type == "cpu"  # GPU kernels with a mask want as many keys as queries
        if n > 1 and not native:
            k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.shape.scale, enable_gqa=native and n > 1)
        return out.transpose(1, 2).reshape(b, t, -1)

    def _finish(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.self_attn.o_proj(attended)
        h = self._norm(layer.post_attention_layernorm, x)
        return x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))  # type: ignore[no-any-return]

    @staticmethod
    def _norm(module: Any, x: Tensor) -> Tensor:
        return rms(x, module.weight, module.variance_epsilon)

    def _angles(self, place: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines at these positions, from a table that grows when needed."""
        cos, sin = self._table(int(place.max()) + 1, place.device)
        return cos[place], sin[place]

    def _table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rope is None or self._rope[0].shape[0] < length or self._rope[0].device != device:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                size = max(256, 1 << (length - 1).bit_length())
                cos, sin = self.backbone.decoder.rotary_emb(torch.zeros(1, device=device), torch.arange(size, device=device)[None])
                half = sin.shape[-1] // 2
                self._rope = cos[0].clone(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return self._rope

    # ---------------------------------------------------------------- generating
    def open(
        self, prompt: Int[Tensor, "U P"], prompt_mask: Bool[Tensor, "U P"], spread: Int[Tensor, " N"], limit: int
    ) -> tuple[Decoding, Float[Tensor, "N H"]]:
        """Read each prompt once and copy its keys and values into the rows' static caches."""
        last, keys, values = self._prompts(prompt, prompt_mask)
        table = self._table(prompt.shape[1] + limit, prompt.device)
        decoding = _FastDecoding(self, table, prompt_mask, spread, keys, values, limit)
        return decoding, self._norm(self.backbone.decoder.norm, last)[spread]


class _FastDecoding:
    """Static caches [N,keys,P+limit,D] per layer and fused weights (q|k|v, gate|up), adapters merged in."""

    def __init__(
        self, engine: FastEngine, table: tuple[Tensor, Tensor], known: Tensor, spread: Tensor,
        keys: list[Tensor], values: list[Tensor], limit: int,
    ) -> None:  # fmt: skip
        self.shape, self.filled = engine.shape, known.shape[1]
        dtype = keys[0].dtype  # of autocast, where it is on
        self.cos, self.sin = (t.to(dtype) for t in table)
        self.embedding = engine._embedding().to(dtype)
        self.norm = engine.backbone.decoder.norm
        self.layers = [_fuse(layer, dtype) for layer in engine.backbone.decoder.layers]
        self.position = known.sum(1)[spread]
        full = self.filled + limit
        self.keys = [self._static(k, spread, full) for k in keys]
        self.values = [self._static(v, spread, full) for v in values]
        self.mask: Tensor | None = None
        if not bool(known.all()):
            hidden = torch.where(known, 0.0, float("-inf")).to(dtype)
            self.mask = F.pad(hidden, (0, limit))[spread][:, None, None]

    @staticmethod
    def _static(x: Tensor, spread: Tensor, full: int) -> Tensor:
        out = x.new_empty(len(spread), x.shape[1], full, x.shape[3])
        out[:, :, : x.shape[2]] = x[spread]
        return out

    def step(self, token: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        s, n, here = self.shape, len(token), self.filled
        self.filled += 1
        cos, sin = self.cos[self.position][:, None], self.sin[self.position][:, None]
        self.position = self.position + 1
        mask = None if self.mask is None else self.mask[..., : self.filled]
        x = self.embedding[token]
        for w, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            qkv = F.linear(rms(x, w.norm1, w.eps), w.qkv, w.qkv_bias).view(n, s.heads + 2 * s.keys, s.width)
            if w.q_norm is not None and w.k_norm is not None:
                q = rotate(rms(qkv[:, : s.heads], w.q_norm, w.eps), cos, sin)
                k = rotate(rms(qkv[:, s.heads : -s.keys], w.k_norm, w.eps), cos, sin)
            else:
                turned = rotate(qkv[:, : -s.keys], cos, sin)
                q, k = turned[:, : s.heads], turned[:, s.heads :]
            keys[:, :, here] = k
            values[:, :, here] = qkv[:, -s.keys :]
            q = q.reshape(n, s.keys, -1, s.width) * s.scale  # the queries that share a key-value head, as rows
            scores = q @ keys[:, :, : self.filled].transpose(2, 3)
            if mask is not None:
                scores = scores + mask
            attended = scores.softmax(-1) @ values[:, :, : self.filled]
            x = x + F.linear(attended.reshape(n, -1), w.out, w.out_bias)
            gate, up = F.linear(rms(x, w.norm2, w.eps), w.gate_up, w.gate_up_bias).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w.down, w.down_bias)
        return rms(x, self.norm.weight, self.norm.variance_epsilon)

    def keep(self, rows: Int[Tensor, " M"]) -> None:
        self.keys = [self._static(k[:, :, : self.filled], rows, k.shape[2]) for k in self.keys]
        self.values = [self._static(v[:, :, : self.filled], rows, v.shape[2]) for v in self.values]
        self.position = self.position[rows]
        self.mask = None if self.mask is None else self.mask[rows]


@dataclass
class _Fused:
    """One layer's weights as decoding uses them."""

    norm1: Tensor
    norm2: Tensor
    eps: float
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


def _fuse(layer: Any, dtype: torch.dtype) -> _Fused:
    a, m = layer.self_attn, layer.mlp
    qkv, qkv_bias = _joined([a.q_proj, a.k_proj, a.v_proj], dtype)
    out, out_bias = _joined([a.o_proj], dtype)
    gate_up, gate_up_bias = _joined([m.gate_proj, m.up_proj], dtype)
    down, down_bias = _joined([m.down_proj], dtype)
    norms = [getattr(a, n).weight if hasattr(a, n) else None for n in ("q_norm", "k_norm")]
    return _Fused(
        layer.input_layernorm.weight, layer.post_attention_layernorm.weight, layer.input_layernorm.variance_epsilon,
        qkv, qkv_bias, out, out_bias, gate_up, gate_up_bias, down, down_bias, *norms,
    )  # fmt: skip


def _joined(modules: list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights of linear modules on top of each other, adapters merged, and their biases."""
    weights, biases = [], []
    for module in modules:
        base = getattr(module, "base_layer", module)
        weight = base.weight
        if base is not module and not module.disable_adapters:
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter)
        weights.append(weight)
        biases.append(base.bias)
    bias = None if biases[0] is None else torch.cat(biases).to(dtype)
    return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype), bias


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def rotate(x: Float[Tensor, "... D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "... D"]:
    """Rotary position embedding; `sin` carries the sign of the first half (arXiv 2104.09864)."""
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)
