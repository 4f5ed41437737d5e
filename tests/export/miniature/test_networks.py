"""Claims about the random networks: nothing in them is dead, nothing explodes."""

from __future__ import annotations

import pytest
import torch

from export.checkpoint import Checkpoint
from tests.export.miniature.sampler import Sampler, rms


@torch.no_grad()
def test_prompt_id_pose_and_box_all_change_the_prediction(checkpoint: Checkpoint) -> None:
    s = Sampler(checkpoint)
    latents = torch.randn(1, 4, s.side, s.side, generator=torch.Generator().manual_seed(0))
    texts, tokens = [s.text("two friends hiking"), s.text("a man at night")], [s.id_tokens(1), s.id_tokens(2), s.null]
    rows = [(0, 0), (1, 0), (0, 1), (0, 2)]  # (text, ID)
    first, second = (4, 4, 12), (16, 16, 12)
    base, *others = s.predict(latents, 500, [texts[i] for i, _ in rows], [tokens[j] for _, j in rows], s.pose(1), first)
    changed = dict(zip(("prompt", "ID", "null ID"), others, strict=True))
    changed["pose"] = s.predict(latents, 500, texts[:1], tokens[:1], s.pose(2), first)[0]
    changed["box"] = s.predict(latents, 500, texts[:1], tokens[:1], s.pose(1), second)[0]
    assert 0.3 < rms(base) < 3
    for what, other in changed.items():
        change = rms(other - base) / rms(base)
        assert change >= 0.01, f"another {what} changes the prediction by {change:.2%}"


@torch.no_grad()
def test_residuals_are_a_tenth_to_all_of_the_skips(checkpoint: Checkpoint) -> None:
    s = Sampler(checkpoint)
    latents = torch.randn(1, 4, s.side, s.side, generator=torch.Generator().manual_seed(0))
    skips: list[torch.Tensor] = []
    s.unet.conv_in.register_forward_hook(lambda module, args, out: skips.append(out))
    for block in s.unet.down_blocks:
        block.register_forward_hook(lambda module, args, out: skips.extend(out[1]))
    s.unet.mid_block.register_forward_hook(lambda module, args, out: skips.append(out))
    text, pooled = s.text("two friends hiking")
    s.unet(latents, 500, text, **s.added(pooled))
    local, _ = s.residuals(latents, 500, s.id_tokens(1), s.pose(1), (0, 0, s.side))
    assert len(local) == len(skips) == len(checkpoint.residuals)
    for residual, skip in zip(local, skips, strict=True):
        assert 0.1 <= rms(residual) / rms(skip) <= 1


@pytest.mark.slow
@torch.no_grad()
def test_thirty_steps_of_ddim_stay_finite_and_small(checkpoint: Checkpoint) -> None:
    s, config = Sampler(checkpoint), checkpoint.config
    scheduler = checkpoint.load_scheduler()
    scheduler.set_timesteps(config.num_inference_steps)
    latents = torch.randn(1, 4, s.side, s.side, generator=torch.Generator().manual_seed(0))
    texts, pose, box = [s.text(None), *[s.text("two friends hiking")] * 2], s.pose(1), (4, 4, 12)
    tokens = [s.null, s.null, s.id_tokens(1)]
    for i, t in enumerate(scheduler.timesteps.tolist()):
        rows = 3 if i > 0.3 * config.num_inference_steps else 2
        none, text, *full = s.predict(latents, t, texts[:rows], tokens[:rows], pose, box)
        guided = none + config.guidance_scale * (text - none)
        if full:
            guided = guided + config.id_guidance_scale * (full[0] - text)
        latents = scheduler.step(guided[None], t, latents, eta=0.0).prev_sample
    # A trained model ends with an RMS of 1, a random ε that ignores its input at 1/√ᾱ_T: about 14 to 20.
    assert rms(latents) < 14
    vae = s.checkpoint.load_vae()
    picture = vae.decode(latents / vae.config.scaling_factor).sample
    assert picture.shape[-1] == s.side * s.checkpoint.vae_scale_factor
    assert 0.1 < rms(picture) < 1.5
