/* An open-addressing hash table of pointers: 8 bytes an entry, linear probing, no tombstones.
 *
 * An entry packs a 44-bit pointer (16-byte aligned, 48-bit address space) with the upper 20 bits of the item's 32-bit
 * hash, its tag; 0 is empty. The tag spares nearly all looks at items that only share a probe sequence, and up to
 * 2**16 entries it also gives each item's home position, so that growing and removing touch no item: in a table of a
 * million sessions those looks would be cache misses. Larger tables ask the item for its hash.
 *
 * Capacities are 2**k and 3 * 2**(k-1); the load stays between 0.3 and 0.8. Removal shifts later entries back, so a
 * lookup never passes more entries than the present content causes. The hash must be keyed: strangers choose the keys.
 *
 * Not guaranteed: any order. Cost: O(1) expected for each call, amortised for insertion and removal. Threads: the
 * owner's lock guards a table.
 */
#ifndef WSF_TABLE_H
#define WSF_TABLE_H

#include "platform.h"

typedef struct {
    uint64_t *entries;
    uint32_t capacity, used;
} wsf_table;

/* What a table holds: how an item is compared with a key, and where its hash comes from. */
typedef int (*wsf_equals)(const void *item, const void *key);
typedef uint32_t (*wsf_hash_of)(const void *item);

#define WSF_TABLE_TAG_BITS 20
#define WSF_TABLE_POINTER_MASK ((UINT64_C(1) << (64 - WSF_TABLE_TAG_BITS)) - 1)
/* Up to here the home position comes from the tag alone, with at least 4 bits of it left to tell items apart. */
#define WSF_TABLE_HOME_IN_TAG (UINT32_C(1) << 16)

static inline void *wsf_entry_item(uint64_t entry) { return (void *)(uintptr_t)((entry & WSF_TABLE_POINTER_MASK) << 4); }

static inline uint32_t wsf_entry_tag(uint64_t entry) { return (uint32_t)(entry >> (64 - WSF_TABLE_TAG_BITS)); }

static inline uint32_t wsf_hash_tag(uint32_t hash) { return hash >> (32 - WSF_TABLE_TAG_BITS); }

static inline uint32_t wsf_table_home(uint32_t capacity, uint32_t hash)
{
    if (capacity <= WSF_TABLE_HOME_IN_TAG)
        return (uint32_t)(((uint64_t)wsf_hash_tag(hash) * capacity) >> WSF_TABLE_TAG_BITS);
    return (uint32_t)(((uint64_t)hash * capacity) >> 32);
}

/* The item with this hash and key, borrowed while the lock is held; NULL where absent. */
static inline void *wsf_table_find(const wsf_table *table, uint32_t hash, const void *key, wsf_equals equals)
{
    if (table->used == 0)
        return NULL;
    const uint64_t *entries = table->entries;
    uint32_t at = wsf_table_home(table->capacity, hash), tag = wsf_hash_tag(hash);
    for (;;) {
        uint64_t entry = entries[at];
        if (entry == 0)
            return NULL;
        if (wsf_entry_tag(entry) == tag) {
            void *item = wsf_entry_item(entry);
            if (equals(item, key))
                return item;
        }
        if (++at == table->capacity)
            at = 0;
    }
}

/* The hash of an address, for tables whose items are found by one: strangers do not choose addresses. */
static inline uint32_t wsf_pointer_hash(const void *pointer)
{
    return (uint32_t)(((uint64_t)(uintptr_t)pointer >> 4) * UINT64_C(0x9E3779B97F4A7C15) >> 32);
}

/* item: borrowed until it is removed, not in the table yet, and no other item equals it. WSF_NO_MEMORY changes
 * nothing. */
int wsf_table_insert(wsf_table *table, int64_t *account, uint32_t hash, void *item, wsf_hash_of hash_of);
/* Put new_item, which has the same hash, where old_item is. Cannot fail. new_item: as for wsf_table_insert. */
void wsf_table_swap(wsf_table *table, uint32_t hash, const void *old_item, void *new_item);
/* item is in the table. Cannot fail: a table that cannot shrink stays as large as it is. */
void wsf_table_remove(wsf_table *table, int64_t *account, uint32_t hash, const void *item, wsf_hash_of hash_of);
/* Most entries that finding a present item passes, its own included. O(capacity). */
uint32_t wsf_table_longest_probe(const wsf_table *table, wsf_hash_of hash_of);
void wsf_table_free(wsf_table *table, int64_t *account);

#endif
