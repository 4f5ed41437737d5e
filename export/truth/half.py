"""Networks of plain torch in half precision, as a half build has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# A CPU has no quick half kernels for these. In float32, rounded afterwards, the result is that of the slow kernels.
SLOW = frozenset({"convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"})


def narrow(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module weights in `dtype`; its inputs and outputs stay float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (_cast(args, torch.float32, dtype), _cast(kwargs, torch.float32, dtype)),
        with_kwargs=True,
    )
    module.register_forward_hook(lambda _, args, output: _cast(output, dtype, torch.float32))


@contextmanager
def quick_half() -> Iterator[None]:
    """A context in which half precision on a CPU takes seconds and not minutes."""
    with _QuickHalf():  # type: ignore[no-untyped-call]
        yield


def _cast(values: Any, of: torch.dtype, to: torch.dtype) -> Any:
    if type(values) is dict:  # time_ids stay float32: half precision does not hold every picture size
        return {name: value if name == "time_ids" else _cast(value, of, to) for name, value in values.items()}
    return tree_map(lambda value: value.to(to) if isinstance(value, Tensor) and value.dtype == of else value, values)


class _QuickHalf(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        half = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype in (torch.half, torch.bfloat16)), None)
        if half is None or func.overloadpacket.__name__ not in SLOW:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = _cast(args, half, torch.float32), _cast(kwargs, half, torch.float32)
        return _cast(func(*wide_args, **wide_kwargs), torch.float32, half)
