"""``calibrate_octav(observer="histogram")``: static clips of all batches together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering

from octav_hf import OctavConfig, apply_octav, calibrate_octav, calibrating
from tests import twins
from tests.frozen_activations import frozen_activations

from .test_activations import activations_met, token_batches

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor

HEADS = {**dict.fromkeys(("query", "key", "probabilities"), "attn_head"), "value": "channel"}


def calibrated(model: nn.Module, batches: Any, **options: Any) -> dict[str, Any]:
    return frozen_activations(calibrate_octav(model, batches, observer="histogram", progress_bar=False, **options))


def test_it_is_the_clip_of_all_values_that_an_operand_had(small_bert: MakeBert) -> None:
    config, batches = OctavConfig(activation_granularity={"value": "channel"}), token_batches()
    met = activations_met(apply_octav(small_bert(), config), batches)
    found = calibrated(apply_octav(small_bert(), config), batches)
    assert sum(map(len, found.values())) == len(met) == 13 + 2 * 4
    for (path, operand), tensors in met.items():
        clips = torch.tensor(found[path][operand]["clips"])
        signed = operand != "probabilities"
        assert found[path][operand]["signed"] is signed
        if operand == "value":  # [batch, heads, channels, tokens]
            parts = torch.cat([x.movedim(0, -1).flatten(0, 1).flatten(1) for x in tensors], dim=1)
        else:
            parts = torch.cat([x.flatten() for x in tensors])[None]
        expected = torch.tensor([twins.octav_root_twin(part, 4, signed) for part in parts])
        torch.testing.assert_close(clips.flatten(), expected, rtol=3e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["octav", "mse", "max", "percentile"])
@pytest.mark.parametrize("more", [{}, {"activation_granularity": HEADS}, {"asymmetric_activations": True}], ids=str)
def test_the_order_of_the_batches_changes_nothing(small_bert: MakeBert, clip: str, more: dict[str, Any]) -> None:
    config = OctavConfig(activation_clip=clip, **more)
    found = [
        calibrated(apply_octav(small_bert(), config), batches)
        for batches in (token_batches(), token_batches()[::-1], iter(token_batches()))
    ]
    assert found[0] == found[1] == found[2]
    mean = calibrate_octav(apply_octav(small_bert(), config), token_batches(), progress_bar=False)
    assert frozen_activations(mean) != found[0]
    asymmetric = any("offset" in frozen for operands in found[0].values() for frozen in operands.values())
    assert asymmetric is ("asymmetric_activations" in more)


GOOD = torch.arange(16).reshape(2, 8) % 8 - 3.0


def relu_net(**fields: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return apply_octav(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)), OctavConfig(**fields))


def test_batches_that_are_shuffled_anew_are_the_same_in_the_second_pass() -> None:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)[:, None]
    net = relu_net(asymmetric_activations=True)
    seen: list[Tensor] = []
    net[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generator = torch.Generator().manual_seed(0)
    found = calibrated(net, torch.utils.data.DataLoader(x, 4, shuffle=True, generator=generator))
    assert len(seen) == 6
    assert all(torch.equal(*pair) for pair in zip(seen[:3], seen[3:], strict=True))
    hidden = torch.cat(seen[:3])
    assert found["2"]["input"]["offset"] == float(hidden.min())
    clip = twins.octav_clip_twin(hidden - hidden.min(), 4, signed=False)
    assert found["2"]["input"]["clips"] == [pytest.approx(clip, rel=2e-4)]
    assert calibrated(net, [x[4:], x[:4]]) != found  # other batches have other dynamic clips


def test_an_own_loop(small_bert: MakeBert) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    with torch.inference_mode(), calibrating(model, observer="histogram"):
        for batch in token_batches():
            model(**batch)
    assert frozen_activations(model) == calibrated(apply_octav(small_bert(), OctavConfig()), token_batches())
    model.qa_outputs.input_quantizer.clips.add_(1)  # no inference tensor

    net = relu_net(asymmetric_activations=True)
    message = r'0: the histogram of .* needs two passes .*calibrate_octav\(model, batches, observer="histogram"\), or'
    with pytest.raises(ValueError, match=message), calibrating(net, observer="histogram"):
        raise AssertionError
    net = relu_net(asymmetric_activations=True, activation_clip="max")  # which needs but the range
    with calibrating(net, observer="histogram"):
        net(GOOD)
    assert frozen_activations(net)["0"]["input"] == {"signed": False, "clips": [7.0], "offset": -3.0}


@pytest.mark.parametrize(
    ("fields", "batches", "options", "message"),
    [
        (
            {"activation_clip": "mse_sweep"},
            [GOOD],
            {},
            "0 input: the clip 'mse_sw",
        ),
        ({}, [GOOD], {"observer": "median"}, 'observer must be "mean" or "histogram", got \'median\''),
        ({}, None, {"weights": True}, "observer='histogram' is for clips of activations; pass batches too"),
        ({}, [], {}, "got no batch"),
        ({"asymmetric_activations": True}, iter([]), {}, "got no batch"),
        ({}, [torch.empty(0, 8)], {}, "no activation of Sequential was quantized.*not empty"),
        ({}, [GOOD, torch.full((2, 8), torch.nan)], {}, "0 input: .*16 NaN"),
    ],
    ids=["rule", "observer", "weights", "no batch", "no batch for two passes", "empty batch", "NaN"],
)
def test_a_refused_calibration_changes_nothing(
    fields: dict[str, Any], batches: Any, options: dict[str, Any], message: str
) -> None:
    net = relu_net(**fields)
    with pytest.raises(ValueError, match=message):
        calibrate_octav(net, batches, **({"observer": "histogram", "progress_bar": False} | options))
    assert frozen_activations(net) == {}
    assert net[0].input_quantizer.observer is None
    assert not net[0].weight_quantizer.is_frozen
