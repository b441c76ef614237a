import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lilliput.compress.distill import distill, distillation_loss, divergence
from lilliput.compress.lora import lora
from lilliput.compress.training import IGNORED, answer_logits, collate, encode_examples, label_loss
from lilliput.config import DistillConfig, LoraConfig
from lilliput.data.questions import ABSTENTION
from lilliput.errors import StrategyError
from lilliput.models import open_model, probe_logits, prove_reload, save_model

SYSTEM = "Answer briefly."


@pytest.fixture
def batch(opened, facts):
    return collate(encode_examples(opened[1], SYSTEM, facts[:3]), 2)


def test_labels_are_the_answer_and_the_end_token_alone(opened, facts):
    tokenizer = opened[1]
    for question, example in zip(facts, encode_examples(tokenizer, SYSTEM, facts), strict=True):
        learnt = [label for label in example.labels if label != IGNORED]
        assert tokenizer.decode(learnt) == (question.answer or ABSTENTION) + tokenizer.eos_token
        assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\nAnswer briefly.<|im_end|>")


def test_answer_logits_equal_those_of_the_whole_forward(opened, batch):
    model = opened[0]
    logits, targets = answer_logits(model, batch)
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = batch["labels"][:, 1:] != IGNORED
    assert torch.allclose(logits, whole[wanted], atol=1e-5)
    assert torch.equal(targets, batch["labels"][:, 1:][wanted])
    reference = model(**batch).loss  # transformers' own masked loss
    assert label_loss(model, batch).item() == pytest.approx(reference.item(), rel=1e-5)


def test_running_the_shared_beginning_once_leaves_every_gradient_as_it_was(opened, checkpoint, batch):
    shared, whole = opened[0], open_model(checkpoint)[0]
    label_loss(shared, batch).backward()
    whole(**batch).loss.backward()
    named = dict(whole.named_parameters())
    for name, parameter in shared.named_parameters():
        assert torch.allclose(parameter.grad, named[name].grad, rtol=1e-3, atol=1e-6), name


LORA = {
    "variant": "lora",
    "gradient_accumulation": 1,
    "rank": 4,
    "alpha": 8.0,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "merge": True,
    "steps": 12,
    "batch_size": 4,
}
LORA |= {"learning_rate": 2e-2, "warmup_share": 0.1, "max_grad_norm": 1.0, "seed": 1}


def test_lora_learns_repeatably_and_merges(opened, checkpoint, facts):
    before = opened[0].model.layers[0].mlp.up_proj.weight.clone()
    first = lora(opened, facts, SYSTEM, LoraConfig(**LORA))
    second = lora(open_model(checkpoint), facts, SYSTEM, LoraConfig(**LORA))
    curve = [value for _, value in first.history["loss"]]
    assert [step for step, _ in first.history["loss"]] == list(range(1, 13))
    assert sum(curve[-3:]) < sum(curve[:3]) - 1.0
    assert first.history == second.history
    weight = first.model.model.layers[0].mlp.up_proj.weight
    assert torch.linalg.matrix_rank((weight - before).detach()).item() == 4  # the merged update has LoRA's rank


def test_rslora_scales_by_the_root_of_the_rank(checkpoint, facts):
    # alpha / √4 of rsLoRA is alpha / 4 of LoRA at twice the alpha.
    rooted = lora(open_model(checkpoint), facts, SYSTEM, LoraConfig(**LORA | {"variant": "rslora", "steps": 4}))
    doubled = lora(open_model(checkpoint), facts, SYSTEM, LoraConfig(**LORA | {"alpha": 16.0, "steps": 4}))
    assert rooted.history == doubled.history


def test_dora_learns_a_magnitude_too_and_merges_into_the_old_shape(opened, checkpoint, facts, tmp_path):
    before = opened[0].model.layers[0].mlp.up_proj.weight.clone()
    result = lora(opened, facts, SYSTEM, LoraConfig(**LORA | {"variant": "dora"}))
    curve = [value for _, value in result.history["loss"]]
    assert sum(curve[-3:]) < sum(curve[:3]) - 1.0
    change = (result.model.model.layers[0].mlp.up_proj.weight - before).detach()
    assert torch.linalg.matrix_rank(change).item() > 4  # rows are rescaled, so the update has more than LoRA's rank
    save_model(result.model, result.tokenizer, tmp_path)
    assert torch.allclose(probe_logits(*open_model(tmp_path)), probe_logits(result.model, result.tokenizer), atol=1e-4)


def test_accumulated_batches_make_the_step_of_one_large_batch(checkpoint, facts):
    # The same four examples a step, whatever their order, need a data set of four.
    settings = LORA | {"steps": 3, "warmup_share": 0.0}
    whole = lora(open_model(checkpoint), facts[:4], SYSTEM, LoraConfig(**settings))
    parts = lora(
        open_model(checkpoint),
        facts[:4],
        SYSTEM,
        LoraConfig(**settings | {"batch_size": 2, "gradient_accumulation": 2}),
    )
    assert [value for _, value in parts.history["loss"]] == pytest.approx(
        [value for _, value in whole.history["loss"]], rel=1e-4
    )


def test_an_adapter_kept_apart_opens_as_the_merged_model_would(opened, facts, tmp_path):
    result = lora(opened, facts, SYSTEM, LoraConfig(**LORA | {"merge": False, "steps": 2}))
    result.save(tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert prove_reload(tmp_path, probe_logits(result.model, result.tokenizer), 1e-3) <= 1e-3


DISTILL = {
    "divergence": "forward_kl",
    "gradient_accumulation": 1,
    "temperature": 2.0,
    "kl_weight": 0.9,
    "steps": 12,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_share": 0.1,
}
DISTILL |= {"max_grad_norm": 1.0, "seed": 2}


def test_distillation_loss_is_the_formula(opened, checkpoint, batch):
    student, teacher = opened[0], open_model(checkpoint)[0]
    torch.manual_seed(0)
    teacher.lm_head.weight.data += 0.1 * torch.randn_like(teacher.lm_head.weight)
    loss = distillation_loss(teacher, DistillConfig(**DISTILL))(student, batch)
    (s, targets), (t, _) = answer_logits(student, batch), answer_logits(teacher, batch)
    p, log_q = (t / 2).softmax(-1), (s / 2).log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    assert kl.item() > 0.01
    assert loss.item() == pytest.approx((0.9 * 4 * kl + 0.1 * cross_entropy(s, targets)).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_divergences_are_their_formulas(kind):
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


def test_a_student_of_itself_has_only_the_label_loss(opened, checkpoint, batch):
    loss = distillation_loss(open_model(checkpoint)[0], DistillConfig(**DISTILL))(opened[0], batch)
    assert loss.item() == pytest.approx(0.1 * label_loss(opened[0], batch).item(), rel=1e-4)


def test_the_student_comes_nearer_to_its_teacher_and_the_teacher_stays(opened, checkpoint, facts):
    teacher = lora(open_model(checkpoint), facts, SYSTEM, LoraConfig(**LORA | {"steps": 20}))
    before = probe_logits(teacher.model, teacher.tokenizer)
    batch = collate(encode_examples(opened[1], SYSTEM, facts), 2)
    distance = distillation_loss(teacher.model, DistillConfig(**DISTILL | {"kl_weight": 1.0}))
    at_first = distance(opened[0], batch).item()
    result = distill(opened, (teacher.model, teacher.tokenizer), facts, SYSTEM, DistillConfig(**DISTILL))
    assert distance(result.model, batch).item() < 0.8 * at_first
    assert torch.equal(probe_logits(teacher.model, teacher.tokenizer), before)


def test_another_tokenizer_is_refused(opened, facts):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(StrategyError, match="different tokenizers"):
        distill(opened, (opened[0], Other()), facts, SYSTEM, DistillConfig(**DISTILL))


def test_loss_that_is_no_number_stops_the_training(opened, facts):
    with pytest.raises((FloatingPointError, StrategyError)):
        lora(opened, facts, SYSTEM, LoraConfig(**LORA | {"learning_rate": 1e30, "max_grad_norm": 1e30}))
    assert math.isfinite(LORA["learning_rate"])


def test_a_merged_model_reloads(opened, facts, tmp_path):
    result = lora(opened, facts, SYSTEM, LoraConfig(**LORA | {"steps": 2}))
    save_model(result.model, result.tokenizer, tmp_path, torch.bfloat16)
    expected = probe_logits(result.model.float(), result.tokenizer)
    assert torch.allclose(probe_logits(*open_model(tmp_path)), expected, atol=1e-3)
