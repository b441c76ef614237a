"""The joint with Optuna: which chain is tried next, what each gave, and the record of it that outlives a kill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState

from lilliput.promote import metric_value
from lilliput.search import Chain, SearchConfig, Space, describe

optuna.logging.set_verbosity(optuna.logging.WARNING)  # what Optuna would tell is told by the flow

REPEATS = 20  # so many known chains in a row, and the next ones are drawn blindly
MOST_REPEATS = 300  # so many, and the space counts as exhausted

# Attributes of a trial that was begun.
CANDIDATE, REASON, SECONDS, FIGURES = "candidate", "reason", "seconds", "figures"


@dataclass(frozen=True)
class Budget:
    """How many trials the study may hold in all, and how many minutes this run may take."""

    trials: int
    minutes: float


@dataclass(frozen=True)
class Forecast:
    """What a chain is expected to take by the record of earlier stages, and how many stages have none."""

    seconds: float
    unknown: int

    def __str__(self) -> str:
        rest = f" plus {self.unknown} stages never measured" if self.unknown else ""
        return f"about {self.seconds / 60:.1f} min{rest} (an estimate from earlier runs)"


@dataclass(frozen=True)
class Broken:
    """A chain that could not be made or measured; `candidate` is the beginning that could not be made, if it was that.

    Every chain with that beginning would fail there too.
    """

    reason: str
    candidate: str | None = None


Outcome = Mapping[str, Any] | Broken


def study_name(space: Space) -> str:
    """`search-1f3a9c07`: the same for the same space, objectives and seed."""
    identity = "\n".join([space.config.model_dump_json(), *space.sequences])
    return f"search-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def open_study(space: Space, database: Path, holds: Callable[[list[Chain]], bool]) -> optuna.Study:
    """The study of `space`, made or gone on with; what it has begun and not finished is asked again.

    Args:
        space: its config names the study.
        database: an SQLite file.
        holds: whether the records of these chains are still what measuring them would give. If not, the study starts
            anew, with all it had tried first in the queue.
    """
    name, storage = study_name(space), optuna.storages.RDBStorage(f"sqlite:///{database}")
    study = _create(name, storage, space.config)
    past = study.get_trials(deepcopy=False)
    if holds(list(finished(study, space).values())):
        killed = [trial for trial in past if trial.state == TrialState.RUNNING]
        for trial in killed:
            study.tell(trial.number, state=TrialState.FAIL)
        again = killed + [trial for trial in begun(study) if trial.state == TrialState.FAIL]
    else:
        optuna.delete_study(study_name=name, storage=storage)
        study = _create(name, storage, space.config)
        again = past
    waiting = [_asked(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,))]
    for params in map(_asked, again):
        if params and params not in waiting:
            study.enqueue_trial(params)
            waiting.append(params)
    return study


def begun(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that did work, the last of each candidate; one that was finished rather than one that failed."""
    found: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
        candidate = trial.user_attrs.get(CANDIDATE)
        if candidate and (candidate not in found or found[candidate].state != TrialState.COMPLETE):
            found[candidate] = trial
    return list(found.values())


def finished(study: optuna.Study, space: Space) -> dict[str, Chain]:
    """The chains that were made and measured, by candidate."""
    complete = [trial for trial in begun(study) if trial.state == TrialState.COMPLETE]
    return {trial.user_attrs[CANDIDATE]: space.chain(FixedTrial(trial.params)) for trial in complete}


def front(study: optuna.Study) -> set[str]:
    """The candidates that no other one dominates: at least as good on every objective and better on one."""
    return {trial.user_attrs[CANDIDATE] for trial in study.best_trials}


def grow(
    study: optuna.Study,
    space: Space,
    budget: Budget,
    forecast: Callable[[Chain], Forecast],
    make: Callable[[Chain], Outcome],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Tries new chains until the budget is spent; why it ended comes back.

    Args:
        study: from `open_study`.
        space: of chains.
        budget: no trial is begun that its forecast would take beyond it.
        forecast: of a chain.
        make: makes and measures a chain; its evaluation record comes back, or why there is none.
        say: hears what is begun and how it ended.
        clock: seconds.
    """
    search = _Search(study, space)
    ends = clock() + 60.0 * budget.minutes
    while len(search.known) < budget.trials:
        trial = search.ask()
        if trial is None:
            return f"nothing new among {MOST_REPEATS} suggestions; {len(search.known)} chains are tried"
        chain, expected, left_s = space.chain(trial), forecast(space.chain(trial)), ends - clock()
        if expected.seconds >= left_s:
            search.put_back(trial)
            return f"{describe(chain)} would take {expected}, and {max(left_s, 0.0) / 60:.1f} min are left"
        number = f"trial {len(search.known) + 1} of {budget.trials}: {describe(chain)}"
        say(f"{number}: {expected}, {left_s / 60:.1f} min left")
        started = clock()
        search.begin(trial, chain)
        say(f"{number}: {search.end(trial, chain, make(chain), clock() - started)}")
    return f"{len(search.known)} trials are done"


class _Search:
    """A study and what is known of each candidate: its objectives' values, or None where it failed.

    Suggestions come from a copy of the study in memory, where known and impossible chains are answered at once; the
    database holds the trials that were begun or wait, and no others.
    """

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self._study, self._space, self._metrics = study, space, list(space.config.objectives)
        done = [trial for trial in begun(study) if trial.state == TrialState.COMPLETE]
        # A failed chain is tried once more by each run, so failures are remembered for this run alone.
        self.known: dict[str, list[float] | None] = {trial.user_attrs[CANDIDATE]: trial.values for trial in done}
        self._broken: set[str] = set()
        self._seed = space.config.seed + len(study.trials)  # going on, not the same draws again
        self._guide = TPESampler(seed=self._seed)
        self._copy = optuna.create_study(directions=study.directions)
        self._copy.add_trials(done)

    def ask(self) -> Trial | None:
        """A trial of a possible chain that is not known: one that waits, or a new one."""
        while self._waits() or self._suggest():
            trial = self._study.ask()
            if not self._hopeless(self._space.chain(trial)):
                return trial
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def put_back(self, trial: Trial) -> None:
        """Leaves `trial` to the next run."""
        self._study.tell(trial, state=TrialState.FAIL)
        self._study.enqueue_trial(trial.params)

    def begin(self, trial: Trial, chain: Chain) -> None:
        """Notes that work on `chain` begins."""
        trial.set_user_attr(CANDIDATE, self._space.name(chain))

    def end(self, trial: Trial, chain: Chain, outcome: Outcome, seconds: float) -> str:
        """Notes what came of it; a word on it comes back."""
        trial.set_user_attr(SECONDS, round(seconds, 1))
        numbers = outcome if isinstance(outcome, Broken) else self._numbers(outcome)
        if not isinstance(outcome, Broken):
            trial.set_user_attr(FIGURES, {metric: outcome.get(metric) for metric in self._metrics})
        name = self._space.name(chain)
        if isinstance(numbers, Broken):
            if numbers.candidate:
                self._broken.add(numbers.candidate)
            self.known[name] = None
            trial.set_user_attr(REASON, numbers.reason)
            self._study.tell(trial, state=TrialState.FAIL)
            return f"failed: {numbers.reason}"
        self.known[name] = numbers
        self._copy.add_trial(self._study.tell(trial, numbers))
        return ", ".join(f"{key} {number:.4g}" for key, number in zip(self._metrics, numbers, strict=True))

    def _numbers(self, record: Mapping[str, Any]) -> list[float] | Broken:
        values = {metric: metric_value(record, metric) for metric in self._metrics}
        if missing := [metric for metric, number in values.items() if number is None]:
            return Broken(f"{', '.join(missing)}: unavailable in its evaluation")
        return [float(number) for number in values.values() if number is not None]

    def _waits(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _suggest(self) -> bool:
        """Puts a chain into the queue that is possible and not known; False if none was found."""
        self._copy.sampler = self._guide
        for repeats in range(MOST_REPEATS):
            if repeats == REPEATS:
                self._copy.sampler = RandomSampler(seed=self._seed + len(self._copy.trials))
            trial = self._copy.ask()
            chain = self._space.chain(trial)
            if numbers := self.known.get(self._space.name(chain)):
                self._copy.tell(trial, numbers)
                continue
            self._copy.tell(trial, state=TrialState.FAIL)
            if not self._hopeless(chain):
                self._study.enqueue_trial(trial.params)
                return True
        return False

    def _hopeless(self, chain: Chain) -> bool:
        """Whether there is no work on `chain`: it is known, impossible, or a beginning of it broke in this run."""
        names = self._space.candidates(chain).keys()
        return bool(self._space.name(chain) in self.known or self._broken & names or self._space.problem(chain))


def _create(name: str, storage: optuna.storages.BaseStorage, config: SearchConfig) -> optuna.Study:
    optuna_names = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    directions = [optuna_names[direction] for direction in config.objectives.values()]
    return optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)


def _asked(trial: FrozenTrial) -> dict[str, Any]:
    return trial.params or trial.system_attrs.get("fixed_params", {})  # a waiting trial has no parameters yet
