"""Sampling from language models: parallel prefill, then one step per token.

Axis letters: B batch, N tokens of the prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from .backbones.language import Language, LanguageState


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, side: str = "left", padding_id: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch.

    Args:
        prompts: B lists of token ids.
        side: "left" or "right": where the padding stands.
        padding_id: what stands there; it has no effect.
        device: of the result.

    Returns:
        Ids (B, N) int64 and mask (B, N) bool, True for real tokens.

    Raises:
        ConfigError: no prompts, an empty prompt, or an unknown side.
    """
    if side not in ("left", "right"):
        raise ConfigError(f'side: "{side}" is not known. Allowed: left, right.')
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ConfigError("prompt: empty; at least one token is needed to start from.")
    ids = torch.full((len(prompts), max(lengths)), padding_id, dtype=torch.int64, device=device)
    mask = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        place = slice(len(prompt)) if side == "right" else slice(ids.shape[1] - len(prompt), None)
        ids[row, place] = torch.as_tensor(prompt, dtype=torch.int64, device=device)
        mask[row, place] = True
    return ids, mask


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with -inf for tokens outside of the `top_k` best and of the smallest set of probability `top_p`.

    Nucleus sampling (2019), arXiv:1904.09751: the token that reaches `top_p` is kept, so one is always left.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        outside = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), float("-inf"))
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids (B,) from logits (B, V); `temperature=0` takes the best one."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    probability = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


def _check(model: Language, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if model.config.objective != "causal_lm":
        raise ConfigError(f"generate: a model with objective=causal_lm is needed, not {model.config.objective}.")
    if max_new_tokens < 1:
        raise ConfigError(f"generate.max_new_tokens: {max_new_tokens} is not a positive number.")
    if temperature < 0:
        raise ConfigError(f"generate.temperature: {temperature} is negative; 0 takes the best token.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"generate.top_k: {top_k} is not a positive number.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"generate.top_p: {top_p} is not in (0, 1].")


@torch.no_grad()
def generate(
    model: Language,
    prompt: Tensor | Sequence[int],
    *,
    mask: Tensor | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts. The prompt is read in parallel; then every token costs one step.

    Args:
        model: a causal language model; it is used in evaluation mode.
        prompt: (B, N) token ids, or one list of ids. For prompts of several lengths see `pad_prompts`.
        mask: (B, N) bool, True for real tokens; padding may stand on the left or on the right and has no influence.
        max_new_tokens: most tokens to add.
        temperature: divides the logits; 0 takes the best token.
        top_k: sample from the best k tokens only.
        top_p: sample from the smallest set of tokens with this probability only.
        stop: token id, or several, after which a row ends; it is part of the result.
        generator: source of randomness.

    Returns:
        (B, M) new tokens, M <= max_new_tokens. A row that has ended repeats its stop token.

    Raises:
        ConfigError: an empty prompt, ids out of range, prompts of mixed lengths in a list, more tokens than learned
            positions, an option out of range, or a model that does not stream.
    """
    _check(model, max_new_tokens, temperature, top_k, top_p)
    device = next(model.parameters()).device
    if not isinstance(prompt, Tensor):
        if len(prompt) and not isinstance(prompt[0], int):
            model.check_ids(list(prompt), None, None)  # raises, and says how to pad
        prompt = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    if prompt.numel() == 0 or (mask is not None and not bool(mask.any(1).all())):
        raise ConfigError("prompt: empty; at least one token is needed to start from.")
    if int(prompt.min()) < 0 or int(prompt.max()) >= model.vocab_size:
        model.check_ids(prompt.cpu(), None, None)
    if model.position is not None:
        longest = prompt.shape[1] if mask is None else int(mask.sum(1).max())
        if longest + max_new_tokens > model.position.num_embeddings + 1:
            raise ConfigError(
                f"prompt: {longest} tokens and {max_new_tokens} new ones are more than the "
                f"{model.position.num_embeddings} learned positions (model.sequence_length)."
            )
    stops = None if stop is None else torch.tensor([stop] if isinstance(stop, int) else list(stop), device=device)
    training = model.training
    model.eval()
    try:
        logits, state = model.prefill(prompt, mask=mask)
        return _decode(model, logits, state, max_new_tokens, stops, temperature, top_k, top_p, generator)
    finally:
        model.train(training)


def _decode(
    model: Language,
    logits: Tensor,
    state: LanguageState,
    max_new_tokens: int,
    stops: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    ended = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    tokens: list[Tensor] = []
    while True:
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if tokens:
            token = torch.where(ended, tokens[-1], token)
        tokens.append(token)
        if stops is not None:
            ended = ended | (token[:, None] == stops).any(1)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            return torch.stack(tokens, 1)
        logits, state = model.step(token, state)
