"""The jobs of a build, one per graph and per plan, and the graphs and plans of an earlier build that are up to date."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from realisid_trt.backends import tensorrt_flavours
from realisid_trt.backends.gpu_facts import gpu_facts
from realisid_trt.backends.tensorrt_flavours import FLAVOURS
from realisid_trt.errors import RequestError
from realisid_trt.files import cache_folder

from ..checkpoint import Checkpoint
from ..forms import Limits, Target, artifact_name
from ..networks import Network
from ..options import Options
from ..profiles import Profile, profiles
from ..to_onnx import port_entry
from ..to_plan import PlanSettings
from .describe import sources, versions
from .plans import PlanJob
from .staging import Artifact, Staging, content_key
from .workers import Job

LEAST_SIDE = 2  # cells of the coarsest level
# The files and folders of export/ that determine a graph, and a plan.
ONNX_MAKERS = (
    "networks.py", "id_encoders.py", "to_onnx.py", "forms.py", "truth/exact.py", "truth/verify.py", "truth/widen.py",
    "building/workers.py", "checkpoint",
)  # fmt: skip
PLAN_MAKERS = ("to_plan.py", "truth/proof.py", "building/plans.py", "profiles.py", "building/planning.py")


def onnx_jobs(
    staging: Staging, checkpoint: Checkpoint, known: Mapping[str, Network], targets: Sequence[Target], options: Options
) -> tuple[dict[str, Artifact], list[Job]]:
    """The networks that are up to date, by artifact, and the jobs that export the others."""
    tokens = checkpoint.token_limits(options.persons)
    limits = Limits.of_requests(options.batch, options.persons, _longest(checkpoint, options), tokens)
    makers = sources(*ONNX_MAKERS)
    # The folder that was found: a worker must not ask the hub again, since it may have another revision by then.
    source = checkpoint.path, checkpoint.base or options.base_model, options.variant
    made: dict[str, Artifact] = {}
    jobs: dict[str, Job] = {}
    for target in targets:
        for name, network in known.items():
            form = target.form_of(name)
            artifact = artifact_name(name, form)
            if artifact in made or artifact in jobs:  # another target has the same graph
                continue
            # Shapes come from other components too: the canvas from the UNet, the tokens from the projection.
            ports = [port_entry(port, form, limits) for port in (*network.inputs, *network.outputs)]
            weights = {component: checkpoint.weights_key(component) for component in network.components}
            family = checkpoint.has_added_conditions  # it decides the layer of a text encoder that is read
            units = [port.name for port in network.inputs if port.unit]  # it decides the inputs of the comparison
            key = content_key(name, form.name, ports, units, weights, family, makers, versions())
            if found := staging.find(artifact, key):
                made[artifact] = found
            else:
                size = network.elements(checkpoint) * form.itemsize
                jobs[artifact] = Job(artifact, key, source, name, form, limits, size, options.bisect)
    return made, list(jobs.values())


def plan_jobs(
    staging: Staging,
    checkpoint: Checkpoint,
    known: Mapping[str, Network],
    targets: Sequence[Target],
    graphs: Mapping[str, Artifact],
    options: Options,
) -> tuple[dict[str, Artifact], list[PlanJob]]:
    """The plans that are up to date, by artifact, and the jobs that build the others from the graphs that exist."""
    made: dict[str, Artifact] = {}
    jobs: list[PlanJob] = []
    makers = sources(*PLAN_MAKERS), inspect.getsource(tensorrt_flavours)
    for target in targets:
        if not target.has_plans:
            continue
        flavour = FLAVOURS[target.backend]
        gpu = None if flavour.portable else gpu_facts().as_json()
        shapes_of = profiles_of(checkpoint, known, options)
        for name, network in known.items():
            form, profile = target.form_of(name), shapes_of[name]
            graph = graphs.get(artifact_name(name, form))
            if graph is None:
                continue
            settings = PlanSettings(
                flavour=target.backend,
                precision=form.precision,
                architectures=options.architectures if flavour.portable else (),
                workspace_bytes=None if options.workspace is None else int(options.workspace * 2**30),
                optimization_level=options.optimization_level,
                timing_cache=None if flavour.portable else _timing_cache(target.backend, gpu),
            )
            shapes = {port.name: found for port in network.inputs if (found := profile.shapes(port)) is not None}
            hashes = {file: listed["sha256"] for file, listed in graph.files.items()}
            asked = {key: value for key, value in vars(settings).items() if key != "timing_cache"}
            artifact = target.artifact(name)
            described = {name: value for name, value in graph.info.items() if name not in ("file", "seconds")}
            key = content_key(artifact, hashes, described, shapes, asked, flavour.version, gpu, makers)
            if found := staging.find(artifact, key):
                made[artifact] = found
                continue
            info = {
                **described,
                "file": f"plans/{target.backend}/{name}.plan",
                "inputs": [port_entry(port, form, profile.limits) for port in network.inputs],
                "outputs": [port_entry(port, form, profile.limits) for port in network.outputs],
                "profile": {"least": profile.least, "best": profile.best, "most": profile.most},
                "onnx": graph.info["file"],
            }
            jobs.append(
                PlanJob(
                    artifact=artifact,
                    key=key,
                    network=name,
                    onnx_file=staging.folder / graph.info["file"],
                    file=Path(info["file"]),
                    shapes=shapes,
                    settings=settings,
                    bytes=sum(listed["bytes"] for listed in graph.files.values()),
                    info=info,
                )
            )
    return made, jobs


def profiles_of(checkpoint: Checkpoint, known: Mapping[str, Network], options: Options) -> dict[str, Profile]:
    """The profile of every network for these options."""
    trained_side = checkpoint.sample_size >> (checkpoint.levels - 1)
    tokens = checkpoint.token_limits(options.persons)
    return profiles(
        list(known),
        pictures=options.batch,
        persons=options.persons,
        side=(min(LEAST_SIDE, trained_side), trained_side, _longest(checkpoint, options)),
        steps=checkpoint.config.num_inference_steps,
        config=checkpoint.config,
        tokens=None if tokens is None else _tokens(*tokens, checkpoint.num_id_tokens),
    )


def _tokens(least: int, most: int, of_id: int) -> tuple[int, int, int]:
    """Least, best and most tokens: best is one person, if there may be one."""
    return least, min(least + of_id, most), most


def _longest(checkpoint: Checkpoint, options: Options) -> int:
    """The longest side of a picture, in cells of the coarsest level."""
    coarsest_px = checkpoint.vae_scale_factor << (checkpoint.levels - 1)
    own_px = checkpoint.sample_size * checkpoint.vae_scale_factor
    longest_px = options.resolution or 2 * own_px
    if longest_px < own_px:
        raise RequestError(f"--resolution is {longest_px} px, expected at least the model's own {own_px} px.")
    return longest_px // coarsest_px


def _timing_cache(backend: str, gpu: Mapping[str, object] | None) -> Path:
    """The file with kernel times on this GPU by this TensorRT version, for every engine of this machine."""
    return cache_folder() / "timing" / f"{content_key(backend, FLAVOURS[backend].version, gpu)[:16]}.cache"
