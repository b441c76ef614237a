"""Our matcher against BFCL's own checker, run from the pinned wheel: the verdicts on changed ground truths.

Two kinds of difference are documented (docs/metrics.md); any other one is an error.
"""

import itertools
import json
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lilliput.evaluate.judges.judge import judge_answer
from lilliput.public_benchmarks import bfcl
from lilliput.wheels import read_member

MODEL = "no-model"
MODELS = "bfcl_eval.constants.model_config"  # imports the clients of every provider
ANSWERS_PER_TASK = 10
# How many of the answers BFCL's checker accepts.
ACCEPTED = {"bfcl_simple": 1569, "bfcl_multiple": 680, "bfcl_parallel": 724, "bfcl_parallel_multiple": 674}


@pytest.fixture(scope="module")
def check(wheel):
    """BFCL's verdict on calls: by functions, calls, ground truth and category."""
    models = ModuleType(MODELS)
    models.MODEL_CONFIG_MAPPING = {MODEL: SimpleNamespace(underscore_to_dot=False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(wheel)
        patch.setitem(sys.modules, MODELS, models)
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

        for name in [name for name in sys.modules if name.startswith("bfcl_eval")]:
            patch.delitem(sys.modules, name)

    def verdict(functions, calls, truth, category):
        given = [{call["name"]: call["arguments"]} for call in calls]
        try:
            return ast_checker(functions, given, truth, Language.PYTHON, category, MODEL)["valid"]
        except (AttributeError, TypeError):  # it expects the types of the ground truth inside lists and objects
            return False

    return verdict


def raw_rows(wheel, task):
    """The functions and the ground truth of each row, as BFCL's files have them."""
    lines = [
        [json.loads(line) for line in read_member(wheel, f"bfcl_eval/data/{folder}BFCL_v4_{name}.json").splitlines()]
        for folder, name in (("", bfcl.CATEGORIES[task]), ("possible_answer/", bfcl.CATEGORIES[task]))
    ]
    truths = {row["id"]: row["ground_truth"] for row in lines[1]}
    return {row["id"]: (row["function"], truths[row["id"]]) for row in lines[0]}


def written(row, rng):
    """Calls with one accepted value for each argument; optional ones by chance."""
    calls = []
    for call in row.expectation.tool_calls:
        stated = {name: [value for value in values if value != ""] for name, values in call.arguments.items()}
        given = {
            name: rng.choice(values)
            for name, values in stated.items()
            if values and ("" not in call.arguments[name] or rng.random() < 0.5)
        }
        calls.append({"name": call.name, "arguments": json.loads(json.dumps(given))})
    return calls


def changed_value(value, others, rng):
    """`value` in another form, of another type, or another value."""
    changes = [str(value), [value], None, rng.choice(others)]
    match value:
        case bool():
            changes += [not value, int(value)]
        case int() | float():
            changes += [value + 1, -value, float(value), int(value), bool(value)]
        case str():
            changes += [value.upper(), f" {value}.", value.replace(" ", "-"), f"{value}s", value[1:], ""]
        case list():
            changes += [value[::-1], value[1:], [*value, *value[:1]], [changed_inside(part) for part in value]]
        case dict():
            changes += [dict([*value.items()][1:]), {**value, "extra": 1}]
            changes.append({key: changed_inside(part) for key, part in value.items()})
    return rng.choice(changes)


def changed_inside(value):
    match value:
        case str():
            return value.upper()
        case bool():
            return int(value)
        case int():
            return float(value)
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def changed(calls, row, rng):
    """The calls with one change."""
    calls = json.loads(json.dumps(calls))
    call = rng.choice(calls)
    arguments, everything = call["arguments"], [value for one in calls for value in one["arguments"].values()]
    names = [name for tool in row.tools for name in tool["function"]["parameters"]["properties"]]
    match rng.choice(["nothing", "value", "value", "value", "value", "drop", "add", "rename", "calls"]):
        case "value" if arguments:
            name = rng.choice([*arguments])
            arguments[name] = changed_value(arguments[name], everything, rng)
        case "drop" if arguments:
            del arguments[rng.choice([*arguments])]
        case "add":
            arguments[rng.choice([*names, "unheard_of"])] = rng.choice([*everything, 1, "x", True])
        case "rename":
            call["name"] = rng.choice([tool["function"]["name"] for tool in row.tools] + ["unheard_of"])
        case "calls":
            calls = rng.choice([calls[::-1], calls[1:], [*calls, call], rng.sample(calls, len(calls))])
    return calls


def as_floats(value):
    """The value with all integers inside lists as floats."""
    if isinstance(value, list):
        return [float(part) if type(part) is int else as_floats(part) for part in value]
    return {key: as_floats(part) for key, part in value.items()} if isinstance(value, dict) else value


def is_documented(calls, verdict):
    """Whether BFCL accepts the calls with floats for the integers inside lists, or in another order."""
    forms = [calls, [{**call, "arguments": as_floats(call["arguments"])} for call in calls]]
    return any(verdict(list(order)) for form in forms for order in itertools.permutations(form))


@pytest.mark.parametrize("task", ACCEPTED)
def test_the_verdicts_are_those_of_bfcls_own_checker(wheel, check, task):
    rng, raw, verdicts, differences = random.Random(task), raw_rows(wheel, task), [], []
    for row in bfcl.read_tasks(task, wheel):
        functions, truth = raw[row.id]

        def verdict(calls, functions=functions, truth=truth):
            return check(functions, calls, truth, bfcl.CATEGORIES[task])

        for _ in range(ANSWERS_PER_TASK):
            calls = changed(written(row, rng), row, rng)
            ours, theirs = judge_answer(json.dumps(calls), row).right, verdict(calls)
            verdicts.append(theirs)
            if ours != theirs:
                differences.append((row.id, calls))
                assert ours and is_documented(calls, verdict), (row.id, calls, ours, theirs)
    assert len(verdicts) == ANSWERS_PER_TASK * len(raw)
    assert sum(verdicts) == ACCEPTED[task]
    assert len(differences) == (task == "bfcl_parallel"), differences


def test_integers_count_as_numbers_inside_lists_unlike_in_bfcl(wheel, check):
    row = next(row for row in bfcl.read_tasks("bfcl_simple", wheel) if row.id == "simple_python_87")
    functions, truth = raw_rows(wheel, "bfcl_simple")[row.id]

    def call(*numbers):
        return [{"name": "array_sort", "arguments": {"list": list(numbers), "order": "ascending"}}]

    floats, integers = call(5.0, 3.0, 4.0, 1.0, 2.0), call(5, 3, 4, 1, 2)
    assert judge_answer(json.dumps(floats), row).right and check(functions, floats, truth, "simple_python")
    assert judge_answer(json.dumps(integers), row).right and not check(functions, integers, truth, "simple_python")
