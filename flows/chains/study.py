"""The Optuna study of a search: proposes chains, records results, and resumes after a kill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState

from lilliput.records import EvaluationRecord
from lilliput.search import Chain, SearchConfig, Space, describe

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the flow logs progress itself

REPEATS_BEFORE_RANDOM = 20  # known chains in a row, before chains are drawn at random
MAX_REPEATS = 300  # known chains in a row, before the space counts as exhausted

# User attributes of an attempted trial.
CANDIDATE, REASON, SECONDS, FIGURES = "candidate", "reason", "seconds", "figures"


@dataclass(frozen=True)
class Budget:
    """The largest number of trials in the study, and of minutes for this run."""

    trials: int
    minutes: float


@dataclass(frozen=True)
class Forecast:
    """The predicted time of a chain from records of earlier stages, and the number of stages without a record."""

    seconds: float
    unknown: int

    def __str__(self) -> str:
        rest = f" plus {self.unknown} stages never measured" if self.unknown else ""
        return f"about {self.seconds / 60:.1f} min{rest} (an estimate from earlier runs)"


@dataclass(frozen=True)
class FailedChain:
    """A chain that could not be made or measured.

    Attributes:
        reason: message of the failed stage.
        candidate: the prefix of the chain that could not be made; every other chain with it would fail too. None if an
            evaluation failed.
    """

    reason: str
    candidate: str | None = None


Outcome = EvaluationRecord | FailedChain


def study_name(space: Space) -> str:
    """Returns a name such as `search-1f3a9c07`: the same for the same space, objectives and seed."""
    identity = "\n".join([space.config.model_dump_json(), *space.sequences])
    return f"search-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def open_study(space: Space, database: Path, are_current: Callable[[list[Chain]], bool]) -> optuna.Study:
    """Creates or resumes the study of `space`; trials that were interrupted or failed are queued again.

    Args:
        space: its config names the study.
        database: an SQLite file.
        are_current: whether the records of these chains are up to date. If not, the study restarts with all its earlier
            trials at the head of the queue.
    """
    name, storage = study_name(space), optuna.storages.RDBStorage(f"sqlite:///{database}")
    study = _create(name, storage, space.config)
    past = study.get_trials(deepcopy=False)
    if are_current(list(finished(study, space).values())):
        killed = [trial for trial in past if trial.state == TrialState.RUNNING]
        for trial in killed:
            study.tell(trial.number, state=TrialState.FAIL)
        again = killed + [trial for trial in attempted(study) if trial.state == TrialState.FAIL]
    else:
        optuna.delete_study(study_name=name, storage=storage)
        study = _create(name, storage, space.config)
        again = past
    waiting = [_params(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,))]
    for params in map(_params, again):
        if params and params not in waiting:
            study.enqueue_trial(params)
            waiting.append(params)
    return study


def attempted(study: optuna.Study) -> list[FrozenTrial]:
    """Returns one trial per candidate on which work began: a complete one if there is one, otherwise the last."""
    trials: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
        candidate = trial.user_attrs.get(CANDIDATE)
        if candidate and (candidate not in trials or trials[candidate].state != TrialState.COMPLETE):
            trials[candidate] = trial
    return list(trials.values())


def finished(study: optuna.Study, space: Space) -> dict[str, Chain]:
    """Returns the chains that were made and measured, by candidate."""
    complete = [trial for trial in attempted(study) if trial.state == TrialState.COMPLETE]
    return {trial.user_attrs[CANDIDATE]: space.chain(FixedTrial(trial.params)) for trial in complete}


def pareto_front(study: optuna.Study) -> set[str]:
    """Returns the candidates that no other one dominates: at least as good on every objective and better on one."""
    return {trial.user_attrs[CANDIDATE] for trial in study.best_trials}


def run_trials(
    study: optuna.Study,
    space: Space,
    budget: Budget,
    forecast: Callable[[Chain], Forecast],
    make: Callable[[Chain], Outcome],
    log: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Tries new chains until the budget is spent; returns why it stopped.

    Args:
        study: from `open_study`.
        space: of chains.
        budget: a trial that is predicted to exceed it is not started.
        forecast: predicts the time of a chain.
        make: makes and measures a chain; returns its evaluation record, or why there is none.
        log: receives the start and the result of each trial.
        clock: seconds.
    """
    search = _Search(study, space)
    ends = clock() + 60.0 * budget.minutes
    while len(search.known) < budget.trials:
        trial = search.next_trial()
        if trial is None:
            return f"nothing new among {MAX_REPEATS} suggestions; {len(search.known)} chains are tried"
        chain, expected, left_s = space.chain(trial), forecast(space.chain(trial)), ends - clock()
        if expected.seconds >= left_s:
            search.put_back(trial)
            return f"{describe(chain)} would take {expected}, and {max(left_s, 0.0) / 60:.1f} min are left"
        number = f"trial {len(search.known) + 1} of {budget.trials}: {describe(chain)}"
        log(f"{number}: {expected}, {left_s / 60:.1f} min left")
        started = clock()
        search.begin(trial, chain)
        log(f"{number}: {search.end(trial, chain, make(chain), clock() - started)}")
    return f"{len(search.known)} trials are done"


class _Search:
    """A study with the known result of each candidate: the values of its objectives, or None if it failed.

    Suggestions come from a copy of the study in memory, which gets known results at once. The database holds only
    attempted and queued trials.
    """

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self._study, self._space, self._metrics = study, space, list(space.config.objectives)
        done = [trial for trial in attempted(study) if trial.state == TrialState.COMPLETE]
        # Each run tries failed chains once more, so failures are stored for this run only.
        self.known: dict[str, list[float] | None] = {trial.user_attrs[CANDIDATE]: trial.values for trial in done}
        self._failed_prefixes: set[str] = set()
        self._seed = space.config.seed + len(study.trials)  # other draws than in earlier runs
        self._tpe_sampler = TPESampler(seed=self._seed)
        self._copy = optuna.create_study(directions=study.directions)
        self._copy.add_trials(done)

    def next_trial(self) -> Trial | None:
        """Returns a queued or new trial of a possible chain without a known result; None if there is none."""
        while self._has_queued() or self._suggest():
            trial = self._study.ask()
            if not self._is_excluded(self._space.chain(trial)):
                return trial
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def put_back(self, trial: Trial) -> None:
        """Queues `trial` for the next run."""
        self._study.tell(trial, state=TrialState.FAIL)
        self._study.enqueue_trial(trial.params)

    def begin(self, trial: Trial, chain: Chain) -> None:
        """Records that work on `chain` begins."""
        trial.set_user_attr(CANDIDATE, self._space.name(chain))

    def end(self, trial: Trial, chain: Chain, outcome: Outcome, seconds: float) -> str:
        """Records `outcome`; returns its description."""
        trial.set_user_attr(SECONDS, round(seconds, 1))
        values = outcome if isinstance(outcome, FailedChain) else self._values(outcome)
        if not isinstance(outcome, FailedChain):
            content = outcome.as_json()
            trial.set_user_attr(FIGURES, {metric: content.get(metric) for metric in self._metrics})
        name = self._space.name(chain)
        if isinstance(values, FailedChain):
            if values.candidate:
                self._failed_prefixes.add(values.candidate)
            self.known[name] = None
            trial.set_user_attr(REASON, values.reason)
            self._study.tell(trial, state=TrialState.FAIL)
            return f"failed: {values.reason}"
        self.known[name] = values
        self._copy.add_trial(self._study.tell(trial, values))
        return ", ".join(f"{metric} {number:.4g}" for metric, number in zip(self._metrics, values, strict=True))

    def _values(self, record: EvaluationRecord) -> list[float] | FailedChain:
        values = {metric: record.number(metric) for metric in self._metrics}
        if missing := [metric for metric, number in values.items() if number is None]:
            return FailedChain(f"{', '.join(missing)}: unavailable in its evaluation")
        return [float(number) for number in values.values() if number is not None]

    def _has_queued(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _suggest(self) -> bool:
        """Queues a possible chain without a known result; returns False if it finds none."""
        self._copy.sampler = self._tpe_sampler
        for repeats in range(MAX_REPEATS):
            if repeats == REPEATS_BEFORE_RANDOM:
                self._copy.sampler = RandomSampler(seed=self._seed + len(self._copy.trials))
            trial = self._copy.ask()
            chain = self._space.chain(trial)
            if values := self.known.get(self._space.name(chain)):
                self._copy.tell(trial, values)
                continue
            self._copy.tell(trial, state=TrialState.FAIL)
            if not self._is_excluded(chain):
                self._study.enqueue_trial(trial.params)
                return True
        return False

    def _is_excluded(self, chain: Chain) -> bool:
        """Whether `chain` is known or impossible, or one of its prefixes failed in this run."""
        names = self._space.candidates(chain).keys()
        return bool(
            self._space.name(chain) in self.known or self._failed_prefixes & names or self._space.problem(chain)
        )


def _create(name: str, storage: optuna.storages.BaseStorage, config: SearchConfig) -> optuna.Study:
    optuna_names = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    directions = [optuna_names[direction] for direction in config.objectives.values()]
    return optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)


def _params(trial: FrozenTrial) -> dict[str, Any]:
    return trial.params or trial.system_attrs.get("fixed_params", {})  # a waiting trial has no parameters yet
