"""A baseline with its networks compiled by torch.compile, and nothing compiled while it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .baseline import Baseline

AnyBaseline = TypeVar("AnyBaseline", bound=Baseline)


def compiled(pipeline: AnyBaseline, backend: str | Callable[..., Any] = "inductor") -> AnyBaseline:
    """The same pipeline on the same weights, its UNet and ControlNets compiled: each as one graph for every shape.

    backend: of torch.compile. Choose the pipeline's memory format first, since the weights are shared.
    """
    options: dict[str, Any] = {"backend": backend, "dynamic": False, "fullgraph": True}
    nets = {name: torch.compile(net, **options) for name, net in pipeline.controlnets.items()}
    return pipeline.with_networks(torch.compile(pipeline.unet, **options), nets)


@contextmanager
def every_shape() -> Iterator[None]:
    """A context in which torch compiles for any number of shapes.

    By default it compiles a function for eight shapes, and runs it eagerly for the others. Two ControlNets, with and
    without the ID, for three numbers of persons have twelve.
    """
    import torch._dynamo as dynamo

    with dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000, fail_on_recompile_limit_hit=True):
        yield


@contextmanager
def nothing_new() -> Iterator[None]:
    """A context in which nothing is compiled: a shape that the warm-up did not have raises RuntimeError."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
