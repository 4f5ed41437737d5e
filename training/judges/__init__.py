"""The judges: small nets that look at pictures of the world and say who is there, where, with which face, in what.

They are convolutional nets of their own, trained on true renders alone, with seeds of their own: what they say of a
generated picture is no echo of what made it. The recogniser was frozen before the branches were trained, and shares
neither weights nor architecture nor seed nor people with the identity encoder. None of them saw the people of the
evaluation.
"""

from .nets import JUDGES, Attributes, Detector, FacePoints, Recogniser, load_judge

__all__ = ["JUDGES", "Attributes", "Detector", "FacePoints", "Recogniser", "load_judge"]
