"""One image file or array to uint8 pixels of the size that the model wants."""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, ImageOps

if TYPE_CHECKING:
    from coeft.backbones._backbone import Preprocessing  # which imports torch


RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
# Formats that run another program to be read, or that Pillow only recognises.
REFUSED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


def formats() -> list[str]:
    """Names of the image formats that are read."""
    Image.init()
    return sorted(set(Image.OPEN) - REFUSED)


def extensions() -> frozenset[str]:
    """Lower-case file name extensions of these formats, with the dot."""
    allowed = set(formats())
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in allowed)


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Within it, a truncated file and an image of suspicious size are errors, whatever other libraries have set."""
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as corrupt EXIF, which does not touch the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def pixels(item: Path | bytes | np.ndarray, preprocessing: "Preprocessing") -> np.ndarray:
    """uint8 (C, H, W) of one image, resized; C follows from the number of means.

    Raises:
        ValueError: the image cannot be read; the text says why, without its name.
    """
    image = to_mode(load_image(item), "L" if len(preprocessing.mean) == 1 else "RGB")
    array = np.asarray(resize(image, preprocessing))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def load_image(item: Path | bytes | np.ndarray) -> Image.Image:
    """The decoded image, turned as its EXIF orientation says.

    Raises:
        ValueError: it cannot be read; the text says why.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item[..., 0] if item.ndim == 3 and item.shape[2] == 1 else item)
    try:
        image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=formats())
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(_bomb(f"{image.width} x {image.height} pixels"))
        image.load()
        return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(_bomb("its header promises too many pixels")) from None
    except Image.UnidentifiedImageError:
        raise ValueError("not an image in a format that Pillow reads") from None
    except FileNotFoundError:
        raise ValueError("no such file") from None
    # Pillow's decoders raise these on broken files, SyntaxError and struct's among them.
    except Exception as error:
        raise ValueError(f"{error or type(error).__name__}") from None


def _bomb(what: str) -> str:
    limit = Image.MAX_IMAGE_PIXELS or 0
    return f"refused as a decompression bomb: {what}, more than the {limit:,} allowed; make the image smaller"


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image as 8-bit RGB or L. Transparency is laid over white; 16 bits are scaled, not cut.

    Raises:
        ValueError: its values cannot be scaled to 0..255.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError:
        raise ValueError(f"its colour mode {image.mode} cannot be converted to {mode}; save it as RGB") from None


def _scaled(image: Image.Image) -> Image.Image:
    """8-bit gray from 16-bit integers (0..65535) or floats (0..1)."""
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (0 <= low and high <= top):
        raise ValueError(f"pixels of mode {image.mode} from {low:g} to {high:g}; expected 0 to {top:g}")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def resize(image: Image.Image, preprocessing: "Preprocessing") -> Image.Image:
    """The image in the model's size, as timm's evaluation transform does it, pixel for pixel.

    resize=squash is timm's crop mode "squash" with nothing cropped; other sizes follow its mode "center".
    """
    height, width = preprocessing.image_size
    resample = RESAMPLE[preprocessing.interpolation]
    if preprocessing.resize == "squash":
        return image if image.size == (width, height) else image.resize((width, height), resample)
    scaled_h, scaled_w = (math.floor(side / preprocessing.crop_pct) for side in (height, width))
    if scaled_h == scaled_w:
        # torchvision truncates the longer side, timm's resize for other shapes rounds it.
        short, long = sorted(image.size)
        new_long = int(scaled_h * long / short)
        size = (scaled_h, new_long) if image.width <= image.height else (new_long, scaled_h)
    else:
        ratio = min(image.height / scaled_h, image.width / scaled_w)
        size = (round(image.width / ratio), round(image.height / ratio))
    if size != image.size:
        image = image.resize(size, resample)
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))
