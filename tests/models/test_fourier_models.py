"""Blocks and models of the Fourier family and Sparsifiner: official numbers, parameter counts, other resolutions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import collect_losses
from mixerzoo.mixers.spectral.fourier import AFF
from mixerzoo.models import create_model, model_config, resize_grid, save_model
from mixerzoo.models.conversion.layouts import layouts
from mixerzoo.models.create import on_meta
from mixerzoo.models.parts.mobile_parts import ChannelsFirstBlock, ConvFusion
from mixerzoo.tests.utils import check_golden, load_golden, relative_error
from torch import nn

NORMS = {"layer_norm_2d": "group_norm", "layer_norm": "std_layer_norm"}
ACTS = {"swish": "silu", "relu": "relu", "gelu": "gelu"}


def _aff_block_names(state):
    """Official names of AFFNet's `Block` to ours."""
    rename = {
        "filter.": "mixer.",
        "mlp.block.exp_1x1.block.": "channel_mixer.expand.",
        "mlp.block.conv_3x3.block.": "channel_mixer.depthwise.",
        "mlp.block.red_1x1.block.": "channel_mixer.reduce.",
    }
    out = {}
    for key, value in state.items():
        for theirs, ours in rename.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return out


def _aff_block(dim, ratio, act, norm, num_blocks=8, **options):
    channel_mixer = {"name": "inverted_residual", "ratio": ratio, "act": act}
    mixer = AFF(dim, num_blocks=num_blocks, activation=act)
    return ChannelsFirstBlock(dim, mixer=mixer, norm=norm, channel_mixer=channel_mixer, **options)


@pytest.mark.parametrize("name", ["aff_block", "aff_block_ln"])
def test_golden_block(name):
    golden = load_golden(name)
    options = golden.kwargs
    block = _aff_block(
        options["dim"],
        options["mlp_ratio"],
        ACTS[options["opts_"]["model.activation.name"]],
        NORMS[options["attn_norm_layer"]],
        num_blocks=options["num_blocks"],
        double_skip=options["double_skip"],
    )
    check_golden(
        golden,
        block,
        _aff_block_names,
        to_ours=lambda x: x.permute(0, 2, 3, 1),
        to_theirs=lambda y: y.permute(0, 3, 1, 2),
    )


class _Stage(nn.Module):
    def __init__(self, blocks, fusion):
        super().__init__()
        self.blocks, self.fusion = nn.ModuleList(blocks), fusion

    def forward(self, x):
        y = x
        for block in self.blocks:
            y = block(y)
        return self.fusion(x, y)


def test_golden_fused_stage():
    golden = load_golden("aff_affblock")
    options = golden.kwargs
    dim, depth = options["transformer_dim"], options["n_transformer_blocks"]
    act = ACTS[options["opts_"]["model.activation.name"]]
    norm = NORMS[options["attn_norm_layer"]]
    blocks = [_aff_block(dim, options["ffn_dim"] / dim, act, norm) for _ in range(depth)]
    stage = _Stage(blocks, ConvFusion(dim, norm=norm, act=act))

    def convert(state):
        rename = {
            f"global_rep.{depth}.": "fusion.norm.",
            "conv_proj.block.": "fusion.project.",
            "fusion.block.": "fusion.joint.",
            "global_rep.": "blocks.",
        }
        out = {}
        for key, value in _aff_block_names(state).items():
            for theirs, ours in rename.items():
                if key.startswith(theirs):
                    key = ours + key.removeprefix(theirs)
                    break
            out[key] = value
        return out

    check_golden(
        golden,
        stage,
        convert,
        to_ours=lambda x: x.permute(0, 2, 3, 1),
        to_theirs=lambda y: y.permute(0, 3, 1, 2),
    )


# -- whole models: the official parameters by name and shape, and what the official models compute, from the papers


def _linear(prefix, i, o):
    return {f"{prefix}.weight": (o, i), f"{prefix}.bias": (o,)}


def _norm(prefix, dim):
    return {f"{prefix}.weight": (dim,), f"{prefix}.bias": (dim,)}


def _vit_shapes(dim, depth, tokens, classes, mixer, *, prefix="filter", patch=16):
    shapes = {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    shapes["pos_embed"] = (1, tokens, dim)
    for i in range(depth):
        b = f"blocks.{i}"
        shapes |= _norm(f"{b}.norm1", dim) | _norm(f"{b}.norm2", dim)
        shapes |= _linear(f"{b}.mlp.fc1", dim, 4 * dim) | _linear(f"{b}.mlp.fc2", 4 * dim, dim)
        shapes |= {f"{b}.{prefix}.{name}": shape for name, shape in mixer.items()}
    return shapes | _norm("norm", dim) | _linear("head", dim, classes)


def _gfnet_shapes(dim, depth, *, side=14, classes=1000, patch=16):
    mixer = {"complex_weight": (side, side // 2 + 1, dim, 2)}
    return _vit_shapes(dim, depth, side * side, classes, mixer, patch=patch)


def _afno_shapes(dim, depth, *, side=14, classes=1000, blocks=8, patch=16):
    c = dim // blocks
    mixer = {"w1": (2, blocks, c, c), "b1": (2, blocks, c), "w2": (2, blocks, c, c), "b2": (2, blocks, c)}
    return _vit_shapes(dim, depth, side * side, classes, mixer, patch=patch)


def _sparsifiner_shapes(dim, depth, heads, *, tokens=197, reduce_n=6, reduce_c=2, classes=1000, patch=16):
    width, basis = dim // heads, tokens // reduce_n
    mixer = _linear("qkv", dim, 3 * dim) | _linear("proj", dim, dim)
    for name in ("proj_c_q", "proj_c_k"):
        mixer |= _linear(f"mask_predictor.{name}", width, width // reduce_c)
    mixer |= {"mask_predictor.proj_n": (tokens, basis), "mask_predictor.proj_back_n": (tokens, basis)}
    shapes = _vit_shapes(dim, depth, tokens, classes, mixer, prefix="attn", patch=patch)
    return shapes | {"cls_token": (1, 1, dim)}


def _conv(prefix, i, o, k=1, groups=1):
    shapes = {f"{prefix}.block.conv.weight": (o, i // groups, k, k)} | _norm(f"{prefix}.block.norm", o)
    shapes |= {f"{prefix}.block.norm.running_mean": (o,), f"{prefix}.block.norm.running_var": (o,)}
    return shapes | {f"{prefix}.block.norm.num_batches_tracked": ()}


def _inverted(prefix, i, o, ratio):
    e = round(i * ratio)  # every published width is a multiple of 8
    shapes = _conv(f"{prefix}.block.exp_1x1", i, e) | _conv(f"{prefix}.block.conv_3x3", e, e, 3, e)
    return shapes | _conv(f"{prefix}.block.red_1x1", e, o)


def _affnet_shapes(dims, ratio, *, depths=(2, 4, 3), classes=1000):
    shapes = _conv("conv_1", 3, 16, 3) | _inverted("layer_1.0", 16, 32, ratio)
    for j in range(3):
        shapes |= _inverted(f"layer_2.{j}", 32 if j == 0 else dims[0], dims[0], ratio)
    for stage, depth in enumerate(depths):
        name, before, dim = f"layer_{stage + 3}", dims[stage], dims[stage + 1]
        shapes |= _inverted(f"{name}.0", before, dim, ratio)
        for j in range(depth):
            b, c = f"{name}.1.global_rep.{j}", dim // 8
            shapes |= _norm(f"{b}.norm1", dim) | _norm(f"{b}.norm2", dim) | _inverted(f"{b}.mlp", dim, dim, 2)
            shapes |= {f"{b}.filter.w{k}": (2, 8, c, c) for k in (1, 2)}
            shapes |= {f"{b}.filter.b{k}": (2, 8, c) for k in (1, 2)}
        shapes |= _norm(f"{name}.1.global_rep.{depth}", dim) | _conv(f"{name}.1.conv_proj", dim, dim)
        shapes |= _conv(f"{name}.1.fusion", 2 * dim, dim)
    wide = min(4 * dims[-1], 960)
    return shapes | _conv("conv_1x1_exp", dims[-1], wide) | _linear("classifier.fc", wide, classes)


OFFICIAL = {
    "gfnet_ti": (_gfnet_shapes, (256, 12), 7_511_784, "7M"),
    "gfnet_xs": (_gfnet_shapes, (384, 12), 15_985_768, "16M"),
    "gfnet_s": (_gfnet_shapes, (384, 19), 24_869_608, "25M"),
    "gfnet_b": (_gfnet_shapes, (512, 19), 43_120_616, "43M"),
    "afno_b16": (_afno_shapes, (768, 12), 61_793_512, None),
    "affnet_tiny": (_affnet_shapes, ((48, 64, 104, 144), 2), 1_436_264, "1.4M"),
    "affnet_small": (_affnet_shapes, ((48, 96, 160, 192), 4), 2_654_232, "2.6M"),
    "affnet_base": (_affnet_shapes, ((64, 128, 256, 320), 4), 5_568_696, "5.5M"),
    "sparsifiner_deit_small": (_sparsifiner_shapes, (384, 12, 6), 22_251_880, None),
}


def _is_buffer(name):
    return "running_" in name or name.endswith("num_batches_tracked")


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameters_of_published_sizes(name):
    """Counts and shapes of the official code, and the counts its README prints."""
    shapes_of, sizes, count, printed = OFFICIAL[name]
    shapes = shapes_of(*sizes)
    assert sum(math.prod(s) for n, s in shapes.items() if not _is_buffer(n)) == count
    if printed:
        digits = len(printed.partition(".")[2]) - 1 if "." in printed else 0
        assert abs(count / 1e6 - float(printed.rstrip("M"))) < 1.05 * 10.0**-digits
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == count
    config = model_config(name)
    official = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    layout = next(known for known in layouts() if known.matches(set(official), config))
    ours = layout.convert(official, config)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}


def _random_state(shapes):
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in shapes.items():
        value = 0.2 * torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(3)
        elif name.endswith("running_var"):
            value = value.abs() + 0.5
        elif "norm" in name and name.endswith("weight"):
            value = 1 + value
        state[name] = value
    return state


def _layer_norm(w, prefix, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{prefix}.weight"], w[f"{prefix}.bias"], 1e-6)


def _official_vit(w, x, depth, side, mix, *, double_skip=False):
    """GFNet and AFNO on images, with official names."""
    patch = w["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], patch).flatten(2).mT + w["pos_embed"]
    for i in range(depth):
        b = f"blocks.{i}"
        y = mix(w, f"{b}.filter", _layer_norm(w, f"{b}.norm1", x).unflatten(1, (side, side))).flatten(1, 2)
        if double_skip:
            x = y = x + y
        y = F.gelu(F.linear(_layer_norm(w, f"{b}.norm2", y), w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"]))
        x = x + F.linear(y, w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])
    return F.linear(_layer_norm(w, "norm", x).mean(1), w["head.weight"], w["head.bias"])


def _global_filter(w, prefix, x):
    z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(w[f"{prefix}.complex_weight"])
    return torch.fft.irfft2(z, s=x.shape[1:3], dim=(1, 2), norm="ortho")


def _spectral_mlp(w, prefix, z, act):
    w1, b1, w2, b2 = (torch.complex(*w[f"{prefix}.{n}"]) for n in ("w1", "b1", "w2", "b2"))
    z = torch.einsum("...ki,kio->...ko", z.unflatten(-1, w1.shape[:2]), w1) + b1
    z = torch.einsum("...ki,kio->...ko", torch.complex(act(z.real), act(z.imag)), w2) + b2
    return torch.complex(F.softshrink(z.real, 0.01), F.softshrink(z.imag, 0.01)).flatten(-2)


def _afno(w, prefix, x):
    z = _spectral_mlp(w, prefix, torch.fft.rfft2(x, dim=(1, 2), norm="ortho"), F.relu)
    return torch.fft.irfft2(z, s=x.shape[1:3], dim=(1, 2), norm="ortho") + x


@pytest.mark.parametrize(
    ("name", "shapes", "mix", "double"),
    [
        ("gfnet_ti", _gfnet_shapes, _global_filter, False),
        ("afno_b16", _afno_shapes, _afno, False),
        ("afno_b16", _afno_shapes, _afno, True),
    ],
)
def test_official_checkpoint_of_gfnet_and_afno(tmp_path, name, shapes, mix, double):
    """From a file in the official layout, at another resolution than it, and what the formulas of the paper give."""
    state = _random_state(shapes(16, 2, side=6, classes=7, patch=4))
    torch.save({"model": state}, tmp_path / "official.pth")
    small = {"dim": 16, "depth": 2, "patch_size": 4, "image_size": 24}
    if double:
        small["block"] = "metaformer"
    model = create_model(name, checkpoint=tmp_path / "official.pth", num_classes=7, **small).eval()
    x = torch.randn(2, 3, 24, 24)
    expected = _official_vit(state, x, 2, 6, mix, double_skip=double)
    assert relative_error(model(x).detach(), expected) < 1e-5


def _conv_norm(w, prefix, x, *, stride=1, groups=1, act=F.silu):
    p = f"{prefix}.block"
    kernel = w[f"{p}.conv.weight"]
    x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, groups=groups)
    running = w[f"{p}.norm.running_mean"], w[f"{p}.norm.running_var"]
    return act(F.batch_norm(x, *running, w[f"{p}.norm.weight"], w[f"{p}.norm.bias"]))


def _official_inverted(w, prefix, x, stride=1):
    p = f"{prefix}.block"
    y = _conv_norm(w, f"{p}.exp_1x1", x)
    y = _conv_norm(w, f"{p}.conv_3x3", y, stride=stride, groups=y.shape[1])
    y = _conv_norm(w, f"{p}.red_1x1", y, act=lambda t: t)
    return x + y if y.shape == x.shape else y


def _official_affnet(w, x, depths):
    def norm(prefix, t):
        return F.group_norm(t, 1, w[f"{prefix}.weight"], w[f"{prefix}.bias"])

    x = _official_inverted(w, "layer_1.0", _conv_norm(w, "conv_1", x, stride=2))
    for j in range(3):
        x = _official_inverted(w, f"layer_2.{j}", x, stride=2 if j == 0 else 1)
    for stage, depth in enumerate(depths):
        name = f"layer_{stage + 3}"
        x = y = _official_inverted(w, f"{name}.0", x, stride=2)
        for j in range(depth):
            b = f"{name}.1.global_rep.{j}"
            mixed = norm(f"{b}.norm2", _official_inverted(w, f"{b}.mlp", norm(f"{b}.norm1", y)))
            z = torch.fft.rfft2(mixed, norm="ortho").permute(0, 2, 3, 1)
            z = (z * _spectral_mlp(w, f"{b}.filter", z, F.silu)).permute(0, 3, 1, 2)
            y = y + mixed + torch.fft.irfft2(z, s=mixed.shape[2:], norm="ortho")
        y = norm(f"{name}.1.global_rep.{depth}", y)
        y = _conv_norm(w, f"{name}.1.conv_proj", y, act=lambda t: t)
        x = _conv_norm(w, f"{name}.1.fusion", torch.cat([x, y], 1))
    x = _conv_norm(w, "conv_1x1_exp", x).mean((2, 3))
    return F.linear(x, w["classifier.fc.weight"], w["classifier.fc.bias"])


def test_official_checkpoint_of_affnet(tmp_path):
    state = _random_state(_affnet_shapes((16, 16, 24, 32), 2, depths=(1, 2, 1), classes=7))
    torch.save(state, tmp_path / "official.pth")
    small = {"dims": [16, 16, 24, 32], "depths": [0, 1, 2, 1], "image_size": 64}
    model = create_model("affnet_tiny", checkpoint=tmp_path / "official.pth", num_classes=7, **small).eval()
    x = torch.randn(2, 3, 72, 96)
    assert relative_error(model(x).detach(), _official_affnet(state, x, (1, 2, 1))) < 1e-5
    assert model.forward_features(x).shape == (2, 32, 3, 3)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)


SPARSE = {
    "dim": 16,
    "depth": 2,
    "patch_size": 4,
    "image_size": [16, 24],
    "mixer": {"name": "sparsifiner", "head_dim": 8, "class_token": True, "reduce_n_factor": 4, "coef_topk": 3},
}


def test_official_checkpoint_of_sparsifiner(tmp_path):
    """The blocks are held to the official ones elsewhere; here: every weight has its place, and the order of parts."""
    state = _random_state(_sparsifiner_shapes(16, 2, 2, tokens=25, reduce_n=4, classes=7, patch=4))
    torch.save({"model": state}, tmp_path / "official.pth")
    model = create_model("sparsifiner_deit_small", checkpoint=tmp_path / "official.pth", num_classes=7, **SPARSE).eval()
    x = torch.randn(2, 3, 16, 24)
    w = state
    y = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 4).flatten(2).mT
    y = torch.cat([w["cls_token"].expand(2, -1, -1), y], 1) + w["pos_embed"]
    for i, stage in enumerate(model.stages):
        b, block = f"blocks.{i}", stage.blocks[0]
        assert torch.equal(block.mixer.predictor.basis_in, w[f"{b}.attn.mask_predictor.proj_n"])
        y = y + block.mixer(_layer_norm(w, f"{b}.norm1", y))
        hidden = F.linear(_layer_norm(w, f"{b}.norm2", y), w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"])
        y = y + F.linear(F.gelu(hidden), w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])
    expected = F.linear(_layer_norm(w, "norm", y)[:, 0], w["head.weight"], w["head.bias"])
    assert relative_error(model(x).detach(), expected.detach()) < 1e-5


def test_blocks_may_prune_more_and_more():
    rates = [1.0, 0.5]
    blocks = [{"name": "token_pruning", "token_keep_rate": r} for r in rates]
    model = create_model("sparsifiner_deit_small", num_classes=7, block=blocks, **SPARSE).eval()
    tokens = model.tokens(torch.randn(2, 3, 16, 24))
    assert (tokens != 0).any(-1).sum(1).tolist() == [13, 13]
    assert model(torch.randn(2, 3, 16, 24)).isfinite().all()


# -- every model, small: non-square and changed resolutions, forward and backward, precision, compilation

AFF_SMALL = {"dims": [16, 16, 16, 24], "depths": [0, 1, 1, 1], "image_size": [64, 96]}
VIT_SMALL = {"dim": 16, "depth": 2, "patch_size": 4, "image_size": [16, 24]}
SMALL = {
    "gfnet_ti": VIT_SMALL,
    "afno_b16": VIT_SMALL,
    "affnet_tiny": AFF_SMALL,
    "sparsifiner_deit_small": SPARSE,
}


def _small(name, **changes):
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **{**SMALL[name], **changes})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_and_backward(name, dtype):
    model = _small(name).to(dtype)
    with collect_losses() as losses:
        loss = model(torch.randn(2, 3, *SMALL[name]["image_size"]).to(dtype)).float().square().sum()
    sum(losses.values(), loss).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", SMALL)
def test_another_resolution(name, tmp_path):
    """In place by `resize_grid`, and on loading a checkpoint; there and back the output is nearly as it was."""
    model = _small(name).eval()
    size = SMALL[name]["image_size"]
    other = [size[1], size[0] + 32]
    x, y = torch.randn(1, 3, *size), torch.randn(1, 3, *other)
    before = model(x)
    save_model(model, tmp_path / "weights.safetensors")
    loaded = create_model(
        name, num_classes=5, checkpoint=tmp_path / "weights.safetensors", **{**SMALL[name], "image_size": other}
    ).eval()
    resize_grid(model, other)
    assert model(y).shape == (1, 5)
    torch.testing.assert_close(loaded(y), model(y))
    resize_grid(model, size)
    assert relative_error(model(x).detach(), before.detach()) < 0.5


@pytest.mark.parametrize("name", SMALL)
def test_compiles(name):
    model = _small(name)
    if name == "affnet_tiny":
        model.eval()  # batch norm's counters would differ between the two passes
    x = torch.randn(2, 3, *SMALL[name]["image_size"])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    with collect_losses() as losses:
        y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    sum(losses.values(), y.square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("name", "mixer"), [("affnet_tiny", "fnet"), ("gfnet_ti", "afno"), ("afno_b16", "aff")])
def test_mixers_are_swapped_by_name(name, mixer):
    model = _small(name, mixer=mixer).eval()
    assert model(torch.randn(1, 3, *SMALL[name]["image_size"])).isfinite().all()


def test_mistakes():
    with pytest.raises(ConfigError, match="channel mixer"):
        _small("gfnet_ti", channel_mixer=None)
    with pytest.raises(ConfigError, match="fusion"):
        _small("affnet_tiny", fusion=["conv"])
    with pytest.raises(ConfigError, match="too small"):
        _small("affnet_tiny").stem.out_size((0, 64))
    with pytest.raises(ConfigError, match="head"):
        _small("affnet_tiny", head={"name": "conv", "ration": 2.0})
