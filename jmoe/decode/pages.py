"""Which pages of a decoder's cache are whose."""


class Pages:
    """Hands out pages, and takes them back; it never copies or clears any."""

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, number: int) -> list[int] | None:
        """Returns so many pages; None if there aren't as many."""
        if number > len(self._free):
            return None
        return [self._free.pop() for _ in range(number)]

    def give_back(self, pages: list[int]) -> None:
        """Makes pages that were taken free again."""
        assert not set(pages) & set(self._free), "a page is free already"
        self._free.extend(pages)
