"""Base models: a chosen chat template, tokens that it needs, their rows in the tables, and their training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lilliput.chat.template import encode_prompt, end_id, render
from lilliput.compile.gguf import compile_gguf
from lilliput.compress.load import load
from lilliput.compress.lora import lora
from lilliput.config import GgufTarget, LoadConfig, LoraConfig, SourceConfig
from lilliput.errors import SourceError
from lilliput.models import open_model
from lilliput.saving import save_model
from lilliput.source import fetch_source
from tests.contexts import context

FLOAT32 = LoadConfig(dtype="float32")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW = ["<|im_start|>", "<|im_end|>"]


def make_base(checkpoint: Path, folder: Path, *, tied: bool = True, padding: int = 0, template: str = "chatml") -> Path:
    """Returns the source of a base model: the tiny model without ChatML's tokens and without a chat template."""
    base, fetched = shutil.copytree(checkpoint, folder / "base"), folder / "fetched"
    (base / "chat_template.jinja").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (base / file).read_text()
        (base / file).write_text(text.replace("<|im_start|>", "<|first|>").replace("<|im_end|>", "<|last|>"))
    tensors, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    tensors[TABLE] = torch.cat([tensors[TABLE], torch.full((padding, 64), 9.0)])
    if not tied:
        tensors[HEAD] = tensors[TABLE].flip(0).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    settings = {"vocab_size": config["vocab_size"] + padding, "tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(config | settings))
    fetched.mkdir()
    fetch_source(SourceConfig(model=f"path:{base}", chat_template=template), fetched, folder)
    return fetched


@pytest.mark.parametrize(("tied", "padding", "rows"), [(True, 0, 49154), (False, 0, 49154), (True, 8, 49160)])
def test_new_tokens_get_the_first_free_rows_with_the_mean_of_the_others(checkpoint, tmp_path, tied, padding, rows):
    result = load(context(make_base(checkpoint, tmp_path, tied=tied, padding=padding), chose_template=True), FLOAT32)
    ids = result.tokenizer.convert_tokens_to_ids(NEW)
    assert ids == [49152, 49153]
    assert result.facts["added_tokens"] == NEW
    assert end_id(result.tokenizer) in result.model.generation_config.eos_token_id
    save_model(result.model, result.tokenizer, tmp_path / "loaded")
    model, tokenizer = open_model(tmp_path / "loaded")
    assert model.config.added_token_ids == ids
    assert tokenizer.convert_tokens_to_ids(NEW) == ids
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.shape[0] == rows
        torch.testing.assert_close(table.weight[ids], table.weight[:49152].mean(0).expand(2, -1))
    prompt = encode_prompt(tokenizer, "S", "Q?")
    assert [token for token in prompt if token >= 49152] == [49152, 49153, 49152, 49153, 49152]


@pytest.fixture(scope="module")
def bases(checkpoint, tmp_path_factory) -> dict[bool, Path]:
    """The loaded base model with a tied and with a separate output layer."""
    folders = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("base")
        result = load(context(make_base(checkpoint, folder, tied=tied), chose_template=True), FLOAT32)
        folders[tied] = folder / "loaded"
        save_model(result.model, result.tokenizer, folders[tied])
    return folders


LORA = LoraConfig(
    variant="lora",
    rank=4,
    alpha=8.0,
    dropout=0.0,
    target_modules="all-linear",
    merge=True,
    steps=4,
    batch_size=4,
    gradient_accumulation=1,
    learning_rate=1e-2,
    warmup_share=0.0,
    max_grad_norm=1.0,
    precision="float32",
    checkpoint_every=2,
    validation_share=0.0,
    evaluate_every=2,
    patience=3,
    seed=1,
)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_new_rows_and_leaves_all_others(bases, facts, tmp_path, tied):
    before, _ = open_model(bases[tied])
    result = lora(context(bases[tied], facts[:8], checkpoints=tmp_path / "checkpoints"), LORA)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, name)().weight, getattr(result.model, name)().weight
        changed = (old != new).any(1).nonzero()[:, 0].tolist()
        assert changed == [49152, 49153]
    assert result.model.get_output_embeddings().weight is result.model.get_input_embeddings().weight or not tied
    save_model(result.model, result.tokenizer, tmp_path / "tuned")
    again, _ = open_model(tmp_path / "tuned")
    assert again.config.added_token_ids == [49152, 49153]
    torch.testing.assert_close(again.get_input_embeddings().weight, result.model.get_input_embeddings().weight)


def test_an_adapter_that_is_stored_separately_holds_the_new_rows(bases, facts, tmp_path):
    merged = lora(context(bases[True], facts[:8]), LORA)
    separate = lora(context(bases[True], facts[:8]), LORA.model_copy(update={"merge": False}))
    (tmp_path / "tuned").mkdir()
    separate.save(tmp_path / "tuned")
    opened, _ = open_model(tmp_path / "tuned")
    torch.testing.assert_close(opened.get_input_embeddings().weight, merged.model.get_input_embeddings().weight)


def test_a_gguf_file_has_the_new_tokens_and_their_rows(bases, tmp_path):
    import gguf

    compile_gguf(bases[True], tmp_path, GgufTarget(candidate="base", target="gguf", floats="f32", embeddings="f32"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens, kinds = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[-2:] == NEW
    assert set(kinds[-2:]) == {int(gguf.TokenType.CONTROL)}
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert table.data.shape[0] == len(tokens) == 49154
    assert reader.fields["tokenizer.ggml.eot_token_id"].contents() == 49153


def test_a_template_of_your_own_is_used_and_a_missing_one_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "chat_templates/plain.jinja"
    with pytest.raises(SourceError, match=r"source\.chat_template: .*plain\.jinja: no such file"):
        make_base(checkpoint, tmp_path / "missing", template=name)
    (tmp_path / "chat_templates").mkdir()
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|stop|>\n{% endfor %}"
    (tmp_path / name).write_text(text + "{% if add_generation_prompt %}assistant: {% endif %}")
    result = load(context(make_base(checkpoint, tmp_path, template=name), chose_template=True), FLOAT32)
    assert result.facts["added_tokens"] == ["<|stop|>"]
    assert result.tokenizer.convert_ids_to_tokens(end_id(result.tokenizer)) == "<|stop|>"


def test_a_built_in_template_begins_with_bos_if_the_tokenizer_does(checkpoint, tmp_path):
    from tokenizers.processors import TemplateProcessing

    source = make_base(checkpoint, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(source)
    result = load(context(source, chose_template=True), FLOAT32)
    messages = [{"role": "user", "content": "Q"}]
    assert render(result.tokenizer, messages).startswith(f"{bos}<|im_start|>user\nQ<|im_end|>")
