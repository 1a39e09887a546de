"""Checks that the image decoder returns pixels or raises DataError for damaged image files.

    python experiments/checks/fuzz_decode.py --cases=10000

The files are JPEGs and PNGs of every common kind, made with Pillow, and the files in
`--seeds=FOLDER`, of any format. The program prints the number of images, the number of
cases by error, and the slowest case. The exit code is 1 if a case raised another error, was
too slow, gave other pixels in the second decoding, or crashed the interpreter.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import faulthandler
import io
import multiprocessing
import os
import pathlib
import re
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image

from cnn_jax.data import decode
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.system.errors import DataError

MAX_PIXELS = 4_000_000
MAX_SECONDS = 5.0
LOADED_SIZE = (32, 32)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CASES_A_TASK = 100


class DecoderError(Exception):
    """Raised if the decoder violates one of the rules that this program checks."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of decoding one damaged file.

    Attributes:
      kind: "image", or the message of the DataError without its numbers.
      seconds: The time for reading the header, decoding twice and loading.
    """

    kind: str
    seconds: float


def picture(height: int = 60, width: int = 83) -> Image.Image:
    """Returns a smooth RGB image with some noise, like a photograph."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([4 * y, 3 * x, 255 - 3 * x], axis=-1)
    noise = np.random.default_rng(0).integers(0, 20, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Encodes pixels as an interlaced 8-bit RGB PNG (Adam7), which Pillow cannot write.

    (PNG specification, section 8.2.)
    """
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2))
    rows = b""
    for top, left, down, right in (*passes, (0, 1, 2, 2), (1, 0, 2, 1)):
        part = pixels[top::down, left::right]
        if part.size:
            rows += b"".join(b"\0" + row.tobytes() for row in part)
    height, width = pixels.shape[:2]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 1])
    return (
        _PNG_SIGNATURE
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def deep_png(values: np.ndarray) -> bytes:
    """Encodes values as a 16-bit RGB PNG, which Pillow cannot write."""
    height, width = values.shape[:2]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        _PNG_SIGNATURE
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return len(data).to_bytes(4, "big") + kind + data + crc.to_bytes(4, "big")


def make_seeds() -> dict[str, bytes]:
    """Returns the contents of undamaged JPEG and PNG files of many kinds, by file name."""
    rgb = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Maker"
    depth = np.arange(60 * 83, dtype=np.uint16).reshape(60, 83) * 13
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert("L"))
    return {
        "baseline.jpg": encode(rgb, "JPEG"),
        "subsampled, restarts.jpg": encode(rgb, "JPEG", subsampling=2, restart_marker_rows=1),
        "progressive.jpg": encode(rgb, "JPEG", progressive=True),
        "grey.jpg": encode(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "exif.jpg": encode(rgb, "JPEG", exif=exif, icc_profile=b"\0" * 200, comment="a comment"),
        "large.jpg": encode(picture(300, 400), "JPEG"),
        "rgb.png": encode(rgb, "PNG", exif=exif, dpi=(72, 72)),
        "palette.png": encode(rgb.quantize(64), "PNG", transparency=3),
        "bits.png": encode(rgb.convert("1"), "PNG"),
        "16 bits.png": encode(Image.fromarray(depth), "PNG"),
        "16-bit colours.png": deep_png(np.asarray(rgb, np.uint16) * 200),
        "alpha.png": encode(alpha, "PNG"),
        "interlaced.png": interlaced_png(np.asarray(rgb)),
    }


def read_seeds(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def mutate(rng: np.random.Generator, seeds: Sequence[bytes]) -> bytes:
    """Returns a randomly chosen seed file after one to three random mutations."""
    encoded = seeds[int(rng.integers(len(seeds)))]
    for _ in range(rng.integers(1, 4)):
        if encoded.startswith(_PNG_SIGNATURE) and rng.random() < 0.6:
            encoded = _mutate_parts(rng, encoded, seeds, png_parts, _mend_checksum)
        elif encoded.startswith(b"\xff\xd8") and rng.random() < 0.4:
            encoded = _mutate_parts(rng, encoded, seeds, jpeg_parts, bytes)
        else:
            encoded = _mutate_bytes(rng, encoded)
    return encoded


def _mutate_bytes(rng: np.random.Generator, encoded: bytes) -> bytes:
    if not encoded:
        return encoded
    # In 30 % of the cases only the first 700 bytes are damaged, because these bytes
    # contain the headers.
    end = len(encoded) if rng.random() < 0.7 else min(len(encoded), 700)
    at = int(rng.integers(end))
    length = int(rng.integers(1, rng.choice([2, 3, 9, 65])))
    piece = encoded[at : at + length]
    match rng.integers(7):
        case 0:
            return encoded[:at] + bytes([encoded[at] ^ 1 << rng.integers(8)]) + encoded[at + 1 :]
        case 1:
            return encoded[:at] + rng.bytes(len(piece)) + encoded[at + length :]
        case 2:
            return encoded[:at] + encoded[at + length :]
        case 3:
            return encoded[:at] + rng.bytes(length) + encoded[at:]
        case 4:
            return encoded[:at] + piece * int(rng.integers(2, 6)) + encoded[at + length :]
        case 5:
            extreme = bytes([rng.choice([0x00, 0x01, 0x7F, 0x80, 0xFF])])
            return encoded[:at] + extreme * min(length, 8) + encoded[at + min(length, 8) :]
        case _:
            return encoded[:at]


def _mutate_parts(rng, encoded, seeds, split, mend) -> bytes:
    """Removes, repeats, swaps or damages a part of a file, or inserts a part of another seed file.

    A part is a chunk of a PNG or a segment of a JPEG.
    """
    parts = split(encoded)
    at = int(rng.integers(len(parts)))
    match rng.integers(6):
        case 0:
            del parts[at]
        case 1:
            parts.insert(int(rng.integers(len(parts))), parts[at])
        case 2:
            other = int(rng.integers(len(parts)))
            parts[at], parts[other] = parts[other], parts[at]
        case 3:
            others = [seed for seed in seeds if seed[:2] == encoded[:2]]
            donor = split(others[rng.integers(len(others))])
            parts.insert(at, donor[rng.integers(len(donor))])
        case _:
            parts[at] = mend(_mutate_bytes(rng, parts[at]))
    return b"".join(parts)


def png_parts(encoded: bytes) -> list[bytes]:
    """Splits a PNG into the signature, the chunks, and the bytes after the last chunk."""
    parts, at = [encoded[:8]], 8
    while at + 12 <= len(encoded):
        end = at + 12 + int.from_bytes(encoded[at : at + 4], "big")
        parts.append(encoded[at:end])
        at = end
    return [*parts, encoded[at:]] if at < len(encoded) else parts


def _mend_checksum(chunk: bytes) -> bytes:
    """Corrects the length and the checksum of a damaged PNG chunk, so that decoders accept both."""
    return png_chunk(chunk[4:8], chunk[8:-4]) if len(chunk) >= 12 else chunk


def jpeg_parts(encoded: bytes) -> list[bytes]:
    """Splits a JPEG into its segments; the segment of a scan includes the compressed data."""
    parts, at = [encoded[:2]], 2
    while at < len(encoded):
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        if encoded[at : at + 2] == b"\xff\xda":
            # The compressed data ends at the next marker that is neither a stuffed byte (FF 00) nor
            # a restart marker (FF D0 to FF D7).
            after = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL).search(encoded, end)
            end = after.start() if after else len(encoded)
        parts.append(encoded[at:end])
        at = end
    return parts


def check(encoded: bytes) -> Outcome:
    """Decodes a file with each function of the decoder, and checks the results.

    Raises:
      DecoderError: The result is neither pixels nor a DataError, the two decodings differ, or the
        decoder was too slow.
    """
    start = time.perf_counter()
    kinds = []
    for run in (_decoded_twice, _loaded):
        try:
            run(encoded)
        except DataError as error:
            kinds.append(_without_numbers(str(error)))
        except DecoderError:
            raise
        except BaseException as error:
            raise DecoderError(
                f"{type(error).__name__}: {traceback.format_exc(limit=-4)}"
            ) from error
        else:
            kinds.append("image")
    seconds = time.perf_counter() - start
    if seconds > MAX_SECONDS:
        raise DecoderError(f"took {seconds:.1f} seconds")
    return Outcome(kinds[0], seconds)


def _decoded_twice(encoded: bytes) -> None:
    pixels = decode.decode(encoded, MAX_PIXELS)
    header, _, again = decode.decode_with_header(encoded, MAX_PIXELS)
    if pixels.dtype != np.uint8 or pixels.shape != (header.height, header.width, 3):
        raise DecoderError(f"{pixels.dtype} {pixels.shape} from a file with {header}")
    if not np.array_equal(pixels, again):
        raise DecoderError("other pixels the second time")


def _loaded(encoded: bytes) -> None:
    pixels = decode.load(encoded, Preprocessing(LOADED_SIZE, max_pixels=MAX_PIXELS))
    if pixels.dtype != np.uint8 or pixels.shape != (*LOADED_SIZE, 3):
        raise DecoderError(f"loaded as {pixels.dtype} {pixels.shape}")


def _without_numbers(reason: str) -> str:
    reason = re.sub(r"b(['\"]).*\1|0x[0-9a-f]+", "...", reason)
    return re.sub(r"-?\d+(\.\d+)?", "N", reason)[:90]


def case(number: int, seeds: Sequence[bytes]) -> bytes:
    """Returns the damaged file of a case; the case number and the seeds determine the file."""
    return mutate(np.random.default_rng([0, number]), seeds)


def run(numbers: Iterable[int], seeds: Sequence[bytes]) -> dict[int, Outcome]:
    """Checks the decoder on the cases with the given numbers; returns the outcomes by number.

    Raises:
      DecoderError: A case failed; the message has its number.
    """
    outcomes = {}
    with warnings.catch_warnings():
        # Pillow warns about many errors in files that Pillow can nevertheless decode.
        warnings.simplefilter("ignore")
        for number in numbers:
            try:
                outcomes[number] = check(case(number, seeds))
            except DecoderError as failure:
                raise DecoderError(f"case {number}: {failure}") from failure
    return outcomes


def _run_task(numbers: range, seeds: Sequence[bytes]) -> dict[int, Outcome]:
    # This timer ends the process if a decoder hangs, so that a hang is handled like a crash.
    faulthandler.enable()
    faulthandler.dump_traceback_later(20 * MAX_SECONDS + len(numbers), exit=True)
    try:
        return run(numbers, seeds)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _run_apart(
    tasks: Sequence[range],
    seeds: Sequence[bytes],
    workers: int,
    outcomes: dict[int, Outcome],
    failures: list[str],
) -> list[range]:
    """Runs tasks in other processes; returns the tasks that were lost because a process died."""
    lost = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_run_task, task, seeds): task for task in tasks}
        for future, task in futures.items():
            try:
                outcomes |= future.result()
            except DecoderError as error:
                failures.append(str(error))
            except BrokenProcessPool:
                lost.append(task)
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seeds", type=pathlib.Path, help="folder with further files to mutate")
    flags = parser.parse_args()
    seeds = make_seeds() | (read_seeds(flags.seeds) if flags.seeds else {})
    contents = list(seeds.values())
    outcomes: dict[int, Outcome] = {}
    failures: list[str] = []
    end = flags.first + flags.cases
    tasks = [
        range(first, min(first + _CASES_A_TASK, end))
        for first in range(flags.first, end, _CASES_A_TASK)
    ]
    workers = os.cpu_count() or 1
    for at in range(0, len(tasks), 10 * workers):
        lost = _run_apart(tasks[at : at + 10 * workers], contents, workers, outcomes, failures)
        # If a process dies, the executor also drops the tasks of the other processes. So each lost
        # task is run again in a separate process.
        for task in lost:
            if _run_apart([task], contents, 1, outcomes, failures):
                failures.append(f"the process died in one of the cases {task[0]} to {task[-1]}")
    print(f"{len(outcomes):,} cases from {len(seeds)} files")
    for kind, number in collections.Counter(o.kind for o in outcomes.values()).most_common():
        print(f"{number:>7,}  {kind}")
    if outcomes:
        slowest = max(outcomes, key=lambda number: outcomes[number].seconds)
        print(f"slowest: case {slowest}, {outcomes[slowest].seconds:.2f} s")
    print(f"{len(failures)} failures")
    for failure in failures:
        print(failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
