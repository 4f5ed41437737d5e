"""Measurements: latency against an honest baseline. A figure comes with hardware, versions and the exact command."""
