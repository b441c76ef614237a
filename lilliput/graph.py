"""The candidate graph: which candidate is made from which, in what order, and what is impossible."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Collection, Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

from lilliput.config import (
    BFLOAT16,
    QLORA,
    AutogptqTarget,
    DistillConfig,
    GgufTarget,
    GptqConfig,
    LoraConfig,
    MoeConfig,
    OnnxTarget,
    Params,
    PruneConfig,
    QuantisationConfig,
    Section,
    SparseConfig,
    SparsifyConfig,
    TrainingConfig,
)
from lilliput.errors import ConfigError, StrategyError
from lilliput.shape import GROUP_SIZES, expert_numbers, fitting_group_sizes, linear_inputs, pruned

ROOT = "source"
MIXTURES = {"moe", "experts"}  # strategies that make a mixture of experts


def ancestors(params: Params, candidate: str) -> list[str]:
    """The candidates `candidate` is made from, nearest parent first, without the source."""
    chain: list[str] = []
    parent = params.candidates[candidate].parent
    while parent != ROOT:
        chain.append(parent)
        parent = params.candidates[parent].parent
    return chain


def topological_order(params: Params) -> list[str]:
    """All candidates, each after its parent, otherwise in the order of params.yaml."""
    depth = {name: len(ancestors(params, name)) for name in params.candidates}
    return sorted(params.candidates, key=depth.__getitem__)


def check_graph(params: Params, file: str) -> None:
    """Refuses a graph that cannot be run.

    Raises:
        ConfigError: one line for each unknown parent, cycle, misplaced teacher, bad override or impossible succession,
            for caching that cannot be measured, and for targets that cannot hold their candidate.
    """
    problems = [*_unknown_parents(params), *_cycles(params)]
    if not problems:
        problems = [*_bad_roots(params), *_bad_teachers(params), *_bad_successions(params), *_bad_after_experts(params)]
    problems += _bad_caching(params)
    if not problems:
        problems = [*_bad_compiles(params)]
    problems = [f"{file}: {problem}" for problem in problems] + _bad_overrides(params)
    if problems:
        raise ConfigError(problems)


def _unknown_parents(params: Params) -> Iterable[str]:
    known = [ROOT, *params.candidates]
    if ROOT in params.candidates:
        yield f"candidates.{ROOT}: this name is taken by the source model; rename the candidate"
    for name, spec in params.candidates.items():
        if spec.parent not in known:
            possible = _possible_parents(params, name)
            close = difflib.get_close_matches(spec.parent, possible, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"name one of: {', '.join(possible)}"
            yield f"candidates.{name}.from: unknown parent `{spec.parent}`; {hint}"


def _possible_parents(params: Params, candidate: str) -> list[str]:
    """The source for `load`; for others every candidate that is not made from `candidate` itself."""
    if params.candidates[candidate].apply == "load":
        return [ROOT]
    made_from, found = {candidate}, True
    while found:
        found = {name for name, spec in params.candidates.items() if spec.parent in made_from} - made_from
        made_from |= found
    return [name for name in params.candidates if name not in made_from]


def _cycles(params: Params) -> Iterable[str]:
    try:
        TopologicalSorter({name: [spec.parent] for name, spec in params.candidates.items()}).prepare()
    except CycleError as error:
        loop = " → ".join(reversed(error.args[1]))
        yield f"candidates: these are made from each other in a circle: {loop}; let one of them start `from: {ROOT}`"


def _bad_roots(params: Params) -> Iterable[str]:
    for name, spec in params.candidates.items():
        if (spec.parent == ROOT) != (spec.apply == "load"):
            yield (
                f"candidates.{name}: `apply: {spec.apply}` on `from: {spec.parent}`; `load` and only `load` follows "
                f"`{ROOT}`, so start with a candidate {{from: {ROOT}, apply: load}} and build on that"
            )


def _bad_teachers(params: Params) -> Iterable[str]:
    for name, spec in params.candidates.items():
        if spec.apply != "distill":
            if spec.teacher is not None:
                yield f"candidates.{name}.teacher: only `distill` has a teacher; remove it"
        elif spec.teacher is None:
            yield f"candidates.{name}.teacher: missing; name an ancestor of this candidate to learn from"
        elif spec.teacher not in ancestors(params, name):
            yield (
                f"candidates.{name}.teacher: `{spec.teacher}` is no ancestor of `{name}`, so nothing would notice its "
                f"change; choose one of: {', '.join(ancestors(params, name)) or 'none possible'}"
            )


def _bad_successions(params: Params) -> Iterable[str]:
    for name, spec in params.candidates.items():
        if spec.parent == ROOT:
            continue
        parent = params.candidates[spec.parent]
        made_by = getattr(params.strategies, parent.apply)
        if isinstance(made_by, QuantisationConfig):
            yield (
                f"candidates.{name}: `{spec.apply}` needs a float parent, but `{spec.parent}` is quantised by "
                f"{parent.apply}; apply {spec.apply} first and quantise last (from: {parent.parent})"
            )
        if isinstance(made_by, SparseConfig):
            yield (
                f"candidates.{name}: `{spec.apply}` would not keep the zeros of `{spec.parent}`; apply {spec.apply} "
                f"first and {parent.apply} last (from: {parent.parent})"
            )
        if parent.apply == "lora" and not _merges(params, spec.parent):
            yield (
                f"candidates.{name}: `{spec.parent}` keeps its LoRA adapter apart (merge: false), so `{spec.apply}` "
                f"would not see it; set merge: true there"
            )


def _bad_after_experts(params: Params) -> Iterable[str]:
    for name, spec in params.candidates.items():
        mixture = next((link for link in ancestors(params, name) if params.candidates[link].apply in MIXTURES), None)
        if mixture and not _handles_experts(params, name, mixture):
            made_by, parent = params.candidates[mixture].apply, params.candidates[mixture].parent
            yield (
                f"candidates.{name}: `{spec.apply}` with these settings does not reach the experts of `{mixture}`, "
                f"which {made_by} made; apply {spec.apply} before {made_by} (from: {parent})"
            )


def _handles_experts(params: Params, candidate: str, mixture: str) -> bool:
    """Training does, and taking whole layers away; LoRA sees linear layers alone, of which `experts` leaves none."""
    try:
        config = params.strategy_config(candidate)
    except ConfigError:
        return True  # the bad override is reported by itself
    layers = isinstance(config, PruneConfig) and config.method in {"block_influence", "perplexity"}
    carved = params.candidates[mixture].apply == "moe"
    return layers or isinstance(config, DistillConfig) or (isinstance(config, LoraConfig) and carved)


def _bad_caching(params: Params) -> Iterable[str]:
    for name in params.caching.candidates:
        if name not in params.candidates:
            yield f"caching.candidates: unknown candidate `{name}`; name one of: {', '.join(params.candidates)}"


def _bad_compiles(params: Params) -> Iterable[str]:
    for name, spec in params.compile.items():
        if spec.candidate not in params.candidates:
            held = [other for other in params.candidates if _can_hold(params, spec, other)]
            remedy = f"name one of: {', '.join(held)}" if held else "remove it: this target holds no candidate"
            yield f"compile.{name}: unknown candidate `{spec.candidate}`; {remedy}"
            continue
        if name != f"{spec.candidate}-{spec.target}":
            yield f"compile.{name}: call it `{spec.candidate}-{spec.target}`, which is where its files will lie"
        if problem := _unheld(params, spec):
            yield f"compile.{name}: {problem}"


def _can_hold(params: Params, spec: GgufTarget | OnnxTarget | AutogptqTarget, candidate: str) -> bool:
    return _unheld(params, spec.model_copy(update={"candidate": candidate})) is None


def _unheld(params: Params, spec: GgufTarget | OnnxTarget | AutogptqTarget) -> str | None:
    """Why the target cannot hold the candidate's weights, as far as its settings tell."""
    try:
        config = params.strategy_config(spec.candidate)
    except ConfigError:
        return None  # the bad override is reported by itself
    links = [spec.candidate, *ancestors(params, spec.candidate)]
    if isinstance(spec, OnnxTarget) and any(params.candidates[link].apply in MIXTURES for link in links):
        return "ONNX Runtime's builder does not take mixtures of experts; compile it for gguf"
    if isinstance(config, LoraConfig) and not config.merge:
        return "its LoRA adapter is kept apart (merge: false), so it would be left out; set merge: true"
    return _unheld_by(config, spec)


def _unheld_by(config: Section, spec: GgufTarget | OnnxTarget | AutogptqTarget) -> str | None:
    """Why the target cannot hold what `config` makes."""
    if not isinstance(config, QuantisationConfig):
        return "only a quantised candidate has AutoGPTQ's format" if isinstance(spec, AutogptqTarget) else None
    if isinstance(config, GptqConfig) and config.act_order and not isinstance(spec, AutogptqTarget):
        return "with act_order: true neighbouring weights share no scale, which this target needs; set it to false"
    if isinstance(spec, OnnxTarget) and (len(config.widths) > 1 or config.bits not in {4, 8}):
        return "ONNX Runtime's builder takes 4 or 8 bits, and the same for all layers"
    if isinstance(spec, GgufTarget):
        if config.group_size % 32:
            return (
                f"group_size {config.group_size}: GGUF's blocks hold 32 weights; choose "
                f"{', '.join(str(size) for size in GROUP_SIZES if not size % 32)}"
            )
        if 8 in config.widths and not config.symmetric:
            return "GGUF has no type for 8-bit codes with a zero of their own; set symmetric: true"
    return None


def _group_size_remedy(params: Params, name: str, config: QuantisationConfig, sizes: tuple[int, ...]) -> str:
    """Group sizes that divide the layers and that every target of the candidate holds."""
    targets = [spec for spec in params.compile.values() if spec.candidate == name]
    fitting = [
        size
        for size in fitting_group_sizes(sizes)
        if not any(_unheld_by(config.model_copy(update={"group_size": size}), spec) for spec in targets)
    ]
    if fitting:
        return f"choose {', '.join(map(str, fitting))}"
    return "no supported group size fits; remove this candidate, or quantise one with other widths"


def _merges(params: Params, candidate: str) -> bool:
    try:
        config = params.strategy_config(candidate)
    except ConfigError:
        return True  # the bad override is reported by itself
    return isinstance(config, LoraConfig) and config.merge


def _bad_overrides(params: Params) -> list[str]:
    problems: list[str] = []
    for name in params.candidates:
        try:
            params.strategy_config(name)
        except ConfigError as error:
            problems += error.problems
    return problems


def needing_gpu(params: Params) -> dict[str, str]:
    """The candidates that only a machine with a GPU can make, and the setting that asks for it."""
    configs = {name: params.strategy_config(name) for name in params.candidates}
    return {name: c.needs_gpu for name, c in configs.items() if isinstance(c, TrainingConfig) and c.needs_gpu}


def require_gpu(params: Params, candidates: Collection[str]) -> None:
    """Refuses to make `candidates` that need a GPU on a machine without one, before anything expensive starts.

    Raises:
        ConfigError: one line for each of them, and for bitsandbytes where it is wanted and missing.
    """
    wants = {name: setting for name, setting in needing_gpu(params).items() if name in candidates}
    if not wants:
        return
    import torch  # seconds, which only those pay who ask for a GPU

    problems = [
        f"candidates.{name}: `{setting}` needs an NVIDIA GPU and torch finds none that can; run this candidate where "
        "there is one, or use another variant or precision"
        for name, setting in wants.items()
        if not torch.cuda.is_available()
        or (setting == BFLOAT16 and not torch.cuda.is_bf16_supported(including_emulation=False))
    ]
    if QLORA in wants.values() and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f"`{QLORA}` needs bitsandbytes; run: pip install 'lilliput[gpu]'")
    if problems:
        raise ConfigError(problems)


def check_shape(params: Params, candidate: str, model_config: Any) -> None:
    """Refuses, as soon as the shape of `candidate` is known, what its descendants could not be made from it.

    Args:
        params: all of params.yaml.
        candidate: the candidate whose checkpoint has `model_config`.
        model_config: the transformers configuration of that checkpoint.

    Raises:
        ConfigError: more would be pruned than there is, or a group size or the pattern 2:4 divides no layer, further
            down the chain.
    """
    problems = []
    for name in params.candidates:
        chain = [name, *ancestors(params, name)]
        if candidate in chain[1:]:
            problems += _shape_problems(params, name, chain[: chain.index(candidate)], model_config)
    if problems:
        raise ConfigError(problems)


def _shape_problems(params: Params, name: str, chain: list[str], model_config: Any) -> Iterable[str]:
    weight_bytes = model_config.dtype.itemsize if model_config.dtype else 4
    for link in reversed(chain):
        config = params.strategy_config(link)
        if isinstance(config, PruneConfig):
            try:
                model_config = pruned(model_config, config, weight_bytes)
            except StrategyError as error:
                if link == name:  # else it is reported there
                    yield f"candidates.{name}: {error}"
                return
    yield from _indivisible(params, name, linear_inputs(model_config))
    yield from _unshared(params, name, model_config)


def _unshared(params: Params, name: str, model_config: Any) -> Iterable[str]:
    config = params.strategy_config(name)
    if isinstance(config, MoeConfig) and model_config.intermediate_size % (config.experts + config.shared):
        yield (
            f"candidates.{name}: {config.experts} experts and {config.shared} shared ones do not divide the "
            f"{model_config.intermediate_size} neurons of a layer; "
            f"{expert_numbers(model_config.intermediate_size, config)}"
        )


def _indivisible(params: Params, name: str, sizes: tuple[int, ...]) -> Iterable[str]:
    config, listed = params.strategy_config(name), ", ".join(map(str, sizes))
    if isinstance(config, QuantisationConfig) and any(size % config.group_size for size in sizes):
        yield (
            f"candidates.{name}: group_size {config.group_size} does not divide the layers' input sizes {listed}; "
            f"{_group_size_remedy(params, name, config, sizes)}"
        )
    if isinstance(config, SparsifyConfig) and config.pattern == "2:4" and any(size % 4 for size in sizes):
        yield f"candidates.{name}: pattern 2:4 needs inputs in fours, but layers have {listed}; choose unstructured"
