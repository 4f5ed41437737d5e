"""ArcFace face encoders as torch modules, with the key names of their published weights.

ir_se50, which ID-Patch was trained with: TreB1eN/InsightFace_Pytorch and facexlib (MIT). iresnet50 and iresnet100:
deepinsight/insightface, recognition/arcface_torch. Deng et al., "ArcFace" (CVPR 2019); squeeze-excite: Hu et al.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, OUTPUT = 112, 512  # side of an aligned face, px; numbers of an embedding
REDUCTION = 16  # of the squeeze-excite


@dataclass(frozen=True)
class Architecture:
    """A face encoder by its sizes.

    squeezed: ir_se: squeeze-excite in every block, embeddings of length 1. Else iresnet: raw embeddings.
    blocks:   number in each of the four stages. widths: channels of the first convolution and of each stage.
    """

    name: str
    squeezed: bool
    blocks: tuple[int, ...]
    widths: tuple[int, ...] = (64, 64, 128, 256, 512)

    def module(self) -> IrSe | IResNet:
        """The torch module, with fresh weights and in evaluation mode: its batch norms use what training measured."""
        return (IrSe if self.squeezed else IResNet)(self.blocks, self.widths).eval()


ARCHITECTURES = (
    Architecture("ir_se50", True, (3, 4, 14, 3)),
    Architecture("iresnet50", False, (3, 4, 14, 3)),
    Architecture("iresnet100", False, (3, 13, 30, 3)),
)


class SqueezeExcite(nn.Module):
    """Every channel times a factor in (0, 1) that follows from the means of all channels. (B, C, h, w) → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // REDUCTION, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // REDUCTION, channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        means = features.mean((2, 3), keepdim=True)
        return features * torch.sigmoid(self.fc2(F.relu(self.fc1(means))))


class IrSeBlock(nn.Module):
    """(B, C, h, w) → (B, width, h/stride, w/stride). Without a batch norm between first convolution and PReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if channels == width else _shortcut(channels, width, stride)
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            SqueezeExcite(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.res_layer(features) + self.shortcut_layer(features)
        return out


class IrSe(nn.Module):
    """ir_se50. (B, 3, 112, 112) → (B, 512) of length 1."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        self.body = nn.Sequential(
            *(
                IrSeBlock(widths[stage] if number == 0 else width, width, 2 if number == 0 else 1)
                for stage, (count, width) in enumerate(zip(blocks, widths[1:], strict=True))
                for number in range(count)
            )
        )
        # Dropout, 1, does nothing here; positions are part of the key names.
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.Dropout(), nn.Flatten(),
            nn.Linear(widths[-1] * (SIZE // 16) ** 2, OUTPUT), nn.BatchNorm1d(OUTPUT),
        )  # fmt: skip

    def forward(self, face: Tensor) -> Tensor:
        raw = self.output_layer(self.body(self.input_layer(face)))
        embedding: Tensor = raw / torch.linalg.vector_norm(raw, dim=1, keepdim=True)
        return embedding


class IResNetBlock(nn.Module):
    """(B, C, h, w) → (B, width, h/stride, w/stride)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride) if stride > 1 or channels != width else None

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.prelu(self.bn2(self.conv1(self.bn1(features))))
        out = self.bn3(self.conv2(out))
        return out + (features if self.downsample is None else self.downsample(features))


class IResNet(nn.Module):
    """iresnet50, iresnet100. (B, 3, 112, 112) → (B, 512) raw."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                *(
                    IResNetBlock(widths[stage] if number == 0 else width, width, 2 if number == 0 else 1)
                    for number in range(count)
                )
            )
            for stage, (count, width) in enumerate(zip(blocks, widths[1:], strict=True))
        )
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1] * (SIZE // 16) ** 2, OUTPUT)
        self.features = nn.BatchNorm1d(OUTPUT)

    def forward(self, face: Tensor) -> Tensor:
        out = self.prelu(self.bn1(self.conv1(face)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        embedding: Tensor = self.features(self.fc(self.bn2(out).flatten(1)))
        return embedding


def architecture_of(keys: Iterable[str]) -> Architecture | None:
    """The architecture whose weights have these keys, as far as family and number of blocks go; None for another."""
    names = set(keys)
    squeezed = "input_layer.0.weight" in names and "body.0.res_layer.5.fc1.weight" in names
    blocks: tuple[int, ...]
    if squeezed:
        blocks = (_count(names, r"body\.(\d+)\."),)
    elif "conv1.weight" in names and "layer1.0.bn1.weight" in names:
        blocks = tuple(_count(names, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
    else:
        return None
    for architecture in ARCHITECTURES:
        ours = (sum(architecture.blocks),) if squeezed else architecture.blocks
        if architecture.squeezed == squeezed and ours == blocks:
            return architecture
    return None


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number in the names that begin so; 0 without any."""
    return max((int(found[1]) + 1 for name in names if (found := re.match(pattern, name))), default=0)


def _shortcut(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
