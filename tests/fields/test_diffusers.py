"""Networks of diffusers as fields: by a stand-in with their signatures, and the real ones."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cnf.fields import DiffusersField, exact_divergence

F64 = torch.float64


class UNet2DModel(nn.Module):
    """3x + t + Σ of the class embedding, by the signature of diffusers."""

    def __init__(self, channels=1, embed_type=None, classes=None):
        super().__init__()
        self.config = SimpleNamespace(
            in_channels=channels, out_channels=channels, class_embed_type=embed_type,
            num_class_embeds=classes, time_embedding_dim=None, block_out_channels=(2, 4),
        )  # fmt: skip
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert timestep.shape == sample.shape[:1] and sample.dim() == 4
        v = self.weight * sample + timestep.reshape(-1, 1, 1, 1)
        if class_labels is not None:
            assert class_labels.shape == (len(sample), 8)  # 4 × block_out_channels[0]
            v = v + class_labels.sum(-1).reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=v) if return_dict else (v,)


class UNet2DConditionModel(UNet2DModel):
    """The same with Σ of the tokens."""

    def __init__(self):
        super().__init__()
        self.config.cross_attention_dim = 5

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        assert encoder_hidden_states.shape == (len(sample), 1, 5)
        v = super().forward(sample, timestep, return_dict=False)[0]
        return (v + encoder_hidden_states.sum((1, 2)).reshape(-1, 1, 1, 1),)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("own_time", [False, True])
@pytest.mark.parametrize(
    ("net", "context"),
    [
        (lambda: UNet2DModel(), 0),
        (lambda: UNet2DModel(embed_type="identity"), 2),
        (lambda: UNet2DConditionModel(), 2),
    ],
    ids=["unconditional", "class embedding", "cross-attention"],
)
def test_net_gets_time_in_thousandths_and_the_embedded_context(
    net, context, batch, own_time, points
):
    field = DiffusersField(net(), (1, 2, 2), context).double()
    t, x, c = points(field, batch, own_time)
    expected = 3 * x + 1000 * t[..., None, None, None]
    if c is not None:
        expected = expected + field.embed(c).sum(-1)[..., None, None, None]
    v, div = exact_divergence(field, t, x, c)
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(div, torch.full(batch, 3.0 * 4, dtype=F64))
    assert (field.embed is None) == (not context)
    assert repr(field).startswith(f"DiffusersField({type(field.net).__name__}, (1, 2, 2)")


@pytest.mark.parametrize(
    ("net", "shape", "context", "message"),
    [
        (UNet2DModel(), (2, 2), 0, r"expected a shape \(C, H, W\)"),
        (UNet2DModel(3), (1, 2, 2), 0, r"with 1 input and output channels.* got \(3, 3\)"),
        (UNet2DModel(), (1, 2, 2), 2, "class_embed_type='identity' .* got None and None"),
        (UNet2DModel(classes=10), (1, 2, 2), 0, "class_embed_type=None .* got None and 10"),
        (UNet2DConditionModel(), (1, 2, 2), 0, "expected context_dim > 0, .*take a UNet2DModel"),
    ],
)
def test_net_that_does_not_fit_is_refused(net, shape, context, message):
    with pytest.raises(ValueError, match=message):
        DiffusersField(net, shape, context)


@pytest.mark.filterwarnings("ignore")  # those of other libraries
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("attends", [False, True], ids=["UNet2DModel", "UNet2DConditionModel"])
def test_nets_of_diffusers_have_exact_divergence_and_gradients(
    attends, context, points, autograd_divergence
):
    diffusers = pytest.importorskip("diffusers")
    small = {"in_channels": 1, "out_channels": 1, "sample_size": 2, "block_out_channels": (4, 4)}
    small |= {"layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}
    if attends and not context:
        pytest.skip("it requires a context")
    if attends:
        down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        small |= {"down_block_types": down, "up_block_types": up, "cross_attention_dim": 6}
        net = diffusers.UNet2DConditionModel(**small)
    else:
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        small |= {"class_embed_type": "identity"} if context else {}
        net = diffusers.UNet2DModel(**small, down_block_types=down, up_block_types=up)
    field = DiffusersField(net, (1, 2, 2), context).double()
    given = points(field, (2,), own_time=True)
    v, div = exact_divergence(field, *given)
    expected = autograd_divergence(field, *given)
    torch.testing.assert_close(div, expected, rtol=1e-6, atol=1e-8)  # its time is in float32
    assert v.shape == given[1].shape and expected.abs().min() > 1e-4
    (v.square().sum() + div.sum()).backward()
    assert all(weight.grad is not None for weight in field.parameters())
