"""The commands of `python -m realisid_trt`: they draw and print. Beside them, the parts that all commands share."""
