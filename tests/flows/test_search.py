"""The search with a fake chain runner: proposals, reuse, resumption, budget and results."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import optuna
import pytest
from transformers import LlamaConfig

from flows.chains.chain_runner import ChainRunner
from flows.chains.study import Budget, FailedChain, Forecast, finished, open_study, pareto_front, run_trials
from flows.engine.workspace import PROJECT, make_workspace
from flows.search import search_record
from lilliput.config import CandidateConfig
from lilliput.errors import ConfigError
from lilliput.graph import check_graph, check_shape
from lilliput.params import load_params
from lilliput.records import Decision
from lilliput.search import SearchConfig, Space, Step, describe, winners
from tests import results

TINY = PROJECT / "examples" / "tiny.yaml"
SHAPE = LlamaConfig(
    num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
)
RAW = {
    "base": "base",
    "seed": 5,
    "max_length": 2,
    "strategies": {"lora": "any", "prune": "any", "distill": ["prune"], "gptq": "any"},
    "settings": {"prune.amount.value": [1, 2, 9], "gptq.bits": [3, 4]},
    "objectives": {"accuracy_choice": "max", "size_bytes": "min"},
}
EVERYTHING = Budget(trials=10_000, minutes=1.0)


def config(**changes) -> SearchConfig:
    return SearchConfig.model_validate_json(json.dumps(RAW | changes))


@pytest.fixture
def space(tiny_params):
    return Space(config(), tiny_params, "search.yaml", SHAPE)


class FakeChainRunner:
    """Makes each candidate once and measures it by a fixed rule; the strategy `fail_at` always fails."""

    def __init__(self, space, fail_at=None, kill_after=None):
        self.space, self.fail_at, self.kill_after = space, fail_at, kill_after
        self.lines, self.measured, self.failures = {}, [], []

    def make(self, chain):
        if len(self.measured) == self.kill_after:
            self.interrupted = self.space.name(chain)
            raise KeyboardInterrupt
        for name, line in self.space.candidates(chain).items():
            assert self.lines.setdefault(name, line) == line, "one name for two candidates"
            if line["apply"] == self.fail_at:
                self.failures.append(name)
                return FailedChain(f"no {self.fail_at} today", name)
        self.measured.append(self.space.name(chain))
        return record(chain)


def record(chain):
    """Returns arbitrary figures that depend only on the chain."""
    noise = sum(map(ord, describe(chain)))
    return results.evaluation(accuracy_choice=results.figure(noise % 17 / 17), size_bytes=1000 + noise % 23)


def run(space, database, runner, budget=EVERYTHING, are_current=lambda chains: True):
    study = open_study(space, database, are_current)
    reason = run_trials(
        study, space, budget, lambda chain: Forecast(0.0, 0), runner.make, lambda text: None, clock=lambda: 0.0
    )
    return study, reason


def every_chain(space):
    """Yields all sequences with all settings by brute force, possible or not."""
    settings = {"lora": [()], "distill": [()]}
    settings |= {"prune": [(("amount.value", n),) for n in (1, 2, 9)], "gptq": [(("bits", n),) for n in (3, 4)]}
    for length in (1, 2):
        for sequence in itertools.permutations(settings, length):
            for chosen in itertools.product(*(settings[strategy] for strategy in sequence)):
                yield tuple(Step(strategy, with_) for strategy, with_ in zip(sequence, chosen, strict=True))


def is_possible(space, chain):
    """Applies the rules of the graph, and the rule in RAW that distillation directly follows pruning."""
    specs = {name: CandidateConfig.model_validate(line) for name, line in space.candidates(chain).items()}
    params = space.params.model_copy(update={"candidates": space.params.candidates | specs})
    with contextlib.suppress(ConfigError):
        check_graph(params, "")
        check_shape(params, "base", SHAPE)
        names = ["base", *(step.strategy for step in chain)]
        return all(before == "prune" for before, after in itertools.pairwise(names) if after == "distill")
    return False


@pytest.fixture(scope="module")
def explored(tiny_params, tmp_path_factory):
    """A search that ended because no new chain was left."""
    space = Space(config(), tiny_params, "search.yaml", SHAPE)
    runner = FakeChainRunner(space)
    study, reason = run(space, tmp_path_factory.mktemp("explored") / "search.db", runner)
    assert reason.startswith("nothing new among")
    return space, runner, study


def test_every_possible_chain_is_tried_once_and_no_other(explored):
    space, runner, study = explored
    possible = {space.name(chain) for chain in every_chain(space) if is_possible(space, chain)}
    assert len(runner.measured) == len(set(runner.measured)) == len(possible)
    assert set(runner.measured) == possible
    assert len(study.trials) == len(possible)  # repeated suggestions are not stored


def test_the_pareto_front_equals_that_of_brute_force(explored):
    space, runner, study = explored
    points = {space.name(c): record(c) for c in every_chain(space) if space.name(c) in runner.measured}
    values = {name: (-r.accuracy_choice.value, r.size_bytes) for name, r in points.items()}
    dominated = {
        a
        for a, b in itertools.permutations(values, 2)
        if values[a] != values[b] and all(x >= y for x, y in zip(values[a], values[b], strict=True))
    }
    assert pareto_front(study) == values.keys() - dominated
    result = search_record(study, space, {"base": record(())}, "done")
    assert {row.candidate for row in result.trials if row.pareto} == pareto_front(study)
    assert len(result.trials) == len(values)


def test_each_prefix_has_one_name_that_is_valid_in_params_yaml(explored):
    space, runner, _ = explored
    assert all(re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name) for name in runner.lines)
    longest = tuple(Step("distill", (("temperature", 1.0),)) for _ in range(9))
    assert len(space.name(longest)) == 40
    lora, two, three = Step("lora"), Step("prune", (("amount.value", 2),)), Step("prune", (("amount.value", 3),))
    (tuned, pruned), (again, other) = space.candidates((lora, two)), space.candidates((lora, three))
    assert tuned == again
    assert pruned != other
    assert space.candidates((lora, two))[pruned] == {
        "from": tuned,
        "apply": "prune",
        "with": {"amount": {"by": "removed_count", "value": 2}},
    }


def test_sixteen_chains_over_six_prefixes_make_each_prefix_once(space):
    prefixes = [Step("lora", (("rank", rank),)) for rank in range(1, 7)]
    chains = [(prefixes[n % 6], Step("gptq", (("bits", (3, 4, 8)[n // 6]),))) for n in range(16)]
    lines = {name: line for chain in chains for name, line in space.candidates(chain).items()}
    assert Counter(line["apply"] for line in lines.values()) == {"lora": 6, "gptq": 16}


@pytest.mark.parametrize(
    ("sequence", "teacher"),
    [
        ("lora prune distill", "s-lora-"),
        ("prune distill", "base"),
        ("distill", "base"),
        ("prune lora distill", "s-prune-lora-"),
    ],
)
def test_the_teacher_is_the_last_tuned_ancestor_or_the_parent_of_the_first_pruned_one(space, sequence, teacher):
    chain = tuple(map(Step, sequence.split()))
    name = space.candidates(chain)[space.name(chain)]["teacher"]
    assert re.fullmatch(rf"{teacher}[0-9a-f]*", name)


def test_a_killed_search_resumes_its_interrupted_trial_and_repeats_none(space, tmp_path):
    database, budget = tmp_path / "search.db", Budget(6, 1.0)
    killed, after = FakeChainRunner(space, kill_after=3), FakeChainRunner(space)
    with pytest.raises(KeyboardInterrupt):
        run(space, database, killed, budget)
    study, reason = run(space, database, after, budget)
    assert reason == "6 trials are done"
    assert len(after.measured) == 3
    assert not set(after.measured) & set(killed.measured)
    assert after.measured[0] == killed.interrupted
    assert set(finished(study, space)) == set(killed.measured + after.measured)
    third = FakeChainRunner(space)
    assert run(space, database, third, budget)[1] == "6 trials are done"
    assert third.measured == []


def test_a_failing_strategy_fails_its_chains_once_per_run_and_the_search_continues(space, tmp_path):
    failing = FakeChainRunner(space, fail_at="prune")
    study, _ = run(space, tmp_path / "search.db", failing)
    assert "prune" not in "".join(failing.measured)
    assert len(failing.measured) > 2
    failed = [trial for trial in study.trials if trial.user_attrs.get("reason") == "no prune today"]
    assert len({trial.user_attrs["candidate"] for trial in failed}) == len(failed)
    # A prefix that failed is not tried again for another chain.
    assert len(failing.failures) == len(set(failing.failures)) == 4  # two settings, on base and on lora
    repaired = FakeChainRunner(space)
    run(space, tmp_path / "search.db", repaired)
    assert not set(repaired.measured) & set(failing.measured)
    possible = {space.name(chain) for chain in every_chain(space) if is_possible(space, chain)}
    assert set(repaired.measured) | set(failing.measured) == possible


def test_an_unavailable_objective_fails_the_trial_and_is_named(space, tmp_path):
    study = open_study(space, tmp_path / "search.db", lambda chains: True)
    nothing = results.evaluation(accuracy_choice=results.figure(None))
    messages = []
    run_trials(
        study, space, Budget(1, 1.0), lambda c: Forecast(0.0, 0), lambda c: nothing, messages.append, lambda: 0.0
    )
    assert "accuracy_choice: unavailable" in messages[-1]
    assert pareto_front(study) == set()


def test_a_chain_that_exceeds_the_remaining_time_is_left_to_the_next_run(space, tmp_path):
    class Clock:
        now = 0.0

    runner = FakeChainRunner(space)

    def make(chain):
        Clock.now += 25.0
        return runner.make(chain)

    study = open_study(space, tmp_path / "search.db", lambda chains: True)
    forecasts, budget = [], Budget(100, 1.0)

    def forecast(chain):
        forecasts.append(chain)
        return Forecast(25.0, 1)

    reason = run_trials(study, space, budget, forecast, make, lambda text: None, clock=lambda: Clock.now)
    assert len(runner.measured) == 2
    assert "would take about 0.4 min plus 1 stages never measured" in reason
    assert reason.endswith("and 0.2 min are left")
    postponed = forecasts[-1]
    run(space, tmp_path / "search.db", runner, Budget(3, 1.0))
    assert runner.measured[2] == space.name(postponed)


def test_zero_minutes_start_no_chain(space, tmp_path):
    runner = FakeChainRunner(space)
    run(space, tmp_path / "search.db", runner, Budget(5, 0.0))
    assert runner.measured == []


def test_chains_with_stale_records_are_tried_again_first(space, tmp_path):
    before, after = FakeChainRunner(space), FakeChainRunner(space)
    run(space, tmp_path / "search.db", before, Budget(4, 1.0))
    run(space, tmp_path / "search.db", after, Budget(5, 1.0), are_current=lambda chains: len(chains) != 4)
    assert after.measured[:4] == before.measured
    assert len(after.measured) == 5


def test_the_same_seed_tries_the_same_chains(space, tmp_path):
    one, two = FakeChainRunner(space), FakeChainRunner(space)
    run(space, tmp_path / "one.db", one, Budget(5, 1.0))
    run(space, tmp_path / "two.db", two, Budget(5, 1.0))
    assert one.measured == two.measured


def test_settings_are_drawn_from_their_ranges_for_each_occurrence(tiny_params):
    settings = {"lora.rank": {"low": 2, "high": 5}, "lora.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    twice = config(strategies={"lora": "any"}, settings=settings, max_times=2)
    space = Space(twice, tiny_params, "search.yaml")
    assert space.sequences == ("lora", "lora → lora")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    chains = [space.chain(study.ask()) for _ in range(100)]
    drawn = [dict(step.settings) for chain in chains for step in chain]
    assert {settings["rank"] for settings in drawn} == {2, 3, 4, 5}
    assert all(1e-4 <= settings["learning_rate"] <= 1e-2 for settings in drawn)
    assert 0.4 < sum(settings["learning_rate"] < 1e-3 for settings in drawn) / len(drawn) < 0.6
    assert any(len(chain) == 2 and chain[0] != chain[1] for chain in chains)


def test_the_lines_of_the_winners_are_valid_in_params_yaml(space, tmp_path):
    chain = (
        Step("lora", (("learning_rate", 1e-05),)),
        Step("prune", (("amount.value", 2),)),
        Step("distill"),
        Step("gptq"),
    )
    champions = {
        "phone": (space.name(chain), "the best: of # all"),
        "board": (space.name(chain[:2]), "small"),
        "laptop": ("base", "nothing is better"),
        "none": (None, "no candidate is eligible"),
    }
    decisions = {
        device: Decision(device=device, champion=champion, reason=reason, refused={})
        for device, (champion, reason) in champions.items()
    }
    lines = winners(space, {space.name(c): c for c in (chain, chain[:2])}, decisions, "a test")
    params = tmp_path / "params.yaml"
    params.write_text(TINY.read_text().replace("candidates:\n", f"candidates:\n{lines}"))
    loaded = load_params(params)
    assert loaded.candidates[space.name(chain)].apply == "gptq"
    assert loaded.strategy_config(space.name(chain[:1])).learning_rate == 1e-5
    assert len(loaded.candidates) == len(load_params(TINY).candidates) + len(chain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "nobody"}, "base: unknown candidate `nobody`"),
        ({"settings": {"prune.amount.valu": [1]}}, "settings.prune.amount.valu: no setting of prune; did you mean"),
        ({"settings": {"prune.layers": [1]}}, "settings.prune.layers: no setting of prune; "),
        ({"settings": {"prune.amount.value": [1, 0]}}, "settings.prune.amount.value: 0 is rejected: "),
        ({"settings": {"load.seed": [1]}}, "`load` is not under `strategies`"),
        ({"strategies": {"lora": "any", "load": "any"}, "settings": {}}, "strategies.load: fits into no chain: "),
        ({"strategies": {"lora": "any", "distill": ["gptq"]}, "settings": {}}, "no listed strategy may precede it"),
    ],
)
def test_an_invalid_space_is_rejected_with_place_and_reason(tiny_params, change, message):
    with pytest.raises(ConfigError) as caught:
        Space(config(**change), tiny_params, "search.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("search.yaml: ")


def test_possible_sequences_depend_on_the_allowed_settings(tiny_params):
    """An adapter that is not merged can have no descendants."""
    both = config(settings={"lora.merge": [False, True]}, max_length=2)
    assert "lora → gptq" in Space(both, tiny_params, "search.yaml").sequences
    apart = config(settings={"lora.merge": [False]}, max_length=2)
    assert "lora → gptq" not in Space(apart, tiny_params, "search.yaml").sequences


@pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")  # from pygtrie to DVC
@pytest.mark.slow
def test_dvc_finds_shared_prefixes_up_to_date(tiny_params, tmp_path, monkeypatch):
    """The workspace, its graph and DVC are real; the outputs of stages are fake."""
    folder = make_workspace(tmp_path / "search", TINY, {tiny_params.data.source: PROJECT / tiny_params.data.source})
    monkeypatch.chdir(folder)
    executed = []

    def write(stages, lineage):
        for stage in stages:
            if not lineage.changes(stage.name):
                continue
            executed.append(stage.name)
            kind, _, name = stage.name.partition("@")
            content = results.evaluation(candidate=name, size_bytes=len(name), seconds=60.0, peak_rss_bytes=1).as_json()
            outputs = {
                "source": ["models/source/model"],
                "data": ["data/train"],
                "compress": [f"models/{name}/model", f"costs/{name}.json"],
                "evaluate": [f"answers/{name}.jsonl", f"metrics/{name}.json"],
            }[kind]
            for output in map(Path, outputs):
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(content))
            lineage.commit(stage.name, lineage.inputs(stage.name))
        return dict.fromkeys((stage.name for stage in stages), "Completed"), {}

    space = Space(config(), load_params(folder / "params.yaml"), "search.yaml")
    chains = ChainRunner(folder, space, write)
    assert list(chains.make_reference()) == ["base"]
    lora, prune = Step("lora"), Step("prune", (("amount.value", 2),))
    assert chains.make((lora, prune)).candidate == space.name((lora, prune))
    executed.clear()
    longer = (lora, prune, Step("distill"))
    assert chains.forecast(longer) == Forecast(
        60.0, 1
    )  # the evaluation predicted from others; no distillation was measured
    chains.make(longer)
    assert executed == [f"{kind}@{space.name(longer)}" for kind in ("compress", "evaluate")]
    assert chains.forecast(longer) == Forecast(0.0, 0)
    assert chains.are_current([longer, (lora, prune)])
    assert list(load_params(folder / "params.yaml").candidates) == ["base", *space.candidates(longer)]
    Path("metrics", f"{space.name(longer)}.json").write_text("{}")
    assert not chains.are_current([longer, (lora, prune)])
    assert chains.are_current([(lora, prune)])
