"""A vocabulary in SentencePiece's form, read from tokenizer.json."""

import gguf
import pytest

from lilliput.compile.pieces import read_pieces
from tests.matrix.families import FAMILIES, tokenizer_of

NAMED = {family.name: family for family in FAMILIES}


def pieces(name, folder):
    tokenizer_of(NAMED[name]).save_pretrained(folder)
    return read_pieces(folder)


@pytest.mark.parametrize(("name", "space_first"), [("Mistral", True), ("Gemma 2", False)])
def test_tokens_keep_their_ids_kinds_and_order_of_merging(name, space_first, tmp_path):
    read, tokenizer = pieces(name, tmp_path), tokenizer_of(NAMED[name])
    assert read.texts == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = dict(zip(read.texts, read.kinds, strict=True))
    assert kinds["<unk>"] == gguf.TokenType.UNKNOWN
    assert kinds["<0x0A>"] == gguf.TokenType.BYTE
    assert kinds["▁capital"] == gguf.TokenType.NORMAL
    assert {kinds[text] for text in NAMED[name].special if text != "<unk>"} == {gguf.TokenType.CONTROL}
    scores = dict(zip(read.texts, read.scores, strict=True))
    assert scores["▁c"] > scores["▁capital"] > scores["Ω" if "Ω" in scores else "<0x0A>"]
    assert read.space_first is space_first


def test_rows_without_a_token_are_unused_and_tokens_without_a_row_are_left_out(tmp_path):
    read = pieces("Mistral", tmp_path)
    for rows in (len(read.texts) + 3, len(read.texts) - 2):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        read.write(writer, rows)
        fields = {name: field.value for values in writer.kv_data for name, field in values.items()}
        assert [len(fields[f"tokenizer.ggml.{name}"]) for name in ("tokens", "scores", "token_type")] == [rows] * 3
    assert not any(text.startswith("[PAD") for text in fields["tokenizer.ggml.tokens"])


def test_a_vocabulary_over_bytes_is_none(tmp_path):
    assert pieces("Qwen3", tmp_path) is None
