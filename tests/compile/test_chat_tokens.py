"""Compiled models and bundles of several families encode questions as evaluation does, and stop at end tokens."""

import json
from datetime import datetime

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from lilliput.artifacts import seal
from lilliput.chat.template import (
    PINNED_DATE,
    conversation,
    encode_prompt,
    encode_text,
    end_ids,
    read_generation_config,
    render,
)
from lilliput.compile.bundle import BundleSettings, write_bundle
from lilliput.compile.gguf import compile_gguf
from lilliput.compile.onnx import compile_onnx
from lilliput.compile.parity import prove_parity
from lilliput.compress.load import load
from lilliput.config import GgufTarget, LoadConfig, OnnxTarget
from lilliput.errors import CompileError
from lilliput.models import random_model
from lilliput.runtime.llamacpp import LlamaCppRuntime
from lilliput.saving import save_model
from tests.contexts import context
from tests.families import BOS, CHATML, DATED, DATED_BY_VARIABLE, GEMMA, OTHER_END, OWN_END, TURN_END, make_source

SYSTEM = 'Say "I don\'t know" if so.'
QUESTION = "What is the capital of São Tomé,  漢字 or 🙂?"
GGUF = GgufTarget(candidate="small", target="gguf")


@pytest.fixture(scope="module")
def padded(tokenizer, tmp_path_factory):
    """A model with more rows than tokens; with exactly 49152 rows llama.cpp's converter never adds a BOS token."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49184,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("padded")
    save_model(random_model(config, seed=0), tokenizer, folder)
    return folder


def adds_bos(tokenizer):
    tokenizer.bos_token, tokenizer.add_bos_token = BOS, True


def has_bos(tokenizer):
    tokenizer.bos_token = BOS


def base_eos(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"


SLOW = pytest.mark.slow
FAMILIES = {
    "no BOS": (CHATML, lambda tokenizer: None),
    "BOS added by the tokenizer, not by the template": (CHATML, adds_bos),
    "BOS in the template": (GEMMA, has_bos),
    "BOS in the template and added by the tokenizer": (GEMMA, adds_bos),
    "EOS is not the end of a turn": (OWN_END, base_eos),
}


@pytest.fixture
def base(padded, tmp_path, monkeypatch, recwarn):
    """Makes the candidate `base` of a family."""
    # llama.cpp identifies a pre-tokenizer by its output, BOS included; all families here use SmolLM2's BPE.
    monkeypatch.setattr("conversion.base.TextModel.get_vocab_base_pre", lambda *_: "smollm")

    def make(template, edit=lambda tokenizer: None, generation=None):
        source = make_source(padded, tmp_path / "source", template, edit, generation)
        loaded = load(context(source), LoadConfig(dtype="float32", seed=0))
        save_model(loaded.model, loaded.tokenizer, tmp_path / "base")
        recwarn.clear()  # the warning about a merged system prompt is tested elsewhere
        return tmp_path / "base", AutoTokenizer.from_pretrained(tmp_path / "base")

    return make


def in_gguf(checkpoint, folder):
    folder.mkdir()
    compile_gguf(checkpoint, folder, GGUF)
    return LlamaCppRuntime(folder / "model.gguf", threads=1, context_tokens=256)


def bundled(checkpoint, compiled, target, folder):
    config = {"candidate": "small", "target": target}
    manifest = seal(compiled, candidate="x", strategy=target, config=config, parent=None, parameters=1, facts={})
    folder.mkdir()
    write_bundle(folder, compiled, checkpoint, manifest, BundleSettings("phone", 1, 256, SYSTEM, 24, None))
    return json.loads((folder / "prompt.json").read_text())


def filled(template, system="{{system}}", question="{{question}}"):
    return template.replace(system, SYSTEM).replace(question, QUESTION)


def llama_ids(runtime, text):
    """Tokenises as llama.cpp and Ollama do: with the special tokens that the file tells them to add."""
    return runtime._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[SLOW] * (name in ("no BOS", "BOS in the template"))) for name in FAMILIES]
)
def test_llama_cpp_and_the_bundle_encode_prompts_as_evaluation_does(family, base, tmp_path):
    checkpoint, tokenizer = base(*FAMILIES[family])
    expected = encode_prompt(tokenizer, SYSTEM, QUESTION)
    assert expected.count(tokenizer.convert_tokens_to_ids(BOS)) == ("BOS in the template" in family)
    runtime = in_gguf(checkpoint, tmp_path / "gguf")
    assert runtime.chat_ids(conversation(SYSTEM, QUESTION)) == expected  # as the gateway's server does
    prompt = bundled(checkpoint, tmp_path / "gguf", "gguf", tmp_path / "bundle")
    assert llama_ids(runtime, filled(prompt["template"])) == expected
    modelfile = (tmp_path / "bundle" / "Modelfile").read_text()
    ollama = modelfile.partition('TEMPLATE """')[2].partition('"""')[0]
    assert llama_ids(runtime, filled(ollama, "{{ .System }}", "{{ .Prompt }}")) == expected
    stops = [line.removeprefix("PARAMETER stop ") for line in modelfile.splitlines() if "PARAMETER stop" in line]
    ends = end_ids(tokenizer, read_generation_config(checkpoint))
    assert stops == [f'"{token}"' for token in tokenizer.convert_ids_to_tokens(ends)]


@SLOW
@pytest.mark.parametrize("family", ["no BOS", "BOS in the template and added by the tokenizer"])
def test_onnx_runtime_encodes_prompts_as_evaluation_does_and_stops_at_every_end_token(family, base, tmp_path):
    import onnxruntime_genai

    template, edit = FAMILIES[family]
    checkpoint, tokenizer = base(template, edit, {"eos_token_id": [0, 2]})
    compiled = tmp_path / "onnx"
    compiled.mkdir()
    compile_onnx(checkpoint, compiled, OnnxTarget(candidate="small", target="onnx"))
    prompt = bundled(checkpoint, compiled, "onnx", tmp_path / "bundle")
    genai = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "bundle")))
    assert genai.encode(filled(prompt["template"])).tolist() == encode_prompt(tokenizer, SYSTEM, QUESTION)
    assert sorted(genai.eos_token_ids) == end_ids(tokenizer, read_generation_config(checkpoint))


def keys(folder):
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}


def test_llama_cpp_stops_at_every_end_token(base, tmp_path):
    third = 12  # <jupyter_text>
    checkpoint, tokenizer = base(OWN_END, lambda t: setattr(t, "eos_token", OTHER_END), {"eos_token_id": [third]})
    ends = end_ids(tokenizer, read_generation_config(checkpoint))
    assert ends == sorted([*tokenizer.convert_tokens_to_ids([TURN_END, OTHER_END]), third])
    runtime = in_gguf(checkpoint, tmp_path / "gguf")
    metadata = keys(tmp_path / "gguf")
    assert metadata["eos_token_id"] == tokenizer.convert_tokens_to_ids(OTHER_END)
    assert metadata["eot_token_id"] == tokenizer.convert_tokens_to_ids(TURN_END)
    assert metadata["eom_token_id"] == third
    for token in (*ends, 14):
        # The bias makes llama.cpp write this token and no other.
        answer = runtime._complete([5, 6], n_predict=4, logit_bias=[[token, 1e5]])
        written = 1 if token in ends else 4
        assert answer["usage"]["completion_tokens"] == written, token
        assert answer["choices"][0]["finish_reason"] == ("stop" if token in ends else "length")


def test_the_default_model_s_file_names_exactly_one_end_token(base, tmp_path):
    checkpoint, _ = base(CHATML)
    compile_gguf(checkpoint, tmp_path, GGUF)
    metadata = keys(tmp_path)
    assert metadata["eos_token_id"] == 2
    assert not {"eot_token_id", "eom_token_id"} & metadata.keys()
    assert metadata["add_bos_token"] is False


def test_more_end_tokens_than_gguf_holds_are_rejected(base, tmp_path):
    checkpoint, _ = base(OWN_END, base_eos, {"eos_token_id": [12, 13, 14]})
    with pytest.raises(CompileError, match=r"5 tokens end an answer .* room for three"):
        compile_gguf(checkpoint, tmp_path, GGUF)


@pytest.mark.parametrize(
    ("template", "form"), [(DATED, "%B %d, %Y"), pytest.param(DATED_BY_VARIABLE, "%d %b %Y", marks=SLOW)]
)
def test_a_bundle_has_a_placeholder_for_today_s_date(template, form, base, tmp_path):
    checkpoint, tokenizer = base(template)
    runtime = in_gguf(checkpoint, tmp_path / "gguf")
    today = render(tokenizer, conversation(SYSTEM, QUESTION), date=datetime.now())
    assert runtime.chat_ids(conversation(SYSTEM, QUESTION)) == encode_text(tokenizer, today)
    prompt = bundled(checkpoint, tmp_path / "gguf", "gguf", tmp_path / "bundle")
    assert f"{{{{date:{form}}}}}" in prompt["template"]
    for day in (datetime.now(), PINNED_DATE):
        assert day.strftime(form) not in prompt["template"]
    text = prompt["template"].replace(f"{{{{date:{form}}}}}", datetime.now().strftime(form))
    assert llama_ids(runtime, filled(text)) == encode_text(tokenizer, today)
    assert not (tmp_path / "bundle" / "Modelfile").exists()
    readme = (tmp_path / "bundle" / "README.md").read_text()
    assert "not for Ollama" in readme
    assert "`{{date:FORMAT}}` in it is today" in readme


def test_a_bundle_has_the_date_of_evaluation_if_the_template_computes_with_dates(base, tmp_path):
    checkpoint, tokenizer = base("{{ strftime_now('%b') | upper }} " + CHATML)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    prompt = bundled(checkpoint, tmp_path / "gguf", "gguf", tmp_path / "bundle")
    assert filled(prompt["template"]) == render(tokenizer, conversation(SYSTEM, QUESTION))
    assert prompt["template"].startswith("JUL <|im_start|>")
    assert "JUL <|im_start|>" in (tmp_path / "bundle" / "Modelfile").read_text()
    assert "the date in it is that of evaluation, 2024-07-26" in (tmp_path / "bundle" / "README.md").read_text()


def sentencepiece(texts):
    """Trains a tokenizer like Llama 2's: `▁` for spaces, bytes for unknown characters, BOS added."""
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*names, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(texts, trainer)
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in names]
    backend = Tokenizer.from_str(json.dumps(raw))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    return tokenizer


def test_llama_cpp_tokenises_a_sentencepiece_vocabulary_identically(facts, tmp_path):
    texts = [f"{question.question} {' '.join(question.choices)}" for question in facts]
    tokenizer = sentencepiece(texts)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    save_model(random_model(config, seed=0), tokenizer, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    runtime = in_gguf(tmp_path / "source", tmp_path / "gguf")
    for question in (*texts, "Unlike the training texts: café, 漢字, 🙂  x"):
        expected = encode_prompt(tokenizer, SYSTEM, question)
        assert expected.count(1) == 1  # BOS
        assert runtime.chat_ids(conversation(SYSTEM, question)) == expected, question


@pytest.fixture
def prove(facts, tiny_params):
    def run(folder, checkpoint):
        config = tiny_params.parity.model_copy(update={"questions": 4})
        return prove_parity("small", "gguf", folder, checkpoint, facts, {}, SYSTEM, config)

    return run


@pytest.mark.parametrize("template", [GEMMA, pytest.param(DATED, marks=SLOW)])
def test_parity_compares_llama_cpp_s_prompts_with_those_of_evaluation(template, base, prove, tmp_path, monkeypatch):
    checkpoint, _ = base(template, has_bos)
    (tmp_path / "gguf").mkdir()
    compile_gguf(checkpoint, tmp_path / "gguf", GGUF)
    assert prove(tmp_path / "gguf", checkpoint).positions > 0
    add = gguf.GGUFWriter.add_string
    spoilt = template.replace("{{ message['content']", " {{ message['content']")
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_string",
        lambda self, key, text: add(self, key, spoilt if "chat_template" in key else text),
    )
    compile_gguf(checkpoint, tmp_path / "gguf", GGUF)
    with pytest.raises(CompileError, match="encodes the prompt of 'What is the capital of France"):
        prove(tmp_path / "gguf", checkpoint)
