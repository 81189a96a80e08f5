"""Inside `batch_statistics`, BatchNorm normalises with moments of the batch, and changes nothing in the model."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from graftstack.backbones.registry import build
from graftstack.meta.batchnorm import Found, batch_statistics

ROWS = 3


def layer(*, affine: bool = True, dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    """A layer in eval mode whose running statistics and weights are no others'."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=affine).to(dtype).eval()
    for tensor in [*norm.parameters(), norm.running_mean, norm.running_var]:
        assert tensor is not None
        tensor.data.uniform_(0.5, 2.0)
    return norm


def images(num: int = 8, *, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return 3 * torch.randn(num, 4, 5, 6, dtype=dtype) + 2


def normalised(x: Tensor, rows: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """By the textbook (Ioffe & Szegedy 2015, algorithm 1)."""
    mean = rows.mean(dim=(0, 2, 3), keepdim=True)
    variance = ((rows - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    found = (x - mean) / torch.sqrt(variance + norm.eps)
    if not norm.affine:
        return found
    return found * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def test_a_model_in_eval_mode_gives_what_it_gives_in_training_mode() -> None:
    torch.manual_seed(0)
    model = build("conv4").model
    x = torch.randn(6, 3, 28, 28)
    wanted = copy.deepcopy(model).train()(x)
    before = copy.deepcopy(model.eval().state_dict())
    with batch_statistics():
        assert torch.equal(model(x), wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_outside_running_statistics_are_used() -> None:
    norm, x = layer(), images()
    before = norm(x)
    with batch_statistics():
        assert not torch.allclose(norm(x), before)
    assert torch.equal(norm(x), before)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("num_rows", [None, ROWS])
def test_rows_are_normalised_with_the_moments_of_the_first(num_rows: int | None, affine: bool) -> None:
    norm, x = layer(affine=affine), images()
    with batch_statistics(num_rows=num_rows):
        assert torch.allclose(norm(x), normalised(x, x[:num_rows], norm), atol=1e-12)


def test_other_rows_tell_on_none() -> None:
    norm, x = layer(), images()
    with batch_statistics(num_rows=ROWS):
        together = norm(x)
        alone = torch.cat([norm(torch.cat([x[:ROWS], x[row : row + 1]]))[ROWS:] for row in range(ROWS, len(x))])
    with batch_statistics():
        assert torch.allclose(norm(x[:ROWS]), together[:ROWS], atol=1e-12)
    assert torch.allclose(alone, together[ROWS:], atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3), (8, 4, 2, 3, 2)])
def test_features_sequences_and_volumes_are_normalised_likewise(shape: tuple[int, ...]) -> None:
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)](4).double()
    x = torch.randn(shape, dtype=torch.float64)
    wanted = norm.train()(x[:ROWS])
    with batch_statistics(num_rows=ROWS):
        assert torch.allclose(norm.eval()(x)[:ROWS], wanted, atol=1e-12)


@pytest.mark.parametrize("num_rows", [None, ROWS])
def test_first_and_second_derivatives_are_those_of_finite_differences(num_rows: int | None) -> None:
    norm = layer()
    x = images(5)[:, :, :2, :2].contiguous().requires_grad_()
    weight, bias = norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_()

    def run(*inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        with batch_statistics(num_rows=num_rows):
            found: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return found

    assert gradcheck(run, (x, weight, bias))
    assert gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("num_rows", [None, ROWS])
def test_bf16_images_are_normalised_with_moments_in_fp32(num_rows: int | None) -> None:
    norm = layer(dtype=torch.float32)
    x = images(dtype=torch.bfloat16) + 100
    with batch_statistics(num_rows=num_rows):
        found = norm(x)
    assert found.dtype is torch.bfloat16
    wanted = normalised(x.float(), x[:num_rows].float(), norm)
    assert torch.allclose(found.float(), wanted, atol=0.02, rtol=0.01)


def test_moments_are_found_by_the_layer_of_a_running_mean() -> None:
    norm, x = layer(), images()
    found: Found = {}
    with batch_statistics(found=found):
        with_moments = norm(x)
    with batch_statistics():
        assert torch.equal(with_moments, norm(x))
    [(key, moments)] = found.items()
    assert key == id(norm.running_mean)
    assert torch.allclose(moments.mean, x.mean(dim=(0, 2, 3)))
    assert torch.allclose(moments.variance, x.var(dim=(0, 2, 3), correction=1))
    assert not moments.mean.requires_grad
    assert not moments.variance.requires_grad
