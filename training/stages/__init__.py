"""What can be trained, each in its own file: which parts of a checkpoint, from which examples, by which loss."""

from .branches import BranchesStage
from .id_encoder import IDEncoderStage
from .judges import AttributesStage, DetectorStage, FacePointsStage, JudgeStage, RecogniserStage
from .stage import Stage
from .text_to_image import TextToImageStage
from .vae import VAEStage

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        VAEStage, IDEncoderStage, TextToImageStage, BranchesStage, RecogniserStage, FacePointsStage, AttributesStage,
        DetectorStage,
    )
}  # fmt: skip

__all__ = ["STAGES", "JudgeStage", "Stage"]
