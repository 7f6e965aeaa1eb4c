"""What heads promise: classifiers and decoders of images ("head"), and heads of language models ("objective").

Axis letters: B batch, H height, W width, N tokens, C channels, K classes, V vocabulary; `*grid` is (N,), (H, W) or
(T, H, W).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...mixers.part import stated
from ...models.parts.heads import HEADS, POOLS
from ...models.parts.language_heads import LANGUAGE_HEADS, LanguageHead, tie_layers
from ..base import at_the_smallest, promise, require
from ..tools import GARBAGE, ROUNDED, Grid, garbled, near, sequence_masks, tokens
from .shared import DIM, Kind, differ, share

CLASSES, STRIDE, MAPS = 5, 2, 2
GRIDS: dict[int, tuple[Grid, ...]] = {1: ((3,), (12,)), 2: ((2, 3), (4, 3)), 3: ((2, 2, 3), (2, 3, 4))}

# -- heads of images: a decoder gets the same map from every stage, which need not differ in size


def _head(name: str, grid: Grid, **options: Any) -> nn.Module:
    filled_in: Any = {"dims": [DIM] * MAPS, "stride": STRIDE, "frames": grid[0] if len(grid) == 3 else None}
    return HEADS.build({"name": name, **options}, DIM, CLASSES, key="head", **filled_in)


def _tokens(part: nn.Module, batch: int, grid: Grid) -> Tensor:
    return tokens(batch, *grid, DIM)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-3] * STRIDE, x.shape[-2] * STRIDE


def _of_head(head: Any, x: Tensor, **how: Any) -> Tensor:
    return head([x] * head.maps, size=_size(x), **how) if head.maps else head(x, **how)


def _head_shape(head: Any, x: Tensor) -> tuple[int, ...]:
    grid = _size(x) if head.maps else () if head.pool else tuple(x.shape[1:-1])
    return (x.shape[0], *grid, CLASSES)


HEAD = Kind("head", HEADS, GRIDS, _head, _tokens, _of_head, _head_shape)
share(HEAD)


@promise("head")
def the_classifier_reads_the_features(name: str) -> None:
    """`classify` of what `pre_logits` gives, `dim` channels, is what the head gives; and `fc` is its last layer."""
    for grids in HEAD.all_grids(name):

        def check(grid: Grid) -> None:
            head: Any = HEAD.build(name, grid)
            x = tokens(2, *grid, DIM)
            with torch.no_grad():
                features, y = _of_head(head, x, pre_logits=True), _of_head(head, x)
                width = features.shape[-1]
                near(head.classify(features), y, "The classifier does not read the features.", grid=grid)
                require(width == head.dim, "`dim` is not the width of the features.", got=width, dim=head.dim)
                nn.init.zeros_(head.fc.weight)
                nn.init.zeros_(head.fc.bias)
                require(not _of_head(head, x).any(), "`fc` is not the last layer.", grid=grid)

        at_the_smallest(check, grids)


@promise("head")
def it_can_be_reset(name: str) -> None:
    """`reset` gives a fresh classifier for another number of classes; with 0 the features come out."""
    grid = HEAD.last_grid(name)
    head: Any = HEAD.build(name, grid)
    x = tokens(2, *grid, DIM)
    with torch.no_grad():
        features = _of_head(head, x, pre_logits=True)
        for classes in (7, 0, 3):
            head.reset(classes)
            y = _of_head(head.eval(), x)
            require(y.shape[-1] == (classes or features.shape[-1]), "A reset is not honoured.", classes=classes)
            if not classes:
                near(y, features, "Without classes the features do not come out.")


@promise("head")
def pools_are_honoured_or_refused(name: str) -> None:
    """Every pooling does what it says, or is refused by name."""
    ranks = HEAD.ranks_of(name)
    pooled_first: list[Tensor] = []
    for pool in (*POOLS, "no such pool"):
        of_token = pool.endswith("token")  # of a class token in a sequence
        if of_token and 1 not in ranks:
            continue
        grid = GRIDS[1 if of_token else ranks[-1]][-1]
        head: Any = HEAD.build(name, grid)
        try:
            head.set_pool(pool)
        except OptionError as error:
            require(error.option == "pool", "A pooling is refused without its name.", pool=pool, said=str(error))
            continue
        require(pool in POOLS, "A pooling that does not exist is taken.", pool=pool)
        x = tokens(2, *grid, DIM)
        with torch.no_grad():
            y = _of_head(head, x)
            shape = _head_shape(head, x)
            require(tuple(y.shape) == shape, "A pooling gives another shape.", pool=pool, got=tuple(y.shape))
            if pool and not head.maps and not of_token:  # where all tokens are equal, poolings agree
                one = tokens(2, *[1] * len(grid), DIM)
                pooled = head(one.expand(2, *grid, DIM))
                pooled_first.append(pooled)
                near(pooled, pooled_first[0], "Equal tokens are pooled to something else.", pool=pool)


# -- heads of language models

VOCABULARY = 11
MODEL = {
    "vocab_size": VOCABULARY, "num_classes": CLASSES, "tie_embeddings": False, "pool": "mean", "head_act": "gelu",
    "norm": "rms_norm", "dropout": 0.0,
}  # fmt: skip


def _objective(name: str, grid: Grid, **options: Any) -> nn.Module:
    head = LANGUAGE_HEADS.build(name, DIM, key="objective", **{**MODEL, **options})
    tie_layers(head, nn.Parameter(tokens(VOCABULARY, DIM)))
    return head


def _objective_shape(head: nn.Module, x: Tensor) -> tuple[int, ...]:
    y = head(x)
    known = tuple(y.shape) in ((*x.shape[:2], VOCABULARY), (*x.shape[:2], DIM), (x.shape[0], CLASSES))
    require(known, "Neither logits, features nor classes come out.", got=tuple(y.shape))
    return tuple(y.shape)


OBJECTIVE = Kind(
    "objective", LANGUAGE_HEADS, {1: GRIDS[1]}, _objective, _tokens, lambda part, x: part(x), _objective_shape,
    lambda name: (1,),
)  # fmt: skip
share(OBJECTIVE)


def _data(name: str, what: str) -> Any:
    return stated(LANGUAGE_HEADS.entries[name], what, LanguageHead)


@promise("objective")
def the_vocabulary_is_where_it_is_said(name: str) -> None:
    """`vocabulary` leads to the layer that gives the logits, of weight `(V, C)`; a tied one has the weight given."""
    head, path = OBJECTIVE.build(name, (12,)), _data(name, "vocabulary")
    if path is None:
        return
    layer: Any = head.get_submodule(path)
    require(
        tuple(layer.weight.shape) == (VOCABULARY, DIM), "The layer has another shape.", got=tuple(layer.weight.shape)
    )
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, y: seen.append(y))
    y = head(tokens(2, 12, DIM))
    require(seen and torch.equal(seen[-1], y), "The layer does not give the logits.", path=path)
    if "tie_embeddings" in inspect.signature(LANGUAGE_HEADS.entries[name]).parameters:
        tied: Any = _objective(name, (12,), tie_embeddings=True)
        weight = nn.Parameter(tokens(VOCABULARY, DIM, seed=3))
        tie_layers(tied, weight)
        require(tied.get_submodule(path).weight is weight, "A tied layer does not have the weight given.", path=path)
        held = [key for key, value in tied.state_dict().items() if value.shape == weight.shape]
        require(not held, "The state dict holds a tied weight.", keys=held)


@promise("objective")
def tokens_mix_as_stated(name: str) -> None:
    """By gradient tokens see each other only if `mixes_tokens`; otherwise one alone gets what it gets among others."""

    def check(grid: Grid) -> None:
        head, x = OBJECTIVE.build(name, grid), tokens(2, *grid, DIM).requires_grad_()
        y = head(x)
        if _data(name, "mixes_tokens"):
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            require(float(grad.abs().max()) > 0, "No token is read.", grid=grid)
            return
        at = grid[0] // 2
        (grad,) = torch.autograd.grad(y[:, at].square().sum(), x)
        others = float(torch.cat([grad[:, :at], grad[:, at + 1 :]], 1).abs().max())
        require(others <= ROUNDED * float(grad.abs().max()), "Tokens are mixed, which is not stated.", grid=grid)
        with torch.no_grad():
            near(head(x[:, at]), y[:, at], "A single token gets something else.", grid=grid)

    at_the_smallest(check, GRIDS[1])


@promise("objective", applies=lambda name: _data(name, "mixes_tokens"))
def padding_is_never_read(name: str) -> None:
    """A head that mixes tokens honours a mask: real tokens decide, wherever padding stands and whatever it holds."""
    require(_data(name, "masks"), "It mixes tokens, and does not state `masks`.")
    for options in ({}, *_others(name)):

        def check(grid: Grid, options: dict[str, Any] = options) -> None:
            head, x = OBJECTIVE.build(name, grid, **options), tokens(3, *grid, DIM)
            for side, mask in sequence_masks(grid[0]).items():
                expected = head(garbled(x, mask, 0.0), mask=mask)
                for holds, value in GARBAGE.items():
                    y = head(garbled(x, mask, value), mask=mask)
                    near(y, expected, "Padding is read.", padding=side, holds=holds, grid=grid, options=options)
                if expected.ndim == 2:
                    for row in range(3):
                        alone = head(x[row, mask[row]][None])
                        near(
                            expected[row], alone[0], "A padded row differs from the row alone.", padding=side, grid=grid
                        )

        at_the_smallest(check, GRIDS[1])


def _others(name: str) -> list[dict[str, Any]]:
    return [{option: value} for option, value in _data(name, "alternatives").items()]


@promise("objective")
def what_it_takes_of_the_model_has_an_effect(name: str) -> None:
    """Each entry of the model's configuration that it takes changes the output or the parameters."""
    takes = {p.name for p in inspect.signature(LANGUAGE_HEADS.entries[name]).parameters.values()} - {"dim", "self"}
    others = {"vocab_size": 13, "num_classes": 7, **_data(name, "alternatives")}
    for option in sorted(takes):
        require(option in others or option == "tie_embeddings", "`alternatives` has no other value.", option=option)
        if option in others:
            changed = differ(OBJECTIVE, name, (12,), {}, {option: others[option]})
            require(changed, "An entry of the model has no effect.", option=option, value=others[option])
