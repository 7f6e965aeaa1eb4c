"""Block selection and permutations: golden values, and what each choice must hold."""

from __future__ import annotations

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import block_sparse_attention, blocks_of_mask
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.attention.block_selection import (
    SELECTORS,
    Tiles,
    block_scores,
    mean_pooled_blocks,
    pool_blocks,
    separator_positions,
    visible_by_separators,
)
from mixerzoo.mixers.attention.permutations import PERMUTATIONS, permuted_blocks, segment_index
from mixerzoo.tests.utils import load_golden, relative_error


def tokens_first(golden, *names):
    return [golden[f"input.{n}"].transpose(1, 2).contiguous().requires_grad_() for n in names]


def check_attention(golden, leaves, y, output="output", cotangent="cotangent", names=("query_states", "key_states")):
    y = y.transpose(1, 2)
    assert relative_error(y, golden[output]) < 1e-5
    grads = torch.autograd.grad((y * golden[cotangent]).sum(), leaves)
    for name, grad in zip(names, grads, strict=False):
        assert relative_error(grad.transpose(1, 2), golden[f"grad.input.{name}"]) < 2e-5, name


def test_golden_pbs():
    golden, names = load_golden("pbs_attn"), ("query_states", "key_states", "value_states")
    q, k, v = leaves = tokens_first(golden, *names)
    options = golden.kwargs
    found = permuted_blocks(
        q, k, block_size=options["block_size"], segment_size=options["segment_size"], threshold=options["threshold"],
        first_block=options["force_select_first_block"], pool=(options["query_pool_mode"], options["key_pool_mode"]),
    )  # fmt: skip
    assert torch.equal(found.index, golden["output.perm_key_indices"])
    assert torch.equal(found.selected, golden["output.selected_block_mask"])
    assert torch.equal(found.mask, golden["output.block_mask"])
    assert relative_error(found.scores, golden["output.block_attn_scores"]) < 1e-5
    blocks = blocks_of_mask(found.mask, options["block_size"], options["block_size"])
    check_attention(
        golden, leaves, block_sparse_attention(q, k, v, blocks, causal=True, k_index=found.index), names=names
    )


def test_golden_mean_pooling():
    golden, names = load_golden("block_sparse_meanpool_attn"), ("query_states", "key_states", "value_states")
    q, k, v = leaves = tokens_first(golden, *names)
    options = golden.kwargs
    size = options["block_size"]
    mask, scores = mean_pooled_blocks(
        q, k, block_size=size, threshold=options["threshold"], first_block=options["force_select_first_block"],
        current_block=options["force_select_current_block"],
    )  # fmt: skip
    assert torch.equal(mask, golden["output.block_mask"])
    assert relative_error(scores, golden["output.block_attn_scores"]) < 1e-5
    y = block_sparse_attention(q, k, v, blocks_of_mask(mask, size, size), causal=True)
    check_attention(golden, leaves, y, names=names)


def every_block(ids, size=8):
    """All blocks of a sequence of ids (B, N)."""
    count = -(-ids.shape[1] // size)
    return blocks_of_mask(torch.ones(1, 1, count, count, dtype=torch.bool), size, size)


def reach(window, options):
    """Tokens that the window shows, the query's own included: officially one more unless the diagonal is excluded."""
    return window + (not options.get("EXCLUDE_DIAGONAL", True))


@pytest.mark.parametrize("name", ["sepllm_attention", "sepllm_attention_streamingllm"])
def test_golden_sepllm(name):
    golden, options = load_golden(name), load_golden(name).kwargs
    q, k, v = leaves = tokens_first(golden, "q", "k", "v")
    window, separators = reach(options["prefill_local_window_size"], options), options["separator_token_ids"]
    everywhere, visible = visible_by_separators(
        golden["input.input_ids"], separators, window=window, initial=options["init_tok_max_idx"] + 1,
        streaming=options["streamingLLM"],
    )  # fmt: skip
    assert torch.equal(visible, golden["output.attn_mask_visible"][:, 0])
    blocks = every_block(golden["input.input_ids"])
    y = block_sparse_attention(q, k, v, blocks, causal=True, window=window, global_keys=everywhere)
    check_attention(golden, leaves, y, "output.out", "cotangent.out", ("q", "k", "v"))


def test_golden_sepllm_by_layer_with_padding():
    golden = load_golden("sepllm_attention_layerwise_leftpad")
    options, ids = golden.kwargs, golden["input.input_ids"]
    q, k, v = tokens_first(golden, "q", "k", "v")
    blocks = every_block(ids)
    padding = options["PADDING_ID"] if options["BATCH_ADAPTIVE_INIT_POS"] else None
    outputs = []
    for layer, size in enumerate(options["prefill_loc_win_size_list"]):
        window = reach(size, options)
        everywhere, visible = visible_by_separators(
            ids, options["separator_token_ids"], window=window, initial=options["init_tok_max_idx"] + 1,
            streaming=options.get("streamingLLM", False), padding_id=padding,
        )  # fmt: skip
        assert torch.equal(visible, golden["output.attn_mask_visible"][layer, :, 0])
        outputs.append(block_sparse_attention(q, k, v, blocks, causal=True, window=window, global_keys=everywhere))
    y = torch.stack(outputs)
    assert relative_error(y.transpose(2, 3), golden["output.out"]) < 1e-5
    (y.transpose(2, 3) * golden["cotangent.out"]).sum().backward()
    for name, leaf in (("q", q), ("k", k), ("v", v)):
        assert relative_error(leaf.grad.transpose(1, 2), golden[f"grad.input.{name}"]) < 2e-5
    inter, intra = separator_positions(ids, options["separator_token_ids"])
    assert torch.equal(inter, golden["output.bipe_inter_pos"])
    assert torch.equal(intra, golden["output.bipe_intra_pos"])


def tiles(count: int = 9, heads: int = 4, causal: bool = True) -> Tiles:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, count, 8, generator=generator) for h in (heads, 2))
    allowed = torch.ones(1, 1, count, count, dtype=torch.bool)
    return Tiles(q, k, torch.arange(count)[None], allowed.tril(-1) if causal else allowed, 0.5)


@pytest.mark.parametrize("name", SELECTORS.entries)
@pytest.mark.parametrize("causal", [True, False])
def test_selectors_choose_candidates_and_streams_choose_the_same(name, causal):
    """Some but not all candidates; and a tile by itself, before later blocks exist, gets the same list."""
    given = tiles(causal=causal)
    mask = SELECTORS.entries[name](given).expand(2, 4, 9, 9)
    assert not (mask & ~given.allowed).any()
    assert mask[:, :, -1].any()
    assert name == "dense" or not torch.equal(mask, given.allowed.expand_as(mask))
    if causal:
        t = 6
        alone = Tiles(
            given.q[:, :, t : t + 1],
            given.k[:, :, :t],
            given.tile[:, t : t + 1],
            given.allowed[:, :, t : t + 1, :t],
            0.5,
        )
        found = SELECTORS.entries[name](alone).expand(2, 4, 1, t)
        assert torch.equal(found[:, :, 0], mask[:, :, t, :t])


def test_amounts():
    given = tiles()
    candidates = given.allowed.sum(-1)
    assert torch.equal(SELECTORS.entries["top_k"](given, keep=3).sum(-1), candidates.clamp(max=3).expand(2, 4, 9))
    assert torch.equal(SELECTORS.entries["top_k"](given, keep=0.5).sum(-1), ((candidates + 1) // 2).expand(2, 4, 9))
    mask, scores = SELECTORS.entries["top_p"](given, threshold=0.7), block_scores(given)
    reached = (scores * mask).sum(-1)[:, :, 1:]
    assert (reached >= 0.7 - 1e-6).all()
    smallest = torch.where(mask, scores, 2.0).amin(-1)[:, :, 1:]
    assert (reached - smallest < 0.7).all(), "without its last block the sum is below"
    assert torch.equal(SELECTORS.entries["top_p"](given, threshold=1.0), given.allowed)
    assert (SELECTORS.entries["random"](given, blocks=2, width=1, sinks=1)[:, :, -1].sum(-1) == 3).all()
    shares = SELECTORS.entries["random"](tiles(64, 4, False), blocks=4).float().mean((0, 1, 2))[2:]
    assert 0.5 * shares.mean() < shares.min()
    assert shares.max() < 2 * shares.mean()


def test_pooling():
    x = torch.randn(2, 7, 3, 4)
    assert torch.allclose(pool_blocks(x, 4)[:, :, 1], x[:, 4:].mean(1))
    assert torch.allclose(pool_blocks(x, 4, pad_counts=True)[:, :, 1], x[:, 4:].sum(1) / 4)
    assert torch.allclose(pool_blocks(x, 4, "max")[:, :, 0], x[:, :4].amax(1))
    valid = torch.arange(7) < torch.tensor([[7], [2]])
    assert torch.allclose(pool_blocks(x, 4, valid=valid)[1, :, 0], x[1, :2].mean(0))
    assert not pool_blocks(x, 4, "max", valid=valid)[1, :, 1].any()


@pytest.mark.parametrize("name", PERMUTATIONS.entries)
def test_permutations_stay_in_their_segments(name):
    q, k = torch.randn(2, 22, 4, 8), torch.randn(2, 22, 2, 8)
    index = segment_index(PERMUTATIONS.entries[name], q, k, segment=8, queries=4, scale=0.5)
    assert index.shape == (2, 2, 22)
    assert torch.equal(index.sort(-1).values, torch.arange(22).expand(2, 2, 22))
    assert torch.equal(index[..., :16] // 8, (torch.arange(16) // 8).expand(2, 2, 16))
    assert torch.equal(index[..., 16:], torch.arange(16, 22).expand(2, 2, 6))
    assert torch.equal(index, torch.arange(22).expand(2, 2, 22)) == (name == "identity")


def test_sorting_by_attention_puts_what_matters_first():
    q, k = torch.ones(1, 8, 1, 4), torch.zeros(1, 8, 1, 4)
    k[0, [2, 5]] = 3.0
    k[0, 5] += 1.0
    index = segment_index(PERMUTATIONS.entries["attention"], q, k, segment=8, queries=2, scale=1.0)
    assert index[0, 0].tolist() == [5, 2, 0, 1, 3, 4, 6, 7]


def test_errors():
    for name, options in (
        ("top_k", {"keep": 0}), ("top_k", {"keep": 1.5}), ("top_p", {"threshold": 0.0}), ("strided", {"stride": 0}),
        ("window", {"width": -1}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"mixer\.selector\.{next(iter(options))}"):
            create_mixer("block_sparse_attention", 16, selector={"name": name, **options})
    with pytest.raises(ConfigError, match="multiple"):
        permuted_blocks(torch.ones(1, 8, 1, 4), torch.ones(1, 8, 1, 4), block_size=4, segment_size=6, threshold=0.5)
