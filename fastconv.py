"""The faster convolution of a GPU: one function wide, held against plain conv2d by a test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------- decoder


class SameConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the size. On a GPU it goes through `_GPUConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        y = _GPUConv2d.apply(x.to(dtype), self.weight.to(dtype))
        return y if self.bias is None else y + self.bias.to(dtype)[:, None, None]


class _GPUConv2d(torch.autograd.Function):
    """The same function by other kernels: 2.7 times as fast over the papers' generator on an H100 with cuDNN 9.

    Both passes are transposed convolutions, the forward one of the flipped kernel, on whole groups of channels that
    stay last: for those cuDNN has the better kernels at 9 x 9. Its gradient of a kernel of many channels (28 TFLOP/s)
    is replaced.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return _conv_transpose(x, weight.transpose(0, 1).flip(2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        to_x = _conv_transpose(grad, weight) if ctx.needs_input_grad[0] else None
        if weight.shape[0] * weight.shape[1] >= 256 * 256:  # measured: below that cuDNN's is faster
            return to_x, kernel_gradient(x, grad, weight.shape[-1])
        return to_x, nn.grad.conv2d_weight(x, weight.shape, grad, padding=weight.shape[-1] // 2)


def _conv_transpose(x: Tensor, weight: Tensor) -> Tensor:
    """Size-keeping transposed convolution with zero channels to a multiple of 64 (of 16 where they are few)."""
    extra = [-n % (64 if n > 32 else 16) for n in weight.shape[:2]]
    x, weight = (
        F.pad(x, (0, 0, 0, 0, 0, extra[0])),
        F.pad(weight, (0, 0, 0, 0, 0, extra[1], 0, extra[0])),
    )
    x, weight = (v.contiguous(memory_format=torch.channels_last) for v in (x, weight))
    return F.conv_transpose2d(x, weight, padding=weight.shape[-1] // 2)[
        :, : weight.shape[1] - extra[1]
    ]


def kernel_gradient(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """(C', C, k, k) gradient of a size-keeping convolution's weight by matrix products: (B, C, H, W) inputs and (B, C',
    H, W) output gradients, both channels last.

    Of each row of the kernel, its k columns are one batched product: with every position a row of C numbers, the input
    one column further is the same memory one row further, so nothing is copied for it. Output gradients are zero where
    a shifted row would run into the next line.
    """
    (b, c, h, w), c2, half = x.shape, grad.shape[1], kernel // 2
    # products are three times as fast on rows of whole 16 bytes
    x = F.pad(x.permute(0, 2, 3, 1), (0, -c % 8, half, half, half, half))
    grad = F.pad(grad.permute(0, 2, 3, 1), (0, -c2 % 8, 0, 2 * half)).flatten(0, 2)
    n, wide = len(grad), x.shape[-1]
    lines = x.new_zeros(n + 2 * half, wide)
    columns = lines.as_strided((kernel, n, wide), (wide, wide, 1))
    left = grad.t().expand(kernel, -1, n)
    rows = []
    for i in range(kernel):
        lines[:n].view(b, h, w + 2 * half, wide).copy_(x[:, i : i + h])
        rows.append(torch.bmm(left, columns)[:, :c2, :c])
    return torch.stack(rows).permute(2, 3, 0, 1)
