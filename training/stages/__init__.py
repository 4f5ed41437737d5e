"""The trainings, each in its own file: the parts of a checkpoint, the examples and the loss."""

from .branches import (
    BoxedStage,
    BranchesStage,
    FiveKeypointsStage,
    GlobalOnlyStage,
    LocalOnlyStage,
    UncroppedStage,
)
from .id_encoder import IDEncoderStage
from .judges import AttributesStage, DetectorStage, FacePointsStage, RecogniserStage
from .stage import Stage
from .text_to_image import TextToImageStage
from .vae import VAEFacesStage, VAEStage

_ALL: tuple[type[Stage], ...] = (
    VAEStage, VAEFacesStage, TextToImageStage, IDEncoderStage,
    BranchesStage, LocalOnlyStage, GlobalOnlyStage, UncroppedStage, BoxedStage, FiveKeypointsStage,
    RecogniserStage, FacePointsStage, AttributesStage, DetectorStage,
)  # fmt: skip
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in _ALL}

__all__ = ["STAGES", "Stage"]
