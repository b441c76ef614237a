"""Measures caching on a stream of queries: what prefix reuse and answer cache save, and how they change answers."""

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

from lilliput.cache.answers import EXACT_ONLY, AnswerCache, CachedAnswer, CacheHit, CacheQuery
from lilliput.cache.threshold import fit_threshold, labelled_pairs, pair_hit_rates, similarities
from lilliput.chat.template import encode_prompt, encode_shared_prefix, end_ids
from lilliput.config import CachingConfig, EvaluationConfig, Params
from lilliput.data.corpus import Corpus
from lilliput.data.questions import Question
from lilliput.embedding.embedder import Embedder
from lilliput.embedding.sentence_embedder import SentenceEmbedder
from lilliput.errors import DataError
from lilliput.evaluate.accessibility import WARM_UP_TOKENS, quantiles
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate.judges.judge import judge_answer, verdict_row
from lilliput.evaluate.quality import select_free_questions
from lilliput.models import open_model
from lilliput.recipes.asking import subject, wordings
from lilliput.recipes.recipe import Recipe
from lilliput.records import CachingRecord, Energy, Estimate, Figure, PairRates, StreamFigures
from lilliput.resident import peak_rss_bytes
from lilliput.runtime.protocol import Runtime
from lilliput.runtime.torch import TorchRuntime, cpu_threads
from lilliput.statistics import intervals
from lilliput.statistics.compare import compare
from lilliput.statistics.differences import Comparison

PLAIN, PREFIX, CACHE = "plain", "prefix", "cache"
# Compared variants: the second one adds prefix reuse, the answer cache, or both.
STEPS = {"prefix": (PLAIN, PREFIX), "cache": (PREFIX, CACHE), "both": (PLAIN, CACHE)}


@dataclass(frozen=True)
class Query:
    """A question and its wording in one query."""

    question: Question
    text: str


@dataclass(frozen=True)
class CachingVariant:
    """A runtime and its answer cache, if any."""

    runtime: Runtime
    cache: AnswerCache | None = None


@dataclass(frozen=True)
class _StreamAnswer:
    """An answer to a query; `new` is the answer to store, if it was generated, is complete and not empty."""

    text: str
    ttft_ms: float
    query: CacheQuery | None
    hit: CacheHit | None
    new: CachedAnswer | None = None


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
) -> tuple[CachingRecord, list[dict[str, Any]]]:
    """Fits the cache's threshold, then runs a stream of queries: plain, with prefix reuse, and with prefix and cache.

    Returns the record and a row for each query and variant. The three variants take turns for each query, so that
    other load on the machine affects them equally.

    Raises:
        DataError: the corpus has no questions.

    Args:
        model_dir: the candidate's artefact.
        candidate: its name.
        corpus: its training questions fit the threshold; its held-out questions test it and give the stream.
        recipe: the other wordings of its questions; None if each has one wording.
        params: settings of stream, answers, system prompt and energy.
        embedder: for the cache.
        artifact_sha256: of the artefact; the version of its cached answers.
        size_bytes: of its files.
    """
    started, cpu_before = time.perf_counter(), time.process_time()
    config, questions = params.caching, _questions(corpus, params.evaluation)
    threshold, pairs = fitted_threshold(corpus, recipe, config, embedder)
    model, tokenizer = open_model(model_dir)
    plain = TorchRuntime(model, tokenizer, 1)
    prefix = TorchRuntime(model, tokenizer, 1, encode_shared_prefix(tokenizer, params.data.system_prompt))
    queries = draw_stream(questions, recipe, config)
    meter = EnergyMeter(params.evaluation.energy, params.watts_per_core, str(plain.device))
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(params.evaluation.timed_threads):
        file = Path(scratch, "answers.sqlite")
        cache = AnswerCache(file, embedder, artifact_sha256, threshold, config.capacity)
        variants = {PLAIN: CachingVariant(plain), PREFIX: CachingVariant(prefix), CACHE: CachingVariant(prefix, cache)}
        rows = ask_stream(queries, variants, tokenizer, params, meter)
        cache.close()  # merges the journal into the file that is counted
        cache_bytes = embedder.size_bytes + sum(path.stat().st_size for path in Path(scratch).iterdir())
    measured = summarise(rows, meter, params.evaluation)
    record = CachingRecord(
        candidate=candidate,
        sha256=artifact_sha256,
        size_bytes=size_bytes,
        cache_bytes=cache_bytes,
        embedder_sha256=embedder.sha256,
        threshold=threshold,
        pairs=pairs,
        **measured.as_json(),
        runtime=plain.name,
        peak_rss_bytes=peak_rss_bytes(),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_before,
    )
    return record, rows


def _questions(corpus: Corpus, config: EvaluationConfig) -> list[Question]:
    """Returns the questions of the stream; the cache answers single questions, so conversations are left out.

    Raises:
        DataError: the corpus has only conversations.
    """
    questions = [row for row in corpus.questions if isinstance(row, Question)]
    if not questions:
        raise DataError(
            "caching.candidates: the data have conversations only, and the answer cache is measured on questions; "
            "leave the list empty"
        )
    return select_free_questions(questions, config)


def draw_stream(questions: Sequence[Question], recipe: Recipe | None, config: CachingConfig) -> list[Query]:
    """Queries with a Zipf-like popularity (Breslau et al., INFOCOM 1999), some of them in another wording.

    Questions get ranks in a seeded order. Each query draws the question of rank r with probability proportional to
    r^−zipf_exponent. Without a recipe, every query has its question's own wording.
    """
    rng = random.Random(f"{config.seed}/stream")
    ranked = rng.sample(list(questions), len(questions))
    weights = [rank**-config.zipf_exponent for rank in range(1, len(ranked) + 1)]
    queries = []
    for question in rng.choices(ranked, weights, k=config.queries):
        texts = wordings(*subject(question), recipe) if recipe else ()
        others = [text for text in texts if text != question.question]
        reworded = bool(others) and rng.random() < config.paraphrase_share
        queries.append(Query(question, rng.choice(others) if reworded else question.question))
    return queries


def ask_stream(
    queries: Sequence[Query],
    variants: Mapping[str, CachingVariant],
    tokenizer: PreTrainedTokenizerBase,
    params: Params,
    meter: EnergyMeter,
) -> list[dict[str, Any]]:
    """A row for each query and variant: answer, verdict, time, energy, and the cache hit.

    A hit is `wrong` if the stored answer belongs to another question.
    """

    serve = partial(_serve, tokenizer=tokenizer, params=params)
    for variant in {id(variant.runtime): variant for variant in variants.values()}.values():  # warm-up
        prompt = encode_prompt(tokenizer, params.data.system_prompt, queries[0].text)
        for _ in variant.runtime.stream(prompt, WARM_UP_TOKENS):
            pass
    question_ids: dict[str, str] = {}  # by stored wording
    rows = []
    for number, query in enumerate(tqdm(queries, desc="stream", unit="query", delay=1.0)):
        for name, variant in variants.items():
            answer, energy_j = _answer_timed(serve, query.text, variant, meter)
            if answer.query and answer.new:
                question_ids[answer.query.wording] = query.question.id
            rows.append(
                {
                    "id": f"{number}",
                    "way": name,
                    "question": query.question.id,
                    "asked": query.text,
                    "hit": answer.hit.kind if answer.hit else None,
                    "found": answer.hit.wording if answer.hit else None,
                    "wrong": bool(answer.hit) and question_ids[answer.hit.wording] != query.question.id,
                    "ttft_ms": answer.ttft_ms,
                    "energy_j": energy_j,
                    "energy_source": meter.source,
                    **verdict_row(answer.text, query.question, judge_answer(answer.text, query.question)),
                }
            )
    return rows


def _answer_timed(
    serve: Callable[[str, CachingVariant], _StreamAnswer], text: str, variant: CachingVariant, meter: EnergyMeter
) -> tuple[_StreamAnswer, float | None]:
    """The answer to one query, and the joules of lookup, generation and storing."""
    runs: list[_StreamAnswer] = []
    with meter.window() as reading:
        begun = time.perf_counter()
        while not runs or time.perf_counter() - begun < meter.shortest_window_s:
            runs.append(serve(text, variant))
        # Stored once, after the repetitions that a coarse energy counter needs: stored earlier, the next one would hit.
        answer = runs[0]
        if variant.cache is not None and answer.query and answer.new:
            variant.cache.store(answer.query, answer.new)
    return answer, None if reading.energy_j is None else reading.energy_j / len(runs)


def _serve(question: str, variant: CachingVariant, tokenizer: PreTrainedTokenizerBase, params: Params) -> _StreamAnswer:
    """The cached or generated answer. For a cached one, the time to first token is the time of the lookup."""
    started = time.perf_counter()
    query = hit = None
    if variant.cache is not None:
        query = variant.cache.query(question)
        hit = variant.cache.find(query)
    if hit:
        return _StreamAnswer(hit.answer.text, 1e3 * (time.perf_counter() - started), query, hit)
    prompt = encode_prompt(tokenizer, params.data.system_prompt, question)
    tokens, first_s, most = [], 0.0, params.evaluation.max_new_tokens
    for token in variant.runtime.stream(prompt, most):
        first_s = first_s or time.perf_counter() - started
        tokens.append(token)
    ended = tokens[-1] in end_ids(tokenizer, None)
    content = tokens[:-1] if ended else tokens  # not every end token is marked special
    text = str(tokenizer.decode(content, skip_special_tokens=True)).strip()
    # As in the gateway: a truncated or empty answer is not stored.
    new = CachedAnswer(text, "device", variant.runtime.name, len(prompt), len(tokens)) if ended and text else None
    return _StreamAnswer(text, 1e3 * first_s, query, None, new)


def summarise(rows: Sequence[Mapping[str, Any]], meter: EnergyMeter, config: EvaluationConfig) -> StreamFigures:
    """Hit rates, wrong hits, and the paired difference of each step. The intervals resample the queries."""
    by_variant = {name: [row for row in rows if row["way"] == name] for name in (PLAIN, PREFIX, CACHE)}
    cached = by_variant[CACHE]
    hits = [row for row in cached if row["hit"]]
    label = {"source": meter.source, "measured": meter.measured, "idle_watts": meter.idle_watts}
    energies = {name: [row["energy_j"] for row in of_variant] for name, of_variant in by_variant.items()}
    read = all(energy is not None for values in energies.values() for energy in values)
    differences = {step: compare(by_variant[a], by_variant[b]) for step, (a, b) in STEPS.items()}
    return StreamFigures(
        queries=len(cached),
        distinct_questions=len({row["question"] for row in cached}),
        distinct_wordings=len({row["asked"] for row in cached}),
        hit_rate=_rate([bool(row["hit"]) for row in cached]),
        exact_hit_rate=_rate([row["hit"] == "exact" for row in cached]),
        semantic_hit_rate=_rate([row["hit"] == "semantic" for row in cached]),
        wrong_hit_rate=_rate([row["wrong"] for row in cached]),
        wrong_share_of_semantic_hits=_rate([row["wrong"] for row in hits if row["hit"] == "semantic"]),
        changed_answers={step: _changed(by_variant[a], by_variant[b]) for step, (a, b) in STEPS.items()},
        hallucination_rate={
            name: _rate([r["hallucinated"] for r in of_variant]) for name, of_variant in by_variant.items()
        },
        energy_per_query_j={
            name: Energy.of(intervals.mean(values if read else [], config.seed, config.resamples), **label)
            for name, values in energies.items()
        },
        ttft_ms={name: quantiles([row["ttft_ms"] for row in of_variant]) for name, of_variant in by_variant.items()},
        saved_j_per_query={
            step: Energy.of(_negated(of_step.get("energy_per_query_j")), **label)
            for step, of_step in differences.items()
        },
        differences={
            step: {metric: comparison.record for metric, comparison in of_step.items()}
            for step, of_step in differences.items()
        },
    )


def fitted_threshold(
    corpus: Corpus, recipe: Recipe | None, config: CachingConfig, embedder: Embedder
) -> tuple[float, PairRates]:
    """The threshold fitted on training questions, and the hit rates of pairs of training and held-out questions.

    Without a recipe there are no labelled paraphrases: the threshold then allows exact hits only.
    """
    if recipe is None:
        return EXACT_ONLY, {"train": {}, "held_out": {}}
    pairs_by_split = {
        name: labelled_pairs([row for row in rows if isinstance(row, Question)], recipe, config.facts, config.seed)
        for name, rows in (("train", corpus.train), ("held_out", corpus.questions))
    }
    cosines = {name: similarities(pairs, embedder) for name, pairs in pairs_by_split.items()}
    threshold = fit_threshold(pairs_by_split["train"], cosines["train"], config.false_hit_budget)
    return threshold, {name: pair_hit_rates(pairs, cosines[name], threshold) for name, pairs in pairs_by_split.items()}


def _negated(comparison: Comparison | None) -> Estimate | None:
    if comparison is None:
        return None
    difference = comparison.difference
    return Estimate(-difference.value, -difference.high, -difference.low, difference.n)


def _changed(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> int:
    return sum(a["text"] != b["text"] for a, b in zip(first, second, strict=True))


def _rate(outcomes: Sequence[bool]) -> Figure:
    return Figure.of(intervals.rate(outcomes))
