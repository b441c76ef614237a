"""What the matrix tries with each family. Each function is a column: it returns if the result is right.

A LilliputError is a rejection with a message for the user. Any other exception is a fault of the product: the result is
another model, or the user would see a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat.template import (
    encode_answer,
    encode_prompt,
    encode_text,
    end_ids,
    pad_id,
    prompt_messages,
    render,
)
from lilliput.compress.context import Context
from lilliput.compress.load import load
from lilliput.compress.result import Result
from lilliput.config import LoadConfig, Params
from lilliput.data.questions import Question
from lilliput.errors import CompileError, StrategyError
from lilliput.evaluate.accuracy import score_choices
from lilliput.models import open_model
from lilliput.runtime.torch import TorchRuntime
from lilliput.saving import save_model
from lilliput.training.answer_loss import label_loss
from lilliput.training.examples import Example, collate, encode_examples
from tests.contexts import SYSTEM, context
from tests.matrix.families import Family, write_source
from tests.matrix.forks import forked_children

TOKENS = 160  # of the text whose logits are compared
_TOLERANCE = 2e-3  # of a logit, relative to the largest


@dataclass
class Row:
    """A family and its models, made when a column needs them.

    Attributes:
        family: the family.
        scratch: a folder of its own.
        params: settings of the strategies.
        questions: training text and questions.
        proofs: the outcome of the parity check of each compiled folder.
    """

    family: Family
    scratch: Path
    params: Params
    questions: Sequence[Question]
    proofs: dict[Path, CompileError | None] = field(default_factory=dict)

    @cached_property
    def source(self) -> Path:
        """The family's model as its publisher releases it."""
        return write_source(self.family, self.scratch / "source")

    @cached_property
    def base(self) -> Path:
        """The checkpoint that `load` writes."""
        return self._loaded(self.source, "base", "float32")

    @cached_property
    def rounded(self) -> Path:
        """The checkpoint of the base with weights of four bits."""
        from lilliput.compress.rtn import rtn

        return self.keep(rtn(self.context(), self.params.strategies.rtn), "rtn")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def text(self) -> list[int]:
        """Questions with their answers."""
        lines = [f"{question.question} {question.answer}" for question in self.questions if question.answer]
        return self.tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"][:TOKENS]

    @cached_property
    def examples(self) -> list[Example]:
        """Questions with their answers, as training reads them."""
        return encode_examples(self.tokenizer, SYSTEM, self.questions[:6])

    def context(self, **fields: Any) -> Context:
        """Returns the inputs of a strategy whose parent is the base."""
        return context(self.base, self.questions[:12], self.questions[:4], **fields)

    def keep(self, result: Result, name: str) -> Path:
        """Writes a strategy's result as the stage `compress` does, and returns its folder."""
        folder = self.scratch / name
        if result.save:
            folder.mkdir()
            result.save(folder)
        else:
            save_model(result.model, result.tokenizer, folder)
        return folder

    def load(self, source: Path, name: str, dtype: str, gguf_file: str | None = None) -> Path:
        """Loads a source into the folder `name`, and returns it."""
        return self._loaded(source, name, dtype, gguf_file)

    def _loaded(self, source: Path, name: str, dtype: str, gguf_file: str | None = None) -> Path:
        inputs = Context(source, SYSTEM, lambda: context(source, self.questions).corpus, gguf_file=gguf_file)
        return self.keep(load(inputs, LoadConfig(dtype=dtype)), name)


def loads(row: Row) -> None:
    """The checkpoint computes what the source computes, with the same tokens, at once and token by token."""
    require_same_tokens(row, row.source, row.base)
    expected = plain_logits(row.source, row.text)
    model, _ = open_model(row.base)
    require_equal(logits(model, row.text), expected)
    require_steps(model, row.text[:40])


def loads_shards(row: Row) -> None:
    """The same for a source of several files in float16."""
    source = write_source(row.family, row.scratch / "shards", max_shard_size="150KB", dtype=torch.float16)
    assert len(list(source.glob("*.safetensors"))) > 1
    base = row.load(source, "from shards", "float16")
    require_equal(logits(open_model(base)[0], row.text), plain_logits(source, row.text))


def loads_gguf(row: Row) -> None:
    """A GGUF file of the family opens as the same model, with the same tokens."""
    from lilliput.artifacts import GGUF

    with forked_children():
        base = row.load(gguf_of(row, row.base), "from gguf", "float32", GGUF)
    actual = logits(open_model(base)[0], row.text)  # some converters drop rows without a token
    require_equal(actual, plain_logits(row.base, row.text)[:, : actual.shape[1]])
    require_same_tokens(row, row.base, base)


def evaluates(row: Row) -> None:
    """The reference runtime scores and answers as plain transformers does, text by text."""
    model, tokenizer = open_model(row.base)
    runtime = TorchRuntime(model, tokenizer, 4)
    asked = [question for question in row.questions if question.choices][:3]
    for question, scores in zip(asked, score_choices(runtime, tokenizer, SYSTEM, asked), strict=True):
        prompt = encode_prompt(tokenizer, SYSTEM, question)
        answers = [encode_answer(tokenizer, choice, end=False) for choice in question.choices]
        expected = [_likelihood(model, prompt, answer) / len(answer) for answer in answers]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-3, atol=1e-3)
    prompts = [encode_prompt(tokenizer, SYSTEM, question) for question in asked]
    assert runtime.generate(prompts, 6) == [_greedy(model, tokenizer, prompt, 6) for prompt in prompts]


def _likelihood(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    rows = logits(model, prompt + answer).log_softmax(-1)[len(prompt) - 1 : -1]
    return float(rows.gather(1, torch.tensor(answer)[:, None]).sum())


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], count: int) -> str:
    ids, ends = list(prompt), end_ids(tokenizer, model.generation_config)
    for _ in range(count):
        token = int(logits(model, ids)[-1].argmax())
        if token in ends:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)).strip()


def trains_lora(row: Row) -> None:
    """The loss is that of plain transformers; training changes the model; the merged checkpoint reopens."""
    from lilliput.compress.lora import lora

    require_same_loss(row)
    _require_trained(row, lora(row.context(), row.params.strategies.lora), "lora")


def trains_distill(row: Row) -> None:
    """Training towards a teacher changes the model, whose checkpoint reopens."""
    from lilliput.compress.distill import distill

    _require_trained(row, distill(row.context(teacher=row.base), row.params.strategies.distill), "distill")


def _require_trained(row: Row, result: Result, name: str) -> None:
    reopened = require_reopens(row, result, name)
    assert (logits(reopened, row.text) - plain_logits(row.base, row.text)).abs().max() > 1e-6, "nothing was learnt"


def require_same_loss(row: Row) -> None:
    """Asserts that the training loss of a batch is transformers' loss of its texts, each run by itself."""
    model, tokenizer = open_model(row.base)
    total, tokens = 0.0, 0
    for example in row.examples:
        labels = torch.tensor(example.labels[1:])
        losses = cross_entropy(logits(model, example.input_ids)[:-1], labels, ignore_index=-100, reduction="sum")
        total, tokens = total + float(losses), tokens + int((labels != -100).sum())
    with torch.inference_mode():
        loss = label_loss(model, collate(row.examples, pad_id(tokenizer)))
    torch.testing.assert_close(float(loss), total / tokens, rtol=1e-4, atol=1e-4)


def prunes(method: str) -> Callable[[Row], None]:
    """Returns the column of a pruning method."""

    def column(row: Row) -> None:
        from lilliput.compress.prune import prune
        from lilliput.config import PruneConfig

        removed = {"neurons": 32, "hidden": 32, "kv_groups": open_model(row.base)[0].config.num_key_value_heads // 2}
        amount = {"by": "removed_count", "value": removed.get(method, 1)}
        settings = PruneConfig(method=method, amount=amount, multiple=32, calibration_examples=4)
        result = prune(row.context(), settings)
        reopened = require_reopens(row, result, method)
        assert sum(weight.numel() for weight in reopened.parameters()) < sum(
            weight.numel() for weight in open_model(row.base)[0].parameters()
        )

    column.__doc__ = f"The model without some {method} reopens as the same model, smaller than its parent."
    return column


def sparsifies(row: Row) -> None:
    """Half of the weights of each linear layer are zero, also after reopening."""
    from lilliput.compress.sparsify import sparsify

    result = sparsify(row.context(), row.params.strategies.sparsify)
    require_reopens(row, result, "sparsify")
    assert 0.45 < result.facts["zeros"] < 0.55


def quantises(name: str) -> Callable[[Row], None]:
    """Returns the column of a quantisation method."""

    def column(row: Row) -> None:
        import importlib

        strategy = getattr(importlib.import_module(f"lilliput.compress.{name}"), name)
        folder = f"{name} again" if name == "rtn" else name
        require_reopens(row, strategy(row.context(), getattr(row.params.strategies, name)), folder, codes=True)

    column.__doc__ = f"The checkpoint of `{name}` reopens as the model in memory, whose linear layers are codes."
    return column


def splits(name: str) -> Callable[[Row], None]:
    """Returns the column of a mixture of experts."""

    def column(row: Row) -> None:
        import importlib

        strategy = getattr(importlib.import_module(f"lilliput.compress.{name}"), name)
        require_reopens(row, strategy(row.context(), getattr(row.params.strategies, name)), name)

    column.__doc__ = f"The mixture of `{name}` reopens as the same model."
    return column


def compiles_gguf(row: Row) -> None:
    """llama.cpp predicts and encodes prompts as the checkpoint does, in floats and with codes of four bits.

    A family that `rtn` rejects has floats only; its message is in the column of `rtn`.
    """
    require_parity(row, "gguf", gguf_of(row, row.base), row.base)
    try:
        rounded = row.rounded
    except StrategyError:
        return
    require_parity(row, "gguf", gguf_of(row, rounded), rounded, codes=True)


def compiles_onnx(row: Row) -> None:
    """ONNX Runtime predicts as the checkpoint does, in floats and with codes of four bits."""
    from lilliput.compile.onnx import compile_onnx
    from lilliput.config import OnnxTarget

    for name in ("base", "rounded"):
        checkpoint, target = getattr(row, name), row.scratch / f"onnx of {name}"
        target.mkdir()
        settings = OnnxTarget(candidate=name, target="onnx", embeddings="int8", deadline_s=300.0)
        with forked_children():
            compile_onnx(checkpoint, target, settings)
        require_parity(row, "onnx", target, checkpoint, codes=name == "rounded")


def compiles_autogptq(row: Row) -> None:
    """The export opens as the same model."""
    from lilliput.compile.autogptq import compile_autogptq
    from lilliput.config import AutogptqTarget

    target = row.scratch / "autogptq"
    target.mkdir()
    compile_autogptq(row.rounded, target, AutogptqTarget(candidate="rounded", target="autogptq"))
    require_equal(logits(open_model(target)[0], row.text), logits(open_model(row.rounded)[0], row.text))


def serves(row: Row) -> None:
    """llama.cpp's server answers a question from the bundle as the reference runtime does."""
    import httpx

    from lilliput.artifacts import GGUF, seal
    from lilliput.compile.bundle import BundleSettings, write_bundle
    from lilliput.llama_server.process import LlamaServer, ServerSettings

    compiled, folder = gguf_of(row, row.base), row.scratch / "bundle"
    require_parity(row, "gguf", compiled, row.base)
    manifest = seal(
        compiled,
        candidate="base-gguf",
        strategy="gguf",
        config={"candidate": "base"},
        parent=None,
        parameters=1,
        facts={},
    )
    folder.mkdir()
    settings = BundleSettings(
        device="phone", threads=1, context_tokens=256, system_prompt=SYSTEM, max_new_tokens=6, licence=None
    )
    write_bundle(folder, compiled, row.base, manifest, settings)
    assert "{{question}}" in json.loads((folder / "prompt.json").read_text())["template"]
    messages, prompt, expected = _answer_to_compare(row, TorchRuntime(*open_model(row.base), 1))
    with LlamaServer(ServerSettings(str(folder / GGUF), 1, 256)) as server:

        def post(path: str, **body: Any) -> dict[str, Any]:
            headers = {"Authorization": f"Bearer {server.key}"}
            answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60.0)
            assert answer.status_code == 200, answer.text
            return answer.json()

        chat = post("/v1/chat/completions", messages=messages, temperature=0.0, max_tokens=6)
        text = post("/apply-template", messages=messages)["prompt"]
        plain = post("/completion", prompt=text, temperature=0.0, n_predict=6, return_tokens=True)
    assert chat["usage"]["prompt_tokens"] == plain["tokens_evaluated"] == len(prompt), f"{chat}, {len(prompt)} expected"
    answered = plain["tokens"]
    assert answered and answered == expected[: len(answered)], f"answered {answered}, expected {expected}"
    # The server stops at each control token that ends texts in some family.
    stopped = {*answered[-1:], *expected[len(answered) :][:1]} & row.tokenizer.added_tokens_decoder.keys()
    assert len(answered) == len(expected) or stopped, f"answered {answered}, expected {expected}"
    content = chat["choices"][0]["message"]["content"]  # a chat's answer has no ids, and begins without spaces
    assert content.strip() == plain["content"].strip(), f"answered {content!r}, expected {plain['content']!r}"


def _answer_to_compare(row: Row, runtime: TorchRuntime) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """Returns a conversation, its prompt with today's date, which the server inserts, and the answer.

    The answer does not end at once. It begins with a token of a text, if the model writes one.
    """
    control, ends = row.tokenizer.added_tokens_decoder, end_ids(row.tokenizer, runtime.model.generation_config)
    found = []
    for question in row.questions[:16]:
        messages = prompt_messages(row.tokenizer, SYSTEM, question)
        prompt = encode_text(row.tokenizer, render(row.tokenizer, messages, date=datetime.now()))
        answer = list(runtime.stream(prompt, 6))
        if answer[0] not in ends:
            found.append((messages, prompt, answer))
    return min(found, key=lambda one: one[2][0] in control)


def gguf_of(row: Row, checkpoint: Path) -> Path:
    """Returns the folder of the GGUF file of `checkpoint`, floats in float32; compiled once."""
    from lilliput.artifacts import GGUF
    from lilliput.compile.gguf import compile_gguf
    from lilliput.config import GgufTarget
    from tests.matrix.recognised import recognised

    target = row.scratch / f"gguf of {checkpoint.name}"
    if not (target / GGUF).is_file():
        target.mkdir(exist_ok=True)
        with recognised(row.family.pre):
            compile_gguf(checkpoint, target, GgufTarget(candidate="a", target="gguf", floats="f32", embeddings="f32"))
    return target


def require_parity(row: Row, target: str, folder: Path, checkpoint: Path, *, codes: bool = False) -> None:
    """Runs the product's parity check; with codes, engines round activations to 8 bits, so it is less strict."""
    from lilliput.compile.parity import prove_parity

    strict = {"same_argmax": 0.97, "same_argmax_clear": 1.0, "mean_difference_nats": 0.01}
    loose = {"same_argmax": 0.8, "same_argmax_clear": 0.97, "mean_difference_nats": 0.1}
    limits = row.params.parity.model_copy(update={"questions": 4, "tokens": 64, **(loose if codes else strict)})
    if folder not in row.proofs:
        try:
            with forked_children():
                prove_parity("a", target, folder, checkpoint, row.questions[:16], {}, SYSTEM, limits)
            row.proofs[folder] = None
        except CompileError as error:
            row.proofs[folder] = error
    if error := row.proofs[folder]:
        raise error


def logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Returns the logits of a text, float32 (tokens, vocabulary)."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def plain_logits(checkpoint: Path, ids: Sequence[int]) -> torch.Tensor:
    """Returns the logits of a text from plain transformers in float32."""
    return logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval(), ids)


def require_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equal logits, which differ from token to token."""
    assert expected.std(0).mean() > 1e-3, "these logits hardly depend on the text"
    difference = float((actual - expected).abs().max())
    assert difference <= _TOLERANCE * float(expected.abs().max()), f"logits differ by {difference:.3g}"


def require_steps(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Asserts that the model computes the same token by token, with its cache, as at once."""
    expected, cache, rows = logits(model, ids), None, []
    with torch.inference_mode():
        for token in ids:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1])
    require_equal(torch.stack(rows).float(), expected)


def require_reopens(row: Row, result: Result, name: str, *, codes: bool = False) -> PreTrainedModel:
    """Asserts that a result reopens as the model in memory, at once and token by token, and returns it."""
    folder = row.keep(result, name)
    expected = logits(result.model.float().eval(), row.text)
    reopened, _ = open_model(folder)
    require_equal(logits(reopened, row.text), expected)
    require_steps(reopened, row.text[:24])
    if codes:
        from lilliput.codes import read_codes

        assert len(dict(read_codes(folder))) > 0
    elif not (folder / "adapter").exists():
        require_equal(plain_logits(folder, row.text), expected)
    return reopened


_TEXTS = ("What is the capital of France in 1912 or 12345?\n\nZürich's Ω 東京 🙂 ~", SYSTEM)


def require_same_tokens(row: Row, source: Path, base: Path) -> None:
    """Asserts that the base encodes texts and whole prompts as the source's tokenizer does.

    BOS before plain texts is not compared: the template writes it, and GGUF files written here say so.
    """
    published, kept = (AutoTokenizer.from_pretrained(folder) for folder in (source, base))
    for text in _TEXTS:
        expected = published(text, add_special_tokens=False)["input_ids"]
        assert kept(text, add_special_tokens=False)["input_ids"] == expected, text
    if published.chat_template == kept.chat_template:  # else `load` has put the system prompt into the question
        for question in row.questions[:3]:
            expected = encode_prompt(published, SYSTEM, question)
            assert encode_prompt(kept, SYSTEM, question) == expected, question.question


COLUMNS: Mapping[str, Callable[[Row], None]] = {
    "load": loads,
    "shards": loads_shards,
    "GGUF source": loads_gguf,
    "evaluate": evaluates,
    "lora": trains_lora,
    "distill": trains_distill,
    "prune: block_influence": prunes("block_influence"),
    "prune: perplexity": prunes("perplexity"),
    "prune: neurons": prunes("neurons"),
    "prune: kv_groups": prunes("kv_groups"),
    "prune: query_heads": prunes("query_heads"),
    "prune: hidden": prunes("hidden"),
    "sparsify": sparsifies,
    "gptq": quantises("gptq"),
    "awq": quantises("awq"),
    "rtn": quantises("rtn"),
    "moe": splits("moe"),
    "experts": splits("experts"),
    "GGUF": compiles_gguf,
    "ONNX": compiles_onnx,
    "AutoGPTQ": compiles_autogptq,
    "serve": serves,
}
EXPORTS = ("GGUF source", "GGUF", "ONNX", "AutoGPTQ", "serve")  # seconds each: other processes
