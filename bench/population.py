"""Who connects: ids and everything else that benchmarks put into a registry, from seeded generators.

Ids have the form of a random UUID, 36 characters. For attacks there are ids that all go to one shard, and ids that
share all 32 bits of their FNV-1a hash.
"""

from __future__ import annotations

import itertools
import string
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

from wsfast import Registry, fnv1a_32

_T = TypeVar("_T")

SEED = 20_240_601
# Devices, plans and versions have this variety: 4 x 50 sets of two tags, as in a service with staged releases.
_PLANS = ("free", "pro", "team", "enterprise")
_VERSIONS = tuple(f"5.{minor}.{patch}" for minor in range(10) for patch in range(5))
_DEVICE_TYPES = ("ios", "android", "web", "desktop")
_PERMISSIONS = (("read",), ("read", "write"), ("read", "write", "invite"), ("read", "write", "invite", "admin"))
_ALPHABET = string.ascii_letters + string.digits
_FNV_PRIME = 0x01000193
_FNV_OFFSET_BASIS = 0x811C9DC5


@dataclass(frozen=True)
class Population:
    """Connections with all fields of the record; the attributes have the same length and order.

    The collector has nothing to visit here: tuples of plain objects, which it stops tracking, and connection objects
    that it never tracks. What it visits more after a registry was filled is the registry's.
    """

    ids: tuple[str, ...]
    conns: tuple[object, ...]
    user_ids: tuple[str, ...]
    device_types: _Choices[str]
    device_infos: _Choices[str]
    sessions: tuple[object, ...]
    permissions: _Choices[tuple[str, ...]]
    tags: _Choices[dict[str, str]]


class _Choices(Generic[_T]):
    """Many random choices out of few values, without a container that the collector would have to visit."""

    def __init__(self, values: Sequence[_T], count: int, random: Random) -> None:
        self._values = values
        self._chosen = array("H", random.choices(range(len(values)), k=count))

    def __iter__(self) -> Iterator[_T]:
        return map(self._values.__getitem__, self._chosen)


def make_ids(count: int, seed: int = SEED) -> list[str]:
    """Ids that look like random UUIDs, such as ``3f2b8c1e-9a47-4d06-8b5f-0c7de1a29f34``."""
    bits = Random(seed).getrandbits
    return [_uuid(bits(128)) for _ in range(count)]


def _uuid(number: int) -> str:
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"


def make_population(count: int) -> Population:
    """Connections with unique ids and user ids."""
    random = Random(SEED + 1)
    tag_sets = [{"plan": plan, "version": version} for plan in _PLANS for version in _VERSIONS]
    infos = [f"{kind}, model {model}" for kind in _DEVICE_TYPES for model in range(25)]
    return Population(
        ids=tuple(make_ids(count)),
        conns=make_conns(count),
        user_ids=tuple(f"user-{number}" for number in range(count)),
        device_types=_Choices(_DEVICE_TYPES, count, random),
        device_infos=_Choices(infos, count, random),
        sessions=make_conns(count),
        permissions=_Choices(_PERMISSIONS, count, random),
        tags=_Choices(tag_sets, count, random),
    )


def make_conns(count: int) -> tuple[object, ...]:
    """Stand-ins for connection objects, of the smallest kind there is."""
    return tuple(object() for _ in range(count))


def copies(ids: Sequence[str]) -> list[str]:
    """Equal strings in memory of their own, in order, whose hash nobody has computed yet."""
    return [client_id.encode().decode() for client_id in ids]


# ---- attacks ---------------------------------------------------------------------------------------------------------


def same_shard_ids(count: int, seed: int = SEED) -> list[str]:
    """Ids like those of :func:`make_ids` that a registry of 64 shards keeps in shard 0: the last digits are tried."""
    shard_of = Registry(64).shard_of
    bits = Random(seed).getrandbits
    found: dict[str, None] = {}
    while len(found) < count:
        head = _uuid(bits(128))[:-4]
        tails = (f"{head}{bits(16):04x}" for _ in itertools.count())
        found[next(client_id for client_id in tails if shard_of(client_id) == 0)] = None
    return list(found)


def same_hash_ids(count: int, seed: int = SEED) -> list[str]:
    """Ids with one and the same FNV-1a hash of 32 bits; 100,000 of them take 68 characters.

    The whole state of FNV-1a between two bytes is the hash so far. From each state two blocks of four characters are
    found that lead to the same next state, by the birthday bound after some 80,000 trials. A chain of n such pairs
    gives 2**n strings that end in one hash.
    """
    random = Random(seed)
    pairs: list[tuple[str, str]] = []
    state = _FNV_OFFSET_BASIS
    while 2 ** len(pairs) < count:
        pair, state = _colliding_blocks(state, random)
        pairs.append(pair)
    ids = ["".join(blocks) for blocks in itertools.islice(itertools.product(*pairs), count)]
    if len({fnv1a_32(client_id.encode()) for client_id in ids}) != 1 or len(set(ids)) != count:
        raise AssertionError("the blocks do not collide")
    return ids


def _colliding_blocks(state: int, random: Random) -> tuple[tuple[str, str], int]:
    """Two blocks that lead from *state* to the same state, and that state."""
    seen: dict[int, str] = {}
    while True:
        block = "".join(random.choices(_ALPHABET, k=4))
        reached = state
        for octet in block.encode():
            reached = ((reached ^ octet) * _FNV_PRIME) & 0xFFFFFFFF
        other = seen.setdefault(reached, block)
        if other != block:
            return (other, block), reached


def random_ids_like(ids: Sequence[str], seed: int = SEED) -> list[str]:
    """As many random ids of the length and the alphabet of :func:`same_hash_ids`."""
    choose = Random(seed).choices
    return ["".join(choose(_ALPHABET, k=len(client_id))) for client_id in ids]
