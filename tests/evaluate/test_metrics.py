import math

import pytest

from lilliput.data.questions import Question
from lilliput.evaluate import hallucination
from lilliput.evaluate.abstention import abstained
from lilliput.evaluate.accuracy import first_sentence, is_right, score_choices
from lilliput.evaluate.judges.judgement import Judgement

PARIS = Question(
    id="q", question="?", choices=("Paris", "Lyon", "Nice"), answer="Paris", aliases=("Lutetia",), group="g"
)
GUINEA = Question(id="q", question="?", choices=("Guinea-Bissau", "Guinea"), answer="Guinea-Bissau", group="g")


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "paris.",
        "The capital is Paris.",
        "PARIS\nLyon",
        "It is Páris, in France.",
        "Lutetia",
        "Paris. Not Lyon.",
        "PARIS. Not Lyon.",
        "Paris (France). Not Lyon.",
    ],
)
def test_right_answers(text):
    assert is_right(text, PARIS)


@pytest.mark.parametrize("text", ["", "Lyon", "Parisian", "Paris or Lyon", "Not sure. Paris?", "I don't know."])
def test_wrong_answers(text):
    assert not is_right(text, PARIS)


def test_an_option_inside_the_right_answer_is_no_slip():
    assert is_right("Guinea-Bissau", GUINEA)
    assert not is_right("Guinea", GUINEA)
    assert not is_right("Guinea-Bissau or Guinea", GUINEA)


@pytest.mark.parametrize(("right", "other"), [("Romania", "Oman"), ("Nigeria", "Niger")])
def test_an_option_spelt_within_the_right_answers_letters_is_a_slip_when_named(right, other):
    question = Question(id="q", question="?", choices=(right, other), answer=right, group="g")
    assert is_right(right, question)
    assert not is_right(f"{right} or {other}", question)


@pytest.mark.parametrize("text", ["St. Lucia", "U.S. dollar", "Mt. Etna"])
def test_an_abbreviation_ends_no_sentence(text):
    assert first_sentence(text) == text


def test_a_sentence_may_end_in_an_accented_letter():
    assert first_sentence("Bogotá. Lima is far") == "Bogotá"


ABSTENTIONS = """\
I don't know.|I do not know|i dont know|I don’t know.|Unknown|unknown.|Not sure.|I'm not sure
I am not certain of that.|I cannot answer that|I can't say.|I have no idea|No idea
I have no information about it|I'm not familiar with Zelandor.|Zelandor does not exist.
There is no such country.|That is not a real country.|I couldn't find anything on it|It is not known.|N/A
I am unable to answer.|We do not know.|No information is available|I'm unaware of that place
The answer is unknown.|I don't have that information.|I do not have any information on it|I've never heard of it.
Don't know.|That isn't a real country.|There is no country called Morania.|It cannot be determined.
The capital of Ulvuristan is not specified.|Impossible to say.|Uncertain.
I haven't heard of it|F is not a chemical element"""
ASSERTIONS = """\
Paris|42|Knoxville|The unknown soldier lies in Paris|Norway|Oslo, not Bergen|I know: Paris.
Western Africa|The country is known for its tea. I don't know more.|Nowhere Island|Unknownia|Dontknowgrad
Not Paris but Lyon|Informationville|Iran|Exist City|Suriname|Cannes|Sure: Paris|Certainly Rome
An idea: Rome|Nauru|Ideapolis|Fe|No|Niue|Noumea|Nothing Town|Canada|Kent
The country is not known for its tea|It is unknown as Lyon|I have heard of Lyon|There is no country larger than Russia
Lyon, but I'm not sure|Uncertainty Bay|I have data: Rome"""


@pytest.mark.parametrize("text", ABSTENTIONS.replace("\n", "|").split("|"))
def test_abstentions_are_seen(text):
    assert abstained(text)


@pytest.mark.parametrize("text", ASSERTIONS.replace("\n", "|").split("|"))
def test_assertions_are_no_abstentions(text):
    assert not abstained(text)


def judged(answerable, right, abstained):
    return Judgement(
        "question", answerable, right if answerable else None, abstained, not (right or abstained), float(right)
    )


def test_rates_by_hand():
    right, wrong = judged(True, True, False), judged(True, False, False)
    declined, declined_rightly, made_up = (
        judged(True, False, True),
        judged(False, False, True),
        judged(False, False, False),
    )
    rows = [right] * 4 + [wrong] * 3 + [declined] * 2 + [declined_rightly] * 5 + [made_up] * 6
    assert hallucination.hallucination_rate(rows).value == pytest.approx((3 + 6) / 20)
    assert hallucination.abstention_rate(rows).value == pytest.approx(7 / 20)
    assert hallucination.selective_accuracy(rows).value == pytest.approx(4 / 7)
    assert hallucination.selective_accuracy(rows).n == 7


def test_always_abstaining_is_shown_for_what_it_is():
    rows = [judged(True, False, True)] * 10
    assert hallucination.hallucination_rate(rows).value == 0
    assert hallucination.abstention_rate(rows).value == 1
    assert hallucination.selective_accuracy(rows) is None


class Favouring:
    """A runtime whose every token of `word` is likely, and all others are not."""

    def __init__(self, ids):
        self.ids = set(ids)

    def score(self, prompts, continuations):
        return [[sum(-0.1 if token in self.ids else -3.0 for token in ids) for ids in row] for row in continuations]


def test_choice_is_by_mean_so_that_a_long_answer_is_not_punished(tokenizer):
    long, short = "Saint Vincent and the Grenadines", "Chad"
    question = Question(id="q", question="Which?", choices=(short, long), answer=long, group="g")
    ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    means = score_choices(Favouring(ids), tokenizer, "Answer.", [question])[0]
    assert means[1] == pytest.approx(-0.1)
    assert means[0] < means[1]
    assert math.isfinite(means[0])
