"""Everything that check.py compares with what is exact, on every process, held to its bounds."""

import math

import pytest
import torch

import check
from check import (
    CHECKS,
    COLUMNS,
    ORDERS,
    STEPS,
    applies,
    coefficient_error,
    conversion_error,
    likelihood_error,
    order_error,
    time_error,
)
from processes import VE, FromFunctions
from sampling import ODE_SAMPLERS, SDE_SAMPLERS


@pytest.mark.parametrize("name", list(CHECKS))
@pytest.mark.parametrize("process", list(COLUMNS))
def test_mathematics(process, name):
    function, bound, *arguments = CHECKS[name]
    if not applies(COLUMNS[process](), function, *arguments):
        pytest.skip("not for this process")
    torch.manual_seed(0)
    error = function(COLUMNS[process](), *arguments)
    assert error < bound, error


def test_every_sampler_is_checked():
    """A new one needs a row in ORDERS or STEPS of check.py."""
    assert ORDERS.keys() | {"dopri5", "flow_map"} == ODE_SAMPLERS.keys() and STEPS.keys() == SDE_SAMPLERS.keys()


@pytest.mark.parametrize("function, bound, arguments", [
    (coefficient_error, 1e-4, [torch.float32]), (conversion_error, 1e-9, []), (order_error, 0.2, ["rk4"]),
    (likelihood_error, 1e-3, []),
])
def test_a_process_of_two_functions(function, bound, arguments):
    """Derivatives by autograd, and all that follows from them."""
    assert function(FromFunctions(lambda t: 1 - t**2, lambda t: t), *arguments) < bound


def test_wrong_formulas_that_are_inherited_are_found():
    class Quadratic(VE):  # with the derivative and the inverse of VE
        def sigma(self, t):
            return self.sigma_min + self.sigma_max * t**2

    assert coefficient_error(Quadratic(), torch.float64) > 0.1 and time_error(Quadratic()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_found(dtype):
    pairs = [(torch.tensor([1.0, value]), torch.tensor([1.0, 2.0])) for value in (2.2, math.nan, 2.4)]
    assert math.isnan(check.worst(pairs)) and check.worst(pairs[::2]) == pytest.approx(0.2)
    broken = FromFunctions(lambda t: 1 - t, lambda t: (t - 0.5).sqrt())
    assert math.isnan(coefficient_error(broken, dtype))


def test_the_script_prints_a_table_and_ends_with_what_is_wrong(monkeypatch, capsys):
    """With three checks only, of which two are wrong."""
    monkeypatch.setattr(check, "CHECKS", {"times": (time_error, 1e-9), "wrong": (lambda process, x: x, 1.0, 2.0),
                                          "broken": (lambda process: math.nan, 1.0)})
    with pytest.raises(SystemExit, match="error: wrong, rf: 2.0, expected < 1; .*broken, edm: nan") as end:
        check.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| check | right | {' | '.join(COLUMNS)} |" and len(lines) == 5
    assert lines[3] == f"| wrong | < 1 |{' 2 |' * len(COLUMNS)}" and "times" not in str(end.value)
