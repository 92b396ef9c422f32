"""What a DINOv2 network sees of an image."""

import numpy as np
import pytest

from difftap.images import Image
from difftap.prompts.tokens import TokenSource, dino_input

MEAN, STD = (np.array(one).reshape(3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def seen(pixels, **more):
    """The network's input in grey levels, 0 to 255."""
    return (dino_input(Image(pixels), 224, **more) * STD + MEAN) * 255


@pytest.mark.parametrize("tall", [False, True])
def test_the_middle_of_the_image_is_cut_out(tall):
    """A ramp along the longer edge of 512 x 256 pixels: the middle 224 of 512 are seen, one pixel as one pixel."""
    ramp = np.broadcast_to((np.arange(512) // 2).astype(np.uint8)[None, :, None], (256, 512, 3))
    found = seen(np.ascontiguousarray(ramp.transpose(1, 0, 2) if tall else ramp))
    along = found[:, :, 112].mean(axis=0) if tall else found[:, 112].mean(axis=0)
    assert np.abs(along - (np.arange(144, 368) // 2)).max() < 1.01


def test_the_shorter_edge_becomes_eight_sevenths_of_the_side():
    """A frame of 8 pixels around 128 x 128: of 256 pixels 16 are cut at each side, which is the frame exactly."""
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[8:-8, 8:-8] = 200
    found = seen(pixels)
    assert found.shape == (3, 224, 224)
    assert np.abs(found[:, 4:-4, 4:-4] - 200).max() < 1
    assert np.abs(seen(pixels, fit="stretch")[:, :8, :8]).max() < 1


def test_prompts_that_do_not_say_were_learned_on_stretched_images():
    new = TokenSource("dinov2", 256, 768, network="facebook/dinov2-base", side=224, fit="crop")
    old = {name: value for name, value in new.to_dict().items() if name != "fit"}
    assert TokenSource.from_dict(old).fit == "stretch"
    assert TokenSource.from_dict(new.to_dict()) == new
