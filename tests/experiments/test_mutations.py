from experiments.checks import mutations


def test_each_mutation_has_its_place_in_the_code():
    """Each mutation replaces text that occurs exactly once in its file."""
    assert mutations.stale() == []
