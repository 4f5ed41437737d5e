"""`inspect`: the contents of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..branches import Branch
from ..config import RealisIDConfig
from ..manifest import Axis, Build, Manifest, Port
from ..memory import gpu_builds, needs
from .command_line import Outcome
from .memory_table import memory_lines, present_card, sizes_of


def inspect_engine(
    path: str, batch: int | None = None, persons: int | None = None, resolution: int | None = None
) -> Outcome:
    """Networks, shapes, sizes, precision, parity and GPU memory of an engine directory, as JSON values and as lines.

    batch, persons, resolution: the size for which the memory is counted; without them that of one picture and the
                                largest.
    """
    manifest = Manifest.read(path)
    sizes = sizes_of(manifest, batch, persons, resolution)
    manifest.check_files()
    values, model, files = manifest.values, manifest.model, manifest.values["files"]
    shown = {key: value for key, value in values["realisid_config"].items() if key not in ("branches", "sampler")}
    total = sum(listed["bytes"] for listed in files.values()) / 1e6
    lines = [
        f"{manifest.path}: {values['name']}, {total:.1f} MB in {len(files)} files, every hash verified",
        f"pictures of {model.default_size} px by default, VAE factor {model.vae_scale_factor}, {model.levels} levels, "
        f"{len(model.residual_levels)} residuals, {model.num_id_tokens} ID tokens",
        *map(_branch_line, manifest.config.table),
        *([] if model.face_encoder is None else [_face_encoder_line(model.face_encoder)]),
        "realisid_config: " + ", ".join(f"{key}={value}" for key, value in shown.items()),
        _sampler_line(manifest.config, values["scheduler"]),
        *map(_licence_line, values.get("licences", [])),
        "made by: " + ", ".join(f"{name} {version}" for name, version in values["made_by"].items()),
    ]
    for build in manifest.builds.values():
        lines += ["", *_build_lines(manifest, build)]
    if kernels := values["kernels"]:
        architectures = ", ".join(name.split(".")[1] for name in kernels["files"])
        lines += ["", f"CUDA kernels {kernels['key']}: {architectures}, compiled by NVRTC {kernels['nvrtc']}"]
    lines += ["", "parity: RMS error over that of the torch module in the same precision, both against float64"]
    for name, verified in values["verified"].items():
        if "ratio" not in verified:  # a large checkpoint: its plans were compared singly
            continue
        lines.append(f"{name}: its final latents have {verified['ratio']:.2f} times torch's error")
    lines += memory_lines(manifest, sizes, present_card())
    counted = [needs(manifest, build, size).as_json() for build in gpu_builds(manifest) for size in sizes]
    return Outcome({key: value for key, value in values.items() if key != "seal"} | {"memory": counted}, lines)


def _sampler_line(config: RealisIDConfig, schedule: Mapping[str, Any]) -> str:
    """The sampler that a request has by default, and on which noise schedule it takes its steps."""
    sampler = config.default_sampler
    said = [f"sampler: {sampler.name}", schedule["prediction_type"]]
    if sampler.timesteps is not None:
        said.append("timesteps " + ", ".join(f"{timestep:g}" for timestep in sampler.timesteps))
    elif sampler.has("spacing"):
        said.append(f"{sampler.spacing or schedule['timestep_spacing']} spacing")
    if sampler.original_inference_steps is not None:
        said.append(f"of {sampler.original_inference_steps} timesteps")
    if sampler.eta is not None:
        said.append(f"eta {sampler.eta:g}")
    if config.fixed_steps is not None:
        said.append(f"distilled to {config.fixed_steps} step{'s' * (config.fixed_steps > 1)}")
    return ", ".join(said)


def _branch_line(branch: Branch) -> str:
    """One row of the table."""
    window = f", steps {branch.start:g} to {branch.end:g}" if (branch.start, branch.end) != (0, 1) else ""
    style = f" ({branch.style})" if branch.style else ""
    shown = {
        "pose": f"the pose of each person{style}" if branch.per == "person" else f"the poses of all persons{style}",
        "location": "the place of each person",
        "id_patches": f"the ID patches of all persons, on a given picture or drawn bodies{style}",
        "image": f"a given picture, or drawn bodies{style}" if branch.style else "a given picture",
    }[branch.condition]
    return (
        f"branch {branch.name}: is shown {shown}, "
        f"sees the {branch.view}, reads {branch.tokens} tokens, writes {branch.writes.replace('box', 'in the box')}, "
        f"scale {branch.scale:g}{window}{', optional' if branch.optional else ''}"
    )


def _face_encoder_line(encoder: Mapping[str, Any]) -> str:
    """What embeds a face, how it is fed, and its terms."""
    lengths = {"unit": "embeddings of length 1", "raw": "raw embeddings"}[encoder["norm"]]
    points = {"mtcnn": "MTCNN's five points", "mtcnn-whole": "MTCNN's five points, cut to whole px"}[encoder["points"]]
    return (
        f"face encoder {encoder['name']}: colours {encoder['colour']}, {lengths}, aligned by {points}, licence: "
        f"{encoder['licence'] or 'no licence was found: ask its publisher'}"
    )


def _licence_line(line: Mapping[str, Any]) -> str:
    """The terms under which one part of the checkpoint was published; they hold for the engine too."""
    return (
        f"licence of {line['part']} ({line['source']}): {line['licence'] or 'no licence was found: ask its publisher'}"
    )


def _build_lines(manifest: Manifest, build: Build) -> list[str]:
    versions = ", ".join(f"{package} {version}" for package, version in build.versions.items())
    lines = [
        f"{build.id}: {build.precision} on {build.device}, opset {build.opset}, {build.architecture}, "
        f"built with {versions}" + (f" on {build.gpu['name']}" if build.gpu else ""),
        f"{'network':<18}{'MB':>8}{'GFLOP/row':>11}{'parity':>9}  inputs → outputs",
    ]
    networks = manifest.networks(build)
    entries = {name: manifest.values["networks"][name]["builds"][build.id] for name in networks}
    own = manifest.values["verified"].get(build.id, {}).get("networks", {})  # the plans' parity, if they were run
    for name, network in networks.items():
        described, entry = manifest.values["networks"][name], entries[name]
        parity = own.get(name, entry["parity"])
        lines.append(
            f"{name:<18}{entry['bytes'] / 1e6:>8.2f}{described['flops_per_row'] / 1e9:>11.3f}"
            f"{parity['ratio']:>8.2f}×  {_ports(network.inputs)} → {_ports(network.outputs)}"
        )
    for name, entry in entries.items():
        if (draws := own.get(name, entry["parity"]).get("draws", 1)) > 1:
            lines.append(f"parity: {name} was compared with the worst of {draws} draws of torch's rounding errors")
    for name, reason in build.wide.items():
        lines.append(f"float32 all the same: {name} ({reason})")
    proofs = {name: entry["proof"] for name, entry in entries.items() if "proof" in entry}
    if proofs and not own:
        lines.append("parity: of the graphs; the plans were not run on the machine that built them")
    if proofs:
        lines += [*_proof_lines(build, proofs), f"built in {_total(entries, 'build_seconds'):.0f} s"]
    axes = {str(size) for n in networks.values() for p in n.inputs for size in p.shape if isinstance(size, Axis)}
    return [*lines, "ranges: " + "; ".join(sorted(axes))]


def _proof_lines(build: Build, proofs: Mapping[str, Any]) -> list[str]:
    """Lines on the plans' proofs: how many of their tensors have the requested precision."""
    asked = {name: proof for name, proof in proofs.items() if name not in build.wide}
    half, outputs = (sum(proof[key] for proof in asked.values()) for key in ("half", "outputs"))
    attentions = sum(proof["attentions"] for proof in proofs.values())
    fused = [proof["fused"] for proof in proofs.values() if proof["fused"] is not None]
    lines = [f"proof: {half} of {outputs} tensors are {build.precision}, outside of what is float32 all the same"]
    if fused:
        lines.append(f"proof: {sum(fused)} of {attentions} attentions are named as fused kernels in the plans")
    wider: dict[str, int] = {}
    for proof in asked.values():
        for reason, count in proof["wider"].items():
            wider[reason] = wider.get(reason, 0) + count
    return [*lines, *(f"proof: {count} tensors are float32: {reason}" for reason, count in wider.items())]


def _total(entries: Mapping[str, Any], key: str) -> float:
    return float(sum(entry[key] for entry in entries.values()))


def _ports(ports: Sequence[Port], most: int = 4) -> str:
    return ", ".join(f"{port.name}{port}" for port in ports[:most]) + (", …" if len(ports) > most else "")
