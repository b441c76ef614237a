from types import SimpleNamespace

import pytest

from lilliput.config import Params
from lilliput.errors import ConfigError
from lilliput.graph import ancestors, check_graph, check_shape, needing_gpu, require_gpu, topological_order

BASE = {"from": "source", "apply": "load"}


@pytest.fixture
def with_candidates(tiny_params):
    def make(candidates) -> Params:
        raw = tiny_params.model_dump(mode="json", by_alias=True) | {"candidates": candidates}
        return Params.model_validate_json(__import__("json").dumps(raw))

    return make


def problems(params) -> str:
    with pytest.raises(ConfigError) as caught:
        check_graph(params, "params.yaml")
    return str(caught.value)


def test_order_puts_parents_first_and_keeps_the_file_order_otherwise(with_candidates):
    params = with_candidates(
        {
            "z": {"from": "a", "apply": "lora"},
            "a": BASE,
            "b": {"from": "z", "apply": "prune"},
            "q": {"from": "a", "apply": "gptq"},
        }
    )
    assert topological_order(params) == ["a", "z", "q", "b"]
    assert ancestors(params, "b") == ["z", "a"]


def test_unknown_parent_is_named_with_a_suggestion(with_candidates):
    message = problems(with_candidates({"base": BASE, "lora": {"from": "bass", "apply": "lora"}}))
    assert message == "params.yaml: candidates.lora.from: unknown parent `bass`; did you mean `base`?"


def test_cycle_is_shown_whole(with_candidates):
    message = problems(with_candidates({"a": {"from": "b", "apply": "lora"}, "b": {"from": "a", "apply": "prune"}}))
    assert "circle" in message
    assert "a → b → a" in message or "b → a → b" in message


def test_only_load_follows_the_source(with_candidates):
    assert "`load` and only `load`" in problems(with_candidates({"lora": {"from": "source", "apply": "lora"}}))
    assert "`load` and only `load`" in problems(
        with_candidates({"base": BASE, "again": {"from": "base", "apply": "load"}})
    )


@pytest.mark.parametrize("teacher", [None, "other", "nobody"])
def test_teacher_must_be_an_ancestor(with_candidates, teacher):
    graph = {"base": BASE, "other": {"from": "base", "apply": "lora"}, "pruned": {"from": "base", "apply": "prune"}}
    graph["student"] = {"from": "pruned", "apply": "distill"} | ({"teacher": teacher} if teacher else {})
    assert "candidates.student.teacher" in problems(with_candidates(graph))


def test_teacher_elsewhere_than_distillation_is_refused(with_candidates):
    assert "only `distill`" in problems(
        with_candidates({"base": BASE, "l": {"from": "base", "apply": "lora", "teacher": "base"}})
    )


@pytest.mark.parametrize("strategy", ["lora", "prune", "gptq", "distill"])
def test_nothing_follows_a_quantised_candidate(with_candidates, strategy):
    child = {"from": "q", "apply": strategy} | ({"teacher": "base"} if strategy == "distill" else {})
    message = problems(with_candidates({"base": BASE, "q": {"from": "base", "apply": "gptq"}, "child": child}))
    assert "needs a float parent, but `q` is quantised" in message


def test_an_adapter_kept_apart_has_no_descendants(with_candidates):
    graph = {
        "base": BASE,
        "l": {"from": "base", "apply": "lora", "with": {"merge": False}},
        "p": {"from": "l", "apply": "prune"},
    }
    assert "set merge: true" in problems(with_candidates(graph))


def test_several_problems_come_together(with_candidates):
    graph = {
        "base": BASE,
        "q": {"from": "base", "apply": "gptq", "with": {"bitz": 1}},
        "l": {"from": "q", "apply": "lora"},
    }
    message = problems(with_candidates(graph))
    assert "float parent" in message
    assert "bitz" in message


def test_shape_is_checked_for_all_descendants(with_candidates):
    shape = SimpleNamespace(num_hidden_layers=4, hidden_size=576, intermediate_size=1536)
    good = {"base": BASE, "p": {"from": "base", "apply": "prune"}, "q": {"from": "p", "apply": "gptq"}}
    check_shape(with_candidates(good), "base", shape)
    bad = good | {
        "p": {"from": "base", "apply": "prune", "with": {"layers": 4}},
        "q": {"from": "p", "apply": "gptq", "with": {"group_size": 128}},
    }
    with pytest.raises(ConfigError) as caught:
        check_shape(with_candidates(bad), "base", shape)
    assert "removing 4 of 4 layers" in str(caught.value)
    assert "group_size 128 does not divide" in str(caught.value)
    assert "choose 64, 32, 16" in str(caught.value)


def test_layers_removed_twice_are_added_up(with_candidates):
    shape = SimpleNamespace(num_hidden_layers=4, hidden_size=64, intermediate_size=128)
    two = {"from": "base", "apply": "prune", "with": {"layers": 2}}
    params = with_candidates({"base": BASE, "p": two, "pp": {**two, "from": "p"}})
    with pytest.raises(ConfigError, match=r"candidates\.pp: removing 4 of 4"):
        check_shape(params, "base", shape)


@pytest.fixture
def wanting_gpu(with_candidates):
    graph = {"base": BASE, "l": {"from": "base", "apply": "lora"}}
    graph["q"] = {"from": "base", "apply": "lora", "with": {"variant": "qlora"}}
    graph["b"] = {"from": "base", "apply": "lora", "with": {"precision": "bfloat16"}}
    return with_candidates(graph)


def test_what_needs_a_gpu_is_refused_where_there_is_none(wanting_gpu, monkeypatch):
    assert needing_gpu(wanting_gpu) == {"q": "variant: qlora", "b": "precision: bfloat16"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    require_gpu(wanting_gpu, ["base", "l"])
    with pytest.raises(ConfigError) as caught:
        require_gpu(wanting_gpu, ["base", "l", "q", "b"])
    message = str(caught.value)
    assert "candidates.q: `variant: qlora` needs an NVIDIA GPU" in message
    assert "candidates.b: `precision: bfloat16` needs an NVIDIA GPU" in message


def test_qlora_without_bitsandbytes_is_refused_by_name(wanting_gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lilliput\[gpu\]'"):
        require_gpu(wanting_gpu, ["q"])
    with pytest.raises(ConfigError, match=r"candidates\.b"):  # a GPU that only emulates bfloat16
        require_gpu(wanting_gpu, ["b"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    require_gpu(wanting_gpu, ["q"])
