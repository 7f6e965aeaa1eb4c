"""What every causal mixer is held to: causality, streaming, padding and packed documents. All on tiny sizes."""

from __future__ import annotations

import torch
from mixerzoo.mixers.base import Mixer
from mixerzoo.mixers.state import state_bytes
from torch import Tensor


def perturb(mixer: Mixer, seed: int = 0, std: float = 0.2) -> Mixer:
    """The mixer with noise on every parameter, so that nothing starts at zero or symmetric."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)
    return mixer


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference relative to the largest value."""
    error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-30))
    assert error < tolerance, f"{what}: {error:.2e}"


def tokens(batch: int, length: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def check_causal(mixer: Mixer, dim: int, length: int = 17) -> None:
    """The gradient of output t reaches x_t and earlier ones, and nothing after it; something earlier is reached."""
    x = tokens(2, length, dim).requires_grad_()
    t = length // 2
    (grad,) = torch.autograd.grad(mixer(x)[:, t].square().sum(), x)
    # an FFT spreads rounding noise over all positions; everything else gives exact zeros
    assert float(grad[:, t + 1 :].abs().max()) < 1e-6 * float(grad.abs().max())
    assert float(grad[:, :t].abs().max()) > 0


def check_streaming(mixer: Mixer, dim: int, length: int = 200, constant: bool = True) -> None:
    """Steps equal the parallel forward; prefill of uneven pieces and steps do, too; the state keeps its size."""
    mixer = mixer.eval()
    x = tokens(2, length, dim)
    with torch.no_grad():
        expected = mixer(x)
        state = mixer.init_state(2)
        sizes = []
        outputs = []
        for t in range(length):
            y_t, state = mixer.step(x[:, t], state)
            outputs.append(y_t)
            sizes.append(state_bytes(state))
        close(torch.stack(outputs, 1), expected, 1e-4, "step")
        assert sizes[0] > 0
        if constant:
            assert len(set(sizes)) == 1
        first, state = mixer.prefill(x[:, :13])
        second, state = mixer.prefill(x[:, 13:30], state=state)
        pieces = [first, second]
        for t in range(30, 40):
            y_t, state = mixer.step(x[:, t], state)
            pieces.append(y_t[:, None])
        close(torch.cat(pieces, 1), expected[:, :40], 1e-4, "prefill and step")


def masks(length: int) -> dict[str, Tensor]:
    """Padding on the left, on the right, and in between; row 0 has none."""
    left = torch.ones(3, length, dtype=torch.bool)
    left[1, :4] = False
    left[2, : length - 2] = False
    between = torch.ones(3, length, dtype=torch.bool)
    between[1, 2:5] = False
    between[1, 8] = False
    between[2, ::2] = False
    return {"left": left, "right": left.flip(1), "between": between}


def check_padding(mixer: Mixer, dim: int, length: int = 11) -> None:
    """Real tokens get what they get without the padding around them, whatever the padding holds."""
    for name, mask in masks(length).items():
        x = tokens(3, length, dim)
        noisy = torch.where(mask[..., None], x, 50 * tokens(3, length, dim, seed=7))
        y = mixer(noisy, mask=mask)
        assert torch.isfinite(y).all()
        for row in range(3):
            close(y[row, mask[row]], mixer(x[row : row + 1, mask[row]])[0], 2e-4, f"padding {name}, row {row}")


def check_padded_prefill(mixer: Mixer, dim: int, length: int = 11) -> None:
    """The state after a padded prefill continues every row as if it had been alone; also after a second piece."""
    for name, mask in masks(length).items():
        x, more = tokens(3, length, dim), tokens(3, 6, dim, seed=5)
        noisy = torch.where(mask[..., None], x, 50 * tokens(3, length, dim, seed=7))
        with torch.no_grad():
            y, state = mixer.prefill(noisy, mask=mask)
            keep = torch.ones(3, 3, dtype=torch.bool)
            keep[1, 0] = False
            later, state = mixer.prefill(more[:, :3], mask=keep, state=state)
            stepped = []
            for t in range(3, 6):
                y_t, state = mixer.step(more[:, t], state)
                stepped.append(y_t)
            for row in range(3):
                alone = torch.cat([x[row, mask[row]], more[row, :3][keep[row]], more[row, 3:]])
                got = torch.cat([y[row, mask[row]], later[row, keep[row]], torch.stack(stepped, 1)[row]])
                close(got, mixer(alone[None])[0], 2e-4, f"prefill {name}, row {row}")


def check_packing(mixer: Mixer, dim: int, length: int = 17) -> None:
    """Packed documents equal single ones, and no gradient crosses a boundary. An id may come back."""
    ids = torch.tensor([[0] * 5 + [1] * 4 + [0] * 8, [3] * 1 + [2] * 9 + [9] * 7])[:, :length]
    x = tokens(2, length, dim).requires_grad_()
    y = mixer(x, document_ids=ids)
    for row, start, stop in ((0, 0, 5), (0, 5, 9), (0, 9, 17), (1, 0, 1), (1, 1, 10), (1, 10, 17)):
        close(y[row, start:stop], mixer(x[row : row + 1, start:stop])[0], 2e-4, f"document {row, start, stop}")
        (grad,) = torch.autograd.grad(y[row, start:stop].square().sum(), x, retain_graph=True)
        inside = torch.zeros(2, length, dtype=torch.bool)
        inside[row, start:stop] = True
        # chunked scans take differences of cumulated decays, whose rounding leaves up to 1e-7 in place of zero
        assert float(grad[~inside].abs().max()) < 1e-6 * float(grad[inside].abs().max())
        assert float(grad[inside].abs().max()) > 0


def check_parallel_prefill(mixer: Mixer, dim: int) -> None:
    """A padded prompt, and a piece after a state, are read in one piece, without a call of `step`."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("prefill calls step")

    mixer.step = never  # type: ignore[method-assign]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    x = tokens(2, 30, dim)
    with torch.no_grad():
        _, state = mixer.prefill(x[:, :9], mask=mask)
        y, _ = mixer.prefill(x[:, 9:], state=state)
        for row in range(2):
            close(y[row], mixer(x[row : row + 1, 9 - int(mask[row].sum()) :])[0, -21:], 1e-4, f"row {row}")
    del mixer.step
