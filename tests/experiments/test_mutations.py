from experiments.checks import mutations


def test_each_mutation_has_its_place_in_the_code():
    """A mutation whose text no longer occurs in the code would change nothing in the code."""
    assert mutations.stale() == []
