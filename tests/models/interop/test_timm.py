"""timm's weights give timm's numbers; our models follow timm's conventions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mixerzoo import ConfigError, create_model, list_models
from mixerzoo.mixers import Mixer
from mixerzoo.models import build_model, model_config, save_model
from mixerzoo.models.create import on_meta
from mixerzoo.models.registry import apply_overrides
from mixerzoo.tasks import create_task
from safetensors.torch import save_file
from torch import nn

SMALL = ["poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18", "vit_tiny_patch16"]
LARGE = [
    *[f"{family}_{size}" for family in ("poolformer", "poolformerv2") for size in ("s24", "s36", "m36", "m48")],
    *[f"{family}_{size}" for family in ("convformer", "caformer") for size in ("s36", "m36", "b36")],
    "vit_small_patch16",
    "vit_base_patch16",
]
FAMILIES = ["poolformer", "poolformerv2", "identityformer", "randformer", "convformer", "caformer", "vit"]


def timm_name(name: str) -> str:
    return f"{name}_224" if name.startswith("vit") else name


def randomise(model: nn.Module) -> nn.Module:
    """Random weights of a size that makes every part visible: timm starts with zeros and tiny scales."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.05 * noise if parameter.ndim > 1 else 1 + 0.2 * noise)
    return model.eval()


def check_conversion(name: str, size: tuple[int, int], path: Path) -> None:
    options: dict[str, Any] = {"img_size": size} if name.startswith("vit") else {}
    theirs = randomise(timm.create_model(timm_name(name), **options))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, str(path))
    ours = create_model(name, checkpoint=path, image_size=list(size)).eval()
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = ours(x), theirs(x)
    scale = max(1.0, float(b.abs().max()) / 10)  # random weights may give large logits, in float32 nevertheless
    assert float((a - b).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(224, 224), (160, 224)], ids=["square", "wide"])
def test_timm_weights_give_timm_logits(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    check_conversion(name, size, tmp_path / "timm.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("size", [(224, 224), (160, 224)], ids=["square", "wide"])
def test_timm_weights_give_timm_logits_large(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    check_conversion(name, size, tmp_path / "timm.safetensors")


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_parameter_counts_equal_timm(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(timm_name(name))
    assert sum(p.numel() for p in on_meta(name).parameters()) == sum(p.numel() for p in theirs.parameters())


# Table 2 of MetaFormer Baselines for Vision, in millions; RandFormer's frozen matrices are counted apart there, too
PUBLISHED = {"s12": 11.9, "s24": 21.3, "s36": 30.8, "m36": 56.1, "m48": 73.3}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("family", ["identityformer", "randformer"])
def test_parameter_counts_equal_the_paper(family: str, size: str) -> None:
    model = on_meta(f"{family}_{size}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == PUBLISHED[size]


def tiny(family: str, **changes: Any) -> dict[str, Any]:
    """A small configuration of each family."""
    name = next(n for n in list_models(f"{family}_*"))
    small: dict[str, Any] = {"num_classes": 5, "image_size": 64}
    if family == "vit":
        small |= {"dim": 32, "depth": 4, "mixer": {"name": "attention", "head_dim": 8}}
    else:
        small |= {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return apply_overrides(model_config(name), {**small, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_conventions(family: str) -> None:
    model = build_model(tiny(family)).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, features)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [64 // m.shape[2] for m in maps] == [info["reduction"] for info in model.feature_info]
    torch.testing.assert_close(model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)[1], maps[1])
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape[:2] == ((2, 17) if family == "vit" else (2, 32))
    assert set(model.no_weight_decay()) <= {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = build_model(tiny(family))
    x = torch.randn(2, 3, 64, 64)
    seen = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(x).square().sum().backward()
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(seen[0]) == len(seen[1]) > 0
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["poolformer_s12", "caformer_s18", "vit_tiny_patch16"])
def test_in_timms_registry(name: str) -> None:
    model = timm.create_model(
        f"mixerzoo_{name}", num_classes=7, in_chans=1, drop_path_rate=0.1, global_pool="max"
    ).eval()
    assert model.num_classes == 7
    assert model.head.pool == "max"
    data = timm.data.resolve_data_config({}, model=model)
    assert data["input_size"] == (1, 224, 224)
    extractor = timm.create_model(f"mixerzoo_{name}", features_only=True, out_indices=(0, 2))
    maps = extractor(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == extractor.feature_info.channels()
    assert all(m.shape[2] * 3 == m.shape[3] * 2 for m in maps)
    with pytest.raises(ConfigError, match="no weights are released"):
        timm.create_model(f"mixerzoo_{name}", pretrained=True)


def test_timm_lists_our_models() -> None:
    assert "mixerzoo_caformer_s18" in timm.list_models("mixerzoo_*")


VISION = [name.removeprefix("mixerzoo_") for name in timm.list_models("mixerzoo_*")]
DATA = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@pytest.mark.parametrize("name", [n for n in VISION if timm.is_model(n) or timm.is_model(f"{n}_224")])
def test_images_are_prepared_as_timm_does(name: str) -> None:
    """Architectures that timm has, too: the same weights want the same images."""
    theirs = timm.models.get_pretrained_cfg(name if timm.is_model(name) else f"{name}_224")
    ours = timm.models.get_pretrained_cfg(f"mixerzoo_{name}")
    assert {k: getattr(ours, k) for k in DATA} == {k: getattr(theirs, k) for k in DATA}
    assert ours.input_size == theirs.input_size
    assert not ours.has_weights


def test_thirty_architectures_are_timms_too() -> None:
    assert sum(timm.is_model(n) or timm.is_model(f"{n}_224") for n in VISION) >= 30


@pytest.mark.parametrize("name", VISION)
def test_cfg_of_every_model(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"mixerzoo_{name}")
    cfg, keys = model.default_cfg, set(model.state_dict())
    config = model_config(name)
    size = config.get("image_size", 224)
    frames = () if model.config.frames is None else (model.config.frames,)
    assert cfg["input_size"] == (model.in_chans, *frames, *((size, size) if isinstance(size, int) else size))
    assert len(cfg["mean"]) == len(cfg["std"]) == model.in_chans
    assert cfg["num_classes"] == model.num_classes
    if model.num_classes and hasattr(model.head, "fc"):
        assert f"{cfg['classifier']}.weight" in keys
    first = cfg["first_conv"]
    assert isinstance(first, str) != name.startswith("raftmlp")  # which has patches of several sizes
    for layer in [first] if isinstance(first, str) else first:
        assert model.get_submodule(layer).weight.shape[1] == model.in_chans
    last = model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == tuple(-(-s // last) for s in cfg["input_size"][-2:])
    assert cfg["fixed_input_size"] == any(type(m).needs_grid for m in model.modules() if isinstance(m, Mixer))


def test_options_of_cfg_are_honoured(tmp_path: Path) -> None:
    overlay = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5, "input_size": (3, 96, 96)}
    model = timm.create_model("mixerzoo_poolformer_s12", pretrained_cfg_overlay=overlay)
    data = timm.data.resolve_data_config({}, model=model)
    assert (data["mean"], data["crop_pct"], data["input_size"]) == ((0.1, 0.2, 0.3), 0.5, (3, 96, 96))
    assert data["std"] == (0.229, 0.224, 0.225)
    grey = timm.create_model("mixerzoo_poolformer_s12", in_chans=1, num_classes=3)
    data = timm.data.resolve_data_config({}, model=grey)
    assert data["input_size"] == (1, 224, 224)
    assert data["mean"] == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    with pytest.raises(TypeError, match="not_an_option"):
        timm.create_model("mixerzoo_poolformer_s12", not_an_option=1)
    # weights of timm by timm's way of naming a file
    theirs = randomise(timm.create_model("poolformer_s12"))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = timm.create_model(
        "mixerzoo_poolformer_s12", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "timm.safetensors")}
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_models_saved_by_timm_come_back(tmp_path: Path) -> None:
    model = randomise(timm.create_model("mixerzoo_metaformer_digits", num_classes=4))
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("kind", [None, "getter", "fx"])
def test_wrappers_of_features_keep_the_cfg(kind: str | None) -> None:
    options = {} if kind is None else {"feature_cls": kind}
    model = timm.create_model("mixerzoo_caformer_s18", features_only=True, out_indices=(1, 3), **options).eval()
    assert model.default_cfg["first_conv"] == "stem.conv"
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert [m.shape[1] for m in model(torch.randn(1, 3, 64, 64))] == model.feature_info.channels() == [128, 512]
    with pytest.raises(ConfigError, match="feature_cls"):
        timm.create_model("mixerzoo_caformer_s18", features_only=True, feature_cls="list")


@pytest.mark.parametrize("family", FAMILIES)
def test_export_round_trip(family: str) -> None:
    model = build_model(tiny(family)).eval()
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["poolformer", "caformer", "randformer", "vit"])
def test_onnx_round_trip(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build_model(tiny(family)).eval()
    x = torch.randn(1, 3, 64, 64)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(file), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-3, atol=1e-4)


def test_own_checkpoint_keeps_the_order_of_its_head(tmp_path: Path) -> None:
    """A PoolFormer converted from timm pools before the norm; saved and loaded as ours it still does."""
    theirs = randomise(timm.create_model("poolformer_s12"))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "timm.pth")
    ours = create_model("poolformer_s12", checkpoint=tmp_path / "timm.pth").eval()
    save_model(ours, tmp_path / "ours.safetensors")
    again = create_model("poolformer_s12", checkpoint=tmp_path / "ours.safetensors").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(x), ours(x))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not again.head.norm_first


def test_position_table_follows_the_image_size(tmp_path: Path) -> None:
    small = create_model(tiny("vit", image_size=64))
    save_model(small, tmp_path / "m.safetensors")
    large = create_model(tiny("vit", image_size=96), checkpoint=tmp_path / "m.safetensors").eval()
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(large(x), small.eval()(x))  # the small one interpolates at run time


def test_bad_checkpoints(tmp_path: Path) -> None:
    config = tiny("poolformer")
    with pytest.raises(ConfigError, match="no file"):
        create_model(config, checkpoint=tmp_path / "none.pth")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 100)
    with pytest.raises(ConfigError, match="damaged"):
        create_model(config, checkpoint=broken)
    truncated = tmp_path / "cut.pth"
    torch.save(build_model(config).state_dict(), truncated)
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    with pytest.raises(ConfigError, match="damaged"):
        create_model(config, checkpoint=truncated)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ConfigError, match="no tensors"):
        create_model(config, checkpoint=tmp_path / "empty.pth")
    state = build_model(config).state_dict()
    state["stem.wrong"] = state.pop("stem.conv.bias")
    save_file(state, str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match=r"Missing: stem.conv.bias. Unexpected: stem.wrong") as error:
        create_model(config, checkpoint=tmp_path / "other.safetensors")
    assert "other.safetensors" in str(error.value)


def test_classifier_of_another_number_of_classes(tmp_path: Path) -> None:
    save_model(build_model(tiny("poolformer")), tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="5 classes, the model 9"):
        model = create_model(tiny("poolformer"), num_classes=9, checkpoint=tmp_path / "m.safetensors")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 9)


@pytest.mark.parametrize(("model", "task"), [("metaformer_digits", "digits"), ("metaformer_fashion", "fashion_mnist")])
def test_data_settings_are_those_of_the_images(model: str, task: str) -> None:
    """Mean and deviation of the training split, in numbers from 0 to 1."""
    images: Any = create_task(task)
    try:
        images.open()
    except ConfigError as missing:  # Fashion-MNIST is neither here nor to be downloaded
        pytest.skip(str(missing))
    counted, cfg = images.preprocessing(), timm.get_pretrained_cfg(f"mixerzoo_{model}")
    assert cfg is not None
    assert cfg.mean == pytest.approx([m / 255 for m in counted.mean], abs=5e-5)
    assert cfg.std == pytest.approx([s / 255 for s in counted.std], abs=5e-5)


@pytest.mark.parametrize("name", ["poolformer_s12", "caformer_s18", "vmamba_tiny"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride(name: str, stride: int) -> None:
    """Later stages keep the grid; the parameters are the same, and stages before are not touched."""
    small = {"depths": [1] * 4, "dims": [8, 16, 16, 24], "drop_path_rate": 0.0}
    plain = timm.create_model(f"mixerzoo_{name}", features_only=True, **small).eval()
    model = timm.create_model(f"mixerzoo_{name}", features_only=True, output_stride=stride, **small).eval()
    model.load_state_dict(plain.state_dict())
    strides = [min(s, stride) for s in (4, 8, 16, 32)]
    assert model.feature_info.reduction() == strides
    x = torch.randn(1, 3, 96, 64)
    maps, before = model(x), plain(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(96 // s, 64 // s) for s in strides]
    for m, b, s in zip(maps, before, (4, 8, 16, 32), strict=True):
        if s <= stride:
            torch.testing.assert_close(m, b)


def test_output_stride_is_refused_where_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"output_stride.*convolution of 2 with padding 0 cannot keep the grid"):
        create_model("vim2_tiny", output_stride=16)
    with pytest.raises(ConfigError, match=r"output_stride.*cannot keep the grid"):
        create_model("raftmlp_s", output_stride=16)
    with pytest.raises(ConfigError, match=r"output_stride.*12 is not reached; this model can have 4, 8"):
        create_model("poolformer_s12", output_stride=12)
    with pytest.raises(TypeError, match="output_stride"):
        timm.create_model("mixerzoo_vit_tiny_patch16", output_stride=8)
