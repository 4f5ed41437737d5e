"""Is what was exported what was meant? Every network, against the torch module it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from realisid_trt.errors import ParityError

from .networks import Network
from .to_onnx import example
from .variants import Limits, Variant

# A graph is other arithmetic in another order, so it may err like the torch module, not equal it. Each output's RMS
# error against float64 may be at most this many times the torch module's own in the same precision.
WORST_RATIO = 4.0


@dataclass(frozen=True)
class Parity:
    """How far an exported network is from the truth, over all outputs and shapes tried.

    rms, max_abs: of the error against the torch module in `truth` precision, relative to each output's RMS.
    rms_torch:    the same of the torch module itself, in the network's precision.
    ratio:        the worst output's rms over its rms_torch.
    shapes:       the unit sizes that were tried.
    """

    rms: float
    max_abs: float
    rms_torch: float
    ratio: float
    truth: str
    shapes: list[dict[str, int]]


def parity_shapes(limits: Limits, small: bool) -> list[dict[str, int]]:
    """Unit sizes to try: the smallest picture, and for small networks an oblong one with several rows."""
    least = limits.side[0]
    shapes = [{"rows": 1, "timesteps": 1, "height": least, "width": least}]
    if small:
        shapes.append({"rows": 3, "timesteps": 5, "height": least + 1, "width": least + 3})
    return shapes


@torch.no_grad()
def verify(
    network: Network, module: nn.Module, path: Path, variant: Variant, limits: Limits, small: bool = True
) -> Parity:
    """The parity of the ONNX file with its module. Raises ParityError, naming the output that differs.

    module: in the variant's precision; it is converted to float64 here, so it is of no use afterwards.
    small:  the module fits into memory twice; else float32 is the truth and the graph may err WORST_RATIO float32 ulps.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shapes = parity_shapes(limits, small)
    cases: list[tuple[tuple[Tensor, ...], list[np.ndarray], list[np.ndarray]]] = []
    for units in shapes:
        inputs = example(network.inputs, units, variant.dtype, seed=1)
        feed = {tap.name: _numpy(value) for tap, value in zip(network.inputs, inputs, strict=True)}
        cases.append((inputs, session.run(None, feed), _outputs(module, inputs)))
    del session
    truth_dtype = torch.float64 if small else torch.float32
    module = module.to(truth_dtype)
    errors: list[tuple[float, float, float, float]] = []
    for inputs, graph, plain in cases:
        exact = _outputs(module, tuple(_widen(value, truth_dtype) for value in inputs))
        for tap, true, ours, theirs in zip(network.outputs, exact, graph, plain, strict=True):
            errors.append(_compare(f"{network.name} ({variant.name}) output {tap.name}", true, ours, theirs))
    rms, max_abs, rms_torch, ratio = (max(column) for column in zip(*errors, strict=True))
    return Parity(rms, max_abs, rms_torch, ratio, str(truth_dtype).removeprefix("torch."), shapes)


def _compare(what: str, true: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, float]:
    if ours.shape != true.shape:
        raise ParityError(f"{what} has shape {ours.shape}, the torch module gives {true.shape}. Report this as a bug.")
    scale = float(np.sqrt(np.mean(true**2))) or 1.0
    error, error_torch = ours - true, theirs - true
    rms, rms_torch = (float(np.sqrt(np.mean(e.astype(np.float64) ** 2))) / scale for e in (error, error_torch))
    max_abs = float(np.abs(error).max()) / scale
    # Where torch happens to be exact (a bias, a constant), one rounding of the output's precision is no error.
    floor = np.finfo(ours.dtype).eps / 4
    ratio = rms / max(rms_torch, floor)
    if not ratio <= WORST_RATIO:
        raise ParityError(
            f"{what} errs {rms:.2e} (relative RMS against {true.dtype}), {ratio:.1f} times what torch errs in the same "
            f"precision ({rms_torch:.2e}); at most {WORST_RATIO:g} times is accepted. The graph does not compute what "
            "the module computes: try another torch or onnxscript version, and report it with these figures."
        )
    return rms, max_abs, rms_torch, ratio


def flops_per_row(network: Network, module: nn.Module, units: Mapping[str, int]) -> int:
    """Floating-point operations of one row (a multiply-add is 2), counted on the meta device, at these unit sizes."""
    module = module.to("meta")
    inputs = [
        value.to("meta") for value in example(network.inputs, {**units, "rows": 1, "timesteps": 1}, torch.float32)
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.float()(*inputs)
    return int(counter.get_total_flops())


def _outputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    outputs = module(*inputs)
    return [_numpy(value) for value in (outputs if isinstance(outputs, tuple) else (outputs,))]


def _numpy(value: Tensor) -> np.ndarray:
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
