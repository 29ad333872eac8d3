"""Rows of a head by class name."""

from models.weights.row_maps import agrees_with_order, match_rows, normalise_name

HEAD = ("move_left", "Spin Right", "grow", "idle")


def test_equal_lists_are_kept_even_where_they_are_numbers() -> None:
    assert match_rows(HEAD, HEAD) == (0, 1, 2, 3)
    assert match_rows(("0", "1"), ("0", "1")) == (0, 1)
    assert match_rows(("0", "1", "2"), ("0", "1")) == (None, None)


def test_spelling_does_not_matter_and_what_is_absent_has_no_row() -> None:
    assert normalise_name(" Spin_ RIGHT ") == "spin right"
    assert match_rows(HEAD, ("IDLE", "spin_right", "shrink", "move left")) == (3, 1, None, 0)


def test_an_exact_name_goes_before_a_similar_one_and_no_row_is_given_twice() -> None:
    assert match_rows(("pose", "Pose"), ("Pose", "pose", "POSE")) == (1, 0, None)
    assert match_rows(("pose", "Pose"), ("POSE",)) == (None,)  # which of the two?


def test_synonyms_hold_for_both_sides_and_unnamed_rows_are_passed_over() -> None:
    synonyms = {"drinking": "sipping cup"}
    assert match_rows((None, "sipping cup"), ("Drinking",), synonyms) == (1,)
    assert match_rows((None, "Drinking"), ("sipping_cup",), synonyms) == (1,)
    assert match_rows(("drinking", "sipping cup"), ("sipping cup", "drinking"), synonyms) == (1, 0)


def test_an_order_is_known_by_most_of_its_names() -> None:
    head = ("a", "b", "c", None)
    assert agrees_with_order(head, (2, 3, 0), ("C", "new", "a"))
    assert not agrees_with_order(head, (2, 3, 0), ("a", "new", "C"))
    assert not agrees_with_order(head, (3, 0), ("new", "a"))  # half is not most
    assert not agrees_with_order(head, (2, 3, 0), ("C", "new"))
