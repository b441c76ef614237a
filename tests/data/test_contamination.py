import tracemalloc

import pytest

from lilliput.contamination import find_contaminated
from lilliput.data.conversations import Conversation
from lilliput.data.questions import Question
from lilliput.errors import SourceError
from lilliput.params import load_params
from lilliput.recipes.build import build_corpus
from lilliput.wheels import default_cache
from tests.conftest import PROJECT

LONG = "In which year did the very small republic on the northern coast join the union of island states"


def question(number, text, answer="1950"):
    return Question(id=f"q{number}", question=text, answer=answer, group=f"g{number}")


def test_thirteen_equal_words_are_an_overlap_despite_case_and_punctuation():
    questions = [
        question(1, f"Tell me: {LONG.upper()}!"),
        question(2, LONG.replace("small", "large").replace("union", "league")),
        question(3, "In which year?"),
    ]
    assert find_contaminated([question(0, f"{LONG}?")], questions) == ["q1"]


def test_conversations_are_compared_by_the_last_user_turn_and_the_answer():
    def talk(number, text, answer):
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
        return Conversation.model_validate({"id": f"c{number}", "messages": messages, "group": f"g{number}"})

    asked, answered, other = talk(1, LONG, "1950"), talk(2, "Why?", f"{LONG}."), talk(3, "Why?", "Because.")
    assert find_contaminated([question(0, LONG)], [asked, answered, other]) == ["c1", "c2"]
    assert find_contaminated([asked], [answered, other]) == ["c2"]


def test_fewer_equal_words_are_no_overlap():
    twelve = " ".join(LONG.split()[:12])
    assert find_contaminated([question(0, f"{twelve} then")], [question(1, f"{twelve} now")]) == []


def test_the_built_in_corpus_is_not_contaminated():
    try:
        corpus = build_corpus(load_params(PROJECT / "params.yaml").data, PROJECT, default_cache())
    except SourceError as error:
        pytest.skip(f"the built-in wheels are neither cached nor downloadable: {error}")
    assert find_contaminated(corpus.train, corpus.questions) == []


def test_a_long_training_text_is_not_held_in_memory():
    train = (question(n, f"{n} {LONG} {n}", str(n)) for n in range(20_000))
    tracemalloc.start()
    found = find_contaminated(train, [question(-1, LONG), question(-2, LONG.replace("small", "large"))])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == ["q-1"]
    assert peak < 2**20


def test_the_training_text_is_not_read_if_all_questions_are_short():
    def unread():
        raise AssertionError("the training text was read")
        yield

    assert find_contaminated(unread(), [question(1, "In which year?")]) == []
