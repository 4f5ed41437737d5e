"""The networks are cut where the design says and equal diffusers' own forward; other families load too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps

from export.build import build
from export.checkpoint import Checkpoint
from export.forms import Limits, OnnxForm
from export.miniature import make_checkpoint
from export.networks import Network, Port, Sinusoids, Size, networks
from export.options import Options
from export.to_onnx import example, to_onnx
from export.truth.exact import in_float64
from export.truth.flops import flops_per_row
from export.truth.verify import parity_shapes, verify


@pytest.fixture(scope="module")
def checkpoint(checkpoint_dir: Path) -> Checkpoint:
    return Checkpoint.open(checkpoint_dir)


def test_the_networks_of_the_design(checkpoint: Checkpoint) -> None:
    found = networks(checkpoint)
    assert list(found) == [
        "text_encoder", "text_encoder_2", "id_encoder", "local_condition", "local_time", "local_branch",
        "global_condition", "global_time", "global_branch", "unet_time", "unet_encoder", "unet_decoder", "vae_decoder",
    ]  # fmt: skip
    names = {name: ([t.name for t in n.inputs], [t.name for t in n.outputs]) for name, n in found.items()}
    assert names["unet_time"] == (["timestep", "pooled", "time_ids"], ["emb"])
    assert names["local_branch"][0] == ["latents", "emb", "id_tokens", "condition"]
    assert len(names["local_branch"][1]) == len(names["unet_encoder"][1]) == 10
    assert names["unet_decoder"] == ([*names["unet_encoder"][1], "emb", "prompt_embeds"], ["noise_pred"])


@torch.no_grad()
def test_the_split_unet_is_the_unet(checkpoint: Checkpoint) -> None:
    """Encoder, then residuals, then decoder: bit for bit diffusers' forward with additional residuals."""
    found = networks(checkpoint)
    units = {"rows": 2, "timesteps": 2, "height": 3, "width": 4}
    latents, emb, text = example(found["unet_encoder"].inputs, units, torch.float32)
    timestep, pooled, time_ids = example(found["unet_time"].inputs, units, torch.float32)
    emb = found["unet_time"].module(torch.float32)(timestep, pooled, time_ids)
    skips = found["unet_encoder"].module(torch.float32)(latents, emb, text)
    residuals = [torch.randn(s.shape, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(skips)]
    merged = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
    ours = found["unet_decoder"].module(torch.float32)(*merged, emb, text)
    theirs = checkpoint.load_unet()(
        latents, timestep, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        down_block_additional_residuals=residuals[:-1], mid_block_additional_residual=residuals[-1],
    ).sample  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("branch", ["local", "global"])
def test_the_branch_with_its_condition_outside_is_the_controlnet(checkpoint: Checkpoint, branch: str) -> None:
    found = networks(checkpoint)
    units = {"rows": 2, "timesteps": 2, "height": 8, "width": 8}
    latents, _, tokens, _ = example(found[f"{branch}_branch"].inputs, units, torch.float32)
    timestep, pooled, time_ids = example(found[f"{branch}_time"].inputs, units, torch.float32)
    [image] = example(found[f"{branch}_condition"].inputs, units, torch.float32)
    emb = found[f"{branch}_time"].module(torch.float32)(timestep, pooled, time_ids)
    condition = found[f"{branch}_condition"].module(torch.float32)(image)
    ours = found[f"{branch}_branch"].module(torch.float32)(latents, emb, tokens, condition)
    down, mid = checkpoint.load_controlnet(branch)(
        latents, timestep, tokens, controlnet_cond=image,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}, return_dict=False,
    )  # fmt: skip
    for a, b in zip(ours, [*down, mid], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(("features", "cosine_first", "shift"), [(320, True, 0), (256, True, 0), (96, False, 1)])
def test_sinusoids_are_diffusers_own_in_the_graph_too(
    tmp_path: Path, features: int, cosine_first: bool, shift: float
) -> None:
    """An exporter folds the frequencies with other rounding, and a timestep of 1000 makes that a large error."""
    import onnxruntime as ort

    theirs = Timesteps(features, cosine_first, shift)
    timesteps = torch.cat([torch.arange(1000.0), torch.tensor([1024.0, 2048.0])])
    ours = Sinusoids(theirs)
    torch.testing.assert_close(ours(timesteps), theirs(timesteps), rtol=0, atol=0)
    count = Size("timesteps")
    network = Network(
        "sinusoids", (), (Port("timestep", (count,), torch.float32),), (Port("emb", (count, features)),), lambda _: ours
    )
    to_onnx(network, ours, OnnxForm(20, "fp32"), Limits(rows=(1, 1), timesteps=(1, 2000), side=(2, 2)), tmp_path / "x")
    session = ort.InferenceSession(str(tmp_path / "x"), providers=["CPUExecutionProvider"])
    [graph] = session.run(None, {"timestep": timesteps.numpy()})
    assert np.abs(graph - theirs(timesteps).numpy()).max() < 2e-7


def test_flops_are_counted(checkpoint: Checkpoint) -> None:
    """Twice the products of a convolution, from its shape."""
    found = networks(checkpoint)["global_condition"]
    module = found.module(torch.float32)
    side, expected = checkpoint.sample_size * checkpoint.vae_scale_factor, 0
    for convolution in [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]:
        side //= convolution.stride[0]
        expected += 2 * side * side * convolution.weight.numel()
    cells = checkpoint.sample_size // 4
    assert flops_per_row(found, module, {"height": cells, "width": cells}) == expected


@pytest.mark.slow
def test_half_precision_opset_23(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The graphs that GPU backends read: native Attention and GroupNormalization, half weights, same parity rule."""
    import onnx

    found = networks(checkpoint)["local_branch"]
    form, limits = OnnxForm(23, "fp16"), Limits.of_requests(2, 2, 8)
    module = found.module(form.dtype)
    to_onnx(found, module, form, limits, tmp_path / "branch.onnx")
    graph = onnx.load(str(tmp_path / "branch.onnx")).graph
    kinds = {node.op_type for node in graph.node}
    assert {"Attention", "GroupNormalization"} <= kinds and "Softmax" not in kinds
    wide = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert wide == []
    assert verify(found, module, tmp_path / "branch.onnx", form, limits).ratio < 4


def test_shapes_tried_differ_in_every_dynamic_dimension() -> None:
    small, large = parity_shapes(Limits.of_requests(2, 2, 8, (77, 109)))
    assert all(small[unit] != large[unit] for unit in small) and large["height"] != large["width"]
    assert (small["tokens"], large["tokens"]) == (77, 109)
    assert not any("tokens" in units for units in parity_shapes(Limits.of_requests(2, 2, 8)))


@pytest.mark.slow
def test_stable_diffusion_1_5_topology(tmp_path: Path) -> None:
    """One text encoder, no added conditions, four levels, thirteen residuals: built, verified and run all the same."""
    from realisid_trt import Engine, Person

    make_checkpoint(tmp_path / "sd15", family="sd15")
    result = build(Options(checkpoint=tmp_path / "sd15", out=tmp_path / "engine", backends=("onnxruntime",)))
    assert all(figures["ratio"] <= 4 for figures in result["verified"].values())
    engine = Engine.load(tmp_path / "engine")
    assert len(engine.model.residual_levels) == 13 and engine.model.levels == 4 and engine.model.pooled_dim == 0
    assert list(engine.model.tokenizers) == ["text_encoder"]
    side = engine.model.default_size
    person = Person(
        id_tokens=np.zeros((engine.model.num_id_tokens, engine.model.cross_attention_dim)),
        box=(0, 0, side / 2, side / 2),
        pose_image=np.zeros((3, side, side)),
    )
    picture = engine.generate("a beach", [person], num_inference_steps=2).images[0]
    assert picture.size == (side, side)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["text_encoder_2", "id_encoder", "local_condition", "unet_time", "unet_encoder", "unet_decoder", "vae_decoder"],
)
def test_float64_layer_by_layer_is_float64(checkpoint: Checkpoint, name: str) -> None:
    """The truth of the parity gate: bit for bit what a module widened as a whole computes."""
    found = networks(checkpoint)[name]
    inputs = example(found.inputs, {"rows": 2, "timesteps": 2, "height": 3, "width": 2}, torch.float32)
    module, wide = found.module(torch.float32), found.module(torch.float32).double()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    expected = wide(*(value.double() if value.is_floating_point() else value for value in inputs))
    for a, b in zip(in_float64(module, inputs), expected if isinstance(expected, tuple) else [expected], strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
