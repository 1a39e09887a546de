from collections import Counter

import pytest

from experiments.checks import fuzz_decode

CASES = 500


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_jpegs_and_pngs_give_pixels_or_a_data_error():
    seeds = list(fuzz_decode.make_seeds().values())
    # `run` raises DecoderError on any outcome other than pixels or a DataError.
    outcomes = fuzz_decode.run(range(CASES), seeds)
    assert len(outcomes) == CASES
    kinds = Counter(outcome.kind for outcome in outcomes.values())
    # Mutations test the decoders well only if some files remain readable, and if the decoders
    # report several different errors.
    assert kinds["image"] > CASES / 10
    assert sum(kind.startswith("cannot be decoded") for kind in kinds) > 3


def test_the_seeds_themselves_are_images():
    for name, seed in fuzz_decode.make_seeds().items():
        assert fuzz_decode.check(seed).kind == "image", name


def test_a_mutated_chunk_with_a_valid_checksum_reaches_the_inflater():
    parts = fuzz_decode.png_parts(fuzz_decode.make_seeds()["rgb.png"])
    at = next(i for i, part in enumerate(parts) if part[4:8] == b"IDAT")
    parts[at] = fuzz_decode.png_chunk(b"IDAT", b"\xff" + parts[at][9:-4])
    assert fuzz_decode.check(b"".join(parts)).kind.startswith("cannot be decoded: broken data")


def test_files_are_the_sum_of_their_parts():
    for name, seed in fuzz_decode.make_seeds().items():
        split = fuzz_decode.png_parts if name.endswith(".png") else fuzz_decode.jpeg_parts
        assert b"".join(split(seed)) == seed
        assert len(split(seed)) > 3
