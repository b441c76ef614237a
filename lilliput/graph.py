"""The candidate graph: ancestors, order, and rules on what is possible."""

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
    GgmlConfig,
    GgufTarget,
    GptqConfig,
    LoraConfig,
    MoeConfig,
    OnnxTarget,
    Params,
    PruneConfig,
    QuantisationConfig,
    SparseConfig,
    SparsifyConfig,
    TrainingConfig,
)
from lilliput.config.strategies import is_external_teacher
from lilliput.errors import ConfigError, StrategyError
from lilliput.ggml.rules import describe_decoder, matrices_of_shape, problem
from lilliput.shape import expert_numbers, fitting_group_sizes, head_dim, linear_inputs, pruned
from lilliput.target_rules import unsupported_by

ROOT = "source"
_HARDWARE = {
    QLORA: "an NVIDIA GPU",
    BFLOAT16: "an NVIDIA GPU or a processor that multiplies bfloat16 numbers (avx512_bf16)",
}
MIXTURES = {"moe", "experts"}  # strategies that produce a mixture of experts


def ancestors(params: Params, candidate: str) -> list[str]:
    """Returns the ancestors of `candidate`, nearest parent first, without the source."""
    chain: list[str] = []
    parent = params.candidates[candidate].parent
    while parent != ROOT:
        chain.append(parent)
        parent = params.candidates[parent].parent
    return chain


def topological_order(params: Params) -> list[str]:
    """Returns all candidates, each after its parent, otherwise in the order of params.yaml."""
    depth = {name: len(ancestors(params, name)) for name in params.candidates}
    return sorted(params.candidates, key=depth.__getitem__)


def check_graph(params: Params, file: str) -> None:
    """Rejects a graph that cannot run.

    Raises:
        ConfigError: one line per unknown parent, cycle, misplaced teacher, bad override, impossible succession, unknown
            caching candidate and target that cannot hold its candidate.
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
        yield f"candidates.{ROOT}: this is the name of the source model; rename the candidate"
    for name, spec in params.candidates.items():
        if spec.parent not in known:
            possible = _possible_parents(params, name)
            close = difflib.get_close_matches(spec.parent, possible, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"name one of: {', '.join(possible)}"
            yield f"candidates.{name}.from: unknown parent `{spec.parent}`; {hint}"


def _possible_parents(params: Params, candidate: str) -> list[str]:
    """Returns the source for `load`; otherwise every candidate that does not descend from `candidate`."""
    if params.candidates[candidate].apply == "load":
        return [ROOT]
    descendants, added = {candidate}, True
    while added:
        added = {name for name, spec in params.candidates.items() if spec.parent in descendants} - descendants
        descendants |= added
    return [name for name in params.candidates if name not in descendants]


def _cycles(params: Params) -> Iterable[str]:
    try:
        TopologicalSorter({name: [spec.parent] for name, spec in params.candidates.items()}).prepare()
    except CycleError as error:
        loop = " → ".join(reversed(error.args[1]))
        yield f"candidates: their parents form a circle: {loop}; let one of them start `from: {ROOT}`"


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
            yield f"candidates.{name}.teacher: missing; name an ancestor of this candidate, or a pinned model"
        elif spec.teacher not in ancestors(params, name) and not is_external_teacher(spec.teacher):
            yield (
                f"candidates.{name}.teacher: `{spec.teacher}` is not an ancestor of `{name}`, so a change of it would "
                f"go unnoticed; choose one of: {', '.join(ancestors(params, name)) or 'none possible'}, or a pinned "
                "model (hub:<org>/<model>@<commit of 40 hex digits>, path:<dir>)"
            )


def _bad_successions(params: Params) -> Iterable[str]:
    for name, spec in params.candidates.items():
        if spec.parent == ROOT:
            continue
        parent = params.candidates[spec.parent]
        made_by = getattr(params.strategies, parent.apply)
        quantiser = _quantiser(params, spec.parent)
        if quantiser and spec.apply != "distill":
            first = params.candidates[quantiser]
            yield (
                f"candidates.{name}: `{spec.apply}` needs a float parent, but `{spec.parent}` is quantised by "
                f"{first.apply}; apply {spec.apply} first and quantise last (from: {first.parent})"
            )
        elif quantiser:
            yield from _bad_quantised_student(params, name, quantiser)
        if isinstance(made_by, SparseConfig):
            yield (
                f"candidates.{name}: `{spec.apply}` would not keep the zeros of `{spec.parent}`; apply {spec.apply} "
                f"first and {parent.apply} last (from: {parent.parent})"
            )
        if parent.apply == "lora" and not _merges(params, spec.parent):
            yield (
                f"candidates.{name}: `{spec.parent}` keeps its LoRA adapter separate (merge: false), so `{spec.apply}` "
                f"would not see it; set merge: true there"
            )


def _quantiser(params: Params, candidate: str) -> str | None:
    """Returns the candidate whose strategy quantised the weights of `candidate`; None if they are floats.

    `distill` keeps the grid of a quantised parent.
    """
    spec = params.candidates[candidate]
    if spec.parent == ROOT:
        return None
    if isinstance(getattr(params.strategies, spec.apply), QuantisationConfig | GgmlConfig):
        return candidate
    return _quantiser(params, spec.parent) if spec.apply == "distill" else None


def _bad_quantised_student(params: Params, candidate: str, quantiser: str) -> Iterable[str]:
    teacher, first = params.candidates[candidate].teacher, params.candidates[quantiser]
    if isinstance(getattr(params.strategies, first.apply), GgmlConfig):
        yield (
            f"candidates.{candidate}: `distill` cannot train the blocks of `{quantiser}`; apply distill first and "
            f"{first.apply} last (from: {first.parent}), or quantise it with gptq, rtn or awq"
        )
        return
    if teacher in params.candidates and _quantiser(params, teacher):
        yield (
            f"candidates.{candidate}.teacher: `{teacher}` is quantised, so it cannot teach what `{quantiser}` lost; "
            f"choose a float ancestor, for example `{first.parent}`"
        )
    try:
        config = params.strategy_config(quantiser)
    except ConfigError:
        return  # reported by _bad_overrides
    if isinstance(config, GptqConfig) and config.act_order:
        yield (
            f"candidates.{candidate}: `distill` cannot train the codes of `{quantiser}`, whose groups are mixed; set "
            "act_order: false there"
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
    """Whether the candidate's strategy works on experts. LoRA needs linear layers, and `experts` leaves none."""
    try:
        config = params.strategy_config(candidate)
    except ConfigError:
        return True  # reported by _bad_overrides
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
            yield f"compile.{name}: call it `{spec.candidate}-{spec.target}`, the folder of its files"
        if problem := _unsupported(params, spec):
            yield f"compile.{name}: {problem}"


def _can_hold(params: Params, spec: GgufTarget | OnnxTarget | AutogptqTarget, candidate: str) -> bool:
    return _unsupported(params, spec.model_copy(update={"candidate": candidate})) is None


def _unsupported(params: Params, spec: GgufTarget | OnnxTarget | AutogptqTarget) -> str | None:
    """Returns why the target cannot hold the candidate's weights, according to the settings; None if it can."""
    try:
        config = params.strategy_config(_quantiser(params, spec.candidate) or spec.candidate)
    except ConfigError:
        return None  # reported by _bad_overrides
    links = [spec.candidate, *ancestors(params, spec.candidate)]
    if isinstance(spec, OnnxTarget) and any(params.candidates[link].apply in MIXTURES for link in links):
        return "ONNX Runtime's builder does not take mixtures of experts; compile it for gguf"
    if isinstance(config, LoraConfig) and not config.merge:
        return "its LoRA adapter is separate (merge: false) and would be missing; set merge: true"
    return unsupported_by(config, spec)


def compiled_by_default(params: Params) -> dict[str, GgufTarget]:
    """Returns what to compile if the settings do not say: for GGUF, each candidate at the end of a chain.

    Leaves out those that GGUF cannot hold; empty if no device runs GGUF.
    """
    if not any(device.target == "gguf" for device in params.devices.values()):
        return {}
    parents = {spec.parent for spec in params.candidates.values()}
    forms = [GgufTarget(candidate=name, target="gguf") for name in params.candidates if name not in parents]
    return {f"{form.candidate}-gguf": form for form in forms if _unsupported(params, form) is None}


def _group_size_remedy(params: Params, name: str, config: QuantisationConfig, sizes: tuple[int, ...]) -> str:
    """Suggests group sizes that divide the layers and that every target of the candidate supports."""
    targets = [spec for spec in params.compile.values() if spec.candidate == name]
    fitting = [
        size
        for size in fitting_group_sizes(sizes)
        if not any(unsupported_by(config.model_copy(update={"group_size": size}), spec) for spec in targets)
    ]
    if fitting:
        return f"choose {', '.join(map(str, fitting))}"
    return "no supported group size fits; remove this candidate, or quantise one with other widths"


def _merges(params: Params, candidate: str) -> bool:
    try:
        config = params.strategy_config(candidate)
    except ConfigError:
        return True  # reported by _bad_overrides
    return isinstance(config, LoraConfig) and config.merge


def _bad_overrides(params: Params) -> list[str]:
    problems: list[str] = []
    for name in params.candidates:
        try:
            params.strategy_config(name)
        except ConfigError as error:
            problems += error.problems
    return problems


def needing_hardware(params: Params) -> dict[str, str]:
    """Returns the candidates that not every machine can make, with the setting that requires it."""
    configs = {name: params.strategy_config(name) for name in params.candidates}
    return {name: c.needs_hardware for name, c in configs.items() if isinstance(c, TrainingConfig) and c.needs_hardware}


def require_hardware(params: Params, candidates: Collection[str]) -> None:
    """Rejects `candidates` that this machine cannot make, before anything expensive starts.

    Raises:
        ConfigError: one line per candidate, and one for bitsandbytes if it is needed and missing.
    """
    required = {name: setting for name, setting in needing_hardware(params).items() if name in candidates}
    if not required:
        return
    from lilliput.hardware import has_gpu, multiplies_bfloat16  # imports torch, which few graphs need here

    available = {QLORA: has_gpu(), BFLOAT16: multiplies_bfloat16()}
    problems = [
        f"candidates.{name}: `{setting}` needs {_HARDWARE[setting]}, and torch finds none; run this candidate on such "
        "a machine, or use another variant or precision"
        for name, setting in required.items()
        if not available[setting]
    ]
    if QLORA in required.values() and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f"`{QLORA}` needs bitsandbytes; run: pip install 'lilliput[gpu]'")
    if problems:
        raise ConfigError(problems)


def check_shape(params: Params, candidate: str, model_config: Any) -> None:
    """Rejects descendants of `candidate` that are impossible for its shape, as soon as the shape is known.

    Args:
        params: all of params.yaml.
        candidate: the candidate whose checkpoint has `model_config`.
        model_config: the transformers configuration of that checkpoint.

    Raises:
        ConfigError: a descendant prunes more than there is, or its group size or pattern 2:4 does not divide a layer.
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
                if link == name:  # otherwise reported for `link`
                    yield f"candidates.{name}: {error}"
                return
    yield from _bad_group_sizes(params, name, linear_inputs(model_config))
    yield from _bad_expert_counts(params, name, model_config)
    yield from _bad_file_type(params, name, model_config)


def _bad_expert_counts(params: Params, name: str, model_config: Any) -> Iterable[str]:
    config = params.strategy_config(name)
    if isinstance(config, MoeConfig) and model_config.intermediate_size % (config.experts + config.shared):
        yield (
            f"candidates.{name}: {config.experts} experts and {config.shared} shared ones do not divide the "
            f"{model_config.intermediate_size} neurons of a layer; "
            f"{expert_numbers(model_config.intermediate_size, config)}"
        )


def _bad_file_type(params: Params, name: str, model_config: Any) -> Iterable[str]:
    config = params.strategy_config(name)
    if isinstance(config, GgmlConfig):
        reason = problem(
            config.type,
            matrices_of_shape(model_config, head_dim(model_config)),
            describe_decoder(model_config),
            importance=config.importance,
            falls_back=config.other_widths == "fallback",
        )
        if reason:
            yield f"candidates.{name}: {reason}"


def _bad_group_sizes(params: Params, name: str, sizes: tuple[int, ...]) -> Iterable[str]:
    config, listed = params.strategy_config(name), ", ".join(map(str, sizes))
    if isinstance(config, QuantisationConfig) and any(size % config.group_size for size in sizes):
        yield (
            f"candidates.{name}: group_size {config.group_size} does not divide the layers' input sizes {listed}; "
            f"{_group_size_remedy(params, name, config, sizes)}"
        )
    if isinstance(config, SparsifyConfig) and config.pattern == "2:4" and any(size % 4 for size in sizes):
        yield f"candidates.{name}: pattern 2:4 needs inputs in fours, but layers have {listed}; choose unstructured"
