"""BFCL's tasks from the pinned wheel: every ground truth is right, and what its rules forbid is wrong."""

import json
import shutil

import jsonschema_rs
import pytest

from lilliput.chat_templates.built_in import BUILT_IN_TEMPLATES
from lilliput.config import BenchmarkConfig
from lilliput.errors import ConfigError, DataError
from lilliput.evaluate.judges.judge import judge_answer
from lilliput.models import open_model
from lilliput.public_benchmarks import bfcl
from lilliput.public_benchmarks.run import require_benchmarks, require_template, run_benchmarks
from lilliput.runtime.torch import TorchRuntime
from lilliput.tool_calls import read_answer

WITH_CALLS = [task for task in bfcl.CATEGORIES if task != "bfcl_irrelevance"]
SIZES = {"bfcl_simple": 400, "bfcl_multiple": 200, "bfcl_parallel": 200, "bfcl_parallel_multiple": 200}


@pytest.fixture(scope="module")
def tasks(wheel):
    return {task: bfcl.read_tasks(task, wheel) for task in bfcl.CATEGORIES}


def truths(row, optional):
    """The expected calls with the first accepted value of each argument, with or without optional arguments.

    Two tasks accept optional arguments that their schemas do not have; these are left out, as BFCL requires.
    """
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
    calls = []
    for call in row.expectation.tool_calls:
        schema, arguments = schemas[call.name], {}
        for name, values in call.arguments.items():
            stated = [value for value in values if value != ""]
            wanted = name in schema.get("required", ()) or "" not in values or (optional and stated)
            if wanted and name in schema["properties"]:
                arguments[name] = stated[0] if stated else ""
        calls.append({"name": call.name, "arguments": arguments})
    return calls


def is_right(calls, row):
    return judge_answer(json.dumps(calls), row).right


def test_all_rows_are_there_and_have_functions(tasks):
    assert {task: len(rows) for task, rows in tasks.items()} == SIZES | {"bfcl_irrelevance": 240}
    types = set()
    for rows in tasks.values():
        for row in rows:
            for tool in row.tools:
                parameters = tool["function"]["parameters"]
                assert parameters["type"] == "object"
                jsonschema_rs.validator_for(parameters, offline=True)
                types |= {schema.get("type") for schema in parameters["properties"].values()}
    assert types == {"string", "integer", "number", "boolean", "array", "object", None}


@pytest.mark.parametrize("task", WITH_CALLS)
def test_every_ground_truth_is_right_and_no_hallucination(tasks, task):
    for row in tasks[task]:
        for optional in (False, True):
            judgement = judge_answer(json.dumps(truths(row, optional)), row)
            assert judgement.right and not judgement.hallucinated, row.id
            assert judgement.calls.slots.right == judgement.calls.slots.given == judgement.calls.slots.expected


@pytest.mark.parametrize("task", WITH_CALLS)
def test_mutations_of_the_ground_truth_are_wrong(tasks, task):
    for row in tasks[task]:
        right = truths(row, optional=False)
        first, *others = right
        extra = {**first, "arguments": {**first["arguments"], "unheard_of": 1}}
        renamed = {**first, "name": first["name"] + "_2"}
        assert not is_right([extra, *others], row), row.id
        assert not is_right([renamed, *others], row), row.id
        assert not is_right([*right, first], row), row.id
        assert not is_right(others, row), row.id
        for name, value in first["arguments"].items():
            less = {key: part for key, part in first["arguments"].items() if key != name}
            assert not is_right([{**first, "arguments": less}, *others], row), (row.id, name)
            changed = {**first["arguments"], name: {"quite": ["another", value]}}
            assert not is_right([{**first, "arguments": changed}, *others], row), (row.id, name)


def test_parallel_calls_may_be_in_any_order(tasks):
    for row in tasks["bfcl_parallel_multiple"]:
        assert is_right(truths(row, optional=False)[::-1], row), row.id


def test_choices_inside_objects_are_expanded(tasks):
    row = next(row for row in tasks["bfcl_simple"] if row.id == "simple_python_89")
    accepted = row.expectation.tool_calls[0].arguments["conditions"]
    assert [value for value in accepted if value != ""] == [
        {"department": "Science", "school": "Bluebird High School"},
        {"department": "Science", "school": "Bluebird HS"},
    ]


class Scripted:
    """A runtime that gives prepared answers."""

    def __init__(self, answers):
        self.answers = answers

    def generate(self, prompts, max_tokens):
        assert max_tokens == bfcl.MAX_ANSWER_TOKENS and len(prompts) == len(self.answers)
        return self.answers


@pytest.fixture
def with_tools(checkpoint, tmp_path):
    """The tiny checkpoint with the built-in template for functions."""
    folder = tmp_path / "with-tools"
    shutil.copytree(checkpoint, folder)
    shutil.copy(BUILT_IN_TEMPLATES / "chatml-tools.jinja", folder / "chat_template.jinja")
    return folder


def test_an_answer_without_a_readable_call_is_right_where_no_function_applies(tasks, with_tools):
    _, tokenizer = open_model(with_tools)
    answers = ["No function can do that.", '{"name": "f", "arguments": {}}', '{"name": "f", "argum', ""]
    rows = tasks["bfcl_irrelevance"][:4]
    items = bfcl.answer_tasks(Scripted(answers), tokenizer, rows)
    assert [item["acc"] for item in items] == [1.0, 0.0, 1.0, 1.0]
    assert [item["malformed"] for item in items] == [0.0, 0.0, 1.0, 0.0]
    simple = tasks["bfcl_simple"][:2]
    scripted = [json.dumps(truths(simple[0], optional=False)), '{"name": "math.factorial", "arg']
    items = bfcl.answer_tasks(Scripted(scripted), tokenizer, simple)
    assert items == [{"acc": 1.0, "malformed": 0.0}, {"acc": 0.0, "malformed": 1.0}]


def test_a_model_runs_bfcl_with_its_template_and_functions(wheel, with_tools, tmp_path):
    model, tokenizer = open_model(with_tools)
    configs = [BenchmarkConfig(task=task, limit=3) for task in ("bfcl_simple", "bfcl_irrelevance")]
    require_benchmarks(configs, tmp_path)
    require_template(tokenizer, configs)
    found = run_benchmarks(TorchRuntime(model, tokenizer, 4), tokenizer, configs, tmp_path, seed=1, resamples=100)
    simple, irrelevance = found["bfcl_simple"], found["bfcl_irrelevance"]
    assert (simple.metrics["acc"].value, simple.metrics["acc"].n) == (0.0, 3)  # random weights
    assert (irrelevance.metrics["acc"].value, irrelevance.metrics["acc"].n) == (1.0, 3)
    assert simple.metrics["acc"].high > 0.3 and len(simple.items) == 3


def test_a_template_without_functions_is_refused_before_anything_is_measured(opened):
    with pytest.raises(DataError, match="chatml-tools"):
        require_template(opened[1], [BenchmarkConfig(task="bfcl_simple")])
    require_template(opened[1], [BenchmarkConfig(task="arc_easy")])


def test_a_file_and_a_wrong_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="remove `file`"):
        require_benchmarks([BenchmarkConfig(task="bfcl_simple", file="a.jsonl", sha256="0" * 64)], tmp_path)
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match=r"did you mean .*bfcl_simple"):
        require_benchmarks([BenchmarkConfig(task="bfcl_simpel")], tmp_path)


def test_bfcl_needs_no_harness(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_benchmarks([BenchmarkConfig(task="bfcl_simple")], tmp_path)
    with pytest.raises(ConfigError, match="not installed"):
        require_benchmarks([BenchmarkConfig(task=task) for task in ("bfcl_simple", "arc_easy")], tmp_path)


def test_the_python_form_of_the_answer_is_read_as_well(tasks):
    row = tasks["bfcl_simple"][0]
    assert read_answer("[calculate_triangle_area(base=10, height=5)]").calls
    assert judge_answer("[calculate_triangle_area(base=10, height=5, unit='units')]", row).right
