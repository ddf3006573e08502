"""Encoders and decoders of vectors and images, against brute force and on scenes never shown."""

import pytest
import torch

from observations import (
    ImageDecoder,
    ImageEncoder,
    KeypointDecoder,
    KeypointEncoder,
    MultiDecoder,
    MultiEncoder,
)


@pytest.mark.parametrize("size", [16, 32])
def test_image_encoder_and_decoder_shapes_and_ranges(size):
    image = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    encoder, decoder = ImageEncoder(size, 2), ImageDecoder(6, size, 2)
    embed = encoder(image)
    assert embed.shape == (2, encoder.outputs)
    changed = image.clone()
    changed[1, 0, 0] = 255 - changed[1, 0, 0]
    same = (encoder(changed) == embed).all(-1)
    assert same.tolist() == [True, False]
    drawn = decoder(torch.randn(2, 4, 6))
    assert drawn.shape == (2, 4, size, size, 3) and drawn.min() > 0 and drawn.max() < 1


def test_keypoints_are_where_the_marks_are():
    encoder = KeypointEncoder(64, 2, 5, units=7, layers=1, norm=False)
    for part in (encoder.cnn[0], encoder.cnn[2]):
        torch.nn.init.constant_(part.weight, 0.1)  # every map is high where there is ink
    image = torch.full((3, 64, 64, 3), 255, dtype=torch.uint8)
    spots = [(4, 9), (11, 2)]  # column and row, on the map of 16 x 16
    for b, (column, row) in enumerate(spots):
        image[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
    seen = encoder(image)
    points, through = seen[:, :15].view(3, 5, 3), seen[:, 15:]
    for b, (column, row) in enumerate(spots):
        expected = torch.tensor([column, row]) / 7.5 - 1
        assert torch.allclose(points[b, :, :2], expected.expand(5, 2), atol=0.02)
    assert torch.allclose(points[2], torch.zeros(5, 3), atol=1e-5)  # nothing is drawn
    assert (points[:2, :, 2] > 1).all()
    assert torch.allclose(through, encoder.mlp(seen[:, :15])) and encoder.outputs == 15 + 7


def test_what_is_pale_leaves_as_strong_a_mark_as_what_is_dark():
    torch.manual_seed(0)
    encoder = KeypointEncoder(64, 2, 16, units=8, layers=1, norm=False)
    blank, dark, pale, red = torch.full((4, 1, 64, 64, 3), 255, dtype=torch.uint8)
    for image, colour in ((dark, (0, 0, 200)), (pale, (128, 128, 228)), (red, (200, 0, 0))):
        image[:, 20:32, 40:52] = torch.tensor(colour, dtype=torch.uint8)
    nothing, deep, light, other = (encoder(image)[:, :48] for image in (blank, dark, pale, red))
    assert (deep - light).norm() < 0.25 * (deep - nothing).norm()
    assert (deep - light).norm() < 0.5 * (deep - other).norm()


@pytest.mark.parametrize("points", [0, 16])
def test_keypoints_hold_for_places_never_shown(points):
    """A read-out of places learned in three corners fits the fourth; a flat one's does not."""
    torch.manual_seed(0)

    def scenes(count):
        spots = torch.randint(8, 56, (count, 2))
        image = torch.full((count, 64, 64, 3), 255, dtype=torch.uint8)
        for picture, (column, row) in zip(image, spots, strict=True):
            picture[row - 3 : row + 3, column - 3 : column + 3, 0] = 0
        return image, spots / 32 - 1

    image, spots = scenes(600)
    hidden = (spots > 0).all(-1)
    cnn = KeypointEncoder(64, 4, points, 32, 1, False) if points else ImageEncoder(64, 4)
    net = torch.nn.Sequential(cnn, torch.nn.Linear(cnn.outputs, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(100):
        chosen = torch.randint(int((~hidden).sum()), (64,))
        loss = (net(image[~hidden][chosen]) - spots[~hidden][chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (net(image[hidden]) - spots[hidden]).abs().mean().item()
    assert error < 0.1 if points else error > 0.2


def test_keypoints_are_drawn_where_they_are_in_the_colour_they_got():
    decoder = KeypointDecoder(6, 64, 2, 3, 8)
    torch.nn.init.zeros_(decoder.places.out.weight)
    decoder.places.out.bias.data = torch.tensor([[0.5, -0.25, 2.0], [0, 0, 0], [0, 0, 0]]).flatten()
    torch.nn.init.constant_(decoder.convs[0].weight, 0.1)
    torch.nn.init.zeros_(decoder.convs[2].weight)
    decoder.convs[2].weight.data[:, 1] = 0.1  # marks take green away
    image = decoder(torch.randn(2, 4, 6))
    assert image.shape == (2, 4, 64, 64, 3)
    assert torch.equal(image[..., [0, 2]], torch.ones(2, 4, 64, 64, 2))
    ink = (1 - image[0, 0, ..., 1]).detach()
    for axis, place in ((1, 0.5), (0, -0.25)):  # columns, rows
        middle = (ink.sum(1 - axis) * torch.arange(64)).sum() / ink.sum()
        assert middle.item() == pytest.approx(4 * 7.5 * (place + 1) + 1.5, abs=1.0)


SHAPES = {"agent0": (3,), "image": (16, 16, 3), "agent1": (2,)}


def make_obs(*lead):
    image = torch.randint(0, 256, (*lead, 16, 16, 3), dtype=torch.uint8)
    return {"agent0": 9 * torch.randn(*lead, 3), "agent1": torch.randn(*lead, 2), "image": image}


@pytest.mark.parametrize("points", [0, 4])
def test_multi_encoder_joins_vectors_and_image(points):
    encoder, obs = MultiEncoder(SHAPES, 8, 1, 2, points=points), make_obs(2, 4)
    encoder.standard.update(obs)
    embed = encoder(obs)
    assert embed.shape == (2, 4, encoder.outputs)
    vectors = encoder.mlp(encoder.standard(obs))
    assert torch.allclose(embed[..., :8], vectors, atol=1e-6)
    one = encoder({key: value[1, 2:3] for key, value in obs.items()})
    assert torch.allclose(one[0], embed[1, 2], atol=1e-5)


@pytest.mark.parametrize("points", [0, 4])
def test_image_loss_against_brute_force(points):
    decoder, obs = MultiDecoder(SHAPES, 6, 8, 1, 2, points=points), make_obs(2, 3)
    feat = torch.randn(2, 3, 6)
    image, loss = decoder.cnn(feat), decoder.image_loss(feat, obs["image"])
    for b, t in ((b, t) for b in range(2) for t in range(3)):
        pixels = (image[b, t] - obs["image"][b, t].double() / 255).square().sum()
        assert loss[b, t].item() == pytest.approx(pixels.item(), rel=1e-4)
