"""The paper's evaluation in miniature: what is asked for, who makes it, what the judges say, and how sure that is.

cases.py ─► contenders.py ─► measures.py ─► ../statistics.py
"""
