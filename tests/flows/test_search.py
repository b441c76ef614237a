"""The search on a stage runner that does no work: what is proposed, reused, resumed, stopped and written down."""

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

from flows.chains.chain_runner import Workshop
from flows.chains.study import Broken, Budget, Forecast, finished, front, grow, open_study
from flows.engine.workspace import PROJECT, make_workspace
from flows.search import findings
from lilliput.config import CandidateConfig
from lilliput.errors import ConfigError
from lilliput.graph import check_graph, check_shape
from lilliput.params import load_params
from lilliput.search import SearchConfig, Space, Step, describe, winners

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


class Machine:
    """Makes each line once and measures by a fixed rule; `break_at` is the strategy that it cannot do."""

    def __init__(self, space, break_at=None, kill_after=None):
        self.space, self.break_at, self.kill_after = space, break_at, kill_after
        self.lines, self.measured, self.broke = {}, [], []

    def make(self, chain):
        if len(self.measured) == self.kill_after:
            self.interrupted = self.space.name(chain)
            raise KeyboardInterrupt
        for name, line in self.space.candidates(chain).items():
            assert self.lines.setdefault(name, line) == line, "one name for two things"
            if line["apply"] == self.break_at:
                self.broke.append(name)
                return Broken(f"no {self.break_at} today", name)
        self.measured.append(self.space.name(chain))
        return record(chain)


def record(chain):
    """Figures without order in them, the same for the same chain."""
    noise = sum(map(ord, describe(chain)))
    return {"accuracy_choice": {"value": noise % 17 / 17, "low": 0.0, "high": 1.0}, "size_bytes": 1000 + noise % 23}


def run(space, database, machine, budget=EVERYTHING, holds=lambda chains: True):
    study = open_study(space, database, holds)
    why = grow(study, space, budget, lambda chain: Forecast(0.0, 0), machine.make, lambda text: None, clock=lambda: 0.0)
    return study, why


def every_chain(space):
    """All sequences with all settings, possible or not, by brute force."""
    settings = {"lora": [()], "distill": [()]}
    settings |= {"prune": [(("amount.value", n),) for n in (1, 2, 9)], "gptq": [(("bits", n),) for n in (3, 4)]}
    for length in (1, 2):
        for sequence in itertools.permutations(settings, length):
            for chosen in itertools.product(*(settings[strategy] for strategy in sequence)):
                yield tuple(Step(strategy, with_) for strategy, with_ in zip(sequence, chosen, strict=True))


def is_possible(space, chain):
    """By the graph's own rules, and distillation right after pruning as RAW has it."""
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
    """A search that ended for want of new chains."""
    space = Space(config(), tiny_params, "search.yaml", SHAPE)
    machine = Machine(space)
    study, why = run(space, tmp_path_factory.mktemp("explored") / "search.db", machine)
    assert why.startswith("nothing new among")
    return space, machine, study


def test_all_that_is_possible_is_tried_once_and_nothing_else(explored):
    space, machine, study = explored
    possible = {space.name(chain) for chain in every_chain(space) if is_possible(space, chain)}
    assert len(machine.measured) == len(set(machine.measured)) == len(possible)
    assert set(machine.measured) == possible
    assert len(study.trials) == len(possible)  # what was suggested again left no trace


def test_the_front_is_what_brute_force_finds(explored):
    space, machine, study = explored
    points = {space.name(c): record(c) for c in every_chain(space) if space.name(c) in machine.measured}
    values = {name: (-r["accuracy_choice"]["value"], r["size_bytes"]) for name, r in points.items()}
    beaten = {
        a
        for a, b in itertools.permutations(values, 2)
        if values[a] != values[b] and all(x >= y for x, y in zip(values[a], values[b], strict=True))
    }
    assert front(study) == values.keys() - beaten
    found = findings(study, space, {"base": record(())}, "done")
    assert {row["candidate"] for row in found["trials"] if row["pareto"]} == front(study)
    assert len(found["trials"]) == len(values)


def test_each_beginning_has_one_name_that_params_yaml_takes(explored):
    space, machine, _ = explored
    assert all(re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name) for name in machine.lines)
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


def test_sixteen_chains_over_six_beginnings_make_each_beginning_once(space):
    beginnings = [Step("lora", (("rank", rank),)) for rank in range(1, 7)]
    chains = [(beginnings[n % 6], Step("gptq", (("bits", (3, 4, 8)[n // 6]),))) for n in range(16)]
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
def test_the_teacher_is_the_last_tuned_ancestor_or_what_was_pruned_first(space, sequence, teacher):
    chain = tuple(map(Step, sequence.split()))
    found = space.candidates(chain)[space.name(chain)]["teacher"]
    assert re.fullmatch(rf"{teacher}[0-9a-f]*", found)


def test_a_killed_search_goes_on_with_what_it_was_at_and_repeats_nothing(space, tmp_path):
    database, budget = tmp_path / "search.db", Budget(6, 1.0)
    killed, after = Machine(space, kill_after=3), Machine(space)
    with pytest.raises(KeyboardInterrupt):
        run(space, database, killed, budget)
    study, why = run(space, database, after, budget)
    assert why == "6 trials are done"
    assert len(after.measured) == 3
    assert not set(after.measured) & set(killed.measured)
    assert after.measured[0] == killed.interrupted
    assert set(finished(study, space)) == set(killed.measured + after.measured)
    idle = Machine(space)
    assert run(space, database, idle, budget)[1] == "6 trials are done"
    assert idle.measured == []


def test_a_broken_strategy_fails_its_chains_once_a_run_and_the_search_goes_on(space, tmp_path):
    broken = Machine(space, break_at="prune")
    study, _ = run(space, tmp_path / "search.db", broken)
    assert "prune" not in "".join(broken.measured)
    assert len(broken.measured) > 2
    begun = [trial for trial in study.trials if trial.user_attrs.get("reason") == "no prune today"]
    assert len({trial.user_attrs["candidate"] for trial in begun}) == len(begun)
    # A beginning that broke is not tried again as another chain's.
    assert len(broken.broke) == len(set(broken.broke)) == 4  # two settings, on base and on lora
    mended = Machine(space)
    run(space, tmp_path / "search.db", mended)
    assert not set(mended.measured) & set(broken.measured)
    possible = {space.name(chain) for chain in every_chain(space) if is_possible(space, chain)}
    assert set(mended.measured) | set(broken.measured) == possible


def test_an_unavailable_objective_fails_the_trial_and_says_which(space, tmp_path):
    study = open_study(space, tmp_path / "search.db", lambda chains: True)
    nothing = {"accuracy_choice": {"value": None}, "size_bytes": 5}
    said = []
    grow(study, space, Budget(1, 1.0), lambda c: Forecast(0.0, 0), lambda c: nothing, said.append, lambda: 0.0)
    assert "accuracy_choice: unavailable" in said[-1]
    assert front(study) == set()


def test_no_chain_is_begun_that_would_take_longer_than_is_left_and_the_next_run_begins_with_it(space, tmp_path):
    class Clock:
        now = 0.0

    machine = Machine(space)

    def make(chain):
        Clock.now += 25.0
        return machine.make(chain)

    study = open_study(space, tmp_path / "search.db", lambda chains: True)
    forecasts, budget = [], Budget(100, 1.0)

    def forecast(chain):
        forecasts.append(chain)
        return Forecast(25.0, 1)

    why = grow(study, space, budget, forecast, make, lambda text: None, clock=lambda: Clock.now)
    assert len(machine.measured) == 2
    assert "would take about 0.4 min plus 1 stages never measured" in why
    assert why.endswith("and 0.2 min are left")
    late = forecasts[-1]
    run(space, tmp_path / "search.db", machine, Budget(3, 1.0))
    assert machine.measured[2] == space.name(late)


def test_no_minutes_begin_nothing(space, tmp_path):
    machine = Machine(space)
    run(space, tmp_path / "search.db", machine, Budget(5, 0.0))
    assert machine.measured == []


def test_records_that_dvc_finds_out_of_date_are_asked_for_again_first(space, tmp_path):
    before, after = Machine(space), Machine(space)
    run(space, tmp_path / "search.db", before, Budget(4, 1.0))
    run(space, tmp_path / "search.db", after, Budget(5, 1.0), holds=lambda chains: len(chains) != 4)
    assert after.measured[:4] == before.measured
    assert len(after.measured) == 5


def test_the_same_seed_tries_the_same_chains(space, tmp_path):
    one, two = Machine(space), Machine(space)
    run(space, tmp_path / "one.db", one, Budget(5, 1.0))
    run(space, tmp_path / "two.db", two, Budget(5, 1.0))
    assert one.measured == two.measured


def test_settings_are_drawn_from_their_ranges_and_told_apart_by_occurrence(tiny_params):
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


def test_the_winners_lines_are_params_yaml(space, tmp_path):
    chain = (
        Step("lora", (("learning_rate", 1e-05),)),
        Step("prune", (("amount.value", 2),)),
        Step("distill"),
        Step("gptq"),
    )
    decisions = {
        "phone": {"champion": space.name(chain), "reason": "the best: of # all"},
        "board": {"champion": space.name(chain[:2]), "reason": "small"},
        "laptop": {"champion": "base", "reason": "nothing is better"},
        "none": {"champion": None, "reason": "no candidate is eligible"},
    }
    lines = winners(space, {space.name(c): c for c in (chain, chain[:2])}, decisions, "a test")
    params = tmp_path / "params.yaml"
    params.write_text(TINY.read_text().replace("candidates:\n", f"candidates:\n{lines}"))
    found = load_params(params)
    assert found.candidates[space.name(chain)].apply == "gptq"
    assert found.strategy_config(space.name(chain[:1])).learning_rate == 1e-5
    assert len(found.candidates) == len(load_params(TINY).candidates) + len(chain)


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
def test_a_bad_space_is_refused_with_place_and_reason(tiny_params, change, message):
    with pytest.raises(ConfigError) as caught:
        Space(config(**change), tiny_params, "search.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("search.yaml: ")


def test_a_setting_that_closes_one_way_leaves_the_other_open(tiny_params):
    """An adapter kept apart has no descendants: which sequences are possible depends on what may be chosen."""
    both = config(settings={"lora.merge": [False, True]}, max_length=2)
    assert "lora → gptq" in Space(both, tiny_params, "search.yaml").sequences
    apart = config(settings={"lora.merge": [False]}, max_length=2)
    assert "lora → gptq" not in Space(apart, tiny_params, "search.yaml").sequences


@pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")  # from a library of DVC's to DVC
@pytest.mark.slow
def test_dvc_finds_shared_beginnings_made(tiny_params, tmp_path, monkeypatch):
    """The workspace, its graph and DVC are real; what a stage would write is not."""
    folder = make_workspace(tmp_path / "search", TINY, PROJECT / tiny_params.data.source, Path(tiny_params.data.source))
    monkeypatch.chdir(folder)
    worked = []

    def write(stages, lineage):
        for stage in stages:
            if not lineage.changes(stage.name):
                continue
            worked.append(stage.name)
            kind, _, name = stage.name.partition("@")
            figures = {"seconds": 60.0, "peak_rss_bytes": 1, "accuracy_choice": {"value": 0.5}, "size_bytes": len(name)}
            outputs = {
                "source": ["models/source/model"],
                "data": ["data/train"],
                "compress": [f"models/{name}/model", f"costs/{name}.json"],
                "evaluate": [f"answers/{name}.jsonl", f"metrics/{name}.json"],
            }[kind]
            for output in map(Path, outputs):
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(figures | {"of": name}))
            lineage.commit(stage.name)
        return dict.fromkeys((stage.name for stage in stages), "Completed"), {}

    space = Space(config(), load_params(folder / "params.yaml"), "search.yaml")
    workshop = Workshop(folder, space, write)
    assert list(workshop.make_reference()) == ["base"]
    lora, prune = Step("lora"), Step("prune", (("amount.value", 2),))
    assert workshop.make((lora, prune))["of"] == space.name((lora, prune))
    worked.clear()
    longer = (lora, prune, Step("distill"))
    assert workshop.forecast(longer) == Forecast(60.0, 1)  # measured as the others were; distilled for the first time
    workshop.make(longer)
    assert worked == [f"{kind}@{space.name(longer)}" for kind in ("compress", "evaluate")]
    assert workshop.forecast(longer) == Forecast(0.0, 0)
    assert workshop.holds([longer, (lora, prune)])
    assert list(load_params(folder / "params.yaml").candidates) == ["base", *space.candidates(longer)]
    Path("metrics", f"{space.name(longer)}.json").write_text("{}")
    assert not workshop.holds([longer, (lora, prune)])
    assert workshop.holds([(lora, prune)])
