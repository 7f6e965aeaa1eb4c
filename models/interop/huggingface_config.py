"""The configuration of our models in transformers."""

from __future__ import annotations

from typing import Any

try:
    from transformers import AutoConfig, PretrainedConfig
except ImportError as error:
    raise ImportError("mixerzoo.models.interop.huggingface needs transformers: pip install 'mixerzoo[text]'") from error


class MixerZooConfig(PretrainedConfig):
    """Configuration of `MixerZooForCausalLM`.

    Attributes:
        mixerzoo: the model's configuration, as `create_model` takes it: a mapping with `backbone: language`.
        mixerzoo_plugins: what the model needs from outside of the package, see `plugins.needed`.
    """

    model_type = "mixerzoo"
    mixerzoo: dict[str, Any] | None = None
    mixerzoo_plugins: list[dict[str, Any]] | None = None

    def _entry(self, name: str) -> Any:
        return (self.mixerzoo or {}).get(name)

    @property
    def vocab_size(self) -> Any:
        """Number of tokens."""
        return self._entry("vocab_size")

    @property
    def hidden_size(self) -> Any:
        """Channels."""
        return self._entry("dim")

    @property
    def num_labels(self) -> Any:
        """Classes."""
        return self._entry("num_classes") or 0

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        """transformers sets its own default of 2, which is not the model's."""

    @property
    def num_hidden_layers(self) -> Any:
        """Blocks."""
        return self._entry("depth")


def register() -> None:
    """Enter the configuration into transformers' auto classes."""
    AutoConfig.register("mixerzoo", MixerZooConfig, exist_ok=True)
