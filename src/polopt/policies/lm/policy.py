"""`LMPolicy`: a causal language model whose decisions are tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polopt.batch import Batch
from polopt.columns import next_valid, pad_axis
from polopt.errors import CallError, PoloptError
from polopt.interfaces import State
from polopt.part import Can
from polopt.policies.lm.engine import Engine, ExactEngine, GeneralEngine
from polopt.policies.lm.fast import FastEngine, supports
from polopt.policies.lm.generate import Drawn, cut_at_stop, generate
from polopt.policies.lm.model import Backbone, quiet
from polopt.policies.lm.prompts import pad_left, shared
from polopt.policies.lm.sampling import Sampling
from polopt.policies.lm.stats import CHUNK, chunked
from polopt.run import seed_of
from polopt.stats import NOW, View
from polopt.tasks.text_protocol import Prompt, encode_prompt

FORMAT = 1


class ValueHead(nn.Module):
    """V of the state in front of each token: a linear function of the last hidden state."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(seed_of(seed, "net/value"))
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(1, width, generator=generator) * 0.1 / width**0.5)
            self.linear.bias.zero_()

    def forward(self, hidden: Float[Tensor, "B T H"]) -> Float[Tensor, "B T"]:
        """Values [B,T]."""
        return self.linear(hidden).squeeze(-1)  # type: ignore[no-any-return]


class LMPolicy:
    """Draws tokens and evaluates statistics of them. A row's decisions depend on each other (`rowwise`)."""

    can = frozenset({Can.SCORE, Can.ENUMERATE, Can.IMITATE, Can.VALUE, Can.REFERENCE})
    rowwise = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 32,
        engine: str = "auto",
        value: bool = False,
        reference: bool = False,
        dtype: str = "float32",
        seed: int = 0,
        chunk: int = CHUNK,
    ) -> None:
        """`engine` is auto, fast, general or exact; `reference` keeps the parameters of now as the frozen reference view.

        Raises `CallError` when the fast engine is asked for and cannot serve the architecture.
        """
        self.backbone, self.sampling, self.max_new_tokens = backbone, sampling or Sampling(), max_new_tokens
        self.dtype, self.seed, self.chunk = dtype, seed, chunk
        self.engine = self._engine(engine, backbone)
        self.value_head = ValueHead(backbone.hidden_size, seed).to(self.device) if value else None
        self._reference: tuple[Backbone, Engine] | None = None
        self._has_reference = reference or backbone.lora
        if reference and not backbone.lora:
            frozen = Backbone(copy.deepcopy(backbone.module).requires_grad_(False), backbone.tokenizer)
            self._reference = frozen, self._engine(engine, frozen)

    def _engine(self, name: str, backbone: Backbone) -> Engine:
        if name == "exact":
            return ExactEngine(backbone, self.max_new_tokens)
        if name == "general" or (name == "auto" and not supports(backbone)):
            return GeneralEngine(backbone)
        if not supports(backbone):
            kind = backbone.config.model_type
            raise CallError(f"policy.engine = 'fast' does not know the architecture '{kind}'; use policy.engine=auto or general")
        return FastEngine(backbone)

    def refer(self) -> None:
        """The parameters as they are now become the reference, where one is kept. Raises `CallError` for adapters."""
        if self.backbone.lora:
            raise CallError("with LoRA the reference is the model without adapters; set policy.lora=0 where stages hand one over")
        if self._reference is not None:
            frozen = self._reference[0]
            frozen.module.load_state_dict(self.backbone.module.state_dict())
            self._reference = frozen, self._engine(self.engine.name, frozen)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.backbone.module.parameters()).device

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.backbone.tokenizer

    def nets(self) -> Mapping[str, nn.Module]:
        """The language model, and the value head where the method asks for values."""
        return {"policy": self.backbone.module, **({"value": self.value_head} if self.value_head is not None else {})}

    def remember(self, batch: Batch) -> None:
        """A language model keeps no running statistics."""

    # ---------------------------------------------------------------- statistics
    def evaluate(self, batch: Batch, want: frozenset[str], view: View = NOW) -> dict[str, Tensor]:
        """Statistics of the batch's tokens, each [B,T] or [B,T,m], 0 outside the mask; with gradient for NOW only.

        Those of logits are of softmax(logits / temperature), the temperature at which the row was sampled
        (`row["temperature"]`, else the policy's own): truncations (top-p and the like) are not part of the trained policy.
        "value" is V of the state in front of each token, "value_next" that of the next decision's state (0 after the last).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and view.params == "now"):
            return self._evaluate(batch, want, view)

    def _evaluate(self, batch: Batch, want: frozenset[str], view: View) -> dict[str, Tensor]:
        b, t = batch.shape
        prompt, known = _prompt(batch, view)
        columns, places = batch.mask.any(0).nonzero(), known.any(0).nonzero()
        if columns.numel() == 0:
            # tied to a parameter: a batch without decisions has the gradient 0, not none
            zero = 0 * next(iter(self._tensors().values())).flatten()[0].float()
            return {name: zero.expand(b, t) for name in want}
        used, skip = int(columns[-1]) + 1, int(places[0])  # padding common to all rows is not computed
        prompt, known, action, mask = prompt[:, skip:], known[:, skip:], batch.action[:, :used], batch.mask[:, :used]
        with self._view(view) as (backbone, engine), self._precision():
            ends = (mask * torch.arange(1, used + 1, device=mask.device)).amax(1).tolist()
            hidden = engine.hidden(prompt, known, action, ends)
            out = self._values(hidden, batch.mask, want)
            if names := want - {"value", "value_next"}:
                index = mask.reshape(-1).nonzero().squeeze(1)
                found = chunked(
                    hidden.reshape(b * used, -1)[index], action.reshape(-1)[index], self._temperature(batch, index // used),
                    self._head(backbone), backbone.vocabulary, names, self.chunk,
                    linear=backbone.linear if engine.name != "exact" else None,
                )  # fmt: skip
                for name, x in found.items():
                    whole = x.new_zeros(b * used, *x.shape[1:]).index_copy(0, index, x).view(b, used, *x.shape[1:])
                    out[name] = _widen(whole, t)
        return out

    def tokens(self, batch: Batch) -> int:
        """Tokens that one forward pass over `batch` processes: decisions, and prompts (the fast engine reads equal ones once)."""
        if not bool(batch.mask.any()):
            return 0
        known = batch.context["prompt_mask"]
        if self.engine.name == "fast":
            known = known[shared(batch.context["prompt"], known)[0]]
        return int(batch.mask.sum() + known.sum())

    def _values(self, hidden: Float[Tensor, "B U H"], mask: Bool[Tensor, "B T"], want: frozenset[str]) -> dict[str, Tensor]:
        if not want & {"value", "value_next"}:
            return {}
        if self.value_head is None:
            raise PoloptError(
                "this language model has no value head: build it with value=True (a method whose parts need values does)"
            )
        value = torch.where(mask, _widen(self.value_head(hidden.float()).float(), mask.shape[1]), 0.0)
        both = {"value": value, "value_next": next_valid(value, mask)}
        return {k: v for k, v in both.items() if k in want}

    def _temperature(self, batch: Batch, rows: Tensor) -> float | Tensor:
        per_row = batch.row.get("temperature")
        if per_row is None:
            return self.sampling.temperature
        first = float(per_row[0])
        return first if bool((per_row == first).all()) else per_row[rows].float()

    def _head(self, backbone: Backbone) -> Callable[[Tensor], Tensor]:
        if self.engine.name != "exact":
            return backbone.logits
        return lambda hidden: torch.cat([backbone.logits(h[None]) for h in hidden])  # one shape

    @contextmanager
    def _view(self, view: View) -> Iterator[tuple[Backbone, Engine]]:
        """The model and engine of a view: the frozen copy, or the same one without its adapters, for the reference."""
        if view.params != "ref":
            yield self.backbone, self.engine
        elif not self._has_reference:
            raise PoloptError("this language model keeps no reference: build it with reference=True (a method that needs one does)")
        elif self._reference is not None:
            yield self._reference
        else:
            with self.backbone.module.disable_adapter():  # type: ignore[operator]
                yield self.backbone, self.engine

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    # ---------------------------------------------------------------- drawing
    def encode(self, prompt: Prompt, limit: int | None = None) -> list[int]:
        """Token ids of a prompt; raises `PoloptError` when it leaves no room for `limit` new tokens in the model's context."""
        ids = encode_prompt(self.tokenizer, prompt)
        limit, context = self.max_new_tokens if limit is None else limit, self.backbone.context
        if context is not None and len(ids) + limit > context:
            shown = str(prompt) if len(str(prompt)) <= 80 else str(prompt)[:77] + "..."
            raise PoloptError(
                f"the prompt {shown!r} has {len(ids)} tokens; with collect.max_new_tokens = {limit} "
                f"that exceeds the model's context of {context}: shorten the prompt or lower collect.max_new_tokens"
            )
        return ids

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        spread: Sequence[int] | Int[Tensor, " N"],
        rng: torch.Generator | None,
        *,
        sampling: Sampling | None = None,
        limits: Int[Tensor, " N"] | None = None,
        temperature: Float[Tensor, " N"] | None = None,
        forced: Int[Tensor, "N L"] | None = None,
        decoder: Callable[..., Tensor] | None = None,
        uniform: Float[Tensor, "S N"] | None = None,
    ) -> Drawn:
        """Continue prompts (token ids): row i from `prompts[spread[i]]`. All randomness comes from `rng`, a CPU generator."""
        spread = torch.as_tensor(spread)
        ids, known = pad_left(prompts, self.backbone.pad)
        limits = torch.full((len(spread),), self.max_new_tokens) if limits is None else limits

        def here(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(self.device)

        with self._precision():
            return generate(
                self.engine, self._head(self.backbone), ids.to(self.device), known.to(self.device), spread.to(self.device),
                limits.to(self.device), sampling or self.sampling, rng=rng, ends=self.backbone.ends, pad=self.backbone.pad,
                tokenizer=self.tokenizer, temperature=here(temperature), forced=here(forced), decoder=decoder, uniform=uniform,
            )  # fmt: skip

    def texts(self, drawn: Drawn, stop: Sequence[str] | None = None) -> tuple[list[str], list[list[int]]]:
        """Completions as text (special tokens left out, cut before a stop string) and as ids."""
        lengths = drawn.mask.sum(1).tolist()
        ids = [row[:n] for row, n in zip(drawn.action.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [cut_at_stop(text, self.sampling.stop if stop is None else stop) for text in texts], ids

    def predict(self, inputs: Any, *, greedy: bool = True, max_new_tokens: int | None = None, seed: int = 0) -> Any:
        """The completion of a prompt (text or chat messages), or a list of completions for a list of prompts."""
        single = isinstance(inputs, str) or bool(inputs and isinstance(inputs[0], Mapping))
        prompts = [inputs] if single else list(inputs)
        if not prompts:
            return []
        how = Sampling(stop=self.sampling.stop, greedy=True) if greedy else self.sampling
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        drawn = self.generate(
            [self.encode(p, limit) for p in prompts], range(len(prompts)), torch.Generator().manual_seed(seed),
            sampling=how, limits=torch.full((len(prompts),), limit),
        )  # fmt: skip
        texts, _ = self.texts(drawn)
        return texts[0] if single else texts

    # ---------------------------------------------------------------- keeping
    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; shared parameters once."""
        return {f"{net}/{n}": p for net, module in self.nets().items() for n, p in module.named_parameters() if p.requires_grad}

    def state(self) -> State:
        """Copies of the trained parameters (adapters alone with LoRA), and a fingerprint of those that stay as loaded."""
        return {"parameters": {k: v.detach().clone() for k, v in self._tensors().items()}, "frozen": self._fingerprint()}

    def load(self, state: State) -> None:
        """Restore from `state()`; raises `PoloptError` when it belongs to another model."""
        mine, theirs = self._tensors(), state["parameters"]
        if set(mine) != set(theirs):
            odd = sorted(set(mine) ^ set(theirs))
            raise PoloptError(f"the checkpoint is of another model: {len(odd)} parameters differ, such as '{odd[0]}'")
        with torch.no_grad():
            for name, parameter in mine.items():
                if parameter.shape != theirs[name].shape:
                    shapes = f"shape {tuple(theirs[name].shape)}, expected {tuple(parameter.shape)}"
                    raise PoloptError(f"the checkpoint is of another model: '{name}' has {shapes}")
                parameter.copy_(theirs[name])
        for name, number in self._fingerprint().items():
            if abs(number - state["frozen"][name]) > 1e-9 * max(1.0, abs(number)):
                raise PoloptError(
                    f"the {name} model differs from the one that the checkpoint was trained with: was its folder changed?"
                )

    def _fingerprint(self) -> dict[str, float]:
        """Sums of the absolute values of frozen parameters: base model under adapters, reference."""
        out = {}
        frozen = [p for p in self.backbone.module.parameters() if not p.requires_grad]
        for name, parameters in (
            ("base", frozen),
            ("reference", self._reference[0].module.parameters() if self._reference else []),
        ):
            if parameters:
                out[name] = float(sum(p.detach().double().abs().sum() for p in parameters))
        return out

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder in the Hugging Face format (adapters merged), with tokenizer, value head and `polopt.json`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        causal = self.backbone.causal
        if self.backbone.lora:
            causal = copy.deepcopy(self.backbone.module).merge_and_unload()  # type: ignore[operator]
        weights = {k: v.detach().clone() for k, v in causal.state_dict().items()}  # parameters may be views of one buffer
        with quiet():
            causal.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        if self.value_head is not None:
            save_file({k: v.detach().clone() for k, v in self.value_head.state_dict().items()}, str(folder / "value.safetensors"))
        about = {
            "format": FORMAT, "policy": "polopt.policies.lm", "domain": "text", "value": self.value_head is not None,
            "max_new_tokens": self.max_new_tokens, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k, "min_p": self.sampling.min_p, "stop": list(self.sampling.stop),
        }  # fmt: skip
        (folder / "polopt.json").write_text(json.dumps(about, indent=1))


def _prompt(batch: Batch, view: View) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """The prompts of a view: those that rows are scored under, or those that they were sampled under where these differ."""
    scored = batch.context["prompt"], batch.context["prompt_mask"]
    if view.context == "scored" or "sampled" not in batch.context:
        return scored
    sampled = batch.context["sampled"], batch.context["sampled_mask"]
    width = max(scored[0].shape[1], sampled[0].shape[1])
    a, b = ([pad_axis(x, width - x.shape[1], left=True) for x in pair] for pair in (scored, sampled))
    empty = ~sampled[1].any(1, keepdim=True)  # rows of a batch in which the two did not differ
    return torch.where(empty, a[0], b[0]), torch.where(empty, a[1], b[1])


def _widen(x: Tensor, t: int) -> Tensor:
    """Right-pad the decision axis to `t`."""
    if x.shape[1] == t:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], t - x.shape[1], *x.shape[2:])], 1)
