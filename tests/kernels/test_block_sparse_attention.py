"""`block_sparse_attention`: closed forms, eager and Triton against the reference, edge cases, and broken kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.kernels import Blocks, block_sparse_attention, blocks_of_lists, blocks_of_mask
from mixerzoo.kernels.block_sparse_attention.blocks import mask_of_blocks, transposed
from mixerzoo.tests.kernels.utils import agrees, check_reference, compare, mutated
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("eager", "reference", "triton")


def inputs(
    batch: int, queries: int, keys: int, heads: int, groups: int, size: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(length: int, count: int) -> Tensor:
        return torch.randn(batch, length, count, size, generator=generator).to(dtype)

    return {"q": normal(queries, heads), "k": normal(keys, groups), "v": normal(keys, groups)}


def lists(queries: int, keys: int, block_q: int, block_k: int, shape: tuple[int, int] = (1, 1)) -> Blocks:
    """Half of the blocks at random; the first tile has none."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(*shape, -(-queries // block_q), -(-keys // block_k), generator=generator) < 0.5
    mask[:, :, 0] = False
    return blocks_of_mask(mask, block_q, block_k)


def permutation(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).argsort(-1)


def variant(name: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and options of a case; sizes that the blocks do not divide."""
    ids = torch.tensor([[0] * 9 + [1] * 21, [3] * 15 + [4] * 15])
    real = torch.arange(30) < torch.tensor([[30], [21]])
    if name == "causal_groups":
        return inputs(2, 41, 41, 4, 2, 5, dtype), {"blocks": lists(41, 41, 16, 16, (2, 2)), "causal": True}
    if name == "lengths":
        return inputs(1, 20, 41, 2, 1, 16, dtype), {
            "blocks": lists(20, 41, 8, 32, (1, 2)),
            "causal": True,
            "scale": 1.3,
        }
    if name == "permuted_heads":
        index = {"q_index": permutation(1, 4, 30), "k_index": permutation(2, 4, 30)}
        return inputs(2, 30, 30, 4, 2, 8, dtype), {"blocks": lists(30, 30, 16, 16), "causal": True, **index}
    if name == "permuted":
        return inputs(1, 30, 30, 4, 2, 8, dtype), {
            "blocks": lists(30, 30, 8, 16, (1, 4)),
            "k_index": permutation(1, 2, 30),
        }
    if name == "packed_padded":
        rules = {"document_ids": ids, "key_mask": real, "causal": True}
        return inputs(2, 30, 30, 2, 2, 8, dtype), {"blocks": lists(30, 30, 16, 16), **rules}
    if name == "window":
        rules = {"window": 7, "global_keys": torch.arange(30)[None] % 11 == 0, "positions": permutation(1, 30)}
        return inputs(1, 30, 30, 2, 1, 8, dtype), {"blocks": lists(30, 30, 16, 16), **rules}
    assert name == "tokens"
    return inputs(1, 9, 9, 2, 1, 8, dtype), {"blocks": lists(9, 9, 1, 1), "causal": True}


VARIANTS = ["causal_groups", "lengths", "permuted_heads", "permuted", "packed_padded", "window", "tokens"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_are_dense_attention(backend):
    x = inputs(1, 33, 33, 2, 1, 8)
    blocks = blocks_of_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16, 16)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x.values()), is_causal=True, enable_gqa=True)
    y, lse = block_sparse_attention(**x, blocks=blocks, causal=True, return_lse=True, backend=backend)
    torch.testing.assert_close(y, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    scores = torch.einsum("bnhd,bmgd->bhnm", x["q"], x["k"]) / 8**0.5
    hidden = torch.ones(33, 33, dtype=torch.bool).triu(1)
    torch.testing.assert_close(lse, scores.masked_fill(hidden, float("-inf")).logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_reference_is_a_masked_softmax():
    """Written out for one query of a permuted case."""
    x = inputs(1, 6, 6, 1, 1, 4, torch.float64)
    blocks = blocks_of_lists(torch.tensor([[[[0], [2], [1]]]]), 2, 2)
    index = torch.tensor([[[5, 2, 0, 1, 4, 3]]])
    y = block_sparse_attention(**x, blocks=blocks, k_index=index, backend="reference")
    keys = [4, 3]  # of tile 1, block 2: places 4 and 5
    weights = (x["q"][0, 2, 0] @ x["k"][0, keys, 0].T / 2).softmax(0)
    torch.testing.assert_close(y[0, 2, 0], weights @ x["v"][0, keys, 0])


def test_reference_gradients():
    options = {
        "blocks": lists(5, 5, 2, 2),
        "k_index": permutation(1, 1, 5),
        "document_ids": torch.tensor([[0, 0, 0, 1, 1]]),
    }
    check_reference(block_sparse_attention, inputs(1, 5, 5, 2, 1, 2), return_lse=False, **options)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lse", [False, True])
def test_eager(name, lse):
    x, options = variant(name)
    if lse:  # the log-sum-exp of a query that sees nothing is -inf: it has no gradient to compare
        options["blocks"] = blocks_of_mask(
            torch.ones(mask_shape(options["blocks"], x), dtype=torch.bool), *options["blocks"][2:]
        )
        options.pop("key_mask", None)
        options.pop("window", None)
        options.pop("global_keys", None)
    compare(block_sparse_attention, x, "eager", return_lse=lse, **options)


def mask_shape(blocks: Blocks, x: dict[str, Tensor]) -> tuple[int, int, int, int]:
    batch, heads, tiles = blocks.offsets.shape
    return batch, heads, tiles - 1, -(-x["k"].shape[1] // blocks.block_k)


def test_eager_half():
    x, options = variant("permuted", torch.bfloat16)
    compare(block_sparse_attention, x, "eager", **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_triton(name):
    x, options = variant(name)
    compare(block_sparse_attention, x, "triton", **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_triton_half(name, dtype):
    x, options = variant(name, dtype)
    compare(block_sparse_attention, x, "triton", **options)


def test_triton_strided_and_its_log_sum_exp():
    x = {k: v.transpose(1, 2).contiguous().transpose(1, 2) for k, v in inputs(1, 20, 20, 2, 1, 8).items()}
    blocks = blocks_of_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16)
    compare(block_sparse_attention, x, "triton", blocks=blocks, causal=True, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend):
    """One token; lists without blocks; no tokens at all."""
    one = blocks_of_lists(torch.zeros(1, 1, 1, 1, dtype=torch.int64), 64, 64)
    x = inputs(1, 1, 1, 2, 1, 4)
    y = block_sparse_attention(**x, blocks=one, causal=True, backend=backend)
    torch.testing.assert_close(y, x["v"].expand_as(y))
    none = blocks_of_mask(torch.zeros(1, 1, 1, 1, dtype=torch.bool), 64, 64)
    x = {k: v.requires_grad_() for k, v in inputs(1, 5, 5, 2, 1, 4).items()}
    y, lse = block_sparse_attention(**x, blocks=none, return_lse=True, backend=backend)
    assert not y.any()
    assert (lse == float("-inf")).all()
    grads = torch.autograd.grad(y.sum(), list(x.values()))
    assert not any(g.any() for g in grads)
    empty = {k: v[:0] for k, v in inputs(1, 5, 5, 2, 1, 4).items()}
    assert block_sparse_attention(**empty, blocks=none, backend=backend).shape == (0, 5, 2, 4)


def test_lists_and_masks():
    mask = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[0, 1, 4] = False
    blocks = blocks_of_mask(mask, 4, 4)
    assert torch.equal(mask_of_blocks(blocks, 7), mask)
    offsets, tiles = transposed(blocks, 7)
    assert torch.equal(mask_of_blocks(Blocks(offsets, tiles, 4, 4), 5), mask.transpose(2, 3))
    wide = blocks_of_lists(
        mask.to(torch.int64).argsort(-1, descending=True), 4, 4, mask.sort(-1, descending=True).values
    )
    assert torch.equal(mask_of_blocks(wide, 7), mask)
    padded = Blocks(
        blocks.offsets, torch.cat([blocks.ids, blocks.ids.new_full((3,), 6)]), 4, 4
    )  # room that is not read
    assert torch.equal(mask_of_blocks(padded, 7), mask)
    assert torch.equal(transposed(padded, 7)[0], offsets)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_registration_and_compilation(backend):
    x, options = inputs(1, 9, 9, 2, 1, 4), {"causal": True, "k_index": permutation(1, 1, 9)}
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Any = block_sparse_attention(q, k, v, blocks_of_mask(mask, 16, 16), **options, backend=backend)
        return y

    expected = run(**x)
    leaves = [t.clone().requires_grad_() for t in x.values()]
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.autograd.grad(y.sum(), leaves)
    blocks = blocks_of_mask(mask, 16, 16)
    call = (blocks.offsets, blocks.ids, 16, 16, 0.4, True, -1, *(None,) * 7)
    torch.library.opcheck(getattr(torch.ops.mixerzoo, f"block_sparse_attention_{backend}"), (*leaves, *call))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k_index": torch.zeros(1, 1, 30, dtype=torch.int64)}, "not a permutation"),
        ({"k_index": permutation(1, 3, 30)}, "k_index"),
        ({"q_index": permutation(1, 1, 29)}, "q_index"),
        ({"q": torch.zeros(2, 30, 3, 8)}, "do not divide"),
        ({"blocks": blocks_of_lists(torch.tensor([[[[0], [2]]]]), 16, 16)}, "block numbers"),
        ({"blocks": blocks_of_lists(torch.tensor([[[[0]]]]), 16, 16)}, "offsets"),
        ({"window": 0}, "window"),
        ({"global_keys": torch.zeros(1, 30, dtype=torch.bool)}, "window"),
        ({"key_document_ids": torch.zeros(2, 30)}, "document_ids"),
        ({"positions": torch.zeros(2, 3)}, "positions"),
    ],
)
def test_errors(change, match):
    call = {**inputs(2, 30, 30, 4, 2, 8), "blocks": lists(30, 30, 16, 16)} | change
    with pytest.raises(ConfigError, match=match):
        block_sparse_attention(**call)


SUM = "acc = dot(weights.to(v_tile.dtype), v_tile, PRECISION, acc{})"
DQ = "acc = dot(d_scores.to(k_tile.dtype), k_tile, PRECISION{})"
DV = "dv_sum = dot(weights.to(d_tile.dtype), d_tile, PRECISION{})"
LOAD = '"""(tokens, D) of a tensor whose last axis is contiguous; zero where there is none."""\n' + (
    "    channel = tl.arange(0, BLOCK_D)\n"
    "    start = tl.cast(token, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h"
)
MUTANTS = [
    ("causal_groups", "seen &= q_pos >= k_pos", "seen &= q_pos > k_pos"),
    ("causal_groups", SUM.format(" * shrink[:, None]"), SUM.format("")),
    ("causal_groups", DQ.format(", acc"), DQ.format("")),
    ("causal_groups", DV.format(", dv_sum"), DV.format("")),
    ("causal_groups", "head = unit * PACK + row % PACK", "head = unit * PACK + row // PACK % PACK"),
    ("permuted", "token = tl.cast(tl.load(k_index + token, mask=inside, other=0), tl.int32)", "pass"),
    ("packed_padded", "seen &= q_doc == k_doc", "seen &= q_doc >= k_doc"),
    ("lengths", "inside &= token < keys", "inside &= token <= keys"),
    ("causal_groups", LOAD, LOAD.replace("* stride_t", "* D")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS)
def test_broken_kernel_is_caught(name, old, new, tmp_path):
    x, options = variant(name)
    if name == "lengths":
        longer = {k: torch.cat([v, v[:, :1]], 1) for k, v in x.items()}  # a token behind the last one
        x = {k: v[:, :-1] for k, v in longer.items()}
        options = {"blocks": lists(20, 41, 8, 7)}
    with mutated("block_sparse_attention", old, new, tmp_path, files=("triton_tiles", "triton")):
        assert not agrees(lambda: compare(block_sparse_attention, x, "triton", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_tiles_fit_the_smallest_shared_memory(size, dtype):
    """99 KB (compute capability 8.6, 8.9 and 12.0) hold what a step reads and what a program keeps for its products."""
    from mixerzoo.kernels.block_sparse_attention.triton import tile_sizes

    t = tile_sizes(size, dtype)
    row = size * dtype.itemsize
    for kept, read in (
        (t.rows, 2 * t.columns),
        (2 * t.query_rows, 2 * t.query_columns),
        (2 * t.key_columns, 2 * t.key_rows),
    ):
        assert (kept + t.stages * read) * row <= 101376


@pytest.mark.parametrize("size", [128, 256])
def test_triton_wide_heads_in_float32(size):
    blocks = lists(40, 40, 16, 16)
    compare(block_sparse_attention, inputs(1, 40, 40, 1, 1, size), "triton", blocks=blocks, causal=True)


def test_triton_lists_of_more_than_31_bits():
    """The place of a block in its list, counted in keys, outgrows int32 at 128k tokens, 32 heads and blocks of 64."""
    from mixerzoo.kernels.block_sparse_attention import triton

    first = 2**31 // 64
    ids = torch.zeros(first + 2, dtype=torch.int32)
    ids[first + 1] = 1
    near = Blocks(torch.tensor([[[0, 2]]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), 64, 64)
    far = Blocks(torch.tensor([[[first, first + 2]]], dtype=torch.int32), ids, 64, 64)
    given = {k: v.requires_grad_() for k, v in inputs(1, 64, 128, 1, 1, 16).items()}

    def answers(blocks: Blocks) -> tuple[Tensor, ...]:
        y, lse = block_sparse_attention(**given, blocks=blocks, return_lse=True, backend="triton")
        with pytest.MonkeyPatch.context() as patch:  # the transposed lists would start at 0
            patch.setattr(triton, "transposed", lambda *_: transposed(near, 2))
            return y, lse, *torch.autograd.grad(y.sum() + lse.sum(), list(given.values()))

    assert all(torch.equal(a, b) for a, b in zip(answers(far), answers(near), strict=True))
