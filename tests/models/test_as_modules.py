"""Models behave as PyTorch's modules do, one of each family: hooks, adapters, transforms, tracing, quantisation.

That every registered mixer does is part of the contract; here are whole models, small, with the right values.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from mixerzoo import create_model, init_weights
from mixerzoo.models import build_model, model_config
from mixerzoo.models.interop.huggingface import MixerZooForCausalLM
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models.feature_extraction import create_feature_extractor

VISION = [
    "poolformer_s12",
    "poolformerv2_s12",
    "identityformer_s12",
    "randformer_s12",
    "convformer_s18",
    "caformer_s18",
    "vit_tiny_patch16",
    "mixer_s16",
    "resmlp_12",
    "gmlp_ti16",
    "raftmlp_s",
    "msmlp_tiny",
    "stripmlp_tiny_light",
    "gfnet_ti",
    "afno_b16",
    "affnet_tiny",
    "sparsifiner_deit_small",
    "vmamba_tiny",
    "vim_tiny",
    "vim2_tiny",
    "ninformer_cifar",
]
LANGUAGE = ["transformer_tiny", "gla_tiny", "deltanet_tiny", "mamba_tiny", "hyena_tiny"]


@functools.cache
def _small(name: str) -> nn.Module:
    config: dict[str, Any] = dict(model_config(name))
    config |= {"num_classes": 5, "image_size": 32, "drop_path": 0.0, "init_std": None}
    if "dims" in config:
        config |= {"depths": [1] * len(config["depths"]), "dims": [16 * 2**i for i in range(len(config["dims"]))]}
    else:
        config |= {"depth": 2, "dim": 16, "patch_size": 8}
    torch.manual_seed(0)
    return build_model(config).eval()


def small(name: str) -> Any:
    """A narrow and shallow model of the family, in evaluation mode."""
    return copy.deepcopy(_small(name))


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules without others inside; lists of parameters are none."""
    return {n: m for n, m in model.named_modules() if not any(m.children()) and not isinstance(m, nn.ParameterList)}


@pytest.mark.parametrize("name", VISION)
def test_hooks_fire_on_every_layer(name: str) -> None:
    model, forward, backward = small(name).train(), set(), set()
    for key, layer in layers(model).items():
        layer.register_forward_hook(lambda *_, key=key: forward.add(key))
        layer.register_full_backward_hook(lambda *_, key=key: backward.add(key))
    model(images()).square().sum().backward()
    assert forward == set(layers(model))
    # the choice of keys has no gradient, and a loss of its own trains what makes it
    assert backward == {k for k in forward if "predictor" not in k} | {k for k in backward if "predictor" in k}


@pytest.mark.parametrize("name", VISION)
def test_gradient_penalty(name: str) -> None:
    """The derivative of the squared gradient, along a direction of all parameters, against differences of it.

    Differences meet the kinks of ReLUs at some steps, and the float32 of scans at the smallest: one step must agree.
    """
    model, x = small(name).double(), images(2, torch.float64)
    torch.manual_seed(2)
    direction = {k: torch.randn_like(p) for k, p in model.named_parameters() if p.requires_grad}

    def penalty() -> Tensor:
        given = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
        return grad.square().sum()

    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}

    def moved(step: float) -> float:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in direction:
                    parameter.copy_(start[key] + step * direction[key])
        return float(penalty().detach())

    penalty().backward()
    ours = sum(float((p.grad * direction[k]).sum()) for k, p in model.named_parameters() if p.grad is not None)
    theirs = [(moved(step) - moved(-step)) / (2 * step) for step in (1e-5, 1e-6, 1e-7)]
    assert any(ours == pytest.approx(value, rel=1e-4, abs=1e-6) for value in theirs), (ours, theirs)


@pytest.mark.parametrize("name", VISION)
def test_functional_transforms(name: str) -> None:
    model, x = small(name).double(), images(2, torch.float64)
    given = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(given)
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        each = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(each, model(x), rtol=1e-8, atol=1e-10)
    tangent, step = torch.randn_like(x), 1e-6
    ours = torch.func.jvp(model, (x,), (tangent,))[1].detach()
    with torch.no_grad():
        theirs = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [*VISION, *LANGUAGE])
def test_gradients_of_each_sample(name: str) -> None:
    """`vmap(grad)` over samples is a loop over them."""
    if name in LANGUAGE:
        torch.manual_seed(0)
        model: Any = create_model(name, depth=1, dim=16, vocab_size=11).double().eval()
        x = torch.randint(0, 11, (2, 5))
    else:
        model, x = small(name).double(), images(2, torch.float64)
    given = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(each[key][i], parameter.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", VISION)
def test_traced(name: str) -> None:
    model, x = small(name), images()
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, which is what tracing is
        traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    maps: Any = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    found = create_feature_extractor(model, ["stages.1"])(x)["stages.1"]
    wanted = maps[1]
    if found.ndim == 3:  # with a class token, which is no part of the map
        at = model.token_index(found.shape[1] - 1)
        found = torch.cat([found[:, :at], found[:, at + 1 :]], 1).view(wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VISION)
def test_copies_formats_and_reparametrised_weights(name: str) -> None:
    model, x = small(name), images()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    moved = small(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(moved(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)

    class Negative(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    negated = small(name)
    for layer in negated.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            with torch.no_grad():
                layer.weight.neg_()
            parametrize.register_parametrization(layer, "weight", Negative())
    torch.testing.assert_close(negated(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", VISION)
def test_quantised(name: str) -> None:
    model, x = small(name), images()
    kinds = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    changed = [type(m) for m in quantised.modules() if type(m) is torch.ao.nn.quantized.dynamic.Linear]
    assert len(changed) == kinds.count(nn.Linear) > 0
    error = (quantised(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.2


@pytest.mark.parametrize("name", [*VISION, *LANGUAGE])
def test_quantised_by_torchao(name: str) -> None:
    """Weights of all linear layers in 8 bits, one scale for each row: every layer is used through its own weight."""
    torchao = pytest.importorskip("torchao.quantization")

    def wanted(layer: nn.Module, _: str = "") -> bool:
        return isinstance(layer, nn.Linear) and layer.in_features > 1  # torchao knows no rows of one number

    if name in LANGUAGE:
        torch.manual_seed(0)
        model, x = create_model(name, depth=2, dim=32).eval(), torch.arange(24).view(2, 12)
    else:
        model, x = small(name), images()
    with torch.no_grad():
        expected = model(x)
        count = sum(map(wanted, model.modules()))
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=wanted)
        found = model(x)
    weights: list[Any] = [m.weight for m in model.modules() if wanted(m)]
    assert len(weights) == count > 0
    assert all(type(weight.data) is not Tensor for weight in weights)
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("name", VISION)
def test_adapters_train_and_merge(name: str) -> None:
    model, x = small(name), images()
    linear = [k for k, m in model.named_modules() if type(m) is nn.Linear and "predictor" not in k]
    wrapped = get_peft_model(model, LoraConfig(target_modules=linear, r=2, lora_alpha=2))
    _train(wrapped, lambda: wrapped(x).square().mean(), len(linear))
    wrapped.eval()
    adapted = wrapped(x)
    torch.testing.assert_close(wrapped.merge_and_unload()(x), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, small(name)(x), rtol=1e-3, atol=1e-4)


def _train(model: nn.Module, loss: Any, adapters: int) -> None:
    """One step, after which every B of an adapter differs from the zeros that it starts with."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss().backward()
    optimizer.step()
    moved = [k for k, p in model.named_parameters() if "lora_B" in k and bool((p != 0).any())]
    assert len(moved) == adapters > 0


def test_adapters_of_poolformer_by_the_names_of_its_layers() -> None:
    model = create_model("poolformer_s12", num_classes=5)
    config = LoraConfig(target_modules=["fc1", "fc2"], modules_to_save=["head.fc"])
    wrapped, before = get_peft_model(model, config), model.head.fc.weight.detach().clone()
    _train(wrapped, lambda: wrapped(images()).square().mean(), 24)
    assert not torch.equal(wrapped.base_model.model.head.fc.weight, before)


@pytest.mark.parametrize("name", LANGUAGE)
def test_adapters_of_all_linear_layers_of_language_models(name: str) -> None:
    torch.manual_seed(0)
    model = MixerZooForCausalLM.from_name(name, depth=2).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    count = sum(isinstance(m, nn.Linear) for m in model.model.blocks.modules())
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    _train(wrapped, lambda: wrapped(input_ids=ids, labels=ids).loss, count)
    wrapped.eval()
    with torch.no_grad():
        logits = wrapped(input_ids=ids).logits
        merged = wrapped.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*VISION, *LANGUAGE, "fnet_tiny"])
def test_initial_values_anew(name: str) -> None:
    """From memory full of NaN, as `to_empty` may leave it, to values distributed as the constructor's are."""
    config: dict[str, Any] = dict(model_config(name))
    config |= {"depth": 1} if "depth" in config else {"depths": [1] * len(config["depths"])}
    torch.manual_seed(0)
    expected = build_model(config).state_dict()
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 77)
    again = init_weights(model).state_dict()
    assert again.keys() == expected.keys()
    for key, value in again.items():
        ours, theirs = value.double(), expected[key].double()
        assert ours.isfinite().all(), key
        count = ours.numel()
        if count >= 256:  # of fewer numbers the deviation says little
            assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=8 / math.sqrt(count), abs=1e-9), key
        elif bool((theirs == theirs.flatten()[0]).all()):
            assert torch.equal(ours, theirs), key


def test_a_tied_head_stays_tied() -> None:
    for tied in (True, False):
        model = create_model("transformer_tiny", depth=1, tie_embeddings=tied)
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            create_model("transformer_tiny", depth=1, tie_embeddings=tied),
        ):
            other.load_state_dict(model.state_dict(), assign=True)
            with torch.no_grad():
                other.embedding.weight.add_(1)
            assert (other.head.weight is other.embedding.weight) == tied
            assert torch.equal(other.head.weight, other.embedding.weight) == tied
    assert "head.weight" in model.state_dict()
    assert "head.weight" not in create_model("transformer_tiny", depth=1).state_dict()
