"""Every test trains in this process, and accelerate keeps one state per process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """So that each chooses its own precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
