/* Growing, removing and measuring the pointer table; see table.h. */
#include "table.h"

/* Smallest capacity: two cache lines for the tables that stay nearly empty. */
#define MIN_CAPACITY 8

static inline uint32_t entry_home(uint32_t capacity, uint64_t entry, wsf_hash_of hash_of)
{
    if (capacity <= WSF_TABLE_HOME_IN_TAG)
        return (uint32_t)(((uint64_t)wsf_entry_tag(entry) * capacity) >> WSF_TABLE_TAG_BITS);
    return wsf_table_home(capacity, hash_of(wsf_entry_item(entry)));
}

static inline uint64_t make_entry(uint32_t hash, const void *item)
{
    return ((uint64_t)wsf_hash_tag(hash) << (64 - WSF_TABLE_TAG_BITS)) | ((uint64_t)(uintptr_t)item >> 4);
}

static void place(uint64_t *entries, uint32_t capacity, uint32_t at, uint64_t entry)
{
    while (entries[at] != 0)
        if (++at == capacity)
            at = 0;
    entries[at] = entry;
}

/* 8, 12, 16, 24, 32, ...: the step from 2**k is half of it, from 3 * 2**(k-1) a third. */
static uint32_t next_capacity(uint32_t capacity)
{
    if (capacity == 0)
        return MIN_CAPACITY;
    return (capacity & (capacity - 1)) == 0 ? capacity + capacity / 2 : capacity / 3 * 4;
}

static int resize(wsf_table *table, int64_t *account, uint32_t capacity, wsf_hash_of hash_of)
{
    uint64_t *entries = wsf_alloc(account, capacity * sizeof *entries);
    if (entries == NULL)
        return WSF_NO_MEMORY;
    memset(entries, 0, capacity * sizeof *entries);
    for (uint32_t i = 0; i < table->capacity; i++) {
        uint64_t entry = table->entries[i];
        if (entry != 0)
            place(entries, capacity, entry_home(capacity, entry, hash_of), entry);
    }
    uint64_t *old_entries = table->entries;
    uint32_t old_capacity = table->capacity;
    WSF_STORE_POINTER(&table->entries, entries);
    WSF_STORE32(&table->capacity, capacity);
    wsf_free(account, old_entries, old_capacity * sizeof *entries);
    return WSF_OK;
}

int wsf_table_insert(wsf_table *table, int64_t *account, uint32_t hash, void *item, wsf_hash_of hash_of)
{
    if (((uintptr_t)item & 15) != 0 || ((uint64_t)(uintptr_t)item >> 48) != 0)
        return WSF_NO_MEMORY; /* memory that an entry cannot point to is as good as none */
    if ((uint64_t)(table->used + 1) * 5 > (uint64_t)table->capacity * 4) {
        if (table->capacity >= UINT32_C(3) << 30)
            return WSF_NO_MEMORY;
        if (resize(table, account, next_capacity(table->capacity), hash_of) != WSF_OK)
            return WSF_NO_MEMORY;
    }
    place(table->entries, table->capacity, wsf_table_home(table->capacity, hash), make_entry(hash, item));
    WSF_STORE32(&table->used, table->used + 1);
    return WSF_OK;
}

static uint32_t position_of(const wsf_table *table, uint32_t hash, const void *item)
{
    uint64_t wanted = make_entry(hash, item);
    uint32_t at = wsf_table_home(table->capacity, hash);
    while (table->entries[at] != wanted) {
        WSF_ASSERT(table->entries[at] != 0);
        if (++at == table->capacity)
            at = 0;
    }
    return at;
}

void wsf_table_swap(wsf_table *table, uint32_t hash, const void *old_item, void *new_item)
{
    table->entries[position_of(table, hash, old_item)] = make_entry(hash, new_item);
}

/* Close the gap at `hole`: move back each later entry of the run whose home is not past the hole. */
static void shift_back(wsf_table *table, uint32_t hole, wsf_hash_of hash_of)
{
    uint32_t capacity = table->capacity, at = hole;
    for (;;) {
        if (++at == capacity)
            at = 0;
        uint64_t entry = table->entries[at];
        if (entry == 0)
            break;
        uint32_t home = entry_home(capacity, entry, hash_of);
        uint32_t from_home = at >= home ? at - home : at + capacity - home;
        uint32_t from_hole = at >= hole ? at - hole : at + capacity - hole;
        if (from_home >= from_hole) {
            table->entries[hole] = entry;
            hole = at;
        }
    }
    table->entries[hole] = 0;
}

void wsf_table_remove(wsf_table *table, int64_t *account, uint32_t hash, const void *item, wsf_hash_of hash_of)
{
    shift_back(table, position_of(table, hash, item), hash_of);
    WSF_STORE32(&table->used, table->used - 1);
    if (table->used == 0) {
        wsf_table_free(table, account);
        return;
    }
    if (table->capacity > MIN_CAPACITY && (uint64_t)table->used * 10 < (uint64_t)table->capacity * 3) {
        uint32_t capacity = MIN_CAPACITY;
        while (capacity < table->used * 2)
            capacity = next_capacity(capacity);
        /* Back to a load of about one half; failing to shrink loses nothing. */
        (void)resize(table, account, capacity, hash_of);
    }
}

uint32_t wsf_table_longest_probe(const wsf_table *table, wsf_hash_of hash_of)
{
    uint32_t longest = 0;
    for (uint32_t at = 0; at < table->capacity; at++) {
        uint64_t entry = table->entries[at];
        if (entry == 0)
            continue;
        uint32_t home = entry_home(table->capacity, entry, hash_of);
        uint32_t passed = (at >= home ? at - home : at + table->capacity - home) + 1;
        if (passed > longest)
            longest = passed;
    }
    return longest;
}

void wsf_table_free(wsf_table *table, int64_t *account)
{
    wsf_free(account, table->entries, table->capacity * sizeof *table->entries);
    WSF_STORE_POINTER(&table->entries, NULL);
    WSF_STORE32(&table->capacity, 0);
    WSF_STORE32(&table->used, 0);
}
