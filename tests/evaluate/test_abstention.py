"""How well abstentions are found: on answers the wording was tuned on, and on others it never saw.

Both sets were written for this purpose without sight of the patterns: short answers of the kind that small chat models
give, about half of them declining, labelled as a careful reader would. docs/metrics.md quotes the second.
"""

import json
from pathlib import Path

import pytest

from lilliput.evaluate.abstention import abstained
from lilliput.statistics.intervals import rate

HERE = Path(__file__).parent


def found(name):
    """(found and right, found, labelled as declining)"""
    rows = [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    verdicts = [(abstained(row["text"]), row["abstained"]) for row in rows]
    assert len(rows) >= 200 and 0.4 < sum(label for _, label in verdicts) / len(rows) < 0.6
    return sum(a and b for a, b in verdicts), sum(a for a, _ in verdicts), sum(b for _, b in verdicts)


def test_on_answers_never_tuned_on_precision_and_recall_are_those_of_the_documentation():
    right, said, labelled = found("abstentions_held_out.jsonl")
    precision, recall = (
        rate([True] * right + [False] * (said - right)),
        rate([True] * right + [False] * (labelled - right)),
    )
    stated = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name, estimate in (("precision", precision), ("recall", recall)):
        assert f"{name} {estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" in stated
    assert precision.value > 0.9 and recall.value > 0.8


def test_answers_tuned_on_stay_found():
    right, said, labelled = found("abstentions_tuned_on.jsonl")
    assert right / said > 0.98
    assert right / labelled > 0.93


def test_an_empty_answer_asserts_nothing():
    assert abstained("  \n") and abstained("") and abstained("?!")


@pytest.mark.parametrize("text", ["Lyon, but I'm not sure", "Probably Lyon", "Paris. I don't know more."])
def test_a_guess_is_an_answer(text):
    assert not abstained(text)
