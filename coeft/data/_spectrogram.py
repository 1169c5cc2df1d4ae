"""Mel spectrograms of batches of waveforms, on whatever device they are."""

import warnings
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


def mel_filters(
    bins: int, bands: int, f_min: float, f_max: float, sample_rate: int, scale: str, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Triangular filters (bands, bins), the weight of each frequency of a Fourier transform in each band, and the Hz of
    the middle of each band (bands,); float64, as transformers.audio_utils has them.

    Args:
        bins: frequencies of the transform, 0 to half the sample rate.
        f_min, f_max: Hz, where the first band begins and the last one ends.
        scale: htk, slaney or kaldi.
        how: norm and triangularize_in_mel_space of transformers.audio_utils.mel_filter_bank.
    """
    from transformers import audio_utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of bands without a frequency, which is for the caller to say
        filters = audio_utils.mel_filter_bank(bins, bands, f_min, f_max, sample_rate, mel_scale=scale, **how)
    low, high = (audio_utils.hertz_to_mel(hertz, scale) for hertz in (float(f_min), float(f_max)))
    return filters.T, audio_utils.mel_to_hertz(np.linspace(low, high, bands + 2), scale)[1:-1]


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
        filters, self.centres = mel_filters(
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
        window = torch.hann_window(settings.n_fft, dtype=torch.float64)
        self.scale = float(4.0 / window.sum() ** 2)  # of the power, so that a sine of full scale has 1
        # Facts of the configuration, so no part of any checkpoint.
        self.register_buffer("window", window.float(), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters.copy()).float(), persistent=False)

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
        filters, self.centres = mel_filters(
            self.n_fft // 2 + 1, settings.bands, 20, rate // 2, rate, "kaldi", triangularize_in_mel_space=True
        )
        self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters.copy()).float(), persistent=False)

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
