"""A report made by hand, of the size of a BERT with six layers, whose numbers have closed forms or a fixed seed."""

import math

import torch
from torch import Tensor

from octav_hf import OctavConfig
from octav_hf.analysis.layer_bytes import LayerBytes
from octav_hf.analysis.operand_statistics import OperandStatistics
from octav_hf.analysis.output_errors import OutputError
from octav_hf.analysis.report_data import Report, Unmeasured
from octav_hf.analysis.sensitivity import KindSensitivity, ModuleSensitivity
from octav_hf.analysis.suggestions import Suggestion
from octav_hf.analysis.value_histogram import Histogram
from octav_hf.coverage.report import Operand

LAYERS = 6
HIDDEN, INTERMEDIATE = 384, 1536
BINS = 96
LINEARS = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (INTERMEDIATE, HIDDEN),
    "output.dense": (HIDDEN, INTERMEDIATE),
}


def values(operand: str, after_gelu: bool, generator: torch.Generator) -> Tensor:
    """Values distributed as those of an operand, float64 ``[8192]``."""
    x = torch.randn(8192, generator=generator, dtype=torch.float64)
    if after_gelu:
        return torch.nn.functional.gelu(1.6 * x)
    if operand == "probabilities":
        return torch.softmax(2.5 * x.view(128, 64), dim=-1).flatten()
    if operand == "weight":
        return 0.04 * x
    return x * (1 + 0.3 * torch.rand(1, generator=generator, dtype=torch.float64))


def statistics(module: str, operand: str, after_gelu: bool, generator: torch.Generator) -> OperandStatistics:
    """What a 4-bit grid that clips at three standard deviations does to such values."""
    x = values(operand, after_gelu, generator)
    signed = operand != "probabilities"
    clip = min(3 * float(x.std()), float(x.abs().max()))
    low, high = (-8, 7) if signed else (0, 15)
    step = clip / (8 if signed else 16)
    quantized = (x / step).round().clamp(low, high) * step
    sqnr = 10 * math.log10(float(x.square().sum() / (x - quantized).square().sum()))
    lowest, highest = float(x.min()), float(x.max())
    ends = max(lowest, -2.5 * clip), min(highest, 2.5 * clip)
    counts, edges = (found.tolist() for found in torch.histogram(x, BINS, range=ends))
    below, above = int((x < ends[0]).sum()), int((x > ends[1]).sum())
    edges = [lowest] * bool(below) + edges + [highest] * bool(above)
    counts = [below] * bool(below) + [int(count) for count in counts] + [above] * bool(above)
    return OperandStatistics(
        module=module,
        operand=operand,
        bits=4,
        signed=signed,
        asymmetric=False,
        elements=x.numel(),
        sqnr_db=sqnr,
        clipped_share=float(((x > clip) | (x < min(-clip * signed, 0))).double().mean()),
        zero_share=float((quantized == 0).double().mean()),
        clip=clip,
        lowest_clip=clip,
        highest_clip=clip,
        lowest=lowest,
        highest=highest,
        histogram=Histogram(tuple(edges), tuple(counts)),
        levels=tuple(number * step for number in range(low, high + 1)),
    )


def is_after_gelu(module: str) -> bool:
    return module.endswith("output.dense") and "attention" not in module


def kinds_of_operand(rename: str) -> list[KindSensitivity]:
    """Kinds of operand with made-up figures, of which each is half of the one before."""
    attention = f"{rename}.*.attention.self"
    inputs = [f"{rename}.*.{name}" for name in LINEARS][3:]
    projections = tuple(f"{attention}.{name}" for name in ("query", "key", "value"))
    named = [((inputs[2],), "input"), (projections, "input"), ((attention,), "probabilities")]
    named += [((attention,), operand) for operand in ("query", "key", "value")]
    named += [((name,), "input") for name in inputs[:2]]
    named += [((f"{rename}.*.{name}",), "weight") for name in LINEARS]
    return [
        KindSensitivity(modules, operand, 0.16 * 2.0**-number, 0.08 * (-0.5) ** number)
        for number, (modules, operand) in enumerate(named)
    ]


def example_report(layers: int = LAYERS, rename: str = "bert.encoder.layer") -> Report:
    """The report; ``rename`` begins the names of its modules."""
    generator = torch.Generator().manual_seed(0)
    operands, measured, outputs, sensitivity, sizes = [], [], [], [], []
    embeddings = "bert.embeddings.word_embeddings"
    operands.append(Operand(embeddings, "embedding", "weight", reason="embedding_bits is None"))
    sizes.append(LayerBytes(embeddings, "Embedding", None, 4 * 30522 * HIDDEN, 4 * 30522 * HIDDEN))
    for number in range(layers):
        names = {f"{rename}.{number}.{name}": shape for name, shape in LINEARS.items()}
        attention = f"{rename}.{number}.attention.self"
        kinds = dict.fromkeys(names, ("linear", ("weight", "input")))
        kinds[attention] = ("attention", ("query", "key", "probabilities", "value"))
        for module, (kind, own) in kinds.items():
            rows = [statistics(module, name, name == "input" and is_after_gelu(module), generator) for name in own]
            measured += rows
            operands += [
                Operand(module, kind, row.operand, bits=4, signed=row.signed, clip="octav", granularity="tensor")
                for row in rows
            ]
            noise = sum(10 ** (-row.sqnr_db / 10) for row in rows) * (1 + 0.1 * number)
            outputs.append(OutputError(module, kind, -10 * math.log10(noise)))
            sensitivity.append(ModuleSensitivity(module, 0.2 * noise**1.5, 0.12 * noise**1.5))
        for name, (rows_, columns) in names.items():
            size = rows_ * columns // 2 + 4 * rows_ + 4 * rows_
            sizes.append(LayerBytes(name, "linear", 4, size, 4 * (rows_ * columns + rows_)))
    code = 'OctavConfig(\n    activation_granularity={"probabilities": "token", "input": "token"},\n)'
    return Report(
        model="BertForQuestionAnswering",
        compared_with="the same model with all quantizers off",
        batches=8,
        config=OctavConfig().to_dict(),
        operands=operands,
        statistics=measured,
        functions={row.module: "GELU" for row in measured if is_after_gelu(row.module)},
        outputs=outputs,
        divergence=0.214,
        divergence_measure="KL divergence of the logits (nats)",
        kinds=kinds_of_operand(rename),
        sensitivity=sensitivity,
        suggestions=[
            Suggestion(
                "One clip per token for inputs and probabilities",
                "Tokens differ in scale by a factor of 9; one clip for all rounds most of them to few levels.",
                0.62,
                "one more reduction for each input; the clips cannot be static",
                code,
            ),
            Suggestion(
                "Asymmetric grids for the layers after GELU",
                "Half of the signed levels are below the lowest value, -0.17, and go unused.",
                0.38,
                "one more number for each output feature",
                "OctavConfig(asymmetric_activations=True)",
            ),
            Suggestion(
                "8 bits for qa_outputs",
                "The last layer has few weights, and its error is not averaged by later ones.",
                0.07,
                "384 bytes",
                'OctavConfig(module_overrides={"qa_outputs": {"weight_bits": 8, "activation_bits": 8}})',
            ),
        ],
        layers=sizes,
        unmeasured=[Unmeasured("operands", "no batch reached them", ["bert.pooler.dense weight", "qa.dense input"])],
    )
