"""What is done to a batch of sounds on its way to a model: augmentation, and the picture or features that it takes."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coeft.backbones._backbone import Fbank, Hearing, Preprocessing
from coeft.data._spectrogram import front_end
from coeft.data._transforms import Normalize, Transform
from coeft.data.audio_folder import AudioFolder, Strength

STRETCH_FFT = 2048  # samples of the windows that the phase vocoder works with


class SoundAugment(Transform):
    """Random changes of training clips, drawn for each clip from torch's global generator on the CPU.

    Takes waveforms (B, T) if any of the augmentations is one of waveforms, else spectrograms (B, bands, frames); gives
    spectrograms.
    """

    takes: ClassVar[str] = "sound"
    gives: ClassVar[str] = "sound"

    def __init__(self, settings: AudioFolder, hearing: Hearing) -> None:
        super().__init__()
        self.strength = settings.strength
        self.on_waveforms, self.on_spectrograms = settings.on_waveforms, settings.on_spectrograms
        self.front = front_end(hearing)
        self._waveform: dict[str, Callable[[Tensor, Strength], Tensor]] = {
            "time_shift": time_shift, "pitch": pitch, "gain": gain, "noise": noise
        }  # fmt: skip
        self._axis = {"frequency_mask": 0, "time_mask": 1}

    def forward(self, sound: Tensor) -> Tensor:
        if sound.dim() == 2:
            sound = self.front(torch.stack([self._changed(clip) for clip in sound]))
        if not self.training or not self.on_spectrograms:
            return sound
        return torch.stack([self._masked(spectrogram) for spectrogram in sound])

    def _changed(self, clip: Tensor) -> Tensor:
        """A waveform (T,) after the augmentations of waveforms."""
        if self.training:
            for name in self.on_waveforms:
                if _chance(self.strength.probability):
                    clip = self._waveform[name](clip, self.strength)
        return clip

    def _masked(self, spectrogram: Tensor) -> Tensor:
        """A spectrogram (bands, frames) after the augmentations of spectrograms."""
        for name in self.on_spectrograms:
            if _chance(self.strength.probability):
                share = getattr(self.strength, name)
                for _ in range(self.strength.masks):
                    spectrogram = mask(spectrogram, self._axis[name], share)
        return spectrogram


def spectrograms(front: nn.Module, sound: Tensor) -> Tensor:
    """Spectrograms (B, bands, frames) of waveforms (B, T), or as they are."""
    made: Tensor = front(sound) if sound.dim() == 2 else sound
    return made


def _chance(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def time_shift(clip: Tensor, strength: Strength) -> Tensor:
    """Roll (T,) by up to a share of its length."""
    return clip.roll(round(_between(-strength.time_shift, strength.time_shift) * len(clip)))


def pitch(clip: Tensor, strength: Strength) -> Tensor:
    """Shift (T,) by up to so many semitones; its length and tempo stay."""
    return pitch_shift(clip, _between(-strength.pitch, strength.pitch))


def gain(clip: Tensor, strength: Strength) -> Tensor:
    """Make (T,) louder or softer."""
    return clip * 10.0 ** (_between(-strength.gain, strength.gain) / 20.0)


def noise(clip: Tensor, strength: Strength) -> Tensor:
    """Add white noise to (T,), its power by a ratio to the clip's; silence stays silent."""
    ratio = _between(*strength.noise)
    drawn = torch.randn(len(clip)).to(clip)
    return clip + drawn * (clip.square().mean().sqrt() * 10.0 ** (-ratio / 20.0))


def mask(spectrogram: Tensor, axis: int, share: float) -> Tensor:
    """Set a run of up to a share of the bands (axis 0) or frames (axis 1) of (bands, frames) to the clip's mean."""
    size = spectrogram.shape[axis]
    width = int(torch.randint(math.floor(share * size) + 1, ()))
    start = int(torch.randint(size - width + 1, ()))
    masked = spectrogram.clone()
    masked.narrow(axis, start, width).fill_(spectrogram.mean())
    return masked


def pitch_shift(clip: Tensor, semitones: float) -> Tensor:
    """(T,) with every frequency times 2^(semitones / 12), of the same length and tempo.

    A phase vocoder stretches time by that factor, each bin's phase locked to that of the nearest peak (Laroche and
    Dolson 1999, identity phase locking); resampling the stretched clip to the old length moves the pitch. Frequencies
    that would pass half the sample rate are left out. Computed on the CPU: sums along a clip and overlapping windows
    have no deterministic form on CUDA.
    """
    if clip.device.type != "cpu":
        return pitch_shift(clip.cpu(), semitones).to(clip.device)
    factor = 2.0 ** (semitones / 12.0)
    stretched = _stretch(clip, factor)
    spectrum = torch.fft.rfft(stretched)
    bins = len(clip) // 2 + 1
    fitted = F.pad(spectrum, (0, max(0, bins - len(spectrum))))[:bins]
    return torch.fft.irfft(fitted, len(clip)) * (len(clip) / len(stretched))


def _stretch(clip: Tensor, factor: float) -> Tensor:
    """(T,) -> (round(T * factor),): longer by the factor, at the same pitch."""
    n_fft = min(STRETCH_FFT, 1 << (len(clip).bit_length() - 1))
    hop = n_fft // 4
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(clip, n_fft, hop, window=window, return_complex=True)  # (bins, frames)
    spectrum = F.pad(spectrum, (0, 2))
    places = torch.arange(0, spectrum.shape[1] - 2, 1.0 / factor)
    before = places.floor().long()
    weight = (places - before).to(clip)
    magnitude = (1 - weight) * spectrum[:, before].abs() + weight * spectrum[:, before + 1].abs()
    angle = spectrum.angle()
    expected = torch.linspace(0, math.pi * hop, spectrum.shape[0])[:, None]
    turned = angle[:, before + 1] - angle[:, before] - expected
    advance = expected + turned - 2 * math.pi * torch.round(turned / (2 * math.pi))
    # In float64, since the phases of a clip add up to thousands of turns.
    phase = torch.cat([angle[:, :1].double(), advance[:, :-1].double()], 1).cumsum(1).remainder(2 * math.pi)
    peak = _nearest_peak(magnitude)
    here = angle[:, before].double()
    locked = phase.gather(0, peak) + here - here.gather(0, peak)
    made = torch.polar(magnitude, locked.remainder(2 * math.pi).to(magnitude))
    return torch.istft(made, n_fft, hop, window=window, length=round(len(clip) * factor))


def _nearest_peak(magnitude: Tensor) -> Tensor:
    """For every bin of (bins, frames) the nearest one that is the largest among its two neighbours on either side."""
    count = magnitude.shape[0]
    bins = torch.arange(count)[:, None]
    peaks = F.max_pool1d(magnitude.T[:, None], 5, 1, 2)[:, 0].T == magnitude
    below = torch.where(peaks, bins, -count).cummax(0).values
    above = torch.where(peaks, bins, 2 * count).flip(0).cummin(0).values.flip(0)
    return torch.where(bins - below <= above - bins, below, above)


class Picture(Transform):
    """Sounds as the pictures that a model of images takes: float32 (B, channels, H, W), low frequencies at the bottom.

    Takes waveforms (B, T) or spectrograms (B, bands, frames) in decibels, which become shades between those of
    spectrogram.low and spectrogram.high, are squashed to the image size, repeated for every channel and normalised.
    """

    takes: ClassVar[str] = "sound"
    gives: ClassVar[str] = "pixel_values"

    def __init__(self, hearing: Hearing, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.front = front_end(hearing)
        self.settings = hearing.features
        self.size = preprocessing.image_size
        self.mode = preprocessing.interpolation
        self.channels = len(preprocessing.mean)
        self.normalize = Normalize(preprocessing.mean, preprocessing.std)

    def forward(self, sound: Tensor) -> Tensor:
        shades = self.shades(sound)[:, None]
        options = {} if self.mode == "nearest" else {"antialias": True, "align_corners": False}
        squashed = F.interpolate(shades, self.size, mode=self.mode, **options).clamp(0, 1)
        return self.normalize(255 * squashed.expand(-1, self.channels, -1, -1))

    def shades(self, sound: Tensor) -> Tensor:
        """What is shown, in [0, 1]: (B, bands, frames), the highest band first."""
        sound = spectrograms(self.front, sound)
        low, high = self.settings.low, self.settings.high
        return ((sound - low) / (high - low)).clamp(0, 1).flip(1)


class Features(Transform):
    """Sounds as a model of sound takes them: float32 (B, frames, bands), normalised.

    Takes waveforms (B, T) or log energies (B, bands, frames), which are filled up with zeros to the model's frames.
    """

    takes: ClassVar[str] = "sound"
    gives: ClassVar[str] = "input_values"

    def __init__(self, hearing: Hearing) -> None:
        super().__init__()
        self.front = front_end(hearing)
        assert isinstance(hearing.features, Fbank)
        self.settings: Fbank = hearing.features

    def forward(self, sound: Tensor) -> Tensor:
        sound = spectrograms(self.front, sound)
        filled = F.pad(sound, (0, self.settings.frames - sound.shape[2])).transpose(1, 2)
        return (filled - self.settings.mean) / (2 * self.settings.std)

    def shades(self, sound: Tensor) -> Tensor:
        """What is shown, in [0, 1]: (B, bands, frames), the highest band first; each clip over its own range."""
        sound = spectrograms(self.front, sound)
        low, high = sound.amin((1, 2), keepdim=True), sound.amax((1, 2), keepdim=True)
        return ((sound - low) / (high - low).clamp(min=1e-6)).flip(1)
