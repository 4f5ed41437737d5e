"""The picture line of the data: prompts, people and noise → latents → pictures.

prompt.py, rows.py, samplers.py, noise.py ─► prologue.py ─► denoise.py ─► picture.py
"""
