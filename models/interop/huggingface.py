"""Language models as Hugging Face models. They are registered with transformers' auto classes when these are imported.

Axis letters: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...mixers.state import reorder_state
from ..backbones.language import Language, LanguageState
from ..create import create_model
from ..registry import build_model, config_of, model_config
from .huggingface_config import MixerZooConfig

try:
    from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
    from transformers.generation import utils as generation_utils
    from transformers.modeling_outputs import ModelOutput
except ImportError as error:
    raise ImportError("mixerzoo.models.interop.huggingface needs transformers: pip install 'mixerzoo[text]'") from error


@dataclass
class MixerZooOutput(ModelOutput):
    """loss: scalar, where labels are given; logits: (B, N, V) or (B, 1, V); cache: the state after the input."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None


class MixerZooForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of this zoo behind transformers' interface.

        model = MixerZooForCausalLM.from_name("mamba2_tiny")
        model.generate(input_ids, attention_mask=mask, max_new_tokens=20)
        model.save_pretrained(folder); AutoModelForCausalLM.from_pretrained(folder)

    `generate` reads the prompt in parallel and then steps with the mixers' own states, with sampling and beams. Padding
    is told by `attention_mask`.

    Raises:
        ConfigError: a configuration that is not one of a causal language model.
    """

    config_class = MixerZooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ["LanguageBlock"]

    def __init__(self, config: MixerZooConfig) -> None:
        super().__init__(config)
        if not config.mixerzoo:
            raise ConfigError("MixerZooConfig.mixerzoo: missing; it holds the model's configuration.")
        model = build_model(config.mixerzoo)
        if not isinstance(model, Language) or model.config.objective != "causal_lm":
            raise ConfigError("MixerZooConfig.mixerzoo: backbone=language with objective=causal_lm is needed.")
        self.model = model
        self.post_init()

    @classmethod
    def from_name(cls, name_or_config: str | Mapping[str, Any], **options: Any) -> MixerZooForCausalLM:
        """Build from a name or configuration; `options` as in `create_model`, `checkpoint` among them."""
        return cls.wrap(create_model(name_or_config, **options))

    @classmethod
    def wrap(cls, model: nn.Module) -> MixerZooForCausalLM:
        """Put this interface around a model that `create_model` made; the weights are shared."""
        with torch.device("meta"):
            wrapper = cls(MixerZooConfig(mixerzoo=model_config(config_of(model))))
        wrapper.model = model
        return wrapper

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the parts have initialised themselves as published, and must not be initialised again."""

    def init_weights(self) -> None:
        """Nothing, for the same reason."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value  # pyright: ignore[reportAttributeAccessIssue] - transformers passes any module

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Tie the head as the model does; transformers calls this where it has put in other parameters."""
        self.model.tie_weights()

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that gives the logits; adapters of "all linear layers" leave it out."""
        return self.model.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: LanguageState | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> MixerZooOutput | tuple[Any, ...]:
        """Logits of whole sequences, or of the last token with a state.

        Args:
            input_ids: (B, N).
            attention_mask: (B, N), 0 for padding.
            labels: (B, N); shifted here: the logits of token t are held against label t + 1; -100 is ignored.
            cache: state before the input.
            use_cache: return the state after it, and logits (B, 1, V) of the last token alone.
            return_dict: False for a tuple.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and bool(mask.all()):
            mask = None
        state = loss = None
        if labels is None and (use_cache or cache is not None):
            if cache is not None and input_ids.shape[1] == 1 and mask is None:
                logits, state = self.model.step(input_ids[:, 0], cache)
            else:
                logits, state = self.model.prefill(input_ids, mask=mask, state=cache)
            logits = logits[:, None]
        else:
            logits = self.model(input_ids, mask=mask)
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        if return_dict is False:
            return tuple(v for v in (loss, logits, state) if v is not None)
        return MixerZooOutput(loss=loss, logits=logits, cache=state)

    # -- generation. Names and signatures are transformers'; what they pass on beside these is of no use here.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: LanguageState | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        if cache is not None:
            return {"input_ids": input_ids[:, -1:], "cache": cache, "use_cache": True}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **rest: Any) -> Any:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **rest)
        if outputs.cache is not None:
            model_kwargs["cache"] = outputs.cache
        return model_kwargs

    def _beam_search(self, *args: Any, **options: Any) -> Any:
        if "cache" not in getattr(generation_utils, "ALL_CACHE_NAMES", ()):
            # earlier versions know the cache by other names only, and would not reorder ours
            raise ConfigError("beam search needs a transformers whose generate passes `cache`; or use num_beams=1.")
        return super()._beam_search(*args, **options)  # pyright: ignore[reportAttributeAccessIssue] - untyped there

    def _reorder_cache(self, cache: LanguageState, beam_idx: Tensor) -> LanguageState:
        return reorder_state(cache, beam_idx)


def register() -> None:
    """Enter the models into transformers' auto classes."""
    AutoModelForCausalLM.register(MixerZooConfig, MixerZooForCausalLM, exist_ok=True)
