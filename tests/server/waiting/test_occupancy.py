"""Who has rows, and since when, follows from the reports of an engine's steps."""

from __future__ import annotations

from server.waiting.occupancy import Occupancy


def test_rows_are_wanted_until_they_are_given_or_no_longer_asked_for() -> None:
    occupancy = Occupancy()
    for name, rows in [("a", 4), ("b", 2), ("c", 1)]:
        occupancy.enter(name, rows, 0.0)
    assert (occupancy.wanting, occupancy.rows_wanted) == (3, 7)
    occupancy.joined(["a"], 1.0)
    assert (occupancy.wanting, occupancy.rows_wanted) == (2, 3)
    assert occupancy.leave("b", 2.0) is None, "it never had rows"
    assert (occupancy.wanting, occupancy.rows_wanted) == (1, 1)
    assert occupancy.leave("a", 3.0) == 3.0
    assert (occupancy.wanting, occupancy.rows_wanted) == (1, 1)


def test_a_request_has_its_rows_from_the_beginning_of_the_step_in_which_it_joins() -> None:
    occupancy = Occupancy()
    occupancy.enter("first", 1, 5.0)
    occupancy.joined(["first"], 6.0)  # the engine was idle before
    occupancy.enter("second", 1, 6.5)
    occupancy.joined([], 7.0)
    occupancy.joined(["second"], 8.0)
    assert [occupancy.leave(name, 10.0) for name in ("first", "second")] == [5.0, 3.0]


def test_what_a_report_says_of_those_who_have_left_is_ignored() -> None:
    occupancy = Occupancy()
    occupancy.enter("a", 2, 0.0)
    occupancy.enter("b", 3, 0.0)
    occupancy.leave("a", 1.0)
    occupancy.joined(["a", "b"], 2.0)
    assert (occupancy.wanting, occupancy.rows_wanted) == (0, 0)
    assert occupancy.until_ended(1, 5.0, 2.0) == 3.0


def test_rows_are_free_when_those_that_have_them_have_had_their_time() -> None:
    occupancy = Occupancy()
    assert occupancy.until_ended(1, 10.0, 0.0) == 0.0, "nobody has rows"
    for now, name in enumerate("abc"):
        occupancy.enter(name, 1, float(now))
        occupancy.joined([name], now + 0.5)
    occupancy.enter("d", 1, 2.5)
    assert [occupancy.until_ended(count, 10.0, 4.0) for count in (1, 2, 3)] == [6.0, 7.0, 8.0]
    assert [occupancy.until_ended(count, 10.0, 4.0) for count in (4, 6, 7)] == [16.0, 18.0, 26.0], "those that follow them"
    assert occupancy.until_ended(1, 10.0, 50.0) == 0.0, "late as it is, it may end at any time"
