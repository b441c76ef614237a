"""The answer cache and prefix reuse."""

from __future__ import annotations

from lilliput.records.figures import Difference, Energy, Figure, Quantiles, Record

PairRates = dict[str, dict[str, Figure]]  # hit rates by split and kind of pair


class StreamFigures(Record):
    """Hit rates and savings on a stream; maps are by variant (plain, prefix, cache) or step (prefix, cache, both)."""

    queries: int
    distinct_questions: int
    distinct_wordings: int
    hit_rate: Figure
    exact_hit_rate: Figure
    semantic_hit_rate: Figure
    wrong_hit_rate: Figure
    wrong_share_of_semantic_hits: Figure
    changed_answers: dict[str, int]
    hallucination_rate: dict[str, Figure]
    energy_per_query_j: dict[str, Energy]
    ttft_ms: dict[str, Quantiles]
    saved_j_per_query: dict[str, Energy]
    differences: dict[str, dict[str, Difference]]


class _CachedModel(Record):
    candidate: str
    sha256: str
    size_bytes: int
    cache_bytes: int
    embedder_sha256: str
    threshold: float
    pairs: PairRates


class CachingRecord(StreamFigures, _CachedModel):
    """metrics/caching/<candidate>.json: prefix reuse and the answer cache."""

    runtime: str
    peak_rss_bytes: int
    seconds: float
    cpu_seconds: float


class CacheThreshold(Record):
    """offload/<device>/cache.json: the similarity threshold of the answer cache for a pair of models."""

    pair: tuple[str, str]
    embedder_sha256: str
    threshold: float
    pairs: PairRates
