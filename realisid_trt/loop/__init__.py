"""The picture line of the data: prompts, people and noise → latents → pictures.

begin.py: prompt.py, samplers.py, noise.py, planning.py (rows.py) ─► prologue.py
    ─► work.py ─► passes.py: denoise.py, in every step ─► finish.py: picture.py
"""
