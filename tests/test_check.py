"""Everything that check.py compares with what is exact, on every process, held to its bounds."""

import math

import pytest
from conftest import run

from check import CHECKS, derivative_error, float32_error, greatest, time_error
from processes import PROCESSES, VE, FromFunctions


@pytest.mark.parametrize("name", list(CHECKS))
def test_mathematics(process, name):
    check, least, most = CHECKS[name]
    value = check(process)
    assert least <= value <= most, value


def test_a_process_of_two_functions():
    """Derivatives by autograd, and all that follows from them."""
    process = FromFunctions(lambda t: 1 - t**2, lambda t: t)
    for name in ("coefficients in float32 against float64, relative error", "every conversion against the exact prediction, relative error",
                 "rk4: order", "log-likelihood, exact trace, there and back, nats"):
        check, least, most = CHECKS[name]
        assert least <= check(process) <= most, name


def test_what_is_inherited_and_wrong_is_seen():
    class Quadratic(VE):  # with the derivative and the inverse of VE
        def sigma(self, t):
            return self.sigma_min + self.sigma_max * t**2

    assert derivative_error(Quadratic()) > 0.1 and time_error(Quadratic()) > 0.1


def test_what_is_not_a_number_is_seen():
    assert math.isnan(greatest([0.1, math.nan, 0.2])) and greatest([0.1, 0.3, 0.2]) == pytest.approx(0.3)
    broken = FromFunctions(lambda t: 1 - t, lambda t: (t - 0.5).sqrt())
    assert math.isnan(float32_error(broken)) and math.isnan(derivative_error(broken))


def test_the_script_prints_a_table_and_tells_what_is_wrong(tmp_path):
    """With two checks only, of which one is wrong."""
    script = tmp_path / "few.py"
    script.write_text("""
import check
check.CHECKS = {"derivatives": (check.derivative_error, 0, 1e-10), "wrong": (lambda process: 2.0, 0, 1)}
check.main()
""")
    result = run("python", script, cwd=tmp_path, PYTHONPATH=str(__import__("conftest").ROOT))
    lines = result.stdout.splitlines()
    assert lines[0] == f"| check | right | {' | '.join(PROCESSES)} |" and len(lines) == 4
    assert (tmp_path / "check.png").stat().st_size > 10_000
    assert result.returncode == 1 and "error: wrong, rf: 2.0, expected < 1" in result.stderr and "derivatives" not in result.stderr
