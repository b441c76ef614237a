import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from lilliput.artifacts import parse_record
from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.chat_templates.built_in import BUILT_IN_TEMPLATES
from lilliput.data.conversations import Conversation
from lilliput.errors import DataError
from lilliput.evaluate import accessibility
from lilliput.evaluate.accessibility import TimedQuery, fits, kv_cache_bytes, quantiles
from lilliput.evaluate.quality import stratified_sample
from lilliput.evaluate_candidate import evaluate_candidate
from lilliput.models import open_model
from lilliput.records import EvaluationRecord, Quantiles


@pytest.fixture(scope="module")
def evaluation(checkpoint, facts, tiny_params):
    return evaluate_candidate(
        checkpoint,
        "tiny",
        facts,
        tiny_params,
        contaminated=[facts[0].id],
        root=checkpoint,
        artifact_sha256="a" * 64,
        size_bytes=10 * 2**20,
        parameters=1000,
    )


def test_record_holds_everything_and_is_json_without_nan(evaluation):
    content = json.dumps(evaluation.record.as_json(), allow_nan=False)
    assert json.loads(content).keys() == EvaluationRecord.model_fields.keys() - {"does_not_fit"}
    record = parse_record(EvaluationRecord, content, "a.json")
    assert record == evaluation.record
    assert record.accuracy_choice.n == 16
    assert record.hallucination_rate.n == 8 + 4
    assert record.ttft_ms.n == 3
    assert record.fits.keys() == {"phone-4gb", "laptop"}
    assert record.peak_rss_bytes > 10**8


def test_questions_that_overlap_with_the_training_text_are_labelled(evaluation):
    assert evaluation.record.contaminated_questions == 1
    assert len([row for row in evaluation.answers if row.get("contaminated")]) == 1


def test_a_draw_gives_each_relation_its_share(facts):
    known = [question for question in facts if question.answerable]
    sizes = Counter(question.relation for question in known)
    drawn = stratified_sample(known, len(known) // 2, seed=1)
    assert len({question.id for question in drawn}) == len(known) // 2
    for relation, count in Counter(question.relation for question in drawn).items():
        assert abs(count - sizes[relation] / 2) <= 1
    assert stratified_sample(known, 10**6, seed=1) != known
    assert sorted(q.id for q in stratified_sample(known, 10**6, seed=1)) == sorted(q.id for q in known)


def test_energy_names_its_source_and_is_never_silently_zero(evaluation):
    energy = evaluation.record.energy_per_query_j
    assert energy.source in {"nvml_counter", "rapl", "soc", "battery", "estimate_tdp"}
    assert energy.measured == (energy.source != "estimate_tdp")
    assert energy.value > 0


def test_metrics_add_up_from_the_answers(evaluation):
    rows, record = evaluation.answers, evaluation.record
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    choices = [row["choice_right"] for row in rows if "choice_right" in row]
    assert record.accuracy_choice.value == pytest.approx(np.mean(choices))
    free = [row for row in rows if "text" in row]
    assert record.hallucination_rate.value == pytest.approx(np.mean([row["hallucinated"] for row in free]))


SET_ALARM = {
    "type": "function",
    "function": {"name": "set_alarm", "parameters": {"type": "object", "properties": {"time": {"type": "string"}}}},
}


def conversation(identity, text, answer=None, **others):
    messages = [{"role": "user", "content": text}] + ([{"role": "assistant", **answer}] if answer else [])
    return Conversation.model_validate({"id": identity, "messages": messages, "group": identity, **others})


@pytest.fixture(scope="module")
def chat_checkpoint(checkpoint, tmp_path_factory):
    """The tiny checkpoint with the built-in template for functions."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, folder)
    template = BUILT_IN_TEMPLATES / "chatml-tools.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="module")
def conversations():
    tools = [SET_ALARM]
    call = {"tool_calls": [{"name": "set_alarm", "arguments": {"time": "07:00"}}]}
    return [
        *(conversation(f"alarm/{n}", f"Wake me, please, number {n}.", call, tools=tools) for n in range(4)),
        *(conversation(f"none/{n}", f"Order taxi {n}.", expect={"tool_calls": []}, tools=tools) for n in range(3)),
        conversation("missing/0", "Set an alarm.", expect={"abstain": True}, tools=tools),
        conversation("talk/0", "Hello!", {"content": "Hello, how are you?"}),
        conversation("talk/1", "Goodbye!", {"content": "See you soon."}),
        conversation("sum/0", "What is 2 + 3?", expect={"number": 5}),
    ]


def evaluate(checkpoint, rows, params):
    return evaluate_candidate(
        checkpoint, "chat", rows, params, root=checkpoint, artifact_sha256="a" * 64, size_bytes=2**20, parameters=1000
    )


def test_conversations_have_figures_by_kind_and_of_calls(chat_checkpoint, conversations, tiny_params, facts):
    params = tiny_params.model_copy(
        update={"evaluation": tiny_params.evaluation.model_copy(update={"free_questions": 30})}
    )
    evaluation = evaluate(chat_checkpoint, [*conversations, *facts], params)
    record, rows = evaluation.record, {row["id"]: row for row in evaluation.answers}
    assert parse_record(EvaluationRecord, json.dumps(record.as_json(), allow_nan=False), "a.json") == record
    counts = {kind: figures.n for kind, figures in record.by_kind.items()}
    assert counts == {"abstain": 1, "number": 1, "question": 20, "reference": 2, "tool_calls": 7}
    assert record.accuracy_free.n == 1 + 16 + 2 + 7  # answerable
    assert record.hallucination_rate.n == 1 + 1 + 20 + 7  # decidable
    calls = record.tool_calls
    assert (calls.function_right.n, calls.slot_f1.n, calls.complete.n) == (4, 4, 4)
    assert (calls.needless.n, calls.malformed.n, calls.invalid.n) == (4, 8, 8)
    assert record.accuracy_choice.n == 16  # of the questions
    assert record.by_kind["reference"].rouge_l.n == 2
    scores = [row.get("score", row["right"]) for row in evaluation.answers if "text" in row]
    scored = [score for score in scores if score is not None]
    assert len(scored) == record.accuracy_free.n + 1  # the row where an abstention is right is not answerable
    talk = rows["talk/0"]
    assert talk["right"] is None and talk["hallucinated"] is None and talk["reference_nats_per_token"] < 0
    assert rows["alarm/0"]["slots"]["expected"] == 1


def test_references_have_a_perplexity_and_no_hallucination_rate(checkpoint, conversations, tiny_params):
    talks = [row for row in conversations if row.id.startswith("talk")]
    evaluation = evaluate(checkpoint, talks, tiny_params)
    record = evaluation.record
    assert record.perplexity.n == 2
    tokens = record.perplexity.tokens
    nats = [row["reference_nats_per_token"] for row in evaluation.answers]
    lowest, highest = min(nats), max(nats)
    assert math.exp(-highest) <= record.perplexity.value <= math.exp(-lowest) and tokens > 4
    assert record.hallucination_rate.value is None and record.accuracy_choice.value is None
    assert record.accuracy_metric == "accuracy_free" and record.tool_calls is None


def test_the_likelihood_of_a_reference_is_the_runtimes(checkpoint, conversations, tiny_params):
    talk = next(row for row in conversations if row.id == "talk/0")
    (row,) = evaluate(checkpoint, [talk], tiny_params).answers
    model, tokenizer = open_model(checkpoint)
    prompt = encode_prompt(tokenizer, tiny_params.data.system_prompt, talk)
    answer = encode_answer(tokenizer, "Hello, how are you?", end=False)
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(answer)[:, None]).mean().item()
    assert row["reference_nats_per_token"] == pytest.approx(expected, abs=1e-4)


def test_conversations_with_functions_need_a_template_that_shows_them(checkpoint, conversations, tiny_params):
    with pytest.raises(DataError, match="chatml-tools"):
        evaluate(checkpoint, conversations, tiny_params)


def test_an_empty_question_set_is_refused(checkpoint, tiny_params):
    with pytest.raises(DataError, match="empty question set"):
        evaluate_candidate(
            checkpoint, "t", [], tiny_params, root=checkpoint, artifact_sha256="", size_bytes=1, parameters=1
        )


def test_without_a_right_answer_there_are_no_joules_per_right_answer(evaluation):
    assert evaluation.record.accuracy_free.value == 0  # random weights
    assert evaluation.record.energy_per_right_answer_j.value is None


def test_kv_cache_by_hand():
    config = LlamaConfig(num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    assert kv_cache_bytes(config, 2048) == 2 * 30 * 3 * 64 * 2048 * 2


def test_fits_needs_both_storage_and_memory(tiny_params):
    config = LlamaConfig(num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    phone = tiny_params.devices["phone-4gb"]
    assert fits(100 * 2**20, config, phone)
    assert not fits(161 * 2**20, config, phone)
    assert not fits(100 * 2**20, config, phone.model_copy(update={"ram_budget_mib": 200.0}))


def test_score_is_one_at_the_targets_and_falls_beyond(tiny_params):
    targets = tiny_params.evaluation.targets

    def scored(ttft_ms, tpot_ms, size_mib=64):
        queries = [TimedQuery(ttft_ms, tpot_ms, 5, 1.0, 1.0)] * 4
        return accessibility.score(queries, size_mib * 2**20, 1.0, targets, 0, 100).value

    assert scored(500.0, 50.0) == 1.0
    assert scored(1000.0, 50.0) == pytest.approx((0.5 + 3) / 4)
    assert scored(1000.0, 100.0, 256) == pytest.approx((0.5 * 3 + 1) / 4)
    assert scored(500.0, None) == 1.0  # one-token answers have no time per output token


def test_quantiles():
    assert quantiles([1.0, 2.0, 3.0]) == Quantiles(p50=2.0, p90=np.quantile([1.0, 2.0, 3.0], 0.9), n=3)
    assert quantiles([]) == Quantiles(p50=None, p90=None, n=0)
