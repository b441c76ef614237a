"""Caching as a strategy: what prefix reuse and the answer cache save on a stream of queries, and what they spoil."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lilliput.cache.answers import Answer, AnswerCache, Asked, Hit
from lilliput.cache.threshold import EXACT_ONLY, fit_threshold, judge_pairs, labelled_pairs, similarities
from lilliput.chat.template import encode_beginning, encode_prompt, end_ids
from lilliput.config import CachingConfig, EvaluationConfig, Params
from lilliput.data.corpus import Corpus
from lilliput.data.questions import Question
from lilliput.embedding.embedder import Embedder
from lilliput.embedding.sentence_embedder import SentenceEmbedder
from lilliput.evaluate.accessibility import WARM_UP_TOKENS, quantiles
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate.record import Evaluation, freely_asked, judge, verdict_row
from lilliput.models import open_model
from lilliput.recipes.asking import subject, wordings
from lilliput.recipes.recipe import Recipe
from lilliput.resident import peak_rss_bytes
from lilliput.runtime.protocol import Runtime
from lilliput.runtime.torch import TorchRuntime, cpu_threads
from lilliput.statistics import intervals
from lilliput.statistics.compare import compare

PLAIN, PREFIX, CACHE = "plain", "prefix", "cache"
# What is compared with what: the first with the second, which has one thing more, or both.
STEPS = {"prefix": (PLAIN, PREFIX), "cache": (PREFIX, CACHE), "both": (PLAIN, CACHE)}


@dataclass(frozen=True)
class Query:
    """A question of the set in the wording it is asked in this time."""

    question: Question
    text: str


@dataclass(frozen=True)
class Way:
    """One way to answer: a runtime, asked only for what its cache does not hold; None for no cache."""

    runtime: Runtime
    cache: AnswerCache | None = None


@dataclass(frozen=True)
class _Served:
    """An answer; `new` is what the cache may keep of it: an answer that was made, is complete and not empty."""

    text: str
    ttft_ms: float
    asked: Asked | None
    hit: Hit | None
    new: Answer | None = None


def measure_caching(
    model_dir: Path,
    candidate: str,
    corpus: Corpus,
    recipe: Recipe | None,
    params: Params,
    embedder: SentenceEmbedder,
    *,
    artifact_sha256: str,
    size_bytes: int,
) -> Evaluation:
    """Fits the cache's threshold, then asks a stream of queries three ways: plainly, with a kept prefix, with both.

    Each query is put to all three in turn, so that whatever else slows the machine slows them alike.

    Args:
        model_dir: the candidate's artefact.
        candidate: its name.
        corpus: the threshold is fitted on its training text; judged, and the stream drawn, on its questions.
        recipe: the other wordings of its questions; None where each has one wording.
        params: the stream, the answers' length, the system prompt and how energy is taken.
        embedder: for the cache.
        artifact_sha256: of the artefact, by which its answers are kept.
        size_bytes: of its files.
    """
    started, cpu_before = time.perf_counter(), time.process_time()
    config = params.caching
    threshold, judged = fitted_threshold(corpus, recipe, config, embedder)
    model, tokenizer = open_model(model_dir)
    plain = TorchRuntime(model, tokenizer, 1)
    prefix = TorchRuntime(model, tokenizer, 1, encode_beginning(tokenizer, params.data.system_prompt))
    queries = draw_stream(freely_asked(corpus.questions, params.evaluation), recipe, config)
    meter = EnergyMeter(params.evaluation.energy, params.watts_per_core, str(plain.device))
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(params.evaluation.timed_threads):
        file = Path(scratch, "answers.sqlite")
        cache = AnswerCache(file, embedder, artifact_sha256, threshold, config.capacity)
        ways = {PLAIN: Way(plain), PREFIX: Way(prefix), CACHE: Way(prefix, cache)}
        rows = ask_stream(queries, ways, tokenizer, params, meter)
        cache_bytes = embedder.size_bytes + sum(path.stat().st_size for path in Path(scratch).iterdir())
    record = {
        "candidate": candidate,
        "sha256": artifact_sha256,
        "size_bytes": size_bytes,
        "cache_bytes": cache_bytes,
        "embedder_sha256": embedder.sha256,
        "threshold": threshold,
        "pairs": judged,
        **summarise(rows, meter, params.evaluation),
        "runtime": plain.name,
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_before,
    }
    return Evaluation(record, rows)


def draw_stream(questions: Sequence[Question], recipe: Recipe | None, config: CachingConfig) -> list[Query]:
    """Queries of a Zipf-like popularity (Breslau et al., INFOCOM 1999), some of them in another wording.

    The question of rank r, by a seeded order, is drawn in proportion to r^−zipf_exponent, each time anew. Without a
    recipe every query keeps its question's own wording.
    """
    rng = random.Random(f"{config.seed}/stream")
    ranked = rng.sample(list(questions), len(questions))
    weights = [rank**-config.zipf_exponent for rank in range(1, len(ranked) + 1)]
    queries = []
    for question in rng.choices(ranked, weights, k=config.queries):
        known = wordings(*subject(question), recipe) if recipe else ()
        others = [text for text in known if text != question.question]
        reworded = bool(others) and rng.random() < config.paraphrase_share
        queries.append(Query(question, rng.choice(others) if reworded else question.question))
    return queries


def ask_stream(
    queries: Sequence[Query],
    ways: Mapping[str, Way],
    tokenizer: PreTrainedTokenizerBase,
    params: Params,
    meter: EnergyMeter,
) -> list[dict[str, Any]]:
    """A row for each query and way: the answer and its verdict, time, energy, and what the cache found.

    A hit is `wrong` when what it found was the answer to another question.
    """

    serve = partial(_serve, tokenizer=tokenizer, params=params)
    for way in {id(way.runtime): way for way in ways.values()}.values():  # to warm up
        prompt = encode_prompt(tokenizer, params.data.system_prompt, queries[0].text)
        for _ in way.runtime.stream(prompt, WARM_UP_TOKENS):
            pass
    meant: dict[str, str] = {}  # what each stored wording asked for
    rows = []
    for number, query in enumerate(tqdm(queries, desc="stream", unit="query", delay=1.0)):
        for name, way in ways.items():
            served, energy_j = _timed(serve, query.text, way, meter)
            if served.asked and served.new:
                meant[served.asked.wording] = query.question.id
            rows.append(
                {
                    "id": f"{number}",
                    "way": name,
                    "question": query.question.id,
                    "asked": query.text,
                    "hit": served.hit.kind if served.hit else None,
                    "found": served.hit.wording if served.hit else None,
                    "wrong": bool(served.hit) and meant[served.hit.wording] != query.question.id,
                    "ttft_ms": served.ttft_ms,
                    "energy_j": energy_j,
                    "energy_source": meter.source,
                    **verdict_row(served.text, query.question, judge(served.text, query.question)),
                }
            )
    return rows


def _timed(
    serve: Callable[[str, Way], _Served], text: str, way: Way, meter: EnergyMeter
) -> tuple[_Served, float | None]:
    """The answer to one query, and the joules of finding or making it, and of keeping it."""
    runs: list[_Served] = []
    with meter.window() as reading:
        begun = time.perf_counter()
        while not runs or time.perf_counter() - begun < meter.shortest_window_s:
            runs.append(serve(text, way))
        # Once, however often a counter needs the rest repeated: kept before, the answer would be found the next time.
        served = runs[0]
        if way.cache is not None and served.asked and served.new:
            way.cache.store(served.asked, served.new)
    return served, None if reading.energy_j is None else reading.energy_j / len(runs)


def _serve(text: str, way: Way, tokenizer: PreTrainedTokenizerBase, params: Params) -> _Served:
    """The answer found or made; the time to its first token is the time to all of it where it was found."""
    started = time.perf_counter()
    asked = hit = None
    if way.cache is not None:
        asked = way.cache.asked(text)
        hit = way.cache.find(asked)
    if hit:
        return _Served(hit.answer.text, 1e3 * (time.perf_counter() - started), asked, hit)
    prompt = encode_prompt(tokenizer, params.data.system_prompt, text)
    tokens, first_s, most = [], 0.0, params.evaluation.max_new_tokens
    for token in way.runtime.stream(prompt, most):
        first_s = first_s or time.perf_counter() - started
        tokens.append(token)
    ended = tokens[-1] in end_ids(tokenizer, None)
    written = tokens[:-1] if ended else tokens  # not every end token is marked special
    answer = str(tokenizer.decode(written, skip_special_tokens=True)).strip()
    # As the gateway does: an answer that was cut off at the limit, or is empty, is not kept.
    new = Answer(answer, "device", way.runtime.name, len(prompt), len(tokens)) if ended and answer else None
    return _Served(answer, 1e3 * first_s, asked, None, new)


def summarise(rows: Sequence[Mapping[str, Any]], meter: EnergyMeter, config: EvaluationConfig) -> dict[str, Any]:
    """Hits, wrong hits, and what each step changes per query, paired; its intervals take the queries as drawn anew."""
    by_way = {name: [row for row in rows if row["way"] == name] for name in (PLAIN, PREFIX, CACHE)}
    cached = by_way[CACHE]
    hits = [row for row in cached if row["hit"]]
    label = {"source": meter.source, "measured": meter.measured, "idle_watts": meter.idle_watts}
    energies = {name: [row["energy_j"] for row in of_way] for name, of_way in by_way.items()}
    read = all(energy is not None for values in energies.values() for energy in values)
    differences = {step: _differences(by_way[a], by_way[b]) for step, (a, b) in STEPS.items()}
    saved = {step: _negated(of_step.get("energy_per_query_j")) for step, of_step in differences.items()}
    return {
        "queries": len(cached),
        "distinct_questions": len({row["question"] for row in cached}),
        "distinct_wordings": len({row["asked"] for row in cached}),
        "hit_rate": _rate([bool(row["hit"]) for row in cached]),
        "exact_hit_rate": _rate([row["hit"] == "exact" for row in cached]),
        "semantic_hit_rate": _rate([row["hit"] == "semantic" for row in cached]),
        "wrong_hit_rate": _rate([row["wrong"] for row in cached]),
        "wrong_share_of_semantic_hits": _rate([row["wrong"] for row in hits if row["hit"] == "semantic"]),
        "changed_answers": {step: _changed(by_way[a], by_way[b]) for step, (a, b) in STEPS.items()},
        "hallucination_rate": {name: _rate([r["hallucinated"] for r in of_way]) for name, of_way in by_way.items()},
        "energy_per_query_j": {
            name: intervals.as_dict(intervals.mean(values if read else [], config.seed, config.resamples)) | label
            for name, values in energies.items()
        },
        "ttft_ms": {name: quantiles([row["ttft_ms"] for row in of_way]) for name, of_way in by_way.items()},
        "saved_j_per_query": {step: estimate | label for step, estimate in saved.items()},
        "differences": differences,
    }


def fitted_threshold(
    corpus: Corpus, recipe: Recipe | None, config: CachingConfig, embedder: Embedder
) -> tuple[float, dict[str, Any]]:
    """The threshold fitted on the training text, and how pairs from there and from held-out questions hit by it.

    Without a recipe no pair is known to be a paraphrase, so there is nothing to fit on: exact hits alone.
    """
    if recipe is None:
        return EXACT_ONLY, {"train": {}, "held_out": {}}
    halves = {
        name: labelled_pairs(questions, recipe, config.facts, config.seed)
        for name, questions in (("train", corpus.train), ("held_out", corpus.questions))
    }
    found = {name: similarities(pairs, embedder) for name, pairs in halves.items()}
    threshold = fit_threshold(halves["train"], found["train"], config.false_hit_budget)
    return threshold, {name: judge_pairs(pairs, found[name], threshold) for name, pairs in halves.items()}


def _differences(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found = compare(first, second)
    return {
        metric: comparison.difference.as_dict()
        | {"p": comparison.p_value, "detectable": comparison.detectable, "verdict": comparison.verdict}
        for metric, comparison in found.items()
    }


def _negated(difference: Mapping[str, Any] | None) -> dict[str, Any]:
    if difference is None:
        return intervals.as_dict(None)
    ends = {"value": -difference["value"], "low": -difference["high"], "high": -difference["low"]}
    return ends | {"n": difference["n"]}


def _changed(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> int:
    return sum(a["text"] != b["text"] for a, b in zip(first, second, strict=True))


def _rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    return intervals.as_dict(intervals.rate(outcomes))
