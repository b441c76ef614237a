"""The learned router, checked by hand with small weights and tables."""

import json
import math

import numpy as np
import pytest

from lilliput.artifacts import Manifest, parse_record, write_json
from lilliput.config import EdgeConfig, ObjectiveConfig
from lilliput.errors import ArtifactError
from lilliput.offload.fitted_router import RouterFit, RouterRecord, open_router
from lilliput.offload.learned import (
    ALWAYS,
    NEVER,
    LearnedRouter,
    OperatingPoint,
    OperatingTable,
    WorthModel,
    budget_j,
    question_features,
    select_point,
    token_features,
)
from lilliput.offload.model_pair import pair_of
from lilliput.offload.policy import Conditions, FixedRouter, ThresholdRouter
from tests.embedding.fakes import BagOfWords

OBJECTIVE = ObjectiveConfig(energy_budget_j=1.0, max_accuracy_drop=0.1, max_hallucination_rise=0.1)
PERU, CUBA = "What is the capital of Peru", "How many of 12 live in Cuba"


def point(threshold, latency_s, energy_j, accuracy, hallucination=0.2):
    return OperatingPoint(threshold, 0.5, latency_s, energy_j, accuracy, hallucination)


TABLE = OperatingTable(
    (point(NEVER, 0.1, 0.2, 0.4), point(0.3, 0.2, 0.9, 0.55), point(0.0, 0.3, 1.5, 0.65), point(ALWAYS, 0.4, 3.0, 0.6)),
    server_accuracy=0.6,
    server_hallucination=0.2,
)


def test_probabilities_are_logistic_in_standardised_features():
    fitted = WorthModel(
        np.array([1.0]), np.array([2.0]), np.array([[1.0], [0.0], [-1.0], [0.0]]), np.array([0, 1, 0, -1])
    )
    found = fitted.probabilities(np.array([[5.0]]))[0]
    by_hand = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, -2.0, -1.0)]
    assert found == pytest.approx(by_hand)
    assert fitted.worth(np.array([[5.0]]))[0] == pytest.approx(by_hand[1] - by_hand[0] + by_hand[2] - by_hand[3])
    content = json.dumps(RouterFit(fitted=fitted, links={"wifi": TABLE}).as_json())
    again = parse_record(RouterFit, content, "router.json")
    assert again.links == {"wifi": TABLE}
    assert (again.fitted.probabilities(np.array([[5.0]])) == found).all()


@pytest.mark.parametrize("damage", [None, [None, 1.0], [math.nan], {}, "x", 10**400, [[1.0], [1.0, 2.0]]])
def test_a_router_with_an_array_that_is_not_of_finite_numbers_is_rejected(damage):
    fitted = WorthModel(np.zeros(1), np.ones(1), np.zeros((4, 1)), np.zeros(4))
    content = RouterFit(fitted=fitted, links={"wifi": TABLE}).as_json()
    content["fitted"]["mean"] = damage
    with pytest.raises(ArtifactError, match=r"^router\.json: fitted\.mean: "):
        parse_record(RouterFit, json.dumps(content), "router.json")


def test_features_of_question_and_tokens():
    vectors = BagOfWords().embed([PERU, CUBA])
    found = question_features([PERU, CUBA], vectors)
    assert (found[:, :-4] == vectors).all()
    assert found[:, -4:].tolist() == [[27, 6, 1, 0], [27, 7, 2, 2]]
    assert token_features([[-1.0, -3.0], []]).tolist() == [[-2, -3, -1, -4, 2], [-20, -20, -20, -20, 1]]


@pytest.mark.parametrize(
    ("budget", "threshold", "reason"),
    [
        (1.0, 0.3, "within 1 J"),  # 0.55 is above the floor of 0.5, and faster than the better points
        (9.0, 0.3, "within 9 J"),
        (0.5, NEVER, "0.100 short of the target quality, within 0.5 J"),  # quality yields before energy
        (0.1, NEVER, "every choice exceeds the energy budget of 0.1 J"),
    ],
)
def test_fastest_point_within_budget_and_quality_is_selected(budget, threshold, reason):
    found, why = select_point(TABLE, OBJECTIVE, budget)
    assert (found.threshold, why) == (threshold, reason)


def test_hallucination_ceiling_excludes_points():
    table = OperatingTable((point(0.3, 0.1, 0.5, 0.6, 0.31), point(0.0, 0.2, 0.5, 0.6, 0.29)), 0.6, 0.2)
    assert select_point(table, OBJECTIVE, 1.0)[0].threshold == 0.0


def test_budget_shrinks_with_a_low_battery():
    assert [budget_j(OBJECTIVE, percent, 20.0) for percent in (100, 20, 10, 0)] == [1.0, 1.0, 0.5, 0.0]
    assert budget_j(OBJECTIVE, 0.0, 0.0) == 1.0


def learned(embedder, look="before", tables=None):
    """Worth is sigmoid(digits − 1) − 0.5 before generation; after it, it depends on the least log-likelihood."""
    tokens = 5 if look == "after" else 0
    weights = np.zeros((4, 256 + 4 + tokens))
    weights[1, 258 + 1] = 1.0
    if tokens:
        weights[1] = 0.0
        weights[1, 260 + 1] = -1.0
    size = weights.shape[1]
    fitted = WorthModel(np.zeros(size), np.ones(size), weights, np.array([0.0, -1.0, 0.0, 0.0]))
    return LearnedRouter(fitted, tables or {"wifi": TABLE}, look, OBJECTIVE, 20.0, embedder)


def test_router_before_generation_uses_the_question():
    router = learned(BagOfWords(), tables={"wifi": OperatingTable((point(0.1, 0.1, 0.1, 0.6),), 0.6, 0.2)})
    far, near = router.route_question(CUBA, Conditions("wifi")), router.route_question(PERU, Conditions("wifi"))
    assert (far.place, far.score) == ("server", pytest.approx(1 / (1 + math.exp(-1)) - 0.5))
    assert (near.place, near.score) == ("device", pytest.approx(1 / (1 + math.exp(1)) - 0.5))
    assert far.reason == "worth +0.231 > +0.100 (wifi, within 1 J)"
    assert router.route_answer(CUBA, [-0.1], Conditions("wifi")) == far


def test_router_after_generation_uses_tokens():
    router = learned(BagOfWords(), "after")
    assert router.route_question(PERU, Conditions("wifi")) is None
    assert router.route_answer(PERU, [-0.1, -4.0], Conditions("wifi")).place == "server"
    assert router.route_answer(PERU, [-0.1, -0.1], Conditions("wifi")).place == "device"


@pytest.mark.parametrize("look", ["before", "after"])
def test_fixed_decisions_need_no_embedding(look):
    embedder = BagOfWords()
    always = OperatingTable((point(ALWAYS, 0.1, 0.1, 0.6),), 0.6, 0.2)
    router = learned(embedder, look, {"wifi": TABLE, "lan": always})
    saving = router.route_question(PERU, Conditions("wifi", battery_percent=5.0))
    assert (saving.place, saving.score) == ("device", None)
    assert "short of the target quality" in saving.reason
    assert router.route_question(PERU, Conditions("lan")).place == "server"
    strange = router.route_question(PERU, Conditions("pigeon"))
    assert (strange.place, strange.reason) == ("device", "no measurements for the link pigeon")
    assert embedder.embedded == []


@pytest.mark.parametrize("look", ["before", "after"])
def test_rule_depends_on_link_and_battery(look):
    always = OperatingTable((point(ALWAYS, 0.1, 0.1, 0.6),), 0.6, 0.2)
    embedder = BagOfWords()
    router = learned(embedder, look, {"wifi": TABLE, "lan": always})
    rules = {
        name: router.rule(PERU, conditions)
        for name, conditions in {
            "wifi": Conditions("wifi"),
            "wifi, a little less battery": Conditions("wifi", 99.0),
            "wifi, nearly empty": Conditions("wifi", 5.0),
            "lan": Conditions("lan"),
            "unknown": Conditions("pigeon"),
        }.items()
    }
    assert list(rules.values()) == [rules["wifi"], rules["wifi"], "device", "server", "device"]
    assert rules["wifi"].startswith(f"worth {look} ")
    assert embedder.embedded == []


@pytest.mark.parametrize("look", ["before", "after"])
def test_too_long_question_goes_to_the_server_if_the_link_allows_it(look):
    embedder = BagOfWords(most_words=5)
    router = learned(embedder, look)
    for decision in (
        router.route_question(PERU, Conditions("wifi")),
        router.route_answer(PERU, [-0.1], Conditions("wifi")),
    ):
        assert (decision.place, decision.score) == ("server", None)
        assert decision.reason == "the question is longer than the router's input"
    assert router.route_question(PERU, Conditions("wifi", battery_percent=5.0)).place == "device"
    assert embedder.embedded == []


PAIR = ("a" * 64, "b" * 64)


@pytest.fixture
def serving(tiny_params):
    return tiny_params.serving["phone-4gb"].model_copy(update={"policy": "learned"})


@pytest.fixture
def folder(tmp_path):
    fitted = WorthModel(np.zeros(260), np.ones(260), np.zeros((4, 260)), np.zeros(4))
    table = OperatingTable((point(0.0, 0.1, 0.1, 0.6),), 0.6, 0.2)
    looks = {"before": RouterFit(fitted=fitted, links={"wifi": table})}
    write_json(tmp_path / "router.json", RouterRecord(pair=PAIR, embedder_sha256=BagOfWords().sha256, looks=looks))
    return tmp_path


def test_fitted_router_opens_for_its_pair(serving, folder):
    router = open_router(serving, folder, BagOfWords(), PAIR)
    assert router.route_question(PERU, Conditions("wifi")).score == 0.0


@pytest.mark.parametrize(
    ("pair", "embedder", "message"),
    [
        (("c" * 64, PAIR[1]), BagOfWords(), "fitted for another device model; run the stage `offload`"),
        ((PAIR[0], "http://edge large"), BagOfWords(), "fitted for another edge server"),
        (PAIR, BagOfWords("f" * 64), "fitted with another embedder"),
        (PAIR, None, "needs the embedder"),
    ],
)
def test_fitted_router_rejects_another_pair_or_embedder(serving, folder, pair, embedder, message):
    with pytest.raises(ArtifactError, match=message):
        open_router(serving, folder, embedder, pair)


def test_a_router_without_a_fit_for_the_look_is_rejected(serving, folder):
    after = serving.model_copy(update={"look": "after"})
    with pytest.raises(ArtifactError, match="no fit for routing after generation; run the stage `offload`"):
        open_router(after, folder, BagOfWords(), PAIR)


def test_only_the_learned_policy_needs_a_fit(serving, tmp_path):
    with pytest.raises(ArtifactError, match="no router is fitted yet"):
        open_router(serving, tmp_path, BagOfWords(), PAIR)
    fixed = serving.model_copy(update={"policy": "server"})
    assert open_router(fixed, tmp_path, None, PAIR) == FixedRouter("server")
    threshold = serving.model_copy(update={"policy": "threshold"})
    assert open_router(threshold, tmp_path, None, PAIR) == ThresholdRouter(serving.least_confidence)


def test_pair_identity_from_files_or_address():
    def manifest(sha256):
        return Manifest.model_construct(files={"model.gguf": sha256})

    here = EdgeConfig(candidate="lora")
    assert pair_of(manifest("x"), here, manifest("y")) == ("x", "y")
    elsewhere = EdgeConfig(url="http://edge:8000", model="large")
    assert pair_of(manifest("x"), elsewhere, None) == ("x", "http://edge:8000 large")
