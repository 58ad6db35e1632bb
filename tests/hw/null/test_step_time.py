"""hw/null/step_time.py."""

from __future__ import annotations

import pytest

from core.errors import QuireError
from hw.null.step_time import StepTime


def test_fixed() -> None:
    assert StepTime.parse(2.5, None).seconds(1) == StepTime.parse(2.5, None).seconds(9999) == 0.0025


def test_interpolates_and_is_flat_outside() -> None:
    time = StepTime.parse(0.0, "100:20,1:2,10:11")
    wanted = {0: 0.002, 1: 0.002, 5: 0.006, 10: 0.011, 55: 0.0155, 100: 0.020, 500: 0.020}
    assert {tokens: pytest.approx(time.seconds(tokens)) for tokens in wanted} == wanted


@pytest.mark.parametrize("table", ["", "1", "1:x", "1:2,1:3", "1:-2", "1:nan", "1:2:3"])
def test_bad_tables_are_named(table: str) -> None:
    with pytest.raises(QuireError, match="null-step-table") as caught:
        StepTime.parse(0.0, table)
    assert caught.value.param == "null_step_table"
