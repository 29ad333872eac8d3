"""Size and version of the objects of a store, kept in the node's cache beside their blocks."""

import logging
import time

from pipelines.formatting import printable
from pipelines.storage.block_cache import BlockCache
from pipelines.storage.object_store import ObjectInfo, StoreUnavailable, object_info

_IN_MEMORY = 4096  # objects, for a cache that cannot be written
_AWAY = 60.0  # seconds for which a store that did not answer is not asked about objects with a record

logger = logging.getLogger(__name__)


class ObjectRecords:
    """What the store last answered about each object.

    A record is a file of the cache, so it counts towards the limit, and all processes of the node share it.
    The store is asked about an object whose record is older than this `ObjectRecords`. If it does not answer,
    the old record holds: a run whose videos are in the cache goes on without the store.
    """

    def __init__(self, cache: BlockCache) -> None:
        self._cache = cache
        self._since = time.time()
        self._memory: dict[str, tuple[float, ObjectInfo]] = {}
        self._away_until = 0.0
        self._warned = False

    def get(self, url: str, patience: float) -> ObjectInfo:
        """Size and version of an object. Raises as `object_info`, if there is no record of it."""
        found = self._load(url)
        if found is None:
            return self.update(url, patience)
        asked, info = found
        if asked >= self._since or time.monotonic() < self._away_until:
            return info
        try:
            return self.update(url, patience=0)
        except StoreUnavailable as error:
            self._away_until = time.monotonic() + _AWAY
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the store does not say whether %s was replaced, so what the cache has of it is used, as "
                    "for other objects until the store answers: %s",
                    printable(url), error,
                )  # fmt: skip
            return info

    def update(self, url: str, patience: float) -> ObjectInfo:
        """Ask the store about an object, with one request. Raises as `object_info`."""
        info = object_info(url, patience=patience)
        asked = time.time()
        if len(self._memory) >= _IN_MEMORY:
            self._memory.clear()
        self._memory[url] = asked, info
        self._cache.put(_name(url), f"{asked} {info.size} {info.version}".encode())
        return info

    def _load(self, url: str) -> tuple[float, ObjectInfo] | None:
        """When the store was asked about an object, in seconds since 1970, and its answer."""
        found = [self._memory[url]] if url in self._memory else []
        if (content := self._cache.get(_name(url))) is not None:
            asked, size, version = content.decode().split(" ", 2)
            found.append((float(asked), ObjectInfo(int(size), version)))
        return max(found, default=None)


def _name(url: str) -> str:
    return f"{url} object"
