"""A matrix kept as the product of two thin factors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context on the tensor's device in which autocast does not lower the precision of products."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):  # the meta device, for one
        return nullcontext()
    return torch.autocast(device_type=device, enabled=False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rounds_float32(device: str) -> bool:
    """Whether products of float32 matrices on a kind of device may be rounded further than float32.

    To TF32 or bfloat16, as `torch.set_float32_matmul_precision`, its relatives and trainers' `tf32` allow.
    What is compiled keeps what was set when it was compiled.
    """
    backends: Any = torch.backends
    own = {
        "cpu": [backends.mkldnn.matmul, backends.mkldnn],
        "xpu": [backends.mkldnn.matmul, backends.mkldnn],
        "cuda": [backends.cuda.matmul, backends.cudnn],
    }.get(device)
    if own is None:
        return False
    if hasattr(own[0], "fp32_precision"):  # each asks the next one where it has no setting
        settings = [getattr(backend, "fp32_precision", "none") for backend in (*own, backends)]
        return next((s for s in settings if s != "none"), "ieee") in ("tf32", "bf16")
    if device == "cuda":  # torch before 2.9
        return bool(backends.cuda.matmul.allow_tf32)
    return torch.get_float32_matmul_precision() == "medium"


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """What to compute products of a float32 or float64 tensor in, for float32's precision at least.

    Its own dtype, or float64 where float32 would be rounded further: settings are of the whole process, and
    not ours to change for a while.
    """
    if tensor.dtype == torch.float32 and _rounds_float32(tensor.device.type):
        return torch.float64
    return tensor.dtype


def plain_operations_only() -> bool:
    """Whether whoever looks into computations now needs PyTorch's own operations, as they are.

    torch.compile and export, torch.func's transforms, forward-mode differentiation and torch.jit.trace: what
    is written for speed (autograd functions, changes in place) has to stay away from them.
    """
    compiling: bool = torch.compiler.is_compiling()
    return (
        compiling
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


class ThinSVD(NamedTuple):
    """u (..., m, k), sigma (..., k) in descending order, v (..., n, k)."""

    u: Tensor
    sigma: Tensor
    v: Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix left @ right, of rank at most k.

    Attributes:
        left: (..., m, k).
        right: (..., k, n).
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if len(left) < 2 or len(right) < 2 or left[-1] != right[-2] or left[:-2] != right[:-2]:
            raise ValueError(
                "left and right must be (..., m, k) and (..., k, n) with the same k and leading axes, "
                f"got left.shape={left} and right.shape={right}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., m, n)."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """k, the number of columns of `left`; the rank of the matrix is at most this."""
        return self.left.shape[-1]

    def dense(self) -> Tensor:
        """(..., m, n), in the precision of the factors, also under autocast."""
        with full_precision(self.left):
            dtype = precise_dtype(self.left)
            return (self.left.to(dtype) @ self.right.to(dtype)).to(self.left.dtype)

    def apply(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m) through the two thin products, in the dtype of x.

        Factors are cast to the dtype of x, so that a half-precision model pays half-precision
        products. Only for factors without leading axes.
        """
        left, right = self.balanced_for(x.dtype)
        return torch.nn.functional.linear(torch.nn.functional.linear(x, right), left)

    def balanced_for(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """left and right in `dtype`, with the same product.

        Their size is shared between both sides where one of them alone could be subnormal.
        """
        left, right = self.left, self.right
        if dtype == torch.float16:
            size = left.detach().abs().amax((-2, -1), keepdim=True).sqrt()
            size = torch.where(size > 0, size, 1.0)
            left, right = left / size, right * size
        return left.to(dtype), right.to(dtype)

    def svd(self) -> ThinSVD:
        """Singular value decomposition through two thin QRs and one small SVD.

        The (m, n) product is never formed; u and v have orthonormal columns also where the matrix
        has a lower rank. k here is min(rank, m, n). Source: MATH.md §5.
        """
        with full_precision(self.left):
            dtype, own = precise_dtype(self.left), self.left.dtype
            q_left, r_left = torch.linalg.qr(self.left.to(dtype))
            q_right, r_right = torch.linalg.qr(self.right.mT.to(dtype))
            u, sigma, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
            return ThinSVD((q_left @ u).to(own), sigma.to(own), (q_right @ vh.mT).to(own))

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """(..., min(rank, m, n)) in descending order, measured in float64 on the CPU.

        Not finite where a factor is not: NaN is never measured as a number.
        """
        left, right = (factor.detach().cpu().double() for factor in (self.left, self.right))
        finite = left.isfinite().all(-1).all(-1) & right.isfinite().all(-1).all(-1)
        safe = LowRank(
            torch.where(finite[..., None, None], left, 0.0),
            torch.where(finite[..., None, None], right, 0.0),
        )
        return torch.where(finite[..., None], safe.svd().sigma, torch.nan)

    @staticmethod
    def from_dense(matrix: Tensor) -> LowRank:
        """Exact factors of a dense (..., m, n) matrix, of rank min(m, n)."""
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        return LowRank(u * sigma[..., None, :], vh)
