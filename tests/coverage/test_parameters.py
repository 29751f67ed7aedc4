"""Parameters outside of layers: the report lists those in float, and they explain no other operands."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import transformers as hf
from torch import nn

from octav_hf import CoverageReport, FloatOperand, OctavConfig, apply_octav, check_coverage, coverage_report

from ..architectures.models import ARCHITECTURES, DECODER, Architecture, PretrainedArchitecture, causal_batch

Tensor = torch.Tensor

FOUR = {"num_experts_per_tok": 2} | DECODER
EXPERTS = {
    "Mixtral": Architecture(hf.MixtralForCausalLM, hf.MixtralConfig, FOUR | {"num_local_experts": 4}, causal_batch),
    "Qwen3-MoE": Architecture(
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        FOUR | {"num_experts": 4, "moe_intermediate_size": 16},
        causal_batch,
    ),
    "GPT-OSS": Architecture(
        hf.GptOssForCausalLM, hf.GptOssConfig, FOUR | {"num_local_experts": 4}, causal_batch, implementations=("eager",)
    ),
}
XLNET = Architecture(
    hf.XLNetForSequenceClassification,
    hf.XLNetConfig,
    {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64},
    implementations=("eager",),
)
SMALL = {name: each for name, each in ARCHITECTURES.items() if not isinstance(each, PretrainedArchitecture)}
ROUTERS = {"Mixtral": "*.gate", "Qwen3-MoE": "*.gate", "GPT-OSS": "*.router"}


def in_report(row: FloatOperand, model: nn.Module, report: CoverageReport) -> bool:
    """Whether the report lists a parameter in float that may be this operand."""
    module = model.get_submodule(row.module)
    sizes = [
        module.get_parameter(listed.operand).numel()
        for listed in report.left_in_float()
        if listed.module == row.module and listed.operand in dict(module.named_parameters())
    ]
    return any(size % math.prod(row.shape) == 0 for size in sizes)


@pytest.mark.parametrize("architecture", (SMALL | EXPERTS | {"XLNet": XLNET}).values(), ids=[*SMALL, *EXPERTS, "XLNet"])
def test_every_parameter_that_is_multiplied_is_in_the_report(architecture: Architecture) -> None:
    model = architecture.make()
    check, report = check_coverage(model, architecture.batch()), coverage_report(model)
    multiplied = [row for row in check if row.parameter]
    assert multiplied
    assert [row for row in multiplied if not in_report(row, model, report)] == []
    assert check.unexplained(report) == []


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_stay_in_float_with_a_reason_and_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "octav_hf")
    architecture = EXPERTS[name]
    model = apply_octav(architecture.make(), OctavConfig(exclude_modules=[ROUTERS[name]]))
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("octav_hf"))
    experts = {f"model.layers.{i}.mlp.experts": "gate_up_proj, down_proj" for i in (0, 1)}
    assert all(f"{module} ({parameters})" in warning for module, parameters in experts.items())
    assert f"exclude_modules={list(experts)}" in warning

    report, check = coverage_report(model), check_coverage(model, architecture.batch())
    kind = type(model.get_submodule("model.layers.0.mlp.experts")).__name__
    assert [(row.module, row.operand, row.reason) for row in report.left_in_float() if row.kind == kind] == [
        (module, operand, f"a parameter of {kind}, which is not a layer that can be quantized")
        for module, parameters in experts.items()
        for operand in parameters.split(", ")
    ]
    assert {row.module for row in check if row.parameter} >= experts.keys()
    assert check.unexplained(report) == []
    model(**architecture.batch()).loss.backward()
    assert all(model.get_submodule(module).gate_up_proj.grad.abs().sum() > 0 for module in experts)


def test_excluded_experts_need_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "octav_hf")
    model = apply_octav(EXPERTS["Mixtral"].make(), OctavConfig(exclude_modules=["*.gate", "*.experts"]))
    assert caplog.records == []
    rows = [row for row in coverage_report(model) if row.kind == "MixtralExperts"]
    assert {row.reason for row in rows} == {"excluded by '*.experts'"}
    assert check_coverage(model, causal_batch()).unexplained(coverage_report(model)) == []


def test_a_routers_weight_is_refused_as_before() -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate: MixtralTopKRouter with weight of shape \(4, 32\)"):
        apply_octav(EXPERTS["Mixtral"].make())


class Mixer(nn.Module):
    """Multiplies with its own parameters under several names, and adds others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.kernel, self.A_log = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 4))
        self.cls_token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 7, 8))
        self.gate_bias, self.scale = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8))
        self.index = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
        self.factors = nn.ParameterList([torch.randn(8, 2), torch.randn(2, 8)])
        self.norm = nn.LayerNorm((7, 8))
        self.inner = Square()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), 1, 8), x], dim=1) + self.positions
        x = self.norm(self.linear(x)) @ self.kernel * self.scale + self.gate_bias.sum(0)
        return self.inner(x @ self.factors[0] @ self.factors[1] + self.A_log.exp().sum(dim=-1))


class Square(nn.Module):
    """A matmul of activations in a module that is not an attention module."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.mT


def test_parameters_are_listed_by_the_module_that_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "octav_hf")
    model = apply_octav(nn.Sequential(Mixer(), nn.Linear(7, 2)))
    rows = [row for row in coverage_report(model) if row.bits is None]
    names = ["kernel", "A_log", "cls_token", "positions", "factors.0", "factors.1"]
    assert [(row.module, row.kind, row.operand) for row in rows] == [("0", "Mixer", name) for name in names]
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "0 (kernel, A_log), 0.factors (0, 1). " in warning  # those with a dimension of size 1 are vectors, or added
    assert "exclude_modules=['0', '0.factors'] leaves" in warning

    unexplained = check_coverage(model, torch.randn(2, 6, 8)).unexplained(coverage_report(model))
    assert {row.module for row in unexplained} == {"0.inner"}  # not explained by the parameters around it


class TableAttention(nn.Module):
    """Attention that does not multiply with its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.more = nn.Parameter(torch.randn(6, 6)), nn.ParameterList([torch.randn(6, 6)])
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return (x @ x.mT + self.table + self.more[0]).softmax(-1) @ x


@pytest.mark.parametrize(("quantized", "operands"), [(True, []), (False, ["table", "more.0"])])
def test_quantized_attention_multiplies_no_parameter_of_its_own(
    quantized: bool, operands: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = apply_octav(nn.Sequential(TableAttention()), OctavConfig(quantize_attention=quantized))
    check, report = check_coverage(model, torch.randn(2, 6, 8)), coverage_report(model)
    assert [row.operand for row in report if "Table" in row.kind] == operands
    assert (check == []) is (caplog.records == []) is quantized
    assert check.unexplained(report) == []


@pytest.mark.parametrize(
    ("module", "operands"),
    [
        (nn.MultiheadAttention(8, 2), ["in_proj_weight"]),
        (nn.LSTM(8, 8), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.Bilinear(8, 8, 2), ["weight"]),
        (nn.ConvTranspose1d(8, 8, 3), ["weight"]),
        (nn.LayerNorm((4, 8)), []),
        (nn.BatchNorm2d(8), []),
        (nn.PReLU(8), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_of_torch_that_are_no_layers(module: nn.Module, operands: list[str]) -> None:
    model = nn.Sequential(module, nn.Linear(8, 8))
    kind = type(module).__name__
    assert [row.operand for row in coverage_report(model) if row.kind == kind] == operands
    if operands:
        with pytest.raises(ValueError, match="0: .*exclude_modules"):
            apply_octav(model)
    apply_octav(model, OctavConfig(exclude_modules=["0*"]))
    reasons = {row.reason for row in coverage_report(model) if row.kind == kind}
    assert reasons == ({"excluded by '0*'"} if operands else set())


class Reader(nn.Module):
    """Multiplies by the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.out = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x + self.table) @ self.layer.weight.clone().t())


def test_the_weight_of_a_quantized_layer_that_another_module_reads_is_not_explained() -> None:
    model = apply_octav(nn.Sequential(Reader()))
    report, check = coverage_report(model), check_coverage(model, torch.randn(2, 6, 8))
    assert [row.operand for row in report if row.bits is None] == ["table"]
    rows = [(row.module, row.layer, row.parameter) for row in check.unexplained(report)]
    assert rows == [("0", "0.layer", False), ("0", "0.layer", True)]


def test_what_the_report_lists_of_a_layer_explains_its_weight_in_another_module() -> None:
    model = apply_octav(nn.Sequential(Reader()), OctavConfig(exclude_modules=["0.layer"]))
    assert check_coverage(model, torch.randn(2, 6, 8)).unexplained(coverage_report(model)) == []
