"""A random batch for models whose inputs are tokens or images."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LENGTH, _IMAGE_SIZE = 16, 224


def random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two sequences of tokens, the second one padded, or two images; the same in every call.

    Raises:
        ValueError: the model's main input is neither ``input_ids`` nor ``pixel_values``.
    """
    config, generator = model.config, torch.Generator(device="cpu").manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", _IMAGE_SIZE)
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        shape = 2, config.num_channels, *sizes
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, for which no random batch can be generated; call "
            "octav_hf.export.to_onnx(model, folder, example_inputs) in Python"
        )
    ids = torch.randint(config.vocab_size, (2, _LENGTH), generator=generator, dtype=torch.int64, device="cpu")
    mask = torch.ones_like(ids)
    mask[1, _LENGTH // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs
