import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms.features import (
    EEG_BANDS,
    POWER_FLOOR,
    SPEC_BANDS,
    band_powers,
    eeg_features,
    filter_eeg,
    spectrogram_features,
    spectrogram_spans,
)
from lightning_xattn.hms.missing import fill_gaps
from lightning_xattn.hms.montage import EEG_EDGES, EEG_RATE, ELECTRODES, SPEC_FREQUENCIES
from lightning_xattn.hms.recordings import COMPETITION, IIIC, EEGGeometry

GEOMETRIES = pytest.mark.parametrize("geometry", [COMPETITION, IIIC], ids=["competition", "iiic"])


def seconds(geometry) -> np.ndarray:
    return np.arange(round(geometry.seconds * EEG_RATE)) / EEG_RATE


def filtered(eeg: np.ndarray) -> np.ndarray:
    return filter_eeg(np.float32(eeg)).real


def noise(geometry, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 10, (round(geometry.seconds * EEG_RATE), 19))


@GEOMETRIES
def test_a_sine_lands_in_its_band_with_its_power(geometry):
    frequencies, bands = np.array([2, 6, 10, 20, 35] * 4)[:19], np.array([0, 1, 2, 3, 4] * 4)[:19]
    eeg = 30 * np.sin(2 * np.pi * frequencies * seconds(geometry)[:, None])
    x, _, _ = eeg_features(eeg, geometry)
    assert x.shape == (9, 19, 5)
    assert (x.argmax(axis=-1) == bands).all()
    # A sine of amplitude 30 µV has 450 µV². The first and last window feel the filter's ends.
    np.testing.assert_allclose(x[2:-2].max(axis=-1), np.log10(450), atol=0.02)


def test_mains_are_removed():
    time = seconds(COMPETITION)
    mains = 100 * np.sin(2 * np.pi * 60 * time)[None]
    assert np.abs(filtered(mains)[:, 1000:-1000]).max() < 0.5
    alpha = 100 * np.sin(2 * np.pi * 10 * time)[None]
    np.testing.assert_allclose(filtered(alpha + mains)[:, 1000:-1000], alpha[:, 1000:-1000], atol=2)
    # The envelope of a sine is its amplitude.
    np.testing.assert_allclose(np.abs(filter_eeg(np.float32(alpha)))[:, 1000:-1000], 100, atol=2)


def test_drift_and_offset_are_removed():
    drift = 3000 + 500 * np.sin(2 * np.pi * 0.05 * seconds(COMPETITION))[None]
    assert np.abs(filtered(drift)[:, 2000:-2000]).max() < 5
    line = np.linspace(-4000, 9000, 10000)[None]
    assert np.abs(filtered(line)).max() < 0.01


@GEOMETRIES
def test_they_are_what_scipy_computes_window_by_window(geometry):
    """Against a filter that runs forwards and backwards, one Welch estimate a window, and numpy's correlation."""
    eeg = np.cumsum(noise(geometry), axis=0) * 0.3 + noise(geometry, 1) + 300
    x, edge_attr, _ = eeg_features(eeg, geometry)
    sections = np.concatenate(
        [
            signal.butter(4, (0.5, 50), "bandpass", fs=EEG_RATE, output="sos"),
            signal.tf2sos(*signal.iirnotch(60, 30, fs=EEG_RATE)),
        ]
    )
    plain = signal.sosfiltfilt(sections, eeg, axis=0, padlen=800)
    # The transform of a stretch takes its ends for neighbours: reflected there, it does not jump.
    reflected = np.pad(plain, ((800, 800), (0, 0)), "reflect", reflect_type="odd")
    envelope = np.abs(signal.hilbert(reflected, axis=0))[800:-800]
    for i, (start, stop) in enumerate(geometry.spans):
        first, last = (round((time + geometry.seconds / 2) * EEG_RATE) for time in (start, stop))
        frequencies, density = signal.welch(plain[first:last], EEG_RATE, nperseg=400, axis=0)
        powers = [
            density[(frequencies >= low) & (frequencies < high)].sum(axis=0) * 0.5 for low, high in EEG_BANDS.values()
        ]
        # The two filters differ a little where the stretch begins and ends.
        near_an_end = i in (0, 1, geometry.n_windows - 2, geometry.n_windows - 1)
        np.testing.assert_allclose(x[i], np.log10(np.transpose(powers)), atol=0.01 if near_an_end else 0.001)
        correlations = np.corrcoef(envelope[first:last].T)
        expected = [correlations[source, target] for source, target in EEG_EDGES]
        np.testing.assert_allclose(edge_attr[i, :, 0], expected, atol=0.05 if near_an_end else 0.01)


def test_a_burst_is_in_the_windows_that_hold_it_and_the_channel_that_has_it():
    time = seconds(IIIC)
    eeg = noise(IIIC) * 0.01
    cz = ELECTRODES.index("Cz")
    eeg[:, cz] += np.where((time > 6) & (time < 7), 50 * np.sin(2 * np.pi * 10 * time), 0)
    alpha = eeg_features(eeg, IIIC)[0][..., 2]
    loud = alpha > 1.5
    assert list(np.flatnonzero(loud[:, cz])) == [5, 6]  # 5-7 s and 6-8 s
    assert not np.delete(loud, cz, axis=1).any()


def test_a_silent_channel_has_the_floor_and_no_edges():
    eeg = noise(IIIC)
    eeg[:, 3] = np.nan
    x, edge_attr, filled = eeg_features(eeg, IIIC)
    assert filled == 2000
    np.testing.assert_allclose(x[:, 3], np.log10(POWER_FLOOR), rtol=1e-6)
    touching = np.array([3 in edge for edge in EEG_EDGES])
    assert (edge_attr[:, touching] == 0).all()
    assert (edge_attr[:, ~touching] != 0).all()


def test_edges_weigh_common_envelopes():
    time = seconds(COMPETITION)
    carrier = np.sin(2 * np.pi * 10 * time)
    envelope = 20 + 15 * np.sin(2 * np.pi * 0.4 * time)
    eeg = noise(COMPETITION)
    fp1, fp2, o1, o2 = (ELECTRODES.index(name) for name in ("Fp1", "Fp2", "O1", "O2"))
    eeg[:, fp1], eeg[:, fp2] = envelope * carrier, 3 * envelope * np.sin(2 * np.pi * 11 * time)
    eeg[:, o1], eeg[:, o2] = envelope * carrier, (40 - envelope) * carrier
    _, edge_attr, _ = eeg_features(eeg, COMPETITION)
    assert edge_attr.shape == (9, 72, 1)
    weights = {edge: edge_attr[1:-1, i, 0] for i, edge in enumerate(EEG_EDGES)}
    assert (weights[fp1, fp2] > 0.95).all()
    assert (weights[o1, o2] < -0.95).all()
    assert np.abs(edge_attr).max() <= 1
    for source, target in EEG_EDGES:
        np.testing.assert_array_equal(weights[source, target], weights[target, source])


def test_gaps_are_filled_with_lines_and_counted():
    values = np.array([[np.nan, 1.0, np.nan], [2.0, 2.0, np.nan], [np.inf, 3.0, np.nan], [4.0, np.nan, np.nan]])
    filled, count = fill_gaps(values)
    np.testing.assert_array_equal(filled, [[2, 1, 0], [2, 2, 0], [3, 3, 0], [4, 3, 0]])
    assert count == 7
    assert np.isnan(values[0, 0])  # the input is left as it was


@settings(max_examples=30, deadline=None)
@given(
    stretches=st.lists(st.tuples(st.integers(0, 18), st.integers(0, 1999), st.integers(1, 2000)), max_size=6),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_what_is_missing_is_counted_and_never_passed_on(stretches, value):
    eeg = noise(IIIC)
    for channel, start, length in stretches:
        eeg[start : start + length, channel] = value
    x, edge_attr, filled = eeg_features(eeg, IIIC)
    assert filled == (~np.isfinite(eeg)).sum()
    assert np.isfinite(x).all()
    assert np.isfinite(edge_attr).all()


@pytest.mark.parametrize("geometry", [EEGGeometry(20, 7, 0.5), EEGGeometry(6, 1.5, 0.75), EEGGeometry(5, 0.5, 0.5)])
def test_windows_of_any_length_have_the_power_that_welch_finds(geometry):
    eeg = np.float32(noise(geometry).T)
    powers = band_powers(eeg, geometry)
    assert powers.shape == (geometry.n_windows, 19, 5)
    for i, (start, stop) in enumerate(geometry.spans):
        first, last = (round((time + geometry.seconds / 2) * EEG_RATE) for time in (start, stop))
        segment = min(400, last - first)
        frequencies, density = signal.welch(eeg[:, first:last], EEG_RATE, nperseg=segment)
        for band, (low, high) in enumerate(EEG_BANDS.values()):
            power = density[:, (frequencies >= low) & (frequencies < high)].sum(axis=1) * EEG_RATE / segment
            np.testing.assert_allclose(powers[i, :, band], np.log10(np.maximum(power, POWER_FLOOR)), atol=1e-4)


def test_signals_of_another_shape_are_refused():
    for shape in ((2000,), (2000, 20), (1999, 19)):
        with pytest.raises(DataError, match="got"):
            eeg_features(np.zeros(shape), IIIC)
    with pytest.raises(DataError, match=r"\(300, 4, 100\); got shape \(299, 4, 100\)"):
        spectrogram_features(np.ones((299, 4, 100)))


def test_a_spectrogram_step_is_in_the_right_windows():
    power = np.ones((300, 4, 100))
    power[150:, 2] = 100  # from second 300 on in one region
    x, filled = spectrogram_features(power)
    assert x.shape == (119, 4, 4)
    assert filled == 0
    low, high = x[0, 2, 0], x[-1, 2, 0]
    assert high > low
    share = (x[:, 2, 0] - low) / (high - low)
    # Window i covers 5i to 5i + 10 s: up to 290-300 nothing, 295-305 half, from 300-310 on all.
    np.testing.assert_allclose(share[:59], 0, atol=1e-6)
    np.testing.assert_allclose(share[59], 0.5, atol=1e-6)
    np.testing.assert_allclose(share[60:], 1, atol=1e-6)
    assert np.ptp(x[:, [0, 1, 3]]) < 1e-6
    assert spectrogram_spans()[59] == (-5, 5)


def test_rows_count_by_their_share_of_the_window():
    power = np.ones((300, 4, 100))
    power[2] = 100  # 4 to 6 s: all of it in window 0 (0-10 s), half of it in window 1 (5-15 s)
    x, _ = spectrogram_features(power)
    rise = x[:, 0, 0] - x[5, 0, 0]
    assert rise[0] == pytest.approx(2 * rise[1], rel=1e-4)
    np.testing.assert_allclose(rise[2:], 0, atol=1e-6)


def test_a_line_in_the_spectrogram_is_in_its_band():
    power = np.ones((300, 4, 100))
    for region, frequency in enumerate((0.6, 5, 10, 19.9)):
        power[:, region, np.abs(np.array(SPEC_FREQUENCIES) - frequency).argmin()] = 1000
    x, _ = spectrogram_features(power)
    assert (x.argmax(axis=-1) == [0, 1, 2, 3]).all()


def test_a_spectrogram_is_standardised_and_its_extremes_are_clipped():
    power = np.random.default_rng(0).lognormal(0, 0.5, (300, 4, 100))
    x, _ = spectrogram_features(power)
    np.testing.assert_allclose(spectrogram_features(power * 3)[0], x, atol=1e-5)  # loudness does not matter
    power[0, 0, 0], power[0, 0, 1] = 1e30, 0
    assert np.abs(spectrogram_features(power)[0] - x).max() < 0.1


def test_a_frequency_that_is_missing_throughout_is_no_part_of_its_bands_average():
    power = np.random.default_rng(0).lognormal(0, 1, (300, 4, 100))
    power[:, :, 3] = np.exp(6)  # of delta, and unlike the others
    power[:, 2, 3] = np.nan
    logarithm = np.log(power.clip(np.exp(-4), np.exp(8)))
    standard = (logarithm - np.nanmean(logarithm)) / np.nanstd(logarithm)
    delta = np.array(SPEC_FREQUENCIES) < 4
    x, filled = spectrogram_features(power)
    assert filled == 300
    rows = np.nanmean(standard[:, :, delta], axis=2)
    np.testing.assert_allclose(x[0, :, 0], rows[:5].mean(axis=0), rtol=1e-5)  # the first 10 s


def test_bands_cover_what_they_should():
    assert list(EEG_BANDS.values()) == [(0.5, 4), (4, 8), (8, 13), (13, 30), (30, 50)]
    inside = [sum(low <= f < high for low, high in SPEC_BANDS.values()) for f in SPEC_FREQUENCIES]
    assert inside == [1] * 100  # every frequency is in exactly one band
