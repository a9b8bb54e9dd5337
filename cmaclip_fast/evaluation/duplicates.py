"""Near-duplicates: rows with the same text or nearly the same picture, and where their labels disagree."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA

NOT_GROUPED = -1

THUMBNAIL_SIDE = 16
"""Pixels a side of the thumbnails that are compared."""

_SAME = 3.0
"""Root mean square of the difference of two thumbnails, 0 to 255, up to which they show one picture."""

_SAME_SHARE = 0.15
"""The same, as a share of the thumbnail's own deviation, so that faint drawings are not all alike."""

_NEIGHBOURS, _COMPONENTS = 16, 16
_COMMON = 0.02
"""A text or picture that more of the rows have than this, such as a placeholder, does not make them duplicates."""

_AGREEMENT, _FEW = 0.8, 20


@dataclass(frozen=True)
class Conflict:
    """A row whose label differs from that of most of its duplicates.

    Attributes:
        row, related: the row, and one with the label of most.
        agreement: how often rows of such groups have the label of most, 0 to 1.
    """

    row: int
    related: int
    agreement: float


def normalised(text: str) -> str:
    """A text as it is compared: NFKC, without case, punctuation and repeated spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain)) or plain.strip()


def text_groups(texts: Sequence[str | None]) -> np.ndarray:
    """`[N]`, equal for rows with the same normalised text; -1 where there is no other such row."""
    numbers: dict[str, int] = {}
    found = np.array(
        [NOT_GROUPED if text is None else numbers.setdefault(normalised(text), len(numbers)) for text in texts],
        dtype=np.int64,
    )
    return _of_use(found)


def _of_use(groups: np.ndarray) -> np.ndarray:
    """The groups of at least two rows, and of few enough."""
    sizes = np.bincount(groups[groups != NOT_GROUPED], minlength=1)
    kept = (groups != NOT_GROUPED) & (sizes[groups] > 1) & (sizes[groups] <= max(_COMMON * len(groups), _FEW))
    return np.where(kept, groups, NOT_GROUPED)


def picture_groups(thumbnails: np.ndarray, present: np.ndarray) -> np.ndarray:
    """`[N]`, equal for rows with nearly the same picture; -1 where there is no other such row.

    Args:
        thumbnails: `[N, S, S, 3]` uint8.
        present: `[N]` bool, which rows have a picture.
    """
    groups = np.full(len(thumbnails), NOT_GROUPED, dtype=np.int64)
    rows = np.flatnonzero(present)
    if len(rows) < 2:
        return groups
    pixels = thumbnails[rows].reshape(len(rows), -1).astype(np.float32)
    deviation = thumbnails[rows].reshape(len(rows), -1, 3).std(axis=1).mean(axis=1)
    same = np.where(deviation > 1, np.minimum(_SAME, _SAME_SHARE * deviation), 1.0)  # 1.0: pictures of one colour
    few = min(_COMPONENTS, *pixels.shape)
    # a projection brings rows closer, never apart, so no near one is lost but beyond the number of neighbours
    with np.errstate(invalid="ignore"):  # of pictures that are all the same
        projected = PCA(few, random_state=0).fit_transform(pixels)
    radius = _SAME * np.sqrt(pixels.shape[1])
    _, near = cKDTree(projected).query(projected, k=min(_NEIGHBOURS, len(rows)), distance_upper_bound=radius)
    left, place = np.nonzero(near < len(rows))
    right = near[left, place]
    left, right = left[left != right], right[left != right]
    differences = np.sqrt(((pixels[left] - pixels[right]) ** 2).mean(axis=1))
    close = differences <= np.minimum(same[left], same[right])
    links = coo_array((np.ones(close.sum()), (left[close], right[close])), shape=(len(rows), len(rows)))
    _, found = connected_components(links, directed=False)
    groups[rows] = found
    return _of_use(groups)


def together(*groupings: np.ndarray) -> np.ndarray:
    """`[N]`: rows that share a group of any grouping, through others too, share a group; the rest have their own."""
    count = len(groupings[0])
    left, right = [], []
    for grouping in groupings:
        members = np.flatnonzero(grouping != NOT_GROUPED)
        first = np.full(grouping.max(initial=0) + 1, -1)
        first[grouping[members][::-1]] = members[::-1]
        left.append(members)
        right.append(first[grouping[members]])
    ends = np.concatenate(left), np.concatenate(right)
    found: np.ndarray = connected_components(coo_array((np.ones(len(ends[0])), ends), (count, count)), False)[1]
    return found


def both(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`[N]`, equal for rows that share a group of each grouping; -1 for the rest."""
    grouped = (one != NOT_GROUPED) & (other != NOT_GROUPED)
    found = np.full(len(one), NOT_GROUPED, dtype=np.int64)
    if grouped.any():
        found[grouped] = np.unique(np.stack([one[grouped], other[grouped]]), axis=1, return_inverse=True)[1].ravel()
    return found


def conflicts(groups: np.ndarray, labels: np.ndarray, quality: np.ndarray, strict: bool) -> Iterator[Conflict]:
    """The rows whose label is not that of most of their group; of equally many, the labels of higher quality stay.

    Args:
        groups: `[N]`, -1 for a row without one.
        labels: `[N]`, -1 where unlabelled.
        quality: `[N]`, of the labels, as `Judged` gives it.
        strict: whether disagreement is an error even where it is common. Else nothing is given where many groups
            disagree, since then the task depends on more than what the rows of a group share.
    """
    rows = np.flatnonzero((groups != NOT_GROUPED) & (labels >= 0))
    rows = rows[np.argsort(groups[rows], kind="stable")]
    found, judged, agreeing = [], 0, 0
    for members in np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1):
        if len(members) < 2:
            continue
        classes, of_class = np.unique(labels[members], return_inverse=True)
        votes = np.bincount(of_class) + np.bincount(of_class, weights=quality[members]) / (1 + quality[members].sum())
        kept = classes[votes.argmax()]
        same = members[labels[members] == kept]
        related = int(same[quality[same].argmax()])
        judged += len(members)
        agreeing += len(same)
        found += [(int(row), related) for row in members[labels[members] != kept]]
    agreement = agreeing / judged if judged else 0.0
    if strict or judged < _FEW or agreement >= _AGREEMENT:
        for row, related in found:
            yield Conflict(row, related, agreement)
