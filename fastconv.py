"""The faster convolution of a GPU: one function wide, opaque inside, held against conv2d by a test.

`SameConv2d` is `nn.Conv2d` to everybody who uses it. Nothing here changes what is computed, only
the kernels that compute it: over the papers' generator they are 2.7 times as fast (H100, cuDNN 9).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below so many pairs of channels cuDNN's own gradient of a kernel is faster (measured).
MANY = 256 * 256


class SameConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the size. On a GPU it goes through `_GPUConv2d`.

    Attributes: wide: write float32 even where autocast computes in bfloat16.
    """

    wide = False

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            if not self.wide or x.is_meta:  # shapes alone have no autocast
                return super().forward(x)
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float())
        # Autocast does not cast what enters a Function of our own.
        dtype = x.dtype
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        y = _GPUConv2d.apply(x.to(dtype), self.weight.to(dtype), self.wide)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)[:, None, None]


class _GPUConv2d(torch.autograd.Function):
    """A size-keeping convolution whose two passes are both transposed convolutions.

    For those, with channels last, cuDNN has the better kernels at 9 x 9. A convolution is the
    transposed one of the flipped kernel. Its gradient to the input is a transposed one anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        flipped = weight.flip(2, 3)
        if wide:  # cuDNN multiplies in TF32, which holds every bfloat16, and adds in float32
            x = x.float()
            flipped = flipped.float()
        # it would cast what the Function calls, and what that returns
        with torch.autocast(x.device.type, enabled=False):
            return _conv_transpose(x, flipped.transpose(0, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _conv_transpose(grad, weight)

        outputs, inputs, kernel, _ = weight.shape
        if outputs * inputs >= MANY:
            # cuDNN runs this one at 28 TFLOP/s.
            return to_x, kernel_gradient(x, grad, kernel), None
        half = kernel // 2
        return to_x, nn.grad.conv2d_weight(x, weight.shape, grad, padding=half), None


def _conv_transpose(x: Tensor, weight: Tensor) -> Tensor:
    """Size-keeping transposed convolution: (B, C, H, W) and (C, C', k, k) -> (B, C', H, W)."""
    inputs, outputs, kernel, _ = weight.shape
    # cuDNN's fast kernels want whole groups of channels: zeros fill up the last group.
    more_in = _missing(inputs)
    more_out = _missing(outputs)
    x = F.pad(x, (0, 0, 0, 0, 0, more_in))
    weight = F.pad(weight, (0, 0, 0, 0, 0, more_out, 0, more_in))
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = F.conv_transpose2d(x, weight, padding=kernel // 2)
    return y[:, :outputs]


def _missing(channels: int) -> int:
    """To the next multiple of 64, or of 16 where channels are few."""
    group = 64 if channels > 32 else 16
    return -channels % group


def kernel_gradient(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """(C', C, k, k) gradient of a size-keeping convolution's weight, by matrix products.

    Of the kernel's row i and column j it is the sum over positions p of the output's gradient at p
    times the input at p shifted by (i, j). One batched product makes a row's k columns.

    Args: x: (B, C, H, W) inputs, grad: (B, C', H, W) gradients of the outputs, both channels last.
    """
    batch, inputs, height, width = x.shape
    outputs = grad.shape[1]
    half = kernel // 2
    x = x.permute(0, 2, 3, 1)
    grad = grad.permute(0, 2, 3, 1)
    # Rows of whole 16 bytes make the products three times as fast: channels to a multiple of 8.
    # The border of zeros is the convolution's padding.
    x = F.pad(x, (0, -inputs % 8, half, half, half, half))
    # Gradients get the border too, all of it on the right. They are zero there, so it does no harm
    # that a shifted position runs over the end of its line.
    grad = F.pad(grad, (0, -outputs % 8, 0, 2 * half))
    left = grad.flatten(0, 2).t()

    # All lines of the batch in one, one row of `channels` numbers per position.
    positions = left.shape[1]
    channels = x.shape[-1]
    lines = x.new_zeros(positions + 2 * half, channels)
    # The input one column further is the same memory one row further: k overlapping views of it
    # take the place of k copies.
    shifted = lines.as_strided((kernel, positions, channels), (channels, channels, 1))
    target = lines[:positions].view(batch, height, width + 2 * half, channels)
    rows = []
    for i in range(kernel):
        target.copy_(x[:, i : i + height])
        row = torch.bmm(left.expand(kernel, -1, -1), shifted)
        rows.append(row[:, :outputs, :inputs])
    return torch.stack(rows).permute(2, 3, 0, 1)
