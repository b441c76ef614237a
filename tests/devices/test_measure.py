"""A compiled model answers all questions of the evaluation through its own runtime."""

import pytest

from lilliput.artifacts import read_manifest, seal
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.data.questions import Question
from lilliput.devices.measure import measure_on_devices
from lilliput.evaluate_candidate import evaluate_candidate

COUNTRIES = ["Peru", "Mali", "Chad", "Cuba", "Fiji", "Iran"]


@pytest.fixture(scope="module")
def questions():
    known = [
        Question(
            id=f"capital/{name}",
            group=name,
            question=f"What is the capital of {name}?",
            answer="Lima",
            choices=("Lima", "Bamako", "Havana", "Suva"),
            split="test",
        )
        for name in COUNTRIES
    ]
    unknown = Question(
        id="capital/Xyz", group="Xyz", question="What is the capital of Xyz?", answerable=False, split="test"
    )
    return [*known, unknown]


@pytest.fixture(scope="module")
def measured(checkpoint, questions, tiny_params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    seal(folder, candidate="small-gguf", strategy="gguf", config={}, parent=None, parameters=1, facts={})
    return measure_on_devices(
        "small",
        "gguf",
        folder,
        checkpoint,
        ("small", checkpoint),
        questions,
        tiny_params,
        read_manifest(folder),
        contaminated=["capital/Mali"],
        root=folder,
    )


@pytest.fixture(scope="module")
def evaluated(checkpoint, questions, tiny_params):
    return evaluate_candidate(
        checkpoint,
        "small",
        questions,
        tiny_params,
        contaminated=["capital/Mali"],
        root=checkpoint,
        artifact_sha256="0" * 64,
        size_bytes=1,
        parameters=1,
    )


def test_in_floats_it_gives_the_answers_of_its_checkpoint(measured, evaluated):
    keys = ("id", "choice", "contaminated", "hallucinated")
    own, others = (
        [{key: row.get(key) for key in keys} for row in rows] for rows in (measured.answers, evaluated.answers)
    )
    assert own == others
    assert sum(row["choice"] is not None for row in own) == len(COUNTRIES)
    texts = zip(measured.answers, evaluated.answers, strict=True)
    same = sum(ours["text"] == theirs["text"] for ours, theirs in texts if "text" in ours)
    assert same >= 3  # a random model has near ties, and llama.cpp keeps keys and values in float16


def test_its_quality_has_the_figures_of_its_answers(measured, evaluated):
    quality, record = measured.record.quality, evaluated.record
    assert quality.accuracy_choice == record.accuracy_choice
    assert quality.hallucination_rate == record.hallucination_rate
    assert quality.contaminated_questions == 1
    assert quality.perplexity.value == pytest.approx(record.perplexity.value, rel=1e-3)


def test_the_record_has_the_cost_of_answering(measured):
    assert measured.record.devices
    assert measured.record.cpu_seconds > 0
    assert measured.record.peak_rss_bytes > max(run.peak_rss_bytes for run in measured.record.devices.values()) // 2


def test_the_record_has_its_divergence_from_checkpoint_and_float_parent(measured):
    record = measured.record
    assert record.from_checkpoint == record.from_float_parent  # a float checkpoint is its own
    assert record.from_checkpoint.reference == "small"
    assert record.from_checkpoint.kl_mean_nats.value < 1e-3
