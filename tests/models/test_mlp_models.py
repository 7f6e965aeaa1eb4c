"""Whole models, levels and blocks of the MLP family equal timm and the official code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo.errors import ConfigError
from mixerzoo.mixers import create_mixer
from mixerzoo.mixers.mlp.raft import AxisMlp
from mixerzoo.mixers.mlp.strip import Strip
from mixerzoo.models import build_model, create_model, model_config, resize_grid, save_model
from mixerzoo.models.conversion.layouts import layouts
from mixerzoo.models.conversion.mlp import convert_isotropic, convert_msmlp, convert_ninformer, convert_stripmlp
from mixerzoo.models.create import on_meta
from mixerzoo.models.parts.block_variants import ConvMlp
from mixerzoo.models.parts.blocks import BLOCKS
from mixerzoo.models.registry import apply_overrides
from mixerzoo.tests.utils import Golden, check_golden, load_golden, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn


def layout(name: str) -> Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]:
    return next(known for known in layouts() if known.name == name).convert


class NCHW(nn.Module):
    """Channels-first in and out around a channels-last module, for the fixtures' layout."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def inner(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{k}": v for k, v in state.items()}


def block_of(config: Mapping[str, Any], dim: int, mixer: nn.Module, **options: Any) -> nn.Module:
    """A block as the backbones build it."""
    return BLOCKS.build(
        config.get("block", "metaformer"),
        dim,
        key="model.block",
        **{
            "mixer": mixer,
            "norm": config["norm"],
            "channel_mixer": config["channel_mixer"],
            "layer_scale": config.get("layer_scale"),
            **options,
        },
    )


def mixer_of(config: Mapping[str, Any], dim: int, grid: tuple[int, ...], stage: int = 0, **changes: Any) -> nn.Module:
    spec = config["mixer"]
    options = {**(spec[stage] if isinstance(spec, list) else spec), **changes}
    return create_mixer(options.pop("name"), dim, grid=grid, **options)


def only(prefix: str, convert: Callable[..., dict[str, Tensor]], config: Mapping[str, Any], theirs: str):
    """Converter of a single block by that of whole models: its keys under `theirs`, ours taken from `prefix`."""

    def run(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = convert({theirs + k: v for k, v in params.items()}, config)
        return {k.removeprefix(prefix): v for k, v in state.items()}

    return run


@pytest.mark.parametrize(
    ("fixture", "name"), [("mlp_mixer_block", "mixer_s16"), ("resmlp_block", "resmlp_12"), ("gmlp_block", "gmlp_ti16")]
)
def test_isotropic_block_equals_timm(fixture: str, name: str) -> None:
    golden, config = load_golden(fixture), model_config(name)
    dim, grid = golden.kwargs["dim"], (golden.kwargs["seq_len"],)
    if name == "mixer_s16":
        config["mixer"]["token_ratio"], config["channel_mixer"]["ratio"] = golden.kwargs.get("mlp_ratio", (0.5, 4.0))
    else:  # timm's default is not that of the published models
        config["mixer" if name == "gmlp_ti16" else "channel_mixer"]["ratio"] = golden.kwargs.get("mlp_ratio", 4.0)
    block = block_of(config, dim, mixer_of(config, dim, grid))
    check_golden(golden, block, only("stages.0.blocks.0.", convert_isotropic, config, "blocks.0."))


def test_mixer_model_equals_timm() -> None:
    golden, config = load_golden("mlp_mixer_model"), model_config("mixer_s16")
    kwargs = golden.kwargs
    sizes = {"dim": kwargs["embed_dim"], "depth": kwargs["num_blocks"], "num_classes": kwargs["num_classes"]}
    image = kwargs["img_size"]
    sizes |= {"patch_size": kwargs["patch_size"], "image_size": list(image) if isinstance(image, list) else image}
    config["mixer"]["token_ratio"], config["channel_mixer"]["ratio"] = kwargs.get("mlp_ratio", (0.5, 4.0))
    config = apply_overrides(config, sizes)
    check_golden(golden, build_model(config), lambda p: convert_isotropic(p, config))


# -- MS-MLP


@pytest.mark.parametrize("stage", [1, 3])
def test_msmlp_block_equals_official(stage: int) -> None:
    golden, config = load_golden(f"msmlp_block_stage{stage}"), model_config("msmlp_tiny")
    dim, kwargs = golden.kwargs["dim"], golden.kwargs
    assert kwargs["shift_size"] == len(kwargs["shift_dist"]) == len(kwargs["mix_size"])
    config["channel_mixer"]["ratio"] = kwargs.get("mlp_ratio", 4.0)
    mixer = mixer_of(config, dim, (1, 1), shift_dist=kwargs["shift_dist"], mix_size=kwargs["mix_size"])
    convert = only("stages.0.blocks.0.", convert_msmlp, config, "layers.0.blocks.0.")
    check_golden(golden, NCHW(block_of(config, dim, mixer)), lambda p: inner(convert(p)))


def test_msmlp_model_equals_official() -> None:
    golden, config = load_golden("msmlp_model"), model_config("msmlp_tiny")
    kwargs = golden.kwargs
    distances = kwargs.get("shift_dist", config["mixer"][0]["shift_dist"])
    mixers = [{**config["mixer"][0], "mix_size": sizes, "shift_dist": distances} for sizes in kwargs["mix_size"]]
    dims, patch = [kwargs["embed_dim"] * 2**i for i in range(len(kwargs["depths"]))], kwargs["patch_size"]
    changes = {"dims": dims, "depths": kwargs["depths"], "mixer": mixers, "num_classes": kwargs["num_classes"]}
    changes["stem"] = {**config["stem"], "kernel_size": patch, "stride": patch}
    changes["channel_mixer"] = {**config["channel_mixer"], "ratio": kwargs.get("mlp_ratio", 4.0)}
    config = apply_overrides(config, {**changes, "image_size": kwargs["img_size"]})
    check_golden(golden, build_model(config), lambda p: convert_msmlp(p, config))


# -- Strip-MLP


@pytest.mark.parametrize("fixture", ["stripmlp_block", "stripmlp_block_patch2", "stripmlp_token_mixing"])
def test_strip_mixer_equals_official(fixture: str) -> None:
    golden = load_golden(fixture)
    kwargs = golden.kwargs
    dim = kwargs.get("channels", kwargs.get("C"))
    whole = fixture == "stripmlp_token_mixing"
    mixer = create_mixer("strip", dim, grid=(kwargs["H"], kwargs["W"]), local=whole)
    if not whole:
        check_golden(golden, NCHW(mixer), lambda p: inner(Strip.convert_official(p)))
        return
    # the official token mixing holds the batch norm that is the block's norm here
    norm = nn.BatchNorm2d(dim)
    module = nn.Sequential(norm, NCHW(mixer))

    def ours(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bn = "dwsc.conv_merge.BN."
        state = {f"1.inner.{k}": v for k, v in Strip.convert_official(params).items()}
        return state | {f"0.{k.removeprefix(bn)}": v for k, v in params.items() if k.startswith(bn)}

    check_golden(golden, module, ours)


class Cascade(nn.Module):
    """The cascade alone, from the parts of the mixer."""

    def __init__(self, mixer: Strip) -> None:
        super().__init__()
        self.rows, self.columns, self.norm = mixer.rows, mixer.columns, mixer.norm
        self.fuse_rows, self.fuse_columns = mixer.fuse_rows, mixer.fuse_columns
        self.position_rows, self.position_columns = mixer.position_rows, mixer.position_columns
        self.run = mixer.cascade

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_cascade_group_strip_mixing_equals_official() -> None:
    golden = load_golden("stripmlp_cgsmm")
    mixer = create_mixer("strip", golden.kwargs["channels"], grid=(golden.kwargs["H"], golden.kwargs["W"]))
    mixer.eval()
    check_golden(golden, NCHW(Cascade(mixer)), lambda p: inner(Strip.convert_official(p)))


def test_strip_channel_mixing_equals_official() -> None:
    golden = load_golden("stripmlp_channel_mixing")
    prefix = "stages.0.blocks.0.channel_mixer."
    config = model_config("stripmlp_tiny")
    convert = only(prefix, convert_stripmlp, config, "blocks1.0.channel_mixing.")
    mixer = ConvMlp(golden.kwargs["in_channel"], ratio=golden.kwargs["alpha"])
    check_golden(golden, NCHW(mixer), lambda p: inner(convert(p)))


def test_strip_block_equals_official() -> None:
    golden, config = load_golden("stripmlp_basic_block"), model_config("stripmlp_tiny")
    dim, grid = golden.kwargs["in_channel"], (golden.kwargs["H"], golden.kwargs["W"])
    config["channel_mixer"]["ratio"] = golden.kwargs["alpha"]
    block = block_of(config, dim, mixer_of(config, dim, grid))
    convert = only("stages.0.blocks.0.", convert_stripmlp, config, "blocks1.0.")
    check_golden(golden, NCHW(block), lambda p: inner(convert(p)))


def test_shortcuts_of_stripmlp() -> None:
    """The second stage's input reaches the third and fourth, the third's the fourth, before anything is added."""
    torch.manual_seed(0)
    small = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "image_size": 64, "num_classes": 2}
    model = create_model("stripmlp_tiny", **small).eval()
    convs = {k: lambda t, c=c: c(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for k, c in model.shortcut.convs.items()}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, inputs = [model.embed(x)], []
        for i, stage in enumerate(model.stages):
            y = maps[-1] if i == 0 else stage.downsample(maps[-1])
            inputs.append(y)
            if i == 2:
                y = y + convs["1_2"](inputs[1])
            if i == 3:
                y = y + convs["1_3"](convs["1_2"](inputs[1])) + convs["2_3"](inputs[2])
            maps.append(model.run_blocks(stage, y))
        torch.testing.assert_close(model.forward_features(x), model.map_of(maps[-1]), rtol=1e-5, atol=1e-6)
        last, shown = model.forward_intermediates(x)
        assert len(shown) == 4
        assert torch.equal(last, model.forward_features(x))


# -- RaftMLP


def test_raft_axis_equals_official() -> None:
    golden = load_golden("raftmlp_permuted_block")
    kwargs = golden.kwargs
    rafts, length, dim = kwargs["raft_size"], kwargs["spatial_dim"], kwargs["channels"]
    block = AxisMlp(dim, length, rafts, kwargs["expansion_factor"])
    lines = golden["input"].shape[1] // (dim // rafts)

    def to_ours(x: Tensor) -> Tensor:  # (B, O S', R S) to (B, S, S', R O)
        return x.view(x.shape[0], -1, lines, rafts, length).permute(0, 4, 2, 3, 1).flatten(3)

    def to_theirs(y: Tensor) -> Tensor:
        return y.unflatten(3, (rafts, -1)).permute(0, 4, 2, 3, 1).reshape(golden["input"].shape)

    def convert(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        unit = {f"{i}.{k}": v for i in (1, 3) for k, v in params.items()} | {"raft_size": torch.tensor(rafts)}
        mixer = create_mixer("raft", dim, grid=(length, length), raft_size=rafts)
        state = type(mixer).convert_official(unit)
        return {k.removeprefix("vertical."): v for k, v in state.items() if k.startswith("vertical.")}

    forward = lambda x: block(x, None)  # noqa: E731
    check_golden(golden, block, convert, to_ours=to_ours, to_theirs=to_theirs, forward=forward)


def raft_config(golden: Golden, grid: list[int]) -> dict[str, Any]:
    kwargs = golden.kwargs
    config = model_config("raftmlp_s")
    mixer = {**config["mixer"][0], "raft_size": kwargs["raft_size"], "native_grid": grid}
    mixer["token_ratio"] = float(kwargs.get("token_expansion_factor", 2))
    depth, patch = kwargs.get("depth", 1), kwargs.get("patch_size", 4)
    changes: dict[str, Any] = {"dims": [kwargs["out_channels"]], "depths": [depth], "mixer": [mixer], "downsample": []}
    changes["channel_mixer"] = {**config["channel_mixer"], "ratio": float(kwargs.get("channel_expansion_factor", 4))}
    changes["stem"] = {"name": "multi_scale", "kernels": [patch]}
    return apply_overrides(config, {**changes, "in_chans": kwargs.get("in_channels", 3), "num_classes": 0})


def test_raft_block_equals_official() -> None:
    golden = load_golden("raftmlp_block")
    kwargs = golden.kwargs
    grid = (kwargs["ph"], kwargs["pw"])
    config = raft_config(golden, list(grid))
    block = block_of(config, kwargs["out_channels"], mixer_of(config, kwargs["out_channels"], grid))
    convert = only("stages.0.blocks.0.", layout("official RaftMLP"), config, "levels.0.fn.2.")
    check_golden(golden, block, convert, to_ours=lambda x: x.unflatten(1, grid), to_theirs=lambda y: y.flatten(1, 2))


@pytest.mark.parametrize("fixture", ["raftmlp_level", "raftmlp_level_interp"])
def test_raft_level_equals_official(fixture: str) -> None:
    """With the patch embedding; at another size than the pretrained one the maps are resized."""
    golden = load_golden(fixture)
    side = golden.kwargs["pretrained_image_size"] // golden.kwargs["patch_size"]
    config = raft_config(golden, [side, side])
    config["image_size"] = list(golden["input"].shape[2:])
    config["head"] = {"name": "linear", "norm": None, "pool": ""}
    model = build_model(config)
    convert = layout("official RaftMLP")
    check_golden(golden, model, lambda p: convert({f"levels.0.{k}": v for k, v in p.items()}, config))


def test_embedding_of_several_scales_by_its_definition() -> None:
    """One linear layer on the unfolded patches of both sizes, concatenated."""
    torch.manual_seed(0)
    model = create_model("raftmlp_s", num_classes=2)
    fc = torch.randn(64, 3 * (16 + 64))
    bias = torch.randn(64)
    config = model_config("raftmlp_s")
    state = layout("official RaftMLP")({"levels.0.fn.0.fc.weight": fc, "levels.0.fn.0.fc.bias": bias}, config)
    model.stem.load_state_dict({k.removeprefix("stem."): v for k, v in state.items()})
    x = torch.randn(2, 3, 12, 16)
    patches = [nn.functional.unfold(x, k, stride=4, padding=(k - 4) // 2).transpose(1, 2) for k in (4, 8)]
    expected = nn.functional.linear(torch.cat(patches, 2), fc, bias).view(2, 3, 4, 64)
    assert relative_error(model.stem(x.permute(0, 2, 3, 1)), expected) < 1e-5


def test_raftmlp_takes_any_image() -> None:
    """As official: parameters stay those of 224x224, also after resize_grid."""
    model = create_model("raftmlp_s", num_classes=3, image_size=[70, 45]).eval()
    x = torch.randn(1, 3, 70, 45)
    before = model(x)
    assert before.shape == (1, 3)
    resize_grid(model, (96, 64))
    assert torch.equal(model(x), before)
    assert model.stages[0].blocks[0].mixer.vertical.length == 56


# -- NiNformer


def test_ninformer_block_equals_official() -> None:
    golden, config = load_golden("ninformer_block"), model_config("ninformer_cifar")
    kwargs = golden.kwargs
    dim, width = kwargs["d_model"], kwargs["d_ffn"]
    config["channel_mixer"]["hidden"] = width
    mixer = mixer_of(config, dim, (kwargs["seq_len"],), token_hidden=width, channel_hidden=width)
    block = block_of(config, dim, mixer)
    check_golden(golden, block, only("stages.0.blocks.0.", convert_ninformer, config, "model.0."))


# -- whole models of timm

TIMM = {
    "mixer_s16": "mixer_s16_224",
    "mixer_b16": "mixer_b16_224",
    "mixer_l16": "mixer_l16_224",
    "resmlp_12": "resmlp_12_224",
    "resmlp_24": "resmlp_24_224",
    "resmlp_36": "resmlp_36_224",
    "gmlp_ti16": "gmlp_ti16_224",
    "gmlp_s16": "gmlp_s16_224",
    "gmlp_b16": "gmlp_b16_224",
}
FAST = ("mixer_s16", "resmlp_12", "gmlp_ti16")


def randomise(model: nn.Module) -> nn.Module:
    """Weights at which no path is closed: timm starts heads, scales and gates at zero or near it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 * parameter[0].numel() ** -0.5))
    return model


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TIMM])
def test_timm_model_converts(name: str, tmp_path: Path) -> None:
    theirs = randomise(timm.create_model(TIMM[name])).eval()
    path = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), str(path))
    ours = create_model(name, checkpoint=path).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(x), ours(x)
    assert expected.std() > 0.05, "the logits say nothing"
    assert (got - expected).abs().max() < 1e-4


# -- parameter counts

OFFICIAL = {
    # paper: 9.9, 21.4 and 36.2 million
    "raftmlp_s": 9_868_768,
    "raftmlp_m": 21_413_632,
    "raftmlp_l": 36_184_672,
    # paper: 28, 50 and 88 million
    "msmlp_tiny": 28_656_232,
    "msmlp_small": 50_303_752,
    "msmlp_base": 88_696_792,
    "stripmlp_tiny_light": 18_243_920,
    "stripmlp_tiny": 24_903_920,
    "stripmlp_small": 42_568_600,
    "stripmlp_base": 57_216_480,
    "ninformer_cifar": 2_652_170,
}


@pytest.mark.parametrize("name", TIMM)
def test_parameter_count_is_timms(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(TIMM[name])
    assert count(on_meta(name)) == count(theirs)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameter_count_is_official(name: str) -> None:
    assert count(on_meta(name)) == OFFICIAL[name]


# -- other resolutions

SMALL = {
    "mixer_s16": {"dim": 32, "depth": 2},
    "resmlp_12": {"dim": 32, "depth": 2},
    "gmlp_ti16": {"dim": 32, "depth": 2},
    "stripmlp_tiny": {"dims": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "image_size": 128},
    "ninformer_cifar": {"dim": 32, "depth": 2},
}


@pytest.mark.parametrize("name", SMALL)
def test_other_resolutions(name: str, tmp_path: Path) -> None:
    """On another, non-square size: refused, then resized; a checkpoint of the old size gives the same model."""
    torch.manual_seed(0)
    model = randomise(create_model(name, **SMALL[name], num_classes=3)).eval()
    old = model.config.image_size
    new = [old + 32, old - 32] if old > 32 else [48, 24]
    image = torch.randn(1, 3, *new)
    with pytest.raises(ConfigError, match="resize_grid"):
        model(image)
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    resize_grid(model, new)
    logits = model(image)
    assert logits.isfinite().all()
    again = create_model(name, **{**SMALL[name], "image_size": new}, num_classes=3, checkpoint=path).eval()
    torch.testing.assert_close(again(image), logits, rtol=1e-5, atol=1e-6)


def test_timm_checkpoint_at_another_resolution(tmp_path: Path) -> None:
    """Weights of 224x224 images, read for another size: as resized after reading."""
    theirs = randomise(timm.models.mlp_mixer.MlpMixer(num_classes=3, patch_size=16, num_blocks=2, embed_dim=32))
    path = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), str(path))
    size = {"dim": 32, "depth": 2, "num_classes": 3}
    model = create_model("mixer_s16", **size, checkpoint=path)
    x = torch.randn(1, 3, 192, 256)
    resized = resize_grid(model, (192, 256)).eval()
    direct = create_model("mixer_s16", **size, image_size=[192, 256], checkpoint=path).eval()
    assert torch.equal(direct(x), resized(x))


@pytest.mark.parametrize("name", ["mixer_s16", "gmlp_ti16", "stripmlp_tiny"])
def test_training_step_in_bfloat16(name: str) -> None:
    model = create_model(name, **{**SMALL[name], "image_size": 64}, num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 64)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["raftmlp_s", "msmlp_tiny", "stripmlp_tiny"])
def test_one_stage_compiles(name: str) -> None:
    config = model_config(name)
    mixer = config["mixer"][0] if isinstance(config["mixer"], list) else config["mixer"]
    one = {"dims": [16], "depths": [1], "mixer": mixer, "downsample": [], "image_size": 16, "num_classes": 2}
    model = create_model(name, **one).eval()
    x = torch.randn(1, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


# -- blocks


def test_blocks_refuse_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"model\.channel_mixer: .* needs a channel mixer"):
        create_model("msmlp_tiny", channel_mixer=None)
    with pytest.raises(ConfigError, match="shared_norm"):
        create_model("mixer_s16", block={"name": "metaformer", "shared_norm": True, "channel_norm": "none"})
    with pytest.raises(ConfigError, match="double"):
        create_model("stripmlp_tiny", dims=[8, 16, 32, 48], image_size=64)
    with pytest.raises(ConfigError, match="no residual"):
        create_model("raftmlp_s", mixer="attention")
    with pytest.raises(ConfigError, match="kernels"):
        create_model("raftmlp_s", stem={"name": "multi_scale", "kernels": [4, 7]})


def test_a_dropped_token_half_keeps_the_input() -> None:
    """The block of RaftMLP: where a sample skips the mixer, it goes on as it was."""
    mixer = create_mixer("raft", 8, grid=(4, 4), residual=True)
    block = BLOCKS.build("self_residual", 8, key="block", mixer=mixer, channel_mixer=None, drop_path=0.5).train()
    torch.manual_seed(0)
    x = torch.randn(64, 4, 4, 8)
    y, mixed = block(x), mixer(x)
    kept = (y == x).flatten(1).all(1)
    assert 10 < int(kept.sum()) < 54
    torch.testing.assert_close(y[~kept], (x + 2 * (mixed - x))[~kept])
    assert torch.equal(block.eval()(x), mixed)
