"""Saving a model whose weights are sharded: what was gathered of them is what is written."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..sharded_weights import sharded_shape
from .model_method import ModelMethod


class SaveGathered(ModelMethod):
    """In the place of ``save_pretrained``, which drops the ``state_dict`` that it is given for a quantized model.

    Trainer and Accelerate pass the gathered weights in that way where FSDP or DeepSpeed's ZeRO-3 have sharded them.

    Attributes:
        state_dict: what the call that is running was given, for the quantizer to return; ``None`` for the model's own.
    """

    state_dict: dict[str, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``PreTrainedModel.save_pretrained``."""
        save = type(self.model).save_pretrained
        self.state_dict = inspect.signature(save).bind(self.model, *args, **kwargs).arguments.get("state_dict")
        try:
            return save(self.model, *args, **kwargs)
        finally:
            self.state_dict = None


def given_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state dict that ``save_pretrained`` was given; ``None`` if it was given none and the model's own is whole.

    Raises:
        NotImplementedError: a weight is sharded, and Transformers, which did not shard it, will not gather it.
    """
    save = model.save_pretrained
    given = save.state_dict if isinstance(save, SaveGathered) else None
    if getattr(model.config, "distributed_config", None) is None:
        for name, weight in dict(model.named_parameters()).items() if given is None else given.items():
            shape = sharded_shape(weight)
            if shape is not None:
                raise NotImplementedError(
                    f"{name} of shape {shape} is sharded, and this process has only a part of it. Trainer gathers the "
                    'weights if fsdp_config has "state_dict_type": "FULL_STATE_DICT", or DeepSpeed\'s config '
                    '"stage3_gather_16bit_weights_on_model_save": true. By hand, on every rank: state_dict = '
                    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
                    "full_state_dict=True, cpu_offload=True)), or of a DeepSpeed engine "
                    "engine._zero3_consolidated_16bit_state_dict(); then on rank 0: model.save_pretrained(folder, "
                    "state_dict=state_dict)"
                )
    return given
