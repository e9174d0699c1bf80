"""What errors are worth: a known factor is found again, a comb comes through as it was put on, and answers stay."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t
from torch import Tensor

from dsnet_bluesky.consistency import CORRELATION_LENGTHS
from dsnet_bluesky.dsnet import Calibration
from dsnet_bluesky.features import CHANNELS, Features, Operator
from dsnet_bluesky.library.examples import Session, draw_instrument_of, measure, session
from dsnet_bluesky.library.families import FAMILIES, make_shapes
from dsnet_bluesky.library.samples import Library, draw_sample
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.training import uncertainty
from dsnet_bluesky.training.uncertainty import HEIGHT, calibrate, learn_parts, measure_repeats, range_of
from dsnet_bluesky.unrolled import SMALLEST, Answer, Unrolled, UnrolledConfig

pytest.importorskip("sasmodels")

TINY = UnrolledConfig(channels=(4, 6), kernel=3, hidden=2)
POINTS = (50, 60)


@pytest.fixture(scope="module")
def library() -> Library:
    cheap = [family for family in FAMILIES if family.name in ("sphere", "fuzzy_sphere", "dab")]
    return Library([shape for family in cheap for shape in make_shapes(family, seed=1, count=2)], [])


@pytest.fixture(scope="module")
def network() -> Unrolled:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Unrolled(TINY)  # its head learns


@pytest.fixture(scope="module")
def repeats(library):
    return [measure_repeats([7, 3, number], library, 4, POINTS) for number in range(3)]


class Claims:
    """A network whose answers are off by what the test wants, and say what the test wants."""

    def __init__(self, ln_error: Tensor) -> None:
        self.ln_error = ln_error

    def __call__(self, operator: Operator, features: Features) -> Answer:
        flat = torch.zeros_like(self.ln_error)
        return Answer(flat, flat, self.ln_error, flat[:, :2], flat, flat)


def invented(ln_error: Tensor, ln_truth: Tensor, operator: Operator) -> tuple[Any, Session]:
    """A session whose truth is where the test puts it; the answer to all is ln I = 0."""
    nothing = torch.zeros(len(ln_truth), 1)
    features = Features(nothing, nothing, nothing, nothing, nothing, nothing)
    return Claims(ln_error), Session(operator, features, ln_truth, ["none"] * len(ln_truth), [0.0] * len(ln_truth))


class TestCalibration:
    @pytest.fixture(scope="class")
    def operator(self) -> Operator:
        return Operator(Smearing.gaussian(np.linspace(0.05, 4.0, 200), 0.05), transform=False)

    @pytest.fixture(scope="class")
    def stated(self, operator) -> Tensor:
        """Errors from a ten-thousandth to half, all over the curves."""
        nodes = operator.smearing.q_calc.size
        return torch.tensor(np.random.default_rng(0).uniform(-7, -1.5, (200, nodes)), dtype=torch.float32)

    @staticmethod
    def z(shape: tuple[int, ...], seed: int = 1) -> Tensor:
        return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)

    @pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
    def test_a_known_factor_is_found(self, operator, stated, factor):
        truth = torch.log1p(factor * self.z(stated.shape) * torch.exp(stated).clamp_max(0.1)).nan_to_num(-9.0)
        small = torch.log(torch.exp(stated).clamp_max(0.1))
        found = calibrate(*as_arguments(invented(small, truth, operator)))
        np.testing.assert_allclose(np.exp(found["ln_factor"][:-1]), factor, rtol=0.08)
        assert np.all(np.diff(found["ln_error"]) >= 0)

    def test_a_factor_that_depends_on_the_error_is_found(self, operator, stated):
        """Too bold where it is sure, too shy where it is not."""
        ln_factor = 0.5 - 0.3 * (stated + 4)
        truth = torch.log1p((self.z(stated.shape) * torch.exp(stated + ln_factor)).clamp(-0.9, None))
        found = calibrate(*as_arguments(invented(stated, truth, operator)))
        knots = np.array(found["ln_error"])
        np.testing.assert_allclose(found["ln_factor"], 0.5 - 0.3 * (knots + 4), atol=0.15)
        # And what follows from it holds what it says.
        error = Calibration({**found, "farthest": 1.0}, "cpu")(stated)
        inside = [float((torch.expm1(truth).abs() < k * error).float().mean()) for k in (1, found["coverage_factor"])]
        np.testing.assert_allclose(inside, [0.68, 0.95], atol=0.015)

    @pytest.mark.parametrize("freedom", [1e6, 3])
    def test_heavier_tails_have_a_larger_coverage_factor(self, operator, stated, freedom):
        """Of a normal distribution 95 % are within twice what 68 % are within; of Student's t with 3 degrees 2.7 times."""
        z = np.random.default_rng(0).standard_t(freedom, stated.shape)
        expected = t.ppf(0.975, freedom) / t.ppf(0.84, freedom)
        small = nearly(0.01, stated)
        truth = torch.log1p((0.01 * torch.tensor(z, dtype=torch.float32)).clamp(-0.9, None))
        found = calibrate(*as_arguments(invented(small, truth, operator)))
        assert found["coverage_factor"] == pytest.approx(expected, rel=0.03)

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_a_correlation_is_found(self, operator, which):
        """Errors drawn with one length: that one gets the share."""
        length = CORRELATION_LENGTHS[which]
        place = operator.place.double()
        root = torch.linalg.cholesky(torch.exp(-0.5 * ((place[:, None] - place) / length) ** 2) + 1e-6 * torch.eye(len(place)))
        rows = [0.05 * self.z((200, len(place)), seed).double() @ root.T for seed in range(3)]
        truth = torch.cat(rows).float()
        found = calibrate(*as_arguments(invented(nearly(0.05, truth), truth, operator)))
        shares = found["correlation"]["shares"]
        assert found["correlation"]["lengths"] == list(CORRELATION_LENGTHS)
        assert shares[which] > 0.75
        assert sum(shares) <= 1.001

    def test_independent_errors_have_no_correlation(self, operator, stated):
        truth = 0.05 * self.z(stated.shape)
        found = calibrate(*as_arguments(invented(nearly(0.05, truth), truth, operator)))
        assert sum(found["correlation"]["shares"]) < 0.1

    def test_many_errors_at_the_limit(self, operator, stated):
        """Noise-free curves of finite particles have the least error that can be stated, all of them the same."""
        limited = torch.where(torch.arange(stated.shape[0])[:, None] < 120, SMALLEST, stated)
        truth = self.z(stated.shape) * torch.exp(limited)
        found = calibrate(*as_arguments(invented(limited, truth, operator)))
        error = Calibration({**found, "farthest": 1.0}, "cpu")(limited)
        assert torch.isfinite(error).all()
        np.testing.assert_allclose(error[0], np.exp(SMALLEST), rtol=0.1)

    def test_beyond_the_knots_the_last_factor_holds(self):
        card = {"ln_error": [-5.0, -3.0], "ln_factor": [0.0, 1.0], "coverage_factor": 2.0, "correlation": {}, "farthest": 1.0}
        error = Calibration(card, "cpu")(torch.tensor([-9.0, -5.0, -4.0, -3.0, 0.0]))
        np.testing.assert_allclose(torch.log(error), [-9.0, -5.0, -3.5, -2.0, 1.0], atol=1e-6)


def nearly(error: float, like: Tensor) -> Tensor:
    """One error for all, or nearly."""
    return np.log(error) + 1e-3 * torch.linspace(0, 1, like.numel()).reshape(like.shape)


def as_arguments(made: tuple[Any, Session]) -> tuple[Any, list[Session]]:
    return made[0], [made[1]]


class TestRepeats:
    def test_the_third_differs_by_the_smeared_comb(self, library):
        """One noise, one sample: what changes in an answer is the answer to the comb."""
        instrument = draw_instrument_of([7, 3, 0], POINTS)
        operator = Operator(instrument.smearing, transform=False)
        for seed in range(5):
            comb, _ = uncertainty._comb(np.random.default_rng(seed), instrument, operator)
            ideal = draw_sample(np.random.default_rng(seed), library, instrument.view).I(instrument.fine)
            first, second, third = uncertainty._thrice(np.random.default_rng(seed), instrument, library, comb)
            smeared = instrument.fine_smearing.apply(ideal)
            added = instrument.fine_smearing.apply(ideal * np.exp(comb)) - smeared
            np.testing.assert_allclose(third.I - first.I, added, rtol=1e-9, atol=1e-12 * smeared.max())
            assert (added > 0).any()
            np.testing.assert_array_equal(third.Idev, first.Idev)
            assert (second.I != first.I).any()

    def test_teeth(self, repeats):
        for part in repeats:
            operator = part.operator("cpu")
            assert (part.comb >= 0).all()
            assert part.comb.max() < 1.05 * HEIGHT
            tops = part.teeth > 0
            assert tops.any() or operator.place[-1] < 2 * uncertainty.SPACING
            # A top lies half a node beside one at most.
            assert (part.comb[tops] > 0.5 * HEIGHT).float().mean() > 0.9
            for row in tops:
                gaps = operator.place[row].diff()
                assert ((gaps - uncertainty.SPACING).abs() < 2.1 * operator.place.diff().max()).all()

    def test_shapes(self, repeats):
        for part in repeats:
            nodes = part.smearing.q_calc.size
            assert part.once.channels.shape == part.again.channels.shape == part.combed.channels.shape
            assert part.once.channels.shape[1:] == (CHANNELS, nodes)
            assert part.comb.shape == part.teeth.shape == (len(part.once.start), nodes)

    def test_seeds_reproduce(self, repeats, library):
        again = measure_repeats([7, 3, 0], library, 4, POINTS)
        for one, other in zip(repeats[0].once, again.once, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(repeats[0].comb, again.comb)


class TestParts:
    def test_only_the_head_for_parts_learns(self, network, repeats, monkeypatch):
        monkeypatch.setattr(uncertainty, "STEPS", 30)
        learned = copy.deepcopy(network)
        learn_parts(learned, repeats, seed=1, device="cpu")
        for (name, before), after in zip(network.state_dict().items(), learned.state_dict().values(), strict=True):
            assert torch.equal(before, after) != name.startswith("split"), name

    def test_the_noise_of_an_answer_is_learned(self, network, repeats, monkeypatch):
        """The scatter of repeats over what is said of it goes to one; the error itself stays."""
        monkeypatch.setattr(uncertainty, "STEPS", 400)
        learned = copy.deepcopy(network)
        learn_parts(learned, repeats, seed=1, device="cpu")
        cases = [uncertainty._case(network, part, "cpu") for part in repeats]
        losses = [sum(uncertainty._parts_loss(net, case).item() for case in cases) for net in (network, learned)]
        assert losses[1] < losses[0] - 0.2

    def test_seeds_reproduce(self, network, repeats, monkeypatch):
        monkeypatch.setattr(uncertainty, "STEPS", 10)
        one, again, other = (copy.deepcopy(network) for _ in range(3))
        for net, seed in ((one, 1), (again, 1), (other, 2)):
            learn_parts(net, repeats, seed=seed, device="cpu")
        weights = [net.split[0].weight for net in (one, again, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


class TestRange:
    @pytest.fixture(scope="class")
    def sessions(self, library) -> list[Session]:
        return [
            session(measure(np.random.default_rng(number), draw_instrument_of([5, number], POINTS), library, 8))
            for number in range(4)
        ]

    def test_training_is_at_a_distance_of_one(self, network, sessions):
        seen, farthest = range_of(network, sessions, sessions)
        deep = torch.cat([uncertainty._bottom(network, part) for part in sessions]).detach()
        distance = ((deep - seen["mean"]) @ seen["whitening"]).square().mean(dim=1).sqrt()
        assert distance.square().mean().sqrt() == pytest.approx(1, rel=1e-3)
        assert farthest == pytest.approx(float(distance.max()), rel=0.1)

    def test_what_is_far_is_farther(self, network, sessions):
        seen, farthest = range_of(network, sessions[:3], sessions[3:])
        deep = torch.cat([uncertainty._bottom(network, part) for part in sessions]).detach()
        strange = deep[:1] + 20 * deep.std(dim=0)
        assert ((strange - seen["mean"]) @ seen["whitening"]).square().mean().sqrt() > farthest
