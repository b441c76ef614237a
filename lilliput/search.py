"""The space of a search: possible chains of strategies with their settings, and the names of their candidates."""

from __future__ import annotations

import difflib
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, model_validator
from ruamel.yaml import YAML

from lilliput.config import CandidateConfig, Name, Params, Positive, Section, StrategyName
from lilliput.config.section import Seed, matching
from lilliput.errors import ConfigError
from lilliput.graph import ancestors, check_graph, check_shape
from lilliput.records import Decision

ARROW = " → "
MAX_COMBINATIONS = 200  # of one strategy's settings, checked in advance; each chain is checked before its proposal
Scalar = bool | int | float | str | None
SettingPath = Annotated[str, matching(r"\w+(\.\w+)+", "the name of a setting, such as strategy.key")]
Metric = Literal[
    "accuracy_choice",
    "accuracy_free",
    "hallucination_rate",
    "selective_accuracy",
    "perplexity",
    "energy_per_query_j",
    "energy_per_right_answer_j",
    "accessibility",
    "size_bytes",
    "peak_rss_bytes",
    "rate_tokens_per_s",
]


class Range(Section):
    """Numbers from `low` to `high` inclusive, integers if both bounds are. `log`: uniform in the logarithm."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("`low` must be below `high`, and above 0 with `log`")
        return self


class SearchConfig(Section):
    """The space of a search, its objectives and its seed.

    Attributes:
        base: candidate of params.yaml that every chain starts from.
        max_length: maximum number of strategies in a chain.
        max_times: maximum number of times that a strategy occurs in a chain.
        strategies: allowed strategies, each with its allowed predecessors; `any`: only the graph's rules apply.
        settings: varied settings, such as `prune.amount.value`: a list of choices, or a range.
        objectives: metrics of the evaluation record, to maximise or minimise.
    """

    base: Name
    seed: Seed
    max_length: Positive
    max_times: Positive = 1
    strategies: Annotated[
        dict[StrategyName, Literal["any"] | tuple[StrategyName | Literal["base"], ...]], Field(min_length=1)
    ]
    settings: dict[SettingPath, Annotated[tuple[Scalar, ...], Field(min_length=1)] | Range]
    objectives: Annotated[dict[Metric, Literal["max", "min"]], Field(min_length=2)]


@dataclass(frozen=True)
class Step:
    """A strategy and the settings that the search chose."""

    strategy: str
    settings: tuple[tuple[str, Scalar], ...] = ()

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {json.dumps(value)}" for name, value in self.settings)
        return f"{self.strategy} ({chosen})" if chosen else self.strategy


Chain = tuple[Step, ...]


class Suggests(Protocol):
    """Suggests a value for each name: a running or finished Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Returns one of `choices`."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Returns an integer."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Returns a number."""
        ...


def describe(chain: Chain) -> str:
    """Returns text such as `lora (rank 8) → gptq (bits 4)`."""
    return ARROW.join(map(str, chain))


class Space:
    """The chains that `config` allows on the candidates of `params`.

    A chain is possible if `check_graph` accepts it and, once the base's `shape` (its transformers configuration) is
    known, `check_shape`.

    Raises:
        ConfigError: the base, a setting or a value is unknown, or a strategy fits into no chain.
    """

    def __init__(self, config: SearchConfig, params: Params, file: str, shape: Any = None) -> None:
        if config.base not in params.candidates:
            known = ", ".join(params.candidates)
            raise ConfigError(f"{file}: base: unknown candidate `{config.base}`; params.yaml has: {known}")
        self.config, self._shape = config, shape
        self._rooted = [*reversed(ancestors(params, config.base)), config.base]
        self.params = _with(params, {name: params.candidates[name] for name in self._rooted})
        problems = list(_unknown_settings(config, params, file)) or list(_bad_values(config, params, file))
        if problems:
            raise ConfigError(problems)
        self._choices = {name: list(_valid_settings(config, params, name)) for name in config.strategies}
        self.sequences = self._sequences(file)

    @property
    def reference(self) -> list[str]:
        """The references of chains: the base, and the loaded model that it comes from."""
        return list(dict.fromkeys([self._rooted[0], self.config.base]))

    def chain(self, trial: Suggests) -> Chain:
        """Returns the chain that `trial` suggests; its settings may still be impossible."""
        sequence = trial.suggest_categorical("sequence", self.sequences).split(ARROW)
        return tuple(
            Step(strategy, tuple(self._settings(trial, strategy, sequence[: place + 1].count(strategy))))
            for place, strategy in enumerate(sequence)
        )

    def problem(self, chain: Chain) -> str | None:
        """Returns why `chain` is impossible; None if it is possible."""
        specs = {name: CandidateConfig.model_validate(line) for name, line in self.candidates(chain).items()}
        params = _with(self.params, self.params.candidates | specs)
        try:
            check_graph(params, "search")
            if self._shape is not None:
                check_shape(params, self.config.base, self._shape)
        except ConfigError as error:
            return str(error)
        return None

    def candidates(self, chain: Chain) -> dict[str, dict[str, Any]]:
        """Returns the lines of params.yaml for `chain`, in order; equal prefixes of chains have equal names."""
        lines: dict[str, dict[str, Any]] = {}
        links = [(name, self.params.candidates[name].apply) for name in self._rooted]
        for length, step in enumerate(chain, start=1):
            line: dict[str, Any] = {"from": links[-1][0], "apply": step.strategy}
            if step.strategy == "distill":
                line["teacher"] = _teacher(links)
            if step.settings:
                line["with"] = _overrides(self.params, step)
            name = _name(self.config.base, chain[:length])
            lines[name] = line
            links.append((name, step.strategy))
        return lines

    def name(self, chain: Chain) -> str:
        """Returns the name of the candidate at the end of `chain`."""
        return _name(self.config.base, chain)

    def _settings(self, trial: Suggests, strategy: str, occurrence: int) -> Iterator[tuple[str, Scalar]]:
        for setting, values in _settings_for(self.config, strategy):
            place = f"{strategy}.{setting}" + (f" #{occurrence}" if occurrence > 1 else "")
            if not isinstance(values, Range):
                yield setting, trial.suggest_categorical(place, values)
            elif isinstance(values.low, int) and isinstance(values.high, int):
                yield setting, trial.suggest_int(place, values.low, values.high, log=values.log)
            else:
                drawn = trial.suggest_float(place, values.low, values.high, log=values.log)
                yield setting, float(f"{drawn:.3g}")  # more digits make no difference to the result

    def _sequences(self, file: str) -> tuple[str, ...]:
        possible, reasons, used = [], {}, set()
        prefixes: list[tuple[str, ...]] = [()]
        for _ in range(self.config.max_length):
            longer = [(*start, strategy) for start in prefixes for strategy in self._allowed_after(start)]
            problems = {sequence: self._sequence_problem(sequence) for sequence in longer}
            prefixes = [sequence for sequence, problem in problems.items() if problem is None]
            reasons |= {sequence[-1]: problem for sequence, problem in problems.items() if problem}
            used |= {sequence[-1] for sequence in prefixes}
            possible += prefixes
        if useless := [strategy for strategy in self.config.strategies if strategy not in used]:
            why = "no listed strategy may precede it"
            raise ConfigError(
                [f"{file}: strategies.{name}: fits into no chain: {reasons.get(name, why)}" for name in useless]
            )
        return tuple(ARROW.join(sequence) for sequence in possible)

    def _allowed_after(self, start: tuple[str, ...]) -> Iterator[str]:
        last = start[-1] if start else "base"
        for strategy, predecessors in self.config.strategies.items():
            if (predecessors == "any" or last in predecessors) and start.count(strategy) < self.config.max_times:
                yield strategy

    def _sequence_problem(self, sequence: tuple[str, ...]) -> str | None:
        """Returns why `sequence` is impossible; None if it is possible.

        Tries the first valid settings of each step, then the other settings of one step at a time.
        """
        options = [self._choices[strategy] for strategy in sequence]
        first = tuple(steps[0] for steps in options)
        variants = [first] + [
            (*first[:place], step, *first[place + 1 :]) for place, steps in enumerate(options) for step in steps[1:]
        ]
        problems = map(self.problem, variants)
        reason = next(problems)
        return reason if reason and all(problems) else None


def winners(space: Space, chains: Mapping[str, Chain], decisions: Mapping[str, Decision], origin: str) -> str:
    """Returns the lines under `candidates` of params.yaml for the champion of each device, as YAML.

    Args:
        space: of the search.
        chains: finished chains by candidate.
        decisions: by device.
        origin: source of these lines, for a comment.
    """
    notes = [f"From {origin}.", "Paste under `candidates:` of params.yaml:"]
    lines: dict[str, dict[str, Any]] = {}
    for device, decision in decisions.items():
        champion = decision.champion or "no champion"
        notes.append(f"{device}: {champion}, {decision.reason}")
        if champion in chains:
            lines |= space.candidates(chains[champion])
    text = "".join(f"  {name}: {_in_one_line(line)}\n" for name, line in lines.items())
    return "".join(f"  # {note}\n" for note in notes) + text


def _in_one_line(line: Mapping[str, Any]) -> str:
    yaml = YAML()
    yaml.default_flow_style, yaml.width = True, 10_000
    stream = io.StringIO()
    yaml.dump(line, stream)
    return stream.getvalue().strip()


def _name(base: str, chain: Chain) -> str:
    """Returns a name such as `s-lora-gptq-1f3a9c07`: the sequence, cut to 40 characters in all, and a hash."""
    steps = [[step.strategy, step.settings] for step in chain]
    digest = hashlib.sha256(json.dumps([base, steps]).encode()).hexdigest()[:8]
    return f"s-{'-'.join(step.strategy for step in chain)[:29]}-{digest}"


def _teacher(links: Sequence[tuple[str, str]]) -> str:
    """Returns the last LoRA ancestor, otherwise the parent of the first pruning, otherwise the direct parent.

    Args:
        links: name and strategy of each ancestor, the root first.
    """
    if tuned := [name for name, strategy in links if strategy == "lora"]:
        return tuned[-1]
    return next((before[0] for before, after in itertools.pairwise(links) if after[1] == "prune"), links[-1][0])


def _with(params: Params, candidates: dict[str, CandidateConfig]) -> Params:
    caching = params.caching.model_copy(update={"candidates": ()})  # a search only evaluates
    return params.model_copy(update={"candidates": candidates, "caching": caching, "compile": {}, "serving": {}})


def _settings_for(config: SearchConfig, strategy: str) -> Iterator[tuple[str, tuple[Scalar, ...] | Range]]:
    for path, values in config.settings.items():
        owner, _, setting = path.partition(".")
        if owner == strategy:
            yield setting, values


def _combinations(config: SearchConfig, strategy: str) -> Iterator[Step]:
    """Yields each combination of choices, up to MAX_COMBINATIONS; of a range only its bounds."""
    varied = dict(_settings_for(config, strategy))
    choices = [(values.low, values.high) if isinstance(values, Range) else values for values in varied.values()]
    for chosen in itertools.islice(itertools.product(*choices), MAX_COMBINATIONS):
        yield Step(strategy, tuple(zip(varied, chosen, strict=True)))


def _valid_settings(config: SearchConfig, params: Params, strategy: str) -> Iterator[Step]:
    return (step for step in _combinations(config, strategy) if _refusal(params, step) is None)


def _refusal(params: Params, step: Step) -> str | None:
    spec = CandidateConfig.model_validate({"from": "source", "apply": step.strategy, "with": _overrides(params, step)})
    try:
        _with(params, {step.strategy: spec}).strategy_config(step.strategy)
    except ConfigError as error:
        return str(error)
    return None


def _overrides(params: Params, step: Step) -> dict[str, Any]:
    """Returns `with` of a candidate: the chosen settings; a nested section keeps its other values."""
    chosen: dict[str, Any] = {}
    for path, picked in step.settings:
        section, defaults = chosen, getattr(params.strategies, step.strategy).model_dump(mode="json")
        *sections, key = path.split(".")
        for name in sections:
            defaults = defaults.get(name) or {}
            section = section.setdefault(name, dict(defaults))
        section[key] = picked
    return chosen


def _settings_of(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of a section's settings, including nested sections."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Section):
                yield from _settings_of(part, f"{prefix}{name}.")


def _unknown_settings(config: SearchConfig, params: Params, file: str) -> Iterable[str]:
    for path in config.settings:
        owner, _, setting = path.partition(".")
        if owner not in config.strategies:
            yield f"{file}: settings.{path}: `{owner}` is not under `strategies`; add it there or remove this"
        elif setting not in (known := list(_settings_of(type(getattr(params.strategies, owner))))):
            close = difflib.get_close_matches(setting, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it has: {', '.join(known)}"
            yield f"{file}: settings.{path}: no setting of {owner}; {hint}"


def _bad_values(config: SearchConfig, params: Params, file: str) -> Iterable[str]:
    """Reports values that are rejected with every choice of the strategy's other settings."""
    refusals: dict[tuple[str, str], list[str | None]] = {}
    for strategy in config.strategies:
        for step in _combinations(config, strategy):
            refusal = _refusal(params, step)
            for setting, chosen in step.settings:
                refusals.setdefault((f"{strategy}.{setting}", json.dumps(chosen)), []).append(refusal)
    for (path, chosen), reasons in refusals.items():
        if all(reasons):
            yield f"{file}: settings.{path}: {chosen} is rejected: {reasons[0]}"
