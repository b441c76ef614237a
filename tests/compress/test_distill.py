import json
import math
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy

from lilliput.artifacts import seal
from lilliput.chat.template import encode_prompt
from lilliput.compress import distill as distill_module
from lilliput.compress.distill import (
    distill,
    distillation_loss,
    divergence,
    hidden_distance,
    layer_origins,
    sample_answers,
    stored_distillation_loss,
)
from lilliput.compress.prune import remove_layers
from lilliput.config import DistillConfig
from lilliput.data.conversations import Conversation
from lilliput.errors import StrategyError
from lilliput.models import open_model
from lilliput.saving import save_model
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.answer_loss import answer_logits, answer_states, label_loss
from lilliput.training.examples import collate, encode_examples
from lilliput.training.stored_logits import buckets, stored_logits
from tests.contexts import SYSTEM, context

DISTILL = {
    "divergence": "forward_kl",
    "gradient_accumulation": 1,
    "temperature": 2.0,
    "kl_weight": 0.9,
    "steps": 8,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_share": 0.1,
}
DISTILL |= {"max_grad_norm": 1.0, "seed": 2}


def config(**changes):
    return DistillConfig(**DISTILL | changes)


def sealed(folder, candidate="teacher", parent=None, **facts):
    return seal(folder, candidate=candidate, strategy="x", config={}, parent=parent, parameters=0, facts=facts)


@pytest.fixture(scope="module")
def teacher_folder(checkpoint, tmp_path_factory):
    """A teacher: the tiny model with slightly changed layers."""
    model, tokenizer = open_model(checkpoint)
    torch.manual_seed(0)
    for weight in model.model.layers.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_model(model, tokenizer, folder)
    sealed(folder)
    return folder


@pytest.fixture
def teacher(teacher_folder):
    return open_model(teacher_folder)[0]


@pytest.fixture
def batch(opened, facts):
    return collate(encode_examples(opened[1], SYSTEM, facts[:3]), 2)


def test_distillation_loss_equals_the_formula(opened, teacher, batch):
    student, tokenizer = opened
    loss = distillation_loss(teacher, tokenizer, config())(student, batch)
    (s, targets), (t, _) = answer_logits(student, batch), answer_logits(teacher, batch)
    p, log_q = (t / 2).softmax(-1), (s / 2).log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    assert kl.item() > 0.01
    assert loss.item() == pytest.approx((0.9 * 4 * kl + 0.1 * cross_entropy(s, targets)).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_divergences_equal_their_formulas(kind):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = (p + q) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum(-1).mean()

    plain = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jensen_shannon": (kl(p, m) + kl(q, m)) / 2}
    assert divergence(teacher, student, kind).item() == pytest.approx(plain[kind].item())
    assert divergence(teacher, teacher, kind).item() == pytest.approx(0.0, abs=1e-12)
    far = 50.0 * torch.eye(2, dtype=torch.float64)
    assert divergence(far, far.flip(0), "jensen_shannon").item() == pytest.approx(math.log(2.0))


def test_student_equal_to_the_teacher_has_only_the_label_loss(opened, checkpoint, batch):
    loss = distillation_loss(open_model(checkpoint)[0], opened[1], config(hidden_weight=1.0), range(4))
    assert loss(opened[0], batch).item() == pytest.approx(0.1 * label_loss(opened[0], batch).item(), rel=1e-4)


def test_student_moves_towards_the_teacher(opened, checkpoint, teacher_folder, teacher, facts, tmp_path):
    batch = collate(encode_examples(opened[1], SYSTEM, facts), 2)
    distance = distillation_loss(teacher, opened[1], config(kl_weight=1.0))
    at_first = distance(opened[0], batch).item()
    result = distill(context(checkpoint, facts, teacher=teacher_folder), config())
    assert distance(result.model, batch).item() < 0.8 * at_first
    assert result.history["loss"][-1] == (8, result.facts["final_loss"])


def test_rejects_another_tokenizer_before_reading_weights(checkpoint, tokenizer, facts, tmp_path):
    other = type(tokenizer).from_pretrained(checkpoint)
    other.add_tokens(["<lilliput>"])
    other.save_pretrained(tmp_path)  # without any weights
    with pytest.raises(StrategyError, match="different tokenizers"):
        distill(context(checkpoint, facts, teacher=tmp_path), config())


def test_rejects_hidden_states_of_another_size_before_reading_weights(checkpoint, tokenizer, facts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    shape = json.loads((checkpoint / "config.json").read_text()) | {"hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(StrategyError, match="64 values and the teacher's 128"):
        distill(context(checkpoint, facts, teacher=tmp_path), config(hidden_weight=1.0))


def test_hidden_distance_is_the_mean_relative_squared_error_of_the_kept_layers():
    torch.manual_seed(0)
    student, teacher = [torch.randn(3, 5) for _ in range(4)], [torch.randn(3, 5) * 10**i for i in range(6)]
    # Student layers 0, 1, 2 are the teacher's 0, 2, 4; states[i + 1] is the output of layer i.
    pairs = [(student[1], teacher[1]), (student[2], teacher[3])]
    plain = sum((ours - theirs).pow(2).sum() / theirs.pow(2).sum() for ours, theirs in pairs) / 2
    assert hidden_distance(student, teacher, [0, 2, 4]).item() == pytest.approx(plain.item(), rel=1e-5)


def test_pruned_student_matches_the_teacher_up_to_the_first_removed_layer(opened, teacher, teacher_folder, batch):
    pruned = open_model(teacher_folder)[0]
    remove_layers(pruned, [2])
    ours, theirs = (answer_states(model, batch, every_layer=True)[0] for model in (pruned, teacher))
    assert hidden_distance(ours, theirs, [0, 1, 3]).item() == pytest.approx(0.0, abs=1e-9)
    assert hidden_distance(ours, theirs, [0, 2, 3]).item() > 0.01


def artefact(folder, layers, parent=None, **facts):
    folder.mkdir()
    shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(shape))
    return sealed(folder, folder.name, parent, **facts)


def test_layer_origins_follow_the_manifests(tmp_path):
    base = artefact(tmp_path / "base", 8)
    once = artefact(tmp_path / "once", 6, base, removed_layers=[1, 5])  # leaves 0 2 3 4 6 7
    tuned = artefact(tmp_path / "tuned", 6, once)
    artefact(tmp_path / "twice", 4, tuned, removed_layers=[2, 5])  # removes 3 and 7
    artefact(tmp_path / "stranger", 4)
    assert layer_origins(tmp_path / "twice", tmp_path / "base") == [0, 2, 4, 6]
    assert layer_origins(tmp_path / "twice", tmp_path / "tuned") == [0, 1, 3, 4]
    assert layer_origins(tmp_path / "tuned", tmp_path / "tuned") == list(range(6))
    assert layer_origins(tmp_path / "stranger", tmp_path / "base") == [1, 3, 5, 7]


def test_hidden_matching_reduces_the_hidden_distance(opened, teacher_folder, teacher, facts, tmp_path):
    pruned = open_model(teacher_folder)
    remove_layers(pruned[0], [1])
    save_model(*pruned, tmp_path / "pruned")
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    sealed(tmp_path / "pruned", "pruned", sealed(tmp_path / "teacher"), removed_layers=[1])
    folders, batch = (tmp_path / "pruned", tmp_path / "teacher"), collate(encode_examples(opened[1], SYSTEM, facts), 2)

    def distance(model):
        ours, theirs = (answer_states(each, batch, every_layer=True)[0] for each in (model, teacher))
        return hidden_distance(ours, theirs, [0, 2, 3]).item()

    settings = config(hidden_weight=10.0, steps=20)
    result = distill(context(folders[0], facts, teacher=folders[1]), settings)
    assert result.facts["matched_teacher_layers"] == [0, 2, 3]
    assert distance(result.model) < 0.8 * distance(open_model(folders[0])[0])


def test_sampled_answers_follow_the_prompts_and_the_students_distribution(opened, facts):
    student, tokenizer = opened
    batch = collate(encode_examples(tokenizer, SYSTEM, [facts[0]] * 64), 2)
    settings = config(sample_temperature=0.5, sample_tokens=1)
    torch.manual_seed(3)
    drawn = sample_answers(student, tokenizer, batch, settings)
    prompt = encode_examples(tokenizer, SYSTEM, facts[:1])[0].labels.count(IGNORED)
    assert torch.equal(drawn["input_ids"][:, :prompt], batch["input_ids"][:, :prompt])
    assert (drawn["labels"][:, :prompt] == IGNORED).all()
    assert drawn["input_ids"].shape[1] == prompt + 1
    logits = student(drawn["input_ids"][:1, :prompt]).logits[0, -1].double()
    likelihood = (logits / 0.5).log_softmax(-1)
    tokens = drawn["input_ids"][:, prompt]
    # The mean log-likelihood of 64 draws lies within four standard errors of minus the entropy.
    entropy = -(likelihood.exp() * likelihood).sum()
    spread = ((likelihood.exp() * (likelihood + entropy) ** 2).sum() / 64).sqrt()
    assert abs(likelihood[tokens].mean() + entropy) < 4 * spread
    torch.manual_seed(3)
    assert torch.equal(sample_answers(student, tokenizer, batch, settings)["input_ids"], drawn["input_ids"])


def test_sampled_answers_stop_at_the_end_token_and_prompts_of_unequal_length_are_kept(opened, facts):
    student, tokenizer = opened
    questions = [
        facts[0].model_copy(update={"question": "Capital of France, and of nothing else, please?"}),
        *facts[:3],
    ]
    batch = collate(encode_examples(tokenizer, SYSTEM, questions), 2)
    torch.manual_seed(0)
    drawn = sample_answers(student, tokenizer, batch, config(sample_temperature=50.0, sample_tokens=6))
    for old, new in zip(encode_examples(tokenizer, SYSTEM, questions), drawn["labels"], strict=True):
        assert (new[: old.labels.count(IGNORED)] == IGNORED).all()
        answer = new[old.labels.count(IGNORED) :]
        answer = answer[answer != IGNORED].tolist()
        assert 1 <= len(answer) <= 6
        assert tokenizer.eos_token_id not in answer[:-1]


def test_loss_on_sampled_answers_is_their_divergence(opened, teacher, batch):
    student, tokenizer = opened
    settings = config(on_policy_share=1.0, sample_tokens=5)
    torch.manual_seed(4)
    loss = distillation_loss(teacher, tokenizer, settings)(student.train(), batch)
    torch.manual_seed(4)
    torch.rand(())  # the draw for on-policy
    drawn = sample_answers(student, tokenizer, batch, settings)
    p = (answer_logits(teacher, drawn)[0] / 2).softmax(-1)
    q = (answer_logits(student, drawn)[0] / 2).softmax(-1)
    assert loss.item() == pytest.approx((0.9 * 4 * (p * (p / q).log()).sum(-1).mean()).item(), rel=1e-4)
    assert loss.requires_grad
    student.eval()  # validation uses the labels and draws nothing
    assert distillation_loss(teacher, tokenizer, settings)(student, batch).item() == pytest.approx(
        distillation_loss(teacher, tokenizer, config())(student, batch).item()
    )


@pytest.mark.slow
def test_resumed_training_samples_the_same_answers(checkpoint, teacher_folder, facts, tmp_path, monkeypatch):
    settings = config(on_policy_share=0.9, sample_tokens=3, steps=4, checkpoint_every=2)
    whole = distill(context(checkpoint, facts, teacher=teacher_folder), settings)
    calls = []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return divergence(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "divergence", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(context(checkpoint, facts, teacher=teacher_folder, checkpoints=tmp_path / "left"), settings)
    assert (tmp_path / "left" / "checkpoint-2").is_dir()
    resumed = distill(context(checkpoint, facts, teacher=teacher_folder, checkpoints=tmp_path / "left"), settings)
    assert resumed.history == whole.history
    for first_weight, second_weight in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(first_weight, second_weight)


def test_buckets_are_the_given_tokens_and_all_others():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    expected = torch.tensor([[0.4, 0.3, 0.3]])
    assert torch.allclose(buckets(logits, torch.tensor([[1, 3]])).exp(), expected)
    everything = buckets(logits, torch.arange(4)[None])
    assert torch.allclose(everything[:, :4].exp(), logits.exp())
    assert everything[0, 4].exp().item() == pytest.approx(0.0, abs=1e-30)


@pytest.fixture
def store(teacher_folder, opened, facts, tmp_path):
    examples = encode_examples(opened[1], SYSTEM, facts)

    def make(top_k, open_teacher=lambda: open_model(teacher_folder)[0]):
        return stored_logits(tmp_path, "sha", open_teacher, examples, 2, 2.0, top_k)

    return make


def test_stored_logits_of_the_whole_vocabulary_give_the_live_loss_and_gradient(
    opened, checkpoint, teacher, store, batch
):
    live, stored = opened[0], open_model(checkpoint)[0]
    settings = config(top_k=10**6)
    expected = distillation_loss(teacher, opened[1], settings)(live, batch)
    loss = stored_distillation_loss(store(10**6), settings)(stored, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    loss.backward()
    named = dict(live.named_parameters())
    for name, weight in stored.named_parameters():
        assert torch.allclose(weight.grad, named[name].grad, rtol=1e-3, atol=1e-6), name


def test_fewer_stored_logits_never_increase_the_divergence(opened, teacher, store, batch):
    settings = config(kl_weight=1.0)
    exact = distillation_loss(teacher, opened[1], settings)(opened[0], batch).item()
    losses = [stored_distillation_loss(store(k), settings)(opened[0], batch).item() for k in (1, 16, 1024, 16384)]
    assert losses == sorted(losses)
    assert 0.0 < losses[0] < losses[-1] <= exact * (1 + 1e-5)
    (p, q) = ((answer_logits(model, batch)[0] / 2).softmax(-1) for model in (teacher, opened[0]))
    top = p.topk(16).indices
    (a, b) = (x.gather(-1, top) for x in (p, q))
    (c, d) = (1 - a.sum(-1), 1 - b.sum(-1))
    plain = ((a * (a / b).log()).sum(-1) + c * (c / d).log()).mean()
    assert losses[1] == pytest.approx(4 * plain.item(), rel=1e-3)


def test_stored_logits_do_not_open_the_teacher_again(store, tmp_path):
    def never():
        raise AssertionError("the teacher was opened")

    first, second = store(8), store(8, never)
    assert torch.equal(first.log_probabilities, second.log_probabilities)
    assert first.rows == second.rows
    with pytest.raises(AssertionError, match="opened"):
        store(9, never)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".lock"}  # no partial files


@pytest.mark.slow
def test_second_student_learns_the_same_without_the_teachers_weights(
    checkpoint, teacher_folder, teacher, opened, facts, tmp_path
):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    settings = config(teacher_logits="stored", top_k=8192)  # a random teacher has a flat distribution
    inputs = context(checkpoint, facts, teacher=tmp_path / "teacher", teacher_logits=tmp_path / "cache")
    first = distill(inputs, settings)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    second = distill(inputs, settings)
    for first_weight, second_weight in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(first_weight, second_weight)
    batch = collate(encode_examples(opened[1], SYSTEM, facts), 2)
    distance = distillation_loss(teacher, opened[1], config(kl_weight=1.0))
    assert distance(first.model, batch).item() < 0.8 * distance(opened[0], batch).item()


def test_of_a_conversation_only_the_last_answer_is_sampled_again(opened):
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Is it sunny?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = Conversation.model_validate({"id": "a", "group": "a", "messages": messages})
    model, tokenizer = opened
    batch = collate(encode_examples(tokenizer, SYSTEM, [row]), 2)
    drawn = sample_answers(model, tokenizer, batch, config(sample_tokens=3))
    prompt = encode_prompt(tokenizer, SYSTEM, row)
    assert drawn["input_ids"][0, : len(prompt)].tolist() == prompt
    assert (drawn["labels"][0, : len(prompt)] == IGNORED).all()
    assert 0 < (drawn["labels"][0] != IGNORED).sum() <= 3
