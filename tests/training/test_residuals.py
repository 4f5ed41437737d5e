"""The training's Eqs. (4) to (6), written as matrix products, against the reference's formulas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from export.checkpoint import Checkpoint
from export.truth.reference import Reference, ReferencePerson
from realisid_trt.config import RealisIDConfig
from realisid_trt.errors import CheckpointError
from realisid_trt.persons.boxes import Grid, snap_box
from realisid_trt.persons.conditions import location_mask
from training.diffusion import Diffusion
from training.examples import WorldScenes
from training.residuals import DESIGNS, KEYPOINTS, crop, inside, merged, merged_rows, placement, relocate
from training.stages.branches import BranchesStage
from training.store import OnDemandStore
from training.world import World, draw

BOXES = [(8, 16, 40, 48), (0, 0, 128, 128), (92, 4, 128, 40), (30, 50, 49, 66)]


@pytest.fixture(scope="module")
def checkpoint(built) -> Checkpoint:
    return Checkpoint.open(built["x4"].checkpoint)


@pytest.mark.parametrize(
    ("design", "mode"),
    [("realisid", "bilinear"), ("realisid", "area"), ("local-only", "area"), ("global-only", "bilinear"),
     ("uncropped", "bilinear"), ("boxed", "bilinear")],
)  # fmt: skip
def test_residuals_are_the_references(checkpoint: Checkpoint, design: str, mode: str) -> None:
    """Of RealisID, and of every design that is a table of branches."""
    c, rng = checkpoint, np.random.default_rng(5)
    values = {"branches": DESIGNS[design].rows("zeros"), "relocate_mode": mode, "box_snap": c.config.box_snap}
    reference = Reference(dataclasses.replace(c, config=RealisIDConfig.from_dict(values)), torch.float64)
    grid = Grid(128, 128, c.vae_scale_factor, c.levels, c.config.box_snap or c.vae_scale_factor)
    boxes = [snap_box(box, grid) for box in BOXES]
    noisy = torch.from_numpy(rng.standard_normal((len(BOXES), 4, 32, 32)))
    drawings = torch.from_numpy(rng.random((len(BOXES), 3, 128, 128)))
    tokens = torch.from_numpy(rng.standard_normal((len(BOXES), c.num_id_tokens, c.cross_attention_dim)))
    timestep = torch.tensor([7, 300, 999, 512])
    items = [
        placement(box, c.sample_size, mode) | {f"inside_{level}": inside(box, level) for level in range(c.levels)}
        for box in boxes
    ]
    batch = {name: torch.stack([item[name] for item in items]).double() for name in items[0]}
    batch["pose_image"] = batch["placed_pose"] = drawings
    batch["location_mask"] = torch.stack([torch.from_numpy(location_mask(box.px, 128, 128)) for box in boxes]).double()
    time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]], dtype=torch.float64)
    pooled = torch.zeros(len(BOXES), c.pooled_dim, dtype=torch.float64)
    added = {"text_embeds": pooled, "time_ids": time_ids.repeat(len(BOXES), 1)}
    branches = DESIGNS[design](c, new=False, seed=0).double()
    with torch.no_grad():
        ours = merged([branches(noisy, timestep, tokens, added, batch)])
        for row, box in enumerate(BOXES):
            theirs = reference.branches.residuals(
                noisy[row : row + 1], timestep[row], [ReferencePerson(drawings[row], box)],
                [reference.branches.snap(box, 128, 128)], [tokens[row]], torch.zeros(1),
                {"text_embeds": pooled[:1], "time_ids": time_ids}, {}, (0.0, 1.0),
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


def test_designs_begin_as_the_base_and_are_as_large_as_they_say(checkpoint: Checkpoint) -> None:
    """Zero convolutions: new branches of every design add nothing. The baselines have as many parameters."""
    grid = Grid(128, 128, 4, 3, 4)
    box = snap_box((20, 40, 68, 88), grid)
    landmarks = np.random.default_rng(0).random((478, 2)).astype(np.float32)
    sizes = {}
    for name, design in DESIGNS.items():
        branches = design(checkpoint, new=True, seed=0)
        batch = {key: value[None] for key, value in branches.conditions(box, landmarks, checkpoint).items()}
        added = {"text_embeds": torch.zeros(1, checkpoint.pooled_dim), "time_ids": torch.zeros(1, 6)}
        tokens = torch.randn(1, checkpoint.num_id_tokens, checkpoint.cross_attention_dim)
        with torch.no_grad():
            total = merged([branches(torch.randn(1, 4, 32, 32), torch.tensor([500]), tokens, added, batch)])
        assert len(total) == len(checkpoint.residuals) and all((one == 0).all() for one in total)
        sizes[name] = sum(parameter.numel() for parameter in branches.parameters())
    assert sizes["boxed"] == sizes["uncropped"] == sizes["realisid"]
    assert 0.9 * sizes["realisid"] < sizes["five-keypoints"] <= sizes["realisid"]
    assert sizes["local-only"] + sizes["global-only"] == sizes["realisid"]


def test_a_pose_in_its_place_is_the_drawing_in_the_box(checkpoint: Checkpoint) -> None:
    """The twin's drawing lies in the box, and the five keypoints are five discs there."""
    box = snap_box((64, 32, 128, 96), Grid(128, 128, 4, 3, 4))
    world = World()
    points = draw(world.reference(world.identity(0)), 128).landmarks[0].astype(np.float32)
    for name, key in (("uncropped", "placed_pose"), ("five-keypoints", "keypoints")):
        drawn = DESIGNS[name](checkpoint, new=True, seed=0).conditions(box, points, checkpoint)[key]
        inside = drawn[:, 32:96, 64:128].sum()
        assert inside > 0.9 * drawn.sum() > 0, name
    assert len(KEYPOINTS) == 5


def test_the_boxed_twin_is_the_twin_in_the_box_and_nothing_around(checkpoint: Checkpoint) -> None:
    """Where the full model's local branch writes: at every level in the cells that its residuals are relocated to."""
    box = snap_box((20, 40, 48, 68), Grid(128, 128, 4, 3, 4))
    landmarks = np.random.default_rng(0).random((478, 2)).astype(np.float32)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 32, 32, generator=generator)
    tokens = torch.randn(1, checkpoint.num_id_tokens, checkpoint.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.zeros(1, checkpoint.pooled_dim), "time_ids": torch.zeros(1, 6)}
    found = {}
    for name in ("uncropped", "boxed"):
        branches = DESIGNS[name](checkpoint, new=True, seed=0)
        torch.manual_seed(0)
        for branch in branches.children():
            for parameter in branch.parameters():  # zero convolutions too
                torch.nn.init.normal_(parameter, std=0.1)
        batch = {key: value[None] for key, value in branches.conditions(box, landmarks, checkpoint).items()}
        with torch.no_grad():
            found[name] = branches(noisy, torch.tensor([500]), tokens, added, batch)
    levels = [level for _, level in checkpoint.residuals]
    full = {key: value[None] for key, value in placement(box, 32, "bilinear").items()}
    for whole, kept, level in zip(found["uncropped"]["local"], found["boxed"]["local"], levels, strict=True):
        written = relocate(torch.ones(1, 1, *[32 >> level] * 2), level, full).round()
        assert torch.equal(kept, whole * written) and 0 < written.sum() < written.numel()
        assert (whole * (1 - written)).abs().max() > 0
    for one, other in zip(found["uncropped"]["global"], found["boxed"]["global"], strict=True):
        assert torch.equal(one, other)


def test_pictures_with_different_numbers_of_persons_are_merged_each_by_itself() -> None:
    counts, generator = [1, 3, 2], torch.Generator().manual_seed(0)
    picture = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    shapes = {"local": [(6, 4, 8, 8), (6, 8, 4, 4)], "global": [(6, 4, 8, 8), (6, 8, 4, 4)]}
    found = {part: [torch.randn(shape, generator=generator) for shape in all_] for part, all_ in shapes.items()}
    ours = merged_rows(found, picture, torch.tensor(counts))
    for number, first in enumerate((0, 1, 4)):
        people = range(first, first + counts[number])
        alone = merged([{part: [one[[row]] for one in levels] for part, levels in found.items()} for row in people])
        for one, other in zip(ours, alone, strict=True):
            assert torch.allclose(one[[number]], other, atol=1e-6)


def test_everybody_in_a_picture_is_conditioned_on_and_nobody_else(checkpoint: Checkpoint) -> None:
    people = WorldScenes(pictures=40, crop_px=checkpoint.image_size, margin=checkpoint.config.face_margin)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    stage = BranchesStage(checkpoint, OnDemandStore(people), accelerator, new=False, seed=0)
    counts = [int(stage.store["num_persons"][index]) for index in range(40)]
    items = [stage.item(counts.index(count), np.random.default_rng(count)) for count in (1, 3, 2)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    batch |= {"drop_id": torch.zeros(3, dtype=torch.bool), "drop_text": torch.zeros(3, dtype=torch.bool)}
    assert batch["num_persons"].tolist() == [1, 3, 2] and batch["each.id_pixels"].shape[:2] == (3, 3)
    faces = batch["each.face"].amax(1).flatten(1).sum(1)
    assert (faces > batch["each.face"][:, 0].flatten(1).sum(1)).tolist() == [False, True, True]

    def predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return stage._predict(batch["latents"], batch)

    together = predicted(batch)
    for row in range(3):
        alone = predicted({name: value[row : row + 1] for name, value in batch.items()})
        assert torch.allclose(together[row], alone[0], atol=1e-4)
    for row, person, matters in ((0, 1, False), (2, 2, False), (1, 2, True), (2, 1, True)):
        other = batch["each.id_pixels"].clone()
        other[row, person] = torch.randn(other.shape[2:], generator=torch.Generator().manual_seed(1))
        difference = (predicted({**batch, "each.id_pixels": other}) - together).abs().flatten(1).amax(1)
        assert (difference > 1e-4).tolist() == [matters and row == one for one in range(3)]


def test_a_network_that_predicts_clean_latents_is_not_trained(checkpoint: Checkpoint) -> None:
    """Its loss would be that of ε, which it does not predict."""
    assert not Diffusion(checkpoint).velocity
    other = dataclasses.replace(
        checkpoint, scheduler_config={**checkpoint.scheduler_config, "prediction_type": "sample"}
    )
    with pytest.raises(
        CheckpointError, match="scheduler_config.json says prediction_type sample. Networks that predic"
    ):
        Diffusion(other)
