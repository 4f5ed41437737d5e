"""The judges: small nets that measure identity, location, pose and attributes in pictures of the world.

They are separate convolutional nets, trained on true renders only, with their own seeds, so their measures of a
generated picture do not depend on its maker. The recogniser was frozen before the branches were trained, and shares
neither weights nor architecture nor seed nor people with the identity encoder. None of them was trained on the people
of the evaluation.
"""

from .nets import JUDGES, Attributes, Detector, FacePoints, Recogniser, load_judge

__all__ = ["JUDGES", "Attributes", "Detector", "FacePoints", "Recogniser", "load_judge"]
