"""llama.cpp's measures of divergence: against scipy, at their bounds, and their errors against repeated sampling."""

import numpy as np
import pytest
from scipy import special, stats

from lilliput.statistics.divergence import TokenDivergences

VOCABULARY = 50


def logits(count, seed, spread=3.0):
    return np.random.default_rng(seed).normal(0.0, spread, (count, VOCABULARY)).astype(np.float32)


def noisy(reference, seed, noise=0.5):
    return (reference + np.random.default_rng(seed).normal(0.0, noise, reference.shape)).astype(np.float32)


def tokens(count):
    return np.random.default_rng(9).integers(0, VOCABULARY, count).tolist()


def measured(reference, model):
    found = TokenDivergences()
    found.add(reference, model, tokens(len(reference)))
    return found


def of_values(kl=(0.0,), same_top=(True,), delta_p=(0.0,)):
    return TokenDivergences(list(kl), list(same_top), list(delta_p)).record("base")


def test_each_measure_is_that_of_an_independent_computation():
    reference = logits(300, 1)
    model = noisy(reference, 2)
    record = measured(reference, model).record("base")
    p, q = (special.softmax(values.astype(np.float64), axis=-1) for values in (reference, model))
    kl, same = stats.entropy(p, q, axis=-1), p.argmax(-1) == q.argmax(-1)
    places = np.arange(300), tokens(300)
    delta = q[places] - p[places]
    assert (record.reference, record.tokens) == ("base", 300)
    assert record.kl_mean_nats.value == pytest.approx(kl.mean())
    assert record.kl_mean_nats.error == pytest.approx(stats.sem(kl))
    assert record.kl_median_nats.value == pytest.approx(np.median(kl))
    assert record.kl_p99_nats.value == pytest.approx(np.percentile(kl, 99))
    assert record.kl_p999_nats.value == pytest.approx(np.percentile(kl, 99.9))
    assert 0.5 < record.same_top.value == same.mean() < 1.0
    assert record.same_top.error == pytest.approx(np.sqrt(same.mean() * (1 - same.mean()) / 299))
    assert record.rms_delta_p.value == pytest.approx(np.sqrt((delta**2).mean()))
    assert record.rms_delta_p.error == pytest.approx(0.5 / np.sqrt((delta**2).mean()) * stats.sem(delta**2))


def test_a_divergence_is_from_the_reference_to_the_model_not_the_reverse():
    reference, model = logits(50, 1, spread=1.0), logits(50, 2, spread=4.0)
    there, back = (
        measured(*pair).record("base").kl_mean_nats.value for pair in ((reference, model), (model, reference))
    )
    p, q = (special.softmax(values.astype(np.float64), axis=-1) for values in (reference, model))
    assert there == pytest.approx(stats.entropy(p, q, axis=-1).mean())
    assert abs(there - back) > 0.1


def test_a_model_does_not_diverge_from_itself():
    reference = logits(300, 1)
    record = measured(reference, reference).record("base")
    for name in ("kl_mean_nats", "kl_median_nats", "kl_p99_nats", "rms_delta_p"):
        assert (getattr(record, name).value, getattr(record, name).error) == (0.0, 0.0)
    assert (record.same_top.value, record.same_top.error) == (1.0, 0.0)


def test_a_constant_added_to_all_logits_changes_nothing():
    reference = logits(300, 1)
    record = measured(reference, reference + np.float32(8.0)).record("base")
    assert record.kl_mean_nats.value < 1e-11
    assert record.same_top.value == 1.0


def test_more_noise_diverges_more():
    reference = logits(300, 1)
    models = [noisy(reference, 2, noise) for noise in (0.1, 0.4, 1.0)]
    means = [measured(reference, model).record("base").kl_mean_nats.value for model in models]
    assert means == sorted(means)
    assert means[0] > 0.0


def test_blocks_give_the_same_as_the_whole():
    reference = logits(60, 1)
    model, whole, blocks = noisy(reference, 2), TokenDivergences(), TokenDivergences()
    whole.add(reference, model, tokens(60))
    for start in range(0, 60, 7):
        part = slice(start, start + 7)
        blocks.add(reference[part], model[part], tokens(60)[part])
    assert blocks == whole


def test_unlikely_tokens_count_as_well():
    reference, model = np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32)
    reference[0, 0], model[0, 0] = 20.0, 60.0  # the others are less likely than e⁻¹⁶ in the reference
    found = TokenDivergences()
    found.add(reference, model, [0])
    assert found.kl_nats[0] == pytest.approx(2 * np.exp(-20.0) * 40.0, rel=0.05)  # llama.cpp's would be negative


def test_too_few_tokens_have_no_error():
    one = of_values([0.5])
    assert (one.kl_mean_nats.value, one.kl_mean_nats.error, one.rms_delta_p.error) == (0.5, None, None)
    hundred = of_values(np.linspace(0.0, 1.0, 100), [True] * 100, [0.1] * 100)
    assert hundred.kl_p999_nats.error is None
    assert hundred.kl_median_nats.error > 0.0


def test_the_error_of_a_quantile_is_that_of_many_resamples():
    values = np.random.default_rng(5).gamma(0.5, 0.1, 1000)
    record = of_values(values, [True] * 1000, [0.0] * 1000)
    drawn = np.random.default_rng(6).choice(values, (4000, 1000))
    for figure, percent in ((record.kl_median_nats, 50), (record.kl_p99_nats, 99)):
        assert figure.error == pytest.approx(np.percentile(drawn, percent, axis=1).std(), rel=0.05)


def test_logits_of_other_tokens_are_an_error():
    with pytest.raises(ValueError, match="not of the same tokens"):
        TokenDivergences().add(logits(3, 1), logits(3, 1)[:, :-1], [1, 2, 3])


@pytest.fixture(scope="module")
def repeated():
    """Records of 400 measurements of the same kind of tokens."""
    rng = np.random.default_rng(3)
    return [
        of_values(rng.gamma(0.5, 0.1, 1000), rng.random(1000) < 0.9, rng.normal(0.0, 0.05, 1000)) for _ in range(400)
    ]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("kl_mean_nats", 0.1),
        ("kl_median_nats", 0.1),
        ("kl_p99_nats", 0.15),
        ("kl_p999_nats", 0.4),
        ("same_top", 0.1),
        ("rms_delta_p", 0.1),
    ],
)
def test_errors_are_the_spread_of_repeated_measurements(repeated, name, tolerance):
    figures = [getattr(record, name) for record in repeated]
    spread = np.std([figure.value for figure in figures])
    assert np.mean([figure.error for figure in figures]) == pytest.approx(spread, rel=tolerance)
