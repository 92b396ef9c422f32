"""Every unusual picture file gives one well-defined picture or one clear line."""

import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PIL
from PIL import features

import difftap.images as images
from difftap.errors import ImageError
from difftap.images import (
    PICTURE_ENDINGS,
    Image,
    find_pictures,
    is_picture,
    load_image,
    object_numbers,
    read_labels,
    read_mask,
    read_size,
    to_input,
)
from tests.harness import picture, write_picture


def test_missing_folder_empty_and_foreign_files_say_so(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello, I am no picture")
    for name, words in (
        ("none.png", "no image at"),
        ("", "not a file"),
        ("empty.png", "0 bytes"),
        ("text.png", "not a picture"),
    ):
        with pytest.raises(ImageError, match=words) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_a_name_too_long_for_the_file_system_is_an_image_error(tmp_path):
    with pytest.raises(ImageError):
        load_image(tmp_path / ("a" * 300))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_truncated_files_are_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    PIL.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cannot be decoded|not a picture"):
        load_image(path)


def _samples(folder):
    """The bytes of one small file per format."""
    found = {}
    for kind, save in (
        ("png", {}),
        ("jpg", {}),
        ("gif", {}),
        ("webp", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("bmp", {}),
    ):
        exif = PIL.Exif()
        exif[0x0112] = 6
        PIL.fromarray(picture(0, (9, 7))).save(folder / f"s.{kind}", exif=exif, **save)
        found[kind] = (folder / f"s.{kind}").read_bytes()
    return found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_give_a_picture_or_an_image_error_and_no_warning(tmp_path, data):
    kind, whole = data.draw(st.sampled_from(sorted(_samples(tmp_path).items())))
    damaged = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = load_image(path)
        except ImageError:
            return
    assert image.pixels.dtype == np.uint8
    assert image.pixels.ndim == 3


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_picture(path, seed=0)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30)
    assert load_image(path).size == (40, 30)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr(PIL.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="40 x 30 pixels"):
        load_image(path)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("side", [13_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused(tmp_path, side):
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b"\0" * 100)) + _chunk(b"IEND", b""))
    with pytest.raises(ImageError, match="pixels"):
        load_image(path)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, kind):
    if kind == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    frames = [PIL.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"a.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, **options)
    with PIL.open(path) as opened:
        assert opened.n_frames == 3
    assert (load_image(path).pixels == [255, 0, 0]).all()


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    PIL.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)
    with PIL.open(path) as opened:
        assert opened.mode == "CMYK"
    assert np.abs(load_image(path).pixels.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, kind):
    values = np.linspace(0, 65535, 12 * 10).round().astype(np.uint16).reshape(10, 12)
    path = tmp_path / f"a.{kind}"
    PIL.fromarray(values).save(path)
    want = np.rint(values / 257)
    assert (load_image(path).pixels == np.repeat(want[..., None], 3, axis=2)).all()


def test_sixteen_bit_rgb_png(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (5, 4, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b""))
    assert np.abs(load_image(path).pixels - values / 257).max() <= 1


def test_sixteen_bit_rgb_tiff(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (5, 4, 3)).astype("<u2")
    tags = [  # (tag, type, count, value): a baseline RGB TIFF, little-endian, one strip
        (256, 3, 1, 4), (257, 3, 1, 5), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 0),
        (277, 3, 1, 3), (278, 3, 1, 5), (279, 4, 1, values.nbytes),
    ]  # fmt: skip
    bits, start = 8 + 2 + 12 * len(tags) + 4, 8 + 2 + 12 * len(tags) + 4 + 6
    place = {258: bits, 273: start}
    entries = b"".join(struct.pack("<HHII", t, kind, n, place.get(t, v)) for t, kind, n, v in tags)
    path = tmp_path / "a.tif"
    path.write_bytes(
        b"II*\0"
        + struct.pack("<IH", 8, len(tags))
        + entries
        + struct.pack("<I", 0)
        + struct.pack("<HHH", 16, 16, 16)
        + values.tobytes()
    )
    assert np.abs(load_image(path).pixels - values / 257).max() <= 1


def test_wide_and_floating_values_are_refused(tmp_path):
    for name, values in (("f.tif", np.ones((3, 3), np.float32)), ("i.tif", np.full((3, 3), 70000, np.int32))):
        PIL.fromarray(values).save(tmp_path / name)
        with pytest.raises(ImageError, match="8 or 16 bits"):
            load_image(tmp_path / name)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = PIL.new("RGBA", (4, 4), (200, 100, 0, 0))
    rgba.putpixel((1, 1), (200, 100, 0, 255))
    half = PIL.new("LA", (4, 4), (0, 128))
    palette = PIL.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.putpixel((2, 2), 1)
    rgba.save(tmp_path / "rgba.png")
    half.save(tmp_path / "la.png")
    palette.save(tmp_path / "p.png", transparency=0)
    PIL.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    got = load_image(tmp_path / "rgba.png").pixels
    assert got[1, 1].tolist() == [200, 100, 0]
    assert got[0, 0].tolist() == [255, 255, 255]
    assert np.abs(load_image(tmp_path / "la.png").pixels.astype(int) - 127).max() <= 1
    got = load_image(tmp_path / "p.png").pixels
    assert got[2, 2].tolist() == [10, 20, 30]
    assert got[0, 0].tolist() == [255, 255, 255]
    assert (load_image(tmp_path / "rgb.png").pixels == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "YCbCr" else "a.png")
    PIL.fromarray(picture(0)).convert(mode).save(path)
    with PIL.open(path) as opened:
        assert (load_image(path).pixels == np.asarray(opened.convert("RGB"))).all()


UPRIGHT = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 9
AS_STORED = {  # EXIF 2.3, table 6: what the orientation tag says of the stored rows and columns
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", AS_STORED)
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = PIL.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    PIL.fromarray(np.ascontiguousarray(AS_STORED[orientation])).save(path, exif=exif)
    image = load_image(path)
    assert image.size == (3, 2)
    assert (image.pixels == UPRIGHT).all()


def test_digest_is_of_the_pixels_not_of_the_file(tmp_path):
    pixels = picture(3)
    exif = PIL.Exif()
    exif[0x0112] = 3
    for name in ("a.png", "a.bmp", "a.tif"):
        PIL.fromarray(pixels).save(tmp_path / name)
    PIL.fromarray(pixels).save(tmp_path / "b.webp", lossless=True)
    PIL.fromarray(np.ascontiguousarray(pixels[::-1, ::-1])).save(tmp_path / "turned.png", exif=exif)
    digests = {load_image(path).digest for path in tmp_path.iterdir() if path.is_file()}
    assert digests == {Image(pixels).digest}


def test_digest_tells_pixels_and_shapes_apart():
    flat = np.zeros((2, 6, 3), np.uint8)
    changed = flat.copy()
    changed[1, 5, 2] = 1
    assert len({Image(a).digest for a in (flat, changed, flat.reshape(3, 4, 3), flat.reshape(6, 2, 3))}) == 4


@pytest.mark.parametrize(
    "bad",
    [np.zeros((3, 3), np.uint8), np.zeros((3, 3, 4), np.uint8), np.zeros((3, 3, 3)), np.zeros((0, 3, 3), np.uint8)],
)
def test_arrays_of_another_kind_are_refused(bad):
    with pytest.raises(ImageError, match="uint8 array"):
        Image(bad)


def _bicubic_slow(values: np.ndarray, size: int) -> np.ndarray:
    """Pillow's bicubic (a = -0.5, widened when it shrinks), one axis, the plain way: ``(n, ...)``."""
    count = len(values)
    scale = count / size
    width = max(scale, 1.0)
    out = np.zeros((size, *values.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * scale - 0.5
        gaps = np.abs(np.arange(count) - centre) / width
        weights = np.where(
            gaps < 1,
            (1.5 * gaps - 2.5) * gaps**2 + 1,
            np.where(gaps < 2, -0.5 * (((gaps - 5) * gaps + 8) * gaps - 4), 0),
        )
        out[i] = np.tensordot(weights / weights.sum(), values, 1)
    return out


@pytest.mark.parametrize("size", [(32, 24), (40, 30), (64, 64), (16, 56)])
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_to_input_against_the_slow_way(size, fit):
    image = Image(picture(5))
    values, geometry = to_input(image, size, fit)
    x0, y0, x1, y1 = map(int, geometry.content)
    rows = _bicubic_slow(image.pixels.astype(float), y1 - y0)
    both = _bicubic_slow(rows.transpose(1, 0, 2), x1 - x0).transpose(1, 0, 2)
    want = np.zeros((size[1], size[0], 3))
    want[y0:y1, x0:x1] = np.clip(both, 0, 255) / 127.5 - 1
    assert values.dtype == np.float32
    assert values.shape == (3, size[1], size[0])
    assert np.abs(values - want.transpose(2, 0, 1)).max() <= 2 / 127.5  # two roundings to whole grey levels
    if fit == "letterbox":
        assert (values[:, :y0] == 0).all()
        assert (values[:, :, :x0] == 0).all()


@pytest.mark.parametrize("fault", [struct.error("unpack"), RuntimeError("decoder"), IndexError(), MemoryError()])
def test_whatever_a_decoder_raises_is_one_clear_line(tmp_path, monkeypatch, fault):
    path = tmp_path / "a.png"
    write_picture(path, seed=0)

    def fail(*_):
        raise fault

    monkeypatch.setattr("difftap.images._eight_bit", fail)
    with pytest.raises(ImageError, match=r"a\.png' (cannot be decoded|does not fit into memory)"):
        load_image(path)


def test_masks(tmp_path):
    values = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    palette = PIL.fromarray(values, "L").convert("P")
    palette.putdata(values.ravel().tolist())
    palette.save(tmp_path / "p.png")
    assert read_mask(tmp_path / "p.png").tolist() == [[False, True, True], [False, True, False]]
    assert read_mask(tmp_path / "p.png", 2).tolist() == [[False, False, True], [False, True, False]]
    PIL.fromarray(np.where(values == 255, 255, 0).astype(np.uint8)).save(tmp_path / "l.png")
    assert read_mask(tmp_path / "l.png").sum() == 1
    with pytest.raises(ImageError, match="no pixel of value 7; it has 0, 1, 2, 255"):
        read_mask(tmp_path / "p.png", 7)
    PIL.new("RGB", (3, 2)).save(tmp_path / "rgb.png")
    with pytest.raises(ImageError, match="holds colours"):
        read_mask(tmp_path / "rgb.png")
    (tmp_path / "no.png").write_bytes(b"x")
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_mask(tmp_path / "no.png")


# ---- what is a picture, in every room that takes folders

# Endings that Pillow does not derive the format of, or not in every build.
FORMATS = {".jfif": "JPEG", ".avif": "AVIF", ".pnm": "PPM", ".pgm": "PPM", ".pbm": "PPM"}


def write_every_kind(folder):
    """One picture of each ending that this machine's Pillow can write; their names."""
    rng = np.random.default_rng(1)
    for number, ending in enumerate(PICTURE_ENDINGS):
        if ending in (".heic", ".heif") or (ending == ".avif" and not features.check("avif")):
            continue
        mode = {".pgm": "L", ".pbm": "1"}.get(ending, "RGB")
        made = PIL.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).convert(mode)
        # an odd ending in capitals: cameras write them
        name = f"p{number:02}{ending.upper() if number % 2 else ending}"
        made.save(folder / name, format=FORMATS.get(ending) or PIL.registered_extensions()[ending])
    (folder / "notes.txt").write_text("no picture")
    return sorted(path.name for path in folder.iterdir() if path.name != "notes.txt")


def test_every_ending_is_found_decoded_and_measured(tmp_path):
    names = write_every_kind(tmp_path)
    assert {".gif", ".tiff", ".jfif", ".ppm"} <= {name[3:].lower() for name in names}
    assert [path.name for path in find_pictures(tmp_path)] == names
    for path in find_pictures(tmp_path):
        assert load_image(path).size == read_size(path) == (32, 24)


def test_every_room_that_takes_a_folder_finds_the_same_pictures(tmp_path):
    from difftap.bench.pictures import choose_pictures
    from difftap.datasets import keypoints, objects
    from difftap.features.sources import open_source
    from difftap.pipeline.environment import calibration_images
    from difftap.retrieval.retrieve import same_image
    from difftap.retrieval.sheet import find_image
    from difftap.retrieval.vectors import list_images

    folder = tmp_path / "images"
    folder.mkdir()
    names = write_every_kind(folder)
    (tmp_path / "masks").mkdir()
    for name in names:
        PIL.fromarray(np.ones((24, 32), np.uint8)).save(tmp_path / "masks" / f"{name.split('.')[0]}.png")
    assert [item.key for item in open_source(folder)] == names
    assert sorted(item.key for item in open_source(f"{folder}/*")) == names
    assert [path.name for path in list_images([folder])] == names
    assert [path.name for path in choose_pictures([folder], 100)] == names
    assert len(calibration_images((folder,))) == len(names)
    assert len({sample.source for sample in keypoints.load("synthetic", folder, cache=tmp_path / "c").samples}) == len(
        names
    )
    assert len(objects.load("folder", tmp_path).keys) == len(names)
    for name in names:
        stem = name.split(".")[0]
        assert same_image(name, np.array([stem])).all()
        if name.islower():
            assert find_image(stem, [folder]) == folder / name


def test_the_walk_skips_what_is_hidden_and_follows_links_once(tmp_path):
    (tmp_path / "b" / ".thumbnails").mkdir(parents=True)
    for name in ("z.png", "b/a.png", "b/.hidden.png", "b/.thumbnails/t.png"):
        PIL.new("RGB", (4, 3)).save(tmp_path / name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)] == ["b/a.png", "z.png"]
    assert not is_picture("a.tar") and not is_picture("jpg")


# ---- masks: one reader, upright, soft edges, 255


def _disc(size=64, scale=8):
    """A disc of 0 and 255 with soft edges, drawn large and made small; and its pixels from half on."""
    y, x = np.mgrid[: size * scale, : size * scale]
    centre = size * scale / 2
    hard = ((x - centre) ** 2 + (y - centre) ** 2 < (0.3 * size * scale) ** 2) * 255.0
    soft = hard.reshape(size, scale, size, scale).mean(axis=(1, 3)).round().astype(np.uint8)
    return soft, soft >= 128


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp"])
def test_a_soft_mask_is_cut_at_half(tmp_path, ending):
    soft, wanted = _disc()
    path = tmp_path / f"mask{ending}"
    PIL.fromarray(soft).save(path, **({"quality": 85} if ending == ".jpg" else {}))
    near = np.abs(soft.astype(int) - 128) < 16  # where a JPEG's noise may decide
    assert ((read_mask(path) == wanted) | near).all()
    assert set(np.unique(read_labels(path))) == {0, 255}
    assert (read_mask(path) == read_mask(path, 255)).all()


def test_numbers_are_no_soft_edges(tmp_path):
    labels = np.zeros((40, 40), np.uint8)
    labels[5:15, 5:15], labels[20:30, 20:32], labels[33:, 33:] = 1, 200, 255
    PIL.fromarray(labels).save(tmp_path / "mask.png")
    assert (read_labels(tmp_path / "mask.png") == labels).all()
    assert object_numbers(read_labels(tmp_path / "mask.png")).tolist() == [1, 200]
    assert (read_mask(tmp_path / "mask.png") == ((labels > 0) & (labels < 255))).all()


def test_numbers_in_a_jpeg_are_refused(tmp_path):
    PIL.fromarray(np.full((16, 16), 3, np.uint8)).save(tmp_path / "mask.jpg")
    with pytest.raises(ImageError, match="JPEG, which cannot hold numbers"):
        read_labels(tmp_path / "mask.jpg")


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([0, 255], [255]),
        ([0, 1, 255], [1]),
        ([0, 1, 2], [1, 2]),
        ([0], []),
        ([0, 1, 255, 300], [1, 255, 300]),
    ],
)  # fmt: skip
def test_which_numbers_are_objects(values, numbers):
    assert object_numbers(np.array([values], np.int64)).tolist() == numbers


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_picture_mask_and_header_agree_on_what_is_up(tmp_path, orientation, ending):
    soft, _ = _disc(24)
    soft[:, :12] = 0  # so that no turn leaves it as it is
    soft = soft[:16]
    path = tmp_path / f"a{ending}"
    exif = PIL.Exif()
    exif[0x0112] = orientation
    PIL.fromarray(soft).save(path, exif=exif, **({"quality": 100} if ending == ".jpg" else {}))
    image, mask = load_image(path), read_mask(path)
    assert read_size(path) == image.size == (mask.shape[1], mask.shape[0])
    assert image.size == ((16, 24) if orientation > 4 else (24, 16))
    assert ((image.pixels[..., 0] >= 128) != mask).mean() < 0.01


def test_one_transparent_value_of_16_bits_becomes_white(tmp_path):
    values = np.full((4, 4), 5000, np.uint16)
    values[:2] = 12345
    PIL.fromarray(values).save(tmp_path / "a.png", transparency=12345)
    assert load_image(tmp_path / "a.png").pixels[:2].min() == 255
    assert load_image(tmp_path / "a.png").pixels[2:].max() == round(5000 / 257)


def test_a_format_without_its_plug_in_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert find_pictures(tmp_path) == [tmp_path / "photo.HEIC"]
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        load_image(tmp_path / "photo.HEIC")


def test_bilinear_input_is_the_half_pixel_rule():
    """Two pixels enlarged to eight: weights of 1/8, 3/8, 5/8, 7/8 between their centres, the outer ones beyond."""
    image = Image(np.array([[[0] * 3, [160] * 3]], np.uint8))
    values, _ = to_input(image, (8, 8), resize="bilinear")
    grey = (values[0, 0] + 1) * 127.5
    assert np.abs(grey - np.array([0, 0, 20, 60, 100, 140, 160, 160])).max() <= 0.51
