"""The contract of a token mixer.

Axis letters: B batch, N tokens, C channels, H height, W width, T frames. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import plugins
from ..errors import ConfigError
from ..schema import Size, lists_options
from .layers import OneNode, rename_parameters
from .state import keep_rows

MIXERS: dict[str, type[Mixer]] = {}

Grid = tuple[Size, ...]


class Mixer(OneNode):
    """Base class of all token mixers.

    A subclass names itself in the class statement and is found from then on:

        class Pooling(Mixer, name="pooling"):
            def __init__(self, dim, *, pool_size: int = 3): ...

    `forward(x, *, mask=None)` takes and returns channels-last tokens `(B, *grid, C)`. `mask` is `(B, *grid)` bool, True
    for real tokens. A mixer with `packs = True` also takes `document_ids`, `(B, N)` integers that change where a new
    packed document starts: nothing may cross that boundary.

    The constructor takes `dim` and keyword-only options with type hints and defaults: they are the option schema, and
    `schema` checks types and ranges (`num_heads: Annotated[int, AtLeast(1)] = 8`), not the constructor. What depends on
    several options raises an `OptionError` that names one of them; the path is added where the mixer is built. Options
    of a base class are taken over by `**options: Unpack[Some]`, Some being a TypedDict of their names. Four names are
    reserved: `create_mixer` and the backbones fill in `grid`, `causal`, `layer_index` and `num_layers` for constructors
    that ask for them. An option that is None by default leaves the choice to the model; an explicit value stays.

    What it can do is class data, to which the contract holds it.

    Attributes:
        axes: the ranks of grid that the mixer accepts.
        causal: "can" (takes the option `causal`), "cannot" or "always".
        needs_grid: parameters depend on the grid, which the constructor then needs; `resize_grid` changes it.
        masks: honours `mask`. A mixer that does not refuses one.
        packs: honours `document_ids`.
        streams: has `init_state` and `step`, equal to the causal forward.
        reads_embeddings: `forward`, `prefill` and `step` also take `embeddings`, the token embeddings before the first
            block, of the shape of `x`; the language backbone passes them.
        reads_ids: they also take `token_ids`, `(B, N)` integers, in `step` `(B,)`; passed as the embeddings are.
        gives_attention: `forward` also takes `token_attention`, and with it returns the tokens and how a class token
            that stands first attends to all, `(B, H, 1 + N)`, by which a block may drop tokens; and `diluted`: what the
            mask hides is then left to the class token as tokens of logit and value 0.
        complexity: growth of time with the number of tokens N: "1", "N", "N log N", "N sqrt(N)", "N^2" or "N^3".
        memory: growth of the activations with N, of the same form.
        projections: the linear layers through which every token goes alone, before and after the mixing, with torch's
            initial values; paths of a token order that have a mixer each share them.
        source: paper, year and arXiv id.
        equation: what it computes in one line, in the paper's symbols, for the documentation.
        alternatives: for each option a value other than the default that has a visible effect, for the tests (booleans
            need none).
        requires: for options that need others to have an effect, the values of these, e.g.
            `{"sink_tokens": {"window": 3}}`; the tests set them on both sides of the comparison. The same for
            `embeddings` and `token_ids`, where they are read only then.
        formerly: names of parameters in files of earlier versions, and what they are called now.
        refuses: which of "vmap" (of gradients, by `torch.func`) and "second derivatives" it cannot do, and why.
        inert: options that change neither output, parameters nor cost.
        aux_losses: names of what the mixer adds by `aux_loss` in training, each with the beginnings of the names of the
            parameters that nothing else trains.
        residual: the sum with the input is inside of the mixer as built.
        class_token: the mixer as built takes a sequence that has a class token before the tokens of its grid.
    """

    name: ClassVar[str]
    axes: ClassVar[tuple[int, ...]] = (1, 2, 3)
    causal: ClassVar[str] = "cannot"
    needs_grid: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    reads_embeddings: ClassVar[bool] = False
    reads_ids: ClassVar[bool] = False
    gives_attention: ClassVar[bool] = False
    complexity: ClassVar[str] = "N"
    memory: ClassVar[str] = "N"
    projections: ClassVar[tuple[str, str] | None] = None
    source: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    alternatives: ClassVar[Mapping[str, Any]] = {}
    requires: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    inert: ClassVar[frozenset[str]] = frozenset()
    formerly: ClassVar[Mapping[str, str]] = {}
    refuses: ClassVar[Mapping[str, str]] = {}
    aux_losses: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    residual: bool = False
    class_token: bool = False
    grid: Grid | None = None
    is_causal: bool = False

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is None:  # a shared base of several mixers
            return
        other = MIXERS.get(name)
        if other is not None and not plugins.same_place(other, cls):
            raise ConfigError(
                f'mixer "{name}" exists already: {other.__module__}.{other.__qualname__}; '
                f"{cls.__qualname__} needs another name."
            )
        for parameter in list(inspect.signature(cls.__init__).parameters.values())[2:]:
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and not lists_options(parameter):
                raise ConfigError(
                    f'mixer "{name}": the option "{parameter.name}" must be keyword-only; *args and **kwargs '
                    "would swallow typos."
                )
        cls.name = name
        MIXERS[name] = cls
        plugins.note("mixer", name, cls)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Mix tokens `(B, *grid, C)` and return the same shape."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set the initial values; by default those of the layers inside, as PyTorch has them.

        A mixer with values of its own overrides it and calls it in its constructor; a backbone never overrides them.
        """
        for child in self.modules():
            reset = None if child is self else getattr(child, "reset_parameters", None)
            if reset is not None:
                reset()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_parameters(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay: by default all vectors and scalars."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def resize_grid(self, grid: Grid) -> None:
        """Change the grid that the parameters are made for, in place, by interpolation.

        Raises:
            ConfigError: the mixer depends on the grid and cannot be resized.
        """
        if self.needs_grid:
            raise ConfigError(f'mixer "{self.name}" cannot be resized to another grid.')

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """The state before the first token, for `step`."""
        raise ConfigError(f'mixer "{self.name}" does not stream.')

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token `(B, C)` with the state before it; returns its output `(B, C)` and the state after it."""
        raise ConfigError(f'mixer "{self.name}" does not stream.')

    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """A piece of a sequence `(B, N, C)` at once, with the state before it; by default that of an empty sequence.

        Padding (`mask` False) may stand anywhere and leaves the state as it was. Returns the outputs and the state
        after the last real token of every row. Mixers with a parallel form override this loop over `step`; the first
        axis of every tensor in a state is the batch. The state given may be changed in place.
        """
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        outputs = []
        for t in range(x.shape[1]):
            y_t, new = self.step(x[:, t], state)
            state = new if mask is None else keep_rows(mask[:, t], new, state)
            outputs.append(y_t)
        return torch.stack(outputs, 1), state

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the parameter names and layouts of the published implementation to this class's."""
        raise ConfigError(f'mixer "{cls.name}" has no official implementation to convert from.')

    # -- helpers for subclasses

    def memory_format(self, device: torch.device | None, dtype: torch.dtype | None) -> dict[str, Any]:
        """Where a new state lives: by default where the first parameter does."""
        like = next(self.parameters(), torch.empty(0))  # none are left where all layers are quantised
        return {"device": device or like.device, "dtype": dtype or like.dtype}

    def refuse_mask(self, mask: Tensor | None) -> None:
        """Raise when a mask is given to a mixer that cannot honour it."""
        if mask is not None:
            raise ConfigError(f'mixer "{self.name}" cannot honour a mask; see list_mixers(masks=True).')

    def check_grid(self, x: Tensor) -> Grid:
        """The grid of `x`, after checking its rank and, where parameters depend on it, its size."""
        grid = tuple(x.shape[1:-1])
        if len(grid) not in self.axes:
            raise ConfigError(
                f'mixer "{self.name}" takes {" or ".join(map(str, self.axes))} grid axes, not {len(grid)}: '
                f"input of shape {tuple(x.shape)}."
            )
        if self.needs_grid and grid != self.grid:
            raise ConfigError(
                f'mixer "{self.name}" was built for the grid {self.grid}, not {grid}; '
                "use resize_grid(model, image_size)."
            )
        return grid
