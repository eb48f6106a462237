"""The encoder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_amortized.checks import check_count, check_flag, check_function, check_widths
from pyro_amortized.encoders.checks import check_inputs
from pyro_amortized.encoders.layers import hidden_layers
from pyro_amortized.encoders.standardize import Standardize, StandardizedEncoder

__all__ = ["ConvEncoder"]


class ConvEncoder(StandardizedEncoder):
    r"""A convolutional network over images of any size.

    Each convolution halves height and width and is normalised over the image; the last feature map is averaged over the
    cells of a grid, so that it knows where things are, and goes through a multilayer perceptron.

    Args:
        channels: Number of channels of an image C, summed over the inputs if there are several.
        conv_dims: Numbers of channels after each convolution.
        hidden_dims: Widths of the layers after the convolutions; the last one is the number of features H.
        kernel_size: Height and width of the kernels, an odd number.
        grid: Numbers of rows and of columns of the grid.
        activation: Constructor of the activation after each layer.
        standardize: Whether to shift and scale each channel with the mean and deviation over all pixels of the data of
            the guide's ``setup``.

    Raises:
        ValueError: If a size is none.

    Example:
        >>> encoder = ConvEncoder(3)
        >>> encoder(torch.zeros(5, 3, 28, 28)).shape
        torch.Size([5, 200])

    References:
        Gradient-based learning applied to document recognition, Yann LeCun, Leon Bottou, Yoshua Bengio, Patrick Haffner
        (1998).

        Group Normalization, Yuxin Wu, Kaiming He (2018), https://arxiv.org/abs/1803.08494
    """

    def __init__(
        self,
        channels: int,
        *,
        conv_dims: Sequence[int] = (32, 64),
        hidden_dims: Sequence[int] = (200,),
        kernel_size: int = 3,
        grid: int = 4,
        activation: Callable[[], nn.Module] = nn.SiLU,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        self.channels = check_count("channels", channels, 1)
        conv_dims = check_widths("conv_dims", conv_dims, least=1)
        hidden_dims = check_widths("hidden_dims", hidden_dims, least=1)
        kernel_size, grid = check_count("kernel_size", kernel_size, 1, 3), check_count("grid", grid, 1, 4)
        check_function(
            "activation", activation, "the class of an activation, or a function that makes one", "torch.nn.SiLU"
        )
        check_flag("standardize", standardize)
        self.standardize = Standardize(self.channels) if standardize else None
        layers: list[nn.Module] = []
        for before, after in pairwise((self.channels, *conv_dims)):
            conv = nn.Conv2d(before, after, kernel_size, stride=2, padding=kernel_size // 2)
            layers += [conv, nn.GroupNorm(1, after), activation()]
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid))
        self.layers = hidden_layers(conv_dims[-1] * grid**2, hidden_dims, activation)

    def _images(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The images ``(N, C, height, width)``."""
        check_inputs(self, inputs, 3)
        images = [x.unsqueeze(1) if x.dim() == 3 else x for x in inputs]
        alike = all(x.dim() == 4 and x.shape[2:] == images[0].shape[2:] for x in images)
        if not alike or sum(x.shape[1] for x in images) != self.channels:
            raise ValueError(
                f"Cannot encode inputs of shapes {[tuple(x.shape) for x in inputs]} by ConvEncoder({self.channels}) "
                f"because images (N, {self.channels}, height, width) are wanted; try "
                f"encoder_input=lambda ...: x.reshape(-1, {self.channels}, height, width), or a ConvEncoder of as many "
                "channels as there are."
            )
        dtype = next(self.parameters()).dtype
        return torch.cat([x.to(dtype) for x in images], 1)

    def fit(self, *inputs: Tensor) -> None:
        """Takes the standardisation from images ``(N, C, height, width)``."""
        images = self._images(inputs)
        if self.standardize is not None:
            self.standardize.fit(images.movedim(1, -1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of images.

        Args:
            *inputs: Images ``(N, C, height, width)``, or ``(N, height, width)`` of one channel; several are stacked
                channel by channel.

        Returns:
            Features ``(N, H)``.
        """
        x = self._images(inputs)
        if self.standardize is not None:
            x = self.standardize(x.movedim(1, -1)).movedim(-1, 1)
        return self.layers(self.convolutions(x).flatten(1))
