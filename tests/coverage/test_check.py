"""The coverage check finds exactly the operands that run in float, independently of the modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertForQuestionAnswering

from octav_hf import FloatOperand, OctavConfig, apply_octav, check_coverage, coverage_report
from octav_hf.nn import FakeQuantize

MakeBert = Callable[..., BertForQuestionAnswering]
Tensor = torch.Tensor

SELF = "bert.encoder.layer.1.attention.self"
FLOAT = "bert.encoder.layer.0.attention.self"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_quantized_model_has_nothing_in_float(
    small_bert: MakeBert, padded_batch: dict, implementation: str, training: bool
) -> None:
    model = apply_octav(small_bert(attn_implementation=implementation), OctavConfig(weight_bits=8)).train(training)
    check = check_coverage(model, padded_batch)
    assert check == []
    assert check.matmuls == 2 * (6 + 2) + 1
    assert str(check) == "0 operands in float; 17 matmuls ran"
    assert model.training is training


def test_a_float_model_is_reported_whole(small_bert: MakeBert, padded_batch: dict) -> None:
    model = small_bert(attn_implementation="eager")
    check = check_coverage(model, padded_batch)
    assert {row.module for row in check} == {row.module for row in coverage_report(model) if row.kind != "embedding"}
    assert FloatOperand("qa_outputs", "addmm", 2, (32, 2), parameter=True) in check
    assert [row for row in check if row.module == SELF] == [
        FloatOperand(SELF, "bmm", 0, (8, 16, 8), parameter=False),
        FloatOperand(SELF, "bmm", 1, (8, 8, 16), parameter=False),
        FloatOperand(SELF, "bmm", 0, (8, 16, 16), parameter=False),
        FloatOperand(SELF, "bmm", 1, (8, 16, 8), parameter=False),
    ]
    lines = [line.split() for line in str(check).splitlines()]
    assert ["qa_outputs", "addmm", "2", "parameter", "[32,", "2]"] in lines
    assert lines[-1] == ["34", "operands", "in", "float;", "17", "matmuls", "ran"]


def test_a_fused_kernel_counts_as_float(small_bert: MakeBert, padded_batch: dict) -> None:
    model = apply_octav(small_bert(), OctavConfig(quantize_attention=False))
    check = check_coverage(model, padded_batch)
    assert {row.module for row in check} == {FLOAT, SELF}
    assert all("scaled_dot_product" in row.operation for row in check)
    assert {(row.position, row.shape) for row in check} >= {(i, (2, 4, 16, 8)) for i in range(3)}
    unexplained = check.unexplained(coverage_report(model))
    assert unexplained == []
    assert str(unexplained) == "0 operands in float and not listed as such; 15 matmuls ran"


class Broken(FakeQuantize):
    """A quantizer that does not quantize."""

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        return x + 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [nn.Identity(), Broken(4), Broken(8)], ids=["none", "4 bits", "8 bits"])
@pytest.mark.parametrize(
    ("place", "row"),
    [
        (f"{SELF}.query_quantizer", FloatOperand(SELF, "bmm", 0, (8, 16, 8), False)),
        (f"{SELF}.key_quantizer", FloatOperand(SELF, "bmm", 1, (8, 8, 16), False)),
        (f"{SELF}.probabilities_quantizer", FloatOperand(SELF, "bmm", 0, (8, 16, 16), False)),
        (f"{SELF}.value_quantizer", FloatOperand(SELF, "bmm", 1, (8, 16, 8), False)),
        (f"{SELF}.key.input_quantizer", FloatOperand(f"{SELF}.key", "addmm", 1, (32, 32), False)),
        (f"{SELF}.key.weight_quantizer", FloatOperand(f"{SELF}.key", "addmm", 2, (32, 32), True)),
    ],
    ids=["query", "key", "probabilities", "value", "input", "weight"],
)
def test_an_operand_that_no_quantizer_reaches_is_found(
    small_bert: MakeBert, padded_batch: dict, place: str, row: FloatOperand, broken: nn.Module
) -> None:
    model = apply_octav(small_bert(), OctavConfig())
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, broken)
    (found,) = check_coverage(model, padded_batch)
    assert (found.module, found.operation, found.position, found.shape) == (
        row.module, row.operation, row.position, row.shape,
    )  # fmt: skip
    assert found.parameter is (row.parameter and isinstance(broken, nn.Identity))
    if isinstance(broken, FakeQuantize):  # the report believes it
        assert check_coverage(model, padded_batch).unexplained(coverage_report(model)) == [found]


class Between(nn.Module):
    """Quantizes its input, applies a function to it, and multiplies it with a quantized weight."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.quantizer, self.weight_quantizer = FakeQuantize(4), FakeQuantize(4)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=generator()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.quantizer(x))
        return y.reshape(-1, y.shape[-1]) @ self.weight_quantizer(self.weight).to(y.dtype)[: y.shape[-1]]


def halves(upper: Tensor, lower: Tensor) -> Tensor:
    """Halves of two tensors, copied into new memory."""
    y = torch.empty(8, 8)
    y[:4].copy_(upper[:4])
    y[4:].copy_(lower[4:])
    return y


@pytest.mark.parametrize(
    "function",
    [
        lambda x: halves(x, x),
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.t().reshape(2, 4, 8).permute(1, 0, 2),
        lambda x: x[1:, None].expand(7, 3, 8).clone(),
        lambda x: torch.cat([x, x[:3]]),
        lambda x: torch.stack(x.chunk(2)),
        lambda x: x[[3, 1]],
        lambda x: x.gather(0, torch.zeros(1, 8, dtype=torch.long)),
        lambda x: x.bfloat16(),
        lambda x: F.pad(x, (0, 0, 1, 0)),
        lambda x: x.masked_fill(torch.eye(8).bool(), 0),
        lambda x: -x * 0.5 / torch.tensor(3.0),
        lambda x: x.mul_(2),
        lambda x: torch.empty(8, 8).copy_(x),
        lambda x: x.as_strided((4, 8), (4, 1)),
        *(lambda x, mode=mode: F.pad(x[None], (2, 2), mode=mode)[0, :, :8] for mode in ("reflect", "circular")),
        lambda x: F.pad(x[None, None], (2, 2, 1, 1), mode="replicate")[0, 0, :, :8],
        lambda x: torch.cat([torch.zeros(2, 8), x]),
    ],
)
def test_moving_and_scaling_leave_an_operand_quantized(function: Callable[[Tensor], Tensor]) -> None:
    check = check_coverage(Between(function), torch.randn(8, 8, generator=generator()))
    assert check == []
    assert check.matmuls == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x * x,
        lambda x: x * torch.arange(8.0),
        lambda x: x.softmax(-1),
        lambda x: torch.cat([x, x.cos()]),
        lambda x: F.pad(x, (0, 0, 1, 0), value=0.3),
        lambda x: x.masked_fill(torch.eye(8).bool(), 0.3),
        lambda x: x.add_(0.1),
        lambda x: (x[0].add_(0.1), x)[1],
        lambda x: (x.view(-1)[3:5].copy_(torch.rand(2)), x)[1],
        lambda x: torch.rand(8, 8),
        lambda x: halves(x, torch.rand(8, 8)),
        lambda x: halves(torch.rand(8, 8), x),
        lambda x: torch.add(x, 1, out=x.view(8, 8)),
    ],
)
def test_other_changes_make_an_operand_float(function: Callable[[Tensor], Tensor]) -> None:
    check = check_coverage(Between(function), torch.randn(8, 8, generator=generator()))
    assert [(row.operation, row.position) for row in check] == [("mm", 0)]


def test_memory_that_is_used_again_is_not_taken_for_quantized() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = FakeQuantize(4)

        def forward(self, x: Tensor) -> Tensor:
            for size in range(2, 40):
                y = self.quantizer(x[:size])
                y @ y.t()
                del y
                z = x[:size] * 1.5 + 1
                z @ z.t()
                del z
            return x

    check = check_coverage(Net(), torch.randn(40, 64, generator=generator()))
    assert {row.shape for row in check if row.position == 0} == {(size, 64) for size in range(2, 40)}
    assert check.matmuls == 2 * 38


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_are_counted(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 4, 4, 4, generator=generator())
    assert [(row.module, row.operation, row.position, row.parameter) for row in check_coverage(net, x)] == [
        ("0", "convolution", 0, False),
        ("0", "convolution", 1, True),
        ("2", "addmm", 1, False),
        ("2", "addmm", 2, True),
    ]


@torch.library.custom_op("octav_hf_tests::fused_product", mutates_args=())
def fused_product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "operation", "operands"),
    [
        (lambda x: fused_product(x, x), "fused_product", 2),
        (lambda x: torch.einsum("ij,kj->ik", x, x), "bmm", 2),
        (lambda x: torch.baddbmm(x[None], x[None], x[None]), "baddbmm", 2),
        (lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3), None, 3),
        (lambda x: x.mv(x[0]), "mv", 2),
        (lambda x: torch.cdist(x, x), "_euclidean_dist", 2),
        (lambda x: F.bilinear(x, x, x[None]), "_trilinear", 3),
        (lambda x: torch.complex(x, x) @ torch.complex(x, x), "mm", 2),
    ],
    ids=["other library", "einsum", "baddbmm", "attention", "mv", "cdist", "bilinear", "complex"],
)
def test_matmuls_of_activations_are_found_anywhere(
    function: Callable[[Tensor], object], operation: str | None, operands: int
) -> None:
    check = check_coverage(Calling(function), torch.randn(30, 30, generator=generator()))
    assert {row.module for row in check} == {""}
    assert operation is None or {row.operation for row in check} == {operation}
    assert len({row.position for row in check}) >= operands
    assert "(the model itself)" in str(check)


def test_only_a_sum_of_one_term_without_a_parameter_is_no_matmul() -> None:
    def matmuls(module: nn.Module) -> int:
        return check_coverage(nn.Sequential(module, nn.Linear(1, 3)), torch.ones(4, 1)).matmuls

    assert matmuls(Calling(lambda x: (x @ x.t())[:, :1])) == 1
    assert matmuls(nn.Linear(1, 1)) == 2


def test_leaves_buffers_mode_and_random_state_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_coverage(net, torch.randn(8, 4, generator=generator()))
    assert torch.equal(torch.rand(3), expected)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_leaves_no_hook_behind_when_the_model_fails() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("a fault in the model")

    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    before = [len(of_kind) for of_kind in hooks]
    with pytest.raises(RuntimeError, match="a fault in the model"):
        check_coverage(Calling(fail), torch.ones(2))
    assert [len(of_kind) for of_kind in hooks] == before


def test_inference_mode_and_compilation_hide_nothing(small_bert: MakeBert, padded_batch: dict) -> None:
    model = small_bert(num_hidden_layers=1)
    expected = len(check_coverage(model, padded_batch))
    with torch.inference_mode():
        assert len(check_coverage(model, padded_batch)) == expected
    assert len(check_coverage(torch.compile(model, backend="eager"), padded_batch)) == expected


def test_is_explained_by_the_report_operand_by_operand(small_bert: MakeBert, padded_batch: dict) -> None:
    config = OctavConfig(
        exclude_modules=["qa_outputs"],
        module_overrides={
            FLOAT: {"quantize_attention": False},
            f"{SELF}.key": {"activation_bits": None},
            f"{SELF}.value": {"weight_bits": None},
        },
    )
    model = apply_octav(small_bert(attn_implementation="eager"), config)
    check, report = check_coverage(model, padded_batch), coverage_report(model)
    assert [(row.module, row.parameter) for row in check] == [
        *[(FLOAT, False)] * 4,
        (f"{SELF}.key", False),
        (f"{SELF}.value", True),
        ("qa_outputs", False),
        ("qa_outputs", True),
    ]
    assert check.unexplained(report) == []

    model.get_submodule(f"{SELF}.key").weight_quantizer = Broken(4)
    model.get_submodule(f"{SELF}.value").input_quantizer = Broken(4)
    unexplained = check_coverage(model, padded_batch).unexplained(report)
    assert [(row.module, row.position) for row in unexplained] == [(f"{SELF}.key", 2), (f"{SELF}.value", 1)]


def test_takes_positional_arguments_too(small_bert: MakeBert, padded_batch: dict) -> None:
    model = small_bert()
    expected = check_coverage(model, padded_batch)
    assert check_coverage(model, (padded_batch["input_ids"], padded_batch["attention_mask"])) == expected
    assert {row.module for row in check_coverage(model, padded_batch["input_ids"])} == {row.module for row in expected}


@pytest.mark.parametrize(
    ("model", "batch", "error", "message"),
    [
        ("bert", {}, TypeError, "takes a model"),
        (nn.Linear(2, 2), None, TypeError, r"mapping of keyword arguments, such as \{'input_ids'.*got NoneType"),
        (nn.ReLU(), torch.ones(2), ValueError, "ReLU ran without any matmul"),
    ],
)
def test_refuses_what_it_cannot_check(model: object, batch: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_coverage(model, batch)


class Tables(nn.Module):
    """Two embeddings that share a table, which may also be used directly."""

    def __init__(self, reads_weight: bool):
        super().__init__()
        self.first, self.second = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.second.weight = self.first.weight
        self.norm, self.head, self.reads_weight = nn.LayerNorm(8), nn.Linear(8, 2), reads_weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(ids) + self.second(ids)
        return self.head(x + self.norm(self.first.weight)[ids] if self.reads_weight else x)


def test_an_embedding_table_that_is_read_past_its_quantizer_is_found() -> None:
    model = apply_octav(Tables(reads_weight=True), OctavConfig(embedding_bits=4))
    (found,) = check = check_coverage(model, torch.arange(5))
    assert found == FloatOperand("norm", "native_layer_norm", 0, (9, 8), parameter=True, layer="first")
    assert check.unexplained(coverage_report(model)) == [found]
    assert check.matmuls == 1
    assert "parameter of first" in str(check)


@pytest.mark.parametrize(("reads_weight", "bits"), [(False, 4), (True, None)])
def test_an_embedding_table_that_is_looked_up_in_or_left_in_float_is_not(reads_weight: bool, bits: int | None) -> None:
    model = apply_octav(Tables(reads_weight), OctavConfig(embedding_bits=bits))
    assert check_coverage(model, torch.arange(5)) == []
