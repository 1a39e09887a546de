from experiments.checks import mutations


def test_each_mutation_has_its_place_in_the_code():
    """Each mutation replaces text that occurs exactly once in its file, and has a test file."""
    assert mutations.stale() == []


def test_a_mutation_without_its_text_or_test_is_named(monkeypatch):
    row = ("training/loss.py", "no such text", "", "training/test_nothing.py")
    monkeypatch.setattr(mutations, "MUTATIONS", [row])
    assert mutations.stale() == [
        "training/loss.py has 'no such text' 0 times",
        "there is no tests/training/test_nothing.py",
    ]
