"""VMamba and Vision Mamba: official parameter counts, checkpoints in the official layout, what the models compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.models import create_model, model_config, resize_grid
from mixerzoo.models.conversion.layouts import layouts
from mixerzoo.models.conversion.ssm import convert_vmamba
from mixerzoo.models.create import on_meta
from mixerzoo.models.parts.blocks import BLOCKS
from mixerzoo.tests.utils import check_golden, load_golden, relative_error
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def linear(prefix: str, i: int, o: int) -> Shapes:
    return {f"{prefix}.weight": (o, i), f"{prefix}.bias": (o,)}


def conv(prefix: str, i: int, o: int) -> Shapes:
    return {f"{prefix}.weight": (o, i, 3, 3), f"{prefix}.bias": (o,)}


def norm(prefix: str, dim: int) -> Shapes:
    return {f"{prefix}.weight": (dim,), f"{prefix}.bias": (dim,)}


def vmamba_shapes(dim: int, depths: tuple[int, ...], ratio: float, classes: int = 1000) -> Shapes:
    """Names and shapes of the official `VSSM` of forward type v05_noz, stem v2, downsampling v3."""
    shapes = conv("patch_embed.0", 3, dim // 2) | norm("patch_embed.2", dim // 2)
    shapes |= conv("patch_embed.5", dim // 2, dim) | norm("patch_embed.7", dim)
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        inner, rank = int(ratio * width), math.ceil(width / 16)
        for j in range(depth):
            b = f"layers.{stage}.blocks.{j}"
            shapes |= norm(f"{b}.norm", width) | norm(f"{b}.norm2", width) | norm(f"{b}.op.out_norm", inner)
            shapes |= linear(f"{b}.mlp.fc1", width, 4 * width) | linear(f"{b}.mlp.fc2", 4 * width, width)
            shapes |= {
                f"{b}.op.in_proj.weight": (inner, width),
                f"{b}.op.conv2d.weight": (inner, 1, 3, 3),
                f"{b}.op.x_proj.weight": (4 * (rank + 2), inner),
                f"{b}.op.dt_projs.weight": (4 * inner, rank),
                f"{b}.op.dt_projs_bias": (4, inner),
                f"{b}.op.A_logs": (4 * inner, 1),
                f"{b}.op.Ds": (4 * inner,),
                f"{b}.op.out_proj.weight": (width, inner),
            }
        if stage < len(depths) - 1:
            shapes |= conv(f"layers.{stage}.downsample.1", width, 2 * width)
            shapes |= norm(f"layers.{stage}.downsample.3", 2 * width)
    last = dim * 2 ** (len(depths) - 1)
    return shapes | norm("classifier.norm", last) | linear("classifier.head", last, classes)


# name -> shapes, count, and the millions that the paper prints
OFFICIAL: dict[str, tuple[Shapes, int, float]] = {
    "vmamba_tiny": (vmamba_shapes(96, (2, 2, 8, 2), 1.0), 30_249_064, 30.2),
    "vmamba_small": (vmamba_shapes(96, (2, 2, 15, 2), 2.0), 50_147_752, 50.1),
    "vmamba_base": (vmamba_shapes(128, (2, 2, 15, 2), 2.0), 88_557_800, 88.6),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameters_are_the_official_ones(name: str) -> None:
    shapes, count, printed = OFFICIAL[name]
    assert sum(math.prod(s) for s in shapes.values()) == count
    assert abs(count / 1e6 - printed) <= 0.05
    model, config = on_meta(name), model_config(name)
    assert sum(p.numel() for p in model.parameters()) == count
    official = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    layout = next(known for known in layouts() if known.matches(set(official), config))
    ours = layout.convert(official, config)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Random values of a size at which every part is seen."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        matrix = name.endswith("weight") and len(shape) > 1
        value = value * (math.prod(shape[1:]) ** -0.5 if matrix else 0.2)
        state[name] = 1 + value if "norm" in name and name.endswith("weight") else value
    return state


def layer_norm(w: dict[str, Tensor], prefix: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{prefix}.weight"], w[f"{prefix}.bias"], eps)


def recurrence(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Token by token: u, delta (B, L, E), a (E, S), b, c (B, L, S), d (E)."""
    state = u.new_zeros(u.shape[0], *a.shape)
    out = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        state = torch.exp(step * a) * state + step * b[:, t, None] * u[:, t, :, None]
        out.append((state * c[:, t, None]).sum(-1) + d * u[:, t])
    return torch.stack(out, 1)


def official_ss2d(w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    """`SS2D` of forward type v05_noz on (B, H, W, C), from the paper."""
    height, width = x.shape[1:3]
    u = F.linear(x, w[f"{p}.in_proj.weight"]).permute(0, 3, 1, 2)
    u = F.silu(F.conv2d(u, w[f"{p}.conv2d.weight"], padding=1, groups=u.shape[1]))
    inner = u.shape[1]
    rank = w[f"{p}.dt_projs.weight"].shape[1]
    grids = [u, u.mT]
    total = torch.zeros_like(u)
    for k in range(4):
        tokens = grids[k % 2].flatten(2).mT
        tokens = tokens.flip(1) if k > 1 else tokens
        r, b, c = F.linear(tokens, w[f"{p}.x_proj.weight"].chunk(4)[k]).split((rank, 1, 1), -1)
        delta = F.softplus(F.linear(r, w[f"{p}.dt_projs.weight"].chunk(4)[k]) + w[f"{p}.dt_projs_bias"][k])
        a = -torch.exp(w[f"{p}.A_logs"].view(4, inner, 1)[k])
        y = recurrence(tokens, delta, a, b, c, w[f"{p}.Ds"].view(4, inner)[k])
        y = (y.flip(1) if k > 1 else y).mT
        total = total + (y.unflatten(2, (width, height)).mT if k % 2 else y.unflatten(2, (height, width)))
    return F.linear(layer_norm(w, f"{p}.out_norm", total.permute(0, 2, 3, 1)), w[f"{p}.out_proj.weight"])


def official_vmamba(w: dict[str, Tensor], x: Tensor, depths: tuple[int, ...]) -> Tensor:
    def down(index: str, after: str, x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), w[f"{index}.weight"], w[f"{index}.bias"], stride=2, padding=1)
        return layer_norm(w, after, y.permute(0, 2, 3, 1))

    x = F.gelu(down("patch_embed.0", "patch_embed.2", x.permute(0, 2, 3, 1)))
    x = down("patch_embed.5", "patch_embed.7", x)
    for stage, depth in enumerate(depths):
        for j in range(depth):
            b = f"layers.{stage}.blocks.{j}"
            x = x + official_ss2d(w, f"{b}.op", layer_norm(w, f"{b}.norm", x))
            y = F.gelu(F.linear(layer_norm(w, f"{b}.norm2", x), w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"]))
            x = x + F.linear(y, w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])
        if stage < len(depths) - 1:
            x = down(f"layers.{stage}.downsample.1", f"layers.{stage}.downsample.3", x)
    x = layer_norm(w, "classifier.norm", x).mean((1, 2))
    return F.linear(x, w["classifier.head.weight"], w["classifier.head.bias"])


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_official_checkpoint_of_vmamba(tmp_path, ratio: float) -> None:
    """From a file in the official layout, on an odd grid, and what the formulas of the paper give."""
    depths = (1, 2, 1, 1)
    state = random_state(vmamba_shapes(16, depths, ratio, classes=7))
    torch.save({"model": state}, tmp_path / "official.pth")
    changes: dict[str, Any] = {"dims": [16, 32, 64, 128], "depths": list(depths), "image_size": [64, 96]}
    name = "vmamba_tiny" if ratio == 1 else "vmamba_small"
    model = create_model(name, checkpoint=tmp_path / "official.pth", num_classes=7, **changes).eval()
    x = torch.randn(2, 3, 52, 84)  # 13 x 21 tokens
    with torch.no_grad():
        assert relative_error(model(x), official_vmamba(state, x, depths)) < 1e-5


def test_block_of_vmamba_equals_official() -> None:
    golden, config = load_golden("vmamba_vssblock"), model_config("vmamba_tiny")
    kwargs = golden.kwargs
    dim, rank = kwargs["hidden_dim"], kwargs.get("ssm_dt_rank", "auto")
    mixer = create_mixer(
        config["mixer"]["name"],
        dim,
        d_state=kwargs["ssm_d_state"],
        d_conv=kwargs.get("ssm_conv", 3),
        ssm_ratio=kwargs["ssm_ratio"],
        dt_rank=None if rank == "auto" else rank,
        gate=not kwargs["forward_type"].endswith("_noz"),
        conv_bias=kwargs.get("ssm_conv_bias", True),
    )
    given = {"mixer": mixer, "norm": config["norm"]}
    given["channel_mixer"] = {**config["channel_mixer"], "ratio": kwargs["mlp_ratio"]}
    block = BLOCKS.build("metaformer", dim, key="model.block", **given)

    def convert(params: Any) -> dict[str, Tensor]:
        state = convert_vmamba({f"layers.0.blocks.0.{k}": v for k, v in params.items()}, config)
        return {k.removeprefix("stages.0.blocks.0."): v for k, v in state.items()}

    to_ours = to_theirs = lambda x: x
    if kwargs.get("channel_first", False):
        to_ours, to_theirs = lambda x: x.permute(0, 2, 3, 1), lambda y: y.permute(0, 3, 1, 2)
    check_golden(golden, block, convert, to_ours=to_ours, to_theirs=to_theirs)


@pytest.mark.parametrize(
    ("stem", "message"),
    [({"ratios": [0.5, 0.5]}, "stem.ratios"), ({"kernel_size": 4}, "model.stem.kernel_size: 4 must be odd")],
)
def test_mistakes_of_the_stem(stem: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("vmamba_tiny", stem={"name": "conv_stack", **stem})


# -- Vision Mamba


def vim_shapes(dim: int, depth: int, patches: int = 196, classes: int = 1000, patch: int = 16) -> Shapes:
    """Names and shapes of the official `VisionMamba`, bimamba v2, with a class token."""
    inner, rank = 2 * dim, math.ceil(dim / 16)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, patches + 1, dim), "norm_f.weight": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    shapes |= linear("head", dim, classes)
    for i in range(depth):
        m = f"layers.{i}.mixer"
        shapes |= {f"layers.{i}.norm.weight": (dim,), f"{m}.in_proj.weight": (2 * inner, dim)}
        shapes |= {f"{m}.out_proj.weight": (dim, inner)}
        for b in ("", "_b"):
            shapes |= linear(f"{m}.dt_proj{b}", rank, inner)
            shapes |= {f"{m}.conv1d{b}.weight": (inner, 1, 4), f"{m}.conv1d{b}.bias": (inner,)}
            shapes |= {f"{m}.x_proj{b}.weight": (rank + 32, inner), f"{m}.D{b}": (inner,)}
            shapes |= {f"{m}.A{b}_log": (inner, 16)}
    return shapes


OFFICIAL["vim_tiny"] = (vim_shapes(192, 24), 7_148_008, 7.15)
OFFICIAL["vim_small"] = (vim_shapes(384, 24), 25_796_584, 25.80)


def official_vim(w: dict[str, Tensor], image: Tensor, depth: int) -> Tensor:
    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    patch = w["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], patch).flatten(2).mT
    middle = x.shape[1] // 2
    x = torch.cat([x[:, :middle], w["cls_token"].expand(len(x), 1, -1), x[:, middle:]], 1) + w["pos_embed"]
    for i in range(depth):
        m = f"layers.{i}.mixer"
        tokens, z = F.linear(rms(x, w[f"layers.{i}.norm.weight"]), w[f"{m}.in_proj.weight"]).chunk(2, -1)
        total = torch.zeros_like(tokens)
        for b in ("", "_b"):
            u = (tokens.flip(1) if b else tokens).mT
            u = F.conv1d(F.pad(u, (3, 0)), w[f"{m}.conv1d{b}.weight"], w[f"{m}.conv1d{b}.bias"], groups=u.shape[1])
            u = F.silu(u).mT
            rank = w[f"{m}.dt_proj{b}.weight"].shape[1]
            r, keys, queries = F.linear(u, w[f"{m}.x_proj{b}.weight"]).split((rank, 16, 16), -1)
            delta = F.softplus(F.linear(r, w[f"{m}.dt_proj{b}.weight"], w[f"{m}.dt_proj{b}.bias"]))
            y = recurrence(u, delta, -w[f"{m}.A{b}_log"].exp(), keys, queries, w[f"{m}.D{b}"])
            total = total + (y.flip(1) if b else y) * F.silu(z)
        x = x + F.linear(total / 2, w[f"{m}.out_proj.weight"])
    return F.linear(rms(x, w["norm_f.weight"])[:, middle], w["head.weight"], w["head.bias"])


def test_official_checkpoint_of_vim(tmp_path) -> None:
    state = random_state(vim_shapes(16, 3, 15, classes=7, patch=4))
    torch.save({"model": state}, tmp_path / "official.pth")
    changes: dict[str, Any] = {"dim": 16, "depth": 3, "patch_size": 4, "image_size": [12, 20]}
    model = create_model("vim_tiny", checkpoint=tmp_path / "official.pth", num_classes=7, **changes).eval()
    x = torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        assert relative_error(model(x), official_vim(state, x, 3)) < 1e-5
        last, maps = model.forward_intermediates(x)
        assert [m.shape for m in maps] == [(2, 16, 3, 5)] * 3
        patches = torch.cat([last[:, :7], last[:, 8:]], 1)  # without the class token, which stands behind seven
        assert torch.equal(maps[-1], patches.mT.unflatten(2, (3, 5)))


def test_the_middle_token_on_other_sizes() -> None:
    torch.manual_seed(0)
    model = create_model("vim_tiny", dim=16, depth=2, patch_size=4, image_size=16, num_classes=3).eval()
    x = torch.randn(2, 3, 16, 24)
    logits = model(x)
    assert logits.isfinite().all()
    resized = resize_grid(model, (16, 24))
    torch.testing.assert_close(resized(x), logits)  # the position table is interpolated in either case
    with pytest.raises(ConfigError, match="expects it first"):
        create_model("sparsifiner_deit_small", class_token="middle")
