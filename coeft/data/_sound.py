"""One file of sound to a waveform of the rate and length that a model wants."""

import io
import math
from pathlib import Path

import numpy as np

from coeft.backbones._backbone import Hearing
from coeft.errors import UserError

HIGHEST = 10_000_000  # Hz, beyond any recorder's
BLOCK = 1 << 16  # frames that are read at once


def libraries() -> str:
    """Versions of what decodes and resamples.

    Raises:
        UserError: it is not installed.
    """
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:  # OSError: soundfile without its C library
        raise missing(str(error)) from None
    return f"soundfile {soundfile.__version__} {soundfile.__libsndfile_version__}, soxr {soxr.__version__}"


def missing(why: str) -> UserError:
    """What is said where the extra is not installed."""
    return UserError(
        f"data=audio_folder reads sound by soundfile and soxr, which are not installed ({why}): "
        "pip install 'coeft[audio]'"
    )


def read_sound(item: Path | bytes, hearing: Hearing) -> tuple[np.ndarray, float]:
    """A clip's waveform, float32 (hearing.samples,), and how long the file is in seconds.

    Channels are averaged, then resampled. Of a longer file the centre or the start is read; a shorter one is filled up
    with zeros at its end, or repeated.

    Raises:
        ValueError: the file cannot be read; the text says why, without its name.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(item) if isinstance(item, bytes) else item) as file:
            rate, length = file.samplerate, file.frames
            if not 0 < rate <= HIGHEST:
                raise ValueError(f"its header gives a sample rate of {rate:,} Hz, not 1 to {HIGHEST:,}")
            if length <= 0:
                raise ValueError("it holds no samples (zero length)")
            wanted = math.ceil(hearing.samples * rate / hearing.sample_rate)
            if length > wanted and hearing.longer == "centre":
                file.seek((length - wanted) // 2)
            waveform = _read(file, min(wanted, length))
    except soundfile.LibsndfileError as error:
        raise ValueError(_reason(item, error.error_string.rstrip("."))) from None
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{getattr(error, 'strerror', None) or error or type(error).__name__}") from None
    if not len(waveform):
        raise ValueError("it holds no samples (zero length)")
    if not np.isfinite(waveform).all():
        raise ValueError("it holds values that are not finite")
    if rate != hearing.sample_rate:
        waveform = soxr.resample(waveform, rate, hearing.sample_rate, quality="HQ")
        if not len(waveform):
            raise ValueError(f"its {length} samples at {rate} Hz are too few to resample")
    return _fitted(waveform.astype(np.float32), hearing), length / rate


def _read(file: "soundfile.SoundFile", wanted: int) -> np.ndarray:  # type: ignore[name-defined]  # noqa: F821
    """Up to so many frames as the mean of their channels; a header may promise more than there is."""
    pieces: list[np.ndarray] = []
    left = wanted
    while left > 0:
        block = file.read(min(BLOCK, left), dtype="float32", always_2d=True)
        if not len(block):
            break
        pieces.append(block.mean(1))
        left -= len(block)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _reason(item: Path | bytes, why: str) -> str:
    if isinstance(item, Path) and not item.exists():
        return "no such file"
    size = len(item) if isinstance(item, bytes) else item.stat().st_size
    if size == 0:
        return "the file is empty"
    if "SF_INFO struct incomplete" in why:
        return "its header gives a sample rate or a number of channels of 0"
    return f"not a sound file that libsndfile reads ({why})"


def _fitted(waveform: np.ndarray, hearing: Hearing) -> np.ndarray:
    """Exactly hearing.samples of a waveform."""
    samples, count = hearing.samples, len(waveform)
    if count >= samples:
        return waveform[:samples]  # rounding of the resampler's alone: the file was cut before
    if hearing.shorter == "repeat":
        return np.tile(waveform, -(-samples // count))[:samples]
    return np.pad(waveform, (0, samples - count))
