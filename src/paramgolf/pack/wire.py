"""Reading and writing small binary structures with every length checked. Plain Python."""

from __future__ import annotations

from paramgolf.errors import GolfError


def varint(value: int) -> bytes:
    """Little-endian base-128: 7 bits a byte, high bit = more follow. `value` >= 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """A cursor over bytes that never reads past the end; every fault is one GolfError naming the place."""

    def __init__(self, data: bytes | memoryview, where: str) -> None:
        self._data = memoryview(data)
        self.where = where
        self._at = 0

    def __len__(self) -> int:
        """Bytes left."""
        return len(self._data) - self._at

    def fault(self, what: str) -> GolfError:
        return GolfError(f"{what} in {self.where}; the file is damaged: get it again")

    def take(self, count: int) -> bytes:
        if count > len(self):
            raise self.fault(f"{count} bytes promised but {len(self)} left")
        self._at += count
        return bytes(self._data[self._at - count : self._at])

    def u8(self) -> int:
        return self.take(1)[0]

    def varint(self, limit: int) -> int:
        """A number from 0 to `limit`, in its shortest form."""
        value = shift = 0
        while True:
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if value > limit or shift > 63:
                raise self.fault(f"a number above its limit {limit}")
            if byte < 0x80:
                if byte == 0 and shift:
                    raise self.fault("a padded number")
                return value
            shift += 7

    def end(self) -> None:
        if len(self):
            raise self.fault(f"{len(self)} surplus bytes")
