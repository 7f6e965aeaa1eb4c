"""A test of the tests, as `test_planted_faults`: what models are put together from around token mixers; and tasks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from mixerzoo.contract import run
from mixerzoo.mixers import Mixer, aux_loss
from mixerzoo.mixers.attention.deconstructed import Deconstructed
from mixerzoo.mixers.base import MIXERS
from mixerzoo.mixers.part import states
from mixerzoo.mixers.positions import padding_last, reorder
from mixerzoo.models.parts.blocks import BLOCKS, Make, MetaFormerBlock
from mixerzoo.models.parts.channel_mixers import CHANNEL_MIXERS, ChannelMixer
from mixerzoo.models.parts.heads import HEADS, LinearHead
from mixerzoo.models.parts.language_block import LanguageBlock
from mixerzoo.models.parts.language_heads import LANGUAGE_HEADS, ClassifierHead, LanguageHead
from mixerzoo.models.parts.mobile_parts import FUSIONS, ConvFusion
from mixerzoo.models.parts.stem_variants import SHORTCUTS, GroupedConvShortcuts
from mixerzoo.models.parts.stems import STEMS, ConvStem
from mixerzoo.models.parts.token_pruning import TokenPruningBlock
from mixerzoo.schema import Parts
from mixerzoo.tasks.base import TASKS, Batch, Forward
from mixerzoo.tasks.images.memory import Digits
from torch import Tensor, nn

NAME = "faulty_for_a_test"


class LossNotStated(ChannelMixer):
    """Adds a loss to the objective that its class data do not name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        aux_loss("unheard_of", self.fc.weight.square().mean())
        return self.fc(x)


class ChannelHalfLeaks(MetaFormerBlock):
    """Takes the mean over the tokens away before the channel mixer."""

    def second_norm(self, x: Tensor) -> Tensor:
        return super().second_norm(x - x.mean(tuple(range(1, x.ndim - 1)), keepdim=True))


class MaskForgotten(MetaFormerBlock):
    """The channel mixer gets no mask."""

    def channel_half(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return super().channel_half(x, document_ids=document_ids)


class MixerWithoutMask(MetaFormerBlock):
    """The token mixer gets no mask."""

    def token_half(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return super().token_half(x, document_ids=document_ids)


class ScaleIgnored(MetaFormerBlock):
    """Takes `layer_scale` and does nothing with it."""

    def arrange(self, make: Make) -> None:
        super().arrange(make._replace(layer_scale=lambda: None))


class NeverDropped(MetaFormerBlock):
    """Takes `drop_path` and does nothing with it."""

    def arrange(self, make: Make) -> None:
        super().arrange(make._replace(drop_path=nn.Identity))


class WeightRead(MetaFormerBlock):
    """Reads the weight of a layer in place of calling it."""

    def token_half(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        x = super().token_half(x, mask=mask, document_ids=document_ids)
        return x + nn.functional.linear(x, self.aside.weight)

    def arrange(self, make: Make) -> None:
        super().arrange(make)
        self.aside = nn.Linear(self.dim, self.dim, bias=False)


class ComesBack(TokenPruningBlock):
    """Forgets which tokens were dropped before."""

    def narrowed(self, mask: Tensor | None, attention: Tensor) -> Tensor:
        return super().narrowed(mask, attention) if mask is None else torch.ones_like(mask)


class RoundedUp(ConvStem):
    """Says that the border counts, which the convolution leaves out."""

    def out_size(self, size: tuple[int, int], *, key: str = "image_size") -> tuple[int, int]:
        return -(-size[0] // self.stride), -(-size[1] // self.stride)


class BiasIgnored(ConvStem):
    """An option that nothing reads."""

    alternatives = {}

    def __init__(self, in_dim: int, dim: int, *, bias: bool = True) -> None:
        super().__init__(in_dim, dim)


class StemOverBatch(ConvStem):
    """Centred over the batch in training, which it does not state."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0) if self.training else x)


class OneSided(ConvFusion):
    """Looks at the blocks' result alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(0 * x, y)


class FirstStageToo(GroupedConvShortcuts):
    """Changes the input of the first stage."""

    def forward(self, index: int, x: Tensor, carried: list[Tensor]) -> Tensor:
        return 2 * x if index == 0 else super().forward(index, x, carried)


class FeaturesBypassed(LinearHead):
    """`pre_logits` gives features from before the norm."""

    def forward(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        return x.flatten(1, -2).mean(1) if pre_logits else super().forward(x)


class ResetForgotten(LinearHead):
    """Keeps its classifier."""

    def reset(self, num_classes: int) -> None:
        if not hasattr(self, "fc"):
            super().reset(num_classes)


class PoolSquared(LinearHead):
    """Takes the root of the mean square where it should take the largest values."""

    def forward(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        if self.pool == "max":
            x = x.flatten(1, -2).square().mean(1, keepdim=True).sqrt()
        return super().forward(x, pre_logits=pre_logits)


class PaddingPooled(ClassifierHead):
    """Pools over padding."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class PaddingTimesZero(ClassifierHead):
    """Multiplies padding away: NaN stays."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask[..., None] / mask.float().mean(1)[:, None, None])


class Blurred(nn.Linear):
    """A linear layer of every token and the mean of all."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + (input.mean(1, keepdim=True) if input.ndim > 2 else 0))


@states(LanguageHead, vocabulary="")
def sees_all_tokens(dim: int, *, vocab_size: int) -> nn.Module:
    """Logits of every token that also read the mean of all tokens, which it does not state."""
    return Blurred(dim, vocab_size, bias=False)


FAULTS = [
    ("channel_mixer", CHANNEL_MIXERS, LossNotStated, "auxiliary_losses_are_stated"),
    ("block", BLOCKS, ChannelHalfLeaks, "a_block_mixes_nothing_itself"),
    ("block", BLOCKS, MaskForgotten, "masks_and_documents_are_handed_on"),
    ("block", BLOCKS, MixerWithoutMask, "padding_is_never_read"),
    ("block", BLOCKS, ScaleIgnored, "what_stands_around_has_an_effect"),
    ("block", BLOCKS, NeverDropped, "what_stands_around_has_an_effect"),
    ("block", BLOCKS, WeightRead, "layers_are_called"),
    ("block", BLOCKS, ComesBack, "what_is_dropped_stays_dropped"),
    ("stem", STEMS, RoundedUp, "the_grid_is_the_one_that_is_said"),
    ("stem", STEMS, BiasIgnored, "every_option_has_an_effect"),
    ("stem", STEMS, StemOverBatch, "samples_mix_as_stated"),
    ("fusion", FUSIONS, OneSided, "both_inputs_are_used"),
    ("shortcut", SHORTCUTS, FirstStageToo, "the_first_stage_is_left_alone"),
    ("head", HEADS, FeaturesBypassed, "the_classifier_reads_the_features"),
    ("head", HEADS, ResetForgotten, "it_can_be_reset"),
    ("head", HEADS, PoolSquared, "pools_are_honoured_or_refused"),
    ("objective", LANGUAGE_HEADS, PaddingPooled, "padding_is_never_read"),
    ("objective", LANGUAGE_HEADS, PaddingTimesZero, "padding_is_never_read"),
    ("objective", LANGUAGE_HEADS, sees_all_tokens, "tokens_mix_as_stated"),
]


@pytest.mark.parametrize(("kind", "registry", "part", "promise"), FAULTS, ids=[f[2].__name__ for f in FAULTS])
def test_a_planted_fault_is_caught(kind: str, registry: Parts, part: Any, promise: str) -> None:
    registry.register(NAME)(part)
    try:
        results = [r for r in run(kind, [NAME]) if r.status != "kept"]
    finally:
        del registry.entries[NAME]
    assert promise in {r.promise for r in results if r.status == "broken"}, results


def test_the_block_of_language_models_keeps_the_promises_of_a_block() -> None:
    BLOCKS.register(NAME)(LanguageBlock)
    try:
        results = list(run("block", [NAME]))
    finally:
        del BLOCKS.entries[NAME]
    assert len(results) > 10
    assert all(r.status == "kept" for r in results), results


def test_losses_of_a_mixer_that_train_something_else_are_caught() -> None:
    class Untaught(Mixer, name=NAME):
        """Says that its loss trains the scale, and teaches the offset."""

        source = "a test"
        aux_losses = {"lesson": ("scale",)}

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.scale, self.offset = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            aux_loss("lesson", self.offset.square().mean())
            return x + self.offset + 0 * self.scale

    try:
        (result,) = run("mixer", [NAME], ["auxiliary_losses_are_stated"])
    finally:
        del MIXERS[NAME]
    assert result.status == "broken"
    assert "A parameter is not trained by its loss" in result.message


class EmbeddingsForgotten(Deconstructed):
    """Decodes without the embeddings."""

    def step(self, x_t: Tensor, state: Any, *, embeddings: Tensor | None = None) -> tuple[Tensor, Any]:
        return super().step(x_t, state)


class EmbeddingsInPlace(Deconstructed):
    """Leaves the embeddings where they stand when padding is moved."""

    def mixed(self, x: Tensor, beside: Tensor | None, mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
        if beside is not None and mask is not None:
            beside = reorder(beside, torch.argsort(padding_last(mask), dim=1))
        return super().mixed(x, beside, mask, document_ids)


@pytest.mark.parametrize("fault", [EmbeddingsForgotten, EmbeddingsInPlace])
def test_what_is_read_beside_and_goes_wrong_is_caught(fault: type) -> None:
    type("Faulty", (fault,), {"__doc__": fault.__doc__}, name=NAME)
    try:
        (result,) = run("mixer", [NAME], ["what_is_read_beside_moves_with_its_token"])
    finally:
        del MIXERS[NAME]
    assert result.status == "broken", result


# -- tasks


class Neighbours(Digits):
    """A sample depends on its place in the batch."""

    def fetch(self, split: str, index: Tensor, *, train: bool, generator: torch.Generator) -> Batch:
        batch = super().fetch(split, index, train=train, generator=generator)
        return {**batch, "input": batch["input"].cumsum(0)}


class Summed(Digits):
    """The loss is a sum over samples."""

    def loss(self, model: Forward, batch: Batch) -> Tensor:
        return super().loss(model, batch) * len(batch["index"])


class LastBatchAlone(Digits):
    """The figures are those of the last batch."""

    def update(self, metrics: Any, model: Forward, batch: Batch) -> None:
        for metric in metrics.values():
            metric.reset()
        super().update(metrics, model, batch)


COUNTER = itertools.count()


class AnotherPrint(Digits):
    """The fingerprint is another one each time."""

    def fingerprint(self) -> str:
        return f"{next(COUNTER):064x}"


class ModelIgnored(Digits):
    """The figures do not depend on the model."""

    def update(self, metrics: Any, model: Forward, batch: Batch) -> None:
        super().update(metrics, lambda x: torch.zeros(len(x), 10), batch)


class WrongExample(Digits):
    """The example has another dtype than the data."""

    def example(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        return (super().example(batch_size)[0].double(),)


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        (Neighbours, "samples_depend_on_their_number_alone"),
        (Summed, "the_loss_is_a_mean_over_targets"),
        (LastBatchAlone, "figures_do_not_depend_on_how_data_are_divided"),
        (AnotherPrint, "data_are_there_and_the_same_again"),
        (ModelIgnored, "the_metric_sees_the_model"),
        (WrongExample, "the_example_is_as_the_data"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_fault_of_a_task_is_caught(fault: type, promise: str) -> None:
    type("Faulty", (fault,), {"__doc__": fault.__doc__}, name=NAME)
    try:
        results = list(run("task", [NAME]))
    finally:
        del TASKS[NAME]
    assert promise in {r.promise for r in results if r.status != "kept"}, results
