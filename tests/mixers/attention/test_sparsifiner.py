"""Sparsifiner against the official implementation, and its rules one by one."""

from __future__ import annotations

import math

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import collect_losses, create_mixer
from mixerzoo.mixers.attention.sparsifiner import Sparsifiner
from mixerzoo.models.parts.blocks import BLOCKS
from mixerzoo.models.parts.token_pruning import TokenPruningBlock
from mixerzoo.tests.utils import check_golden, load_golden, relative_error
from mixerzoo.training.cost import measure_activation_bytes, measure_flops


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _mixer(golden):
    options = dict(golden.kwargs)
    for unused in ("token_keep_rate", "token_pruning_this_layer", "mlp_ratio"):
        options.pop(unused, None)
    tokens, dim = options.pop("num_tokens"), options.pop("dim")
    if options["coef_topk"] == 0:
        options["coef_threshold"] = 0.05
    options["head_dim"] = dim // options["num_heads"]
    return Sparsifiner(dim, grid=(tokens - 1,), class_token=True, **options)


@pytest.mark.parametrize("name", ["sparsifiner_attention", "sparsifiner_attention_thresh"])
def test_golden(name):
    golden = load_golden(name)
    mixer = _mixer(golden)
    check_golden(golden, mixer, Sparsifiner.convert_official)
    x = golden["input"]
    q, k, _ = mixer.qkv(x).unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    visible = mixer.predictor(q, k, None, class_token=True, first=0)
    assert torch.equal(visible.float(), golden["extra.attn_mask"])
    score = mixer.predictor.scores(mixer.predictor.coefficients(q, k, None, 0), 0).detach()
    assert relative_error(score[:, :, 1:], golden["extra.approx_attn"]) < 1e-5
    _, attention = mixer(x, token_attention=True)
    assert relative_error(attention.detach(), golden["extra.masked_attn"][:, :, 0]) < 1e-5


def _block_names(state):
    out = {k: v for k, v in state.items() if k.startswith("norm")}
    out |= {k.replace("mlp.", "channel_mixer."): v for k, v in state.items() if k.startswith("mlp.")}
    inner = {k.removeprefix("attn."): v for k, v in state.items() if k.startswith("attn.")}
    return out | {f"mixer.{k}": v for k, v in Sparsifiner.convert_official(inner).items()}


def test_golden_block_with_pruning():
    golden = load_golden("sparsifiner_block_pruning")
    options = golden.kwargs
    block = TokenPruningBlock(
        options["dim"],
        mixer=_mixer(golden),
        norm={"name": "layer_norm", "eps": 1e-5},
        channel_mixer={"name": "mlp", "ratio": options["mlp_ratio"]},
        token_keep_rate=options["token_keep_rate"] if options["token_pruning_this_layer"] else 1.0,
        diluted=True,
    )
    before = golden["input.prev_token_mask"]
    mask = torch.cat([torch.ones_like(before[:, :1]), before], 1)
    golden.tensors["input"], golden.tensors["grad.input"] = golden["input.x"], golden["grad.input.x"]
    check_golden(golden, block, _block_names, forward=lambda x: block(x, mask=mask).x)
    y, left = block(golden["input.x"], mask=mask)
    assert torch.equal((y[:, 1:] != 0).any(-1), golden["extra.token_mask"])
    assert torch.equal((y != 0).any(-1), mask if left is None else left)
    # what stands in rows that are pruned is never read
    garbage = golden["input.x"].masked_fill(~mask[:, :, None], float("nan"))
    assert torch.equal(block(garbage, mask=mask).x, y)
    # without the dilution the class token reads more of what is left
    block.diluted = False
    assert relative_error(block(golden["input.x"], mask=mask).x.detach(), golden["output"]) > 1e-3


def test_pruned_tokens_stay_pruned():
    mixer = Sparsifiner(16, grid=(3, 4), class_token=True, head_dim=8)
    block = TokenPruningBlock(16, mixer=mixer, token_keep_rate=0.5).eval()
    x = torch.randn(2, 13, 16)
    y, alive = block(x)
    assert torch.equal((y != 0).any(-1), alive)
    assert alive.sum(1).tolist() == [7, 7]
    assert alive[:, 0].all()
    assert torch.equal(block(y, mask=alive).mask, alive)
    with pytest.raises(ConfigError, match="sparsifiner"):
        TokenPruningBlock(16, mixer=create_mixer("attention", 16))
    with pytest.raises(ConfigError, match="token_keep_rate"):
        BLOCKS.build({"name": "token_pruning", "token_keep_rate": 0.0}, 16, key="block", mixer=mixer)


def _dense(mixer, x):
    q, k, v = mixer.qkv(x.flatten(1, -2)).unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).permute(2, 0, 3, 1, 4)
    y = (q @ k.mT * mixer.head_dim**-0.5).softmax(-1) @ v
    return mixer.proj(y.transpose(1, 2).flatten(2)).view(x.shape)


def test_everything_kept_is_plain_attention():
    x = torch.randn(2, 4, 5, 32)
    mixer = Sparsifiner(32, grid=(4, 5), head_dim=16, attn_keep_rate=1.0)
    torch.testing.assert_close(mixer(x), _dense(mixer, x), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(Sparsifiner(32, grid=(4, 5), attn_keep_rate=0.2)(x), _dense(mixer, x), atol=1e-4)


@pytest.mark.parametrize(("rate", "expected"), [(0.25, 6), (0.5, 12), (1.0, 23)])
def test_budget_by_rank(rate, expected):
    mixer = Sparsifiner(32, grid=(23,), attn_keep_rate=rate, reduce_n_factor=3, basis_threshold=0.0)
    visible, _ = _connectivity(mixer, torch.randn(2, 23, 32))
    assert visible.sum(-1).unique().tolist() == [expected]


def _connectivity(mixer, x, mask=None):
    q, k, _ = mixer.qkv(x).unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    visible = mixer.predictor(q, k, mask, class_token=False, first=0)
    return visible, mixer.predictor.scores(mixer.predictor.coefficients(q, k, mask, 0), 0)


def test_budget_by_threshold():
    mixer = Sparsifiner(32, grid=(23,), attn_keep_rate=1.0, reduce_n_factor=3, score_threshold=0.008)
    x = torch.randn(2, 23, 32)
    visible, score = _connectivity(mixer, x)
    assert torch.equal(visible, score > 0.008)
    assert 0 < visible.float().mean() < 1
    both = Sparsifiner(32, grid=(23,), attn_keep_rate=0.25, reduce_n_factor=3, score_threshold=0.008)
    both.load_state_dict(mixer.state_dict())
    assert torch.equal(_connectivity(both, x)[0] & visible, _connectivity(both, x)[0])
    assert _connectivity(both, x)[0].sum(-1).max() <= 6


def test_query_without_keys_gets_nothing():
    mixer = Sparsifiner(32, grid=(9,), score_threshold=10.0)
    x = torch.randn(1, 9, 32, requires_grad=True)
    y = mixer(x)
    assert torch.equal(y, mixer.proj.bias.expand_as(y))
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_budget_counts_real_tokens_only():
    mixer = Sparsifiner(32, grid=(12,), attn_keep_rate=0.5, reduce_n_factor=2, basis_threshold=0.0)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 4:] = False
    visible, _ = _connectivity(mixer, torch.randn(2, 12, 32), mask)
    assert visible[0].sum(-1).unique().tolist() == [6]
    assert visible[1].sum(-1).unique().tolist() == [4]
    assert not visible[1, :, :, 4:].any()


def test_class_token_is_an_option():
    mixer = Sparsifiner(32, grid=(3, 4), class_token=True, attn_keep_rate=0.3).eval()
    assert mixer.predictor.basis_in.shape[0] == 13
    sequence = torch.randn(2, 13, 32)
    _, attention = mixer(sequence, token_attention=True)
    assert (attention > 0).all()  # it sees every token
    map_of = sequence[:, 1:].unflatten(1, (3, 4))
    assert mixer(map_of).shape == map_of.shape  # dense features need no class token
    with pytest.raises(ConfigError, match="resize_grid"):
        mixer(torch.randn(1, 4, 4, 32))
    with pytest.raises(ConfigError, match="resize_grid"):
        mixer(torch.randn(1, 12, 32))


def objective(output, losses):
    """What a trainer minimises."""
    return sum(losses.values(), output)


def test_predictor_learns_in_training_and_disturbs_nothing():
    torch.manual_seed(0)
    mixer = Sparsifiner(32, grid=(16,), reduce_n_factor=2)
    x = torch.randn(4, 16, 32)

    def gradients(m):
        m.zero_grad()
        with collect_losses() as losses:
            y = m(x).square().sum()
        objective(y, losses).backward()
        return {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()}

    with_loss = gradients(mixer.train())
    without = gradients(mixer.eval())
    for name in with_loss:
        if name.startswith("predictor"):
            assert with_loss[name].abs().max() > 0
            assert without[name] is None
        else:
            torch.testing.assert_close(with_loss[name], without[name])
    weighted = Sparsifiner(32, grid=(16,), reduce_n_factor=2, reconstruction_weight=0.02)
    weighted.load_state_dict(mixer.state_dict())
    double = gradients(weighted.train())
    torch.testing.assert_close(double["predictor.basis_out"], 2 * with_loss["predictor.basis_out"])

    optimizer = torch.optim.Adam(mixer.predictor.parameters(), lr=1e-2)

    def error():
        q, k, _ = mixer.qkv(x).unflatten(-1, (3, 1, 32)).permute(2, 0, 3, 1, 4).unbind(0)
        return float(mixer.predictor.reconstruction_loss(q * 20, k * 20, None, scale=32**-0.5, first=0).detach())

    with torch.no_grad():
        mixer.qkv.weight.mul_(20)  # peaked attention, worth predicting
    mixer.train()
    start = error()
    for _ in range(60):
        optimizer.zero_grad()
        with collect_losses() as losses:
            mixer(x)
        losses["connectivity"].backward()
        optimizer.step()
    assert error() < 0.9 * start


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("token", [False, True])
def test_resize(shared, token):
    mixer = Sparsifiner(32, grid=(4, 6), share_inout_proj=shared, class_token=token, reduce_n_factor=3)
    tables = mixer.predictor
    with torch.no_grad():  # a table that is linear over the grid is linear after interpolation, but for the border
        for table in {tables.basis_in, tables.basis_out}:
            table[int(token) :] = torch.linspace(0, 1, 4)[:, None, None].expand(4, 6, table.shape[1]).reshape(24, -1)
    first = tables.basis_out[0].clone()
    mixer.resize_grid((8, 3))
    assert mixer.grid == (8, 3)
    assert tables.basis_in.shape[0] == 24 + int(token)
    assert (tables.basis_in is tables.basis_out) == shared
    if token:
        assert torch.equal(tables.basis_out[0], first)
    rows = tables.basis_out.detach()[int(token) :].view(8, 3, -1)
    torch.testing.assert_close(rows[:, 0], rows[:, 2])
    assert (rows[1:-1].diff(dim=0) > 0).all()
    assert mixer(torch.randn(1, 8, 3, 32)).isfinite().all()
    with pytest.raises(ConfigError, match="cannot be resized"):
        mixer.resize_grid((24,))


def test_ranking_survives_autocast():
    mixer = Sparsifiner(32, grid=(14, 14), attn_keep_rate=0.1).eval()
    q, k = torch.randn(2, 1, 1, 196, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = mixer.predictor(q, k, None, class_token=False, first=0)
    assert torch.equal(low, mixer.predictor(q, k, None, class_token=False, first=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_keep_rate": 0.0}, "attn_keep_rate"),
        ({"reduce_n_factor": 0}, "reduce_n_factor"),
        ({"coef_topk": -1}, "coef_topk"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        create_mixer("sparsifiner", 32, grid=(4,), **options)


def test_resize_keeps_dense_scores():
    """Four times the tokens of the same map: the same coefficients, on a basis repeated four times."""
    mixer = Sparsifiner(32, grid=(8,), reduce_n_factor=4, coef_topk=0, basis_threshold=0.0)
    with torch.no_grad():
        for table in (mixer.predictor.basis_in, mixer.predictor.basis_out):
            table.copy_(torch.tensor([1.0, -0.5]).expand(8, 2))
    q, k = torch.randn(2, 1, 1, 8, 32)

    def scores(q, k):
        return mixer.predictor.scores(mixer.predictor.coefficients(q, k, None, 0), 0)

    before = scores(q, k)
    mixer.resize_grid((32,))
    assert mixer.predictor.basis_in.shape == (32, 8)
    after = scores(q.repeat_interleave(4, 2), k.repeat_interleave(4, 2))
    torch.testing.assert_close(after, before.repeat_interleave(4, 2).repeat_interleave(4, 3), rtol=1e-4, atol=1e-5)


def test_cost():
    """Memory grows as N^2, time as N^3, since the basis grows with N."""
    costs = []
    for grid in ((16, 16), (32, 32)):
        mixer = create_mixer("sparsifiner", 8, grid=grid, reduce_n_factor=2, head_dim=8).eval()
        x = torch.randn(1, *grid, 8)
        costs.append((measure_flops(mixer, x), measure_activation_bytes(mixer, x)))
    time, memory = (math.log(large / small, 4) for small, large in zip(*costs, strict=True))
    assert abs(time - 3) < 0.2
    assert abs(memory - 2) < 0.3
