"""Runs calibration texts through a model decoder layer by decoder layer and shows each linear layer its input moments.

Each group of linear layers that read the same input is shown before it runs, and may then be changed: what follows sees
the outputs of the changed layers (GPTQ's sequential order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.hooks import registered_hooks
from lilliput.compress.packing import linears
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.models import device
from lilliput.packed_texts import Packed

Visit = Callable[[int, list[str], torch.Tensor], None]
_BLOCKS = 3  # of a matrix of moments in each direction; those below the diagonal are copied


@dataclass(frozen=True)
class _Call:
    """A batch's arguments of one decoder layer, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """Ends the run of a layer once the input in question is known."""


@torch.no_grad()
def visit_inputs(model: PreTrainedModel, batches: Sequence[Packed], visit: Visit) -> None:
    """Calls `visit(index of the decoder layer, names, moments)` for each group of linear layers with one input.

    `moments` is E[x xᵀ] over all tokens, float32 (inputs, inputs), on the device of the layer. Groups come in the order
    in which the model runs them. If there is a GPU, layers of a model on the host move there one by one.

    Raises:
        StrategyError: a linear layer does not run.
    """
    layers, groups = decoder_layers(model), _groups_by_input(model, batches[0])
    states, calls = _layer_arguments(model, batches)
    tokens = sum(batch.counts.sum().item() for batch in batches)
    shares = [batch.counts.reshape(-1) / tokens for batch in batches]
    for index, layer in enumerate(tqdm(layers, desc="quantise", unit="layer")):
        with _moved(layer, device()) as place:
            runs = [partial(_run, layer, call[index], state, place) for call, state in zip(calls, states, strict=True)]
            states = _visit_layer(model, groups[index], runs, shares, partial(visit, index))


def _visit_layer(
    model: PreTrainedModel,
    groups: Sequence[list[str]],
    runs: Sequence[Callable[[], torch.Tensor]],
    shares: Sequence[torch.Tensor],
    visit: Callable[[list[str], torch.Tensor], None],
) -> list[torch.Tensor]:
    """Returns the outputs of one layer for all batches, after `visit` of each of its groups.

    The first batch is held before each group until the other batches, run up to there, have added their moments. So a
    single batch runs once.

    Args:
        model: contains the layer.
        groups: names of the layer's linear layers by input, in the order in which they run.
        runs: one call of the layer for each batch.
        shares: for each batch the share of each of its tokens in all tokens.
        visit: see `visit_inputs`.
    """
    visited = set()

    def before(names: list[str], module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        if names[0] in visited:  # another batch runs past it
            return
        moments = _second_moments(args[0], shares[0])
        for run, share in zip(runs[1:], shares[1:], strict=True):
            moments += _second_moments(_input_of(module, run), share)
        visited.add(names[0])
        visit(names, moments)

    modules = [model.get_submodule(names[0]) for names in groups]
    hooks = (
        module.register_forward_pre_hook(partial(before, names)) for module, names in zip(modules, groups, strict=True)
    )
    with registered_hooks(hooks):
        return [run() for run in runs]


def _input_of(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Returns the input of `module`, which `run` computes on its way."""
    found = []

    def reached(_module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        found.append(args[0])
        raise _Reached

    with registered_hooks([module.register_forward_pre_hook(reached, prepend=True)]), suppress(_Reached):
        run()
    return found[0]


def _second_moments(states: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Returns Σ share · x xᵀ, float32 (width, width), of `states`, float (…, width), whose shares are (tokens,)."""
    shares = shares.to(states.device)
    counted = shares > 0
    states = states.reshape(-1, states.shape[-1])[counted].float() * shares[counted].sqrt()[:, None]
    width = states.shape[1]
    moments = states.new_empty(width, width)
    step = -(-width // _BLOCKS)
    for start in range(0, width, step):  # the matrix is symmetric: a third of the work is saved
        rows = moments[start : start + step]
        torch.mm(states[:, start : start + step].T, states[:, start:], out=rows[:, start:])
        moments[start + step :, start : start + step] = rows[:, start + step :].T
    return moments


def _run(layer: torch.nn.Module, call: _Call, states: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Returns the hidden states, float (rows, length, hidden size), after `layer`."""
    output = layer(states.to(place), *_on(place, call.args), **_on(place, call.kwargs))
    return output[0] if isinstance(output, tuple) else output


def _on(place: torch.device, value: Any) -> Any:
    """Returns `value`, arguments of a layer, with all tensors in it on the device `place`."""
    if isinstance(value, torch.Tensor):
        return value.to(place)
    if isinstance(value, tuple):
        return tuple(_on(place, each) for each in value)
    return {key: _on(place, each) for key, each in value.items()} if isinstance(value, dict) else value


@contextmanager
def _moved(layer: torch.nn.Module, place: torch.device) -> Iterator[torch.device]:
    """Keeps `layer` on the device `place` for the length of a block."""
    home = next(layer.parameters()).device
    layer.to(place)
    try:
        yield place
    finally:
        layer.to(home)


def _layer_arguments(model: PreTrainedModel, batches: Sequence[Packed]) -> tuple[list[torch.Tensor], list[list[_Call]]]:
    """Returns for each batch the hidden states before the first layer, and its arguments of each layer."""
    home = next(model.parameters()).device
    states, calls = [], []
    for batch in batches:
        with _skipped(decoder_layers(model)) as (first, arguments):
            model.base_model(**batch.inputs(home))
        states.append(first[0])
        calls.append(arguments)
    return states, calls


@contextmanager
def _skipped(layers: torch.nn.ModuleList) -> Iterator[tuple[list[torch.Tensor], list[_Call]]]:
    """Makes the decoder layers return their input; records it and their other arguments, for the length of a block."""
    states: list[torch.Tensor] = []
    calls: list[_Call] = []

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        states.append(hidden_states)
        calls.append(_Call(args, kwargs))
        return hidden_states

    for layer in layers:
        layer.forward = record
    try:
        yield states, calls
    finally:
        for layer in layers:
            del layer.forward


def _groups_by_input(model: PreTrainedModel, batch: Packed) -> list[list[list[str]]]:
    """Returns the names of the linear layers of each decoder layer, grouped by input, in the order in which they run.

    Raises:
        StrategyError: a linear layer did not run on the first tokens of `batch`.
    """
    names: dict[torch.nn.Module, str] = {module: name for name, module in linears(model).items()}
    inputs: dict[str, torch.Tensor] = {}  # holds the tensors, so that their ids stay theirs

    def record(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        inputs.setdefault(names[module], args[0])

    with registered_hooks(module.register_forward_pre_hook(record) for module in names):
        model.base_model(input_ids=batch.ids[:1, :2].to(next(model.parameters()).device), use_cache=False)
    if missing := sorted(set(names.values()) - inputs.keys()):
        raise StrategyError(
            f"{missing[0]}: this layer did not run, so nothing is known about its inputs; choose rtn for a "
            f"{type(model).__name__}"
        )
    groups: list[list[list[str]]] = []
    for layer in decoder_layers(model):
        inside = set(map(id, layer.modules()))
        by_input: dict[int, list[str]] = {}
        for name, states in inputs.items():
            if id(model.get_submodule(name)) in inside:
                by_input.setdefault(id(states), []).append(name)
        groups.append(list(by_input.values()))
    return groups
