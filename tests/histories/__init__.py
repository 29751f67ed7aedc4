"""Random histories of a model: steps that users take one after the other, and what must hold after each.

``tests/test_histories.py`` runs some; ``python -m tests.histories --count 5000`` more. To run one that was printed::

    from tests.histories import History, Step
    History("bert", Step("apply", weight_bits=3), Step("pack"), Step("resize", rows=43)).run()
"""

from .history import Failure, History, Step

__all__ = ["Failure", "History", "Step"]
