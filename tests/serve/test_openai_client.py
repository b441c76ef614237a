"""OpenAI's client, unmodified, over a real socket."""

import openai
import pytest

from tests.serve.fakes import ASK, FakeBackends, app, completion, served


@pytest.fixture(scope="module")
def client():
    with (
        served(app(FakeBackends(device=completion("It is Lima")), token="secret")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as made,
    ):
        yield made


def test_an_answer(client):
    answer = client.chat.completions.create(model="pocket", messages=ASK["messages"], max_tokens=5)
    assert answer.choices[0].message.content == "It is Lima"
    assert answer.model == "pocket"
    assert answer.model_extra["lilliput"]["place"] == "device"


def test_a_stream(client):
    with client.chat.completions.create(model="pocket", messages=ASK["messages"], stream=True) as stream:
        chunks = list(stream)
    assert "".join(filter(None, (chunk.choices[0].delta.content for chunk in chunks))) == "It is Lima"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].model_extra["lilliput"]["place"] == "device"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").owned_by == "lilliput"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here"):
        client.chat.completions.create(model="gpt-4", messages=ASK["messages"])


def test_errors_raise_the_client_s_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="pocket", messages=ASK["messages"], max_tokens=-1)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guess").models.list()
