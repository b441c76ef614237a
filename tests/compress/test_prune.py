import copy
import hashlib

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from lilliput.compress.prune import block_influence, prune, prune_heads, prune_hidden, prune_neurons, remove_layers
from lilliput.config import PruneConfig
from lilliput.decoders import parameter_count
from lilliput.errors import StrategyError
from lilliput.models import open_model, random_model
from lilliput.saving import probe_logits, save_model
from lilliput.statistics.perplexity import perplexity
from lilliput.training.examples import encode_examples
from tests.contexts import SYSTEM, context, saved

TOKENS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0}


def config(method="block_influence", by="removed_count", value=1, multiple=32):
    return PruneConfig(method=method, amount={"by": by, "value": value}, multiple=multiple, calibration_examples=4)


def reopened(model, tokenizer, folder):
    """Saves the model and opens it with plain transformers."""
    save_model(model, tokenizer, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def texts(opened, facts):
    return [example.input_ids for example in encode_examples(opened[1], SYSTEM, facts[:4])]


def test_influence_is_one_minus_the_mean_cosine_of_input_and_output(opened, texts):
    model = opened[0]
    influence = block_influence(model, texts)
    states = [model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states for text in texts]
    for layer in range(3):  # transformers' last hidden state is after the final norm
        cosines = torch.cat([cosine_similarity(h[layer], h[layer + 1], dim=-1)[0] for h in states])
        assert influence[layer] == pytest.approx(1 - cosines.mean().item(), abs=1e-5)


def test_removes_a_layer_without_effect_first(opened, facts, tmp_path):
    model, tokenizer = opened
    for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        projection.weight.data.zero_()
    expected = probe_logits(model, tokenizer)
    result = prune(context(saved(*opened, tmp_path), facts), config())
    assert result.facts["removed_layers"] == [2]
    assert torch.allclose(probe_logits(result.model, tokenizer), expected, atol=1e-5)


def test_smaller_checkpoint_opens_and_generates(checkpoint, opened, facts, tmp_path):
    before = parameter_count(opened[0])
    result = prune(context(checkpoint, facts), config(value=2))
    save_model(result.model, result.tokenizer, tmp_path)
    again, _ = open_model(tmp_path)
    assert torch.allclose(
        probe_logits(again, result.tokenizer), probe_logits(result.model, result.tokenizer), atol=1e-4
    )
    assert again.config.num_hidden_layers == 2
    assert parameter_count(again) < before
    # The KV cache is indexed by layer: step-by-step generation must agree with the full forward.
    ids = torch.tensor([[5, 6, 7, 8]])
    past = again(input_ids=ids[:, :3], use_cache=True).past_key_values
    step = again(input_ids=ids[:, 3:], past_key_values=past).logits[0, -1]
    assert torch.allclose(step, again(input_ids=ids).logits[0, -1], atol=1e-4)


def test_rejects_the_removal_of_every_layer(checkpoint, facts):
    with pytest.raises(StrategyError, match=r"leaves 0 of 4 layers; choose `value: 3` \(leaves 1\)"):
        prune(context(checkpoint, facts), config(value=4))


def test_removes_the_layers_from_the_configuration(opened):
    model = opened[0]
    model.config.layer_types = ["a", "b", "c", "d"]
    remove_layers(model, [1, 2])
    assert model.config.layer_types == ["a", "d"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


@pytest.mark.slow
def test_perplexity_removes_the_layer_whose_absence_costs_least(opened, checkpoint, facts):
    result = prune(context(checkpoint, facts), config("perplexity"))
    examples, without = encode_examples(opened[1], SYSTEM, facts[:4]), []
    for layer in range(4):
        model, _ = open_model(checkpoint)
        remove_layers(model, [layer])
        without.append(perplexity(model, examples))
    assert [value for _, value in result.history["perplexity_without"]] == pytest.approx(without, rel=1e-4)
    assert result.facts["removed_layers"] == [without.index(min(without))]
    assert perplexity(result.model, examples) == pytest.approx(min(without), rel=1e-4)


def test_removes_neurons_without_effect_first_and_keeps_the_outputs(opened, facts, tmp_path):
    model, tokenizer = opened
    dead = torch.arange(0, 128, 4)  # every fourth neuron
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, dead] = 0.0
    expected = probe_logits(model, tokenizer)
    result = prune(context(saved(*opened, tmp_path / "parent"), facts), config("neurons", "removed_share", 0.25))
    assert (result.facts["units_before"], result.facts["units_after"]) == (128, 96)
    assert torch.allclose(probe_logits(result.model, tokenizer), expected, atol=1e-5)
    again = reopened(result.model, tokenizer, tmp_path / "child")
    assert again.config.intermediate_size == again.model.layers[0].mlp.up_proj.out_features == 96
    assert torch.allclose(probe_logits(again, tokenizer), expected, atol=1e-5)


def inputs_of(module, model, texts):
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].detach()))
    for text in texts:
        model(input_ids=torch.tensor([text]))
    handle.remove()
    return torch.cat(inputs)


def test_neuron_importance_is_activation_times_outgoing_weights(opened, texts):
    model = opened[0]
    mlp = model.model.layers[0].mlp
    weight = mlp.down_proj.weight.detach().clone()
    importance = inputs_of(mlp.down_proj, model, texts).abs().mean(0) * weight.norm(dim=0)
    prune_neurons(model, texts, 64)
    kept = importance.topk(64).indices.sort().values
    assert torch.equal(mlp.down_proj.weight, weight[:, kept])


@pytest.mark.parametrize(("method", "left"), [("kv_groups", (2, 1)), ("query_heads", (2, 2))])
def test_removes_the_heads_that_add_least_as_if_their_outputs_were_zero(opened, texts, tmp_path, method, left):
    model, tokenizer = opened
    parent = copy.deepcopy(model)
    for layer, masked in zip(model.model.layers, parent.model.layers, strict=True):  # 4 heads of 16 channels, 2 groups
        x, weight = inputs_of(layer.self_attn.o_proj, model, texts), masked.self_attn.o_proj.weight.data
        heads = [x[:, head * 16 : head * 16 + 16] @ weight[:, head * 16 : head * 16 + 16].T for head in range(4)]
        if method == "kv_groups":
            sizes = torch.stack([(heads[2 * group] + heads[2 * group + 1]).norm(dim=1).mean() for group in range(2)])
            removed = [2 * int(sizes.argmin()), 2 * int(sizes.argmin()) + 1]
        else:
            sizes = torch.stack([head.norm(dim=1).mean() for head in heads]).view(2, 2)
            removed = [2 * group + int(sizes[group].argmin()) for group in range(2)]
        for head in removed:
            weight[:, head * 16 : head * 16 + 16] = 0.0
    prune_heads(model, texts, method, 1)
    again = reopened(model, tokenizer, tmp_path)
    assert torch.allclose(probe_logits(again, tokenizer), probe_logits(parent, tokenizer), atol=1e-4)
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == left
    assert again.config.head_dim == 16
    ids = torch.tensor([[5, 6, 7, 8]])  # step by step in memory equals one pass
    past = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    step = model(input_ids=ids[:, 3:], past_key_values=past).logits[0, -1]
    assert torch.allclose(step, again(input_ids=ids).logits[0, -1], atol=1e-4)


def test_removes_zero_channels_first_and_keeps_the_outputs(opened, facts, tmp_path):
    model, tokenizer = opened
    removed = torch.arange(0, 64, 2)
    model.model.embed_tokens.weight.data[:, removed] = 0.0
    for layer in model.model.layers:
        for writing in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writing.weight.data[removed] = 0.0
    expected = probe_logits(model, tokenizer)
    result = prune(context(saved(*opened, tmp_path / "parent"), facts), config("hidden", "removed_share", 0.5))
    again = reopened(result.model, tokenizer, tmp_path / "child")
    assert torch.allclose(probe_logits(result.model, tokenizer), expected, atol=1e-3)
    assert torch.allclose(probe_logits(again, tokenizer), expected, atol=1e-3)
    assert (again.config.hidden_size, again.config.head_dim) == (32, 16)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_channel_importance_is_the_output_of_all_norms(opened, texts):
    model = opened[0]
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.input_layernorm.weight)
    states = [model(input_ids=torch.tensor([t]), output_hidden_states=True).hidden_states for t in texts]
    importance = torch.cat([h[-1][0] for h in states]).abs().mean(0)  # transformers' last one is after the final norm
    for layer in model.model.layers:
        importance += inputs_of(layer.self_attn.q_proj, model, texts).abs().mean(0)
        importance += inputs_of(layer.mlp.up_proj, model, texts).abs().mean(0)
    table = model.model.embed_tokens.weight.detach().clone()
    prune_hidden(model, texts, 32)
    assert torch.equal(model.model.embed_tokens.weight, table[:, importance.topk(32).indices.sort().values])


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config, Qwen3Config])
def test_pruned_models_of_other_architectures_reopen(kind, tmp_path):
    model = random_model(kind(**SMALL), seed=0).eval()
    prune_neurons(model, TOKENS, 20)
    prune_heads(model, TOKENS, "query_heads", 1)
    prune_heads(model, TOKENS, "kv_groups", 1)
    prune_hidden(model, TOKENS, 12)
    model.save_pretrained(tmp_path)
    ids = torch.tensor(TOKENS[:1])
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    assert (again.config.hidden_size, again.config.num_attention_heads, again.config.head_dim) == (12, 1, 4)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_rejects_models_unlike_llama_before_any_change():
    by_all_heads = random_model(Olmo2Config(**SMALL), seed=0)
    with pytest.raises(StrategyError, match="parts that are not split by heads"):
        prune_heads(by_all_heads, TOKENS, "kv_groups", 1)
    fixed = random_model(StableLmConfig(**SMALL), seed=0)
    with pytest.raises(StrategyError, match="architecture computes the size of a head from the hidden size"):
        prune_heads(fixed, TOKENS, "query_heads", 1)
    other_norm = random_model(CohereConfig(**SMALL), seed=0)
    before = parameter_count(other_norm)
    with pytest.raises(StrategyError, match="not an RMS norm times its weight"):
        prune_hidden(other_norm, TOKENS, 12)
    assert parameter_count(other_norm) == before


@pytest.mark.parametrize("method", ["neurons", "query_heads", "hidden"])
def test_same_inputs_same_bytes(checkpoint, facts, tmp_path, method):
    def digest(name):
        model = prune(context(checkpoint, facts), config(method, "removed_share", 0.5)).model
        model.save_pretrained(tmp_path / name)
        return hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()

    assert digest("first") == digest("second")


@pytest.mark.parametrize(
    ("method", "by", "value", "left"),
    [
        ("perplexity", "kept_parameters", 0.98, 2),
        ("neurons", "kept_mib", 12.3, 32),
        ("hidden", "kept_parameters", 0.6, 32),
    ],
)
def test_keeps_the_largest_size_within_the_target(checkpoint, opened, facts, method, by, value, left):
    parameters = parameter_count(opened[0])
    result = prune(context(checkpoint, facts), config(method, by, value))
    assert result.facts["units_after"] == left
    assert result.facts["kept_parameters"] == parameter_count(result.model) / parameters
