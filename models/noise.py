"""Noise of regularised networks: multiplicative, with a separately drawn factor for the gradient."""

import torch
from torch import Tensor


def scale_apart(x_BCHW: Tensor, forward_B111: Tensor, backward_B111: Tensor) -> Tensor:
    """forward * x, with `backward` in place of `forward` in the gradient; one of each per image, cast to x's dtype."""
    return _ScaleApart.apply(x_BCHW, forward_B111.to(x_BCHW.dtype), backward_B111.to(x_BCHW.dtype))


def uniform_per_image(x_BCHW: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """U[low, high), one number per image, (B, 1, 1, 1) float32, from the default generator of x's device."""
    return torch.rand(len(x_BCHW), 1, 1, 1, device=x_BCHW.device) * (high - low) + low


class _ScaleApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW: Tensor, forward_B111: Tensor, backward_B111: Tensor) -> Tensor:
        ctx.save_for_backward(backward_B111)
        return forward_B111 * x_BCHW

    @staticmethod
    def backward(ctx, gradient_BCHW: Tensor) -> tuple[Tensor, None, None]:
        (backward_B111,) = ctx.saved_tensors
        return backward_B111 * gradient_BCHW, None, None
