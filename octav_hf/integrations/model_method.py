"""Standing in for a method of one model."""

import weakref
from typing import Any

from transformers import PreTrainedModel


class ModelMethod:
    """A method of a model that is an attribute of the model itself, and goes with it into its copies.

    Args:
        model: is referred to weakly, so that nothing but its user keeps it alive.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = weakref.ref(model)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        model = self._model()
        assert model is not None  # of which this is an attribute
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)
