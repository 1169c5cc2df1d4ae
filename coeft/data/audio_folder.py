"""Sounds in class folders: ROOT/CLASS/clip.wav, or ROOT/{train,val,test}/CLASS/clip.wav.

WAV, FLAC, OGG (Vorbis, Opus), MP3 and AIFF at any sample rate, at any depth below the class folder (coeft[audio]). Each
file is one sample: its channels are averaged, it is resampled and cut or filled up to `seconds`. Models of images see
the mel spectrogram as a picture, low frequencies at the bottom; the Audio Spectrogram Transformer takes its own
features. Groups for `cv.group` are columns of ROOT/groups.csv, as of image folders, or parts of file names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from coeft.data.image_folder import ImageFolder
from coeft.errors import UserError, near
from coeft.patterns import compiled

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

WAVEFORM = ("time_shift", "pitch", "gain", "noise")
SPECTROGRAM = ("time_mask", "frequency_mask")
SCALES = ("htk", "slaney", "kaldi")
HIGHEST_RATE = 384_000  # Hz
LONGEST = 600  # seconds of a clip


@dataclass(frozen=True, kw_only=True)
class Spectrogram:
    """The mel spectrogram that models of images see."""

    n_fft: int = 1024
    """Samples of a window (Hann), which a Fourier transform is taken of."""
    hop_length: int = 160
    """Samples from one window to the next."""
    n_mels: int = 128
    """Bands over the mel scale."""
    f_min: float = 20.0
    """Hz, where the lowest band begins."""
    f_max: float | None = None
    """Hz, where the highest band ends; null is half the sample rate."""
    mel_scale: str = "htk"
    """htk, slaney or kaldi."""
    norm: str | None = None
    """slaney gives bands equal areas; null gives them the same peak."""
    reference: str = "full_scale"
    """What 0 dB is: full_scale, a sine of peak 1, or max, the loudest moment of a clip, which takes its level out."""
    low: float = -100.0
    """dB that the picture shows as black; what lies below is cut."""
    high: float = 0.0
    """dB that the picture shows as white."""

    def __post_init__(self) -> None:
        for key, least in (("n_fft", 16), ("hop_length", 1), ("n_mels", 1)):
            if getattr(self, key) < least:
                raise UserError(f"data.spectrogram.{key} must be {least} or more, not {getattr(self, key)}")
        if self.hop_length > self.n_fft:
            raise UserError(
                f"data.spectrogram.hop_length={self.hop_length} leaves samples out between windows of "
                f"n_fft={self.n_fft}; make it n_fft or less"
            )
        if not 0 <= self.f_min < math.inf:
            raise UserError(f"data.spectrogram.f_min must be 0 Hz or more, not {self.f_min}")
        if self.f_max is not None and not 0 < self.f_max < math.inf:
            raise UserError(f"data.spectrogram.f_max must be a number of Hz above 0, or null, not {self.f_max}")
        if self.mel_scale not in SCALES:
            raise UserError(f"data.spectrogram.mel_scale must be one of {', '.join(SCALES)}, not {self.mel_scale!r}")
        if self.norm not in (None, "slaney"):
            raise UserError(f"data.spectrogram.norm must be slaney or null, not {self.norm!r}")
        if self.reference not in ("full_scale", "max"):
            raise UserError(f"data.spectrogram.reference must be full_scale or max, not {self.reference!r}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"data.spectrogram.low={self.low} must be below high={self.high}, both in dB")


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How far augmentations go; each is drawn between none and this."""

    probability: float = 0.5
    """That an augmentation of the list is applied to a clip."""
    time_shift: float = 0.5
    """Largest share of the clip that it is shifted by, to either side; what leaves at one end comes in at the other."""
    pitch: float = 2.0
    """Semitones, up or down; the length stays."""
    gain: float = 6.0
    """dB, up or down."""
    noise: list[float] = field(default_factory=lambda: [10.0, 40.0])
    """Smallest and largest ratio of the clip's power to that of the white noise, in dB."""
    time_mask: float = 0.2
    """Largest share of the frames in a mask, which has the clip's mean."""
    frequency_mask: float = 0.2
    """Largest share of the mel bands in a mask."""
    masks: int = 1
    """Masks of either kind in a clip."""

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise UserError(f"data.strength.probability must be in (0, 1], not {self.probability}")
        for key in ("time_shift", "time_mask", "frequency_mask"):
            if not 0 < getattr(self, key) <= 1:
                raise UserError(f"data.strength.{key} must be a share in (0, 1], not {getattr(self, key)}")
        if not 0 < self.pitch <= 12:
            raise UserError(f"data.strength.pitch must be in (0, 12] semitones, not {self.pitch}")
        if not 0 < self.gain <= 60:
            raise UserError(f"data.strength.gain must be in (0, 60] dB, not {self.gain}")
        ends = self.noise
        if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
            raise UserError(f"data.strength.noise must be two ratios in dB, the smaller first, not {list(ends)}")
        if self.masks < 1:
            raise UserError(f"data.strength.masks must be 1 or more, not {self.masks}")


@dataclass(frozen=True, kw_only=True)
class AudioFolder(ImageFolder):
    """Class folders of sounds below `root`, which may be divided into split folders."""

    kind: str = "audio_folder"
    sample_rate: int = 16_000
    """Hz that sounds are resampled to, for models of images; a model of sound has its own."""
    seconds: float = 5.0
    """Length of a clip."""
    longer: str = "centre"
    """centre or start: what is kept of a longer file."""
    shorter: str = "zeros"
    """zeros or repeat: what fills up a shorter file at its end."""
    spectrogram: Spectrogram = field(default_factory=Spectrogram)
    """For models of images; a model of sound has its own features."""
    augment: list[str] = field(default_factory=list)
    """Any of time_shift, pitch, gain, noise (of waveforms), time_mask, frequency_mask (of spectrograms), applied to
    training clips: those of waveforms first, each kind in this order."""
    strength: Strength = field(default_factory=Strength)
    """Of the augmentations."""
    group_pattern: str | None = None
    """Regular expression with named parts, such as (?P<recording>.+)_[0-9]+, searched for in every file's path relative
    to root; cv.group=recording then keeps files of equal recording together. Null takes ROOT/groups.csv."""

    wanted: ClassVar[str] = "sound"
    modalities: ClassVar[tuple[str, ...]] = ("audio",)
    augmentations: ClassVar[tuple[str, ...]] = WAVEFORM + SPECTROGRAM

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.sample_rate <= HIGHEST_RATE:
            raise UserError(f"data.sample_rate must be 1 to {HIGHEST_RATE:,} Hz, not {self.sample_rate}")
        if not 0 < self.seconds <= LONGEST:
            raise UserError(f"data.seconds must be above 0, at most {LONGEST}, not {self.seconds}")
        if self.longer not in ("centre", "start"):
            raise UserError(f"data.longer must be centre or start, not {self.longer!r}")
        if self.shorter not in ("zeros", "repeat"):
            raise UserError(f"data.shorter must be zeros or repeat, not {self.shorter!r}")
        given = [f"data.{key}" for key in ("resize", "crop_pct") if getattr(self, key) is not None]
        if given:
            raise UserError(f"{', '.join(given)}: of images; a spectrogram is squashed to data.image_size; leave out")
        if "gain" in self.augment and self.spectrogram.reference == "max":
            raise UserError(
                "data.augment: gain does nothing where data.spectrogram.reference=max takes the level out; leave one "
                "out"
            )
        if self.group_pattern is not None and not compiled(self.group_pattern, "data.group_pattern").groupindex:
            raise UserError(
                f"data.group_pattern: {self.group_pattern!r} names no part; name the one to group by, such as "
                "(?P<recording>.+)_[0-9]+"
            )

    @property
    def on_waveforms(self) -> list[str]:
        """The augmentations of waveforms, in their order."""
        return [name for name in self.augment if name in WAVEFORM]

    @property
    def on_spectrograms(self) -> list[str]:
        """The augmentations of spectrograms, in their order."""
        return [name for name in self.augment if name in SPECTROGRAM]

    def check(self) -> None:
        missing = [name for name in ("soundfile", "soxr") if find_spec(name) is None]
        if missing:
            raise UserError(
                f"data=audio_folder needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: "
                "pip install 'coeft[audio]'"
            )

    def group_names(self, root: "Path", group: str, names: Sequence[str]) -> "np.ndarray":
        if self.group_pattern is None:
            return super().group_names(root, group, names)
        import numpy as np

        pattern = compiled(self.group_pattern, "data.group_pattern")
        if group not in pattern.groupindex:
            raise UserError(
                f"cv.group={group}: data.group_pattern names no such part; {near(group, pattern.groupindex)}"
            )
        found = [pattern.search(name) for name in names]
        without = [name for name, match in zip(names, found, strict=True) if match is None or not match[group]]
        if without:
            listed = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
            raise UserError(
                f"data.group_pattern: {self.group_pattern!r} finds no {group} in {len(without)} of {len(names)} names: "
                f"{listed}"
            )
        return np.array([match[group] for match in found if match is not None], dtype=object)
