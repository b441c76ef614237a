"""The figures of a model card: those that the candidate's rows have."""

from lilliput.artifacts import Manifest
from lilliput.model_card import model_card
from tests import results

MANIFEST = Manifest.model_construct(
    candidate="small", strategy="lora", parent="base", parent_sha256="b" * 64, artifact_sha256="a" * 64
).model_copy(update={"parameters": 10**6, "size_bytes": 2**20, "config": {}, "facts": {}})


def test_a_card_states_calls_and_accuracy_by_choice_only_where_there_are_some():
    questions = model_card(MANIFEST, results.evaluation(), "Answer.")
    assert "| Accuracy, four choices | 0.500 |" in questions and "Calls" not in questions
    record = results.evaluation(accuracy_choice=results.figure(None), tool_calls=results.tool_calls(0.75))
    calls = model_card(MANIFEST, record, "Answer.")
    assert "four choices" not in calls
    assert "| Calls: complete and right | 0.750 | 0.650 – 0.850 | 40 |" in calls
