"""The training's Eqs. (4) to (6), which are one matrix product after another, against the reference's words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint
from export.reference import Reference, ReferencePerson
from realisid_trt.boxes import Grid, snap_box
from realisid_trt.conditions import location_mask
from training.residuals import Branches, crop, placement, relocate

BOXES = [(8, 16, 40, 48), (0, 0, 128, 128), (92, 4, 128, 40), (30, 50, 49, 66)]


@pytest.fixture(scope="module")
def checkpoint(built) -> Checkpoint:
    return Checkpoint.open(built["x4"].checkpoint)


@pytest.mark.parametrize("mode", ["bilinear", "area"])
def test_residuals_are_the_references(checkpoint: Checkpoint, mode: str) -> None:
    reference = Reference(checkpoint, torch.float64)
    object.__setattr__(reference.config, "relocate_mode", mode)
    c, rng = checkpoint, np.random.default_rng(5)
    grid = Grid(128, 128, c.vae_scale_factor, c.levels, c.config.box_snap or c.vae_scale_factor)
    boxes = [snap_box(box, grid) for box in BOXES]
    noisy = torch.from_numpy(rng.standard_normal((len(BOXES), 4, 32, 32)))
    drawings = torch.from_numpy(rng.random((len(BOXES), 3, 128, 128)))
    tokens = torch.from_numpy(rng.standard_normal((len(BOXES), c.num_id_tokens, c.cross_attention_dim)))
    timestep = torch.tensor([7, 300, 999, 512])
    items = [placement(box, c.sample_size, mode) for box in boxes]
    batch = {name: torch.stack([item[name] for item in items]).double() for name in items[0]}
    batch["pose_image"] = drawings
    batch["location_mask"] = torch.stack([torch.from_numpy(location_mask(box.px, 128, 128)) for box in boxes]).double()
    added = {
        "text_embeds": torch.zeros(len(BOXES), c.pooled_dim, dtype=torch.float64),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]], dtype=torch.float64).repeat(len(BOXES), 1),
    }
    branches = Branches(
        reference.local_controlnet, reference.global_controlnet, tuple(level for _, level in c.residuals)
    )
    with torch.no_grad():
        ours = branches.residuals(noisy, timestep, tokens, added, batch)
        for row, box in enumerate(BOXES):
            theirs = reference.residuals(
                noisy[row : row + 1], timestep[row], [ReferencePerson(drawings[row], box)],
                [reference.snap(box, 128, 128)], [tokens[row]], {key: value[:1] for key, value in added.items()},
                (1.0, 1.0), (128, 128),
            )  # fmt: skip
            for one, other in zip(ours, theirs, strict=True):
                # The matrices are float32 and the sum is: a millionth of the largest is 8 roundings.
                error = (one[row] - other[0]).abs().max() / other.abs().max()
                assert error < 1e-6, (row, one.shape, float(error))


def test_a_whole_box_is_an_identity() -> None:
    grid = Grid(64, 64, 4, 3, 4)
    batch = {name: value[None] for name, value in placement(snap_box((0, 0, 64, 64), grid), 16, "bilinear").items()}
    whole = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(crop(whole, batch), whole) and torch.equal(relocate(whole, 0, batch), whole)


def test_gradients_come_from_the_box_alone() -> None:
    grid = Grid(64, 64, 4, 3, 4)
    box = snap_box((8, 16, 32, 40), grid)
    batch = {name: value[None] for name, value in placement(box, 16, "area").items()}
    latents = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    relocate(crop(latents, batch), 0, batch).sum().backward()
    assert latents.grad is not None
    x0, y0, x1, y1 = box.cells(0)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    assert (latents.grad[..., ~inside] == 0).all() and (latents.grad[..., inside] != 0).any()
    # R(crop(·)) keeps constants inside the box: its rows sum to 1
    constant = relocate(crop(torch.ones(1, 1, 16, 16), batch), 0, batch)[0, 0]
    assert torch.allclose(constant, inside.float(), atol=1e-6)
