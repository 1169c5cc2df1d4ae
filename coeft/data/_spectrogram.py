"""Mel spectrograms of batches of waveforms, on whatever device they are."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coeft.backbones._backbone import Fbank, Hearing
from coeft.data.audio_folder import Spectrogram
from coeft.errors import UserError

SMALLEST = 1e-20  # power below which a decibel is not asked for: -200 dB
KALDI_FLOOR = 1.192092955078125e-07  # of an energy before its logarithm, as Kaldi has it
PREEMPHASIS = 0.97


def front_end(hearing: Hearing) -> "LogMel | KaldiFbank":
    """What turns waveforms into the spectrograms that a model or its picture is made of.

    Raises:
        UserError: the spectrogram's settings do not go together.
    """
    if isinstance(hearing.features, Fbank):
        return KaldiFbank(hearing.features)
    return LogMel(hearing.features, hearing.sample_rate)


def hz_to_mel(frequency: np.ndarray, scale: str) -> np.ndarray:
    """Hertz to mel by a scale: htk (O'Shaughnessy, base 10), kaldi (the same with natural logarithms), slaney
    (Auditory Toolbox: linear up to 1 kHz, then logarithmic)."""
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + frequency / 700.0)
    if scale == "kaldi":
        return 1127.0 * np.log(1.0 + frequency / 700.0)
    above = 15.0 + np.log(np.maximum(frequency, 1000.0) / 1000.0) * (27.0 / math.log(6.4))
    return np.where(frequency < 1000.0, frequency * 3.0 / 200.0, above)


def mel_to_hz(mel: np.ndarray, scale: str) -> np.ndarray:
    """The inverse of hz_to_mel."""
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    if scale == "kaldi":
        return 700.0 * (np.exp(mel / 1127.0) - 1.0)
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * (math.log(6.4) / 27.0)))


def mel_filters(
    bins: int,
    n_mels: int,
    f_min: float,
    f_max: float,
    sample_rate: int,
    scale: str,
    *,
    norm: str | None = None,
    in_mel: bool = False,
) -> np.ndarray:
    """Triangular filters, float64 (n_mels, bins): the weight of each frequency of a Fourier transform in each band.

    Args:
        bins: frequencies of the transform, 0 to half the sample rate.
        f_min, f_max: Hz, where the first band begins and the last one ends.
        norm: slaney gives every band the same area over frequency; null the same peak, 1.
        in_mel: sides of the triangles are straight over mel, as Kaldi has them, not over frequency.
    """
    frequencies = np.linspace(0.0, sample_rate / 2, bins)
    low, high = hz_to_mel(np.array([f_min, f_max]), scale)
    corners = np.linspace(low, high, n_mels + 2)
    hertz = mel_to_hz(corners, scale)
    places = hz_to_mel(frequencies, scale) if in_mel else frequencies
    edges = corners if in_mel else hertz
    rising = (places[None] - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - places[None]) / np.diff(edges)[1:, None]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if norm == "slaney":
        filters *= (2.0 / (hertz[2:] - hertz[:-2]))[:, None]
    return filters


def band_centres(n_mels: int, f_min: float, f_max: float, scale: str) -> np.ndarray:
    """Hz of the middle of each band, float64 (n_mels,)."""
    low, high = hz_to_mel(np.array([f_min, f_max]), scale)
    return mel_to_hz(np.linspace(low, high, n_mels + 2), scale)[1:-1]


def in_float32(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Let a forward of waveforms compute in float32 where training runs in bfloat16, whose logarithms are coarse."""

    @wraps(forward)
    def wrapped(module: Any, waveforms: Tensor) -> Tensor:
        with torch.autocast(waveforms.device.type, enabled=False):
            return forward(module, waveforms.float())

    return wrapped


class LogMel(nn.Module):
    """Power in mel bands in decibels: float32 (B, T) -> (B, n_mels, frames).

    0 dB is the power of a sine of full scale (peak 1) or, with reference=max, the loudest band and moment of the clip.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, settings: Spectrogram, sample_rate: int) -> None:
        super().__init__()
        self.settings = settings
        self.frame_rate = sample_rate / settings.hop_length
        top = settings.f_max or sample_rate / 2
        if top > sample_rate / 2:
            raise UserError(
                f"data.spectrogram.f_max={settings.f_max:g} Hz is above {sample_rate / 2:g} Hz, the highest frequency "
                f"at data.sample_rate={sample_rate}"
            )
        if settings.f_min >= top:
            raise UserError(f"data.spectrogram.f_min={settings.f_min:g} Hz must be below {top:g} Hz, where bands end")
        filters = mel_filters(
            settings.n_fft // 2 + 1,
            settings.n_mels,
            settings.f_min,
            top,
            sample_rate,
            settings.mel_scale,
            norm=settings.norm,
        )
        if empty := int((filters.max(1) <= 0).sum()):
            raise UserError(
                f"data.spectrogram: {empty} of n_mels={settings.n_mels} bands are too narrow to hold a frequency of "
                f"n_fft={settings.n_fft} at {sample_rate} Hz; raise n_fft, or lower n_mels"
            )
        self.centres = band_centres(settings.n_mels, settings.f_min, top, settings.mel_scale)
        window = torch.hann_window(settings.n_fft, dtype=torch.float64)
        self.scale = float(4.0 / window.sum() ** 2)  # of the power, so that a sine of full scale has 1
        # Facts of the configuration, so no part of any checkpoint.
        self.register_buffer("window", window.float(), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples."""
        return samples // self.settings.hop_length + 1

    @in_float32
    def forward(self, waveforms: Tensor) -> Tensor:
        settings = self.settings
        spectrum = torch.stft(waveforms, settings.n_fft, settings.hop_length, window=self.window, return_complex=True)
        power = self.filters @ (spectrum.real.square() + spectrum.imag.square()) * self.scale
        decibels = 10.0 * torch.log10(power.clamp(min=SMALLEST))
        if settings.reference == "max":
            decibels = decibels - decibels.amax((1, 2), keepdim=True)
        return decibels


class KaldiFbank(nn.Module):
    """Kaldi's log energies of mel bands, by natural logarithm: float32 (B, T) -> (B, bands, frames).

    Windows of 25 ms every 10 ms, none of which reaches over the ends; of each the mean is taken out, then high
    frequencies are raised by 0.97 (the first sample by itself). As transformers' ASTFeatureExtractor does it for
    waveforms of peak 1, which Kaldi would have of peak 32768.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, settings: Fbank) -> None:
        super().__init__()
        self.settings = settings
        rate = settings.sample_rate
        self.length, self.hop = round(0.025 * rate), round(0.010 * rate)
        self.frame_rate = rate / self.hop
        self.n_fft = 1 << (self.length - 1).bit_length()
        filters = mel_filters(self.n_fft // 2 + 1, settings.bands, 20.0, rate // 2, rate, "kaldi", in_mel=True)
        self.centres = band_centres(settings.bands, 20.0, rate // 2, "kaldi")
        self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples."""
        return max(0, (samples - self.length) // self.hop + 1)

    @in_float32
    def forward(self, waveforms: Tensor) -> Tensor:
        frames = waveforms.unfold(1, self.length, self.hop)  # (B, frames, length)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        spectrum = torch.fft.rfft((frames - PREEMPHASIS * before) * self.window, self.n_fft)
        power = (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2)
        return torch.log((self.filters @ power).clamp(min=KALDI_FLOOR))
