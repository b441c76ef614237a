"""Every reference answer of the built-in requests is right by its own row's expectation."""

import json
from pathlib import Path

import pytest

from lilliput.data.conversations import ExpectedCalls
from lilliput.errors import SourceError
from lilliput.evaluate.judges.judge import judge_answer
from lilliput.params import load_params
from lilliput.recipes.recipe import open_recipe
from lilliput.recipes.request_entities import collect_tables
from lilliput.recipes.request_rows import make_requests
from lilliput.wheels import default_cache


@pytest.fixture(scope="module")
def requests():
    config = load_params(Path("examples/phone-actions.yaml")).data
    recipe = open_recipe(Path(config.source))
    try:
        return make_requests(recipe, collect_tables(recipe, default_cache()), config)
    except SourceError as error:
        pytest.skip(f"the wheels of the recipe are neither cached nor downloadable: {error}")


def written(message):
    """The answer as a model writes it with the built-in template."""
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return "\n".join(map(json.dumps, calls)) if calls else message.text


def test_reference_answers_are_right_and_valid(requests):
    for row in requests:
        judgement = judge_answer(written(row.reference), row)
        assert judgement.right and not judgement.hallucinated and judgement.calls.invalid is None, row.id
        assert judgement.abstained == (not row.reference.tool_calls), row.id


def test_the_answers_of_other_rows_are_wrong(requests):
    calling = [row for row in requests if isinstance(row.expectation, ExpectedCalls) and row.expectation.tool_calls]
    declining = [row for row in requests if not row.reference.tool_calls]
    for row in calling[:300]:
        judgement = judge_answer(declining[0].reference.text, row)
        assert not judgement.right and judgement.abstained and not judgement.hallucinated, row.id
    for row in declining[:300]:
        judgement = judge_answer(written(calling[0].reference), row)
        assert not judgement.right and judgement.hallucinated and judgement.calls.needless, row.id
