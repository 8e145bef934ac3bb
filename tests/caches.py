"""Caches in pages as a decoder leaves them after a while: in any order, and unclean.

Shapes: B sequence, S position, P page, K position in one, M page of a sequence.
"""

import numpy as np

WILD = np.array([2**30, -(2**30), 12345], np.int32)  # that name no page


def table(length_B, page_size, *, spare=3, seed=0):
    """Pages for so many positions of each sequence, [B, M], and the number of pages.

    They are in random order, some are no sequence's, and those of a shorter sequence
    are followed by numbers of none, as is the longest's last.
    """
    rng = np.random.default_rng(seed)
    count_B = -(-np.asarray(length_B) // page_size)
    pages = count_B.sum() + spare
    free = list(rng.permutation(pages))
    table_BM = rng.choice(WILD, (len(count_B), count_B.max() + 1))
    for row, count in zip(table_BM, count_B, strict=True):
        row[:count] = [free.pop() for _ in range(count)]
    return table_BM.astype(np.int32), int(pages)


def scatter(cache_BS, length_B, page_size, **how):
    """The sequences' first positions in pages [P, K, ...], else NaN; and the table."""
    table_BM, pages = table(length_B, page_size, **how)
    pages_PK = np.full((pages, page_size, *cache_BS.shape[2:]), np.nan, np.float32)
    for b, length in enumerate(length_B):
        for position in range(length):
            page = table_BM[b, position // page_size]
            pages_PK[page, position % page_size] = cache_BS[b, position]
    return pages_PK, table_BM
