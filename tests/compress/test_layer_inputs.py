import copy

import pytest
import torch

from lilliput.compress.layer_inputs import visit_inputs
from lilliput.errors import StrategyError
from lilliput.packed_texts import pack_texts
from lilliput.training.examples import encode_examples
from tests.contexts import SYSTEM


def texts_of(tokenizer, facts):
    return [example.input_ids for example in encode_examples(tokenizer, SYSTEM, facts)]


def recorded_moments(model, texts, name):
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    with torch.inference_mode():
        for text in texts:
            model(input_ids=torch.tensor([text]))
    handle.remove()
    x = torch.cat(rows).double()
    return (x.T @ x / len(x)).float()


@pytest.mark.parametrize("batch_tokens", [10**6, 40])
def test_moments_are_those_of_the_texts_one_by_one_with_the_changes_so_far(opened, facts, batch_tokens):
    model, tokenizer = opened
    texts, seen, twin = texts_of(tokenizer, facts[:8]), [], copy.deepcopy(model)

    def visit(index, names, moments):
        if index in (0, 2):  # every weight before this layer has been halved
            torch.testing.assert_close(moments, recorded_moments(twin, texts, names[0]), rtol=1e-3, atol=1e-4)
        for name in names:
            for each in (model, twin):
                each.get_submodule(name).weight.mul_(0.5)
        seen.append((index, [name.rsplit(".", 1)[1] for name in names]))

    visit_inputs(model, pack_texts(texts, model.config, row_tokens=30, batch_tokens=batch_tokens), visit)
    inputs = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert seen == [(layer, names) for layer in range(4) for names in inputs]


def test_the_model_is_as_before_after_an_error(opened, facts):
    model, tokenizer = opened
    texts = texts_of(tokenizer, facts[:2])
    with torch.inference_mode():
        before = model(input_ids=torch.tensor([texts[0]])).logits

    def fail(*_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        visit_inputs(model, pack_texts(texts, model.config, batch_tokens=1000), fail)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=torch.tensor([texts[0]])).logits, before)


def test_rejects_a_linear_layer_that_does_not_run(opened, facts):
    model, tokenizer = opened
    model.model.layers[1].unused = torch.nn.Linear(64, 64)
    with pytest.raises(StrategyError, match=r"layers\.1\.unused: this layer did not run"):
        visit_inputs(model, pack_texts(texts_of(tokenizer, facts[:2]), model.config, batch_tokens=1000), print)
