"""Our models as Hugging Face models. They are registered with transformers' auto classes when these are imported.

Axis letters: B batch, N tokens, C channels, V vocabulary, K classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import plugins
from ...errors import ConfigError
from ..backbones.language import Language
from ..backbones.vision import VisionBackbone
from ..create import create_model
from ..initial import init_weights
from ..registry import build_model, config_of, model_config
from .huggingface_cache import MixerZooCache
from .huggingface_config import MixerZooConfig
from .huggingface_inputs import check_rest, documents_of, real_tokens, token_loss

try:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        GenerationMixin,
        PreTrainedModel,
    )
    from transformers.generation import utils as generation_utils
    from transformers.modeling_outputs import ModelOutput
except ImportError as error:
    raise ImportError("mixerzoo.models.interop.huggingface needs transformers: pip install 'mixerzoo[text]'") from error

# what generation calls the state; earlier versions know it under the name of attention's
CACHE = "cache" if "cache" in getattr(generation_utils, "ALL_CACHE_NAMES", ()) else "past_key_values"
_CODE = "modeling_mixerzoo"  # the file that `auto_map` names

with torch.device("cpu"):
    # PyTorch collects the functions that make tensors at the first use of a device as a context. If that were the
    # loading of a model, transformers would have put another function in the place of torch.linspace.
    torch.empty(0)


@dataclass
class MixerZooOutput(ModelOutput):
    """What a call gives.

    Attributes:
        loss: scalar, where labels are given.
        logits: (B, N, V) of tokens, or (B, K).
        cache: `MixerZooCache` after the input, where `use_cache` asks for it; also under the name `past_key_values`.
        hidden_states: what goes into every block, (B, N, C) each, and the normed features at the end.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def past_key_values(self) -> Any:
        """The cache."""
        return self.cache


class MixerZooPreTrainedModel(PreTrainedModel):
    """What the models share: `from_name`, `wrap`, files, and initial values for what a file lacks.

        model = MixerZooForCausalLM.from_name("mamba2_tiny")
        model.save_pretrained(folder); AutoModelForCausalLM.from_pretrained(folder)

    Raises:
        ConfigError: a configuration of another kind of model.
    """

    config_class = MixerZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    wants: ClassVar[str] = ""  # the kind of model, for the message
    model: Any

    def __init__(self, config: MixerZooConfig) -> None:
        super().__init__(config)
        if not config.mixerzoo:
            raise ConfigError("MixerZooConfig.mixerzoo: missing; it holds the model's configuration.")
        plugins.require(config.mixerzoo_plugins, where=config.name_or_path or "MixerZooConfig")
        model = build_model(config.mixerzoo)
        if not self.fits(model):
            raise ConfigError(f"MixerZooConfig.mixerzoo: {self.wants} is needed for {type(self).__name__}.")
        self.model = model
        self.post_init()

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether a model of ours is of this kind."""
        raise NotImplementedError

    @classmethod
    def from_name(cls, name_or_config: str | Mapping[str, Any], **options: Any) -> Any:
        """Build from a name or configuration; `options` as in `create_model`, `checkpoint` among them."""
        return cls.wrap(create_model(name_or_config, **options))

    @classmethod
    def wrap(cls, model: nn.Module) -> Any:
        """Put this interface around a model that `create_model` made; the weights are shared."""
        with torch.device("meta"):
            wrapper = cls(MixerZooConfig(mixerzoo=model_config(config_of(model))))
        wrapper.model = model
        return wrapper

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers does; the folder also says where its code is: in the package mixerzoo.

        With `trust_remote_code=True` it is then found without `import mixerzoo` before.
        """
        name = type(self).__name__
        self.config.mixerzoo = config_of(self.model)
        self.config.mixerzoo_plugins = plugins.needed(plugins.words(self.config.mixerzoo)) or None
        self.config.auto_map = {"AutoConfig": f"{_CODE}.MixerZooConfig", AUTO[type(self)].__name__: f"{_CODE}.{name}"}
        super().save_pretrained(save_directory, *args, **options)
        lines = ["import mixerzoo", f"from {__name__} import MixerZooConfig, {name}"]
        (Path(save_directory) / f"{_CODE}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing by itself: the parts initialise themselves as published; see `_initialize_missing_keys`."""

    def init_weights(self) -> None:
        """Nothing at construction, for the same reason."""
        self.tie_weights()

    def _initialize_missing_keys(self, *args: Any, **options: Any) -> None:
        """Fresh values, as published, for what a file lacks."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        if not all(getattr(tensor, "_is_hf_initialized", False) for _, tensor in tensors):
            init_weights(self.model, keep=lambda name, tensor: getattr(tensor, "_is_hf_initialized", False))

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Tie the head as the model does; transformers calls this where it has put in other parameters."""
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()


class _LanguageModel(MixerZooPreTrainedModel):
    main_input_name = "input_ids"
    _no_split_modules = ["LanguageBlock"]
    objective: ClassVar[str] = ""

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, Language) and model.config.objective == cls.objective

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that gives the logits; adapters of "all linear layers" leave it out."""
        return self.model.lm_head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Another number of tokens: the first ones keep their vectors, new ones are drawn around the mean of the old.

        Args:
            new_num_tokens: by default as many as there are.
            pad_to_multiple_of: round up.
            mean_resizing: False draws new vectors as a fresh model does.
        """
        count = self.model.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = pad_to_multiple_of or 1
        count = -(-count // multiple) * multiple
        old, head = self.model.embedding, self.model.lm_head
        self.model.embedding = nn.Embedding.from_pretrained(_resized(old.weight, count, mean_resizing), freeze=False)
        self.model.embedding.weight.requires_grad_(old.weight.requires_grad)
        if head is not None:
            if head.bias is not None:
                head.bias = nn.Parameter(F.pad(head.bias.detach(), (0, max(0, count - len(head.bias))))[:count])
            if not self.model.config.tie_embeddings:
                head.weight = nn.Parameter(_resized(head.weight, count, mean_resizing))
            head.out_features = count
        self.model.vocab_size = self.model.config.vocab_size = count
        self.model.model_config["vocab_size"] = count
        self.config.mixerzoo = config_of(self.model)
        self.tie_weights()
        return self.model.embedding

    @contextmanager
    def _given(self, inputs_embeds: Tensor | None, hidden: list[Tensor] | None) -> Iterator[None]:
        """Other embeddings in the place of the tokens', and what goes into the blocks."""
        hooks = []
        if inputs_embeds is not None:
            hooks.append(self.model.embedding.register_forward_hook(lambda *_: inputs_embeds))
        if hidden is not None:
            seen = hidden
            for block in self.model.blocks:
                hooks.append(block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give either input_ids or inputs_embeds.")
        if input_ids is not None:
            return input_ids
        assert inputs_embeds is not None
        if any(block.mixer.reads_ids for block in self.model.blocks):
            raise ConfigError("inputs_embeds: a mixer of this model reads the ids of the tokens.")
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)

    def _answer(self, output: MixerZooOutput, return_dict: bool | None) -> MixerZooOutput | tuple[Any, ...]:
        return output if return_dict is not False else output.to_tuple()


def _resized(weight: Tensor, count: int, around_mean: bool) -> Tensor:
    weight = weight.detach()
    if count <= weight.shape[0]:
        return weight[:count].clone()
    added = torch.randn(count - weight.shape[0], weight.shape[1], device=weight.device) * weight.float().std(0)
    added = added + weight.float().mean(0) if around_mean else added
    return torch.cat([weight, added.to(weight.dtype)])


class MixerZooForCausalLM(_LanguageModel, GenerationMixin):
    """A causal language model of this zoo behind transformers' interface; see `MixerZooPreTrainedModel`.

        model.generate(input_ids, attention_mask=mask, max_new_tokens=20)

    `generate` reads the prompt in parallel and then steps with the mixers' own states: greedy, sampling, beams, and
    with drafts of another model or of the prompt. Padding is told by `attention_mask`.
    """

    _is_stateful = False  # states roll back, see `MixerZooCache`
    objective = "causal_lm"
    wants = "backbone=language with objective=causal_lm"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MixerZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: MixerZooCache | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **rest: Any,
    ) -> MixerZooOutput | tuple[Any, ...]:
        """Logits of all tokens, and the state after them where it is asked for.

        Args:
            input_ids: (B, N).
            attention_mask: (B, N) or, with a cache, (B, M + N); 0 for padding.
            position_ids: (B, N); where they begin again a packed document begins, and nothing crosses.
            cache: state before the input, which is changed; `past_key_values` is the same.
            inputs_embeds: (B, N, C) in the place of the embeddings of tokens.
            labels: (B, N); shifted here: the logits of token t are held against label t + 1; -100 is ignored.
            use_cache: return the state after the input.
            output_hidden_states: return what goes into the blocks, and the last features.
            logits_to_keep: logits of so many last tokens, or of these indices; 0 for all.
            return_dict: False for a tuple.
            past_key_values: see `cache`.
            shift_labels: (B, N), shifted already.
            num_items_in_batch: the loss is the sum over labels divided by this.
            rest: what transformers passes along; anything else is refused.

        Raises:
            ConfigError: packed documents with a cache, or an input that the model does not take.
            TypeError: an argument that is not known.
        """
        check_rest(rest, ["attention_mask", "position_ids", "inputs_embeds", "labels", "logits_to_keep"])
        tokens = self._tokens(input_ids, inputs_embeds)
        cache = past_key_values if cache is None else cache
        mask = real_tokens(attention_mask, tokens.shape[1])
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        with self._given(inputs_embeds, hidden):
            if use_cache or cache is not None:
                if documents_of(position_ids, mask, tokens) is not None:
                    raise ConfigError("position_ids: packed documents have no state to continue from; use_cache=False.")
                cache = MixerZooCache() if cache is None else cache
                features = self._read(tokens, mask, cache)
            else:
                documents = documents_of(position_ids, mask, tokens)
                features = self.model.forward_features(tokens, mask=mask, document_ids=documents)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.forward_head(features[:, kept])
        loss = token_loss(logits, labels, shift_labels, num_items_in_batch, shift=True)
        states = None if hidden is None else (*hidden, features)
        return self._answer(MixerZooOutput(loss=loss, logits=logits, cache=cache, hidden_states=states), return_dict)

    def _read(self, tokens: Tensor, mask: Tensor | None, cache: MixerZooCache) -> Tensor:
        """Normed features (B, N, C) of the tokens after those of the cache."""
        count = tokens.shape[1]
        ids, mask, state = cache.begin(tokens, mask)
        x, cache.state = self.model.read(ids, mask=mask, state=state)
        return self.model.norm(x[:, -count:])

    # -- generation. Names and signatures are transformers'.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any, **rest: Any) -> Any:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = MixerZooCache()
            if getattr(generation_config, "is_assistant", False):
                model_kwargs[CACHE].activate_past_recording()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: MixerZooCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        past_key_values: MixerZooCache | None = None,
        **kwargs: Any,  # transformers looks for this name
    ) -> dict[str, Any]:
        cache = past_key_values if cache is None else cache
        given: dict[str, Any] = {"attention_mask": attention_mask, "cache": cache, "use_cache": cache is not None}
        given |= {k: v for k, v in kwargs.items() if k in ("output_hidden_states", "logits_to_keep")}
        seen = 0 if cache is None else cache.get_seq_length()
        if inputs_embeds is not None and seen == 0:
            return {**given, "inputs_embeds": inputs_embeds}
        new = next_sequence_length
        if new is None:
            new = input_ids.shape[1] - seen if inputs_embeds is None else 1
        if cache is not None and seen:
            input_ids = input_ids[:, -new:]
        return {**given, "input_ids": input_ids}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **rest: Any) -> Any:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **rest)
        model_kwargs.pop("cache" if CACHE != "cache" else "past_key_values", None)
        if outputs.cache is not None:
            model_kwargs[CACHE] = outputs.cache
        return model_kwargs

    def _reorder_cache(self, cache: MixerZooCache, beam_idx: Tensor) -> MixerZooCache:
        cache.reorder_cache(beam_idx)
        return cache


class MixerZooForMaskedLM(_LanguageModel):
    """An encoder with a head for masked tokens behind transformers' interface; see `MixerZooPreTrainedModel`."""

    objective = "masked_lm"
    wants = "backbone=language with objective=masked_lm"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Any = None,
        **rest: Any,
    ) -> MixerZooOutput | tuple[Any, ...]:
        """Logits (B, N, V). Arguments as in `MixerZooForCausalLM`; labels are not shifted."""
        check_rest(rest, ["attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels"])
        tokens = self._tokens(input_ids, inputs_embeds)
        mask = real_tokens(attention_mask, tokens.shape[1])
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        with self._given(inputs_embeds, hidden):
            documents = documents_of(position_ids, mask, tokens)
            features = self.model.forward_features(
                tokens, mask=mask, document_ids=documents, token_types=self._types(token_type_ids)
            )
            logits = self.model.forward_head(features, mask=mask)
        loss = self.loss_of(logits, labels, num_items_in_batch)
        states = None if hidden is None else (*hidden, features)
        return self._answer(MixerZooOutput(loss=loss, logits=logits, hidden_states=states), return_dict)

    def _types(self, token_type_ids: Tensor | None) -> Tensor | None:
        """Tokenizers give types of zero also for models without a table of them."""
        if token_type_ids is None or self.model.token_type is not None:
            return token_type_ids
        if bool(token_type_ids.any()):
            raise ConfigError("token_type_ids: this model has no table of types (model.type_vocab_size).")
        return None

    def loss_of(self, logits: Tensor, labels: Tensor | None, num_items_in_batch: Any) -> Tensor | None:
        """The loss, where there are labels."""
        return token_loss(logits, labels, None, num_items_in_batch, shift=False)


class MixerZooForSequenceClassification(MixerZooForMaskedLM):
    """A classifier of texts behind transformers' interface; see `MixerZooPreTrainedModel`. Labels are (B,)."""

    objective = "classify"
    wants = "backbone=language with objective=classify"

    def loss_of(self, logits: Tensor, labels: Tensor | None, num_items_in_batch: Any) -> Tensor | None:
        return None if labels is None else F.cross_entropy(logits.float(), labels)


class MixerZooForImageClassification(MixerZooPreTrainedModel):
    """A classifier of images behind transformers' interface; see `MixerZooPreTrainedModel`."""

    main_input_name = "pixel_values"
    wants = "a vision model"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return isinstance(model, VisionBackbone)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> MixerZooOutput | tuple[Any, ...]:
        """Images (B, 3, H, W) to logits (B, K); labels (B,); the hidden states are the maps (B, C, H, W) of stages."""
        check_rest({k: v for k, v in rest.items() if k != "num_items_in_batch"}, ["pixel_values", "labels"])
        maps = None
        if output_hidden_states:
            features, maps = self.model.forward_intermediates(pixel_values)
            logits = self.model.forward_head(features)
        else:
            logits = self.model(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = MixerZooOutput(loss=loss, logits=logits, hidden_states=None if maps is None else tuple(maps))
        return output if return_dict is not False else output.to_tuple()


AUTO: dict[type, Any] = {
    MixerZooForCausalLM: AutoModelForCausalLM,
    MixerZooForMaskedLM: AutoModelForMaskedLM,
    MixerZooForSequenceClassification: AutoModelForSequenceClassification,
    MixerZooForImageClassification: AutoModelForImageClassification,
}


def register() -> None:
    """Enter the models into transformers' auto classes."""
    for model, auto in AUTO.items():
        auto.register(MixerZooConfig, model, exist_ok=True)
