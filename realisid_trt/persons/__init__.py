"""The face line of the data: a photo → a face → an identity, a pose and a place in the picture.

photo.py ─► faces/ ─► identity.py, conditions.py, bodies.py ─► people.py
"""
