"""A torch module → an ONNX file: traced, stripped, checked."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from realisid_trt.errors import BuildError

from .forms import Limits, OnnxForm
from .networks import Network, Port, Size

# diffusers' Upsample2D makes a batch of 64 rows or more contiguous, which changes no value. If more rows were declared,
# torch.export would detect that and trace the network a second time. The graph takes any number of rows.
TRACED_ROWS = 63
# torch.export may take two equal sizes for one. Tokens are traced with as many more than the least as one ID has.
MORE_TOKENS = 16
EMBED_BELOW_BYTES = 2**30  # larger weights go beside the graph: a protobuf holds at most 2 GiB


def port_entry(port: Port, form: OnnxForm, limits: Limits) -> dict[str, object]:
    """The manifest's entry for an input or output."""
    shape: list[object] = []
    for size in port.shape:
        if isinstance(size, Size):
            least, most = (bound * size.factor for bound in limits.of(size.unit))
            shape.append({"axis": size.unit, "min": least, "max": most, "multiple": size.factor})
        else:
            shape.append(size)
    return {"name": port.name, "dtype": str(port.dtype or form.dtype).removeprefix("torch."), "shape": shape}


def example(ports: tuple[Port, ...], units: Mapping[str, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs with plausible values, drawn in float64 so that every precision gets the same numbers.

    Patches leave [0, 1], so `id_patches` are not clamped. An embedding of 512 numbers that is not `unit` has a length
    of about 23, as raw ones have.

    units: the size of each unit: {"rows": 2, "timesteps": 3, "height": 3, "width": 2}.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for port in ports:
        shape = [units[size.unit] * size.factor if isinstance(size, Size) else size for size in port.shape]
        if port.name == "input_ids":
            inputs.append(torch.randint(0, 256, shape, generator=generator))
            continue
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if port.name == "timestep":
            values = (values.abs() * 300).clamp(0, 999).floor()
        elif port.name == "time_ids":
            values = (values.abs() * 512).floor()
        elif port.name == "location_mask":
            values = (values > 0).double()
        elif port.name in ("pose_image", "image"):
            values = values.clamp(0, 1)
        elif port.unit:
            values = torch.nn.functional.normalize(values, dim=-1)
        inputs.append(values.to(port.dtype or dtype))
    return tuple(inputs)


def to_onnx(network: Network, module: nn.Module, form: OnnxForm, limits: Limits, path: Path) -> None:
    """Writes `path` (and `path.data` when the weights are large). Raises BuildError, with the exporter's message."""
    least, most = limits.side
    units = {"rows": 2, "timesteps": 2, "height": min(least + 1, most), "width": min(least + 2, most)}
    if limits.tokens is not None:
        units["tokens"] = _traced_tokens(network, units, limits.tokens)
    inputs = example(network.inputs, units, form.dtype)
    specs = tuple(_dynamic(port, limits) for port in network.inputs)
    weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    external = weights_bytes >= EMBED_BELOW_BYTES
    variadic = module.forward.__code__.co_flags & 0x04  # *inputs: torch.export expects their specs as one tuple
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                input_names=[port.name for port in network.inputs],
                output_names=[port.name for port in network.outputs],
                dynamic_shapes=(specs,) if variadic else specs,
                opset_version=form.opset,
                external_data=external,
                verbose=False,
            )
            program.save(str(path), external_data=external)
        _strip(path)
        onnx.checker.check_model(str(path), full_check=not external)
    except OSError:
        raise  # an error of the disk, not of the exporter
    except Exception as error:
        raise BuildError(f"{network.name} cannot be exported as {form.name}: {_last_line(error)}") from error


def _traced_tokens(network: Network, units: Mapping[str, int], limits: tuple[int, int]) -> int:
    """A number of tokens that no other size of the network is equal to, nor the number of cells of a level."""
    least, most = limits
    taken: set[int] = set()
    for port in (*network.inputs, *network.outputs):
        sizes = [
            units[size.unit] * size.factor if isinstance(size, Size) else size
            for size in port.shape
            if not (isinstance(size, Size) and size.unit == "tokens")
        ]
        taken |= {*sizes, math.prod(sizes[2:])}
    more = min(least + MORE_TOKENS, most)
    tried = (*range(more, most + 1), *range(more, least, -1))
    return next((count for count in tried if count not in taken), most)


# torch requires that all inputs share one Dim object per name.
_DIMS: dict[tuple[str, int, int], torch.export.Dim] = {}


def _dynamic(port: Port, limits: Limits) -> dict[int, object]:
    dims: dict[int, object] = {}
    for axis, size in enumerate(port.shape):
        if isinstance(size, Size):
            least, most = limits.of(size.unit)
            if least == most:  # a constant: torch's Dim asks for two sizes
                continue
            if size.unit == "rows":
                most = min(most, TRACED_ROWS)
            unit = _DIMS.setdefault((size.unit, least, most), torch.export.Dim(size.unit, min=least, max=most))
            dims[axis] = unit if size.factor == 1 else unit * size.factor
    return dims


def _strip(path: Path) -> None:
    """Removes what the exporter writes about the machine it ran on: stack traces, file names, module paths."""
    model = onnx.load(str(path), load_external_data=False)
    model.doc_string = ""
    for holder in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ):
        del holder.metadata_props[:]
        holder.doc_string = ""
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    onnx.save(model, str(partial))
    os.replace(partial, path)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without Python's warnings and without the exporter's log lines about packages that it does not find."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
