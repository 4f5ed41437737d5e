"""The picture line of the data: prompts, people and noise → latents → pictures.

prompt.py, samplers.py, noise.py, planning.py (rows.py) ─► prologue.py ─► denoise.py ─► picture.py
"""
