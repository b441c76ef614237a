import sqlite3
import threading

import numpy as np
import pytest

from lilliput.cache.answers import AnswerCache, CachedAnswer, clear
from lilliput.cache.distinguishing_words import distinguishing_words
from lilliput.errors import ArtifactError
from tests.embedding.fakes import BagOfWords


@pytest.fixture
def make(tmp_path):
    def made(version="v1", threshold=0.5, capacity=10, embedder=None):
        return AnswerCache(tmp_path / "answers.sqlite", embedder or BagOfWords(), version, threshold, capacity)

    return made


def store(cache, question, answer, tokens=2):
    cache.store(cache.query(question), CachedAnswer(answer, "device", "pocket", 20, tokens))


def lookup(cache, question):
    hit = cache.find(cache.query(question))
    return hit and (hit.kind, hit.answer.text)


def test_exact_hit_ignores_spaces_and_final_mark(make):
    cache = make(threshold=2.0)  # above every similarity
    store(cache, "What is the capital of Peru?", "Lima")
    assert lookup(cache, " What  is the capital of Peru") == ("exact", "Lima")
    assert lookup(cache, "Which city is the capital of Peru?") is None


def test_an_exact_hit_needs_no_embedding(make):
    embedder = BagOfWords()
    cache = make(embedder=embedder)
    store(cache, "What is the capital of Peru?", "Lima")
    del embedder.embedded[:]
    assert lookup(cache, "What is the capital of Peru?") == ("exact", "Lima")
    assert embedder.embedded == []


def test_paraphrase_hits_above_the_threshold(make):
    first, second = "What is the capital of Peru?", "Which city is the capital of Peru?"
    cosine = 5 / np.sqrt(6 * 7)  # both have is, the, capital, of, Peru
    for threshold, expected in ((cosine - 1e-4, ("semantic", "Lima")), (cosine + 1e-4, None)):
        cache = make(threshold=threshold)
        store(cache, first, "Lima")
        assert lookup(cache, second) == expected
    hit = make(threshold=0.0).find(cache.query(second))
    assert hit.similarity == pytest.approx(cosine, abs=1e-6)
    assert hit.wording == first.rstrip("?")


def test_most_similar_question_with_the_same_names_hits(make):
    cache = make(threshold=0.1)
    store(cache, "Which part of the world is Peru in?", "Americas")
    store(cache, "What is the capital of Peru?", "Lima")
    assert lookup(cache, "Which city is the capital of Peru?") == ("semantic", "Lima")


SIGNS = [("C#", "C"), ("C♯", "C"), ("–5", "5"), ("−5", "5"), ("$5", "€5"), (".NET", "NET"), (".5", "5"), ("Na⁺", "Na")]
SIGNS += [
    ("A & B", "A B"),
    ("5‰", "5"),
    ("√X", "X"),
    ("5²", "5"),
    ("5 ≤ X", "5 ≥ X"),
    ("(2+3)*4", "2+(3*4)"),
    ("5!", "5"),
]
SIGNS += [
    ("3½", "3"),
    ("@X", "#X"),
    ("X∪Y", "X∩Y"),
    ("A|B", "A B"),
    ("~X", "X"),
    ("5°", "5"),
    ("♂ X", "♀ X"),
    ("X_1", "X1"),
]


@pytest.mark.parametrize(
    ("stored", "question"),
    [
        ("What is the capital of Peru?", "What is the capital of Cuba?"),
        ("What is the capital of Guinea?", "What is the capital of Equatorial Guinea?"),
        ("Peru is north of which country?", "Chile is north of which country?"),
        ("Which element has the symbol Co?", "Which element has the symbol CO?"),
        ("Which element has 26 protons?", "Which element has 27 protons?"),
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("Is Paris north of London?", "Is London north of Paris?"),
        ("Which two rivers of Peru are long?", "Which three rivers of Peru are long?"),
        ("Is Lima in Peru?", "Is Lima not in Peru?"),
        ("Wasn't Lima in Peru?", "Was Lima in Peru?"),
        ("what is the largest planet", "what is the smallest planet"),
        ("what is the capital of peru", "what is the capital of cuba"),
        ("中国的首都是什么", "法国的首都是什么"),
        *((f"What is {first}?", f"What is {second}?") for first, second in SIGNS),
        ("Who leads the WHO in Peru?", "Who leads the who in Peru?"),
        ("WHO founded Peru?", "Who founded Peru?"),
        ("Where is peru, South America?", "Where is chile, South America?"),
        ("Which river of peru reaches South America?", "Which river of chile reaches South America?"),
        ("Who ruled Peru before Fujimori?", "Who ruled Peru after Fujimori?"),
        ("Before 1990, who ruled Peru?", "After 1990, who ruled Peru?"),
        ("Which is the largest city in Peru?", "Which is the smallest city in Peru?"),
        ("Is Lima larger than Cusco?", "Is Lima smaller than Cusco?"),
        ("Has Peru more than 5 cities?", "Has Peru less than 5 cities?"),
        ("Is Lima hardly in Peru?", "Is Lima in Peru?"),
        ("Is Lima 5' from Peru?", 'Is Lima 5" from Peru?'),
        ("Isnt Lima in Peru?", "Is Lima in Peru?"),
        ("It isnt Lima in Peru?", "It is Lima in Peru?"),
        ("Liegt Lima nicht in Peru?", "Liegt Lima in Peru?"),
        ("Est-ce que Lima n'est pas au Peru?", "Est-ce que Lima est au Peru?"),
        ("Лима не в Перу?", "Лима в Перу?"),
        ("क्या दिल्ली भारत है?", "क्या दलला भारत है?"),
    ],
)
def test_different_name_number_sign_order_or_negation_never_hits(make, stored, question):
    cache = make(threshold=-2.0)  # below every similarity
    store(cache, stored, "no")
    assert lookup(cache, question) is None
    assert lookup(cache, stored) == ("exact", "no")


def test_too_long_question_hits_only_exactly(make):
    preamble = "Peru has many cities. " * 3
    embedder = BagOfWords(most_words=12)
    cache = make(embedder=embedder, threshold=-2.0)
    first, second = preamble + "What is the capital?", preamble + "What is the longest river?"
    store(cache, first, "Lima")
    store(cache, "What is the capital of Peru?", "Lima!")  # short, and with the same names
    assert lookup(cache, second) is None
    assert lookup(cache, first + " ") == ("exact", "Lima")
    assert embedder.embedded == ["What is the capital of Peru"]


def test_distinguishing_words_ignore_position_and_first_words():
    assert distinguishing_words("Malabo is the capital of which country?") == distinguishing_words(
        "Of which country is Malabo the capital?"
    )
    assert distinguishing_words("What is the name of Guinea-Bissau's capital?") == "Guinea-Bissau"
    assert distinguishing_words("Who ruled the Maldives’ islands in 1990?") == "Maldives 1990"
    assert distinguishing_words("What is the largest planet?") == ""


def test_least_recently_used_answer_is_deleted(make):
    cache = make(capacity=3, threshold=2.0)
    for name in ("Peru", "Cuba", "Iran"):
        store(cache, f"Where is {name}?", name)
    assert lookup(cache, "Where is Peru?")  # used again, so Cuba is now the least recently used
    store(cache, "Where is Chad?", "Chad")
    kept = [name for name in ("Peru", "Cuba", "Iran", "Chad") if lookup(cache, f"Where is {name}?")]
    assert (cache.count(), kept) == (3, ["Peru", "Iran", "Chad"])


def test_equals_a_reference_lru_on_a_random_sequence(make):
    cache, plain = make(capacity=5, threshold=2.0), {}
    for number in np.random.default_rng(0).zipf(1.3, size=100) % 12:
        question = f"Where is Town {number}?"
        assert (lookup(cache, question) is not None) == (number in plain)
        if number not in plain:
            store(cache, question, str(number))
        plain[number] = plain.pop(number, None)  # moves it to the end: most recently used
        if len(plain) > 5:
            del plain[next(iter(plain))]


def test_versions_and_embedders_have_separate_answers(make):
    question = "What is the capital of Peru?"
    store(make("old"), question, "Lima")
    assert lookup(make("new"), question) is None
    assert lookup(make("old", embedder=BagOfWords("b" * 64)), question) is None
    store(make("new"), question, "Lima!")
    assert lookup(make("old"), question) == ("exact", "Lima")
    assert make("old").count() == 2


def test_answers_persist_and_newer_ones_replace_older_ones(make):
    store(make(), "What is the capital of Peru?", "Cusco")
    store(make(), "What is the capital of Peru?", "Lima")
    assert lookup(make(), "Which city is the capital of Peru?") == ("semantic", "Lima")
    assert make().count() == 1


def test_rules_have_separate_answers(make):
    cache = make(threshold=-2.0)
    for rule, answer in (("device", "far"), ("server", "in South America")):
        cache.store(cache.query("Where is Peru?", rule), CachedAnswer(answer, "device", "m", 1, 2))
    for question in ("Where is Peru?", "Where on earth is Peru?"):
        texts = [cache.find(cache.query(question, rule)).answer.text for rule in ("device", "server")]
        assert texts == ["far", "in South America"]
        assert cache.find(cache.query(question, "another")) is None


def test_clear_removes_all_text_from_the_file(make, tmp_path):
    cache = make()
    for name in ("Peru", "Cuba"):
        store(cache, f"Where is {name}?", "there")
    assert clear(tmp_path / "answers.sqlite") == 2
    assert (cache.count(), lookup(cache, "Where is Peru?")) == (0, None)
    assert not any(b"Peru" in file.read_bytes() for file in tmp_path.iterdir())
    store(cache, "Where is Peru?", "there")  # it still works
    assert lookup(cache, "Where is Peru?") == ("exact", "there")


def test_clear_does_not_create_a_file(tmp_path):
    assert clear(tmp_path / "answers.sqlite") == 0
    assert list(tmp_path.iterdir()) == []


def test_answer_above_the_token_limit_does_not_hit(make):
    cache = make(threshold=0.1)
    store(cache, "What is the capital of Peru?", "It is Lima", tokens=4)
    for question in ("What is the capital of Peru?", "Which city is the capital of Peru?"):
        hits = {most: cache.find(cache.query(question), most) is not None for most in (3, 4, None)}
        assert hits == {3: False, 4: True, None: True}


def test_hit_has_original_question_and_answer(make):
    cache = make()
    store(cache, " What is the capital of Peru?", "Lima", tokens=2)
    hit = cache.find(cache.query("What is the capital of Peru?"))
    assert (hit.question, hit.answer) == (
        " What is the capital of Peru?",
        CachedAnswer("Lima", "device", "pocket", 20, 2),
    )


def test_answers_in_an_older_format_are_deleted(make, tmp_path):
    with sqlite3.connect(tmp_path / "answers.sqlite") as connection:
        connection.execute("create table answers (version, wording, names, vector, answer, used)")
        connection.execute("insert into answers values ('v1', 'What is the capital of Peru', '', x'', 'L', 1)")
    connection.close()
    cache = make()
    assert (cache.count(), lookup(cache, "What is the capital of Peru?")) == (0, None)
    store(cache, "What is the capital of Peru?", "Lima")
    assert make().count() == 1


def test_connections_are_reused_and_closed(make, tmp_path):
    cache, other = make(), make()
    for number in range(3):
        store(cache, f"Where is Peru {number}?", "there")
        assert lookup(other, f"Where is Peru {number}?") == ("exact", "there")
    journal = tmp_path / "answers.sqlite-wal"
    assert journal.exists()
    cache.close()
    other.close()
    assert not journal.exists()  # merged into the file by the last connection
    assert lookup(cache, "Where is Peru 0?") == ("exact", "there")


def test_a_file_that_was_replaced_is_opened_again(make, tmp_path):
    cache = make()
    store(cache, "What is the capital of Peru?", "Lima")
    cache.close()
    (tmp_path / "copy").write_bytes((tmp_path / "answers.sqlite").read_bytes())
    store(cache, "What is the capital of Chad?", "N'Djamena")
    clear(tmp_path / "answers.sqlite")
    assert lookup(cache, "What is the capital of Peru?") is None
    (tmp_path / "copy").replace(tmp_path / "answers.sqlite")
    assert lookup(cache, "What is the capital of Peru?") == ("exact", "Lima")


def test_threads_share_one_file(make, tmp_path):
    problems = []

    def work(name):
        try:
            cache = make(capacity=1000)
            for number in range(25):
                store(cache, f"Where is {name} {number}?", f"{name}{number}")
                assert lookup(cache, f"Where is {name} {number}?") == ("exact", f"{name}{number}")
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("Peru", "Cuba", "Iran", "Chad")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert make().count() == 100


def test_a_file_that_is_not_a_cache_is_rejected(make, tmp_path):
    (tmp_path / "answers.sqlite").write_text("not a database, though long enough to be one" * 50)
    with pytest.raises(ArtifactError, match=r"answers\.sqlite: not a readable answer cache .*delete the file"):
        make()
