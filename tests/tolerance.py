"""How far a result may be from the float64 oracle. Nothing here is tuned: every term is counted.

A backend's result ``x`` of a dtype with unit roundoff ``u`` must satisfy, element by element,

    |x - oracle|  <=  FACTOR * max|reference - oracle|  +  ROUNDINGS * u * magnitude

- The first term is the reference backend's own error on the same inputs in the same dtype, which may not exceed the
  worst case of float32 arithmetic with one rounding of the result (``_worst_case``): otherwise a bug that the
  reference shares would widen the budget that should catch it. The term carries what every
  implementation must suffer: float32 scores (for 16-bit inputs), float32 sums, one rounding of the result. Another
  implementation sums in another order. Both errors are draws from one distribution, and the largest of thousands of
  draws varies by far less than ``FACTOR`` = 2.
- The second is the roundings to the dtype that kernels make where the reference keeps its wider type. ``magnitude``
  is the oracle's sum of absolute values, so that rounding every term of the sum once moves it by at most
  ``u * magnitude``. Forward: the weights are rounded before they meet ``v``, the partial result of each pass is
  rounded, the merged one is rounded: 3. ``dv`` likewise: 3. ``dq`` and ``dk``: the saved output behind
  ``sum(dout * out)``, the gradient of the scores, each partial result, the end result: 4.
- float32 needs one term more, because there the kernels' scores are no wider than their result: rounding the terms
  of a score by ``u`` moves it by ``u * scale * |q| . |k|``, its exponential by as much in relative terms and ``u``:
  ``1 + max(scale * |q| . |k|)`` more roundings of the weights, which enter ``dq`` and ``dk`` twice (in ``dweights``
  and in ``sum(dout * out)``).
- In float64 the oracle itself has such errors. There the budget is ``FLOAT64_EPS`` = 300 eps of the magnitude and no
  first term: two sums of some hundred terms, each within ``n * u``.

Comparisons of a backend with itself on the same data in another arrangement (packed or separate, chunked or at once)
use the sum of the two budgets, which is what ``check_pair`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle import Attention, unit_roundoff

FACTOR = 2.0
ROUNDINGS = {"out": 3, "dq": 4, "dk": 4, "dv": 3}
FLOAT64_EPS = 300
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Result:
    """Output of one call and, where a backward ran, its gradients."""

    out: Tensor
    gradients: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.out, *self.gradients)


def exact(oracle: Attention, *, gradients: bool) -> Result:
    return Result(oracle.out.detach(), oracle.gradients if gradients else ())


def budgets(oracle: Attention, reference: Result) -> list[Tensor]:
    """Allowed distance from the oracle of each tensor of a result like ``reference``, element by element."""
    dtype = reference.out.dtype
    u = unit_roundoff(dtype)
    truth = exact(oracle, gradients=bool(reference.gradients)).tensors
    allowed = []
    for name, value, want, magnitude in zip(NAMES, reference.tensors, truth, oracle.magnitudes, strict=False):
        if dtype == torch.float64:
            allowed.append(FLOAT64_EPS * 2 * u * magnitude)
            continue
        roundings = float(ROUNDINGS[name])
        if dtype == torch.float32:
            roundings += (1 if name in ("out", "dv") else 2) * (1 + oracle.score_magnitude)
        rounded = u * want.abs().clamp(min=torch.finfo(dtype).smallest_normal)  # subnormals round by a fixed amount
        worst = _worst_case(oracle, magnitude) + rounded
        _compare(f"reference {name}", value, want, worst)
        own = (value.cpu().double() - want).abs().max() if value.numel() else torch.tensor(0.0)
        allowed.append(FACTOR * own + roundings * u * magnitude)
    return allowed


def _worst_case(oracle: Attention, magnitude: Tensor) -> Tensor:
    """What float32 may lose if every rounding is the worst one, before the result is rounded to its dtype.

    Scores are sums of D products, and an error of one is a relative error of its weight; weights are normalized by
    and summed over the S keys; gradients go through the weights twice and through as many sums again. Weights below
    the smallest normal number vanish.
    """
    length, dim = oracle.mask.shape[-1], oracle.q.shape[-1]
    roundings = 4 * (length + dim) + 2 * (dim + 2) * (1 + oracle.score_magnitude)
    vanished = length * torch.finfo(torch.float32).smallest_normal
    return roundings * unit_roundoff(torch.float32) * magnitude + vanished * (1 + magnitude.abs().amax())


def check(result: Result, oracle: Attention, reference: Result, what: str = "") -> None:
    """Fails with the worst element where a result is further from the oracle than its budget."""
    wants = exact(oracle, gradients=bool(result.gradients)).tensors
    for name, got, want, allowed in zip(NAMES, result.tensors, wants, budgets(oracle, reference), strict=False):
        _compare(f"{what} {name}", got, want, allowed)


def check_pair(name: str, got: Tensor, want: Tensor, oracle: Attention, reference: Result) -> None:
    """Two arrangements of one computation: each may be off by the budget."""
    _compare(name, got, want.cpu().double(), 2 * budgets(oracle, reference)[NAMES.index(name)])


def _compare(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, want {list(want.shape)}"
    error = (got.detach().cpu().double() - want).abs()
    bad = ~(error <= allowed)  # NaN is bad
    if bad.any():
        at = int(torch.where(error.isnan(), float("inf"), error - allowed).argmax())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements off; worst at {at}: "
            f"error {error.flatten()[at]:.3g}, allowed {allowed.flatten()[at]:.3g}"
        )
