"""The GPU's convolution is the convolution."""

import pytest
import torch
import torch.nn.functional as F

from fastconv import SameConv2d, _GPUConv2d


@pytest.mark.parametrize(
    "inputs, outputs, height, width, kernel",
    [
        (5, 3, 6, 7, 3),
        (40, 17, 3, 8, 5),
        (257, 264, 2, 5, 3),
        (256, 300, 4, 6, 9),  # a kernel larger than the input
    ],
)
def test_values_and_gradients_are_those_of_conv2d(inputs, outputs, height, width, kernel):
    """In float64, with few channels and with many."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    x = draw(2, inputs, height, width).requires_grad_()
    weight = draw(outputs, inputs, kernel, kernel).requires_grad_()
    found = _GPUConv2d.apply(x, weight)
    want = F.conv2d(x, weight, padding=kernel // 2)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-9)

    back = draw(2, outputs, height, width)
    found = torch.autograd.grad(found, (x, weight), back)
    want = torch.autograd.grad(want, (x, weight), back)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-9)


def test_wide_it_writes_float32_under_autocast():
    """Inputs of bfloat16, their sum in float32: nothing is rounded on the way out."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 6, 7).bfloat16()
    weight = torch.randn(17, 40, 5, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = _GPUConv2d.apply(x, weight, True)
    want = F.conv2d(x.double(), weight.double(), padding=2)
    assert found.dtype == torch.float32
    assert (found - want).norm() < 1e-5 * want.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_module_on_a_gpu_in_both_dtypes():
    """With its bias, in float64 and under autocast in bfloat16, it equals the CPU's.

    Wide, it writes float32 under autocast.
    """
    torch.manual_seed(0)
    conv = SameConv2d(260, 256, 5, padding=2).double()
    x = torch.randn(2, 260, 6, 7, dtype=torch.float64)
    want = conv(x)
    found = conv.cuda()(x.cuda())
    torch.testing.assert_close(found.cpu(), want, rtol=1e-9, atol=1e-9)

    with torch.autocast("cuda", torch.bfloat16):
        half = conv.float()(x.float().cuda())
    assert half.dtype == torch.bfloat16
    assert (half.cpu() - want).norm() < 0.01 * want.norm()

    conv.wide = True
    with torch.autocast("cuda", torch.bfloat16):
        wide = conv(x.float().cuda())
    assert wide.dtype == torch.float32
