"""The stand-in for TensorRT's runtime has only methods that the real one has."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    "name", ["Runtime", "ICudaEngine", "EngineInspector", "IRuntimeCache", "IRuntimeConfig", "IExecutionContext"]
)
def test_its_methods_are_the_real_ones(name: str) -> None:
    from tests.gpu import plans_on_the_cpu

    ours: Any = getattr(plans_on_the_cpu, name)
    real: Any = plans_on_the_cpu.REAL[name]
    for method, implementation in vars(ours).items():
        if method.startswith("_"):
            continue
        assert hasattr(real, method), f"{name}.{method}"
        if isinstance(implementation, property):
            assert isinstance(getattr(real, method), property), f"{name}.{method}"
            continue
        written = getattr(real, method).__doc__
        parameters = [p for p in implementation.__code__.co_varnames[1 : implementation.__code__.co_argcount]]
        assert all(re.search(rf"\b{parameter}\b", written) for parameter in parameters), f"{name}.{method}: {written}"
