"""The judges: small nets that look at pictures of the world and say who is there, where, with which face, in what.

They are convolutional nets of their own, trained on true renders with seeds of their own and frozen before the branches
are trained: what they say of a generated picture is no echo of what made it. The recogniser shares neither weights nor
architecture nor seed nor people with the identity encoder. The people of the evaluation were seen by none of them.
"""

from .nets import JUDGES, Attributes, Detector, FacePoints, Recogniser, load_judge

__all__ = ["JUDGES", "Attributes", "Detector", "FacePoints", "Recogniser", "load_judge"]
