"""The comparison of every exported network with the torch module it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from realisid_trt.errors import ParityError

from ..forms import Limits, OnnxForm
from ..networks import Network
from ..to_onnx import example
from .exact import in_float64
from .flops import flops_per_row
from .widen import widened

# A graph computes in another order than the torch module, so their outputs differ, but their errors are comparable.
# Each output's RMS error against float64 may be at most this many times the torch module's own in the same precision.
WORST_RATIO = 4.0
# The module's error is one draw. Near a tie (a sharp softmax) rounding errors grow a hundredfold in some places, and by
# chance one order of the same sums may have many times the error of another. So a graph with too large an error is
# compared with the worst of this many more draws: the module on inputs moved by one rounding, against the same float64.
DRAWS = 8
# A network with more operations per row than this, at the smallest size that it takes (a branch on its canvas), is
# compared at that size only. Its graph is compared in float32: a CPU would take hours for it in half precision.
HEAVY_FLOPS = 2e11

# Runs a network: inputs by name → outputs in its order. bfloat16 goes in and comes out as float32.
Run = Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]
# Inputs, and the largest accepted relative RMS error → a sentence about the origin of a larger one.
Explain = Callable[[Mapping[str, np.ndarray], float], str]
GRAPH_ADVICE = "The graph does not agree with the module: try another torch or onnxscript version"
PLAN_ADVICE = "The graph agrees with the module, the plan does not: try another --optimization-level"
HOW_TO_EXPLAIN = "Give the same command with --bisect to find the first node that differs."


@dataclass(frozen=True)
class Parity:
    """The error of an exported network, over all outputs and shapes tried.

    rms, max_abs: of the error against the torch module in float64, relative to each output's RMS.
    rms_torch:    the same of the torch module itself, in the network's precision; where an output needed more than one
                  draw of it, the worst of them.
    ratio:        the worst output's rms over its rms_torch.
    draws:        the most draws of the module that an output needed; 1: the module's own error was enough for all.
    shapes:       the unit sizes that were tried.
    widened:      graph and module ran in float32 on their half-precision weights. This proves the graph; the effect of
                  rounding to half can only be measured on a GPU.
    """

    rms: float
    max_abs: float
    rms_torch: float
    ratio: float
    draws: int
    shapes: list[dict[str, int]]
    widened: bool = False


def parity_shapes(limits: Limits) -> list[dict[str, int]]:
    """Unit sizes to try, within the limits: the smallest picture with the fewest tokens, and an oblong one with several
    rows and the most tokens."""
    least, most = limits.side
    oblong = {"height": min(least + 1, most), "width": min(least + 3, most)}
    few, many = ({} if limits.tokens is None else {"tokens": count} for count in limits.tokens or (0, 0))
    return [
        {"rows": limits.rows[0], "timesteps": limits.timesteps[0], "height": least, "width": least, **few},
        {"rows": min(3, limits.rows[1]), "timesteps": min(5, limits.timesteps[1]), **oblong, **many},
    ]


@torch.no_grad()
def verify(
    network: Network, module: nn.Module, run: Path | Run, form: OnnxForm, limits: Limits, explain: Explain | None = None
) -> Parity:
    """The parity of what `run` computes with the module. Raises ParityError, naming the output that differs.

    module:  in the form's precision.
    run:     the network to compare; an ONNX file is run by ONNX Runtime on the CPU. It has no bfloat16, so a bfloat16
             graph is compared widened, as is a heavy one in half precision.
    limits:  of the inputs that `run` takes.
    explain: called when an output differs; None: the error names --bisect.
    """
    units = parity_shapes(limits)
    heavy = flops_per_row(network, module, units[0]) > HEAVY_FLOPS
    units = units[:1] if heavy else units
    inputs = [example(network.inputs, sizes, form.dtype, seed=1) for sizes in units]
    feeds = [
        {port.name: _numpy(tensor) for port, tensor in zip(network.inputs, tensors, strict=True)} for tensors in inputs
    ]
    wide = isinstance(run, Path) and (form.precision == "bf16" or (heavy and form.precision == "fp16"))
    if wide:
        feeds = [{name: _widened(array) for name, array in feed.items()} for feed in feeds]
    if isinstance(run, Path):
        with widened(run) if wide else nullcontext(run) as file:
            graphs = _on_cpu(file, feeds)
    else:
        graphs = [list(run(feed)) for feed in feeds]
    advice = GRAPH_ADVICE if isinstance(run, Path) else PLAN_ADVICE
    eps = torch.finfo(torch.float32 if wide else form.dtype).eps
    errors: list[tuple[float, float, float, float, int]] = []

    @contextmanager
    def as_the_graph() -> Iterator[None]:
        with _RoundedScalars(form.dtype) if wide else nullcontext():
            yield

    def plain(tensors: Sequence[Tensor]) -> list[np.ndarray]:
        with as_the_graph(), _in_float32(module) if wide else nullcontext():
            return [*map(_numpy, _run_module(module, tensors, heavy and not wide))]

    for tensors, feed, graph in zip(inputs, feeds, graphs, strict=True):
        with as_the_graph():
            exact = [_numpy(tensor) for tensor in in_float64(module, tensors)]
        draws = _Draws(plain, [*map(_float32, tensors)] if wide else tensors)
        for index, (port, true, ours) in enumerate(zip(network.outputs, exact, graph, strict=True)):
            what = f"{network.name} ({form.name}{', widened to float32' if wide else ''}) output {port.name}"
            theirs = partial(draws.of, index)
            errors.append(_compare(what, true, ours, theirs, eps, advice, partial(explain, feed) if explain else None))
    rms, max_abs, rms_torch, ratio, most = (max(column) for column in zip(*errors, strict=True))
    return Parity(rms, max_abs, rms_torch, ratio, most, units, wide)


class _Draws:
    """The module's outputs, first for these inputs, then for inputs moved by one rounding. Each draw is run once."""

    def __init__(self, plain: Callable[[Sequence[Tensor]], list[np.ndarray]], inputs: Sequence[Tensor]) -> None:
        self._plain, self._inputs = plain, inputs
        self._generator = torch.Generator().manual_seed(1)
        self._made = [plain(inputs)]

    def of(self, output: int) -> Iterator[np.ndarray]:
        for draw in range(1 + DRAWS):
            if draw == len(self._made):
                self._made.append(self._plain([*map(self._moved, self._inputs)]))
            yield self._made[draw][output]

    def _moved(self, tensor: Tensor) -> Tensor:
        """Adds −1, 0 or +1 eps (relative) to each float; zeros and integers are unchanged."""
        if not tensor.is_floating_point():
            return tensor
        step = torch.randint(-1, 2, tensor.shape, generator=self._generator) * torch.finfo(tensor.dtype).eps
        return (tensor.double() * (1 + step.double())).to(tensor.dtype)


def _run_module(module: nn.Module, inputs: Sequence[Tensor], on_gpu: bool) -> list[Tensor]:
    """The module's outputs on the CPU. on_gpu: computed on a GPU, if torch has one."""
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    outputs = module.to(device)(*(tensor.to(device) for tensor in inputs))
    module.to("cpu")
    return [tensor.cpu() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]


def _on_cpu(file: Path, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[list[np.ndarray]]:
    import onnxruntime as ort

    from realisid_trt.backends.sessions import session_options

    session = ort.InferenceSession(
        str(file), session_options(torch.get_num_threads()), providers=["CPUExecutionProvider"]
    )
    return [session.run(None, dict(feed)) for feed in feeds]


def _compare(
    what: str,
    true: np.ndarray,
    ours: np.ndarray,
    theirs: Callable[[], Iterator[np.ndarray]],
    eps: float,
    advice: str,
    explain: Callable[[float], str] | None,
) -> tuple[float, float, float, float, int]:
    """rms, max_abs, rms_torch, ratio and draws of one output. theirs: torch's draws. eps: of the precision of both."""
    if ours.shape != true.shape:
        raise ParityError(f"{what} has shape {ours.shape}, the torch module gives {true.shape}. Report this as a bug.")
    scale = rms_of(true) or 1.0
    rms, max_abs = rms_of(ours - true) / scale, float(np.abs(ours - true).max()) / scale
    rms_torch = 0.0
    for count, draw in enumerate(theirs(), start=1):
        rms_torch = max(rms_torch, rms_of(draw - true) / scale)
        # Where torch happens to be exact (a bias, a constant), one rounding of the output's precision is accepted.
        accepted = max(rms_torch, eps / 4)
        if rms <= WORST_RATIO * accepted:
            return rms, max_abs, rms_torch, rms / accepted, count
    raise ParityError(
        f"{what} has an error of {rms:.2e} (relative RMS against float64), {rms / accepted:.1f} times torch's in the "
        f"same precision ({rms_torch:.2e}); at most {WORST_RATIO:g} times is accepted. {advice}, and report it with "
        f"these figures. {explain(WORST_RATIO * accepted) if explain else HOW_TO_EXPLAIN}"
    )


def rms_of(values: np.ndarray | Sequence[float]) -> float:
    """Root of the mean square, in float64."""
    return float(np.sqrt(np.mean(np.asarray(values, np.float64) ** 2)))


class _RoundedScalars(TorchDispatchMode):
    """Rounds constants of the code, such as GELU's 1.702, to the graph's precision, as an exporter does."""

    ARITHMETIC = frozenset({"add", "sub", "mul", "div"})

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.ARITHMETIC:
            args = tuple(torch.tensor(a, dtype=self._dtype).item() if isinstance(a, float) else a for a in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """A context with every weight in float32. Restores the weights: `.to` would narrow those that were never half."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
