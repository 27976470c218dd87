"""The harness's arithmetic of time: who runs when, for how long, and what is made of it."""

import gc
import time

import pytest

from benchmarks.timing import Rounds, clocked, interleave, quartiles, ratio, summary


def never():
    return time.perf_counter() + 1000


def works(log, names="ABC"):
    def work(name):
        def run():
            log.append(name)
            return {"n": float(len(log))}

        return run

    return {name: work(name) for name in names}


def test_contenders_run_strictly_in_turns_and_the_warm_up_is_thrown_away():
    log = []
    found = interleave(works(log), Rounds(until=never(), least=2, most=4, warm=1))
    assert "".join(log) == "ABC" * 5
    assert found["A"]["n"] == [4.0, 7.0, 10.0, 13.0] and found["C"]["n"] == [6.0, 9.0, 12.0, 15.0]


def test_it_stops_when_the_time_is_over_and_never_before_the_fewest_rounds():
    log = []
    found = interleave(works(log, "AB"), Rounds(until=0.0, least=3, most=9, warm=2))
    assert "".join(log) == "AB" * 5 and len(found["A"]["n"]) == 3

    def slow():
        time.sleep(0.02)
        return {"n": 0.0}

    rounds = interleave({"A": slow}, Rounds.within(0.1, least=1, most=1000, warm=0))["A"]["n"]
    assert 1 <= len(rounds) <= 6


def test_garbage_is_not_collected_within_a_work_and_the_collector_is_left_as_it_was():
    seen = []
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            interleave(
                {"A": lambda: seen.append(gc.isenabled()) or {}},
                Rounds(until=0.0, least=1, most=1, warm=0),
            )
            assert gc.isenabled() is enabled
        finally:
            gc.enable()
    assert seen == [False, False]
    with pytest.raises(ZeroDivisionError):
        interleave({"A": lambda: 1 / 0}, Rounds(until=0.0, least=1, most=1))
    assert gc.isenabled()


@pytest.mark.parametrize("wrong", [{"least": 0}, {"least": 5, "most": 4}, {"warm": -1}])
def test_rounds_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match="least must be 1 or more"):
        Rounds(until=0.0, **wrong)


def test_a_clocked_work_takes_the_time_of_its_work():
    assert 0.02 <= clocked(lambda: time.sleep(0.02), "s")()["s"] < 1.0


def test_the_ratio_is_that_of_the_medians_and_its_spread_that_of_the_rounds():
    over, under = [2.0, 4.0, 30.0, 6.0, 5.0], [1.0, 2.0, 10.0, 4.0, 5.0]
    value, (low, high) = ratio(over, under)
    assert value == 5.0 / 4.0  # the ratios of the rounds are 2, 2, 3, 1.5, 1, with median 2
    assert (low, high) == (1.5, 2.0)
    with pytest.raises(ValueError, match="not taken in the same rounds"):
        ratio(over, under[:4])


def test_quartiles_lie_within_the_values():
    assert quartiles([3.0]) == [3.0, 3.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]
    assert summary([5.0, 1.0, 3.0]) == {
        "median": 3.0,
        "quartiles": [2.0, 4.0],
        "samples": [5.0, 1.0, 3.0],
    }
