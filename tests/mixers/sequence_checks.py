"""What tests of sequence mixers share beside the contract: the form that sees both ways, and sizes of states."""

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


def check_size_of_state(mixer: Mixer, dim: int, length: int = 30) -> None:
    """A state has a size, which does not grow with the tokens read."""
    x = tokens(2, length, dim)
    state = mixer.eval().init_state(2)
    sizes = {state_bytes(state)}
    with torch.no_grad():
        for t in range(length):
            _, state = mixer.step(x[:, t], state)
            sizes.add(state_bytes(state))
    assert len(sizes) == 1
    assert sizes != {0}


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
