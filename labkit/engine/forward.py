"""One pass over a model with its KV cache: prefill one prompt, then one token for each of several rows.

The only place that calls ``model.forward``. What a conversation needs between two steps - cache, position,
mask - lives in its `Row`; the model itself keeps no state that the next request could stumble over (Glm4v
stores the positions' offset of its last image on the module; here they are passed explicitly at every step).

A row's logits do not depend on the rows beside it, to the last bit: prompts are prefilled alone, attention is
computed row by row (`labkit.engine.row_cache`), and products with weights are taken in a way that was tried on this model
and device (`find_way`). So an answer at temperature 0 is the same alone and in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.kv_cache import PLAIN, Keeping
from labkit.engine.row_cache import JoinedCache, RowCache, use_rows
from labkit.engine.step import (
    PADDED_ROWS,
    ConversationCache,
    Row,
    Step,
    StepUnavailableError,
    likeliest,
    signature,
)
from labkit.engine.step_cpu.compiled import compiled_step
from labkit.engine.step_gpu.captured import captured_step
from labkit.models.experts import is_mixture
from labkit.quantization import QuantizedLinear
from labkit.quantization.kernels.upcast import upcast
from labkit.quantization.logits import keep_logits_
from labkit.quantization.torch_state import guarded

MODULES = "the model's own modules"
TRIED_ROWS = (1, 2, 3, 5, 8, 13, 16)
FindStep = Callable[[nn.Module, Keeping], tuple[Step | None, str]]


def find_step(model: nn.Module, keeping: Keeping) -> tuple[Step | None, str]:
    """The step for a model on its device; or None, and the reason."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    return captured_step(model, keeping) if on_gpu else compiled_step(model, keeping)


def modules_only(model: nn.Module, keeping: Keeping) -> tuple[Step | None, str]:
    """A `FindStep` that finds none, to compare with."""
    return None, "no other step is wanted"


class Forward:
    """A model's passes.

    A token is decoded by a `labkit.engine.step.Step`, where there is one for this model and device and it takes the
    row, else by the model's own modules. Prefill always goes through the modules.

    Args:
        model: a transformers causal model (text or multimodal) in evaluation mode.
        keeping: how its cache is kept.
        find: finds the step, now and whenever a module of the decoder has been replaced, moved or hooked.
        joins: whether rows may share a pass, where their caches allow it (`labkit.engine.trial` shows it).

    Attributes:
        own_step: that step, or None.
        reason: why there is none, or "".

    ``way`` says how the modules take several rows: ``together`` (any number, as they come), ``padded`` (always
    `PADDED_ROWS`, filled up: in fp32 and fp16 a product's rounding depends on the number of rows) or ``single`` (one
    after another: caches that are not plain, or a scheme such as llm-int8 whose rows see each other).
    """

    def __init__(
        self, model: nn.Module, keeping: Keeping = PLAIN, find: FindStep = find_step, joins: bool = True
    ):
        self._model = model
        self._keeping = keeping
        self._config = model.config.get_text_config(decoder=True)
        self._growing = growing_frequencies(model)
        self._find = modules_only if self._growing else find
        self._joins = use_rows(model) and joins and not self._growing
        self._ways: dict[int, str] = {}  # number of threads -> way
        self.own_step: Step | None = None
        self.reason = ""
        self._signature: tuple[object, ...] | None = None
        self._follow_model()

    @guarded
    def _follow_model(self) -> None:
        """Look at the model again, if something in it was changed."""
        keep_logits_(self._model)  # its head may be another by now
        now = signature(self._model)
        if now != self._signature:
            self._signature = now
            self._ways.clear()
            self.own_step, self.reason = self._find(self._model, self._keeping)

    @property
    def route(self) -> str:
        """By what a token is decoded."""
        return self.own_step.route if self.own_step is not None else f"{MODULES}: {self.reason}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states; logits are fp32 (`labkit.quantization.logits`)."""
        return self._model.dtype

    @property
    def way(self) -> str:
        """See the class; found when it is first needed, for a number of threads: they too change a product's rounding."""
        threads = torch.get_num_threads()
        if threads not in self._ways:
            self._ways[threads] = find_way(self._model) if self._joins else "single"
        return self._ways[threads]

    @guarded
    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Row, Tensor]:
        """Run one prompt.

        Args:
            inputs: ``input_ids [1, L]``, optionally ``attention_mask [1, L]``, media tensors; on the device.

        Returns:
            the row, and the logits after its last token, fp32 ``[1, vocabulary]``.
        """
        self._follow_model()
        self.reset_frequencies()
        model, inputs = self._model, dict(inputs)
        ids = inputs.pop("input_ids")
        mask = inputs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        cache = self.new_cache()
        positions = model._prepare_position_ids_for_generation(
            ids, {"input_ids": ids, "attention_mask": mask, **inputs}
        )
        arguments: dict[str, Any] = model.prepare_inputs_for_generation(
            ids,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=positions,
            is_first_iteration=True,
            use_cache=True,
            **inputs,
        )
        if model._supports_logits_to_keep():
            arguments["logits_to_keep"] = 1
        with upcast(ids.device):
            output = model(**arguments, return_dict=True)
        positions = arguments.get("position_ids")
        # A row that sees its whole cache needs no mask, where the model is told the positions.
        needs_mask = positions is None or bool((mask == 0).any())
        if needs_mask and self._keeping.window is not None:
            raise LabError("sliding_window is for prompts without padding, of models that are told positions")
        last = None if positions is None else positions[..., -1:].clone()
        row = Row(cache, last, mask if needs_mask else None)
        if self.own_step is not None and row.mask is None:
            row.position = _common(last)
        return row, output.logits[:, -1]

    @guarded
    @torch.inference_mode()
    def step(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """Append one token to each row, ``tokens [B]`` int64. Returns the logits after it, fp32 ``[B, vocabulary]``.

        alone: the one row there is never had company, so it may be multiplied as it comes.
        """
        taken = [self._takes(row) for row in rows]
        if all(taken):
            return self._step_own(rows, tokens, alone)
        if any(taken):  # a row goes the same way whatever its company
            return self._divided(rows, tokens, taken)
        return self._step_modules(rows, tokens, alone)

    def _takes(self, row: Row) -> bool:
        own = self.own_step
        return own is not None and row.mask is None and row.position is not None and own.takes(row)

    def _step_own(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        try:
            return self.own_step.step(rows, tokens, alone)
        except StepUnavailableError:
            return self._step_modules(rows, tokens, alone)

    def _divided(self, rows: Sequence[Row], tokens: Tensor, taken: Sequence[bool]) -> Tensor:
        chosen = torch.tensor(taken, dtype=torch.bool, device=tokens.device)
        parts = []
        for advance, mask in (self._step_own, chosen), (self._step_modules, ~chosen):
            share = [row for row, mine in zip(rows, mask.tolist()) if mine]
            parts.append((advance(share, tokens[mask]), mask))
        logits = parts[0][0].new_empty(len(rows), parts[0][0].shape[1])
        for part, mask in parts:
            logits[mask] = part.to(logits.dtype)
        return logits

    def _step_modules(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """`step` through the model's modules."""
        joinable = all(row.mask is None and isinstance(row.cache, RowCache) for row in rows)
        if not joinable or self.way == "single":
            return torch.cat([self._step(row, tokens[i : i + 1]) for i, row in enumerate(rows)])
        if self.way == "together" or (alone and len(rows) == 1):
            return self._join(rows, tokens)
        parts = range(0, len(rows), PADDED_ROWS)
        return torch.cat(
            [self._padded(rows[at : at + PADDED_ROWS], tokens[at : at + PADDED_ROWS]) for at in parts]
        )

    def likeliest(self, logits: Tensor) -> tuple[list[float], Tensor]:
        """As `labkit.engine.step.likeliest`."""
        return likeliest(logits) if self.own_step is None else self.own_step.likeliest(logits)

    def new_cache(self) -> ConversationCache:
        """An empty cache for one conversation."""
        return RowCache(self._config, self._keeping) if self.own_step is None else self.own_step.new_cache()

    def _step(self, row: Row, token: Tensor) -> Tensor:
        """One row with its own cache."""
        row.advance()
        if row.mask is not None:
            row.mask = torch.nn.functional.pad(row.mask, (0, 1), value=1)
        return self._call(token, row.positions, row.mask, row.cache)

    def _padded(self, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        missing = PADDED_ROWS - len(rows)
        return self._join(rows, torch.nn.functional.pad(tokens, (0, missing)))[: len(rows)]

    def _join(self, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        """Rows together; tokens beyond the rows are filling."""
        for row in rows:
            row.advance()
        filling = [rows[0].positions] * (len(tokens) - len(rows))
        positions = torch.cat([*(row.positions for row in rows), *filling], dim=-2)
        return self._call(tokens, positions, None, JoinedCache([row.cache for row in rows]))

    def reset_frequencies(self) -> None:
        """Forget the longest conversation so far, on which "dynamic" rotary frequencies depend."""
        for rotary in self._growing:
            if rotary.rope_type == "dynamic":
                rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)
                rotary.max_seq_len_cached = rotary.original_max_seq_len

    def _call(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor:
        self.reset_frequencies()
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits[:, -1]


def growing_frequencies(model: nn.Module) -> list[nn.Module]:
    """The modules whose rotary frequencies depend on the longest of the rows, which are thus computed one by one.

    Raises:
        LabError: frequencies that grow with the length, in one kind of a model's layers alone.
    """
    growing = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, Mapping) and any("dynamic" in str(kind) for kind in kinds.values()):
            raise LabError(
                f"{type(model).__name__} with dynamic rotary frequencies in some layers is not supported"
            )
        names = kinds.values() if isinstance(kinds, Mapping) else [kinds]
        if not {"dynamic", "longrope"}.isdisjoint(names):
            growing.append(module)
    return growing


@torch.inference_mode()
def find_way(model: nn.Module) -> str:
    """How rows may be multiplied so that none of them depends on the others: see `Forward`.

    Each kind of Linear of the decoder and the head is tried on made-up rows, one of them with outliers.
    """
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    kinds: dict[tuple, nn.Module] = {}
    for module in [*text.modules(), model.get_output_embeddings()]:
        if isinstance(module, nn.Linear | QuantizedLinear):
            options = (type(module), module.in_features, module.out_features, module.extra_repr())
            kinds.setdefault(options, module)
    ways = {_way_of(module) for module in kinds.values()}
    if is_mixture(model) and ways != {"together"}:
        return "single"  # how many rows an expert multiplies depends on the rows beside
    return next(way for way in ("single", "padded", "together") if way in ways or way == "together")


def _way_of(module: nn.Module) -> str:
    tensor = next(iter([*module.parameters(), *module.buffers()]))
    dtype = getattr(module, "dtype", tensor.dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    size = max(TRIED_ROWS), module.in_features
    rows = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    rows[PADDED_ROWS // 2, :4] = 60.0
    rows = rows.to(tensor.device, dtype)
    if isinstance(module, nn.Linear) and not isinstance(module(rows[:1]), Tensor):  # Phi-3.5-MoE's router
        module = partial(nn.Linear.forward, module)
    first, others = rows[:1], rows[PADDED_ROWS:]
    padded = module(rows[:PADDED_ROWS])
    moved = module(torch.cat((others[: PADDED_ROWS - 1], first)))[-1:]
    if not (
        torch.equal(padded[:1], moved) and torch.equal(module(rows[:PADDED_ROWS].flip(0)).flip(0), padded)
    ):
        return "single"
    same = all(torch.equal(module(rows[:count])[:1], padded[:1]) for count in TRIED_ROWS)
    return "together" if same else "padded"


def _common(positions: Tensor | None) -> int | None:
    """The position in all of a model's axes, ``[…, 1, 1]``, or None where they differ."""
    axes = set() if positions is None else set(positions.flatten()[-3:].tolist())
    return axes.pop() if len(axes) == 1 else None
