"""A corpus of conversations: split by derived groups, drawn, written and read."""

from __future__ import annotations

import json
import os
import random
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lilliput.config import DataConfig
from lilliput.contamination import find_contaminated
from lilliput.data.conversations import Conversation
from lilliput.data.corpus import Corpus, read_corpus, write_corpus
from lilliput.data.rows import request_text
from lilliput.errors import DataError
from lilliput.ingestion.near_duplicates import SIMILARITY, similarity
from lilliput.ingestion.staging import group_text
from lilliput.recipes.build import build_corpus, check_source
from tests.ingestion.test_near_duplicates import WORDS

SNIPS = Path(os.environ.get("LILLIPUT_BENCHMARK_FILES", Path(__file__).parents[3] / "shared" / "data"))
CONFIG = DataConfig(
    source="chats.jsonl",
    seed=3,
    system_prompt="",
    train_share=0.6,
    unanswerable_share=0.2,
    calibration_examples=5,
    choice_questions=6,
    unanswerable_questions=2,
)


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)], **more}


def different(count: int, seed: int = 1) -> list[str]:
    """Requests of which no two are near-duplicates."""
    draw = random.Random(seed)
    return [f"{' '.join(draw.choices(WORDS, k=8))} {draw.randrange(10**9)}" for _ in range(count)]


def build(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Corpus:
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return build_corpus(CONFIG.model_copy(update=changes), folder, folder / "cache")


def test_conversations_make_a_round_trip_through_the_files(tmp_path):
    corpus = build(tmp_path, [chat(text, f"answer {n}") for n, text in enumerate(different(20))])
    summary = write_corpus(corpus, tmp_path / "data")
    read = read_corpus(tmp_path / "data")
    for name in ("train", "calibration", "questions"):
        rows = [*getattr(read, name)]
        assert rows == [*getattr(corpus, name)]
        assert all(isinstance(row, Conversation) for row in rows)
        assert summary[name]["expectations"] == {"reference": len(rows)}
    assert (len(read.train), len(read.calibration), len(read.questions)) == (12, 5, 6)
    assert json.loads((tmp_path / "data/summary.json").read_text()) == summary
    assert summary["source"]["derived"] == {"ids": 20, "groups": 20}
    assert summary["source"]["not_used"] == {
        "training rows without an answer to learn": 0,
        "training rows above data.unanswerable_share": 0,
        "held-out rows above data.choice_questions and data.unanswerable_questions": 2,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "data"}  # no temporary file is left


def test_the_same_source_gives_the_same_bytes(tmp_path):
    rows = [chat(text, "yes") for text in different(30)]
    for name in ("a", "b"):
        write_corpus(build(tmp_path, rows), tmp_path / name)
    for file in ("train.jsonl", "questions.jsonl", "summary.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# Not random: MinHash misses 6 of 100,000 pairs at the limit.
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_near_duplicates_are_on_both_sides(data):
    requests = different(8, data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 12))):
        words = data.draw(st.sampled_from(requests)).split()
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.sampled_from(WORDS))
        requests.append(" ".join(words) + data.draw(st.sampled_from(["", "?", " !", " please"])))
    with tempfile.TemporaryDirectory() as folder:
        corpus = build(Path(folder), [chat(text, "yes") for text in requests], choice_questions=99)
        asked = [group_text(row) for row in corpus.questions]
        trained = [group_text(row) for row in corpus.train]
    assert len(asked) + len(trained) == len(requests)
    assert max(similarity(one, other) for one in asked for other in trained) < SIMILARITY


def test_all_turns_of_the_user_tell_conversations_apart(tmp_path):
    rows = [chat(text, "Shall I?", "Yes, please.", "Done.") for text in different(12)]
    corpus = build(tmp_path, rows)
    assert len({row.group for row in [*corpus.train, *corpus.questions]}) == 12
    assert all(request_text(row).endswith("\nYes, please.") for row in corpus.train)


def test_a_template_that_leaves_one_side_empty_is_one_error_with_a_remedy(tmp_path):
    rows = [chat(f"please set an alarm for {hour} o'clock in the morning of the next day", "ok") for hour in range(24)]
    with pytest.raises(
        DataError, match=r"24 of 24 rows are near-duplicates and share a group.*give each row a `group`"
    ):
        build(tmp_path, rows)
    grouped = [row | {"group": f"hour/{hour}"} for hour, row in enumerate(rows)]
    assert len(build(tmp_path, grouped).train) == 14


def test_near_duplicates_across_a_split_by_hand_are_counted_and_no_error(tmp_path):
    texts = different(6)
    rows = [chat(text, "yes", split="train") for text in texts]
    rows += [chat(texts[0] + "!", "yes", split="test"), chat(different(1, seed=9)[0], "yes", split="test")]
    corpus = build(tmp_path, rows)
    assert corpus.source is not None
    assert corpus.source["notes"]["test rows with a near-duplicate in training, by the source's own split"] == 1
    assert (len(corpus.train), len(corpus.questions)) == (6, 2)
    assert not {row.group for row in corpus.train} & {row.group for row in corpus.questions}


def test_requests_of_marks_alone_share_a_group(tmp_path):
    rows = [chat(text, "yes") for text in [*different(8), *"?!…", "?!"]]
    corpus = build(tmp_path, rows, choice_questions=99)
    sides = [[row.user_text for row in side if len(row.user_text) < 3] for side in (corpus.train, corpus.questions)]
    assert sorted(map(len, sides)) == [0, 4]


def test_a_near_duplicate_of_a_row_with_a_group_joins_it(tmp_path):
    texts = different(10)
    rows = [chat(text, "yes", group=f"g{n}", id=f"given{n}") for n, text in enumerate(texts)]
    rows.append(chat(f"{texts[4]}!", "no", id="derived"))
    corpus = build(tmp_path, rows, choice_questions=99)
    groups = {row.id: row.group for row in [*corpus.train, *corpus.questions]}
    assert groups["derived"] == groups["given4"] == "g4"


def test_equal_requests_with_different_groups_are_an_error(tmp_path):
    rows = [chat("Why?", "So.", group=f"g{n}") for n in range(10)]
    with pytest.raises(DataError, match="of the same group or wording is in training"):
        build(tmp_path, rows)


def test_rows_without_an_answer_are_asked_and_never_learned(tmp_path):
    rows = [chat(text, "yes") for text in different(10)]
    rows += [chat(text, expect={"abstain": True}) for text in different(10, seed=2)]
    corpus = build(tmp_path, rows)
    assert all(row.reference for row in corpus.train if isinstance(row, Conversation))
    assert sum(not row.answerable for row in corpus.questions) == 2
    assert corpus.source is not None
    assert corpus.source["not_used"]["training rows without an answer to learn"] > 0


def test_conversations_are_compared_by_all_that_the_user_says(tmp_path):
    long = "in which year did the very small republic on the northern coast join the union"
    train = [Conversation.model_validate(chat(long, "1950", id="a", group="a"))]
    questions = [
        Conversation.model_validate(chat(f"Tell me: {long}", "1950", id="b", group="b")),
        Conversation.model_validate(chat(long.replace("republic", "town"), "Yes", id="c", group="c")),
    ]
    assert find_contaminated(train, questions) == ["b"]


def test_many_rows_are_staged_with_little_memory(tmp_path):
    count, text = 1500, "word " * 1600
    rows = [chat(f"{n} {text}", "yes", group=f"g{n // 4}") for n in range(count)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del rows
    size = (tmp_path / "chats.jsonl").stat().st_size
    tracemalloc.start()
    write_corpus(build_corpus(CONFIG, tmp_path, tmp_path), tmp_path / "data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 3


def test_snips_is_a_source_as_it_is(tmp_path):
    source = SNIPS / "snips_tool_calls.jsonl"
    if not source.is_file():
        pytest.skip("snips_tool_calls.jsonl is not here; set LILLIPUT_BENCHMARK_FILES to the folder that holds it")
    config = CONFIG.model_copy(update={"source": str(source), "choice_questions": 700})
    corpus = build_corpus(config, tmp_path, tmp_path)
    assert (len(corpus.train), len(corpus.questions)) == (2100, 700)
    assert {row.relation for row in corpus.questions} == {row.relation for row in corpus.train}
    assert corpus.report is not None
    assert "messages rows, 2,800" in corpus.report
    assert check_source(config, tmp_path) is not None
