"""Each message that offers values is followed here: what it advises has to be accepted by what refused."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from lilliput.compress.packing import require_packable
from lilliput.config import (
    BenchmarkConfig,
    DistillConfig,
    MoeConfig,
    Params,
    PruneAmount,
    PruneConfig,
    RtnConfig,
    SparsifyConfig,
)
from lilliput.config.reading import validate
from lilliput.errors import ConfigError, StrategyError
from lilliput.graph import check_graph, check_shape
from lilliput.models import random_model
from lilliput.params import load_params
from lilliput.public_benchmarks.run import require_benchmarks
from lilliput.shape import GROUP_SIZES, expert_numbers, pruned, size

TINY = load_params(Path("examples/tiny.yaml"))
BASE = {"from": "source", "apply": "load"}
few = partial(settings, max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def raw(candidates=None, **changes):
    """params.yaml as plain values, without what refers to other candidates."""
    plain = TINY.model_dump(mode="json", by_alias=True)
    if candidates:
        plain |= {"candidates": candidates, "compile": {}, "serving": {}}
        plain["caching"] = plain["caching"] | {"candidates": []}
    return plain | changes


def params(plain) -> Params:
    return validate(Params, plain, "params.yaml")


def refusal(check, *arguments):
    """The message with which `check` refuses; None if it accepts."""
    try:
        check(*arguments)
    except (ConfigError, StrategyError, ValueError) as error:
        return str(error)
    return None


def advised(message):
    """The settings that a message offers, each by itself as a `key: value` map."""
    return [dict([pair.split(": ", 1)]) for pair in re.findall(r"`(\w+: [^`]+)`", message.partition("choose")[2])]


def shape(**sizes):
    return LlamaConfig(
        **{"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "tie_word_embeddings": False}
        | sizes
    )


WIDTHS = st.integers(1, 40).map(lambda number: 8 * number)


@few()
@given(WIDTHS, st.sampled_from(GROUP_SIZES), st.sampled_from([None, "gguf"]))
def test_group_sizes_that_are_advised_divide_and_are_held_by_the_target(neurons, group_size, target):
    config = shape(intermediate_size=neurons)
    candidates = {"base": BASE, "q": {"from": "base", "apply": "rtn", "with": {"group_size": group_size}}}
    compiled = {"q-gguf": {"candidate": "q", "target": "gguf"}} if target else {}

    def check(chosen):
        tried = candidates | {"q": candidates["q"] | {"with": {"group_size": chosen}}}
        accepted = params(raw(tried) | {"compile": compiled})
        check_graph(accepted, "params.yaml")
        check_shape(accepted, "base", config)

    if message := refusal(check, group_size):
        numbers = [int(number) for number in re.findall(r"\d+", message.partition("choose")[2])]
        for value in numbers:
            # Before the shape is known only GGUF's own rule is applied; that of the shape may follow.
            again = refusal(check, value)
            assert again is None or ("GGUF" in message and "GGUF" not in again), (message, again)
        if not numbers:
            assert "remove this candidate" in message
            check_shape(params(raw({"base": BASE})), "base", config)


@few()
@given(
    st.sampled_from(["block_influence", "neurons", "kv_groups", "query_heads", "hidden"]),
    st.sampled_from(["removed_count", "removed_share", "kept_parameters", "kept_latency_estimate", "kept_mib"]),
    st.integers(1, 300),
    st.sampled_from([1, 4, 7, 16, 100]),
    st.sampled_from([shape(), shape(num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1)]),
)
def test_suggested_pruning_amounts_are_accepted_and_keep_their_amount(method, by, value, multiple, config):
    amount = PruneAmount(by=by, value=value if by in {"removed_count", "kept_mib"} else value / 301)

    def prune(method, amount):
        chosen = PruneConfig(method=method, amount=amount, multiple=multiple, calibration_examples=1)
        return size(pruned(config, chosen, 2), method)

    message = refusal(prune, method, amount)
    if message is None:
        return
    offers = re.findall(r"`value: ([\d.e-]+)` \(leaves (\d+)\)", message)
    for offered, left in offers:
        assert prune(method, PruneAmount(by=by, value=json.loads(offered))) == int(left)
    if not offers:
        other = re.search(r"`method: (\w+)` with `amount: {by: (\w+), value: (\d+)}`", message)
        assert other or "remove this candidate" in message
        if other:
            prune(other[1], PruneAmount(by=other[2], value=int(other[3])))


@few()
@given(st.integers(2, 3000), st.integers(2, 20), st.integers(1, 6), st.data())
def test_numbers_of_experts_that_are_advised_divide_the_neurons(neurons, experts, shared, data):
    active = data.draw(st.integers(1, experts - 1))
    config = MoeConfig(experts=experts, shared=shared, active=active, calibration_examples=1)
    assume(neurons % (experts + shared))
    message = expert_numbers(neurons, config)
    offers = re.findall(r"`experts: (\d+)` with `shared: (\d+)`", message)
    assert offers or "lower it" in message
    for more, common in offers:
        changed = MoeConfig(experts=int(more), shared=int(common), active=active, calibration_examples=1)
        assert neurons % (changed.experts + changed.shared) == 0


@few(max_examples=15)
@given(WIDTHS, st.sampled_from(GROUP_SIZES), st.sampled_from([2, 3, 4, 8]))
def test_suggested_packing_settings_can_be_packed(neurons, group_size, bits):
    with torch.device("meta"):
        model = random_model(shape(intermediate_size=neurons, num_hidden_layers=1), seed=0)

    def check(bits, group_size):
        require_packable(model, RtnConfig(bits=bits, group_size=group_size, symmetric=True))

    message = refusal(check, bits, group_size)
    numbers = [int(number) for number in re.findall(r"\d+", (message or "").partition("choose")[2])]
    for number in numbers:
        again = refusal(check, number, group_size) if message.startswith("bits") else refusal(check, bits, number)
        assert again is None or again.split(":")[0] != message.split(":")[0], again
    assert numbers or message is None or "leave this model in float" in message


@given(st.sampled_from(["removed_count", "removed_share", "kept_parameters", "kept_mib"]), st.floats(0.01, 50))
def test_amounts_of_another_kind_that_are_advised_are_accepted(by, value):
    message = refusal(partial(PruneAmount, by=by, value=value))
    for pair in advised(message) if message else []:
        PruneAmount(**{"by": by, "value": value} | {key: _plain(text) for key, text in pair.items()})


@given(st.integers(2, 40), st.integers(1, 60))
def test_active_experts_that_are_advised_leave_some_idle(experts, active):
    message = refusal(partial(MoeConfig, experts=experts, shared=1, active=active, calibration_examples=1))
    for pair in advised(message) if message else []:
        MoeConfig(experts=experts, shared=1, active=int(pair["active"]), calibration_examples=1)


SPARSE = {"method": "wanda", "pattern": "2:4", "damp_percent": 0.1, "calibration_examples": 1}


@given(st.sampled_from([0.3, 0.5]), st.integers(1, 300))
def test_suggested_settings_allow_the_pattern_2_4(sparsity, block_size):
    given_settings = SPARSE | {"sparsity": sparsity, "block_size": block_size}
    follow(SparsifyConfig, given_settings)


@given(st.sampled_from(["forward_kl", "reverse_kl", "jensen_shannon"]), st.sampled_from([0.0, 0.5]), st.booleans())
def test_suggested_settings_allow_stored_logits(divergence, share, hidden):
    own = TINY.strategies.distill.model_dump() | {"teacher_logits": "stored", "divergence": divergence}
    follow(DistillConfig, own | {"on_policy_share": share, "hidden_weight": 1.0 if hidden else 0.0})


def follow(section, given_settings):
    """Every alternative of the advice, joined by "or", is accepted."""
    message = refusal(partial(section, **given_settings))
    offer = (message or "").partition("choose ")[2].partition(" [type=")[0]
    for alternative in filter(None, offer.split(", or ")):
        pairs = dict(re.findall(r"`(\w+): ([^`]+)`", alternative))
        assert pairs, message
        section(**given_settings | {key: _plain(text) for key, text in pairs.items()})


def _plain(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def names_offered(message):
    """The names that a message offers: after "did you mean", or after "name one of"."""
    close = re.findall(r"did you mean `([^`]+)`", message)
    return close or re.search(r"name one of:? ([\w, -]+)", message)[1].split("; found")[0].split(", ")


@pytest.mark.parametrize("parent", ["bas", "q", "m1", "sorce", "nothing-like-it"])
@pytest.mark.parametrize("apply", ["rtn", "load"])
def test_parents_that_are_advised_make_a_graph(parent, apply):
    def graph(parent):
        own = {"from": parent, "apply": apply}
        return params(raw({"base": BASE, "m": {"from": "base", "apply": "lora"}, "q1": own}))

    message = refusal(check_graph, graph(parent), "params.yaml")
    assert message
    for name in names_offered(message):
        check_graph(graph(name), "params.yaml")


@pytest.mark.parametrize("target", ["gguf", "onnx", "autogptq"])
def test_candidates_that_are_advised_can_be_compiled(target):
    candidates = {"base": BASE, "m": {"from": "base", "apply": "moe"}, "q": {"from": "base", "apply": "rtn"}}
    candidates["q"]["with"] = {"bits": 4, "group_size": 32, "symmetric": True}

    def graph(name):
        plain = raw(candidates) | {"compile": {f"{name}-{target}": {"candidate": name, "target": target}}}
        return params(plain)

    offered = names_offered(refusal(check_graph, graph("nobody"), "params.yaml"))
    assert offered
    for name in offered:
        check_graph(graph(name), "params.yaml")


@pytest.mark.parametrize("section", ["promotion", "serving", "profile"])
def test_devices_that_are_advised_are_accepted(section):
    plain = TINY.model_dump(mode="json", by_alias=True)
    device, serving = next(iter(plain["serving"].items()), (None, None))

    def with_device(name):
        if section == "profile":
            energy = plain["evaluation"]["energy"] | {"profile": name}
            return plain | {"evaluation": plain["evaluation"] | {"energy": energy}}
        value = serving if section == "serving" else next(iter(plain["promotion"].values()))
        return plain | {section: {name: value}}

    if section == "serving" and device is None:
        pytest.skip("examples/tiny.yaml serves nothing")
    for name in names_offered(refusal(params, with_device("nowhere"))):
        params(with_device(name))


def places(plain, prefix=()):
    """Each key of `plain` with the place it is in."""
    for key, value in plain.items():
        yield prefix, key
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


@pytest.mark.parametrize(("place", "key"), [*places(TINY.model_dump(mode="json", by_alias=True))])
def test_a_misspelt_key_is_recognised_or_nothing_is_suggested(place, key):
    plain = json.loads(json.dumps(TINY.model_dump(mode="json", by_alias=True)))
    parent = plain
    for part in place:
        parent = parent[part]
    parent[f"{key}x"] = parent[key]
    message = refusal(params, plain)
    if message is None or "unknown key" not in message:
        return  # a map with names of one's own
    suggested = re.search(rf"{re.escape(key)}x: unknown key \(did you mean `(\w+)`\?\)", message)
    assert suggested, message
    assert suggested[1] in parent  # which it was copied from


@pytest.mark.parametrize("task", ["arc_eazy", "helaswag", "truthfulqa_mc", "gsm8", "pika"])
def test_benchmarks_that_are_advised_exist(task):
    pytest.importorskip("lm_eval")
    message = refusal(require_benchmarks, [BenchmarkConfig(task=task)], Path())
    assert message
    offered = re.search(r"did you mean ([^?]+)\?", message)
    for name in offered[1].split(", ") if offered else []:
        require_benchmarks([BenchmarkConfig(task=name)], Path())
