"""Every plan by itself, on the GPU that it was built for, against the torch module that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from realisid_trt.backends import Backend, open_backend
from realisid_trt.backends.gpu_facts import gpu_facts
from realisid_trt.backends.tensorrt_flavours import FLAVOURS
from realisid_trt.manifest import Axis, Build, Manifest, Network

from ..checkpoint import Checkpoint
from ..forms import Limits, OnnxForm
from ..networks import networks
from ..to_plan import PlanSettings, to_plan
from .bisect import RunGraph, explain, plain
from .verify import Parity, verify

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def verify_plans(
    path: Path, checkpoint: Checkpoint, build: str, backend: Backend | None = None, bisect: bool = False
) -> dict[str, Parity]:
    """The parity of every network of a build, as its backend runs it. Raises ParityError.

    backend: the build's, opened; None: it is opened here.
    bisect:  an error names the first node that differs.
    """
    manifest = Manifest.read(path)
    chosen = manifest.builds[build]
    opened = open_backend(chosen.backend, manifest, chosen.device) if backend is None else backend
    known, found = networks(checkpoint), {}
    try:
        for name, network in manifest.networks(chosen).items():
            precision = "fp32" if name in chosen.wide else PRECISIONS[chosen.precision]
            form, run = OnnxForm(chosen.opset, precision), partial(_run, opened, network)
            module = known[name].module(form.dtype)
            explained = None
            if bisect:
                entry = manifest.values["networks"][name]["builds"][build]
                graph = manifest.path / entry.get("onnx", entry["file"])
                explained = partial(explain, graph, through_backend(manifest, chosen, name, opened.device))
            found[name] = verify(known[name], module, run, form, limits_of(network), explained)
    finally:
        if backend is None:
            opened.close()
    return found


def _run(backend: Backend, network: Network, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    backend.start_request()
    outputs = backend.run(network.name, {name: backend.put(array) for name, array in feed.items()})
    return [backend.get(outputs[port.name]) for port in network.outputs]


def limits_of(network: Network) -> Limits:
    """The limits of a network's inputs, from the manifest."""
    bounds: dict[str, tuple[int, int]] = {}
    for port in network.inputs:
        for size in port.shape:
            if isinstance(size, Axis):
                bounds[size.name] = size.min // size.multiple, size.max // size.multiple
    return Limits(
        rows=bounds.get("rows", (1, 1)),
        timesteps=bounds.get("timesteps", (1, 1)),
        side=bounds.get("height", (1, 1)),
        tokens=bounds.get("tokens"),
    )


def through_backend(manifest: Manifest, build: Build, name: str, device: str) -> RunGraph:
    """A function that runs a piece of one network's graph by the build's backend, as a plan if the build has plans."""
    types = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
    types |= {onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.INT64: "int64"}

    def run(marked: Path, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        graph = onnx.load(str(marked), load_external_data=False).graph
        fed = {port.name: feed[port.name] for port in graph.input}
        shapes = {each: array.shape for each, array in (plain(marked, feed) | fed).items()}

        def port(value: onnx.ValueInfoProto) -> dict[str, Any]:
            dtype = types[value.type.tensor_type.elem_type]
            return {"name": value.name, "dtype": dtype, "shape": list(shapes[value.name])}

        file = marked.with_suffix(".plan") if build.backend in FLAVOURS else marked
        entry = {"file": str(file.absolute())}
        entry |= {"inputs": [port(value) for value in graph.input], "outputs": [port(value) for value in graph.output]}
        try:
            if file != marked:
                dynamic = [v.name for v in graph.input if any(d.dim_param for d in v.type.tensor_type.shape.dim)]
                to_plan(marked, file, name, {each: (shapes[each],) * 3 for each in dynamic}, _settings(build, name))
            piece = Manifest(manifest.path, {**manifest.values, "networks": {name: {"builds": {build.id: entry}}}})
            backend = open_backend(build.backend, piece, device, [name])
            try:
                found = backend.run(name, {each: backend.put(array) for each, array in fed.items()})
                return {each: backend.get(tensor) for each, tensor in found.items()}
            finally:
                backend.close()
        finally:
            if file != marked:
                file.unlink(missing_ok=True)

    return run


def _settings(build: Build, name: str) -> PlanSettings:
    """The build's settings, for this GPU only."""
    return PlanSettings(
        flavour=build.backend,
        precision="fp32" if name in build.wide else PRECISIONS[build.precision],
        architectures=(gpu_facts().architecture,) if FLAVOURS[build.backend].portable else (),
    )
