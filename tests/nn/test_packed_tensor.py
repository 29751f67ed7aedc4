"""The weight of a packed layer reads like the dequantized tensor, and every write raises an error."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils import swap_tensors

from octav_hf import OctavConfig, apply_octav, pack_octav, unpack_octav
from octav_hf.nn import PackedWeight

ADVICE = r"1 weight: this weight of shape \(3, 8\) is packed and .*call octav_hf\.unpack_octav\(model\) first"
OTHER = torch.linspace(-1, 1, 24).reshape(3, 8)

READS: dict[str, Callable[[Any], Any]] = {
    "clone": lambda w: w.clone(),
    "data.clone": lambda w: w.data.clone(),
    "detach": lambda w: w.detach() + 0,
    "to float64": lambda w: w.to(torch.float64),
    "index": lambda w: w[1] + 0,
    "mask": lambda w: w[w > 0],
    "T @": lambda w: w.T @ torch.ones(3, 2),
    "@ T": lambda w: torch.ones(2, 8) @ w.T,
    "linear": lambda w: nn.functional.linear(torch.ones(2, 8), w),
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "==": lambda w: w == OTHER,
    "cat": lambda w: torch.cat([w, OTHER]),
    "stack": lambda w: torch.stack([w, w]),
    "zeros_like": lambda w: torch.zeros_like(w),
    "written elsewhere": lambda w: torch.zeros(3, 8).copy_(w),
    "out elsewhere": lambda w: torch.add(w, w, out=torch.zeros(3, 8)),
    "norm": lambda w: w.norm(dim=1),
    "numpy": lambda w: torch.tensor(w.numpy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "item": lambda w: torch.tensor(w[1, 2].item()),
    "rows": lambda w: torch.tensor([float(row.sum()) for row in w]),
    "vmap": lambda w: torch.vmap(torch.sum)(w),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "meta": lambda w: torch.ones(w.to("meta").shape),
}

WRITES: dict[str, Callable[[Any], Any]] = {
    "data =": lambda w: setattr(w, "data", OTHER),
    "data +=": lambda w: w.data.add_(OTHER),
    "data.copy_": lambda w: w.data.copy_(OTHER),
    "copy_": lambda w: w.copy_(OTHER),
    "row": lambda w: w.__setitem__(0, 1.0),
    "element of a row": lambda w: w[0].__setitem__(1, 1.0),
    "mask": lambda w: w.__setitem__(w > 0, 0.0),
    "each row": lambda w: [row.zero_() for row in w],
    "T": lambda w: w.T.zero_(),
    "view": lambda w: w.view(-1).zero_(),
    "reshape": lambda w: w.reshape(-1).zero_(),
    "contiguous": lambda w: w.contiguous().zero_(),
    "float": lambda w: w.float().zero_(),
    "diagonal": lambda w: w.detach().diagonal().fill_(1),
    "chunk": lambda w: w.chunk(3)[2].mul_(2),
    "out": lambda w: torch.add(OTHER, OTHER, out=w),
    "foreach": lambda w: torch._foreach_add_([OTHER.clone(), w], 1.0),
    "set_": lambda w: w.set_(OTHER),
    "resize_": lambda w: w.resize_(2, 2),
    "swap_tensors": lambda w: swap_tensors(w, OTHER.clone()),
    "apply_": lambda w: w.apply_(lambda x: 0),
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.storage(),
    "share_memory_": lambda w: w.share_memory_(),
    "dlpack": torch.from_dlpack,
    "requires_grad_": lambda w: w.requires_grad_(True),
    "requires_grad": lambda w: setattr(w, "requires_grad", True),
    "grad": lambda w: setattr(w, "grad", OTHER),
    "Parameter": nn.Parameter,
    **{
        name: getattr(nn.init, name)
        for name in ("normal_", "zeros_", "eye_", "xavier_uniform_", "kaiming_normal_", "orthogonal_", "trunc_normal_")
    },
}

REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(OTHER.clone())),
    "tensor": lambda layer: setattr(layer, "weight", OTHER),
    "None": lambda layer: setattr(layer, "weight", None),
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(OTHER.clone())),
    "del": lambda layer: delattr(layer, "weight"),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "weight_norm": weight_norm,
    "weight_norm by parametrization": parametrizations.weight_norm,
    "spectral_norm by parametrization": parametrizations.spectral_norm,
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "functional_call": lambda layer: torch.func.functional_call(layer, {"weight": OTHER}, (torch.ones(2, 8),)),
    "requires_grad_": lambda layer: layer.requires_grad_(True),
}


def cases(functions: dict[str, Callable[[Any], Any]]) -> Any:
    return pytest.mark.parametrize("function", [pytest.param(f, id=name) for name, f in functions.items()])


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return pack_octav(apply_octav(nn.Sequential(nn.ReLU(), nn.Linear(8, 3)), OctavConfig()))


@pytest.fixture
def unchanged(model: nn.Sequential) -> Iterator[None]:
    """Checks that the test has not changed the model."""

    def described() -> Any:
        values = {name: value.tolist() for name, value in model.state_dict().items()}
        return (
            values,
            str(model),
            [(name, value.requires_grad) for name, value in model.named_parameters()],
            model[1].weight.tolist(),
        )

    before = described()
    yield
    assert described() == before


@cases(READS)
def test_reading_gives_the_dequantized_values(
    model: nn.Sequential, function: Callable[[Any], Any], unchanged: None
) -> None:
    result = function(model[1].weight)
    assert type(result) is Tensor
    assert torch.equal(result, function(model[1].weight_quantizer.dequantize()))


@cases(WRITES)
def test_a_write_is_an_error(model: nn.Sequential, function: Callable[[Any], Any], unchanged: None) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=ADVICE):
        function(model[1].weight)


@cases(REPLACEMENTS)
def test_the_weight_is_not_replaced(model: nn.Sequential, function: Callable[[Any], Any], unchanged: None) -> None:
    with pytest.raises(RuntimeError, match=ADVICE):
        function(model[1])


def test_an_array_of_the_values_is_read_only(model: nn.Sequential) -> None:
    with pytest.raises(ValueError, match="read-only"):
        model[1].weight.numpy()[0] = 1


def test_what_is_known_without_the_values_costs_nothing(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedWeight, "dequantize", lambda self: pytest.fail("the weight was dequantized"))
    weight = model[1].weight
    assert (weight.shape, weight.dtype, weight.device) == ((3, 8), torch.float32, torch.device("cpu"))
    assert (weight.dim(), weight.numel(), weight.stride(), weight.requires_grad) == (2, 24, (8, 1), False)
    assert weight.detach().data.is_floating_point()
    assert isinstance(weight.requires_grad_(False), Tensor)


def test_gradients_pass_through_it_to_what_it_is_multiplied_with(model: nn.Sequential) -> None:
    x = torch.ones(2, 8, requires_grad=True)
    nn.functional.linear(x, model[1].weight).sum().backward()
    assert torch.equal(x.grad, model[1].weight_quantizer.dequantize().sum(0).expand(2, 8))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_and_a_moved_model_refuse_too(model: nn.Sequential, copied: Callable[[Any], Any]) -> None:
    for other in (copied(model), copied(model).to(torch.float64), copied(model).to("meta")):
        for function in (REPLACEMENTS["parameter"], REPLACEMENTS["requires_grad_"], REPLACEMENTS["functional_call"]):
            with pytest.raises(RuntimeError, match=ADVICE):
                function(other[1])
        for parameter in other.parameters():
            if parameter.numel() == 0:
                with pytest.raises(RuntimeError, match=ADVICE):
                    parameter.requires_grad = True


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_of_the_other_form_is_refused(model: nn.Sequential, strict: bool, unchanged: None) -> None:
    packed, other = model.state_dict(), unpack_octav(copy.deepcopy(model))
    trained = other.state_dict()
    with pytest.raises(RuntimeError, match=r"1\.weight of shape \(3, 8\).* call octav_hf\.unpack_octav\(model\)"):
        model.load_state_dict(trained, strict=strict)
    with pytest.raises(RuntimeError, match=r"1\.weight_quantizer\.packed_data .* call octav_hf\.pack_octav\(model\)"):
        other.load_state_dict(packed, strict=strict)
    model.load_state_dict({name: value.clone() for name, value in packed.items()}, assign=True)


def test_averages_of_a_packed_model_stay_packed(model: nn.Sequential) -> None:
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = [torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=function) for function in (averaging, None)]
    for average in averaged:
        for _ in range(3):
            average.update_parameters(model)
        assert torch.equal(average.module[1].weight, model[1].weight)


def test_a_model_without_values_gets_them_from_a_state_dict(model: nn.Sequential) -> None:
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty[1].weight, model[1].weight)
    assert {parameter.device.type for parameter in empty.parameters()} == {"cpu"}
    with pytest.raises(RuntimeError, match="cannot be trained"):
        empty.requires_grad_(True)
