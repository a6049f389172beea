"""Walk-forward folds: nothing that a training segment is made of touches the bars that validate it."""

import pandas as pd
import pytest

from kronos_qlib.data.folds import purged_segments, walk_forward_folds

SESSIONS = pd.bdate_range("2020-01-01", periods=400)
PLACES = {session: place for place, session in enumerate(SESSIONS)}


def places(segment: tuple[pd.Timestamp, pd.Timestamp]) -> set[int]:
    return set(range(PLACES[segment[0]], PLACES[segment[1]] + 1))


@pytest.mark.parametrize("train_sessions", [None, 50])
@pytest.mark.parametrize(
    ("folds", "reach", "horizon", "size"), [(2, 2, 0, None), (3, 2, 10, 60), (5, 0, 0, 30), (4, 21, 5, 40)]
)
def test_no_training_date_s_label_or_horizon_touches_a_validation_bar(folds, reach, horizon, size, train_sessions):
    made = walk_forward_folds(SESSIONS, folds, reach, horizon, size, train_sessions)
    assert len(made) == folds
    for fold in made:
        train, valid = places(fold["train"]), places(fold["valid"])
        touched = {place + ahead for place in train for ahead in range(max(reach, horizon) + 1)}
        assert not touched & valid and max(train) < min(valid)
        assert min(valid) - max(train) == reach + horizon + 1, "no more is lost than the embargo"
        assert len(train) == (train_sessions or min(valid) - reach - horizon)
        assert max(valid) + reach < len(SESSIONS), "labels of validation are made of bars within the range"


def test_the_validation_blocks_cover_the_end_of_the_range_without_overlap():
    made = walk_forward_folds(SESSIONS, 4, reach=2, horizon=5, valid_sessions=70)
    blocks = [sorted(places(fold["valid"])) for fold in made]
    assert sum(blocks, []) == list(range(400 - 2 - 4 * 70, 400 - 2))
    assert [len(block) for block in blocks] == [70] * 4
    equal = walk_forward_folds(SESSIONS, 3, reach=0)
    assert [len(places(fold["valid"])) for fold in equal] == [100] * 3 and len(places(equal[0]["train"])) == 100


def test_a_single_division_is_purged_too():
    (fold,) = purged_segments(SESSIONS, SESSIONS[300], reach=2, horizon=3)
    assert places(fold["train"]) == set(range(295)) and places(fold["valid"]) == set(range(300, 398))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: walk_forward_folds(SESSIONS, 1, 2), "walk-forward folds are two or more, not 1"),
        (lambda: walk_forward_folds(SESSIONS, 4, 2, 0, 100), "2020-01-01 … 2021-07-13 has 400 sessions"),
        (lambda: walk_forward_folds(SESSIONS[:5], 3, 2), "5 sessions"),
        (lambda: walk_forward_folds(SESSIONS[:0], 3, 2), "the range has 0 sessions"),
        (lambda: purged_segments(SESSIONS, SESSIONS[5], 2, 4), "5 sessions before 2020-01-08"),
        (lambda: purged_segments(SESSIONS, SESSIONS[398], 2), "2 from then on"),
    ],
)
def test_folds_that_do_not_fit_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
