"""Saving a sharded model: what has been gathered of it is what is written."""

import weakref
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class SaveGathered:
    """Takes the place of a model's ``save_pretrained``, which for a quantized model does without its ``state_dict``.

    Trainer, Accelerate and DeepSpeed pass the weights of a model that they have sharded in that way.

    Args:
        model: is referred to weakly, so that nothing but its user keeps it alive.

    Attributes:
        state_dict: what the call that is running was given, for the quantizer to return; ``None`` for the model's own.
    """

    state_dict: dict[str, Tensor] | None = None

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``PreTrainedModel.save_pretrained``."""
        model = self._model()
        assert model is not None  # of which this is an attribute
        self.state_dict = state_dict
        try:
            return type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            self.state_dict = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)


def given_or_own_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict that ``save_pretrained`` was given, or the model's own.

    Raises:
        NotImplementedError: a parameter of it is sharded, and Transformers, which did not shard it, will not gather it.
    """
    save = model.save_pretrained
    given = save.state_dict if isinstance(save, SaveGathered) else None
    state = dict(model.state_dict() if given is None else given)
    for name, tensor in state.items():
        if isinstance(tensor, DTensor) and getattr(model.config, "distributed_config", None) is None:
            raise NotImplementedError(
                f"{name} of shape {tuple(tensor.shape)} is sharded. Gather the weights on every rank, state_dict = "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True, cpu_offload=True)), and then on rank 0 only: model.save_pretrained(folder, "
                "state_dict=state_dict)"
            )
    return state
