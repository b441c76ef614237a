import pytest
import torch
from torch.nn.functional import cosine_similarity

from lilliput.compress.prune import block_influence, prune, remove_layers
from lilliput.compress.training import collate, encode_examples
from lilliput.config import PruneConfig
from lilliput.errors import StrategyError
from lilliput.models import open_model, parameter_count, probe_logits, prove_reload, save_model

SYSTEM = "Answer briefly."


def test_influence_is_one_minus_the_mean_cosine_of_what_goes_in_and_out(opened, facts):
    model, tokenizer = opened
    batches = [collate([example], 2) for example in encode_examples(tokenizer, SYSTEM, facts[:4])]
    found = block_influence(model, batches)
    states = [model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states for batch in batches]
    for layer in range(3):  # transformers' last hidden state is after the final norm, so not the last layer's
        cosines = torch.cat([cosine_similarity(h[layer], h[layer + 1], dim=-1)[0] for h in states])
        assert found[layer] == pytest.approx(1 - cosines.mean().item(), abs=1e-5)


def test_a_layer_that_does_nothing_goes_first(opened, facts):
    model, tokenizer = opened
    for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    expected = probe_logits(model, tokenizer)
    result = prune(opened, facts, SYSTEM, PruneConfig(layers=1, calibration_examples=4))
    assert result.facts["removed_layers"] == [2]
    assert torch.allclose(probe_logits(result.model, tokenizer), expected, atol=1e-5)


def test_the_smaller_checkpoint_reloads_in_a_fresh_process(opened, facts, tmp_path):
    before = parameter_count(opened[0])
    result = prune(opened, facts, SYSTEM, PruneConfig(layers=2, calibration_examples=2))
    save_model(result.model, result.tokenizer, tmp_path)
    assert prove_reload(tmp_path, probe_logits(result.model, result.tokenizer), 1e-3) <= 1e-3
    again, _ = open_model(tmp_path)
    assert again.config.num_hidden_layers == 2
    assert parameter_count(again) < before
    # The KV cache is indexed by layer: generation step by step must agree with the whole forward.
    ids = torch.tensor([[5, 6, 7, 8]])
    past = again(input_ids=ids[:, :3], use_cache=True).past_key_values
    step = again(input_ids=ids[:, 3:], past_key_values=past).logits[0, -1]
    assert torch.allclose(step, again(input_ids=ids).logits[0, -1], atol=1e-4)


def test_removing_every_layer_is_refused(opened, facts):
    with pytest.raises(StrategyError, match="leave at least one"):
        prune(opened, facts, SYSTEM, PruneConfig(layers=4, calibration_examples=2))


def test_one_entry_a_layer_of_the_configuration_goes_too(opened):
    model = opened[0]
    model.config.layer_types = ["a", "b", "c", "d"]
    remove_layers(model, [1, 2])
    assert model.config.layer_types == ["a", "d"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
