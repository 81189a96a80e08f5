"""Augmentation changes each image by a random stream of its own, and nothing about its form."""

import pytest
import torch
from torch import Tensor

from graftstack.config.schema import Augment
from graftstack.finetune.augment import augment

SMALL, LARGE = [8, 32, 64], [65, 96, 224]


def random_images(num: int, size: int) -> Tensor:
    return torch.randint(1, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def shifts(image: Tensor, margin: int) -> dict[tuple[int, int, bool], Tensor]:
    """Every image that `image` can become by moving it by up to `margin` pixels over black, and by flipping it."""
    size = image.shape[-1]
    padded = torch.nn.functional.pad(image, [margin] * 4)
    moved = {
        (top, left): padded[:, top : top + size, left : left + size]
        for top in range(2 * margin + 1)
        for left in range(2 * margin + 1)
    }
    return {(*place, flip): crop.flip(-1) if flip else crop for place, crop in moved.items() for flip in (False, True)}


@pytest.mark.parametrize("size", SMALL + LARGE)
def test_images_keep_their_form_and_the_originals_their_pixels(size: int) -> None:
    images = random_images(4, size)
    before = images.clone()
    changed = augment(images, Augment.standard, [1, 2, 3, 4])
    assert changed.shape == images.shape
    assert changed.dtype is torch.uint8
    assert torch.equal(images, before)
    assert not torch.equal(changed, images)


@pytest.mark.parametrize("size", [32, 96])
def test_a_seed_decides_alone_what_becomes_of_an_image(size: int) -> None:
    images = random_images(6, size)
    seeds = [11, 22, 33, 44, 55, 66]
    together = augment(images, Augment.standard, seeds)
    torch.manual_seed(5)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = augment(images[order], Augment.standard, [seeds[index] for index in order])
    assert torch.equal(shuffled, together[order])
    for index, seed in enumerate(seeds):
        assert torch.equal(augment(images[index : index + 1], Augment.standard, [seed])[0], together[index])


@pytest.mark.parametrize("size", [32, 96])
def test_other_seeds_give_other_images(size: int) -> None:
    image = random_images(1, size)
    changed = augment(image.expand(20, -1, -1, -1), Augment.standard, list(range(20)))
    assert len({one.numpy().tobytes() for one in changed}) > 15


def test_the_global_random_stream_isnt_touched() -> None:
    before = torch.get_rng_state()
    augment(random_images(2, 32), Augment.standard, [1, 2])
    augment(random_images(2, 96), Augment.standard, [1, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_none_returns_the_images_themselves() -> None:
    images = random_images(2, 8)
    assert augment(images, Augment.none, [1, 2]) is images


@pytest.mark.parametrize(("size", "margin"), [(8, 1), (32, 4)])
def test_small_images_are_shifted_by_up_to_an_eighth_and_flipped_in_half_of_the_cases(size: int, margin: int) -> None:
    image = random_images(1, size)[0]
    by_pixels = {crop.numpy().tobytes(): place for place, crop in shifts(image, margin).items()}
    changed = augment(image.expand(300, -1, -1, -1), Augment.standard, list(range(300)))
    places = [by_pixels[one.contiguous().numpy().tobytes()] for one in changed]
    assert {top for top, _, _ in places} == {left for _, left, _ in places} == set(range(2 * margin + 1))
    assert 120 < sum(flip for *_, flip in places) < 180


def test_large_images_are_cropped_and_resized_without_a_border() -> None:
    size = 96
    ramp = torch.linspace(0, 255, size).round().to(torch.uint8)
    image = torch.stack([ramp.expand(size, size), ramp.expand(size, size).T, torch.full((size, size), 200).byte()])
    changed = augment(image.expand(200, -1, -1, -1), Augment.standard, list(range(200))).float()
    assert (changed[:, 2] == 200).all()
    widths = (changed[:, 0, 0, -1] - changed[:, 0, 0, 0]) / 255
    heights = (changed[:, 1, -1, 0] - changed[:, 1, 0, 0]) / 255
    assert 80 < int((widths < 0).sum()) < 120
    assert (heights > 0).all()
    areas, aspects = widths.abs() * heights, widths.abs() / heights
    assert 0.32 < float(areas.min()) < 0.45
    assert 0.9 < float(areas.max()) <= 1.0
    assert 0.70 < float(aspects.min()) < 0.85
    assert 1.2 < float(aspects.max()) < 1.40
