/* FNV-1 and FNV-1a, 32 bits (RFC 9923), and the router that folds the latter to a shard.
 *
 * FNV is not keyed and its collisions are trivial to make: it only decides which shard holds an id. What finds the id
 * inside the shard is the interpreter's keyed string hash (table.h).
 */
#ifndef WSF_FNV_H
#define WSF_FNV_H

#include <stddef.h>
#include <stdint.h>

#define WSF_FNV32_OFFSET_BASIS UINT32_C(0x811C9DC5)
#define WSF_FNV32_PRIME UINT32_C(0x01000193)

static inline uint32_t wsf_fnv1_32(const uint8_t *data, size_t size)
{
    uint32_t hash = WSF_FNV32_OFFSET_BASIS;
    for (size_t i = 0; i < size; i++)
        hash = (hash * WSF_FNV32_PRIME) ^ data[i];
    return hash;
}

static inline uint32_t wsf_fnv1a_32_step(uint32_t hash, uint8_t byte)
{
    return (hash ^ byte) * WSF_FNV32_PRIME;
}

static inline uint32_t wsf_fnv1a_32(const uint8_t *data, size_t size)
{
    uint32_t hash = WSF_FNV32_OFFSET_BASIS;
    for (size_t i = 0; i < size; i++)
        hash = wsf_fnv1a_32_step(hash, data[i]);
    return hash;
}

/* The low bits of FNV hardly mix the high bits of each byte in (ids that differ in case share their low 5 bits), so
 * the upper half is folded in before the mask. mask: shard count - 1. */
static inline uint32_t wsf_route(uint32_t fnv1a, uint32_t mask) { return (fnv1a ^ (fnv1a >> 16)) & mask; }

#endif
