"""`inspect`: what an engine holds."""

from __future__ import annotations

from collections.abc import Sequence

from .command_line import Outcome
from .manifest import Axis, Build, Manifest, Port


def inspect_engine(path: str) -> Outcome:
    """Networks, shapes, sizes, precision and parity of an engine directory, as JSON values and as lines."""
    manifest = Manifest.read(path)
    manifest.check_files()
    values, model, files = manifest.values, manifest.model, manifest.values["files"]
    total = sum(listed["bytes"] for listed in files.values()) / 1e6
    scheduler = values["scheduler"]
    lines = [
        f"{manifest.path}: {values['name']}, {total:.1f} MB in {len(files)} files, every hash verified",
        f"pictures of {model.default_size} px by default, VAE factor {model.vae_scale_factor}, {model.levels} levels, "
        f"{len(model.residual_levels)} residuals, {model.num_id_tokens} ID tokens",
        "realisid_config: " + ", ".join(f"{key}={value}" for key, value in values["realisid_config"].items()),
        f"scheduler: DDIM, {scheduler['prediction_type']}, {scheduler['timestep_spacing']} spacing",
        "made by: " + ", ".join(f"{name} {version}" for name, version in values["made_by"].items()),
    ]
    for build in manifest.builds.values():
        lines += ["", *_build_lines(manifest, build)]
    if kernels := values["kernels"]:
        architectures = ", ".join(name.split(".")[1] for name in kernels["files"])
        lines += ["", f"CUDA kernels {kernels['key']}: {architectures}, compiled by NVRTC {kernels['nvrtc']}"]
    lines += ["", "parity: RMS error over that of the torch module in the same precision, both against float64"]
    if verified := values["verified"]:
        lines.append(
            f"whole engine: final latents of two persons err {verified['ratio']:.2f} times as much as torch in float32"
        )
    return Outcome({key: value for key, value in values.items() if key != "seal"}, lines)


def _build_lines(manifest: Manifest, build: Build) -> list[str]:
    versions = ", ".join(f"{package} {version}" for package, version in build.versions.items())
    lines = [
        f"{build.id}: {build.precision} on {build.device}, opset {build.opset}, {build.architecture}, "
        f"verified with {versions}",
        f"{'network':<18}{'MB':>8}{'GFLOP/row':>11}{'parity':>9}  inputs → outputs",
    ]
    networks = manifest.networks(build)
    for name, network in networks.items():
        described = manifest.values["networks"][name]
        entry = described["builds"][build.id]
        lines.append(
            f"{name:<18}{entry['bytes'] / 1e6:>8.2f}{described['flops_per_row'] / 1e9:>11.3f}"
            f"{entry['parity']['ratio']:>8.2f}×  {_ports(network.inputs)} → {_ports(network.outputs)}"
        )
    for name, reason in build.wide.items():
        lines.append(f"float32 all the same: {name} ({reason})")
    axes = {str(size) for n in networks.values() for p in n.inputs for size in p.shape if isinstance(size, Axis)}
    return [*lines, "ranges: " + "; ".join(sorted(axes))]


def _ports(ports: Sequence[Port], most: int = 4) -> str:
    return ", ".join(f"{port.name}{port}" for port in ports[:most]) + (", …" if len(ports) > most else "")
