"""What a search may try: chains of strategies with their settings, what each is called, and which are impossible."""

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
from lilliput.config.section import Seed
from lilliput.errors import ConfigError
from lilliput.graph import ancestors, check_graph, check_shape

ARROW = " → "
MOST_COMBINATIONS = 200  # of one strategy's settings are tried beforehand; every chain is checked before it is proposed
Scalar = bool | int | float | str | None
SettingPath = Annotated[str, Field(pattern=r"^\w+(\.\w+)+$")]
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
    """Numbers from `low` to `high`, both included; whole ones if both are. `log` draws them evenly by magnitude."""

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
        base: the candidate of params.yaml that every chain starts from.
        max_length: strategies in a chain, at most.
        max_times: how often one strategy may occur in a chain.
        strategies: what may be chained, and directly after what; `any` leaves that to the candidate graph's own rules.
        settings: what varies, `prune.amount.value` say: a list to choose from, or a range.
        objectives: metrics of the evaluation record, and whether more or less of each is better.
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
    """A strategy and those of its settings that the search chose."""

    strategy: str
    settings: tuple[tuple[str, Scalar], ...] = ()

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {json.dumps(value)}" for name, value in self.settings)
        return f"{self.strategy} ({chosen})" if chosen else self.strategy


Chain = tuple[Step, ...]


class Suggests(Protocol):
    """What gives a value for each name: a trial of Optuna, running or finished."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number."""
        ...


def describe(chain: Chain) -> str:
    """`lora (rank 8) → gptq (bits 4)`."""
    return ARROW.join(map(str, chain))


class Space:
    """The chains that `config` allows on the candidates of `params`.

    What may follow what is the candidate graph's business: a chain is possible if `check_graph` takes it and, once the
    base's `shape` (its transformers configuration) is known, `check_shape`.

    Raises:
        ConfigError: the base, a setting or a value is unknown, or a strategy fits in no chain.
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
        """What chains are compared with: the base, and the loaded model it comes from."""
        return list(dict.fromkeys([self._rooted[0], self.config.base]))

    def chain(self, trial: Suggests) -> Chain:
        """The chain that `trial` suggests; it may still be impossible by its settings."""
        sequence = trial.suggest_categorical("sequence", self.sequences).split(ARROW)
        seen: dict[str, int] = {}
        steps = []
        for strategy in sequence:
            seen[strategy] = seen.get(strategy, 0) + 1
            steps.append(Step(strategy, tuple(self._settings(trial, strategy, seen[strategy]))))
        return tuple(steps)

    def problem(self, chain: Chain) -> str | None:
        """Why `chain` is impossible; None if it is not."""
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
        """The lines of params.yaml that make `chain`, its beginnings first; equal beginnings have equal names."""
        lines: dict[str, dict[str, Any]] = {}
        made = [(name, self.params.candidates[name].apply) for name in self._rooted]
        for length, step in enumerate(chain, start=1):
            line: dict[str, Any] = {"from": made[-1][0], "apply": step.strategy}
            if step.strategy == "distill":
                line["teacher"] = _teacher(made)
            if step.settings:
                line["with"] = _overrides(self.params, step)
            name = _name(self.config.base, chain[:length])
            lines[name] = line
            made.append((name, step.strategy))
        return lines

    def name(self, chain: Chain) -> str:
        """The candidate at the end of `chain`."""
        return _name(self.config.base, chain)

    def _settings(self, trial: Suggests, strategy: str, time: int) -> Iterator[tuple[str, Scalar]]:
        for setting, values in _of(self.config, strategy):
            place = f"{strategy}.{setting}" + (f" #{time}" if time > 1 else "")
            if not isinstance(values, Range):
                yield setting, trial.suggest_categorical(place, values)
            elif isinstance(values.low, int) and isinstance(values.high, int):
                yield setting, trial.suggest_int(place, values.low, values.high, log=values.log)
            else:
                drawn = trial.suggest_float(place, values.low, values.high, log=values.log)
                yield setting, float(f"{drawn:.3g}")  # more digits would only tell apart what is the same

    def _sequences(self, file: str) -> tuple[str, ...]:
        found, reasons, used = [], {}, set()
        beginnings: list[tuple[str, ...]] = [()]
        for _ in range(self.config.max_length):
            longer = [(*start, strategy) for start in beginnings for strategy in self._allowed_after(start)]
            problems = {sequence: self._sequence_problem(sequence) for sequence in longer}
            beginnings = [sequence for sequence, problem in problems.items() if problem is None]
            reasons |= {sequence[-1]: problem for sequence, problem in problems.items() if problem}
            used |= {sequence[-1] for sequence in beginnings}
            found += beginnings
        if useless := [strategy for strategy in self.config.strategies if strategy not in used]:
            why = "it comes after nothing that is listed"
            raise ConfigError(
                [f"{file}: strategies.{name}: fits in no chain: {reasons.get(name, why)}" for name in useless]
            )
        return tuple(ARROW.join(sequence) for sequence in found)

    def _allowed_after(self, start: tuple[str, ...]) -> Iterator[str]:
        last = start[-1] if start else "base"
        for strategy, after in self.config.strategies.items():
            if (after == "any" or last in after) and start.count(strategy) < self.config.max_times:
                yield strategy

    def _sequence_problem(self, sequence: tuple[str, ...]) -> str | None:
        """None if some settings make `sequence` possible: the first valid ones of each step, or one step's others."""
        options = [self._choices[strategy] for strategy in sequence]
        first = tuple(steps[0] for steps in options)
        variants = [first] + [
            (*first[:place], step, *first[place + 1 :]) for place, steps in enumerate(options) for step in steps[1:]
        ]
        problems = map(self.problem, variants)
        reason = next(problems)
        return reason if reason and all(problems) else None


def value(record: Mapping[str, Any], metric: str) -> float | None:
    """The number that `record` has for `metric`; None where it was unavailable."""
    found = record.get(metric)
    return found.get("value") if isinstance(found, Mapping) else found


def winners(space: Space, chains: Mapping[str, Chain], decisions: Mapping[str, Mapping[str, Any]], origin: str) -> str:
    """The lines under `candidates` of params.yaml that make the champion of each device, as YAML.

    Args:
        space: of the search.
        chains: the finished ones, by candidate.
        decisions: champion and reason by device, as in promotion.json.
        origin: where these lines come from.
    """
    notes = [f"From {origin}.", "Paste under `candidates:` of params.yaml:"]
    lines: dict[str, dict[str, Any]] = {}
    for device, decision in decisions.items():
        champion = decision["champion"] or "nobody"
        notes.append(f"{device}: {champion}, {decision['reason']}")
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
    """`s-lora-gptq-1f3a9c07`: the sequence as far as it goes into 40 characters, and a hash of all there is to it."""
    steps = [[step.strategy, step.settings] for step in chain]
    digest = hashlib.sha256(json.dumps([base, steps]).encode()).hexdigest()[:8]
    return f"s-{'-'.join(step.strategy for step in chain)[:29]}-{digest}"


def _teacher(made: Sequence[tuple[str, str]]) -> str:
    """The last LoRA ancestor; without one what the first pruning was applied to; without that the parent.

    Args:
        made: name and strategy of each ancestor, the root first.
    """
    if tuned := [name for name, strategy in made if strategy == "lora"]:
        return tuned[-1]
    return next((before[0] for before, after in itertools.pairwise(made) if after[1] == "prune"), made[-1][0])


def _with(params: Params, candidates: dict[str, CandidateConfig]) -> Params:
    caching = params.caching.model_copy(update={"candidates": ()})  # a search measures, compiles and serves none
    return params.model_copy(update={"candidates": candidates, "caching": caching, "compile": {}, "serving": {}})


def _of(config: SearchConfig, strategy: str) -> Iterator[tuple[str, tuple[Scalar, ...] | Range]]:
    for path, values in config.settings.items():
        owner, _, setting = path.partition(".")
        if owner == strategy:
            yield setting, values


def _combinations(config: SearchConfig, strategy: str) -> Iterator[Step]:
    """Every choice with every other, up to MOST_COMBINATIONS; of a range its ends."""
    varied = dict(_of(config, strategy))
    ends = [(values.low, values.high) if isinstance(values, Range) else values for values in varied.values()]
    for chosen in itertools.islice(itertools.product(*ends), MOST_COMBINATIONS):
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
    """`with` of a candidate: what `step` chose, a nested setting among its unchanged neighbours."""
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
    """The dotted names of a section's settings, those of the sections in it included."""
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
    """A value is bad if it is refused together with every choice of the strategy's other settings."""
    refusals: dict[tuple[str, str], list[str | None]] = {}
    for strategy in config.strategies:
        for step in _combinations(config, strategy):
            refusal = _refusal(params, step)
            for setting, chosen in step.settings:
                refusals.setdefault((f"{strategy}.{setting}", json.dumps(chosen)), []).append(refusal)
    for (path, chosen), found in refusals.items():
        if all(found):
            yield f"{file}: settings.{path}: {chosen} is refused: {found[0]}"
