"""`load` repairs or rejects tokenizers and templates that do not fit their model or this pipeline."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lilliput.chat.template import conversation, encode_answer, encode_prompt, end_id, end_ids, pad_id, render
from lilliput.compress import load as load_module
from lilliput.compress.chat_format import chat_facts
from lilliput.compress.load import load
from lilliput.config import LoadConfig
from lilliput.errors import SourceError
from lilliput.models import open_model
from lilliput.runtime.torch import TorchRuntime
from lilliput.saving import save_model
from lilliput.training.answer_loss import label_loss
from lilliput.training.examples import collate, encode_examples
from tests.contexts import SYSTEM, context
from tests.families import BEFORE_LAST, BOS, CHATML, DATED, DROPS_SYSTEM, GEMMA, OWN_END, TURN_END, make_source

LOAD = LoadConfig(dtype="float32", seed=0)


@pytest.fixture
def source(checkpoint, tmp_path):
    return lambda template, *arguments, **named: make_source(
        checkpoint, tmp_path / "source", template, *arguments, **named
    )


def model_and_tokenizer(result):
    return result.model, result.tokenizer


def reopened(opened, folder):
    """Saves and reopens a loaded model, as later stages see it."""
    save_model(*opened, folder)
    return open_model(folder)


def check_every_stage(model, tokenizer, facts):
    """Trains on, scores and answers several questions at once, with padding."""
    examples = encode_examples(tokenizer, SYSTEM, facts[:4])
    assert torch.isfinite(label_loss(model, collate(examples, pad_id(tokenizer))))
    prompts = [encode_prompt(tokenizer, SYSTEM, question.question * (n + 1)) for n, question in enumerate(facts[:3])]
    runtime = TorchRuntime(model, tokenizer, 4)
    assert len(runtime.generate(prompts, 3)) == 3
    options = [[encode_answer(tokenizer, "Paris", end=False)] for _ in prompts]
    assert len(runtime.score(prompts, options)) == 3


def test_removes_a_pad_token_beyond_the_table(source, facts, tmp_path):
    folder = source(CHATML, lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}))
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 49152
    with pytest.warns(UserWarning, match=r"1 added tokens have no row in the embedding table of 49152 rows.*\[PAD\]"):
        opened = model_and_tokenizer(load(context(folder), LOAD))
    model, tokenizer = reopened(opened, tmp_path / "base")
    assert max(tokenizer.get_vocab().values()) == 49151
    assert tokenizer.pad_token != "[PAD]"
    assert pad_id(tokenizer) < 49152
    check_every_stage(model, tokenizer, facts)


def test_removes_only_added_tokens_beyond_the_table(source, checkpoint, tmp_path):
    def add(tokenizer):
        tokenizer.add_tokens(["<|tool|>", AddedToken("<|think|>", special=True)])
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|x|>"]})

    folder = source(CHATML, add)
    with pytest.warns(UserWarning, match="3 added tokens"):
        opened = model_and_tokenizer(load(context(folder), LOAD))
    _, tokenizer = reopened(opened, tmp_path / "base")
    original = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.special_tokens_map == original.special_tokens_map
    text = "<|im_start|>user\nWhat is <|tool|>?<|im_end|>\n"
    assert max(tokenizer(text)["input_ids"]) < 49152
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


def test_replaces_an_eos_token_beyond_the_table_by_the_end_of_turn_token(source, facts, tmp_path):
    folder = source(OWN_END, lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|never|>"}))
    with pytest.warns(UserWarning, match=r"<\|never\|>|no EOS token"):
        opened = model_and_tokenizer(load(context(folder), LOAD))
    model, tokenizer = reopened(opened, tmp_path / "base")
    assert tokenizer.eos_token == TURN_END
    check_every_stage(model, tokenizer, facts)


@pytest.mark.parametrize(
    ("template", "edit"),
    [
        (
            CHATML.replace("<|im_end|>", "<|eot|>"),
            lambda t: t.add_special_tokens({"extra_special_tokens": ["<|eot|>"]}),
        ),
        (CHATML.replace("user", "user"), lambda t: t.add_tokens(["assistant"])),
    ],
    ids=["closes turns", "in every prompt"],
)
def test_rejects_a_token_in_use_beyond_the_table(source, template, edit):
    with pytest.raises(SourceError, match="in use have no row in the embedding table of 49152 rows"):
        load(context(source(template, edit)), LOAD)


def test_rejects_a_vocabulary_larger_than_the_table(source):
    folder = source(CHATML)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 49000}))
    with pytest.raises(SourceError, match="152 tokens in use have no row"):
        load(context(folder), LOAD)


def test_rejects_a_padding_index_beyond_the_table(source):
    folder = source(CHATML)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 49152}))
    with pytest.raises(
        SourceError, match=r"config\.json: pad_token_id is 49152, and the embedding table has 49152 rows"
    ):
        load(context(folder), LOAD)


def remove_special_tokens(tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = None


def test_tokenizer_without_eos_and_pad_gets_the_end_of_turn_token(source, facts, tmp_path):
    folder = source(OWN_END, remove_special_tokens, {"eos_token_id": None, "pad_token_id": None})
    assert AutoTokenizer.from_pretrained(folder).eos_token is None
    with pytest.warns(UserWarning, match=f"names no EOS token; {TURN_END} is used"):
        opened = model_and_tokenizer(load(context(folder), LOAD))
    model, tokenizer = reopened(opened, tmp_path / "base")
    assert tokenizer.eos_token == TURN_END
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    check_every_stage(model, tokenizer, facts)


def test_rejects_answers_without_an_end_token(source):
    with pytest.raises(SourceError, match="an answer would never end"):
        load(context(source(CHATML.replace("<|im_end|>", ""), remove_special_tokens)), LOAD)


def test_saved_generation_config_names_every_end_token(source, tmp_path):
    folder = source(
        OWN_END,
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|endoftext|>"),
        {"eos_token_id": [0, 16, 60000], "pad_token_id": 49152},
    )
    model, tokenizer = model_and_tokenizer(load(context(folder), LOAD))
    save_model(model, tokenizer, tmp_path / "base")
    generation = GenerationConfig.from_pretrained(tmp_path / "base")
    turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
    assert generation.eos_token_id == sorted([0, 16, turn_end])  # 60000 is not a token
    assert generation.pad_token_id == turn_end
    again = load(context(tmp_path / "base"), LOAD).model
    assert again.generation_config.eos_token_id == generation.eos_token_id


def test_loads_the_tiny_model_unchanged(checkpoint, tmp_path):
    model, tokenizer = model_and_tokenizer(load(context(checkpoint), LOAD))
    save_model(model, tokenizer, tmp_path / "base")
    for path in checkpoint.iterdir():
        assert (tmp_path / "base" / path.name).read_bytes() == path.read_bytes(), path.name
    assert chat_facts(tokenizer) == {}


@pytest.mark.parametrize(("template", "reason"), [(GEMMA, "rejects"), (DROPS_SYSTEM, "drops"), (BEFORE_LAST, "drops")])
def test_moves_an_unsupported_system_prompt_into_the_first_user_turn(source, facts, tmp_path, template, reason):
    with pytest.warns(UserWarning, match=f"the chat template {reason} the system prompt"):
        opened = model_and_tokenizer(load(context(source(template, lambda t: setattr(t, "bos_token", BOS))), LOAD))
    model, tokenizer = reopened(opened, tmp_path / "base")
    text = tokenizer.decode(encode_prompt(tokenizer, SYSTEM, "Why?"))
    assert f"user\n{SYSTEM}\n\nWhy?" in text
    assert text.count(SYSTEM) == 1
    later = [*conversation(SYSTEM, "Why?", "So."), {"role": "user", "content": "And?"}]
    assert render(tokenizer, later).count(SYSTEM) == 1
    assert "user\nAnd?" in render(tokenizer, later)
    assert chat_facts(tokenizer) == {"system_prompt": "in the first user turn: the model's own template takes none"}
    check_every_stage(model, tokenizer, facts)


def test_extended_template_equals_the_original_without_a_system_prompt(source):
    folder = source("\n" + GEMMA, lambda t: setattr(t, "bos_token", BOS))
    original = AutoTokenizer.from_pretrained(folder)
    with pytest.warns(UserWarning, match="rejects the system prompt"):
        tokenizer = load(context(folder), LOAD).tokenizer
    for messages in (
        [{"role": "user", "content": "Why?"}],
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
    ):
        assert render(tokenizer, messages) == render(original, messages)


HEADLESS = CHATML.partition("{% if add_generation_prompt")[0]


@pytest.mark.parametrize("template", [HEADLESS, HEADLESS + "\n"])
def test_extends_a_template_without_an_answer_header(source, facts, tmp_path, template):
    with pytest.warns(UserWarning, match=r"does not begin the assistant's turn; '<\|im_start\|>assistant\\n' is added"):
        opened = model_and_tokenizer(load(context(source(template)), LOAD))
    model, tokenizer = reopened(opened, tmp_path / "base")
    prompt = render(tokenizer, conversation(SYSTEM, "Why?"))
    whole = render(tokenizer, conversation(SYSTEM, "Why?", "So."), answer_follows=False)
    assert prompt == whole.partition("So.")[0]
    assert prompt.endswith("<|im_start|>assistant\n")
    assert "assistant" not in render(tokenizer, conversation(SYSTEM, "Why?"), answer_follows=False)
    assert load(context(tmp_path / "base"), LOAD).tokenizer.get_chat_template() == tokenizer.get_chat_template()
    check_every_stage(model, tokenizer, facts)


def test_keeps_a_template_whose_prompt_ends_before_a_space(source):
    spaced = (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>"
        "{% else %}[{{ m.role }}] {{ m.content }} [/]{% endif %}{% endfor %}"
    )
    assert load(context(source(spaced)), LOAD).tokenizer.get_chat_template() == spaced


def test_does_not_extend_a_template_twice(source, tmp_path):
    with pytest.warns(UserWarning, match="drops"):
        opened = model_and_tokenizer(load(context(source(DROPS_SYSTEM)), LOAD))
    save_model(*opened, tmp_path / "base")
    assert load(context(tmp_path / "base"), LOAD).tokenizer.get_chat_template() == opened[1].get_chat_template()


def test_dated_template_is_a_fact(source):
    assert chat_facts(load(context(source(DATED)), LOAD).tokenizer) == {"dated_prompt": True}


@pytest.fixture
def unopened(monkeypatch):
    """Fails the test if weights are opened."""

    def opens(*_):
        pytest.fail("the weights were opened first")

    for name in ("open_gguf", "open_safetensors", "random_model"):
        monkeypatch.setattr(load_module, name, opens)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "there is no chat template"),
        ("{{ raise_exception('not today') }}", r"the chat template fails .*TemplateError: not today"),
        ("{{ messages[0].content.nothing.there }}", r"the chat template fails .*UndefinedError"),
        ("{% if %}", r"the chat template fails .*TemplateSyntaxError"),
        ("{{ 1 + 'a' }}", r"the chat template fails .*TypeError"),
        (
            CHATML.replace(
                "{% for", "{% if messages|length == 3 %}{{ raise_exception('no answers') }}{% endif %}{% for", 1
            ),
            "TemplateError: no answers",
        ),
        ("<|im_start|>{{ messages[0]['content'] }}<|im_end|>", "drops or changes the text of the role user"),
        (CHATML.replace("['content']", "['content'] | lower"), "drops or changes the text"),
        (
            "{% for message in messages[:2] %}{{ message['content'] }}<|im_end|>{% endfor %}",
            "drops or changes the text of the role assistant",
        ),
    ],
)
def test_rejects_an_unusable_template_before_opening_weights(source, template, message):
    with pytest.raises(SourceError, match=message):
        load(context(source(template)), LOAD)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("model", [models.BPE, models.WordLevel])
def test_rejects_a_tokenizer_that_loses_text(checkpoint, tmp_path, model):
    backend = Tokenizer(
        model(
            vocab={text: n for n, text in enumerate("abcdefghijklmnopqrstuvwxyz~<|>_-")},
            **({"merges": []} if model is models.BPE else {"unk_token": "?"}),
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = make_source(checkpoint, tmp_path / "source", CHATML)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML.replace("\n", "")
    tokenizer.save_pretrained(folder)
    with pytest.raises(SourceError, match=r"cannot encode .* has no unknown token to replace it"):
        load(context(folder), LOAD)


def test_every_end_token_ends_an_answer_in_the_reference_runtime(source, facts, tmp_path):
    folder = source(
        OWN_END, lambda t: setattr(t, "eos_token", "<|endoftext|>"), {"eos_token_id": [49151]}
    )  # no end-of-turn token among them
    model, tokenizer = reopened(model_and_tokenizer(load(context(folder), LOAD)), tmp_path / "base")
    runtime = TorchRuntime(model, tokenizer, 2)
    prompt = encode_prompt(tokenizer, SYSTEM, facts[0].question)
    free = list(TorchRuntime(model, tokenizer, 2).stream(prompt, 3))
    ends = end_ids(tokenizer, model.generation_config)
    assert ends == sorted([0, end_id(tokenizer), 49151])
    assert not {*free} & {*ends}
    for end in ends:
        force_token(model, end)
        assert list(runtime.stream(prompt, 3)) == [end]
        assert runtime.generate([prompt, prompt], 3) == ["", ""]
        ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=3)
        assert ids[0, len(prompt) :].tolist() == [end]  # plain transformers stops too


def force_token(model, token):
    """Makes `model` predict `token` for any input."""
    with torch.no_grad():
        table = model.get_output_embeddings().weight
        model.model.norm.weight.zero_()
        if not hasattr(model, "forced"):
            model.forced = torch.nn.Linear(table.shape[1], table.shape[0])
            model.lm_head = model.forced
        model.forced.weight.zero_()
        model.forced.bias.zero_()
        model.forced.bias[token] = 1.0
