from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
import xarray as xr

from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import desmear, prepare
from dsnet_bluesky.desmearing.covariance import covariance, coverage_factor
from dsnet_bluesky.dsnet import load_network
from dsnet_bluesky.network import has_bfloat16
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.versions import load_model

WIDTH = 0.06
FINE = np.linspace(0.001, 4.2, 8000)


def sphere(q, radius):
    x = q * radius
    return (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2


def ideal(q):
    """Two sizes of spheres on a background: no curve of the library."""
    return 0.7 * sphere(q, 4.0) + 0.3 * sphere(q, 6.4) + 1e-4


def lattice(q):
    peaks = sum(h * np.exp(-0.5 * ((q - p) / 0.03) ** 2) for p, h in ((0.8, 5.0), (1.13, 2.0), (1.6, 1.0), (2.4, 0.3)))
    return 0.02 * (q + 0.1) ** -2 + peaks


def measured(noise, truth=ideal, count=20, seed=0, q=None, scale=1.0):
    q = np.linspace(0.05, 3.0, 300) if q is None else q
    smeared = Smearing.gaussian(q, WIDTH, q_calc=FINE).apply(truth(FINE)) * scale
    sigma = np.broadcast_to(max(noise, 1e-4) * smeared, (count, q.size))
    scatter = np.random.default_rng(seed).standard_normal((count, q.size))
    return curve(q, smeared + noise / max(noise, 1e-4) * sigma * scatter, sigma)


@pytest.fixture(scope="module", params=["dsnet", "dsnet-fast"])
def prepared(request):
    return prepare(Smearing.gaussian(np.linspace(0.05, 3.0, 300), WIDTH), request.param)


def error(result, truth=ideal):
    return float(np.mean((np.log(result["I"]) - np.log(truth(result["q"]))) ** 2))


def test_dsnet_is_the_default():
    prepared = prepare(Smearing.gaussian(np.linspace(0.05, 3.0, 300), WIDTH))
    assert prepared.method == prepared.model.name == "dsnet"


def test_the_fast_model_has_half_the_network():
    """What it saves in time is measured by benchmarks/speed.py."""
    both, one = (load_network(load_model(name))[0].parameter_count for name in ("dsnet", "dsnet-fast"))
    assert one < 0.51 * both


@pytest.mark.parametrize("model", ["dsnet", "dsnet-fast"])
def test_the_published_method_takes_no_model_of_ours(model):
    with pytest.raises(BadInput, match="is no model of the method dsnet-paper"):
        prepare(Smearing.gaussian(np.linspace(0.05, 3.0, 300), WIDTH), "dsnet-paper", model=model)


class TestAnswer:
    @pytest.mark.parametrize(("noise", "most"), [(0.0, 1e-6), (0.01, 3e-4), (0.05, 2e-3)])
    def test_minima_of_particles_come_back(self, prepared, noise, most):
        data = measured(noise)
        result = prepared(data)
        smeared = float(np.mean((np.log(data["I"]) - np.log(ideal(data["q"]))) ** 2))
        assert smeared > 0.03
        assert error(result) < most
        assert not result["flags"].any()

    def test_peaks_come_back(self, prepared):
        data = measured(0.01, lattice)
        result = prepared(data)
        assert error(result, lattice) < 0.05 * float(np.mean((np.log(data["I"]) - np.log(lattice(data["q"]))) ** 2))

    def test_the_measurement_is_reproduced(self, prepared):
        assert prepared(measured(0.02))["chi2"].values == pytest.approx(1.0, abs=0.35)

    def test_units_do_not_matter(self, prepared):
        one, counts = prepared(measured(0.02)), prepared(measured(0.02, scale=3e7))
        np.testing.assert_allclose(counts["I"], 3e7 * one["I"], rtol=1e-4)
        np.testing.assert_allclose(counts["Idev"], 3e7 * one["Idev"], rtol=1e-3)

    def test_curves_do_not_depend_on_their_batch(self, prepared):
        data = measured(0.02)
        alone = prepared(data.isel(exposure=[3]))
        np.testing.assert_allclose(prepared(data)["I"][3], alone["I"][0], rtol=1e-4)

    def test_negative_intensities_are_used(self, prepared):
        data = measured(0.02)
        data["I"] -= 5e-4
        data["Idev"] = np.hypot(data["Idev"], 3e-4)
        assert (data["I"] < 0).any()
        result = prepared(data)
        assert (result["I"] > 0).all()
        assert np.isfinite(result["Idev"]).all()


class TestGrids:
    @pytest.mark.parametrize(
        "q",
        [
            np.linspace(0.05, 3.0, 60),
            np.geomspace(0.05, 3.0, 200),
            np.delete(np.linspace(0.05, 3.0, 300), np.r_[60:70, 180:190]),
            np.linspace(0.05, 3.0, 2000),
        ],
        ids=["few points", "logarithmic", "gaps", "2000 points"],
    )
    def test_any_grid(self, q):
        data = measured(0.02, q=q, count=4)
        result = prepare(Smearing.gaussian(q, WIDTH))(data)
        assert error(result) < 0.2 * float(np.mean((np.log(data["I"]) - np.log(ideal(q))) ** 2))
        assert result["chi2"].values == pytest.approx(1, abs=0.6)

    def test_long_slits(self):
        q = np.geomspace(0.01, 1.0, 150)
        fine = np.geomspace(0.001, 60, 12000)
        truth = 1 / (1 + (fine * 12.0) ** 4) + 1e-5
        smeared = Smearing.slit(q, 5.0, q_calc=fine).apply(truth)
        data = curve(q, smeared * (1 + 0.01 * np.random.default_rng(1).standard_normal(q.size)), 0.01 * smeared)
        result = desmear(data, Smearing.slit(q, 5.0))
        inside = q < 0.5
        off = np.log(result["I"].values / np.interp(q, fine, truth))[inside]
        assert np.abs(off).mean() < 0.15
        assert np.abs(np.log(data["I"].values / np.interp(q, fine, truth)))[inside].mean() > 1


class TestErrors:
    def test_bands_hold(self, prepared):
        inside = []
        for noise, truth in ((0.01, ideal), (0.05, ideal), (0.02, lattice)):
            result = prepared(measured(noise, truth, count=40))
            inside.append([np.mean(np.abs(result["I"] - truth(result["q"])) <= k * result["Idev"]) for k in (1, 2)])
        one, two = np.mean(inside, axis=0)
        assert 0.6 < one < 0.9
        assert two > 0.88

    def test_noise_is_a_part_of_the_error(self, prepared):
        result = prepared(measured(0.05, count=40))
        assert (result["Idev_noise"] <= result["Idev"]).all()
        scatter = np.std(np.log(result["I"]), axis=0)
        told = np.sqrt(np.mean((result["Idev_noise"] / result["I"]) ** 2, axis=0))
        assert 0.6 < float(np.median(told / scatter)) < 1.7

    def test_resolution_is_better_than_the_instruments_where_counts_are_good(self, prepared):
        medians = [float(np.median(prepared(measured(noise))["Qdev"])) for noise in (0.001, 0.02, 0.15)]
        assert 0 < medians[0] < 0.7 * WIDTH
        assert medians == sorted(medians)

    def test_averages_need_the_covariance(self, prepared):
        result = prepared(measured(0.05, count=40))
        off = {"with": [], "without": []}
        for k in range(40):
            one = result.isel(exposure=k)
            matrix, residual = covariance(one).dense(), (one["I"] - ideal(one["q"])).values
            for start in range(0, 280, 20):
                part = slice(start, start + 20)
                weight = 1 / ideal(one["q"].values[part])
                total = weight @ residual[part]
                off["with"].append(total / np.sqrt(weight @ matrix[part, part] @ weight))
                off["without"].append(total / np.sqrt(weight**2 @ np.diag(matrix)[part]))
        assert np.mean(np.abs(off["with"]) < 2) > 0.88
        assert np.mean(np.abs(off["without"]) < 2) < 0.8

    def test_covariance_agrees_with_idev_and_is_of_low_rank(self, prepared):
        one = prepared(measured(0.02)).isel(exposure=0)
        found = covariance(one)
        np.testing.assert_allclose(np.sqrt(np.diag(found.dense())), one["Idev"], rtol=1e-6)
        assert found.factor.shape[1] < one.sizes["q"]
        white = found.whiten(np.random.default_rng(0).multivariate_normal(np.zeros(300), found.dense(), 200))
        assert np.mean(white**2) == pytest.approx(1, abs=0.05)

    def test_covariance_is_refused_where_nothing_is_known_of_it(self, prepared):
        data = measured(0.02)
        with pytest.raises(BadInput, match="one exposure"):
            covariance(prepared(data))
        with pytest.raises(BadInput, match="does not say"):
            covariance(desmear(data.isel(exposure=0), prepared.smearing, "map"))


class TestLimits:
    """What is not scattering, or not smeared so, must not pass for an answer."""

    N = 300
    T = np.linspace(0, 1, N)
    THINGS = {  # noqa: RUF012
        "step": np.where(T < 0.5, 1.0, 100.0),
        "sawtooth": 1 + 10 * ((T * 7) % 1),
        "comb": np.where((np.arange(N) // 4) % 2 == 0, 1.0, 50.0),
        "spikes": 1 + 1000 * (np.random.default_rng(3).random(N) < 0.03),
        "noise": np.abs(1 + 0.5 * np.random.default_rng(4).standard_normal(N)),
        "walk": np.exp(np.cumsum(np.random.default_rng(5).normal(0, 0.3, N))),
        "image": np.random.default_rng(6).integers(1, 255, N).astype(float),
        "negative": -np.exp(-3 * T),
    }

    @pytest.mark.parametrize("thing", THINGS)
    def test_what_is_not_scattering_is_flagged(self, prepared, thing):
        values = self.THINGS[thing]
        result = prepared(curve(prepared.smearing.q, values, 0.01 * np.abs(values) + 0.001 * np.abs(values).mean()))
        assert int(result["flags"]) & int(Flag.POOR_FIT | Flag.OUT_OF_RANGE | Flag.SUBSTITUTED)

    def test_too_few_points_and_too_wide_a_beam_are_flagged(self):
        q = np.linspace(0.05, 3, 30)
        assert int(desmear(curve(q, ideal(q), 0.01 * ideal(q)), Smearing.gaussian(q, 0.2))["flags"]) & int(Flag.OUT_OF_RANGE)
        q = np.linspace(0.05, 3, 300)
        wide = prepare(Smearing.gaussian(q, 1.3), "dsnet", fallback=False)
        assert int(wide(curve(q, ideal(q), 0.01 * ideal(q)))["flags"]) & int(Flag.OUT_OF_RANGE)

    @pytest.mark.parametrize("factor", [0.0, 1.0])
    def test_a_curve_of_less_than_noise_is_flagged(self, prepared, factor):
        q = prepared.smearing.q
        result = prepared(curve(q, factor * ideal(q), np.full(q.size, 1e3)))
        assert int(result["flags"]) & int(Flag.OUT_OF_RANGE)

    def test_beyond_the_nodes_that_a_user_gives_the_curve_is_constant(self):
        q = np.linspace(0.05, 3.0, 300)
        data = measured(0.01, count=1)
        result = prepare(Smearing.gaussian(q, WIDTH, q_calc=np.linspace(0.2, 2.8, 265)), fallback=False)(data)
        outside = q < 0.2
        assert np.ptp(np.log(result["I"].values[0][outside])) < 1e-6

    def test_errors_of_nearly_nothing_do_no_harm(self, prepared):
        data = measured(0.0, count=1)
        data["Idev"] *= 1e-8
        assert error(prepared(data)) < 1e-4

    def test_bare_network_changes_nothing_of_good_answers(self, prepared):
        data = measured(0.02)
        bare = prepare(prepared.smearing, prepared.method, consistency=False, fallback=False)(data)
        np.testing.assert_array_equal(bare["I"], prepared(data)["I"])
        assert set(bare["answer"].values) == {"network"}

    def test_proximal_steps_come_nearer_to_the_measurement(self, prepared):
        data = measured(0.0005, lattice, count=8)
        bare = prepare(prepared.smearing, prepared.method, consistency=False, fallback=False)(data)
        moved = prepare(prepared.smearing, prepared.method, fallback=False)(data)
        assert (moved["chi2"] <= bare["chi2"]).all()
        missed = bare["chi2"] > 3
        if missed.any():
            assert float(moved["chi2"][missed].median()) < 0.5 * float(bare["chi2"][missed].median())


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [1, 3, 40])
def test_threads_share_no_batch_and_keep_their_number(prepared, count):
    """On a busy machine threads that share one wait for each other for seconds."""
    seen = set()
    with prepared._solver.network.register_forward_hook(lambda *_: seen.add(torch.get_num_threads())):
        prepared(measured(0.02, count=count))
    assert (seen, torch.get_num_threads()) == ({1}, 2)


@pytest.mark.usefixtures("two_threads")
def test_two_at_the_same_time_restore_the_number_of_threads(prepared):
    together = Barrier(2, timeout=60)
    hook = prepared._solver.network.register_forward_hook(lambda *_: (together.wait(), None)[1])
    with hook, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: prepared(measured(0.02, count=1)), range(2)))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


class TestVersions:
    def test_a_version_can_be_asked_for(self, prepared):
        version = load_model(prepared.method).version
        explicit = prepare(prepared.smearing, f"{prepared.method}:{version}")
        assert (explicit.method, explicit.model.version) == (prepared.method, version)
        data = measured(0.02, count=1)
        xr.testing.assert_equal(explicit(data)["I"], prepared(data)["I"])

    @pytest.mark.parametrize(
        ("method", "options", "words"),
        [
            ("dsnet:9.9.9", {}, "no model 'dsnet:9.9.9'"),
            ("map:1.0.0", {}, "map has no released models"),
            ("dsnet:2.0.0", {"model": "dsnet-paper"}, "give one of them"),
        ],
    )
    def test_versions_that_make_no_sense_are_refused(self, prepared, method, options, words):
        with pytest.raises(BadInput, match=words):
            prepare(prepared.smearing, method, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "torch cannot use the device 'gpu'"),
        ({"device": "meta"}, "torch cannot use the device 'meta'"),
        ({"model": "dsnet-paper"}, "dsnet-paper 1.0.0 is no model of the method dsnet"),
    ],
)
def test_devices_and_models_that_do_not_serve_are_refused(prepared, options, words):
    with pytest.raises(BadInput, match=words):
        prepare(prepared.smearing, prepared.method, **options)


def test_a_result_names_its_model(prepared):
    result = prepared(measured(0.02, count=1))
    assert result.attrs["model"] == f"{prepared.method}:{prepared.model.version}"
    assert result.attrs["model_sha256"] == prepared.model.sha256


def test_a_classical_answer_has_no_covariance_of_the_model(prepared):
    one = prepared(measured(0.02, count=1)).isel(exposure=0)
    assert coverage_factor(one) > 2
    one["flags"] = one["flags"] | int(Flag.SUBSTITUTED)
    assert coverage_factor(one) == 1.96
    with pytest.raises(BadInput, match="does not say"):
        covariance(one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cpu_and_gpu_agree():
    data, smearing = measured(0.02), Smearing.gaussian(np.linspace(0.05, 3.0, 300), WIDTH)
    answers = [prepare(smearing, "dsnet", device=device)(data)["I"].values for device in ("cpu", "cuda")]
    np.testing.assert_allclose(np.log(answers[0]), np.log(answers[1]), atol=1e-4)


def test_the_device_is_respected(prepared):
    # With another default device, whatever forgets to name its own ends up elsewhere and raises.
    data = measured(0.02, count=2)
    with torch.device("meta"):
        result = prepare(prepared.smearing, prepared.method, device="cpu")(data)
    np.testing.assert_allclose(result["I"], prepared(data)["I"], rtol=1e-4)


class TestHalf:
    def test_bfloat16_changes_answers_by_much_less_than_their_errors(self, prepared):
        if not has_bfloat16("cpu"):
            pytest.skip("this processor does not compute in bfloat16")
        data = measured(0.02)
        half = prepare(prepared.smearing, prepared.method, half=True)(data)
        single = prepared(data)
        assert float((abs(half["I"] - single["I"]) / single["Idev"]).mean()) < 0.1
        assert error(half) < 1.05 * error(single)

    def test_it_is_refused_where_it_would_be_slow(self, prepared, monkeypatch):
        monkeypatch.setattr("dsnet_bluesky.dsnet.has_bfloat16", lambda device: False)
        with pytest.raises(BadInput, match="half=True would be slow"):
            prepare(prepared.smearing, prepared.method, half=True)
