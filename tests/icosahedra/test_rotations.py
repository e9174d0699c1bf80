"""The group of the icosahedron, its fundamental domain, and angles modulo the group."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.icosahedra.images import VIEWS, viewed_from
from dsnet_bluesky.icosahedra.rotations import (
    GOLDEN,
    IMAGINARY,
    REAL,
    conjugate,
    group,
    matrices,
    mirrored,
    misorientation,
    multiply,
    nearest,
    random_quaternions,
    reduced,
    turned,
)

VERTICES = torch.tensor(np.array([np.roll((0.0, s, t * GOLDEN), k) for k, s, t in itertools.product(range(3), (1, -1), (1, -1))]))
AXIS = st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda v: math.hypot(*v) > 0.1)


def about(axis, degrees):
    n = torch.tensor(axis, dtype=torch.float64)
    half = math.radians(degrees) / 2
    return torch.cat([torch.tensor([math.cos(half)], dtype=torch.float64), math.sin(half) * n / n.norm()])


def test_matrices_turn_as_quaternions_say():
    turn = matrices(about((0.0, 0.0, 1.0), 90.0))
    torch.testing.assert_close(turn @ torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double())
    a, b = random_quaternions(2, 3)
    torch.testing.assert_close(matrices(multiply(a, b)), matrices(a) @ matrices(b))


def test_sixty_rotations_are_those_of_the_vertices_and_form_a_group():
    rotations = group()
    assert rotations.shape == (60, 4)
    torch.testing.assert_close(rotations.norm(dim=-1), torch.ones(60).double())
    for turn in matrices(rotations):
        apart = torch.cdist(VERTICES @ turn.mT, VERTICES)
        assert (apart.min(dim=1).values < 1e-12).all()
        assert apart.argmin(dim=1).unique().numel() == 12
    products = multiply(rotations[:, None], rotations).reshape(-1, 1, 4)
    overlap = (products * rotations).sum(dim=-1).abs()
    assert (overlap.max(dim=-1).values > 1 - 1e-12).all()
    assert ((overlap > 1 - 1e-9).sum(dim=-1) == 1).all()


def test_the_odd_permutations_belong_to_a_turned_icosahedron():
    odd = torch.tensor([GOLDEN, 1.0, 1 / GOLDEN, 0.0]).double() / 2
    assert torch.cdist(VERTICES @ matrices(odd).mT, VERTICES).min(dim=1).values.max() > 0.1


def test_the_fundamental_domain_has_its_size():
    drawn = reduced(random_quaternions(20000, 0))
    assert drawn[:, 0].min() >= REAL[0] - 1e-12
    assert drawn[:, 0].min() < REAL[0] + 2e-3
    assert drawn[:, 1:].abs().max() <= IMAGINARY + 1e-12
    assert drawn[:, 1:].abs().max() > IMAGINARY - 5e-3
    assert pytest.approx(0.925615, abs=1e-6) == REAL[0]
    assert pytest.approx(0.356822, abs=1e-6) == IMAGINARY


def test_uniform_orientations_stay_uniform_in_the_domain():
    """A sixtieth of all rotations: a ball of 20 degrees about one lies inside and holds 60 times its share of all."""
    angle = misorientation(random_quaternions(40000, 1), torch.tensor([1.0, 0, 0, 0]).double())
    t = math.radians(20.0)
    expected = 60 * (t - math.sin(t)) / math.pi
    assert float((angle < 20).double().mean()) == pytest.approx(expected, abs=0.01)


def test_random_quaternions_follow_the_seed_and_have_no_preferred_direction():
    assert torch.equal(random_quaternions(5, 7), random_quaternions(5, 7))
    drawn = random_quaternions(20000, 2)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), torch.eye(4).double() / 4, atol=0.01, rtol=0)


@settings(max_examples=30, deadline=None)
@given(axis=AXIS, degrees=st.floats(0.0, 17.9), start=st.integers(0, 99), other=st.integers(0, 59))
def test_misorientation_is_the_angle_whatever_equivalents_are_compared(axis, degrees, start, other):
    """Below half of 36 degrees nothing is nearer than the turn itself."""
    a = random_quaternions(1, start)[0]
    b = multiply(about(axis, degrees), multiply(a, group()[other]))
    assert float(misorientation(a, -b)) == pytest.approx(degrees, abs=1e-5)
    assert float(misorientation(b, a)) == pytest.approx(degrees, abs=1e-5)


def test_reduction_and_the_nearest_equivalent_do_not_change_the_orientation():
    a, b = random_quaternions(200, 4), random_quaternions(200, 5)
    for equivalent in (reduced(a), nearest(a, b)):
        assert misorientation(a, equivalent).max() < 1e-5
    torch.testing.assert_close(reduced(multiply(a, group()[13])), reduced(a))
    assert ((nearest(a, b) * b).sum(dim=-1) >= REAL[0] - 1e-12).all()


def test_mirrors_and_turns_of_the_icosahedron_are_undone():
    q = random_quaternions(50, 6)
    assert misorientation(mirrored(mirrored(q)), q).max() < 1e-5
    quarter = torch.ones(50)
    back = turned(turned(q, quarter), -quarter)
    assert misorientation(back, q).max() < 1e-5
    one = torch.tensor([1.0, 0, 0, 0]).double()
    views = torch.stack([viewed_from(one, number) for number in range(VIEWS)])
    assert misorientation(multiply(conjugate(views), views), one).max() < 1e-5


def test_the_same_on_another_device():
    q = random_quaternions(3, 8).to("meta")
    assert multiply(q, conjugate(q)).shape == (3, 4)
