"""The U-Nets of the library diffusers as vector fields for images."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import Tensor, nn

from cnf.fields.base import FIELDS, VectorField
from cnf.nets import attention_kernel


@FIELDS.register("diffusers")
class DiffusersField(VectorField):
    """A `UNet2DModel` or `UNet2DConditionModel` of diffusers as a vector field.

    The network gets the time in multiples of 1/`time_scale`, as its embedding of time resolves
    the whole numbers up to 1000. A trained linear map turns the context into what the network is
    conditioned on: the embedding of a class, or one token of the cross-attention.

    The extra `images` installs diffusers. The network starts with its own weights: set those of
    `net.conv_out` to zero for a flow that starts as the identity.

    Source: https://huggingface.co/docs/diffusers.

    Args:
        net: The network, with as many output channels as input channels. A `UNet2DModel` accepts
            a context if it is built with class_embed_type="identity".
        shape: Shape of an image, (C, H, W).
        context_dim: Size of the context; 0 for none. A `UNet2DConditionModel` requires one.
        time_scale: What t = 1 is for the network.

    Raises:
        ValueError: The network does not fit the shape or the context.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        context_dim: int = 0,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__(shape, context_dim)
        self.attends = "encoder_hidden_states" in signature(net.forward).parameters
        _check(net, self.event_shape, context_dim, self.attends)
        self.net, self.time_scale = net, time_scale
        config: Any = net.config
        size = config.cross_attention_dim if self.attends else _embedding_size(config)
        self.embed = nn.Linear(context_dim, size) if context_dim else None

    def extra_repr(self) -> str:
        return f"{type(self.net).__name__}, {super().extra_repr()}"

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, event = x.shape[:-3], x.shape[-3:]
        images = x.reshape(-1, *event)
        time = self.time_scale * t.to(x.dtype).expand(batch).reshape(-1)
        condition = {}
        if self.embed is not None and context is not None:
            embedded = self.embed(context).expand(*batch, -1).reshape(len(images), -1)
            name = "encoder_hidden_states" if self.attends else "class_labels"
            condition[name] = embedded.unsqueeze(1) if self.attends else embedded
        with attention_kernel(x):
            v = self.net(images, time, **condition, return_dict=False)[0]
        return v.reshape(*batch, *event)


def _embedding_size(config: Any) -> int:
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


def _check(net: nn.Module, shape: Sequence[int], context_dim: int, attends: bool) -> None:
    if len(shape) != 3:
        raise ValueError(f"DiffusersField: expected a shape (C, H, W), got {tuple(shape)}")
    name, config = type(net).__name__, net.config
    channels = (config.in_channels, config.out_channels)  # pyright: ignore
    if channels != (shape[0], shape[0]):
        raise ValueError(
            f"DiffusersField: expected {name} with {shape[0]} input and output channels, as "
            f"images of {tuple(shape)} have, got {channels}"
        )
    if attends and not context_dim:
        raise ValueError(
            f"DiffusersField: expected context_dim > 0, since {name} attends to a context, got 0; "
            "take a UNet2DModel for an unconditional field"
        )
    classes = (config.class_embed_type, config.num_class_embeds)  # pyright: ignore
    wanted = ("identity", None) if context_dim and not attends else (None, None)
    if classes != wanted:
        raise ValueError(
            f"DiffusersField: expected {name} with class_embed_type={wanted[0]!r} and "
            f"num_class_embeds=None for context_dim={context_dim}, got {classes[0]!r} and "
            f"{classes[1]}"
        )
