"""The language backbone: token embedding, MetaFormer blocks with any pattern of mixers, and a head.

Axis letters: B batch, N tokens, C channels, V vocabulary, K classes.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...kernels.common.dispatch import wants_plain
from ...mixers import mixer_options
from ...mixers.part import stated
from ...mixers.positions import positions_in_segment, segments
from ...mixers.registry import check_mixer
from ...mixers.state import state_bytes
from ...schema import problem, split_spec
from ..parts.blocks import init_weights, no_weight_decay
from ..parts.language_block import LanguageBlock
from ..parts.language_heads import LANGUAGE_HEADS, LanguageHead, last_index, tie_layers
from ..parts.norms import NORMS
from .fit import check_padding, mixing_parts
from .language_config import LanguageConfig, check_config, check_inputs
from .layers import Place, StageSpec, build_block, stage_specs
from .registry import BACKBONES


class LanguageState(NamedTuple):
    """layers: the state of every block's mixer; length: (B,) int64, real tokens so far."""

    layers: tuple[Any, ...]
    length: Tensor


def _give_positions(specs: list[StageSpec], position: str) -> None:
    """Set the option `position` of all mixers that have it, know this kind, and do not set it themselves."""
    known = False
    for spec in specs:
        name, options = check_mixer(spec.mixer, key=spec.paths["mixer"])
        own = mixer_options(name).get("position")
        if own is not None and problem(position, own.annotation) is None:
            known = True
            if options.get("position") is None:
                spec.values["mixer"] = {"name": name, **options, "position": position}
    if not known:
        names = ", ".join(sorted({split_spec(spec.mixer, kind="mixer")[0] for spec in specs}))
        warnings.warn(
            f"model.position: none of the mixers ({names}) takes {position} positions, so there are none.", stacklevel=2
        )


def _tie_again(model: nn.Module, _: Any) -> None:
    """After `load_state_dict(..., assign=True)` has given the embedding another parameter."""
    assert isinstance(model, Language)
    model.tie_weights()


@BACKBONES.register("language")
class Language(nn.Module):
    """A language model or text encoder of MetaFormer blocks.

    Built from a `LanguageConfig`. `forward` is parallel; `prefill` and `step` decode with a state.

    Raises:
        ConfigError: any part that does not fit, with the path of its key: an unknown entry of the pattern, a mixer that
            cannot be causal in a causal model, a mixer that does not take sequences or lacks `sequence_length`.
    """

    config_class = LanguageConfig

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.vocab_size, self.num_features, self.num_classes = config.vocab_size, config.dim, config.num_classes
        dim, post = config.dim, config.norm_placement == "post"
        self.embedding = nn.Embedding(config.vocab_size, dim)
        learned = config.position == "learned"
        self.position = nn.Embedding(config.sequence_length or 0, dim) if learned else None
        self.token_type = nn.Embedding(config.type_vocab_size, dim) if config.type_vocab_size else None
        self.embedding_norm = NORMS.build(config.norm, dim, key="norm") if post else nn.Identity()
        self.projection = nn.Linear(dim, dim) if config.embedding_projection else nn.Identity()
        self.blocks: Any = nn.ModuleList(self._blocks(config))
        self.norm = nn.Identity() if post else NORMS.build(config.norm, dim, key="norm")
        self.head = self._head(config)
        # what the head states; another module, such as an adapter, may stand in its place later
        kind = LANGUAGE_HEADS.entries[config.objective]
        self._vocabulary: str | None = stated(kind, "vocabulary", LanguageHead)
        self._head_masks: bool = stated(kind, "masks")
        self._head_pools: bool = stated(kind, "mixes_tokens")
        self._mixing = mixing_parts(self)  # norms and channel mixers that see other tokens
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_again)
        self.init_weights()

    def tie_weights(self) -> None:
        """Give a tied head the matrix of the token embedding; needed again after `to_empty`, which makes copies."""
        tie_layers(self.head, self.embedding.weight)

    @property
    def lm_head(self) -> Any:
        """The layer that gives logits over the vocabulary, None where there is none."""
        return None if self._vocabulary is None else self.head.get_submodule(self._vocabulary)

    def init_weights(self) -> None:
        """Initial values of everything but the mixers, which own theirs."""
        init_weights(self, self.config.init_std)
        own_head = None if self.config.tie_embeddings else self.lm_head
        for table in (self.embedding, self.position, self.token_type, own_head):
            if table is not None:
                nn.init.normal_(table.weight, std=self._table_std(self.config))

    @staticmethod
    def _blocks(config: LanguageConfig) -> list[nn.Module]:
        names = ("mixer", "channel_mixer", "norm", "layer_scale")
        specs = stage_specs(config, config.depth, names, repeated=("mixer",))
        if config.position in ("rotary", "alibi"):
            _give_positions(specs, config.position)
        grid = None if config.sequence_length is None else (config.sequence_length,)
        block = partial(LanguageBlock, norm_placement=config.norm_placement, dropout=config.dropout)
        blocks = []
        for i, spec in enumerate(specs):
            place = Place(grid, 1, "sequences", i, config.depth, causal=config.causal)
            drop_path = config.drop_path * i / max(1, config.depth - 1)
            blocks.append(build_block(spec, config.dim, place, drop_path=drop_path, defaults={}, block=block))
        return blocks

    @staticmethod
    def _table_std(config: LanguageConfig) -> float:
        """Deviation of the initial values of embeddings and of a head's own matrix."""
        return config.dim**-0.5 if config.init_std is None else config.init_std

    @staticmethod
    def _head(config: LanguageConfig) -> nn.Module:
        return LANGUAGE_HEADS.build(
            config.objective,
            config.dim,
            key="objective",
            **{name: getattr(config, name) for name in LANGUAGE_HEADS.context},
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay: vectors, and what the mixers name (`A_log`, `D`, ...)."""
        return no_weight_decay(self)

    # -- checks of what is given

    def check_ids(self, input_ids: Any, mask: Tensor | None, document_ids: Tensor | None) -> None:
        """Hold inputs against what the model takes; see `check_inputs`."""
        check_inputs(input_ids, mask, document_ids, self.vocab_size)
        check_padding(self._mixing, mask, document_ids)
        if document_ids is not None:
            for i, block in enumerate(self.blocks):
                if not block.mixer.packs:
                    raise ConfigError(
                        f'document_ids: the mixer "{block.mixer.name}" of block {i} would let information cross.'
                    )

    def _embed(self, input_ids: Tensor, positions: Tensor | None, token_types: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        if self.position is not None:
            assert positions is not None
            x = x + self.position(positions)
        if self.token_type is not None:
            first = input_ids.new_zeros((1,) * input_ids.ndim)
            x = x + self.token_type(first if token_types is None else token_types)
        x = self.projection(self.embedding_norm(x))
        return F.dropout(x, self.config.dropout) if self.config.dropout and self.training else x

    def _positions(
        self, mask: Tensor | None, document_ids: Tensor | None, like: Tensor, start: Any = 0
    ) -> Tensor | None:
        """Positions (B or 1, N) of the table, counted over real tokens of one document."""
        if self.position is None:
            return None
        length, table = like.shape[1], self.position.num_embeddings
        if length > table and mask is None and document_ids is None:
            raise ConfigError(
                f"input_ids: {length} tokens are more than the {table} learned positions (model.sequence_length)."
            )
        if document_ids is not None:
            segment = segments(document_ids)
            if mask is None:
                positions = positions_in_segment(segment)
            else:  # real tokens before this one in its document
                before = mask.long().cumsum(1) - 1
                begin = positions_in_segment(segment) == 0
                first = torch.where(begin, before - mask.long() + 1, 0).cummax(1).values
                positions = (before - first).clamp_min(0)
        elif mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0) + start
        else:
            positions = torch.arange(length, device=like.device)[None] + start
        known = not (torch.compiler.is_compiling() or wants_plain())
        if known and like.device.type == "cpu" and int(positions.max()) >= table:
            raise ConfigError(
                f"input_ids: position {int(positions.max())} is beyond the {table} learned positions "
                "(model.sequence_length)."
            )
        return positions

    # -- parallel

    def forward_features(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, N) to normed features (B, N, C); the arguments as in `forward`."""
        self.check_ids(input_ids, mask, document_ids)
        x = embeddings = self._embed(input_ids, self._positions(mask, document_ids, input_ids), token_types)
        for block in self.blocks:
            x = block(x, mask=mask, document_ids=document_ids, embeddings=embeddings, token_ids=input_ids)
        return self.norm(x)

    def forward_head(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Features (B, N, C) to what the objective says."""
        return self.head(x, mask=mask) if self._head_masks else self.head(x)

    def forward(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Run the model on whole sequences.

        Args:
            input_ids: (B, N) token ids.
            mask: (B, N) bool, True for real tokens; padding may stand anywhere.
            document_ids: (B, N) integers; a change of value starts a new packed document, and nothing crosses it.
            token_types: (B, N) ids of token types, for models that have a table of them.

        Returns:
            (B, N, V) logits, (B, K) logits or (B, N, C) features, by the objective.

        Raises:
            ConfigError: ids out of range, empty input, more tokens than learned positions, lists of mixed lengths, or
                a mask or document ids that some mixer cannot honour.
        """
        x = self.forward_features(input_ids, mask=mask, document_ids=document_ids, token_types=token_types)
        return self.forward_head(x, mask=mask)

    # -- streaming

    def init_state(self, batch: int) -> LanguageState:
        """The state before the first token.

        Raises:
            ConfigError: the model is not causal, or one of its mixers does not stream.
        """
        self._check_streams()
        like = next(self.parameters())
        layers = tuple(b.mixer.init_state(batch, device=like.device, dtype=like.dtype) for b in self.blocks)
        return LanguageState(layers, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def _check_streams(self) -> None:
        if not self.config.causal:
            raise ConfigError("only a causal model decodes token by token; this one is an encoder.")
        for i, block in enumerate(self.blocks):
            if not block.mixer.streams:
                raise ConfigError(
                    f'the mixer "{block.mixer.name}" of block {i} does not stream; see list_mixers(streams=True).'
                )

    def prefill(
        self, input_ids: Tensor, *, mask: Tensor | None = None, state: LanguageState | None = None
    ) -> tuple[Tensor, LanguageState]:
        """Read a prompt, or the next piece of one, in parallel.

        Args:
            input_ids: (B, N) token ids.
            mask: (B, N) bool, True for real tokens.
            state: the state before; None at the start. It may be changed in place.

        Returns:
            The head's output for the last real token of every row, (B, V) or (B, C), and the state after it.
        """
        x, state = self.read(input_ids, mask=mask, state=state)
        last = x[:, -1] if mask is None else x[torch.arange(x.shape[0], device=x.device), last_index(mask)]
        return self._token_head(last), state

    def read(
        self, input_ids: Tensor, *, mask: Tensor | None = None, state: LanguageState | None = None
    ) -> tuple[Tensor, LanguageState]:
        """As `prefill`, with the last block's output of every token (B, N, C), before the last norm and the head."""
        self.check_ids(input_ids, mask, None)
        if state is None:
            state = self.init_state(input_ids.shape[0])
            before: list[Any] = [None] * len(self.blocks)
        else:
            before = list(state.layers)
        x = embeddings = self._embed(input_ids, self._positions(mask, None, input_ids, state.length[:, None]))
        layers = []
        for block, layer in zip(self.blocks, before, strict=True):
            x, after = block(x, mask=mask, state=layer, embeddings=embeddings, token_ids=input_ids, stream="prefill")
            layers.append(after)
        added = input_ids.shape[1] if mask is None else mask.sum(1)
        return x, LanguageState(tuple(layers), state.length + added)

    def step(self, token: Tensor, state: LanguageState) -> tuple[Tensor, LanguageState]:
        """One more token (B,) for every row; returns the head's output (B, V) or (B, C), and the state after it."""
        positions = None
        if self.position is not None:
            positions = state.length
            if not torch.compiler.is_compiling() and int(positions.max()) >= self.position.num_embeddings:
                raise ConfigError(
                    f"position {int(positions.max())} is beyond the {self.position.num_embeddings} learned positions "
                    "(model.sequence_length)."
                )
        x = embeddings = self._embed(token, positions)
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, after = block(x, state=layer, embeddings=embeddings, token_ids=token, stream="step")
            layers.append(after)
        return self._token_head(x), LanguageState(tuple(layers), state.length + 1)

    def _token_head(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x if self._head_pools else self.head(x)

    def state_bytes(self, length: int = 0) -> int:
        """Bytes of the state of one row after `length` tokens."""
        state = self.init_state(1)
        if length:
            device = state.length.device
            with torch.no_grad():
                _, state = self.prefill(torch.zeros(1, length, dtype=torch.int64, device=device))
        return state_bytes(state.layers)
