"""FNV-1 and FNV-1a, 32 bits, and the shard router built on the latter."""

from __future__ import annotations

import array
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsfast.errors
from tests.conftest import Implementation

# input, FNV-1, FNV-1a: from test_fnv.c of the reference code by Landon Curt Noll (github.com/lcn2/fnv).
VECTORS = [
    (b"", 0x811C9DC5, 0x811C9DC5),
    (b"a", 0x050C5D7E, 0xE40C292C),
    (b"b", 0x050C5D7D, 0xE70C2DE5),
    (b"c", 0x050C5D7C, 0xE60C2C52),
    (b"foo", 0x408F5E13, 0xA9F37ED7),
    (b"foobar", 0x31F0B262, 0xBF9CF968),
    (b"foobar\0", 0xFFE8D046, 0x0C1C9EB8),
    (b"hello", 0xB6FA7167, 0x4F9F2CAB),
    (b"chongo was here!\n", 0xDD002F35, 0xD49930D5),
]
# The lower half of FNV-1a xor its upper half, by hand from the vectors: the shard of 65536.
ROUTES = {"a": 0xCD20, "foo": 0xD724, "foobar": 0x46F4, "hello": 0x6334}
# One id for each way CPython stores a str: ASCII, Latin-1, UCS-2, UCS-4.
STORAGE_KINDS = ["client-1", "é", "ÿ" * 9, "字", "Ωéa", "😀", "a😀é字"]
PROJECT = str(Path(wsfast.errors.__file__).parents[1])


def fnv1_oracle(data: bytes) -> int:
    value = 0x811C9DC5
    for byte in data:
        value = value * 0x01000193 % 2**32 ^ byte
    return value


def fnv1a_oracle(data: bytes) -> int:
    value = 0x811C9DC5
    for byte in data:
        value = (value ^ byte) * 0x01000193 % 2**32
    return value


def route_oracle(client_id: str, shards: int) -> int:
    value = fnv1a_oracle(client_id.encode())
    return (value ^ (value >> 16)) & (shards - 1)


@pytest.mark.parametrize(("data", "fnv1", "fnv1a"), VECTORS)
def test_published_vectors(impl: Implementation, data: bytes, fnv1: int, fnv1a: int) -> None:
    assert impl.fnv1_32(data) == fnv1
    assert impl.fnv1a_32(data) == fnv1a


@given(data=st.binary(max_size=300))
def test_hashes_equal_the_definition(impl: Implementation, data: bytes) -> None:
    assert impl.fnv1_32(data) == fnv1_oracle(data)
    assert impl.fnv1a_32(data) == fnv1a_oracle(data)


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(b"foobar"),
        memoryview(b"foobar"),
        memoryview(b"--foobar--")[2:8],
        array.array("B", b"foobar"),
        array.array("H", b"foobar"),
        memoryview(array.array("H", b"foobar")),
        memoryview(b"foobar").cast("B", (2, 3)),
        memoryview(bytearray(b"foobar")),
    ],
    ids=lambda buffer: type(buffer).__name__,
)
def test_any_buffer_is_hashed_by_its_bytes(impl: Implementation, buffer: Any) -> None:
    assert impl.fnv1_32(buffer) == 0x31F0B262
    assert impl.fnv1a_32(buffer) == 0xBF9CF968


def test_empty_buffers_give_the_offset_basis(impl: Implementation) -> None:
    for buffer in (bytearray(), memoryview(b""), array.array("I")):
        assert impl.fnv1_32(buffer) == impl.fnv1a_32(buffer) == 0x811C9DC5


def test_buffer_is_let_go_after_the_call(impl: Implementation) -> None:
    buffer = bytearray(b"foobar")
    impl.fnv1_32(buffer)
    impl.fnv1a_32(buffer)
    buffer.append(0)
    assert impl.fnv1_32(buffer) == 0xFFE8D046
    assert impl.fnv1a_32(buffer) == 0x0C1C9EB8


@pytest.mark.parametrize("value", ["foobar", "", None, 6, 1.5, [1, 2], object()])
def test_what_is_no_buffer_is_a_type_error(impl: Implementation, value: Any) -> None:
    with pytest.raises(TypeError):
        impl.fnv1_32(value)
    with pytest.raises(TypeError):
        impl.fnv1a_32(value)


def test_argument_is_positional_only(impl: Implementation) -> None:
    with pytest.raises(TypeError):
        impl.fnv1_32(data=b"")
    with pytest.raises(TypeError):
        impl.fnv1a_32(data=b"")


@pytest.mark.parametrize("shards", [1, 2, 8, 64, 4096, 65536])
def test_route_folds_fnv1a_onto_the_shards(impl: Implementation, shards: int) -> None:
    registry = impl.Registry(shards)
    assert {key: registry.shard_of(key) for key in ROUTES} == {
        key: route & (registry.shards - 1) for key, route in ROUTES.items()
    }


@pytest.mark.parametrize("client_id", STORAGE_KINDS)
def test_route_is_of_the_utf8_form_however_the_str_is_stored(impl: Implementation, client_id: str) -> None:
    registry = impl.Registry(4096)
    assert registry.shard_of(client_id) == route_oracle(client_id, registry.shards)


@given(client_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64))
def test_route_of_any_id_equals_the_definition(impl: Implementation, client_id: str) -> None:
    registry = impl.Registry(8)
    assert registry.shard_of(client_id) == route_oracle(client_id, registry.shards)


def test_route_spreads_ids_that_differ_in_case_only(impl: Implementation) -> None:
    registry = impl.Registry(32)
    variants = [
        "".join(letter.upper() if bits >> place & 1 else letter for place, letter in enumerate("connection"))
        for bits in range(1024)
    ]
    assert len({registry.shard_of(variant) for variant in variants}) == registry.shards


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_route_is_the_same_in_a_process_with_another_hash_seed(impl: Implementation, hash_seed: str) -> None:
    client_ids = [*ROUTES, *STORAGE_KINDS]
    script = f"{impl.source}; registry = Registry(64); print([registry.shard_of(key) for key in {client_ids!a}])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": PROJECT},
        capture_output=True,
        text=True,
        check=True,
    )
    registry = impl.Registry(64)
    assert done.stdout.strip() == str([registry.shard_of(key) for key in client_ids])


@pytest.mark.parametrize("client_id", STORAGE_KINDS)
def test_connection_counts_in_the_shard_of_its_id(impl: Implementation, client_id: str) -> None:
    registry = impl.Registry(64)
    registry.add(client_id)
    counts = [shard["connections"] for shard in registry.shard_stats()]
    assert len(counts) == registry.shards
    assert counts.index(1) == registry.shard_of(client_id)
    assert sum(counts) == 1
