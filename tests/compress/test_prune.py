import pytest
import torch
from torch.nn.functional import cosine_similarity

from lilliput.compress.prune import block_influence, narrow_mlp, prune, remove_layers, sparsify, wanda_mask
from lilliput.compress.training import encode_examples
from lilliput.config import PruneConfig
from lilliput.errors import StrategyError
from lilliput.evaluate.perplexity import perplexity
from lilliput.models import open_model, parameter_count, probe_logits, save_model

SYSTEM = "Answer briefly."


def config(**changes):
    values = {
        "method": "block_influence",
        "layers": 1,
        "width_share": 0.25,
        "width_multiple": 32,
        "sparsity": 0.5,
        "pattern": "unstructured",
        "calibration_examples": 4,
    }
    return PruneConfig(**values | changes)


@pytest.fixture
def texts(opened, facts):
    return [example.input_ids for example in encode_examples(opened[1], SYSTEM, facts[:4])]


def test_influence_is_one_minus_the_mean_cosine_of_what_goes_in_and_out(opened, texts):
    model = opened[0]
    found = block_influence(model, texts)
    states = [model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states for text in texts]
    for layer in range(3):  # transformers' last hidden state is after the final norm, so not the last layer's
        cosines = torch.cat([cosine_similarity(h[layer], h[layer + 1], dim=-1)[0] for h in states])
        assert found[layer] == pytest.approx(1 - cosines.mean().item(), abs=1e-5)


def test_a_layer_that_does_nothing_goes_first(opened, facts):
    model, tokenizer = opened
    for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    expected = probe_logits(model, tokenizer)
    result = prune(opened, facts, SYSTEM, config())
    assert result.facts["removed_layers"] == [2]
    assert torch.allclose(probe_logits(result.model, tokenizer), expected, atol=1e-5)


def test_the_smaller_checkpoint_opens_and_generates(opened, facts, tmp_path):
    before = parameter_count(opened[0])
    result = prune(opened, facts, SYSTEM, config(layers=2))
    save_model(result.model, result.tokenizer, tmp_path)
    again, _ = open_model(tmp_path)
    assert torch.allclose(
        probe_logits(again, result.tokenizer), probe_logits(result.model, result.tokenizer), atol=1e-4
    )
    assert again.config.num_hidden_layers == 2
    assert parameter_count(again) < before
    # The KV cache is indexed by layer: generation step by step must agree with the whole forward.
    ids = torch.tensor([[5, 6, 7, 8]])
    past = again(input_ids=ids[:, :3], use_cache=True).past_key_values
    step = again(input_ids=ids[:, 3:], past_key_values=past).logits[0, -1]
    assert torch.allclose(step, again(input_ids=ids).logits[0, -1], atol=1e-4)


def test_removing_every_layer_is_refused(opened, facts):
    with pytest.raises(StrategyError, match="leave at least one"):
        prune(opened, facts, SYSTEM, config(layers=4))


def test_one_entry_a_layer_of_the_configuration_goes_too(opened):
    model = opened[0]
    model.config.layer_types = ["a", "b", "c", "d"]
    remove_layers(model, [1, 2])
    assert model.config.layer_types == ["a", "d"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_by_perplexity_the_layer_goes_without_which_the_text_is_likeliest(opened, checkpoint, facts, texts):
    result = prune(opened, facts, SYSTEM, config(method="perplexity"))
    without = []
    for layer in range(4):
        model, _ = open_model(checkpoint)
        remove_layers(model, [layer])
        without.append(perplexity(model, texts))
    assert [value for _, value in result.history["perplexity_without"]] == pytest.approx(without, rel=1e-4)
    assert result.facts["removed_layers"] == [without.index(min(without))]
    assert perplexity(result.model, texts) == pytest.approx(min(without), rel=1e-4)


def test_neurons_that_give_nothing_go_first_and_the_model_is_the_same(opened, facts, tmp_path):
    model, tokenizer = opened
    dead = torch.arange(0, 128, 4)  # a quarter of them, spread over the layer
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, dead] = 0.0
    expected = probe_logits(model, tokenizer)
    result = prune(opened, facts, SYSTEM, config(method="width"))
    assert result.facts == {"neurons_before": 128, "neurons_after": 96}
    assert torch.allclose(probe_logits(result.model, tokenizer), expected, atol=1e-5)
    save_model(result.model, tokenizer, tmp_path)
    again, _ = open_model(tmp_path)
    assert again.config.intermediate_size == again.model.layers[0].mlp.up_proj.out_features == 96
    assert torch.allclose(probe_logits(again, tokenizer), expected, atol=1e-5)


def test_neurons_are_weighed_by_activation_and_outgoing_weights(opened, texts):
    model = opened[0]
    mlp = model.model.layers[0].mlp
    inputs = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].detach()))
    for text in texts:
        model(input_ids=torch.tensor([text]))
    handle.remove()
    weight = mlp.down_proj.weight.detach().clone()
    importance = torch.cat(inputs).abs().mean(0) * weight.norm(dim=0)
    narrow_mlp(model, texts, 0.5, 32)
    kept = importance.topk(64).indices.sort().values
    assert torch.equal(mlp.down_proj.weight, weight[:, kept])


def test_a_share_that_takes_nothing_is_refused(opened, texts):
    with pytest.raises(StrategyError, match=r"width_share: 0.1 of 128 neurons leaves 128"):
        narrow_mlp(opened[0], texts, 0.1, 32)


def test_wanda_takes_the_lowest_products_of_each_row():
    weight = torch.tensor([[4.0, -1.0, 2.0, 3.0], [0.1, 0.2, 0.3, 0.4]])
    norms = torch.tensor([0.1, 10.0, 1.0, 1.0])  # 0.4, 10, 2, 3 and 0.01, 2, 0.3, 0.4
    lowest = torch.tensor([[True, False, True, False], [True, False, True, False]])
    assert torch.equal(wanda_mask(weight, norms, 0.5, "unstructured"), lowest)
    assert wanda_mask(weight, norms, 0.25, "unstructured").sum(1).tolist() == [1, 1]


def test_two_of_every_four_go_wherever_the_small_ones_are():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    mask = wanda_mask(weight, torch.ones(16), 0.5, "2:4")
    assert mask.reshape(-1, 4).sum(1).tolist() == [2] * 24
    scores = weight.abs().reshape(-1, 4)
    assert (
        scores.masked_fill(~mask.reshape(-1, 4), 0).amax(1) <= scores.masked_fill(mask.reshape(-1, 4), 9).amin(1)
    ).all()
    with pytest.raises(StrategyError, match="2:4 needs inputs in fours"):
        wanda_mask(weight[:, :6], torch.ones(6), 0.5, "2:4")


def test_wanda_disturbs_the_outputs_less_than_magnitude_alone(opened, checkpoint, texts):
    def outputs(model):
        with torch.no_grad():
            return torch.cat([model(input_ids=torch.tensor([text])).logits[0] for text in texts])

    whole = outputs(opened[0])
    assert sparsify(opened[0], texts, 0.5, "unstructured") == pytest.approx(0.5)
    by_magnitude, _ = open_model(checkpoint)
    for layer in by_magnitude.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data[wanda_mask(module.weight, torch.ones(module.in_features), 0.5, "unstructured")] = 0.0
    assert (outputs(opened[0]) - whole).norm() < (outputs(by_magnitude) - whole).norm()


def test_the_pattern_needs_half(opened):
    with pytest.raises(ValueError, match=r"2:4 is a sparsity of 0\.5"):
        config(pattern="2:4", sparsity=0.6)
