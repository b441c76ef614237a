import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lilliput.artifacts import file_sha256
from lilliput.compress import lora as lora_module
from lilliput.compress.lora import lora, with_adapter
from lilliput.config import LoraConfig
from lilliput.data.questions import ABSTENTION
from lilliput.errors import StrategyError
from lilliput.hardware import multiplies_bfloat16
from lilliput.models import open_model
from lilliput.saving import probe_logits, prove_reload, save_model
from lilliput.statistics.perplexity import IGNORED
from lilliput.training import checkpoint
from lilliput.training.answer_loss import answer_logits, answer_states, label_loss
from lilliput.training.checkpoint import fingerprint, last_checkpoint
from lilliput.training.examples import collate, encode_examples
from lilliput.training.loop import computes_in_bfloat16, split_validation
from tests.contexts import SYSTEM, context

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def batch(opened, facts):
    return collate(encode_examples(opened[1], SYSTEM, facts[:3]), 2)


def test_labels_are_the_answer_and_the_end_token(opened, facts):
    tokenizer = opened[1]
    for question, example in zip(facts, encode_examples(tokenizer, SYSTEM, facts), strict=True):
        answer = [label for label in example.labels if label != IGNORED]
        assert tokenizer.decode(answer) == (question.answer or ABSTENTION) + tokenizer.eos_token
        assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\nAnswer briefly.<|im_end|>")


def test_answer_logits_equal_a_full_forward(opened, batch):
    model = opened[0]
    logits, targets = answer_logits(model, batch)
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = batch["labels"][:, 1:] != IGNORED
    assert torch.allclose(logits, whole[wanted], atol=1e-5)
    assert torch.equal(targets, batch["labels"][:, 1:][wanted])
    reference = model(**batch).loss  # transformers' own masked loss
    assert label_loss(model, batch).item() == pytest.approx(reference.item(), rel=1e-5)


def test_hidden_states_equal_a_full_forward(opened, batch):
    states, _ = answer_states(opened[0], batch, every_layer=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = opened[0](**inputs, output_hidden_states=True).hidden_states
    wanted = batch["labels"][:, 1:] != IGNORED
    assert len(states) == len(whole) == 5
    for actual, expected in zip(states, whole, strict=True):
        assert torch.allclose(actual, expected[:, :-1][wanted], atol=1e-5)


def test_running_the_common_prefix_once_keeps_every_gradient(opened, checkpoint, batch):
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
    first = lora(context(checkpoint, facts), LoraConfig(**LORA))
    second = lora(context(checkpoint, facts), LoraConfig(**LORA))
    curve = [value for _, value in first.history["loss"]]
    assert [step for step, _ in first.history["loss"]] == list(range(1, 13))
    assert sum(curve[-3:]) < sum(curve[:3]) - 1.0
    assert first.history == second.history
    weight = first.model.model.layers[0].mlp.up_proj.weight
    assert torch.linalg.matrix_rank((weight - before).detach()).item() == 4  # the rank of the merged update is LoRA's


def test_rslora_scales_by_the_square_root_of_the_rank(checkpoint, facts):
    # alpha / √4 of rsLoRA is alpha / 4 of LoRA at twice the alpha.
    rooted = lora(context(checkpoint, facts), LoraConfig(**LORA | {"variant": "rslora", "steps": 4}))
    doubled = lora(context(checkpoint, facts), LoraConfig(**LORA | {"alpha": 16.0, "steps": 4}))
    assert rooted.history == doubled.history


def test_dora_learns_magnitudes_and_merges_into_the_old_shape(opened, checkpoint, facts, tmp_path):
    before = opened[0].model.layers[0].mlp.up_proj.weight.clone()
    result = lora(context(checkpoint, facts), LoraConfig(**LORA | {"variant": "dora"}))
    curve = [value for _, value in result.history["loss"]]
    assert sum(curve[-3:]) < sum(curve[:3]) - 1.0
    change = (result.model.model.layers[0].mlp.up_proj.weight - before).detach()
    assert torch.linalg.matrix_rank(change).item() > 4  # rescaled rows give the update a higher rank than LoRA's
    save_model(result.model, result.tokenizer, tmp_path)
    assert torch.allclose(probe_logits(*open_model(tmp_path)), probe_logits(result.model, result.tokenizer), atol=1e-4)


def test_accumulated_batches_equal_one_large_batch(checkpoint, facts):
    # A data set of four gives the same four examples in each step, in any order.
    settings = LORA | {"steps": 3, "warmup_share": 0.0}
    whole = lora(context(checkpoint, facts[:4]), LoraConfig(**settings))
    parts = lora(
        context(checkpoint, facts[:4]),
        LoraConfig(**settings | {"batch_size": 2, "gradient_accumulation": 2}),
    )
    assert [value for _, value in parts.history["loss"]] == pytest.approx(
        [value for _, value in whole.history["loss"]], rel=1e-4
    )


@pytest.mark.slow
def test_separate_adapter_opens_as_the_merged_model(checkpoint, facts, tmp_path):
    result = lora(context(checkpoint, facts), LoraConfig(**LORA | {"merge": False, "steps": 2}))
    result.save(tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert prove_reload(tmp_path, probe_logits(result.model, result.tokenizer), 1e-3) <= 1e-3


SAVE_ADAPTER = """
import sys
from pathlib import Path

from lilliput.compress.lora import _save_unmerged, with_adapter
from lilliput.config import LoraConfig
from lilliput.models import open_model

model, tokenizer = open_model(Path(sys.argv[1]))
_save_unmerged(with_adapter(model, LoraConfig.model_validate_json(sys.argv[3])), tokenizer, Path(sys.argv[2]))
"""


def test_bytes_of_a_separate_adapter_do_not_depend_on_the_hash_seed(checkpoint, tmp_path):
    config = LoraConfig(**LORA | {"merge": False, "target_modules": "attention"}).model_dump_json()
    saved = []
    for seed in ("1", "2"):
        arguments = [sys.executable, "-c", SAVE_ADAPTER, str(checkpoint), str(tmp_path / seed), config]
        subprocess.run(arguments, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, cwd=PROJECT)
        files = [path for path in (tmp_path / seed).rglob("*") if path.is_file()]
        saved.append({str(path.relative_to(tmp_path / seed)): file_sha256(path) for path in files})
    assert saved[0] == saved[1]
    assert "adapter/adapter_config.json" in saved[0]


def test_nan_loss_stops_the_training(checkpoint, facts):
    with pytest.raises(StrategyError, match="diverged: its loss is NaN or infinite; lower learning_rate"):
        # params.yaml rejects such large settings; model_copy bypasses the check.
        settings = LoraConfig(**LORA).model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})
        lora(context(checkpoint, facts), settings)


def test_a_merged_model_reloads(checkpoint, facts, tmp_path):
    result = lora(context(checkpoint, facts), LoraConfig(**LORA | {"steps": 2}))
    save_model(result.model, result.tokenizer, tmp_path, torch.bfloat16)
    expected = probe_logits(result.model.float(), result.tokenizer)
    assert torch.allclose(probe_logits(*open_model(tmp_path)), expected, atol=1e-3)


def weights(result):
    return {name: weight.detach().clone() for name, weight in result.model.named_parameters()}


def stop_at(call, loss):
    """Returns `loss`, which raises KeyboardInterrupt at its `call`th call."""
    calls = []

    def killed(model, batch):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss(model, batch)

    return killed


# Twenty examples are five steps of an epoch, so 5 is a checkpoint between two epochs. Dropout draws random numbers.
@pytest.mark.parametrize(("every", "killed_at"), [(3, 6), (5, 7)])
def test_resumed_training_gives_the_same_weights(checkpoint, facts, tmp_path, monkeypatch, every, killed_at):
    config = LoraConfig(**LORA | {"dropout": 0.2, "checkpoint_every": every, "steps": 8})
    whole = lora(context(checkpoint, facts), config)
    with monkeypatch.context() as patch:
        patch.setattr(lora_module, "label_loss", stop_at(killed_at, label_loss))
        with pytest.raises(KeyboardInterrupt):
            lora(context(checkpoint, facts, checkpoints=tmp_path), config)
    assert last_checkpoint(tmp_path).name == f"checkpoint-{(killed_at - 1) // every * every}"
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}
    calls = []
    monkeypatch.setattr(lora_module, "label_loss", lambda *args: calls.append(1) or label_loss(*args))
    resumed = lora(context(checkpoint, facts, checkpoints=tmp_path), config)
    assert len(calls) == 8 - (killed_at - 1) // every * every
    assert resumed.history == whole.history
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(resumed).items())


VALIDATED = LoraConfig(
    **LORA
    | {"validation_share": 0.25, "evaluate_every": 2, "patience": 2, "checkpoint_every": 4}
    | {"learning_rate": 1e-1, "steps": 30}  # too large after a few steps
)


@pytest.fixture(scope="module")
def validated(checkpoint, facts):
    return lora(context(checkpoint, facts), VALIDATED)


def test_best_validation_decides_kept_weights_and_stop(validated, facts):
    curve = dict(validated.history["validation_loss"])
    best = min(curve, key=curve.__getitem__)
    assert list(curve) == list(range(2, best + 5, 2))
    assert (validated.facts["best_step"], validated.facts["validation_loss"]) == (best, curve[best])
    held = collate(encode_examples(validated.tokenizer, SYSTEM, split_validation(facts, VALIDATED)[1]), 2)
    assert label_loss(validated.model, held).item() == pytest.approx(curve[best], rel=1e-4)


def test_resumed_training_with_validation_gives_the_same_weights(validated, checkpoint, facts, tmp_path, monkeypatch):
    last = validated.history["loss"][-1][0]
    # Two steps and two validation batches make four calls; the kill is in the last validation.
    monkeypatch.setattr(lora_module, "label_loss", stop_at(2 * last, label_loss))
    with pytest.raises(KeyboardInterrupt):
        lora(context(checkpoint, facts, checkpoints=tmp_path), VALIDATED)
    monkeypatch.undo()
    assert last_checkpoint(tmp_path) is not None
    resumed = lora(context(checkpoint, facts, checkpoints=tmp_path), VALIDATED)
    assert (resumed.history, resumed.facts) == (validated.history, validated.facts)
    assert all(torch.equal(weight, weights(validated)[name]) for name, weight in weights(resumed).items())


def test_validation_uses_whole_groups(facts):
    twice = facts + [question.model_copy(update={"id": f"again/{question.id}"}) for question in facts]
    training, validation = split_validation(twice, LoraConfig(**LORA | {"validation_share": 0.2}))
    assert len(validation) == 8
    assert not {question.group for question in training} & {question.group for question in validation}
    assert sorted(question.id for question in (*training, *validation)) == sorted(question.id for question in twice)
    assert split_validation(facts, LoraConfig(**LORA)) == (facts, [])
    with pytest.raises(StrategyError, match=r"validation_share: 0\.2 of 1 training groups"):
        split_validation(facts[:1], LoraConfig(**LORA | {"validation_share": 0.2}))


@pytest.mark.parametrize(
    ("name", "covered"),
    [
        *((name, True) for name in ("template.py", "control_tokens.py", "questions.py", "answer_loss.py", "loop.py")),
        *((name, True) for name in ("examples.py", "distill.py", "lora.py", "models.py", "perplexity.py")),
        ("gptq.py", False),
    ],
)
def test_fingerprint_covers_the_code_of_examples_and_losses_only(monkeypatch, name, covered):
    before, real = fingerprint("settings"), checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: "new" if path.name == name else real(path))
    assert (fingerprint("settings") != before) == covered


def test_fingerprint_changes_with_any_part():
    settings = LoraConfig(**LORA).model_dump(mode="json")
    same = fingerprint(settings, "parent", None)
    assert same == fingerprint(dict(reversed(settings.items())), "parent", None)
    others = [fingerprint(settings | {"steps": 13}, "parent", None), fingerprint(settings, "other", None)]
    assert len({same, *others}) == 3


@pytest.mark.parametrize("supported", [True, False])
def test_automatic_precision_depends_on_the_hardware(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert computes_in_bfloat16(LoraConfig(**LORA | {"precision": "auto"})) == supported
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lilliput.hardware._processor_multiplies_bfloat16", lambda: True)
    assert not computes_in_bfloat16(LoraConfig(**LORA | {"precision": "auto"}))


def test_adapter_is_copied_to_the_float_parent(opened, checkpoint):
    config = LoraConfig(**LORA)
    trained, target = with_adapter(opened[0], config), with_adapter(open_model(checkpoint)[0], config)
    torch.manual_seed(7)
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight)
    a, b = (trained.base_model.model.model.layers[0].mlp.up_proj, target.base_model.model.model.layers[0].mlp.up_proj)
    before = b.base_layer.weight.detach().clone()
    merged = lora_module._copy_adapter(trained, target).merge_and_unload()
    update = config.alpha / config.rank * a.lora_B["default"].weight @ a.lora_A["default"].weight
    assert torch.allclose(merged.model.layers[0].mlp.up_proj.weight, before + update, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_qlora_learns_with_four_bits_and_merges_into_the_float_parent(checkpoint, facts, precision):
    result = lora(context(checkpoint, facts), LoraConfig(**LORA | {"variant": "qlora", "precision": precision}))
    curve = [value for _, value in result.history["loss"]]
    assert sum(curve[-3:]) < sum(curve[:3]) - 1.0
    update = (
        result.model.model.layers[0].mlp.up_proj.weight - open_model(checkpoint)[0].model.layers[0].mlp.up_proj.weight
    )
    assert result.model.dtype == torch.float32
    assert torch.linalg.matrix_rank(update.detach()).item() == 4


@pytest.mark.parametrize("hardware", [pytest.param("GPU", marks=pytest.mark.gpu), "processor"])
def test_bfloat16_learns_nearly_the_same(checkpoint, facts, hardware):
    if not multiplies_bfloat16():
        pytest.skip(f"this {hardware} has no instructions for bfloat16")
    curves = [
        lora(context(checkpoint, facts), LoraConfig(**LORA | {"precision": precision})).history["loss"]
        for precision in ("float32", "bfloat16")
    ]
    assert curves[0] != curves[1]
    assert [value for _, value in curves[1]] == pytest.approx([value for _, value in curves[0]], rel=0.05)
