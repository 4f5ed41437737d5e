"""What draws and prints: the commands of `python -m realisid_trt`, and what all commands do alike."""
