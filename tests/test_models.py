import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput.errors import ArtifactError, SourceError
from lilliput.models import open_model, probe_logits, prove_reload, read_config, save_model


def test_checkpoint_opens_in_plain_transformers_with_the_same_logits(checkpoint, opened):
    model, tokenizer = opened
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert torch.equal(probe_logits(plain, tokenizer), probe_logits(model, tokenizer))


def test_stored_dtype_is_kept_and_the_model_in_memory_is_rounded_likewise(opened, tmp_path):
    model, tokenizer = opened
    save_model(model, tokenizer, tmp_path, torch.bfloat16)
    expected = probe_logits(model.float(), tokenizer)
    again, _ = open_model(tmp_path)
    assert again.stored_dtype == torch.bfloat16
    assert torch.equal(probe_logits(again, tokenizer), expected)


def test_reload_is_proven_in_a_fresh_process(opened, checkpoint):
    assert prove_reload(checkpoint, probe_logits(*opened), 1e-4) <= 1e-4


@pytest.mark.slow
def test_reload_of_another_model_is_refused(opened, checkpoint):
    with pytest.raises(ArtifactError, match="not what was made"):
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


def test_a_model_that_is_no_causal_lm_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(SourceError, match=r"not a causal language model.*bert"):
        read_config(tmp_path)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        read_config(tmp_path)
