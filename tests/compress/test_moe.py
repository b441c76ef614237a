import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Qwen2Config, Qwen3Config

from lilliput.compress.distill import distill
from lilliput.compress.mixture import feed_forward_inputs, fit_router
from lilliput.compress.moe import RIDGE, ROUTER_LOGIT_RMS, carve, cluster, moe
from lilliput.compress.prune import prune
from lilliput.config import DistillConfig, MoeConfig, PruneConfig
from lilliput.decoders import parameter_count
from lilliput.errors import StrategyError
from lilliput.evaluate.accessibility import kv_cache_bytes
from lilliput.models import open_model, random_model
from lilliput.saving import probe_logits, save_model
from lilliput.training.answer_loss import answer_logits
from lilliput.training.examples import collate, encode_examples
from tests.contexts import SYSTEM, context, saved


def config(**changes):
    return MoeConfig(**{"experts": 6, "shared": 2, "active": 2, "calibration_examples": 6} | changes)


@pytest.fixture
def texts(opened, facts):
    return [example.input_ids for example in encode_examples(opened[1], SYSTEM, facts[:6])]


@pytest.fixture
def mixture(checkpoint, facts):
    return moe(context(checkpoint, facts), config()).model


def all_active(model):
    for layer in model.model.layers:
        layer.mlp.gate.top_k = layer.mlp.experts.num_experts
    return model


def test_mixture_with_all_experts_active_equals_the_dense_model(checkpoint, opened, facts):
    model, tokenizer = opened
    expected = probe_logits(model, tokenizer)
    result = moe(context(checkpoint, facts), config())
    assert not torch.allclose(probe_logits(result.model, tokenizer), expected, atol=0.1)
    everything = all_active(result.model)
    assert torch.allclose(
        probe_logits(everything, tokenizer), expected, atol=2e-2
    )  # expert weights are about 1 ± 0.0005
    for layer in everything.model.layers:
        layer.mlp.gate.weight.data.zero_()
    assert torch.allclose(probe_logits(everything, tokenizer), expected, atol=1e-4)


def test_every_neuron_belongs_to_one_expert(opened, texts):
    model, _ = opened
    inputs = feed_forward_inputs(model, texts)
    carving = carve(model.model.layers[1].mlp, inputs.states[1], inputs.counts, config())
    assert carving.shared.shape == (32,)
    assert carving.experts.shape == (6, 16)
    assert torch.cat([carving.shared, carving.experts.flatten()]).sort().values.tolist() == list(range(128))


@torch.inference_mode()
def test_output_is_that_of_the_shared_and_the_best_experts(opened, mixture, texts):
    layer = mixture.model.layers[0].mlp
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    best = (x @ layer.gate.weight.T).topk(2, dim=1).indices
    gates_ups, downs = layer.experts.gate_up_proj, layer.experts.down_proj
    shared = layer.shared_experts
    for token, chosen, actual in zip(x, best, layer(x[None])[0], strict=True):
        expected = shared.down_proj(silu(shared.gate_proj(token)) * shared.up_proj(token))
        for expert in chosen:
            gate, up = (gates_ups[expert] @ token).chunk(2)
            expected = expected + downs[expert] @ (silu(gate) * up)
        assert torch.allclose(actual, expected, atol=5e-3)  # expert weights are about 1 ± 0.0005


def test_recorded_inputs_equal_those_of_whole_texts(opened, texts):
    model, _ = opened
    inputs = feed_forward_inputs(model, texts)
    seen = []
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    for text in texts:
        model(input_ids=torch.tensor([text]))
    handle.remove()
    whole = torch.cat(seen)
    assert inputs.counts.sum() == len(whole)
    assert len(inputs.counts) < len(whole)
    weighted = (inputs.states[2] * inputs.counts).sum(0)
    assert torch.allclose(weighted, whole.sum(0), rtol=1e-3, atol=1e-2)


def test_one_text_is_enough(opened, texts):
    assert len(feed_forward_inputs(opened[0], texts[:1]).counts) == len(texts[0])


def test_neurons_of_the_same_tokens_form_a_cluster():
    groups = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1])
    tokens = torch.arange(30) % 3
    noise = torch.rand(30, 9, generator=torch.Generator().manual_seed(0))
    owner = cluster((tokens[:, None] == groups).float() + 0.1 * noise, 3)
    assert owner.bincount().tolist() == [3, 3, 3]
    assert all(len(owner[groups == group].unique()) == 1 for group in range(3))


def test_router_prefers_the_expert_with_the_largest_contribution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    mass = x @ torch.randn(8, 4, generator=generator)
    router = fit_router(x[:300], mass[:300], torch.ones(300, 1), RIDGE, ROUTER_LOGIT_RMS)
    logits = x[:300] @ router.T
    assert logits.square().mean().sqrt().item() == pytest.approx(ROUTER_LOGIT_RMS, rel=1e-4)
    right = (x[300:] @ router.T).argmax(1) == mass[300:].argmax(1)
    assert right.float().mean() > 0.95


def test_counts_equal_repeated_rows():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    mass = torch.rand(20, 3, generator=torch.Generator().manual_seed(1))
    twice = torch.cat([x, x[:5]]), torch.cat([mass, mass[:5]]), torch.ones(25, 1)
    counts = torch.ones(20, 1)
    counts[:5] = 2
    actual, expected = (fit_router(*rows, RIDGE, ROUTER_LOGIT_RMS) for rows in ((x, mass, counts), twice))
    assert torch.allclose(actual / actual.norm(), expected / expected.norm(), atol=1e-5)


@torch.inference_mode()
def test_captured_is_the_share_of_computed_contributions(opened, texts):
    model, _ = opened
    inputs = feed_forward_inputs(model, texts)
    mlp, states = model.model.layers[0].mlp, inputs.states[0]
    carving = carve(mlp, states, inputs.counts, config())
    contributions = (silu(mlp.gate_proj(states)) * mlp.up_proj(states)).abs() * mlp.down_proj.weight.norm(dim=0)
    kept = torch.zeros_like(contributions)
    for token, chosen in enumerate((states @ carving.router.T).topk(2, dim=1).indices):
        computed = torch.cat([carving.shared, carving.experts[chosen].flatten()])
        kept[token, computed] = contributions[token, computed]
    expected = (kept * inputs.counts).sum() / (contributions * inputs.counts).sum()
    assert carving.captured == pytest.approx(expected.item(), rel=1e-4)
    assert carving.captured > 0.5  # half of the neurons, but not random ones


def test_plain_transformers_opens_a_reproducible_checkpoint(checkpoint, facts, tmp_path):
    model, tokenizer = open_model(checkpoint)
    save_model(model, tokenizer, tmp_path / "parent", torch.bfloat16)
    for name in ("one", "two"):
        result = moe(context(tmp_path / "parent", facts), config())
        save_model(result.model, result.tokenizer, tmp_path / name)
    again, _ = open_model(tmp_path / "two")
    assert torch.equal(probe_logits(again, result.tokenizer), probe_logits(result.model.float(), result.tokenizer))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert plain.dtype == torch.bfloat16
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert kv_cache_bytes(plain.config, 10) == kv_cache_bytes(model.config, 10)


def test_active_and_all_parameters_are_facts(checkpoint, opened, facts):
    before = parameter_count(opened[0])
    result = moe(context(checkpoint, facts), config())
    routers = 4 * 6 * 64
    assert parameter_count(result.model) == before + routers
    assert result.facts["active_parameters"] == before + routers - 4 * 4 * 3 * 64 * 16
    assert [layer for layer, _ in result.history["captured"]] == [0, 1, 2, 3]


@pytest.mark.slow
def test_mixture_learns_from_the_dense_model_and_keeps_its_routers(checkpoint, facts, tmp_path):
    result = moe(context(checkpoint, facts), config())
    save_model(result.model, result.tokenizer, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in open_model(tmp_path)[0].named_parameters()}
    settings = DistillConfig(
        divergence="forward_kl",
        temperature=2.0,
        kl_weight=1.0,
        steps=6,
        batch_size=8,
        gradient_accumulation=1,
        learning_rate=1e-3,
        warmup_share=0.0,
        max_grad_norm=1.0,
        seed=0,
    )
    trained = distill(context(tmp_path, facts[:8], teacher=checkpoint), settings)
    losses = [loss for _, loss in trained.history["loss"]]
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in trained.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if "experts" in name} <= changed
    assert not any("gate.weight" in name for name in changed)


def test_answer_logits_equal_those_of_whole_texts(mixture, opened, facts):
    examples = encode_examples(opened[1], SYSTEM, facts[:3])
    logits, _ = answer_logits(mixture, collate(examples, 0))
    whole = [mixture(input_ids=torch.tensor([e.input_ids])).logits[0] for e in examples]
    wanted = [
        row[place - 1] for e, row in zip(examples, whole, strict=True) for place, t in enumerate(e.labels) if t >= 0
    ]
    assert torch.allclose(logits, torch.stack(wanted), atol=1e-3)


def test_a_mixture_can_lose_layers(opened, mixture, facts, tmp_path):
    amount = {"by": "removed_count", "value": 1}
    settings = PruneConfig(method="block_influence", amount=amount, multiple=32, calibration_examples=2)
    assert prune(context(saved(mixture, opened[1], tmp_path), facts), settings).model.config.num_hidden_layers == 3


SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config])  # attention biases; norms of queries and keys
def test_splits_relatives_of_llama(family, tokenizer, facts, tmp_path):
    model = random_model(family(**SHAPE), seed=0).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    expected = probe_logits(model, tokenizer)
    parent = context(saved(model, tokenizer, tmp_path), facts)
    actual = all_active(moe(parent, config(calibration_examples=2)).model)
    assert torch.allclose(probe_logits(actual, tokenizer), expected, atol=5e-3 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (Gemma2Config, "its configuration has no hidden_act"),
        (lambda **s: MistralConfig(sliding_window=8, **s), "window of 8"),
    ],
)
def test_rejects_parents_that_glm_cannot_represent(family, reason, tokenizer, facts, tmp_path):
    parent = saved(random_model(family(**SHAPE), seed=0).eval(), tokenizer, tmp_path)
    with pytest.raises(StrategyError, match=reason):
        moe(context(parent, facts), config())


def test_rejects_a_mixture_as_parent(opened, mixture, facts, tmp_path):
    parent = saved(mixture, opened[1], tmp_path)
    with pytest.raises(StrategyError, match="not gate, up and down projection"):
        moe(context(parent, facts), config())


def test_rejects_experts_that_do_not_divide_the_neurons(checkpoint, facts):
    with pytest.raises(StrategyError, match="7 experts and 2 shared ones do not divide the 128 neurons"):
        moe(context(checkpoint, facts), config(experts=7))


def test_rejects_a_mixture_without_inactive_experts():
    with pytest.raises(ValueError, match="must be below `experts`"):
        config(active=6)
