"""Pictures: find the files, decode them to upright 8-bit RGB, lay them on the network's input; read masks.

Every format gives one well-defined picture: EXIF orientation is applied; an animation gives its first frame; 16-bit
grey is scaled to 8 bits; CMYK and palettes are converted; transparent parts become white. A mask is read without such
conversion: its numbers say which object a pixel belongs to.

Axis letters: B batch, H W image pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PIL
from PIL import ImageOps, UnidentifiedImageError

from difftap.coords import Geometry, Size
from difftap.errors import ImageError

__all__ = [
    "MAX_PIXELS",
    "PICTURE_ENDINGS",
    "VOID",
    "FolderScan",
    "Image",
    "decode_image",
    "find_pictures",
    "is_picture",
    "load_image",
    "object_numbers",
    "read_labels",
    "read_mask",
    "read_size",
    "to_input",
    "walk_folder",
]

# The formats that users have and that Pillow decodes without further packages. A picture that this machine's Pillow
# cannot decode (AVIF before Pillow 11.3) is found too, and then refused by name: no file is skipped in silence.
PICTURE_ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
"""Endings, in lower or upper case, of the files that count as pictures in a folder, list or archive."""

_PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif"}
"""Packages that teach Pillow a format, by ending; used where they are installed, and named where they are not."""

VOID = 255
"""The number of a label mask's pixels that belong to nothing, where other numbers stand beside it."""

MAX_PIXELS = 150_000_000
"""Largest image that is decoded, in pixels: a small file can claim to be a picture that takes all memory."""


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded image.

    Attributes:
        pixels: uint8, ``(H, W, 3)``, RGB, upright.
        path: the file it came from, for messages; ``"<array>"`` if it was given as an array.
    """

    pixels: NDArray[np.uint8]
    path: str = "<array>"

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            raise ImageError(f"an image is a uint8 array (H, W, 3), got {self.pixels.dtype} {shape}")

    @property
    def size(self) -> Size:
        """``(W, H)`` in pixels."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of size and pixels: the image's identity. The file's name, place and format do not matter."""
        # The size counts too: an image of 2 x 3 pixels may have the same bytes as one of 3 x 2.
        header = f"{self.pixels.shape[0]}x{self.pixels.shape[1]}:".encode()
        return hashlib.sha256(header + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


def is_picture(name: str | Path) -> bool:
    """Tell by the name's ending whether a file, or a member of an archive, counts as a picture.

    >>> is_picture("cats/1.JPG"), is_picture("notes.txt")
    (True, False)
    """
    return os.fspath(name).lower().endswith(PICTURE_ENDINGS)


def walk_folder(folder: Path, *, hidden: bool = False) -> Iterator[Path]:
    """Yield every file below a folder, folder by folder, each sorted by name.

    Links to folders are followed; each folder is visited once, so a loop of links ends.

    Args:
        folder: where to begin.
        hidden: also yield files whose name, or whose folder's, begins with a dot (thumbnails, for instance).
    """
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Changed in place, because os.walk goes on with this very list. Sorted, because a file system's own order
        # differs between machines.
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        for name in sorted(files):
            if hidden or not name.startswith("."):
                yield Path(root) / name


@dataclass(frozen=True)
class FolderScan:
    """What lies below a folder.

    Attributes:
        pictures: files that count as pictures, sorted by path.
        others: how many files are none, by ending.
        hidden: how many pictures are hidden, or lie in hidden folders, and are left out.
        broken: links that lead nowhere, and names that are no files.
    """

    pictures: tuple[Path, ...]
    others: Mapping[str, int]
    hidden: int
    broken: int

    @classmethod
    def of(cls, folder: Path, without: Collection[Path] = ()) -> FolderScan:
        """Look at every file below a folder, at any depth, but for those in the folders ``without``."""
        pictures, others, hidden, broken = [], Counter[str](), 0, 0
        for path in walk_folder(folder, hidden=True):
            if any(parent in without for parent in path.parents):
                continue
            concealed = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not is_picture(path):
                if not concealed:
                    others[path.suffix.lower() or "no ending"] += 1
            elif concealed:
                hidden += 1
            elif path.is_file():
                pictures.append(path)
            else:
                broken += 1
        return cls(tuple(sorted(pictures)), others, hidden, broken)

    @property
    def left_out(self) -> str:
        """What is not taken, and why, as one line; empty where there is nothing."""
        kinds = ", ".join(f"{count} {ending}" for ending, count in Counter(self.others).most_common(5))
        kinds += ", ..." if len(self.others) > 5 else ""
        said = [
            f"{sum(self.others.values())} files that are no pictures ({kinds})" if self.others else "",
            f"{self.hidden} hidden pictures" if self.hidden else "",
            f"{self.broken} names that lead to no file" if self.broken else "",
        ]
        return ", ".join(filter(None, said))


def find_pictures(folder: Path) -> list[Path]:
    """List the pictures below a folder, at any depth, sorted by path; `FolderScan` says what else is there."""
    return list(FolderScan.of(folder).pictures)


def _eight_bit(picture: PIL.Image, path: Path) -> PIL.Image:
    """Convert a picture of any mode to 8-bit RGB.

    Raises:
        ImageError: its values take more than 16 bits, or are floating-point numbers.
    """
    if picture.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"'{path}' holds 32-bit values from {values.min()} to {values.max()}; allowed: 8 or 16 bits a channel; "
                "convert it first"
            )
        # Pillow's own conversion clips at 255. This one divides by 257, rounded to nearest, in whole numbers.
        grey = PIL.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        clear = picture.info.get("transparency")  # the one value that is transparent, of 16 bits too
        if isinstance(clear, int):
            grey.putalpha(PIL.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        picture = grey
    if picture.mode == "F":
        raise ImageError(f"'{path}' holds floating-point pixels; allowed: 8 or 16 bits a channel; convert it first")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = PIL.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PIL.alpha_composite(white, picture)
    return picture.convert("RGB")


def load_image(path: str | Path) -> Image:
    """Read an image file.

    Raises:
        ImageError: the file is missing, unreadable, empty, not an image, truncated, or larger than `MAX_PIXELS`.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ImageError(f"no image at '{path}'; give the path of a JPEG, PNG or other picture file")
        if not path.is_file():
            raise ImageError(f"'{path}' is not a file; give the path of one picture")
        if path.stat().st_size == 0:
            raise ImageError(f"'{path}' is empty (0 bytes); give a picture file")
    except OSError as error:  # too long a name, or a folder that may not be entered
        raise ImageError(f"'{path}' cannot be decoded ({error}); it is damaged or cut short") from error
    return _decode(path, path)


def decode_image(data: bytes, name: str) -> Image:
    """Read an image from the bytes of its file.

    Args:
        data: a JPEG, PNG or other picture file's content.
        name: where it came from, for messages.

    Raises:
        ImageError: as `load_image` does.
    """
    if not data:
        raise ImageError(f"'{name}' is empty (0 bytes); give a picture file")
    return _decode(io.BytesIO(data), Path(name))


@contextlib.contextmanager
def _opened(source: Path | io.BytesIO) -> Iterator[PIL.Image]:
    """Open a picture's header.

    By a handle, never by name: an uncompressed grey TIFF that is opened by name Pillow maps into memory, with the sides
    that it has only after it is turned upright, and so scrambles its rows (seen in Pillow 13).
    """
    if isinstance(source, io.BytesIO):
        with PIL.open(source) as picture:
            yield picture
    else:
        with open(source, "rb") as handle, PIL.open(handle) as picture:
            yield picture


def _register(plugin: str) -> bool:
    """Teach Pillow the format of a plug-in; tell whether it is installed."""
    try:
        module = importlib.import_module(plugin.replace("-", "_"))
        module.register_heif_opener()
    except Exception:  # not installed, or its library is missing: the format cannot be read either way
        return False
    return True


def _decode(source: Path | io.BytesIO, path: Path) -> Image:
    plugin = _PLUGINS.get(path.suffix.lower())
    if plugin is not None:
        _register(plugin)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures from 89 Mpixel on, where our own limit decides, and of damaged EXIF data.
            warnings.simplefilter("ignore")
            with _opened(source) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:  # only the header has been read yet
                    raise ImageError(
                        f"'{path}' has {width} x {height} pixels; "
                        f"allowed: at most {MAX_PIXELS:,} in all; shrink it first"
                    )
                picture.load()
                upright = ImageOps.exif_transpose(picture) or picture
                return Image(np.array(_eight_bit(upright, path), np.uint8), str(path))
    except ImageError:  # our own, which the last clause below would take for Pillow's
        raise
    except UnidentifiedImageError as error:
        plugin = _PLUGINS.get(path.suffix.lower())
        if plugin is not None and not _register(plugin):
            raise ImageError(f"'{path}' needs the package '{plugin}'; install it with: pip install {plugin}") from error
        raise ImageError(
            f"'{path}' is not a picture that can be read; give a JPEG, PNG or other picture file"
        ) from error
    except PIL.DecompressionBombError as error:
        raise ImageError(f"'{path}' is too large: {error}; allowed: at most {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise ImageError(f"'{path}' does not fit into memory; shrink it first") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise ImageError(f"'{path}' cannot be decoded ({error}); it is damaged or cut short") from error


def read_size(path: Path) -> Size:
    """Read ``(W, H)`` of the upright picture, as `load_image` gives it, from the file's header only.

    Raises:
        OSError, SyntaxError, ValueError: what Pillow raises where the file is missing or damaged.
    """
    if path.suffix.lower() in _PLUGINS:
        return load_image(path).size
    with _opened(path) as picture:
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that exchange the sides
        if turned and picture.format == "TIFF":
            picture.load()  # Pillow turns TIFFs by itself: from version 11 on when opened, before that when loaded
            return picture.size
        width, height = picture.size
    return (height, width) if turned else (width, height)


def read_labels(path: Path) -> NDArray[np.int64]:
    """Read the numbers ``(H, W)`` of a label mask, upright: a palette, grey, or black and white picture.

    A grey picture that is one soft mask (antialiased, or a JPEG) has 255 from 128 on and 0 below: its other values are
    edges and noise, and no numbers of objects.

    Raises:
        ImageError: the file is missing, damaged, too large, or holds colours.
    """
    try:
        with _opened(path) as picture:
            if picture.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                raise ImageError(
                    f"mask '{path}' holds colours (mode {picture.mode}), not numbers; allowed: a palette, grey or "
                    "black and white picture whose values are the objects' numbers"
                )
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"mask '{path}' has {width} x {height} pixels; allowed: at most {MAX_PIXELS:,} in all")
            lossy = picture.format == "JPEG"
            picture.load()
            upright = ImageOps.exif_transpose(picture) or picture
            values = np.asarray(upright).astype(np.int64)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"there is no mask '{path}'") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise ImageError(f"mask '{path}' cannot be decoded ({error}); it is damaged or cut short") from error
    if lossy and values.max() < 128:
        raise ImageError(f"mask '{path}' is a JPEG, which cannot hold numbers exactly; save it as PNG")
    if lossy or (upright.mode == "L" and _is_soft(values)):
        return np.where(values >= 128, VOID, 0)
    return values


def _is_soft(values: NDArray[np.int64]) -> bool:
    """Tell a grey mask with soft edges from one of numbers: numbers fill areas, edges do not."""
    between = (values > 0) & (values < VOID)
    if values.max() != VOID or not between.any():
        return False
    alike = np.zeros_like(between)
    for axis in (0, 1):
        same = np.diff(values, axis=axis) == 0
        first, second = (slice(0, -1), slice(1, None))
        for part in (first, second):
            index = (part, slice(None)) if axis == 0 else (slice(None), part)
            alike[index] |= same
    # Two neighbours of one grey are rare along an edge, and the rule inside an object.
    return bool(alike[between].mean() < 0.5)


def object_numbers(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """List the numbers in a label mask that are objects: all but 0, and but `VOID` where other numbers are there.

    So 255 alone is an object (masks of 0 and 255, as most programs export them), and beside others it is the border
    that Pascal VOC draws around objects. In a mask of more than 255 objects it is one of them.
    """
    numbers = np.unique(labels)
    numbers = numbers[numbers != 0]
    border = len(numbers) > 1 and numbers.max() == VOID
    return np.asarray(numbers[numbers != VOID] if border else numbers)


def read_mask(path: Path, value: int | None = None) -> NDArray[np.bool_]:
    """Read one object's mask, bool ``(H, W)``, upright.

    Args:
        path: the mask's picture.
        value: the object's number; None for every number that is an object (`object_numbers`).

    Raises:
        ImageError: the file cannot be read, holds colours, or has no pixel of that value.
    """
    values = read_labels(path)
    if value is None:
        return np.isin(values, object_numbers(values))
    if not (values == value).any():
        present = ", ".join(str(v) for v in np.unique(values)[:20])
        raise ImageError(f"mask '{path}' has no pixel of value {value}; it has {present}")
    return np.asarray(values == value)


def to_input(
    image: Image, size: Size, fit: str = "stretch", resize: str = "bicubic"
) -> tuple[NDArray[np.float32], Geometry]:
    """Lay an image on the network's input: resize it with one of Pillow's filters.

    Args:
        image: the picture.
        size: ``(W, H)`` of the input in pixels.
        fit: ``stretch`` or ``letterbox``.
        resize: ``bicubic``, as DIFT does, or ``bilinear``, as SD4Match does.

    Returns:
        float32 ``(3, H, W)``, RGB, in [-1, 1], letterbox padding 0 (mid-grey); and the geometry that takes the image's
        pixels to it.
    """
    geometry = Geometry.laid(fit, image.size, size)
    x0, y0, x1, y1 = (round(edge) for edge in geometry.content)
    resized = PIL.fromarray(image.pixels).resize((x1 - x0, y1 - y0), PIL.Resampling[resize.upper()])
    values = np.zeros((3, size[1], size[0]), np.float32)  # (3, H, W)
    # From 0..255 to [-1, 1], the range that Stable Diffusion's VAE takes.
    values[:, y0:y1, x0:x1] = np.asarray(resized, np.float32).transpose(2, 0, 1) / 127.5 - 1.0
    return values, geometry
