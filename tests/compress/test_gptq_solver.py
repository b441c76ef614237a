import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lilliput.compress.gptq_solver import factorise, solve
from lilliput.compress.grid import Grid, rounded, to_nearest

DAMP = 0.05


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (outputs, inputs) and correlated inputs (tokens, inputs) of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=draw) / inputs**0.5
    x = torch.randn(3 * inputs, inputs, generator=draw) @ mixing * torch.rand(inputs, generator=draw) * 3
    return torch.randn(outputs, inputs, generator=draw) * 0.05, x


def moments(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def error(weight: torch.Tensor, quantised: torch.Tensor, h: torch.Tensor) -> float:
    difference = (quantised - weight).double()
    return (difference @ h.double() * difference).sum().item()


def column_by_column(weight: torch.Tensor, h: torch.Tensor, order: torch.Tensor, grid: Grid) -> torch.Tensor:
    """GPTQ as in the paper, in float64: the inverse, one column at a time, all later columns updated at once."""
    w, size = weight.double()[:, order].clone(), grid.group_size
    damped = h.double()[order][:, order] + DAMP * h.diagonal().double().mean() * torch.eye(len(h))
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    quantised = torch.zeros_like(w)
    for column in range(len(h)):
        if column % max(size, 128) == 0:
            grids = [grid.fit(group.T) for group in w[:, column : column + max(size, 128)].split(size, dim=1)]
        scale, zero = grids[column % max(size, 128) // size]
        quantised[:, column] = grid.rounded(w[None, :, column], scale, zero)[0]
        step = (w[:, column] - quantised[:, column]) / inverse[column, column]
        w[:, column:] -= step[:, None] * inverse[column, column:]
    return quantised[:, order.argsort()]


GRIDS = st.builds(
    Grid,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([16, 32, 64, 192]),
    symmetric=st.booleans(),
    scale_search=st.sampled_from([0.0, 2.4]),
)


@hypothesis_settings(max_examples=25)
@given(GRIDS, st.booleans(), st.integers(0, 99))
def test_codes_are_those_of_the_paper_column_by_column_in_float64(grid, act_order, seed):
    weight, x = layer(12, 192, seed)
    factor = factorise(moments(x), grid.group_size, DAMP, act_order=act_order)
    codes, reported = solve(weight, factor, grid)
    expected = column_by_column(weight, moments(x), factor.order, grid).float()
    # A tie that rounds the other way changes the rest of its row.
    same = (codes.weight() - expected).abs().amax(1) < 1e-5 * expected.abs().max()
    assert same.float().mean() >= 0.8
    assert error(weight, codes.weight(), moments(x)) <= 1.05 * error(weight, expected, moments(x))
    assert reported == pytest.approx(error(weight, codes.weight(), moments(x)), rel=1e-2)
    assert codes.codes.max().item() < 2**grid.bits
    assert torch.equal(codes.scales, codes.scales.half().float())


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, False), (4, 128, True), (3, 64, False), (2, 32, False)]
)
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_equal_gptqmodels_on_the_same_hessian(bits, group_size, symmetric, act_order):
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    weight, x = layer(48, 384)
    linear = torch.nn.Linear(384, 48, bias=False)
    linear.weight.data = weight.clone()
    config = {"bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": act_order, "damp_percent": DAMP}
    if act_order:
        config["act_group_aware"] = False
    peer = GPTQ(linear, QuantizeConfig(**config, offload_to_disk=False))
    peer.quantizer.configure(perchannel=True)
    peer.add_batch(x[None], torch.empty(0))
    theirs, scales, _, groups, *_ = peer.quantize()
    factor = factorise(moments(x), group_size, DAMP, act_order=act_order)
    exact, _ = solve(weight, factor, Grid(bits, group_size, symmetric, scale_dtype=torch.float32))
    assert torch.equal(exact.groups.int(), groups)
    assert ((exact.weight() - theirs).abs() < 1e-5).float().mean() > 0.97
    torch.testing.assert_close(exact.scales, scales, rtol=0.05, atol=0)
    stored, _ = solve(weight, factor, Grid(bits, group_size, symmetric))
    indices = groups.long()
    written = (theirs / scales[:, indices]).round() * scales.half().float()[:, indices]
    assert error(weight, stored.weight(), moments(x)) <= 1.01 * error(weight, written, moments(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_below_that_of_rounding_to_nearest(bits):
    weight, x = layer(64, 256)
    grid = Grid(bits, 32, symmetric=False)
    codes, _ = solve(weight, factorise(moments(x), 32, DAMP, act_order=False), grid)
    assert error(weight, codes.weight(), moments(x)) < 0.75 * error(weight, rounded(weight, grid), moments(x))


def test_stacked_layers_have_the_codes_of_each_alone():
    weight, x = layer(48, 128)
    factor, grid = factorise(moments(x), 32, DAMP, act_order=False), Grid(4, 32, symmetric=False)
    stacked, _ = solve(weight, factor, grid)
    for part, rows in zip(stacked.rows([16, 32]), weight.split([16, 32]), strict=True):
        alone, _ = solve(rows, factor, grid)
        assert (part.codes == alone.codes).float().mean() > 0.99
        torch.testing.assert_close(part.weight(), alone.weight(), rtol=0, atol=0.02)


def test_without_correlation_codes_are_rounded_to_nearest():
    weight, _ = layer(16, 64)
    grid = Grid(4, 16, symmetric=False)
    codes, _ = solve(weight, factorise(torch.eye(64), 16, DAMP, act_order=False), grid)
    assert torch.equal(codes.weight(), to_nearest(weight, grid).weight())
    assert torch.equal(codes.weight(), rounded(weight, grid))


def test_dead_columns_are_rounded_to_nearest_and_disturb_no_other():
    weight, x = layer(16, 64)
    x[:, 5] = 0
    grid = Grid(8, 64, symmetric=False)
    codes, _ = solve(weight, factorise(moments(x), 64, DAMP, act_order=False), grid)
    assert (codes.weight()[:, 5] - weight[:, 5]).abs().max() <= codes.scales.max() / 2 + 1e-6
    assert error(weight, codes.weight(), moments(x)) < error(weight, rounded(weight, grid), moments(x))


def test_inputs_that_are_always_zero_give_rounding_to_nearest():
    weight, _ = layer(8, 32)
    grid = Grid(4, 32, symmetric=True)
    codes, reported = solve(weight, factorise(torch.zeros(32, 32), 32, DAMP, act_order=True), grid)
    assert torch.equal(codes.weight(), rounded(weight, grid))
    assert reported == pytest.approx(0.0, abs=1e-6)


def test_rejects_moments_that_are_not_finite():
    h = torch.eye(32)
    h[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        factorise(h, 32, DAMP, act_order=False)


def test_rejects_singular_moments():
    h = torch.ones(32, 32)
    h[0, 0] = 0.0  # indefinite: no sum of x xᵀ, but rounding may come close to it
    with pytest.raises(ValueError, match="singular"):
        factorise(h, 32, 1e-30, act_order=False)


def test_moments_of_fewer_tokens_than_inputs_are_solved():
    weight, x = layer(16, 64)
    codes, _ = solve(weight, factorise(moments(x[:5]), 16, 0.01, act_order=False), Grid(4, 16, symmetric=False))
    assert torch.isfinite(codes.weight()).all()


def test_rejects_scales_that_the_file_cannot_hold():
    with pytest.raises(OverflowError, match="does not fit"):
        to_nearest(torch.full((2, 16), 1e7), Grid(2, 16, symmetric=False))


def test_a_group_of_zeros_stays_zero():
    codes = to_nearest(torch.zeros(2, 16), Grid(4, 16, symmetric=False))
    assert torch.equal(codes.weight(), torch.zeros(2, 16))


@pytest.mark.gpu
def test_gpu_gives_the_codes_of_the_host():
    weight, x = layer(64, 256)
    grid = Grid(4, 32, symmetric=False)
    host, device = (
        solve(weight.to(place), factorise(moments(x).to(place), 32, DAMP, act_order=False), grid)[0]
        for place in ("cpu", "cuda")
    )
    assert (host.codes == device.codes.cpu()).float().mean() > 0.98
