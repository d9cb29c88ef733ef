"""Where the Triton kernels run in tests: on the GPU where there is one, else through Triton's interpreter."""

import os
import sys

import pytest
import torch

from tolkernels.dispatch import triton_installed

# The interpreter has to be chosen before triton is imported, so before any test is.
if triton_installed() and not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
            ],
        ),
    ],
    scope="session",
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors a test gives to the Triton kernels."""
    if not triton_installed():
        pytest.skip("triton is not installed")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("something imported triton before its interpreter could be chosen")
    return torch.device(request.param)
