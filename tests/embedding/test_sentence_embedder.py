import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from lilliput.config import EmbedderConfig
from lilliput.embedding.sentence_embedder import FILES, open_embedder
from lilliput.errors import DataError, SourceError
from lilliput.wheels import default_cache
from tests.data.conftest import keep_wheel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
TEXTS = ["a", "a b c d e f g h a b", "h g", "c d e"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A tiny random BERT in a wheel, and the model itself."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({}))
    cache = tmp_path_factory.mktemp("wheels")
    pin = keep_wheel(cache, "bert", {f"bert/model/{name}": (folder / name).read_bytes() for name in FILES})
    return EmbedderConfig(**pin, folder="bert/model"), cache, model


def plain(model, text):
    ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
    with torch.inference_mode():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
    return (mean / mean.norm()).numpy()


def test_batched_embeddings_equal_normalized_means_of_hidden_states(packed):
    config, cache, model = packed
    embedder = open_embedder(config, cache)
    expected = np.stack([plain(model, text) for text in TEXTS])
    assert embedder.embed(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert embedder.embed(TEXTS).dtype == np.float32
    assert embedder.sha256 == config.sha256


def test_too_long_text_is_rejected_and_does_not_fit(packed):
    config, cache, _ = packed
    embedder = open_embedder(config, cache)
    reads, too_long = " ".join("a" * 254), " ".join("a" * 255)  # and a token before, and one after
    assert (embedder.fits(reads), embedder.fits(too_long)) == (True, False)
    assert embedder.embed([reads]).shape == (1, 16)
    with pytest.raises(DataError, match="257 tokens cannot be embedded: the embedder reads 256"):
        embedder.embed(["a b", too_long])


def test_wheel_without_safetensors_is_rejected(packed, tmp_path):
    pin = keep_wheel(tmp_path / "wheels", "pickled", {"m/config.json": b"{}", "m/pytorch_model.bin": b"pickle"})
    with pytest.raises(SourceError, match=r"no file m/model\.safetensors"):
        open_embedder(EmbedderConfig(**pin, folder="m"), tmp_path / "wheels")


def test_default_embedder_separates_paraphrases(tiny_params):
    try:
        embedder = open_embedder(tiny_params.caching.embedder, default_cache())
    except SourceError as error:
        pytest.skip(f"the embedder's wheel is neither kept nor to be had here: {error}")
    texts = ["What is the capital of Peru?", "Which city is the capital of Peru?", "How do I boil an egg?"]
    question, paraphrase, other = embedder.embed(texts)
    assert question @ paraphrase > 0.8 > 0.3 > question @ other
