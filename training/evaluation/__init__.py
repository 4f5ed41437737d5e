"""The paper's evaluation in miniature: cases, contenders that make pictures, the judges' measures, and statistics.

cases.py ─► contenders.py ─► measures.py ─► ../statistics.py
"""
