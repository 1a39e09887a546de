from experiments.checks import mutations


def test_each_mutation_has_its_place_in_the_code():
    """Where code has changed and its mutation has not, nothing would be broken on purpose."""
    assert mutations.stale() == []
