"""Is what was exported what was meant? Every network, against the torch module it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realisid_trt.errors import ParityError

from .exact import in_float64
from .forms import Limits, OnnxForm
from .networks import Network
from .to_onnx import example

# A graph is other arithmetic in another order, so it may err like the torch module, not equal it. Each output's RMS
# error against float64 may be at most this many times the torch module's own in the same precision.
WORST_RATIO = 4.0


@dataclass(frozen=True)
class Parity:
    """How far an exported network is from the truth, over all outputs and shapes tried.

    rms, max_abs: of the error against the torch module in float64, relative to each output's RMS.
    rms_torch:    the same of the torch module itself, in the network's precision.
    ratio:        the worst output's rms over its rms_torch.
    shapes:       the unit sizes that were tried.
    """

    rms: float
    max_abs: float
    rms_torch: float
    ratio: float
    shapes: list[dict[str, int]]


def parity_shapes(limits: Limits) -> list[dict[str, int]]:
    """Unit sizes to try: the smallest picture, and an oblong one with several rows."""
    least, most = limits.side
    oblong = {"height": min(least + 1, most), "width": min(least + 3, most)}
    return [
        {"rows": 1, "timesteps": 1, "height": least, "width": least},
        {"rows": min(3, limits.rows[1]), "timesteps": 5, **oblong},
    ]


@torch.no_grad()
def verify(network: Network, module: nn.Module, path: Path, form: OnnxForm, limits: Limits) -> Parity:
    """The parity of the ONNX file with its module. Raises ParityError, naming the output that differs.

    module: in the form's precision.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    errors: list[tuple[float, float, float, float]] = []
    for units in parity_shapes(limits):
        inputs = example(network.inputs, units, form.dtype, seed=1)
        feed = {tap.name: _numpy(tensor) for tap, tensor in zip(network.inputs, inputs, strict=True)}
        graph = session.run(None, feed)
        outputs = module(*inputs)
        plain = [_numpy(tensor) for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]
        exact = [_numpy(tensor) for tensor in in_float64(module, inputs)]
        for tap, *three in zip(network.outputs, exact, graph, plain, strict=True):
            errors.append(_compare(f"{network.name} ({form.name}) output {tap.name}", *three))
    rms, max_abs, rms_torch, ratio = (max(column) for column in zip(*errors, strict=True))
    return Parity(rms, max_abs, rms_torch, ratio, parity_shapes(limits))


def _compare(what: str, true: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, float]:
    if ours.shape != true.shape:
        raise ParityError(f"{what} has shape {ours.shape}, the torch module gives {true.shape}. Report this as a bug.")
    scale = rms_of(true) or 1.0
    rms, rms_torch = (rms_of(output - true) / scale for output in (ours, theirs))
    max_abs = float(np.abs(ours - true).max()) / scale
    # Where torch happens to be exact (a bias, a constant), one rounding of the output's precision is no error.
    ratio = rms / max(rms_torch, float(np.finfo(ours.dtype).eps) / 4)
    if not ratio <= WORST_RATIO:
        raise ParityError(
            f"{what} errs {rms:.2e} (relative RMS against float64), {ratio:.1f} times what torch errs in the same "
            f"precision ({rms_torch:.2e}); at most {WORST_RATIO:g} times is accepted. The graph does not compute what "
            "the module computes: try another torch or onnxscript version, and report it with these figures."
        )
    return rms, max_abs, rms_torch, ratio


def rms_of(values: np.ndarray | Sequence[float]) -> float:
    """Root of the mean square, in float64."""
    return float(np.sqrt(np.mean(np.asarray(values, np.float64) ** 2)))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
