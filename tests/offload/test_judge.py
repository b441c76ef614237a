"""Requests to fake endpoints, and policy figures checked against manual calculations."""

import itertools
import json
import warnings

import httpx
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lilliput.config import ObjectiveConfig
from lilliput.data.conversations import Conversation
from lilliput.data.questions import Question
from lilliput.errors import ArtifactError, ConfigError
from lilliput.offload import fit as fitting
from lilliput.offload.collect import Endpoint, ask_both, draw_questions
from lilliput.offload.conversation_text import split_turns
from lilliput.offload.fit import (
    EMBEDDING_SCALE,
    STRENGTH,
    PerQuestionRouter,
    cross_fit,
    fit,
    folds_of,
    held_out_worth,
    tabulate,
)
from lilliput.offload.judge import Policy, areas, curve, device_confidence, figures, judge_policies, policies
from lilliput.offload.learned import ALWAYS, NEVER
from lilliput.offload.outcomes import CostParts, Outcomes, QuestionCosts
from lilliput.offload.policy import Conditions, FixedRouter, ThresholdRouter
from lilliput.serve.chat import Chat
from lilliput.serve.service import ServedModel
from lilliput.tool_calls import read_answer
from tests.embedding.fakes import BagOfWords
from tests.offload.links import link
from tests.serve import fakes

LINK = link(round_trip_ms=100.0, up_j_per_byte=1e-4, down_j_per_byte=1e-4, active_watts=1.0, tail_s=2.0, tail_watts=0.5)


def row(number, device, server, *, answerable=True, logprob=-0.1, group=None, question=None):
    """A row whose endpoints answer right (R), wrong (W) or abstain (A), in 0.5 s and 1 s."""

    def answer(verdict, seconds):
        right, abstained = verdict == "R" if answerable else None, verdict == "A"
        verdict_fields = {"right": right, "abstained": abstained, "hallucinated": verdict == "W", "logprobs": [logprob]}
        return verdict_fields | {"seconds": seconds, "cpu_s": 0.4, "up_bytes": 500, "down_bytes": 500, "text": verdict}

    return {
        "id": f"q/{number}",
        "group": group or f"g{number}",
        "question": question or f"Is it {number}?",
        "answerable": answerable,
        "embed_s": 0.01,
        "embed_cpu_s": 0.02,
        "device": answer(device, 0.5),
        "server": answer(server, 1.0),
    }


FOUR = [row(0, "W", "R"), row(1, "R", "R"), row(2, "R", "W"), row(3, "W", "A", answerable=False)]


class FakeEndpoints:
    """A device and a server that send scripted answers and record the requests."""

    def __init__(self, script):
        self.script, self.requests = script, []

    def __call__(self, request):
        body = json.loads(request.content)
        self.requests.append((request.url.host, body, dict(request.headers)))
        text = self.script[request.url.host, body["messages"][-1]["content"]]
        if text is None:
            return httpx.Response(200, text="<html>")
        choice = {"message": {"role": "assistant", "content": text}}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": text, "logprob": -0.25}]}
        return httpx.Response(200, json={"choices": [choice]})


def ask(script, questions):
    endpoints = FakeEndpoints(script)
    device = Endpoint("device", "http://device")
    server = Endpoint("the edge server", "http://server", {"model": "large"}, {"Authorization": "Bearer k"})
    with httpx.Client(transport=httpx.MockTransport(endpoints)) as client:
        return endpoints, ask_both(questions, device, server, BagOfWords(), "Briefly.", 9, client)


PERU = Question(id="capital/Peru", question="Capital of Peru?", answer="Lima", group="country/Peru")
XIA = Question(id="invented/capital/Xia", question="Capital of Xia?", answerable=False, group="invented/Xia")


def test_both_endpoints_get_the_same_question_and_verdicts():
    script = {
        ("device", PERU.question): "Quito",
        ("server", PERU.question): "Lima.",
        ("device", XIA.question): "I don't know.",
        ("server", XIA.question): "Xiaville",
    }
    endpoints, rows = ask(script, [PERU, XIA])
    verdicts = [
        [(r[place]["right"], r[place]["abstained"], r[place]["hallucinated"]) for place in ("device", "server")]
        for r in rows
    ]
    assert verdicts == [
        [(False, False, True), (True, False, False)],
        [(None, True, False), (None, False, True)],
    ]
    assert (rows[0]["device"]["logprobs"], rows[0]["server"]["logprobs"]) == ([-0.25], [])
    assert [host for host, _, _ in endpoints.requests] == ["device", "server", "device", "server", "device", "server"]
    assert endpoints.requests[-1][2]["authorization"] == "Bearer k"
    content = json.dumps(endpoints.requests[-1][1]).encode()
    assert rows[1]["server"]["up_bytes"] == len(content)
    assert rows[1]["server"]["cpu_s"] is None  # unknown for a remote process


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"city": "Lima é"}}}
TOOL = {"function": {"parameters": {"properties": {"city": {}}}, "name": "f", "strict": True}, "type": "function"}
LOOP = Conversation.model_validate(
    {
        "id": "weather/1",
        "group": "Lima",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Is it warm?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [TOOL],
    }
)


def test_collected_requests_of_a_conversation_equal_the_gateway_s():
    script = {("device", "18 degrees"): "Yes.", ("server", "18 degrees"): "Yes."}
    endpoints = FakeEndpoints(script)
    places = (Endpoint("device", "http://device", llama_cpp=True), Endpoint("the edge server", "http://server"))
    embedder = BagOfWords(most_words=6)
    with httpx.Client(transport=httpx.MockTransport(endpoints)) as http:
        [recorded] = ask_both([LOOP], *places, embedder, "Briefly.", 9, http)
    assert recorded["question"] == "18 degrees\nIs it warm?"  # with the call it is too long for the embedder
    by_gateway = fakes.FakeBackends()
    turns = [turn.as_openai() for turn in LOOP.prompt]
    call = {**CALL, "function": CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}}
    turns[2] = {"role": "assistant", "content": None, "tool_calls": [call]}
    application = fakes.app(by_gateway, ThresholdRouter(1.0), model=ServedModel("m", "v", "Briefly."))
    application.gateway.service.device.llama_cpp = True
    [response] = fakes.ask(application, {"messages": turns, "tools": [TOOL], "max_tokens": 9})
    assert response.status_code == 200, response.text
    [to_device], [to_server] = by_gateway.requests["device"], by_gateway.requests["server"]
    assert endpoints.requests[0][1] == to_device
    assert endpoints.requests[1][1] == to_server
    assert list(to_device["tools"][0]["function"]) == ["parameters", "name", "strict"]
    seen = Chat.model_validate({"messages": turns})
    assert (seen.question, seen.other_turns) == split_turns(LOOP)


def test_native_calls_are_recorded_as_text_with_the_calls():
    body = fakes.called(("f", '{"city": "Lima"}'))
    with httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, json=body))) as http:
        places = (Endpoint("device", "http://device"), Endpoint("the edge server", "http://server"))
        [recorded] = ask_both([LOOP], *places, BagOfWords(), "Briefly.", 9, http)
    [call] = read_answer(recorded["server"]["text"]).calls
    assert (call.name, call.arguments) == ("f", {"city": "Lima"})


def test_collected_requests_equal_the_gateway_s():
    script = {("device", PERU.question): "a", ("server", PERU.question): "b"}
    endpoints, _ = ask(script, [PERU])
    by_gateway = fakes.FakeBackends()
    body = {"messages": [{"role": "user", "content": PERU.question}], "max_tokens": 9}
    router = ThresholdRouter(1.0)  # the device answers first, then the edge server
    fakes.ask(fakes.app(by_gateway, router, model=ServedModel("m", "v", "Briefly.")), body)
    [to_device], [to_server] = by_gateway.requests["device"], by_gateway.requests["server"]
    assert endpoints.requests[0][1] == to_device
    assert endpoints.requests[1][1] == to_server | {"model": "large"}


def test_error_of_an_unusable_answer_names_the_address():
    with pytest.raises(ArtifactError, match="the edge server at http://server gives no usable answer"):
        ask({("device", PERU.question): "a", ("server", PERU.question): None}, [PERU])


def test_drawn_questions_keep_the_unanswerable_share_and_are_reproducible():
    known = [Question(id=f"capital/{n}", question="?", answer="a", group=f"g{n}") for n in range(80)]
    unanswerable = [Question(id=f"invented/{n}", question="?", answerable=False, group=f"x{n}") for n in range(20)]
    drawn = draw_questions([*known, *unanswerable], 50, 1)
    assert (len(drawn), sum(not question.answerable for question in drawn)) == (50, 10)
    assert draw_questions([*known, *unanswerable], 50, 1) == drawn != draw_questions([*known, *unanswerable], 50, 2)


def test_costs_by_hand():
    parts = CostParts.from_rows(FOUR[:1], LINK, 2.0)
    remote_s = 0.1 + 0.001 + 1.0
    remote_j = 0.1 + 1.0 * remote_s + 0.5 * 2.0
    by_hand = {"device_s": 0.5, "server_s": remote_s, "device_j": 0.8, "server_j": remote_j}
    assert {name: values[0] for name, values in vars(parts.total()).items()} == pytest.approx(by_hand)
    cascade = parts.total(embeds=1.0, looks=1.0)
    by_hand = {"device_s": 0.51, "server_s": 0.51 + remote_s, "device_j": 0.84, "server_j": 0.84 + remote_j}
    assert {name: values[0] for name, values in vars(cascade).items()} == pytest.approx(by_hand)


def test_operating_points_by_hand():
    worth, outcomes = np.array([0.5, 0.1, -0.2, 0.3]), Outcomes.from_rows(FOUR)
    scored = QuestionCosts(*(np.array(values, dtype=float) for values in ([1] * 4, [3] * 4, [10] * 4, [20] * 4)))
    fixed = QuestionCosts(*(np.array(values, dtype=float) for values in ([0.5] * 4, [2] * 4, [9] * 4, [19] * 4)))
    table = tabulate(worth, scored, fixed, outcomes)
    assert [point.threshold for point in table.points] == pytest.approx([NEVER, 0.4, 0.2, -0.05, ALWAYS])
    assert [point.offloaded for point in table.points] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [point.latency_s for point in table.points] == [0.5, 1.5, 2.0, 2.5, 2.0]
    assert [point.energy_j for point in table.points] == [9.0, 12.5, 15.0, 17.5, 19.0]
    assert [point.accuracy for point in table.points] == pytest.approx([2 / 3, 1, 1, 1, 2 / 3])
    assert [point.hallucination for point in table.points] == [0.5, 0.25, 0.0, 0.0, 0.25]
    assert (table.server_accuracy, table.server_hallucination) == (pytest.approx(2 / 3), 0.25)


def test_fit_equals_scikit_learn_on_scaled_features():
    rng = np.random.default_rng(0)
    known = np.hstack([rng.normal(0, 0.05, (60, 8)), rng.normal(5, 3, (60, 2))])
    rows = [row(n, "R" if known[n, 8] > 5 else "W", "R") for n in range(60)]
    found = fit(known, Outcomes.from_rows(rows), 8)
    scaled = (known - known.mean(0)) / np.where(np.arange(10) < 8, EMBEDDING_SCALE, known.std(0))
    peer = LogisticRegression(C=STRENGTH, max_iter=1000).fit(scaled, known[:, 8] > 5)
    assert found.probabilities(known)[:, 0] == pytest.approx(peer.predict_proba(scaled)[:, 1])
    # The server was always right and never hallucinated: (60 + ½) : ½, for every question.
    assert found.probabilities(known)[:, 1] == pytest.approx(60.5 / 61)
    assert found.probabilities(known)[:, 3] == pytest.approx(0.5 / 61)


def with_reference(number, device, server):
    """A row with only a reference, whose answers have these scores."""
    made = row(number, "W", "W")
    for place, score in (("device", device), ("server", server)):
        made[place] |= {"right": None, "hallucinated": None, "score": score}
    return made


def test_rows_with_only_a_reference_count_with_their_score_and_no_hallucination(params):
    rows = [*FOUR, with_reference(4, 0.25, 1.0), with_reference(5, 0.5, 0.25)]
    outcomes = Outcomes.from_rows(rows)
    assert outcomes.right_gain.tolist() == [1.0, 0.0, -1.0, 0.0, 0.75, -0.25]
    device = figures(Policy(np.zeros(6)), outcomes, parts_of(rows, params), params, "phone-4gb")
    assert (device.accuracy.value, device.accuracy.n) == (pytest.approx((2 + 0.75) / 5), 5)
    assert (device.hallucination_rate.value, device.hallucination_rate.n) == (0.5, 4)
    server = figures(Policy(np.ones(6)), outcomes, parts_of(rows, params), params, "phone-4gb")
    assert (server.accuracy.value, server.hallucination_rate.value) == (pytest.approx((2 + 1.25) / 5), 0.25)
    found = areas(outcomes.gain, outcomes, 0, 100)
    assert (found["hallucination_rate"].n, found["accuracy"].n, found["both"].n) == (4, 5, 6)


def test_router_learns_from_the_scores_of_rows_with_only_a_reference(params):
    rows = [  # the device's wording is far from the reference where the question is obscure
        with_reference(n, 0.2 if n % 3 == 0 else 0.8, 0.8) | {"question": r["question"]}
        for n, r in enumerate(predictable_rows(60))
    ]
    vectors = BagOfWords().embed([r["question"] for r in rows])
    judgement = judge_policies(rows, vectors, params, "phone-4gb")
    learned = judgement.results.links["wifi"]["learned_before"]
    assert (learned.accuracy.value, learned.offloaded) == (pytest.approx(0.8), pytest.approx(1 / 3))
    assert (learned.hallucination_rate.value, learned.hallucination_rate.n) == (None, 0)


def test_an_unconverged_fit_raises(monkeypatch):
    monkeypatch.setattr(fitting, "ITERATIONS", 1)
    rng = np.random.default_rng(0)
    rows = [row(n, "R" if n % 3 else "W", "R") for n in range(60)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as outside of the tests, where a warning is no error
        with pytest.raises(ConvergenceWarning):
            fit(rng.normal(size=(60, 8)), Outcomes.from_rows(rows), 8)


def test_per_question_router():
    router = PerQuestionRouter({"a": FixedRouter("device"), "b": ThresholdRouter(0.5)})
    assert router.route_question("a", Conditions("wifi")).place == "device"
    assert router.route_question("b", Conditions("wifi")) is None
    assert router.route_answer("b", [-5.0], Conditions("wifi")).place == "server"
    assert [router.rule(question, Conditions("wifi")) for question in "ab"] == ["device", "confidence 0.5"]


def test_cross_fitting_separates_entities():
    rows = [row(n, "R" if n % 2 else "W", "R", group=f"g{n // 4}") for n in range(40)]
    folds = folds_of(rows, 5, 1)
    by_group = {r["group"]: set(folds[[q["group"] == r["group"] for q in rows]]) for r in rows}
    assert all(len(found) == 1 for found in by_group.values())
    assert set(folds) == set(range(5))
    # A feature that identifies the entity has no value when the entity is held out.
    outcomes = Outcomes.from_rows(rows)
    known = np.eye(40)
    worth = held_out_worth(known, cross_fit(known, outcomes, folds, 0), folds)
    assert np.ptp(worth[folds == 0]) == pytest.approx(0.0)
    with pytest.raises(ConfigError, match="20 folds need at least as many entities; the questions have 10"):
        folds_of(rows, 20, 1)


def area_by_hand(score, gain):
    """The gain of the order above chance, averaged over all shares, divided by that of the best order."""
    n = len(gain)

    def over(order):
        return sum(sum(gain[i] for i in order[:k]) - k / n * sum(gain) for k in range(1, n + 1))

    own = sorted(range(n), key=lambda i: -score[i])
    return over(own) / max(over(order) for order in itertools.permutations(range(n)))


def test_area_is_one_for_the_best_order_and_zero_for_chance():
    rows = [*FOUR, row(4, "W", "W"), row(5, "A", "R")]
    outcomes = Outcomes.from_rows(rows)
    score = np.array([0.1, 0.9, 0.2, 0.7, 0.4, 0.3])
    found = areas(score, outcomes, 0, 100)
    assert found["both"].value == pytest.approx(area_by_hand(score, outcomes.gain))
    assert areas(outcomes.gain, outcomes, 0, 100)["both"].value == pytest.approx(1.0)
    every = [
        areas(np.array(order, dtype=float), outcomes, 0, 100)["both"].value
        for order in itertools.islice(itertools.permutations(range(6)), 720)
    ]
    assert np.mean(every) == pytest.approx(0.0, abs=1e-9)
    nothing = Outcomes.from_rows([row(n, "R", "R") for n in range(4)])
    assert areas(np.arange(4.0), nothing, 0, 100)["both"].value == 0.0
    against = areas(outcomes.gain, outcomes, 0, 100, against=score)["both"]
    assert against.value == pytest.approx(1.0 - found["both"].value)


def test_curve_spans_device_only_to_server_only():
    points = curve(np.array([0.9, 0.0, -0.9, 0.5]), Outcomes.from_rows(FOUR))
    assert (points[0].offloaded, points[-1].offloaded) == (0.0, 1.0)
    assert (points[0].accuracy, points[-1].accuracy) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    middle = next(point for point in points if point.offloaded == 0.5)
    assert (middle.accuracy, middle.hallucination_rate) == (1.0, 0.0)


@pytest.fixture
def params(tiny_params):
    serving = tiny_params.serving["phone-4gb"].model_copy(
        update={"objective": ObjectiveConfig(energy_budget_j=9.0, max_accuracy_drop=0.0, max_hallucination_rise=0.0)}
    )
    return tiny_params.model_copy(update={"links": {"wifi": LINK}, "serving": {"phone-4gb": serving}})


def parts_of(rows, params):
    return CostParts.from_rows(rows, LINK, params.devices["phone-4gb"].watts_per_core)


def test_figures_of_a_policy_by_hand(params):
    parts = parts_of(FOUR, params)
    watts = params.devices["phone-4gb"].watts_per_core
    remote_s = 1.101
    remote_j = 0.1 + remote_s + 1.0
    policy = Policy(np.array([1.0, 0.0, 0.0, 1.0]))
    found = figures(policy, Outcomes.from_rows(FOUR), parts, params, "phone-4gb")
    assert (found.offloaded, found.accuracy.value, found.hallucination_rate.value) == (0.5, 1.0, 0.0)
    assert found.energy_per_query_j.value == pytest.approx((0.4 * watts + remote_j) / 2)
    assert found.energy_per_query_j.measured is False
    percent = 100 * (0.4 * watts + remote_j) / 2 / (15.0 * 3600)
    assert found.battery_percent_per_query.value == pytest.approx(percent)
    assert found.latency_ms.p90 == pytest.approx(1e3 * remote_s)
    # At random, half of each question is offloaded: 2/3 + ½ · 0 right answers, and ½ + ½ · (¼ − ½) hallucinations.
    assert found.over_random["accuracy"].value == pytest.approx(1.0 - 2 / 3)
    assert found.over_random["hallucination_rate"].value == pytest.approx(0.0 - 0.375)


def test_random_policy_has_expected_values(params):
    outcomes, parts = Outcomes.from_rows(FOUR), parts_of(FOUR, params)
    found = figures(Policy(np.full(4, 0.25)), outcomes, parts, params, "phone-4gb")
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.hallucination_rate.value == pytest.approx(0.75 * 0.5 + 0.25 * 0.25)
    assert (found.latency_ms.p50, found.latency_ms.p90) == pytest.approx((500.0, 1101.0))


def predictable_rows(count):
    """Questions whose wording and tokens both reveal that the device errs; the server is always right."""
    hard = [n % 3 == 0 for n in range(count)]
    texts = [f"{'obscure' if bad else 'famous'} {n}" for n, bad in enumerate(hard)]
    return [
        row(n, "W" if bad else "R", "R", logprob=-3.0 if bad else -0.1, question=text)
        for n, (bad, text) in enumerate(zip(hard, texts, strict=True))
    ]


def test_learned_policy_beats_chance_on_predictable_questions(params):
    rows = predictable_rows(60)
    vectors = BagOfWords().embed([r["question"] for r in rows])
    judgement = judge_policies(rows, vectors, params, "phone-4gb")
    results, by_policy = judgement.results, judgement.results.links["wifi"]
    assert by_policy["learned_before"].accuracy.value == 1.0
    assert by_policy["learned_before"].offloaded == pytest.approx(1 / 3)
    assert by_policy["learned_before"].over_random["accuracy"].low > 0.0
    assert by_policy["threshold"].accuracy.value == by_policy["oracle"].accuracy.value == 1.0
    assert results.areas["learned_before"]["both"].value == pytest.approx(1.0)
    assert results.areas_over_threshold["learned_before"]["both"].value == pytest.approx(0.0)
    again = judge_policies(rows, vectors, params, "phone-4gb")
    assert (again.results, again.curves) == (results, judgement.curves)
    for look, made in judgement.looks.items():
        assert json.dumps(made.as_json(), allow_nan=False) == json.dumps(again.looks[look].as_json())


def test_a_too_small_energy_budget_keeps_all_questions_on_the_device(params):
    rows = predictable_rows(40)
    serving, folds = params.serving["phone-4gb"], folds_of(rows, 2, 0)
    outcomes, parts = Outcomes.from_rows(rows), CostParts.from_rows(rows, LINK, 0.75)
    tight = serving.objective.model_copy(update={"energy_budget_j": 0.35})
    worth = {look: np.linspace(-1, 1, 40) for look in ("before", "after")}
    tight_serving = serving.model_copy(update={"objective": tight})
    found = policies(outcomes, parts, device_confidence(rows), worth, folds, tight_serving)
    for look in ("before", "after"):
        assert found[f"learned_{look}"].sent.sum() == 0
        assert np.sum(found[f"learned_{look}"].embeds) == 0
