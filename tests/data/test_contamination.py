import tracemalloc

from lilliput.contamination import contaminated
from lilliput.data.questions import Question

LONG = "In which year did the very small republic on the northern coast join the union of island states"


def question(number, text, answer="1950"):
    return Question(id=f"q{number}", question=text, answer=answer, group=f"g{number}")


def test_thirteen_words_in_a_row_are_an_overlap_whatever_their_case_and_punctuation():
    asked = [
        question(1, f"Tell me: {LONG.upper()}!"),
        question(2, LONG.replace("small", "large").replace("union", "league")),
        question(3, "In which year?"),
    ]
    assert contaminated([question(0, f"{LONG}?")], asked) == ["q1"]


def test_fewer_words_are_no_overlap():
    twelve = " ".join(LONG.split()[:12])
    assert contaminated([question(0, f"{twelve} then")], [question(1, f"{twelve} now")]) == []


def test_the_built_in_corpus_has_none(real_corpus):
    assert contaminated(real_corpus.train, real_corpus.questions) == []


def test_a_long_training_text_is_not_held():
    train = (question(n, f"{n} {LONG} {n}", str(n)) for n in range(20_000))
    tracemalloc.start()
    found = contaminated(train, [question(-1, LONG), question(-2, LONG.replace("small", "large"))])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == ["q-1"]
    assert peak < 2**20


def test_nothing_is_read_where_all_that_is_asked_is_short():
    def unread():
        raise AssertionError("the training text was read")
        yield

    assert contaminated(unread(), [question(1, "In which year?")]) == []
