"""What the page about selections is made of."""

from benchmarks import selection
from kvmosaic import methods


def test_a_front_holds_what_no_other_beats_in_both() -> None:
    points = [(1.0, 0.9), (2.0, 0.95), (2.0, 0.5), (3.0, 0.7), (4.0, 0.7), (5.0, 0.1)]
    rows = [{"compression": compression, "score": score} for compression, score in points]
    assert [(row["compression"], row["score"]) for row in selection.front(rows, 1)] == [
        (2.0, 0.95),
        (4.0, 0.7),
        (5.0, 0.1),
    ]
    # a perplexity: less is better
    assert [row["score"] for row in selection.front(rows, -1)] == [0.1]


def test_budgets_of_a_method_share_a_label() -> None:
    assert (
        selection.label("kvzip floor=1.0 keep=0.5") == selection.label("kvzip floor=1.0 keep=0.2") == "kvzip floor=1.0"
    )
    equal, own = (selection.label(each) for each in selection.layers("mosaic-lm")[::2])
    assert (equal, own) == ("xkv, equal layers", "xkv")


def test_every_measured_method_exists() -> None:
    for _, _, recipes in selection.SUITE:
        for recipe in recipes:
            if "profile=" not in recipe:
                methods.parse(recipe)
