"""Model folders with code, references to other folders or damaged headers are rejected with documented errors."""

import json
import os
import shutil
import struct

import gguf
import numpy as np
import pytest
from hypothesis import strategies as st

from lilliput.artifacts import seal, verify
from lilliput.compile.autogptq import compile_autogptq
from lilliput.compile.gguf import compile_gguf
from lilliput.compile.onnx import compile_onnx
from lilliput.compress.load import load
from lilliput.config import AutogptqTarget, GgufTarget, LoadConfig, OnnxTarget
from lilliput.devices import runs
from lilliput.errors import ArtifactError, LilliputError
from lilliput.models import open_model, random_model
from lilliput.saving import save_model
from lilliput.untrusted import PICKLES, require_harmless
from tests.contexts import context
from tests.hostile.fuzzing import altered, damaged, examples, run

LOAD = LoadConfig(dtype="float32", seed=0)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A checkpoint of a few kilobytes: two layers, a vocabulary of six words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<unk>", "<s>", "</s>", "a", "b", "c"))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("little")
    save_model(random_model(config, seed=0), tokenizer, folder)
    return folder


@pytest.fixture
def folder(little, tmp_path):
    return shutil.copytree(little, tmp_path / "model")


def add(path, key, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def pickle_of_an_adapter(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def code_in_config(folder):
    add(folder / "config.json", "auto_map", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")


def code_in_tokenizer(folder):
    add(folder / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Evil", None]})
    (folder / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")


def code_on_the_hub(folder):
    add(folder / "config.json", "auto_map", {"AutoConfig": "someone/model--evil.Evil"})


def code_deep_down(folder):
    add(folder / "config.json", "text_config", {"auto_map": {"AutoConfig": "evil.Evil"}})


def kernel_on_the_hub(folder):
    add(folder / "config.json", "attn_implementation", "someone/kernel:evil")


def kernel_of_a_part(folder):
    add(folder / "config.json", "_attn_implementation", {"text_config": "someone/kernel"})


def another_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model", "peft_type": "LORA"}')


def link_to_weights(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def link_to_a_folder(folder):
    (folder / "adapter").symlink_to(folder.parent)


def dangling_link(folder):
    (folder / "vocab.txt").symlink_to(folder / "nowhere")


def pipe(folder):
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")


def shard_elsewhere(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_that_is_a_pickle(folder):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "weights"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


TRICKS = [
    pickle,
    pickle_of_an_adapter,
    code_in_config,
    code_in_tokenizer,
    code_on_the_hub,
    code_deep_down,
    kernel_on_the_hub,
    kernel_of_a_part,
    another_model,
    link_to_weights,
    link_to_a_folder,
    dangling_link,
    pipe,
    shard_elsewhere,
    shard_that_is_a_pickle,
]
OPENERS = {
    "open": open_model,
    "load": lambda folder: load(context(folder), LOAD),
    "gguf": lambda folder: compile_gguf(folder, folder.parent, GgufTarget(candidate="a", target="gguf")),
    "onnx": lambda folder: compile_onnx(folder, folder.parent, OnnxTarget(candidate="a", target="onnx")),
    "autogptq": lambda folder: compile_autogptq(
        folder, folder.parent, AutogptqTarget(candidate="a", target="autogptq")
    ),
    "verify": verify,
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("trick", TRICKS)
def test_every_opener_rejects_code_and_references_to_other_folders(trick, opener, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    if opener == "verify":
        seal(folder, candidate="a", strategy="load", config={}, parent=None, parameters=1, facts={})
    trick(folder)
    with pytest.raises(ArtifactError, match=str(folder)):
        OPENERS[opener](folder)
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("suffix", sorted(PICKLES))
def test_every_kind_of_pickle_is_rejected_in_any_case(suffix, folder):
    require_harmless(folder)
    (folder / f"Weights{suffix.upper()}").write_bytes(b"")
    with pytest.raises(ArtifactError, match="pickles run code"):
        require_harmless(folder)


def test_the_little_checkpoint_itself_opens(folder):
    model, _ = open_model(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2000
    assert load(context(folder), LOAD)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a": ' * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_descriptions_that_are_not_json_objects_are_rejected(name, text, folder):
    (folder / name).write_bytes(text.encode("latin-1"))
    for opener in ("open", "load", "gguf"):
        with pytest.raises(ArtifactError, match=name):
            OPENERS[opener](folder)


def test_a_missing_weight_is_not_initialised_randomly(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for opener in ("open", "load"):
        with pytest.raises(
            ArtifactError, match=r"1 weights are missing, for example model\.layers\.1\.mlp\.up_proj\.weight"
        ):
            OPENERS[opener](folder)


def assert_opens_or_fails(folder, openers):
    for opener in openers:
        try:
            OPENERS[opener](folder)
        except LilliputError as error:
            assert str(folder) in str(error)


@examples(25, 2000)
def test_damaged_safetensors_headers(count, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, weights = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def packed(tree):
        text = json.dumps(tree).encode()
        return struct.pack("<Q", len(text)) + text + weights

    def body(content):
        path.write_bytes(content)
        assert_opens_or_fails(folder, ["open", "load"])

    run(count, st.one_of(altered(header).map(packed), damaged(whole, 8), damaged(whole, 8 + length)), body)


SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
}


@examples(25, 2000)
def test_altered_configs(count, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())

    def body(tree):
        if isinstance(tree, dict) and any(isinstance(tree.get(key), int) and tree[key] > 1 << 20 for key in SIZES):
            return  # sizes beyond the memory are not tested
        path.write_text(json.dumps(tree))
        assert_opens_or_fails(folder, ["open", "load"])

    run(count, altered(config), body)


@pytest.fixture(scope="module")
def little_gguf(tmp_path_factory):
    """A Llama of one layer and a byte-level vocabulary of 300 as GGUF, written tensor by tensor."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    written = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]  # characters that represent bytes
    plain = [chr(place) for place in (*written, *range(400, 440))]
    writer.add_token_list([*plain, "ab", "cd", "<|endoftext|>", "</s>"])
    writer.add_token_types([1] * 298 + [3, 3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(298)
    writer.add_eos_token_id(299)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (300, 32), "output_norm": (32,)}
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "attn_norm": (32,)}
    block |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "ffn_norm": (32,)}
    for name, shape in (shapes | {f"blk.0.{part}": shape for part, shape in block.items()}).items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_little_gguf_itself_opens(little_gguf):
    result = load(context(little_gguf.parent, gguf_file=little_gguf.name), LOAD)
    assert result.tokenizer.decode([296]) == "ab"
    assert sum(parameter.numel() for parameter in result.model.parameters()) < 20_000


def gguf_header(path):
    """Returns the number of bytes before the weights."""
    return gguf.GGUFReader(path).data_offset


@examples(25, 1500)
def test_damaged_gguf_headers(count, little_gguf, tmp_path):
    path = tmp_path / "model.gguf"

    def body(content):
        path.write_bytes(content)
        try:
            load(context(tmp_path, gguf_file=path.name), LOAD)
        except LilliputError as error:
            assert str(tmp_path) in str(error)

    whole, header = little_gguf.read_bytes(), gguf_header(little_gguf)
    run(count, st.one_of(damaged(whole, 64), damaged(whole, 600), damaged(whole, header)), body)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_crash_of_llama_cpp_is_reported_as_an_error(little_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    whole, header = little_gguf.read_bytes(), gguf_header(little_gguf)
    job = runs.DeviceJob("gguf", str(tmp_path), 1, 64, predict=[298, 64, 65, 66])

    def body(content):
        path.write_bytes(content)
        try:
            assert runs.run_on_device(job, memory_bytes=1 << 30, deadline_s=20.0).peak_rss_bytes
        except ArtifactError as error:
            assert str(tmp_path) in str(error)

    run(40, st.one_of(damaged(whole, 64), damaged(whole, 600), damaged(whole, header)), body)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"PK\x03\x04"])
def test_a_server_that_cannot_open_its_model_is_told_at_once(content, tmp_path):
    from lilliput.llama_server.process import LlamaServer, ServerSettings

    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=str(path)):
        LlamaServer(ServerSettings(str(path), 1, 64))


@pytest.mark.slow
def test_a_damaged_onnx_folder_is_an_error(tmp_path):
    (tmp_path / "genai_config.json").write_text('{"model": {"type": "llama", "decoder": {"filename": "model.onnx"}}}')
    (tmp_path / "model.onnx").write_bytes(b"\x08\xff" * 100)
    job = runs.DeviceJob("onnx", str(tmp_path), 1, 64, predict=[1, 2])
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        runs.run_on_device(job, memory_bytes=None, deadline_s=60.0)
