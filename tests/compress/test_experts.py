import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM, Gemma2Config, MixtralForCausalLM, Olmo2Config, Qwen2Config, Qwen3Config

from lilliput.chat.template import encode_prompt
from lilliput.compress import experts as experts_module
from lilliput.compress import lora as lora_module
from lilliput.compress.distill import distill
from lilliput.compress.experts import (
    _assign_balanced,
    add_branch,
    balanced_clusters,
    before_answers,
    compute_routers,
    experts,
    mixture_of,
    routing_shares,
    split_into_topics,
    train_routers,
)
from lilliput.compress.mixture import active_parameters, set_active
from lilliput.compress.prune import prune
from lilliput.config import DistillConfig, ExpertsConfig, PruneConfig
from lilliput.data.questions import Question
from lilliput.decoders import parameter_count
from lilliput.errors import StrategyError
from lilliput.evaluate.accessibility import kv_cache_bytes
from lilliput.models import open_model, random_model
from lilliput.saving import probe_logits, save_model
from lilliput.training.answer_loss import label_loss
from tests.contexts import SYSTEM, context

TRAINING = {"batch_size": 4, "gradient_accumulation": 1, "warmup_share": 0.0, "max_grad_norm": 1.0, "seed": 0}


def config(**changes):
    settings = {"experts": 3, "active": 1, "rank": 2, "alpha": 4.0, "steps": 3, "learning_rate": 1e-2}
    routers = {"router_steps": 4, "router_learning_rate": 1e-2, "checkpoint_every": 2}
    return ExpertsConfig(**TRAINING | settings | routers | changes)


@pytest.fixture(scope="module")
def merged(checkpoint, facts):
    return experts(context(checkpoint, facts), config())


def other(model, seed):
    """A model of the same shape with other weights."""
    return random_model(model.config, seed).eval()


@pytest.fixture
def branched(opened):
    """A mixture of three different branches with zero routers and all experts active."""
    mixture = mixture_of(opened, 3)
    for number in (1, 2):
        add_branch(mixture, other(opened[0], number), number)
    return mixture


@pytest.mark.parametrize("active", [1, 2, 3])
def test_mixture_of_equal_branches_computes_the_same_as_the_branch(opened, facts, active):
    model, tokenizer = opened
    mixture = mixture_of(opened, 3)
    compute_routers(mixture, tokenizer, SYSTEM, [facts[:2], facts[2:4], facts[4:6]])
    set_active(mixture, active)
    assert all(layer.mlp.gate.weight.norm() > 0 for layer in mixture.model.layers)
    assert torch.allclose(probe_logits(mixture, tokenizer), probe_logits(model, tokenizer), atol=1e-4)


def test_feed_forward_layers_become_experts_and_other_weights_are_averaged(opened, branched):
    branches = [opened[0], other(opened[0], 1), other(opened[0], 2)]
    for name, weight in branched.named_parameters():
        if ".mlp." not in name:
            mean = torch.stack([dict(branch.named_parameters())[name] for branch in branches]).mean(0)
            assert torch.allclose(weight, mean, atol=1e-6), name
    for number, branch in enumerate(branches):
        for layer, branch_layer in zip(branched.model.layers, branch.model.layers, strict=True):
            gate, up = layer.mlp.experts.gate_up_proj[number].chunk(2)
            assert torch.equal(gate, branch_layer.mlp.gate_proj.weight)
            assert torch.equal(up, branch_layer.mlp.up_proj.weight)
            assert torch.equal(layer.mlp.experts.down_proj[number], branch_layer.mlp.down_proj.weight)


@torch.inference_mode()
def test_output_is_that_of_the_best_expert(opened, branched, facts):
    compute_routers(branched, opened[1], SYSTEM, [facts[:2], facts[2:4], facts[4:6]])
    set_active(branched, 1)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layer = branched.model.layers[1].mlp
    branches = [opened[0], other(opened[0], 1), other(opened[0], 2)]
    best = (x @ layer.gate.weight.T).argmax(1).tolist()
    expected = [branches[expert].model.layers[1].mlp(token) for expert, token in zip(best, x, strict=True)]
    assert len(set(best)) > 1
    assert torch.allclose(layer(x[None])[0], torch.stack(expected), atol=1e-5)


def questions_about(text):
    return [Question(id=f"{text}/{n}", question=" ".join([text] * (4 + n)), answer=text, group=text) for n in range(6)]


def test_routers_send_each_topic_to_its_expert(opened, branched):
    topics = [questions_about("gold"), questions_about("river"), questions_about("seven")]
    compute_routers(branched, opened[1], SYSTEM, [topic[::2] for topic in topics])
    set_active(branched, 1)
    shares = routing_shares(branched, opened[1], SYSTEM, [topic[1::2] for topic in topics])
    assert torch.allclose(shares.sum((1, 2)), torch.ones(4))
    share_of_own_expert = shares.diagonal(dim1=1, dim2=2).sum(1)
    assert share_of_own_expert[0] > 0.99  # layer 0 sees the words themselves; later random layers mix them
    assert share_of_own_expert.min() > 0.6  # of three


def test_question_vector_is_the_state_before_its_answer(opened, facts):
    model, tokenizer = opened
    states = before_answers(opened, facts[:5], SYSTEM, 2)
    for state, question in zip(states, facts, strict=False):
        prompt = encode_prompt(tokenizer, SYSTEM, question.question)
        whole = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        assert torch.allclose(state, whole, atol=1e-4)


def test_topics_have_equal_numbers_of_questions(opened, facts):
    topics = split_into_topics(opened, facts, SYSTEM, config())
    assert sorted(len(topic) for topic in topics) == [6, 7, 7]
    assert sorted(question.id for topic in topics for question in topic) == sorted(question.id for question in facts)
    assert split_into_topics(opened, facts, SYSTEM, config()) == topics


def test_clusters_recover_planted_groups():
    rng = np.random.default_rng(0)
    planted = np.arange(30) % 3
    vectors = np.eye(8)[planted] + 0.2 * rng.standard_normal((30, 8))
    owner = balanced_clusters(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 3, seed=0)
    assert np.bincount(owner).tolist() == [10, 10, 10]
    assert all(len(set(owner[planted == group])) == 1 for group in range(3))
    assert sorted(np.bincount(balanced_clusters(np.eye(9), 4, seed=0))) == [2, 2, 2, 3]
    assert np.bincount(balanced_clusters(np.ones((6, 1)), 3, seed=0)).tolist() == [2, 2, 2]  # identical vectors


def test_balanced_assignment_is_optimal():
    likeness = np.random.default_rng(0).standard_normal((12, 3))
    rows, places = linear_sum_assignment(likeness.repeat(4, axis=1), maximize=True)
    assert np.array_equal(_assign_balanced(likeness), places[rows] // 4)


def test_router_training_changes_only_routers(opened, branched, checkpoint, facts):
    compute_routers(branched, opened[1], SYSTEM, [facts[:2], facts[2:4], facts[4:6]])
    before = {name: weight.detach().clone() for name, weight in branched.named_parameters()}
    history = train_routers(branched, opened[1], context(checkpoint, facts), config())
    changed = {name for name, weight in branched.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)}
    assert [step for step, _ in history["loss"]] == [1, 2, 3, 4]


def test_plain_transformers_opens_the_checkpoint(merged, checkpoint, tmp_path):
    save_model(merged.model, merged.tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(plain, MixtralForCausalLM)
    assert plain.config.num_experts_per_tok == 1
    assert torch.equal(probe_logits(plain, merged.tokenizer), probe_logits(merged.model, merged.tokenizer))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert kv_cache_bytes(plain.config, 10) == kv_cache_bytes(open_model(checkpoint)[0].config, 10)


def test_facts_describe_topics_branches_and_routing(merged, opened):
    dense, layer = parameter_count(opened[0]), 3 * 64 * 128
    routers = 4 * 3 * 64
    assert parameter_count(merged.model) == dense + routers + 4 * 2 * layer
    assert merged.facts["active_parameters"] == active_parameters(merged.model) == dense + routers
    assert sorted(merged.facts["questions_per_topic"]) == [6, 7, 7]
    assert merged.facts["branch_losses"] == [merged.history[f"loss_branch_{number}"][-1][1] for number in (1, 2, 3)]
    assert merged.facts["final_loss"] == merged.history["loss"][-1][1]
    assert sum(merged.facts["tokens_by_expert"]) == pytest.approx(1)
    assert 0 < merged.facts["own_expert_share"] <= 1
    assert all(1 / 3 <= share <= 1 for _, share in merged.history["busiest_expert_share"])


def test_resumed_run_gives_the_same_bytes(merged, checkpoint, facts, tmp_path, monkeypatch):
    calls = []

    def killed(model, batch):
        calls.append(1)
        if len(calls) == 13:  # three branches of three steps, then the fourth step of the routers
            raise KeyboardInterrupt
        return label_loss(model, batch)

    monkeypatch.setattr(lora_module, "label_loss", killed)
    monkeypatch.setattr(experts_module, "label_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        experts(context(checkpoint, facts, checkpoints=tmp_path / "state"), config())
    resumed = experts(context(checkpoint, facts, checkpoints=tmp_path / "state"), config())
    assert len(calls) == 13 + 3 * 1 + 2  # each resumes after step 2
    assert (resumed.facts, resumed.history) == (merged.facts, merged.history)
    for name, result in (("whole", merged), ("resumed", resumed)):
        save_model(result.model, result.tokenizer, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


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


def test_normed_queries_and_keys_give_qwen3_moe(tokenizer, tmp_path):
    model = random_model(Qwen3Config(**SHAPE), seed=0).eval()
    expected = probe_logits(model, tokenizer)
    mixture = mixture_of((model, tokenizer), 2)
    set_active(mixture, 1)
    save_model(mixture, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config.model_type == "qwen3_moe"
    assert torch.allclose(probe_logits(plain, tokenizer), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (Gemma2Config, "its configuration has no hidden_act"),
        (Qwen2Config, "its parts differ: model.layers.0.self_attn.q_proj.bias"),
        (Olmo2Config, "its parts have other sizes: model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_rejects_parents_that_mixtral_cannot_represent(family, reason, tokenizer):
    with pytest.raises(StrategyError, match=reason):
        mixture_of((random_model(family(**SHAPE), seed=0).eval(), tokenizer), 2)


def test_rejects_too_few_questions(opened, facts):
    with pytest.raises(StrategyError, match="5 training questions are too few for 3 topics"):
        split_into_topics(opened, facts[:5], SYSTEM, config())


def test_rejects_a_mixture_without_inactive_experts():
    with pytest.raises(ValueError, match="must be below `experts`"):
        config(active=3)


def test_a_mixture_can_lose_layers(branched, opened, facts, tmp_path):
    save_model(branched, opened[1], tmp_path)
    amount = {"by": "removed_count", "value": 1}
    settings = PruneConfig(method="block_influence", amount=amount, multiple=32, calibration_examples=2)
    assert prune(context(tmp_path, facts), settings).model.config.num_hidden_layers == 3


@pytest.mark.slow
def test_a_mixture_learns_from_a_teacher(merged, opened, facts, tmp_path):
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    save_model(merged.model, merged.tokenizer, student)
    save_model(other(opened[0], 1), merged.tokenizer, teacher)
    before = {name: weight.detach().clone() for name, weight in open_model(student)[0].named_parameters()}
    settings = DistillConfig(
        **TRAINING, divergence="forward_kl", temperature=2.0, kl_weight=1.0, steps=6, learning_rate=1e-3
    )
    trained = distill(context(student, facts[:8], teacher=teacher), settings)
    losses = [loss for _, loss in trained.history["loss"]]
    assert losses[-1] < losses[0]
    changed = {name for name, weight in trained.model.named_parameters() if not torch.equal(weight, before[name])}
    assert {name for name in before if "experts" in name} <= changed
