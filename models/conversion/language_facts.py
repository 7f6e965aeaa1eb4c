"""What `config.json` of a released language model says that its weights do not show, beside what our model has.

Fields as transformers 4 and 5 and state-spaces/mamba write them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import ConfigError
from ..backbones.language import Language
from .layouts import Facts

# computed as our transformer does; others share the names of the weights, but scale, cap or rotate differently
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def _first(source: Mapping[str, Any], *names: str) -> Any:
    return next((source[name] for name in names if source.get(name) is not None), None)


def _sizes(source: Mapping[str, Any], model: Language) -> Facts:
    return {
        "vocab_size": (_padded(source), model.vocab_size),
        "dim": (_first(source, "hidden_size", "d_model"), model.config.dim),
        "depth": (_first(source, "num_hidden_layers", "n_layer"), model.config.depth),
        "tie_embeddings": (_first(source, "tie_word_embeddings", "tie_embeddings"), _tied(model)),
    }


def _padded(source: Mapping[str, Any]) -> Any:
    """state-spaces pads the vocabulary of its embedding."""
    size, multiple = source.get("vocab_size"), source.get("pad_vocab_size_multiple")
    return size if not size or not multiple else -(-size // multiple) * multiple


def _tied(model: Language) -> bool | None:
    return model.config.tie_embeddings if model.config.objective in ("causal_lm", "masked_lm") else None


def _norms(eps: Any, model: Language) -> Facts:
    own = {float(n.eps) for n in [model.norm, *(b.norm1 for b in model.blocks)] if getattr(n, "eps", None) is not None}
    return {"norm.eps": (eps, own.pop() if len(own) == 1 else None)}


def _activation(name: Any) -> Any:
    return _ACTIVATIONS.get(name, name)


def _act_of(model: Language) -> Any:
    spec = model.config.channel_mixer
    return (spec or {}).get("act") if isinstance(spec, Mapping) else None


def _one(values: list[Any]) -> Any:
    """The value that all layers share, or the list of them."""
    return values[0] if all(value == values[0] for value in values) else values


def _rope(source: Mapping[str, Any]) -> tuple[Any, Any]:
    """Base of the wavelengths and their scaling; None for none."""
    given = source.get("rope_parameters") or {}
    scaling = dict(source.get("rope_scaling") or given)
    theta = _first(given, "rope_theta") or source.get("rope_theta")
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    scaling.pop("rope_theta", None)
    if scaling.pop("partial_rotary_factor", source.get("partial_rotary_factor") or 1.0) != 1.0:
        return theta, {"partial_rotary_factor": source.get("partial_rotary_factor", given.get("partial_rotary_factor"))}
    return theta, None if kind == "default" else {"rope_type": kind, **scaling}


def _windows(source: Mapping[str, Any], depth: int) -> list[Any]:
    """The window of every layer; None for none."""
    window = source.get("sliding_window")
    if source.get("model_type") in ("qwen2", "qwen3") and not source.get("use_sliding_window"):
        window = None
    kinds = source.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == depth:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window] * depth


def llama_facts(source: Mapping[str, Any], model: nn.Module) -> Facts:
    """For `LlamaForCausalLM`, and those that compute as it does.

    Raises:
        ConfigError: a family with the same names of weights that computes otherwise.
    """
    assert isinstance(model, Language)
    kind = source.get("model_type")
    if kind is not None and kind not in LLAMA_LIKE:
        raise ConfigError(
            f'checkpoint: config.json beside it says model_type "{kind}", which computes otherwise than our '
            f"transformer with weights of the same names. Known: {', '.join(LLAMA_LIKE)}."
        )
    mixers = [block.mixer for block in model.blocks]
    heads = source.get("num_attention_heads")
    width = source.get("head_dim") or (source["hidden_size"] // heads if heads and source.get("hidden_size") else None)
    theta, scaling = _rope(source)
    eps = source.get("rms_norm_eps")
    own_eps = _one([getattr(m.q_norm, "eps", None) for m in mixers if hasattr(m, "q_norm")] or [None])
    gated = model.config.channel_mixer
    return {
        **_sizes(source, model),
        **_norms(eps, model),
        "position": ("rotary", _one([getattr(m, "position", None) for m in mixers])),
        "mixer.num_heads": (heads, _one([getattr(m, "num_heads", None) for m in mixers])),
        "mixer.head_dim": (width, _one([getattr(m, "head_dim", None) for m in mixers])),
        "mixer.num_kv_heads": (
            _first(source, "num_key_value_heads") or heads,
            _one([getattr(m, "num_kv_heads", None) for m in mixers]),
        ),
        "mixer.rope_theta": (theta, _one([getattr(m, "rope_theta", None) for m in mixers])),
        "mixer.window": (
            _spelled(_one(_windows(source, len(mixers)))),
            _spelled(_one([getattr(m, "window", None) for m in mixers])),
        ),
        "rope_scaling": (_spelled(scaling), "none"),
        "the eps of mixer.qk_norm": (eps if own_eps is not None else None, own_eps),
        "channel_mixer.act": (
            _activation(source.get("hidden_act")),
            _act_of(model) or ("silu" if gated in ("gated_mlp",) or _named(gated) == "gated_mlp" else None),
        ),
    }


def _named(spec: Any) -> Any:
    return spec.get("name") if isinstance(spec, Mapping) else spec


def _spelled(value: Any) -> Any:
    """None is a value here: no window, no scaling."""
    return "none" if value is None else value


def mamba_facts(source: Mapping[str, Any], model: nn.Module) -> Facts:
    """For Mamba and Mamba-2 of transformers and of state-spaces, whose eps is 1e-5 and is not written down."""
    assert isinstance(model, Language)
    inner = source.get("ssm_cfg") if isinstance(source.get("ssm_cfg"), Mapping) else {}
    assert isinstance(inner, Mapping)
    official = "d_model" in source
    eps = 1e-5 if official else source.get("layer_norm_epsilon")
    mixers = [block.mixer for block in model.blocks]

    def own(*names: str) -> Any:
        return _one([next((getattr(m, n) for n in names if hasattr(m, n)), None) for m in mixers])

    limit = _first(source, "time_step_limit") or inner.get("dt_limit")
    rank = source.get("time_step_rank")
    return {
        **_sizes(source, model),
        **_norms(eps, model),
        "mixer.norm_eps": (eps if own("norm_eps") is not None else None, own("norm_eps")),
        "mixer.d_state": (_first(source, "state_size") or inner.get("d_state"), own("d_state")),
        "mixer.dt_rank": (rank if isinstance(rank, int) else None, own("dt_rank")),
        "mixer.head_dim": (_first(source, "head_dim") or inner.get("headdim"), own("head_dim")),
        "the number of heads": (source.get("num_heads"), own("num_heads")),
        "mixer.ngroups": (_first(source, "n_groups") or inner.get("ngroups"), own("ngroups")),
        "mixer.dt_limit": (
            None if limit is None else tuple(_number(bound) for bound in limit),
            own("dt_limit"),
        ),
        "the activation": (_activation(source.get("hidden_act")), "silu"),
    }


def _number(value: Any) -> float:
    """JSON has no infinity; transformers writes Infinity, other tools the word or null."""
    if isinstance(value, Mapping):  # transformers 5: {"__float__": "Infinity"}
        value = next(iter(value.values()))
    return math.inf if value is None else float(value)


def fnet_facts(source: Mapping[str, Any], model: nn.Module) -> Facts:
    """For FNet."""
    assert isinstance(model, Language)
    return {
        **_sizes(source, model),
        **_norms(source.get("layer_norm_eps"), model),
        "sequence_length": (source.get("max_position_embeddings"), model.config.sequence_length),
        "type_vocab_size": (source.get("type_vocab_size"), model.config.type_vocab_size),
        "channel_mixer.act": (_activation(source.get("hidden_act")), _act_of(model)),
    }
