"""Running sums of a layer's inputs and importances, and the regressions that they allow: no token is kept."""

from __future__ import annotations

import torch


class Moments:
    """Of inputs x (n, C), with a 1 behind, and squared importances (n, U), in float64: float32 sums of many tokens lose
    what the regression solves for."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.count = 0
        self.inputs: torch.Tensor | None = None  # (C + 1, C + 1): sums of x x^T
        self.norms: torch.Tensor | None = None  # (C + 1, U): sums of x times the norms
        self.differences: torch.Tensor | None = None  # (C + 1, U): of x times how far a norm is from the token's mean
        self.squares = torch.zeros(units, dtype=torch.float64, device="cpu")  # of the norms
        self.ordered = torch.zeros(
            units, dtype=torch.float64, device="cpu"
        )  # of squared norms, the largest of each token first

    def add(self, x: torch.Tensor, squares: torch.Tensor) -> None:
        if x.device.type not in ("cpu", "cuda"):  # others have no float64
            x, squares = x.cpu(), squares.cpu()
        x, squares = x.double(), squares.double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        norms = squares.sqrt()
        mean = norms.mean(dim=1, keepdim=True)
        differences = norms / mean.clamp(min=torch.finfo(torch.float32).tiny) - 1
        if self.inputs is None or self.norms is None or self.differences is None:
            self.inputs = x.new_zeros(x.shape[1], x.shape[1])
            self.norms, self.differences = (x.new_zeros(x.shape[1], self.units) for _ in range(2))
        self.count += len(x)
        self.inputs += x.T @ x
        self.norms += x.T @ norms
        self.differences += x.T @ differences
        self.squares += squares.sum(0).cpu()
        self.ordered += squares.sort(dim=1, descending=True).values.sum(0).cpu()

    @property
    def finite(self) -> bool:
        """Whether all that was added was: any nan or inf stays in the sums."""
        sums = (self.inputs, self.norms, self.differences, self.squares)
        return all(bool(part.isfinite().all()) for part in sums if part is not None)

    def means(self) -> torch.Tensor:
        """Mean importance of each unit, (U,), on the CPU."""
        assert self.norms is not None  # add has been called
        return (self.norms[-1] / max(self.count, 1)).cpu()

    def marginal(self) -> list[float]:
        """What the largest, the second largest, ... unit of a token gives, as a share of the squares of all."""
        return (self.ordered / self.ordered.sum().clamp(min=1e-300)).tolist()

    def ridge(self, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(coefficients (U, C), intercept (U,)) of the norms, on the CPU. The intercept is not penalised."""
        assert self.inputs is not None and self.norms is not None  # add has been called
        solved = _solve(self.inputs, self.norms, penalty, intercept=True).cpu()
        return solved[:-1].T, solved[-1]

    def ridge_of_differences(self, penalty: float) -> torch.Tensor:
        """Coefficients (U, C) without an intercept, of how far a unit's norm is from the mean of the token's units, as
        a part of that."""
        assert self.inputs is not None and self.differences is not None  # add has been called
        return _solve(self.inputs[:-1, :-1], self.differences[:-1], penalty, intercept=False).cpu().T

    def fit(self, penalty: float) -> float:
        """Share of the norms' variance that the ridge explains, on these tokens."""
        assert self.inputs is not None and self.norms is not None  # add has been called
        solved = _solve(self.inputs, self.norms, penalty, intercept=True)
        left = self.squares - (2 * solved * self.norms - solved * (self.inputs @ solved)).sum(0).cpu()
        spread = self.squares - self.count * self.means().square()
        return float(1 - left.sum() / spread.sum().clamp(min=1e-300))


def _solve(inputs: torch.Tensor, targets: torch.Tensor, penalty: float, intercept: bool) -> torch.Tensor:
    diagonal = inputs.diagonal()[: -1 if intercept else None]
    added = torch.full_like(inputs.diagonal(), penalty * float(diagonal.mean()) + 1e-12)
    if intercept:
        added[-1] = 0
    return torch.linalg.solve(inputs + torch.diag(added), targets)
