import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput.errors import ArtifactError, SourceError
from lilliput.models import open_model, read_config
from lilliput.saving import probe_logits, prove_reload, save_model


def test_plain_transformers_opens_a_checkpoint_with_the_same_logits(checkpoint, opened):
    model, tokenizer = opened
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert torch.equal(probe_logits(plain, tokenizer), probe_logits(model, tokenizer))


def test_saving_rounds_the_model_in_memory_to_the_stored_dtype(opened, tmp_path):
    model, tokenizer = opened
    save_model(model, tokenizer, tmp_path, torch.bfloat16)
    expected = probe_logits(model.float(), tokenizer)
    again, _ = open_model(tmp_path)
    assert again.stored_dtype == torch.bfloat16
    assert torch.equal(probe_logits(again, tokenizer), expected)


def test_a_saved_model_reopens_in_a_fresh_process(opened, checkpoint):
    assert prove_reload(checkpoint, probe_logits(*opened), 1e-4) <= 1e-4


@pytest.mark.slow
def test_a_different_reopened_model_is_an_error(opened, checkpoint):
    with pytest.raises(ArtifactError, match="not the model in memory"):
        prove_reload(checkpoint, probe_logits(*opened) + 0.5, 1e-3)


def test_truncated_weights_do_not_open(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        open_model(tmp_path)


def test_pickled_weights_are_never_opened(checkpoint, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(ArtifactError, match="safetensors"):
        open_model(tmp_path)


def test_a_model_other_than_a_causal_lm_is_rejected(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(SourceError, match=r"not a causal language model.*bert"):
        read_config(tmp_path)


def test_an_empty_folder_is_rejected(tmp_path):
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        read_config(tmp_path)
