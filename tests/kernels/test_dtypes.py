"""The accumulation dtype of each dtype."""

import pytest
import torch

from longctx.kernels.dtypes import accumulation_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_and_half_precision_accumulate_in_float32(dtype):
    assert accumulation_dtype(dtype) == torch.float32


def test_float64_accumulates_in_float64():
    assert accumulation_dtype(torch.float64) == torch.float64
