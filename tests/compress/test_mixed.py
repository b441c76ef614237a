import itertools
import json
import random

import pytest
import torch
from torch.nn.functional import cross_entropy

from lilliput.compress.gptq import gptq
from lilliput.compress.grid import Grid, rounded
from lilliput.compress.mixed import allocate, choose_bits, loss_rises, overrides, packed_bytes, within_budget
from lilliput.compress.packing import linears
from lilliput.config import GptqConfig
from lilliput.errors import StrategyError
from lilliput.models import open_model
from lilliput.training.examples import encode_examples
from tests.contexts import SYSTEM, context, weights_of

MIB = 2**20


def config(budget_mib: float) -> GptqConfig:
    settings = {"bits": 4, "group_size": 32, "symmetric": False, "act_order": False, "calibration_examples": 16}
    settings |= {"damp_percent": 0.05, "seed": 3, "mixed": {"budget_mib": budget_mib, "choices": [2, 3, 4, 8]}}
    return GptqConfig.model_validate_json(json.dumps(settings))


@pytest.mark.parametrize("seed", range(6))
def test_allocation_equals_brute_force(seed):
    draw = random.Random(seed)
    sizes = [[2 * unit, 3 * unit, 4 * unit, 8 * unit] for unit in (draw.choice([96, 192, 480]) for _ in range(6))]
    costs = [[10 ** draw.uniform(-4, 4) / 4**bits for bits in (2, 3, 4, 8)] for _ in range(6)]
    smallest, largest = sum(row[0] for row in sizes), sum(row[3] for row in sizes)
    budget = round(smallest + draw.random() * (largest - smallest))

    def total(table, choice):
        return sum(row[index] for row, index in zip(table, choice, strict=True))

    fitting = (choice for choice in itertools.product(range(4), repeat=6) if total(sizes, choice) <= budget)
    best = min(total(costs, choice) for choice in fitting)
    chosen = allocate(costs, sizes, budget)
    assert total(sizes, chosen) <= budget
    assert total(costs, chosen) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("room", [0, 10**9])
def test_allocation_with_least_and_unlimited_budget(room):
    sizes, costs = [[20, 30, 80]] * 3, [[9.0, 4.0, 1.0]] * 3
    assert allocate(costs, sizes, 60 + room) == ([0, 0, 0] if room == 0 else [2, 2, 2])


def test_predicted_rise_equals_the_formula(opened, facts):
    model, tokenizer = opened
    texts = [example.input_ids for example in encode_examples(tokenizer, SYSTEM, facts[:6])]
    rises = loss_rises(model, texts, [2, 4, 8], config(100.0))
    assert all(rise[0] > rise[1] > rise[2] > 0 for rise in rises.values())
    name, weight = "model.layers.1.mlp.down_proj", model.model.layers[1].mlp.down_proj.weight
    assert weight.grad is None
    assert weight.requires_grad
    x, gradients = [], []

    def record(_module, args, output) -> None:
        x.append(args[0][0].detach())
        output.register_hook(lambda gradient: gradients.append(gradient[0]))

    handle = model.get_submodule(name).register_forward_hook(record)
    for text in texts:
        ids = torch.tensor([text])
        cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    handle.remove()
    error = (weight - rounded(weight, Grid(4, 32, symmetric=False))).detach() ** 2
    expected = 0.5 * (torch.cat(gradients) ** 2).mean(0) @ error @ (torch.cat(x) ** 2).mean(0)
    assert rises[name][1] == pytest.approx(expected.item(), rel=1e-3)


def test_most_common_width_needs_no_rule():
    assert overrides({"a": 3, "b": 4, "c": 3}) == (3, {"b": {"bits": 4}})
    assert overrides({"a": 8}) == (8, {})


@pytest.mark.slow
def test_mixed_checkpoint_keeps_its_budget_and_reopens_to_the_model_in_memory(checkpoint, facts, tmp_path):
    budget = 15.48
    result = gptq(context(checkpoint, facts, facts[:2]), config(budget))
    result.save(tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written <= budget * MIB
    reopened = open_model(tmp_path)[0]
    torch.testing.assert_close(weights_of(reopened), weights_of(result.model), rtol=0, atol=1e-6)
    original = linears(open_model(checkpoint)[0])
    rules = json.loads((tmp_path / "quantize_config.json").read_text())
    widths = {name: rules["dynamic"].get(name, rules)["bits"] for name in original}
    assert len(set(widths.values())) > 1
    for name, layer in linears(reopened).items():  # codes of b bits have at most 2^b values per group
        distinct = max(len(group.unique()) for group in layer.weight.reshape(-1, 32))
        assert 2 ** (widths[name] - 1) < distinct <= 2 ** widths[name] or (widths[name] == 8 and distinct > 16)
    weights = {name: layer.weight.numel() for name, layer in original.items()}
    mean = sum(widths[name] * weights[name] for name in weights) / sum(weights.values())
    assert result.facts["bits"] == pytest.approx(mean)
    assert sum(result.facts["layers_by_bits"].values()) == 28
    curve = dict(result.history["bits"])
    third = {name: size for name, size in weights.items() if ".layers.2." in name}
    assert curve[2] == pytest.approx(sum(widths[name] * size for name, size in third.items()) / sum(third.values()))


def test_predicted_bytes_of_a_layer_equal_written_bytes(checkpoint, facts, tmp_path):
    from safetensors.torch import load_file

    from lilliput.compress.rtn import rtn
    from lilliput.config import RtnConfig

    layers = linears(open_model(checkpoint)[0])
    rtn(context(checkpoint, held_out=facts[:1]), RtnConfig(bits=3, group_size=16, symmetric=True)).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in layers.items():
        written = sum(t.numel() * t.element_size() for key, t in tensors.items() if key.startswith(f"{name}."))
        assert packed_bytes(layer, 3, 16) == written


def test_rejects_a_written_checkpoint_beyond_the_budget(tmp_path):
    save = within_budget(lambda target: (target / "weights").write_bytes(bytes(2 * MIB)) and None, 1.5)
    with pytest.raises(StrategyError, match=r"2\.00 MiB were written for a budget of 1\.5 MiB"):
        save(tmp_path)


def test_rejects_an_impossible_budget_with_the_smallest_possible(opened, checkpoint):
    with pytest.raises(StrategyError, match=r"15 MiB cannot be met; the smallest possible is 15\.\d\d MiB, 2 bits"):
        choose_bits(opened[0], checkpoint, [], torch.float32, config(15.0))
