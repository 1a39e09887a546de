"""Near duplicates: images that look alike, such as two frames of a video.

Two images are near duplicates if their perceptual hashes differ in few bits and their 8 x 8
thumbnails in few grey levels. (The hash does not depend on colour, and it says little about
images without structure.)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cnn_jax.data.decode import Pixels

# By default, the 64-bit hashes of two near duplicates differ in at most this number of bits.
NEAR_DISTANCE = 4
# The mean difference between the thumbnails of two near duplicates has an upper limit, in grey
# levels: a constant for the noise of encoders, plus a fraction of the image's contrast.
_NOISE, _SHARE_OF_CONTRAST = 1.0, 0.25
_THUMBNAIL = (8, 8)
THUMBNAIL_VALUES = math.prod(_THUMBNAIL) * 3
# The largest allowed distance between hashes, in bits. With a larger distance, most images of any
# data set would count as near duplicates.
MAX_DISTANCE = 12
_HASH_BITS = 64
# To limit the memory use, pairs of hashes are compared in blocks of about this number of pairs.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Looks:
    """The hashes and the thumbnails of images.

    Attributes:
      hashes: The perceptual hash of each image.
      thumbnails: The grey levels of each image reduced to 8 x 8, R G B.
    """

    hashes: UInt64[np.ndarray, " n"]
    thumbnails: UInt8[np.ndarray, "n 192"]

    @functools.cached_property
    def _tolerances(self) -> Float[np.ndarray, " n"]:
        """The largest mean difference to the thumbnail of a near duplicate, in grey levels."""
        pixels = self.thumbnails.reshape(-1, math.prod(_THUMBNAIL), 3)
        return _NOISE + _SHARE_OF_CONTRAST * pixels.std(axis=1).mean(axis=1)

    def differences(
        self, first: Int[np.ndarray, " m"], second: Int[np.ndarray, " m"]
    ) -> Float[np.ndarray, " m"]:
        """Returns the mean difference between the thumbnails of each pair, in grey levels."""
        difference = self.thumbnails[first].astype(np.int16) - self.thumbnails[second]
        return np.abs(difference).mean(axis=1)

    def are_alike(
        self, first: Int[np.ndarray, " m"], second: Int[np.ndarray, " m"]
    ) -> Bool[np.ndarray, " m"]:
        """Returns whether the thumbnails of each pair of images have a small difference."""
        limits = np.minimum(self._tolerances[first], self._tolerances[second])
        return self.differences(first, second) <= limits

    def nearest_before(self, position: int) -> int | None:
        """Returns the position of the most similar near duplicate that stands before an image.

        The images are compared by their thumbnails. Of equally similar images, the first counts.

        Returns:
          The position, or None if no near duplicate stands before the image.
        """
        bits = np.bitwise_count(self.hashes[:position] ^ self.hashes[position])
        near = np.flatnonzero(bits <= NEAR_DISTANCE)
        near = near[self.are_alike(near, np.full(len(near), position))]
        if not len(near):
            return None
        return int(near[self.differences(near, np.full(len(near), position)).argmin()])


def thumbnail(pixels: Pixels) -> UInt8[np.ndarray, "192"]:
    """Returns the grey levels of an image that is reduced to 8 x 8 pixels, R G B."""
    return np.asarray(Image.fromarray(pixels).resize(_THUMBNAIL, Image.Resampling.BOX)).ravel()


def perceptual_hash(pixels: Pixels) -> int:
    """Returns a hash of 64 bits that changes little when an image is resized or re-encoded.

    The hash is the "pHash" of `imagehash`: the image is converted to grey and resized to 32 x 32
    pixels. A bit says whether one of the lowest 8 x 8 frequencies of the cosine transform is above
    the median of these frequencies.
    """
    import imagehash

    bits = imagehash.phash(Image.fromarray(pixels)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_components(
    hashes: UInt64[np.ndarray, " n"], thumbnails: UInt8[np.ndarray, "n 192"], distance: int
) -> Int[np.ndarray, " n"]:
    """Finds the sets of images that are connected by chains of near duplicates.

    Args:
      hashes: Hashes of 64 bits.
      thumbnails: The grey levels of each image reduced to 8 x 8, R G B.
      distance: The largest number of bits in which the hashes of near duplicates differ. Their
        thumbnails must also have a small mean difference, relative to their contrast.

    Returns:
      The number of the set of each image.
    """
    # Images with the same hash and the same thumbnail, such as copies, are compared only once.
    both = np.concatenate([hashes[:, np.newaxis].view(np.uint8), thumbnails], axis=1)
    _, first_images, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    hashes, thumbnails = hashes[first_images], thumbnails[first_images]
    part = np.arange(len(hashes))
    looks = Looks(hashes, thumbnails)

    def join(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        first, second = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
        edges = (np.ones(len(first), bool), (part[first], part[second]))
        graph = coo_array(edges, shape=(len(hashes), len(hashes)))
        part[:] = connected_components(graph, directed=False)[1][part]

    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    number = 0
    for first, second in near_pairs(hashes, distance):
        is_near = looks.are_alike(first, second)
        waiting.append((first[is_near], second[is_near]))
        number += int(is_near.sum())
        # The connected components are updated after each block of pairs, because all pairs may not
        # fit into memory.
        if number > _BLOCK:
            join(waiting)
            waiting, number = [], 0
    if waiting:
        join(waiting)
    return part[inverse]


def near_pairs(
    hashes: UInt64[np.ndarray, " n"], distance: int
) -> Iterator[tuple[Int[np.ndarray, " _m"], Int[np.ndarray, " _m"]]]:
    """Yields all pairs of positions whose hashes differ in at most `distance` bits.

    The bits are divided into distance + 1 bands. Two such hashes are equal in at least one
    band, so only hashes with an equal band are compared. A pair with several equal bands is
    yielded several times.

    Args:
      hashes: Hashes of 64 bits.
      distance: From 0 to 63.

    Yields:
      The first and the second position of some pairs.
    """
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        ordered = hashes[order]
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        starts, ends = np.r_[0, cuts], np.r_[cuts, len(hashes)]
        for start, end in zip(starts, ends, strict=True):
            while end - start > 1:
                stop = min(start + max(_BLOCK // (end - start), 1), end)
                differing = ordered[start:stop, np.newaxis] ^ ordered[np.newaxis, start:end]
                first, second = np.nonzero(np.bitwise_count(differing) <= distance)
                is_new = first < second
                if is_new.any():
                    yield order[start + first[is_new]], order[start + second[is_new]]
                start = stop
