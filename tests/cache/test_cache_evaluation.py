import json

import numpy as np
import pytest

from lilliput.artifacts import parse_record
from lilliput.cache.answers import EXACT_ONLY, AnswerCache
from lilliput.cache.evaluation import (
    CACHE,
    PLAIN,
    PREFIX,
    CachingVariant,
    Query,
    ask_stream,
    draw_stream,
    measure_caching,
    summarise,
)
from lilliput.data.conversations import Conversation
from lilliput.data.corpus import Corpus
from lilliput.data.questions import Question
from lilliput.errors import DataError
from lilliput.evaluate.energy import EnergyMeter
from lilliput.recipes.recipe import read_recipe
from lilliput.records import CachingRecord
from tests.embedding.fakes import BagOfWords

CAPITALS = {"Peru": "Lima", "Cuba": "Havana", "Iran": "Tehran", "Chad": "Djamena", "Oman": "Muscat", "Fiji": "Suva"}
CAPITAL, CITY = "What is the capital of {}?", "Which city is the capital of {}?"
PEOPLE = "What are the people of {} called?"


@pytest.fixture(scope="module")
def recipe(request):
    return read_recipe(request.config.rootpath / "corpora" / "world-facts.yaml")


@pytest.fixture(scope="module")
def questions():
    known = [
        Question(id=f"{relation}/{country}", question=text.format(country), answer=answer, group=country)
        for country, city in CAPITALS.items()
        for relation, text, answer in (("capital", CAPITAL, city), ("demonym", PEOPLE, f"{country}ian"))
    ]
    unanswerable = Question(
        id="invented/capital/Xia", question=CAPITAL.format("Xia"), answerable=False, group="invented/Xia"
    )
    return {question.id: question for question in [*known, unanswerable]}


class Scripted:
    """A runtime that streams scripted answers."""

    name = "scripted"

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.questions = tokenizer, script, []

    def stream(self, prompt, max_tokens):
        text = self.tokenizer.decode(prompt)
        question = next(question for question in self.script if f"\n{question}<" in text)
        self.questions.append(question)
        yield from [*self.tokenizer(self.script[question])["input_ids"], self.tokenizer.eos_token_id][:max_tokens]


@pytest.fixture
def meter(tiny_params):
    return EnergyMeter(tiny_params.evaluation.energy, 7.5)


def ask(queries, script, tokenizer, params, meter, path, threshold=-2.0):
    runtime = Scripted(tokenizer, script)
    cache = AnswerCache(path / "a.sqlite", BagOfWords(), "v", threshold, 100)
    variants = {PLAIN: CachingVariant(runtime), PREFIX: CachingVariant(runtime), CACHE: CachingVariant(runtime, cache)}
    rows = ask_stream(queries, variants, tokenizer, params, meter)
    return runtime, rows, [row for row in rows if row["way"] == CACHE]


def test_hits_wrong_hits_and_added_hallucinations(tokenizer, tiny_params, meter, questions, tmp_path):
    peru, people, xia = questions["capital/Peru"], questions["demonym/Peru"], questions["invented/capital/Xia"]
    script = {
        peru.question: "Lima",
        CITY.format("Peru"): "Lima",
        people.question: "I don't know.",
        xia.question: "Xiaville",
    }
    queries = [
        Query(peru, peru.question),  # generated and stored
        Query(peru, peru.question),  # exact
        Query(peru, CITY.format("Peru")),  # semantic, and right
        Query(people, people.question),  # semantic, and wrong: the threshold accepts all questions about Peru
        Query(xia, xia.question),  # another name: generated
    ]
    runtime, rows, cached = ask(queries, script, tokenizer, tiny_params, meter, tmp_path)
    assert [row["hit"] for row in cached] == [None, "exact", "semantic", "semantic", None]
    assert [row["wrong"] for row in cached] == [False, False, False, True, False]
    assert [row["text"] for row in cached] == ["Lima", "Lima", "Lima", "Lima", "Xiaville"]
    assert len(runtime.questions) == 1 + 5 + 5 + 2  # warm-up, plain, with prefix, and cache misses

    found = summarise(rows, meter, tiny_params.evaluation)
    assert (found.hit_rate.value, found.exact_hit_rate.value) == (0.6, 0.2)
    assert (found.wrong_hit_rate.value, found.wrong_share_of_semantic_hits.value) == (0.2, 0.5)
    assert found.hallucination_rate["plain"].value == 0.2  # only Xia: the model abstains on the people of Peru
    assert found.hallucination_rate["cache"].value == 0.4  # "Lima" is a wrong answer
    assert found.differences["cache"]["hallucination_rate"].value == pytest.approx(0.2)
    assert found.changed_answers == {"prefix": 0, "cache": 1, "both": 1}
    energies = {way: np.mean([row["energy_j"] for row in rows if row["way"] == way]) for way in (PREFIX, CACHE)}
    assert found.saved_j_per_query["cache"].value == pytest.approx(energies[PREFIX] - energies[CACHE])


def test_unreachable_threshold_allows_only_exact_hits(tokenizer, tiny_params, meter, questions, tmp_path):
    peru = questions["capital/Peru"]
    script = {peru.question: "Lima", CITY.format("Peru"): "Lima"}
    queries = [Query(peru, peru.question), Query(peru, CITY.format("Peru")), Query(peru, peru.question)]
    _, _, cached = ask(queries, script, tokenizer, tiny_params, meter, tmp_path, threshold=2.0)
    assert [row["hit"] for row in cached] == [None, None, "exact"]


def test_truncated_or_empty_answer_is_not_stored(tokenizer, tiny_params, meter, questions, tmp_path):
    peru, cuba = questions["capital/Peru"], questions["capital/Cuba"]
    most = tiny_params.evaluation.max_new_tokens
    script = {peru.question: "Lima " * most, cuba.question: " "}
    queries = [Query(peru, peru.question), Query(cuba, cuba.question)] * 2
    _, _, cached = ask(queries, script, tokenizer, tiny_params, meter, tmp_path)
    assert [row["hit"] for row in cached] == [None] * 4


def test_repetitions_for_an_energy_counter_do_not_hit_their_own_answer(
    tokenizer, tiny_params, meter, questions, tmp_path
):
    meter.shortest_window_s = 0.02
    peru = questions["capital/Peru"]
    queries = [Query(peru, peru.question)] * 2
    _, _, cached = ask(queries, {peru.question: "Lima"}, tokenizer, tiny_params, meter, tmp_path)
    assert [row["hit"] for row in cached] == [None, "exact"]


def test_stream_follows_zipf_and_paraphrase_share(tiny_params, questions, recipe):
    config = tiny_params.caching.model_copy(update={"queries": 20_000, "zipf_exponent": 1.0, "paraphrase_share": 0.25})
    queries = draw_stream(list(questions.values()), recipe, config)
    counts = sorted((sum(q.question is question for q in queries) for question in questions.values()), reverse=True)
    expected = 1 / np.arange(1, len(questions) + 1)
    assert np.array(counts) / 20_000 == pytest.approx(expected / expected.sum(), abs=0.01)
    assert np.mean([q.text != q.question.question for q in queries]) == pytest.approx(0.25, abs=0.01)
    assert {q.text for q in queries if q.question.id == "invented/capital/Xia"} == {
        CAPITAL.format("Xia"),
        CITY.format("Xia"),
        "What is the name of Xia's capital city?",
    }
    assert draw_stream(list(questions.values()), recipe, config) == queries


def test_questions_without_a_recipe_keep_their_wording(tiny_params, questions):
    config = tiny_params.caching.model_copy(update={"paraphrase_share": 1.0})
    assert all(query.text == query.question.question for query in draw_stream([*questions.values()], None, config))


class Sized(BagOfWords):
    size_bytes = 1000


def test_complete_measurement_is_consistent_and_valid_json(checkpoint, tiny_params, questions, recipe):
    rows = list(questions.values())
    record, answers = measure_caching(
        checkpoint,
        "tiny",
        Corpus(rows, rows, rows),
        recipe,
        tiny_params,
        Sized(),
        artifact_sha256="a" * 64,
        size_bytes=10**6,
    )
    content = json.dumps(record.as_json(), allow_nan=False)
    assert json.loads(content).keys() == CachingRecord.model_fields.keys()
    assert parse_record(CachingRecord, content, "a.json") == record
    assert len(answers) == 3 * record.queries == 3 * tiny_params.caching.queries
    assert record.changed_answers["prefix"] == 0  # prefix reuse does not change answers
    assert record.cache_bytes > 1000
    assert record.hit_rate.value == 0  # all answers of a random model are truncated, so none is stored
    assert record.pairs["train"]["same_names"].value <= tiny_params.caching.false_hit_budget
    assert record.pairs["train"]["other_entity"].value == 0
    for way, rate in record.hallucination_rate.items():
        assert rate.value == np.mean([row["hallucinated"] for row in answers if row["way"] == way])


def test_without_recipe_only_exact_hits_are_measured(checkpoint, tiny_params, questions):
    rows = [*questions.values()]
    record, _ = measure_caching(
        checkpoint,
        "tiny",
        Corpus(rows, rows, rows),
        None,
        tiny_params,
        Sized(),
        artifact_sha256="a" * 64,
        size_bytes=10**6,
    )
    assert record.threshold == EXACT_ONLY
    assert record.semantic_hit_rate.value == record.wrong_hit_rate.value == 0
    assert record.pairs == {"train": {}, "held_out": {}}


def test_a_corpus_of_conversations_alone_is_refused_before_a_model_is_opened(tiny_params, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk = Conversation.model_validate({"id": "c", "messages": messages, "group": "g"})
    with pytest.raises(DataError, match=r"caching\.candidates: the data have conversations only"):
        measure_caching(
            tmp_path,
            "tiny",
            Corpus([], [], [talk]),
            None,
            tiny_params,
            BagOfWords(),
            artifact_sha256="a" * 64,
            size_bytes=1,
        )
