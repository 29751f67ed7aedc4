"""In training, the clips of a weight are computed once until it changes; otherwise at every call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from octav_hf.functional import CLIP_RULES, octav_clip
from octav_hf.nn import WeightFakeQuantize

Tensor = torch.Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights for which octav was called."""
    seen: list[Tensor] = []

    def counted(x: Tensor, *arguments: object, **options: object) -> Tensor:
        seen.append(x)
        return octav_clip(x, *arguments, **options)

    monkeypatch.setitem(CLIP_RULES, "octav", counted)
    return seen


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def quantizer() -> WeightFakeQuantize:
    return WeightFakeQuantize(4, dim=1)


def is_fresh(quantizer: WeightFakeQuantize, weight: Tensor) -> bool:
    """Whether the quantizer uses the clips of the current weight."""
    return torch.equal(quantizer.compute_clip(weight), octav_clip(weight, 4, dim=1))


def optimizer_step(parameter: nn.Parameter) -> None:
    """A step of a PyTorch optimizer that does not change this parameter."""
    torch.optim.SGD([nn.Parameter(torch.ones(2)), parameter], lr=0.1).step()


def test_an_unchanged_weight_is_computed_once(
    quantizer: WeightFakeQuantize, weight: nn.Parameter, calls: list[Tensor]
) -> None:
    first = quantizer(weight)
    for _ in range(3):
        y = quantizer(weight)
        assert torch.equal(y, first)
        y.sum().backward()  # gradient accumulation: each pass has its own graph
    assert len(calls) == 1


def test_each_optimizer_step_is_a_change(
    quantizer: WeightFakeQuantize, weight: nn.Parameter, calls: list[Tensor]
) -> None:
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    for step in range(1, 4):
        for _ in range(2):
            quantizer(weight).square().sum().backward()
        assert is_fresh(quantizer, weight)
        assert len(calls) == step
        optimizer.step()


def add_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 4:5].mul_(30)


def new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def new_data_twice(weight: nn.Parameter) -> None:
    """The second weight may be at the address of the first."""
    weight.data = weight.data * 2
    weight.data = weight.data * 2


def uncounted_write_by_an_optimizer(weight: nn.Parameter) -> None:
    """As in DeepSpeed and FSDP2, whose steps contain one of a PyTorch optimizer."""
    optimizer_step(weight)
    weight.data.mul_(3)


CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    "in_place": add_in_place,
    "new_data": new_data,
    "new_data_twice": new_data_twice,
    "new_dtype": lambda weight: setattr(weight, "data", weight.data.double() * 2),
    "uncounted_write_and_step": uncounted_write_by_an_optimizer,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_in_training_is_seen(
    change: Callable[[nn.Parameter], None], quantizer: WeightFakeQuantize, weight: nn.Parameter
) -> None:
    for _ in range(3):
        quantizer(weight).sum().backward()
        weight.grad = None
        change(weight)
        assert is_fresh(quantizer, weight)


def test_a_compiled_optimizer_step_is_a_change(quantizer: WeightFakeQuantize, weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.5)
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=graphs)
    for _ in range(3):
        quantizer(weight).square().sum().backward()
        before = weight.detach().clone()
        step()
        assert not torch.equal(weight, before)
        assert is_fresh(quantizer, weight)
    assert graphs.frame_count == 1


def test_an_uncounted_write_between_two_passes_of_a_step_is_missed(
    quantizer: WeightFakeQuantize, weight: nn.Parameter
) -> None:
    """The only such case, which the docstring mentions; the next step or change of mode corrects it."""
    quantizer(weight).sum().backward()
    weight.data.mul_(3)
    assert not is_fresh(quantizer, weight)
    optimizer_step(weight)
    assert is_fresh(quantizer, weight)
    weight.data.mul_(3)
    assert not is_fresh(quantizer, weight)
    quantizer.eval()
    assert is_fresh(quantizer, weight)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_merge_in_evaluation_is_seen(grad: bool, quantizer: WeightFakeQuantize, weight: nn.Parameter) -> None:
    """As when PEFT merges an adapter, in place through ``.data``."""
    quantizer(weight).sum().backward()
    quantizer.eval()
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            assert is_fresh(quantizer, weight)
            weight.data.add_(0.3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(1)))
            assert is_fresh(quantizer, weight)
    quantizer.train()
    assert is_fresh(quantizer, weight)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_averaged_weights_are_seen_for_an_evaluation(
    grad: bool, quantizer: WeightFakeQuantize, weight: nn.Parameter
) -> None:
    """Copied into the parameters and back, like an exponential moving average, in training and evaluation mode."""
    own, average = weight.detach().clone(), weight.detach() * 0.7 + 0.1
    for _ in range(2):
        quantizer(weight).sum().backward()
        weight.data.copy_(average)
        quantizer.eval()
        with torch.set_grad_enabled(grad):
            assert is_fresh(quantizer, weight)
        weight.data.copy_(own)
        quantizer.train()
        assert is_fresh(quantizer, weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_clips_are_computed_at_every_call(
    mode: Callable[[], object], quantizer: WeightFakeQuantize, weight: nn.Parameter, calls: list[Tensor]
) -> None:
    with mode():
        for count in range(1, 4):
            quantizer(weight)
            assert len(calls) == count


@pytest.mark.parametrize("change", [lambda x: x.detach(), lambda x: x * 1, lambda x: nn.Parameter(x.detach())])
def test_other_tensors_are_computed_at_every_call(
    change: Callable[[Tensor], Tensor], quantizer: WeightFakeQuantize, weight: nn.Parameter, calls: list[Tensor]
) -> None:
    """Parametrized weights, those that ``functional_call`` puts in their place, replicas on several devices."""
    for count in range(1, 4):
        quantizer(change(weight))
        assert len(calls) == count


def test_clips_of_inference_mode_are_not_kept(quantizer: WeightFakeQuantize, weight: nn.Parameter) -> None:
    with torch.inference_mode():
        quantizer(weight)
        with torch.enable_grad():
            quantizer.compute_clip(weight)
    quantizer(weight).sum().backward()  # which saves the clips
    assert weight.grad is not None


def test_a_compiled_graph_computes_them_at_every_call(quantizer: WeightFakeQuantize, weight: nn.Parameter) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quantizer, backend=graphs, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(weight), quantizer(weight.detach()))
        weight.data.mul_(3)
        optimizer_step(weight)
    assert graphs.frame_count == 1


def test_other_settings_other_shapes_and_copies(quantizer: WeightFakeQuantize, weight: nn.Parameter) -> None:
    quantizer(weight)
    for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(copied(weight), quantizer(weight))
    assert torch.equal(quantizer.compute_clip(weight[:, :20]), octav_clip(weight[:, :20], 4, dim=1))
    quantizer(weight)
    quantizer.num_bits = 8
    assert torch.equal(quantizer.compute_clip(weight), octav_clip(weight, 8, dim=1))
    quantizer.clip_options["max_iterations"] = 1
    assert torch.equal(quantizer.compute_clip(weight), octav_clip(weight, 8, dim=1, max_iterations=1))
    assert not quantizer.state_dict()


def test_what_is_pickled_does_not_depend_on_calls(quantizer: WeightFakeQuantize, weight: nn.Parameter) -> None:
    before = pickle.dumps(quantizer)
    quantizer(weight)
    assert pickle.dumps(quantizer) == before


def test_not_finite_is_refused_every_time(weight: nn.Parameter) -> None:
    quantizer = WeightFakeQuantize(4, dim=1, name="query weight")
    quantizer(weight)
    with torch.no_grad():
        weight[2, 3] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"query weight.*\(6, 40\)"):
            quantizer(weight)
