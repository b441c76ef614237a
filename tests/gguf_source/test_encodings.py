"""The tokenizer that transformers reads from a GGUF file must encode as llama.cpp does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lilliput.chat.template import encode_text
from lilliput.errors import SourceError
from lilliput.gguf_source.encodings import probe_texts, require_same_encodings
from lilliput.gguf_source.header import Header
from tests.families import CHATML
from tests.matrix.vocabularies import tokenizer

HEADER = Header(Path("model.gguf"), "llama", {}, {}, True)


def opened(backend):
    """Returns a tokenizer of transformers with a chat template."""
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    return made


def published():
    """Returns a tokenizer in SentencePiece's form, which puts a space after each control token, as llama.cpp does."""
    return opened(tokenizer("metaspace", ("<s>", "</s>"), None))


def as_read():
    """Returns the same vocabulary as transformers reads it from a GGUF file."""
    backend = tokenizer("metaspace", ("<s>", "</s>"), None)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    return opened(backend)


def test_a_space_after_each_control_token_is_repaired(tmp_path):
    expected, read = published(), as_read()
    texts = probe_texts(read, [])
    ids = [encode_text(expected, text) for text in texts]
    assert [encode_text(read, text) for text in texts] != ids
    require_same_encodings(HEADER, read, texts, ids)
    read.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [encode_text(again, text) for text in texts] == ids
    assert again.decode(ids[0]) == expected.decode(ids[0])


def test_equal_encodings_change_nothing():
    read = as_read()
    before = read.backend_tokenizer.to_str()
    texts = probe_texts(read, [])
    require_same_encodings(HEADER, read, texts, [encode_text(read, text) for text in texts])
    assert read.backend_tokenizer.to_str() == before


def test_another_difference_is_rejected_with_both_encodings_and_a_remedy():
    read = opened(tokenizer("gpt-2", ("<s>", "</s>", "<unk>"), None))
    digits = opened(tokenizer("smollm", ("<s>", "</s>", "<unk>"), None))
    text = "<s> 12 12"
    wrong = [*encode_text(digits, text)[:-1], 7]
    with pytest.raises(SourceError, match=r"model\.gguf: .*'<s> 12 12' differently from llama\.cpp.*safetensors"):
        require_same_encodings(HEADER, read, [text], [wrong])


def test_new_tokens_are_not_asked_of_llama_cpp():
    read = as_read()
    new = read.convert_tokens_to_ids("</s>")
    assert not [text for text in probe_texts(read, [new]) if "</s>" in text]
    assert [text for text in probe_texts(read, []) if text.startswith("</s>")]
