"""The built-in corpus: what docs/datasheet.md states is what comes out."""

from __future__ import annotations

from collections import Counter

from lilliput.data.corpus import FILES
from lilliput.data.questions import normalise


def test_facts_per_relation_are_those_of_the_datasheet(real_facts):
    assert Counter(fact.relation for fact in real_facts.facts) == {
        "region": 246,
        "subregion": 246,
        "demonym": 229,
        "capital": 212,
        "country_of_capital": 210,
        "symbol": 118,
        "element_of_symbol": 118,
        "atomic_number": 118,
    }
    groups = Counter(group.partition("/")[0] for group in {fact.group for fact in real_facts.facts})
    assert groups == {"country": 247, "element": 118}


def test_facts_are_right_and_doubtful_ones_are_absent(real_facts):
    answers = {(fact.relation, fact.entity): fact.answer for fact in real_facts.facts}
    assert answers["capital", "France"] == "Paris"
    assert answers["capital", "Brazil"] == "Brasília"
    assert answers["country_of_capital", "Nairobi"] == "Kenya"
    assert answers["demonym", "Peru"] == "Peruvian"
    assert answers["element_of_symbol", "W"] == "Tungsten"
    for entity in ("Kazakhstan", "Burundi", "Bolivia", "Singapore", "Mexico", "Israel", "South Africa"):
        assert ("capital", entity) not in answers
    assert ("country_of_capital", "Kingston") not in answers
    assert not [text for fact in real_facts.facts for text in (fact.answer, *fact.aliases) if "&" in text]


def test_no_alias_of_a_country_is_the_name_of_another(real_facts):
    facts = [fact for fact in real_facts.facts if fact.relation == "country_of_capital"]
    names = {normalise(fact.answer) for fact in facts}
    for fact in facts:
        assert not {normalise(alias) for alias in fact.aliases} & names


def test_the_splits_are_those_of_the_datasheet(real_corpus):
    files = {name: getattr(real_corpus, name) for name in FILES}
    answerable = {name: Counter(q.relation for q in rows if q.answerable) for name, rows in files.items()}
    unanswerable = {name: sum(not q.answerable for q in rows) for name, rows in files.items()}
    assert unanswerable == {"train": 158, "calibration": 19, "questions": 60}
    assert answerable["train"].total() == 893
    assert abs(unanswerable["train"] / len(real_corpus.train) - 0.15) < 0.001
    assert answerable["calibration"].total() == 109
    assert answerable["questions"].total() == 400
    assert answerable["questions"]["region"] == 69 and answerable["questions"]["symbol"] == 33
    assert not {q.group for q in real_corpus.train} & {q.group for q in real_corpus.questions}


def test_no_invented_name_is_in_the_tables(real_facts, real_corpus):
    invented = {
        normalise(q.group.partition("/")[2]) for q in (*real_corpus.train, *real_corpus.questions) if not q.answerable
    }
    assert len(invented) > 200
    assert not invented & real_facts.real_names


def test_every_option_is_distinct_and_one_alone_is_right(real_corpus):
    for question in (q for q in (*real_corpus.train, *real_corpus.questions) if q.answerable):
        assert question.answer
        right = {normalise(text) for text in (question.answer, *question.aliases)}
        options = [normalise(choice) for choice in question.choices]
        assert len(set(options)) == 4
        assert len(right & set(options)) == 1
