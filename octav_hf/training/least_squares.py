"""Linear least squares from sums over rows, with memory independent of the number of rows."""

import torch
from torch import Tensor


class LeastSquares:
    """The sums that determine the squared error of a linear layer ``y ≈ W x + b`` over many rows, in float64.

    Args:
        in_features, out_features: lengths of ``x`` and ``y``.
        device: device of the sums.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self.x, self.y = zeros(in_features), zeros(out_features)
        self.xx, self.yx, self.yy = zeros(in_features, in_features), zeros(out_features, in_features), zeros()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of ``x``, ``[rows, in_features]``, and ``y``, ``[rows, out_features]``, both in float64."""
        self.rows += len(x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.xx.addmm_(x.t(), x)
        self.yx.addmm_(y.t(), x)
        self.yy += y.square().sum()

    def is_finite(self) -> bool:
        """Whether no row held NaN or Inf."""
        return bool(self.yy.isfinite()) and bool(self.xx.isfinite().all())

    def solve(self, weight: Tensor, ridge: float, has_bias: bool) -> Tensor:
        """The ``W`` that minimizes ``‖Y - X Wᵀ‖² + λ ‖W - weight‖²``, with ``λ = ridge * mean(diag(XᵀX))``.

        It is ``(YᵀX + λ weight)(XᵀX + λ I)⁻¹``. With a bias, the mean rows of ``X`` and ``Y`` are subtracted first.

        Args:
            weight: ``[out_features, in_features]``, float64.

        Returns:
            The same shape and dtype; ``weight`` itself if ``X`` (with a bias, minus its mean row) is zero.
        """
        xx, yx = self.xx, self.yx
        if has_bias:
            xx, yx = xx - self.x.outer(self.x) / self.rows, yx - self.y.outer(self.x) / self.rows
        size = xx.diagonal().mean()
        if size <= 0:
            return weight
        damped = xx + ridge * size * torch.eye(len(xx), dtype=torch.float64, device=xx.device)
        return torch.linalg.solve(damped, (yx + ridge * size * weight).t()).t()

    def best_bias(self, weight: Tensor) -> Tensor:
        """The bias with the lowest error for ``weight``: the mean of ``y - W x``."""
        return (self.y - weight @ self.x) / self.rows

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """``‖Y - X Wᵀ - b‖² / ‖Y‖²``; 0 if both are zero."""
        error = self.yy - 2 * (weight * self.yx).sum() + ((weight @ self.xx) * weight).sum()
        if bias is not None:
            error = error + self.rows * bias.square().sum() - 2 * (bias @ self.y) + 2 * (bias @ (weight @ self.x))
        return float(error.clamp(min=0) / self.yy.clamp(min=torch.finfo(torch.float64).tiny))
