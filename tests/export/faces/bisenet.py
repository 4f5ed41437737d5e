"""BiSeNet for face parsing with random weights, from its description (Yu et al. 2018), to export an honest ONNX file.

The layout of the public face-parsing weights: a ResNet-18 whose 1/8 features serve as the spatial path, attention
refinement at 1/16 and 1/32, fusion at 1/8, and three heads, of which the last two are auxiliary. 13.3 M parameters.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

NUM_CLASSES, SIZE = 19, 512


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.second(self.first(features)) + self.shortcut(features))


class Refinement(nn.Module):
    """Attention refinement: channels weighed by their global mean."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvNorm(inputs, outputs)
        self.weigh = nn.Sequential(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        features = self.conv(features)
        return features * self.weigh(features.mean((2, 3), keepdim=True))


class Fusion(nn.Module):
    """Feature fusion of the spatial and the context path."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, channels, 1)
        self.weigh = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        features = self.conv(torch.cat([spatial, context], dim=1))
        return features * self.weigh(features.mean((2, 3), keepdim=True)) + features


class BiSeNet(nn.Module):
    """(B, 3, 512, 512) normalised RGB → logits (B, 19, 512, 512), then the two auxiliary heads'."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.ModuleList()
        for inputs, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
            self.layers.append(nn.Sequential(Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)))
        self.refine16, self.refine32 = Refinement(256, 128), Refinement(512, 128)
        self.global_context = ConvNorm(512, 128, 1)
        self.smooth16, self.smooth32 = ConvNorm(128, 128), ConvNorm(128, 128)
        self.fusion = Fusion()
        self.head = nn.Sequential(ConvNorm(256, 256), nn.Conv2d(256, NUM_CLASSES, 1))
        self.auxiliary16 = nn.Sequential(ConvNorm(128, 64), nn.Conv2d(64, NUM_CLASSES, 1))
        self.auxiliary32 = nn.Sequential(ConvNorm(128, 64), nn.Conv2d(64, NUM_CLASSES, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.layers[0](self.stem(image))
        features8 = self.layers[1](features)
        features16 = self.layers[2](features8)
        features32 = self.layers[3](features16)
        everywhere = self.global_context(features32.mean((2, 3), keepdim=True))
        context32 = self.smooth32(F.interpolate(self.refine32(features32) + everywhere, scale_factor=2.0))
        context16 = self.smooth16(F.interpolate(self.refine16(features16) + context32, scale_factor=2.0))
        heads = (
            self.head(self.fusion(features8, context16)),
            self.auxiliary16(context16),
            self.auxiliary32(context32),
        )
        first, second, third = (
            F.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=True) for logits in heads
        )
        return first, second, third


def random_bisenet(example: Tensor, seed: int = 0) -> BiSeNet:
    """A net whose 19 classes all occur on `example` (1, 3, 512, 512): each logit is shifted to mean zero there."""
    torch.manual_seed(seed)
    net = BiSeNet().eval()
    with torch.no_grad():
        logits = net(example)[0]
        last = net.head[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        last.bias -= logits.mean((0, 2, 3))
        scale = logits.std((0, 2, 3))
        last.weight /= scale[:, None, None, None]
        last.bias /= scale
    return net


def export_bisenet(net: BiSeNet, path: Path) -> None:
    """Exports it as its users do: another input name, all three outputs, weights in a file beside `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about torch
        torch.onnx.export(
            net,
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(path),
            input_names=["input"],
            output_names=["out", "out16", "out32"],
            dynamo=True,
            verbose=False,
            external_data=True,
        )
