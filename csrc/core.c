/* Shards, slots, lookups and walks; see core.h. */
#include "core.h"

#include <stdlib.h>

/* How many steps ahead a walk asks for memory: enough loads under way to hide most of a cache miss. */
#define AHEAD 8

/* ---- life --------------------------------------------------------------------------------------------------------- */

static size_t core_bytes(uint32_t shard_count) { return sizeof(wsf_core) + shard_count * sizeof(wsf_shard); }

wsf_core *wsf_core_new(uint32_t shard_count, PyObject *settings, int has_native_clock)
{
    const uintptr_t line = _Alignof(wsf_core);
    void *memory = PyMem_Malloc(core_bytes(shard_count) + line - 1);
    if (memory == NULL)
        return NULL;
    wsf_core *core = (wsf_core *)(((uintptr_t)memory + line - 1) & ~(line - 1));
    memset(core, 0, core_bytes(shard_count));
    core->memory = memory;
    core->references = shard_count;
    core->shard_count = shard_count;
    core->settings = settings;
    core->has_native_clock = has_native_clock;
    for (uint32_t i = 0; i < shard_count; i++) {
        core->shards[i].number = i;
        core->shards[i].references = 1;
        core->shards[i].core = core;
    }
    WSF_COUNT_LIVE(WSF_LIVE_CORE, 1);
    return core;
}

static size_t directory_bytes(uint32_t capacity)
{
    return capacity * (sizeof(wsf_block *) + sizeof(uint64_t) + sizeof(int64_t)) +
           (capacity + 63) / 64 * (1 + WSF_STATUSES) * sizeof(uint64_t);
}

void wsf_core_orphan(wsf_core *core)
{
    WSF_LOCK(&core->index.lock);
    core->settings = NULL;
    WSF_UNLOCK(&core->index.lock);
}

PyObject *wsf_core_settings(wsf_core *core)
{
    WSF_LOCK(&core->index.lock);
    PyObject *settings = Py_XNewRef(core->settings);
    WSF_UNLOCK(&core->index.lock);
    return settings;
}

static void free_core(wsf_core *core)
{
    for (uint32_t i = 0; i < core->shard_count; i++) {
        wsf_shard *shard = &core->shards[i];
        WSF_ASSERT(shard->table.used == 0 && shard->block_count == 0);
        wsf_table_free(&shard->table, &shard->account);
        wsf_free(&shard->account, shard->blocks, directory_bytes(shard->block_capacity));
        WSF_ASSERT(shard->account == 0);
    }
    wsf_index_free(&core->index);
    PyMem_Free(core->memory);
    WSF_COUNT_LIVE(WSF_LIVE_CORE, -1);
}

void wsf_shard_release(wsf_shard *shard)
{
    wsf_core *core = shard->core;
    if (WSF_ADD64(&shard->references, -1) == 0 && WSF_ADD64(&core->references, -1) == 0)
        free_core(core);
}

void wsf_core_release(wsf_core *core)
{
    uint32_t shard_count = core->shard_count; /* the last release may free the core */
    for (uint32_t i = 0; i < shard_count; i++)
        wsf_shard_release(&core->shards[i]);
}

int wsf_core_is_shared(wsf_core *core)
{
    for (uint32_t i = 0; i < core->shard_count; i++)
        if (WSF_ADD64(&core->shards[i].references, 0) > 1)
            return 1;
    return 0;
}

/* A place is neither none nor the mark of a set. */
_Static_assert(WSF_STATUSES <= 7, "a status fits the bits that a slot leaves");

/* ---- slots ----------------------------------------------------------------------------------------------------------- */

static inline uint64_t bit(uint32_t position) { return UINT64_C(1) << (position & 63); }

/* Double the directory of a shard: one piece of memory for its five arrays. */
static int grow_directory(wsf_shard *shard)
{
    uint32_t old_capacity = shard->block_capacity, capacity = old_capacity == 0 ? 4 : 2 * old_capacity;
    void *memory = wsf_alloc(&shard->account, directory_bytes(capacity));
    if (memory == NULL)
        return WSF_NO_MEMORY;
    memset(memory, 0, directory_bytes(capacity));
    wsf_block **blocks = memory;
    uint64_t *occupied = (uint64_t *)(blocks + capacity);
    int64_t *earliest_ns = (int64_t *)(occupied + capacity);
    uint64_t *has_room = (uint64_t *)(earliest_ns + capacity);
    uint64_t(*may_have)[WSF_STATUSES] = (uint64_t(*)[WSF_STATUSES])(has_room + (capacity + 63) / 64);
    if (old_capacity != 0) {
        memcpy(blocks, shard->blocks, old_capacity * sizeof *blocks);
        memcpy(occupied, shard->occupied, old_capacity * sizeof *occupied);
        memcpy(earliest_ns, shard->earliest_ns, old_capacity * sizeof *earliest_ns);
        memcpy(has_room, shard->has_room, (old_capacity + 63) / 64 * sizeof *has_room);
        memcpy(may_have, shard->may_have, (old_capacity + 63) / 64 * sizeof *may_have);
        wsf_free(&shard->account, shard->blocks, directory_bytes(old_capacity));
    }
    shard->blocks = blocks;
    shard->occupied = occupied;
    shard->earliest_ns = earliest_ns;
    shard->has_room = has_room;
    shard->may_have = may_have;
    shard->block_capacity = capacity;
    return WSF_OK;
}

/* The lowest block with a free slot, made if need be; UINT32_MAX: no memory, or no number for another slot. */
static uint32_t block_with_room(wsf_shard *shard)
{
    uint32_t number = shard->block_count;
    for (uint32_t word = 0; word < (shard->block_count + 63) / 64; word++) {
        if (shard->has_room[word] != 0) {
            number = word * 64 + wsf_lowest_bit(shard->has_room[word]);
            break;
        }
    }
    if (number == (UINT32_C(1) << WSF_SLOT_BITS) / WSF_BLOCK_SLOTS)
        return UINT32_MAX;
    if (number == shard->block_capacity && grow_directory(shard) != WSF_OK)
        return UINT32_MAX;
    if (shard->blocks[number] == NULL) {
        wsf_block *block = wsf_alloc(&shard->account, sizeof *block);
        if (block == NULL)
            return UINT32_MAX;
        memset(block, 0, sizeof *block);
        for (uint32_t at = 0; at < WSF_BLOCK_SLOTS; at++)
            block->deadline_ns[at] = WSF_NEVER; /* an empty slot is never due */
        WSF_COUNT_LIVE(WSF_LIVE_BLOCK, 1);
        shard->blocks[number] = block;
        shard->occupied[number] = 0;
        shard->earliest_ns[number] = WSF_NEVER;
    }
    if (number == shard->block_count)
        shard->block_count++;
    shard->has_room[number / 64] |= bit(number);
    return number;
}

/* Give back the block if it is empty, and with it the empty end of the directory. */
static void drop_block_if_empty(wsf_shard *shard, uint32_t number)
{
    if (shard->occupied[number] != 0)
        return;
    wsf_free(&shard->account, shard->blocks[number], sizeof(wsf_block));
    WSF_COUNT_LIVE(WSF_LIVE_BLOCK, -1);
    shard->blocks[number] = NULL;
    shard->earliest_ns[number] = WSF_NEVER;
    for (uint32_t status = 0; status < WSF_STATUSES; status++)
        shard->may_have[number / 64][status] &= ~bit(number);
    while (shard->block_count > 0 && shard->blocks[shard->block_count - 1] == NULL) {
        shard->block_count--;
        shard->has_room[shard->block_count / 64] &= ~bit(shard->block_count);
    }
}

static inline uint32_t slot_of(const wsf_record *record)
{
    return record->place & ((UINT32_C(1) << WSF_SLOT_BITS) - 1);
}

static inline uint32_t place_of(uint32_t slot, uint8_t status) { return (uint32_t)status << WSF_SLOT_BITS | slot; }

static inline wsf_block *block_of(const wsf_record *record)
{
    return record->shard->blocks[slot_of(record) / WSF_BLOCK_SLOTS];
}

static inline uint32_t at_of(const wsf_record *record) { return slot_of(record) % WSF_BLOCK_SLOTS; }

static inline void count_status(wsf_shard *shard, uint8_t status, uint32_t n)
{
    WSF_ASSERT(status < WSF_STATUSES);
    WSF_STORE32(&shard->by_status[status], shard->by_status[status] + n); /* others may read it without the lock */
}

/* A record in the block has this status from now on. */
static inline void note_status(wsf_shard *shard, uint32_t number, uint8_t status)
{
    count_status(shard, status, 1);
    shard->may_have[number / 64][status] |= bit(number);
}

static void fill_slot(wsf_shard *shard, uint32_t slot, wsf_record *record, uint8_t status)
{
    wsf_block *block = shard->blocks[slot / WSF_BLOCK_SLOTS];
    uint32_t at = slot % WSF_BLOCK_SLOTS;
    block->records[at] = record;
    if (block->deadline_ns[at] != WSF_NEVER) /* of a record that is replaced; a line that is not written stays shared */
        block->deadline_ns[at] = WSF_NEVER;
    block->active_ns[at] = record->created_ns;
    block->status[at] = status;
    note_status(shard, slot / WSF_BLOCK_SLOTS, status);
    WSF_STORE32(&record->place, place_of(slot, status));
}

static void take_slot(wsf_shard *shard, uint32_t number, wsf_record *record, uint8_t status)
{
    uint32_t at = wsf_lowest_bit(~shard->occupied[number]);
    shard->occupied[number] |= bit(at);
    if (shard->occupied[number] == UINT64_MAX)
        shard->has_room[number / 64] &= ~bit(number);
    fill_slot(shard, number * WSF_BLOCK_SLOTS + at, record, status);
}

/* The record's side of leaving: what it may not hold any longer goes to `trash`. Returns the slot it had. */
static uint32_t retire(wsf_record *record, wsf_trash *trash)
{
    uint32_t slot = slot_of(record);
    int64_t active_ns = block_of(record)->active_ns[at_of(record)];
    count_status(record->shard, (uint8_t)wsf_record_status(record), UINT32_MAX);
    wsf_trash_add(trash, record->conn);
    record->detached_active_ns = active_ns;
    for (int field = 0; field < WSF_DROPPED_FIELDS; field++) {
        wsf_trash_add(trash, record->objects[field]);
        record->objects[field] = NULL;
    }
    WSF_PUBLISH32(&record->place, WSF_NO_PLACE);
    record->shard->counters.removes++;
    return slot;
}

static void free_slot(wsf_shard *shard, uint32_t slot)
{
    uint32_t number = slot / WSF_BLOCK_SLOTS, at = slot % WSF_BLOCK_SLOTS;
    shard->blocks[number]->records[at] = NULL;
    if (shard->blocks[number]->deadline_ns[at] != WSF_NEVER)
        shard->blocks[number]->deadline_ns[at] = WSF_NEVER;
    shard->occupied[number] &= ~bit(at);
    shard->has_room[number / 64] |= bit(number);
    drop_block_if_empty(shard, number);
}

/* ---- attach and detach --------------------------------------------------------------------------------------------- */

static int attach_locked(wsf_shard *shard, wsf_record *record, uint8_t status)
{
    uint32_t number = block_with_room(shard);
    if (number == UINT32_MAX)
        return WSF_NO_MEMORY;
    if (wsf_table_insert(&shard->table, &shard->account, wsf_record_hash(record), record, wsf_record_hash) != WSF_OK) {
        drop_block_if_empty(shard, number);
        return WSF_NO_MEMORY;
    }
    take_slot(shard, number, record, status);
    return WSF_OK;
}

int wsf_core_attach(wsf_record *record, uint8_t status, int replace, wsf_record **replaced, wsf_trash *trash)
{
    wsf_shard *shard = record->shard;
    uint32_t hash = wsf_record_hash(record);
    int outcome = WSF_OK;
    WSF_LOCK(&shard->lock);
    wsf_record *old = wsf_table_find(&shard->table, hash, record->client_id, wsf_record_equals);
    if (old == NULL) {
        outcome = attach_locked(shard, record, status);
    } else if (replace) {
        /* The successor takes table entry and slot over: nothing here can fail, and no reader sees the id absent. */
        wsf_table_swap(&shard->table, hash, old, record);
        fill_slot(shard, retire(old, trash), record, status);
    } else {
        outcome = WSF_DUPLICATE;
    }
    if (outcome == WSF_OK) {
        Py_INCREF(wsf_record_object(record));
        shard->counters.adds++;
    }
    WSF_UNLOCK(&shard->lock);
    *replaced = outcome == WSF_OK ? old : NULL;
    return outcome;
}

static void detach_locked(wsf_shard *shard, wsf_record *record, wsf_trash *trash)
{
    wsf_table_remove(&shard->table, &shard->account, wsf_record_hash(record), record, wsf_record_hash);
    free_slot(shard, retire(record, trash));
}

wsf_record *wsf_core_detach_id(wsf_core *core, PyObject *client_id, wsf_trash *trash)
{
    uint32_t fnv1a;
    int64_t utf8_bytes;
    if (wsf_text_fnv1a(client_id, &fnv1a, &utf8_bytes) != 0)
        return NULL;
    wsf_shard *shard = &core->shards[wsf_route(fnv1a, core->shard_count - 1)];
    uint32_t hash = wsf_fold_hash(wsf_text_hash(client_id));
    WSF_LOCK(&shard->lock);
    wsf_record *record = wsf_table_find(&shard->table, hash, client_id, wsf_record_equals);
    if (record != NULL)
        detach_locked(shard, record, trash);
    WSF_UNLOCK(&shard->lock);
    return record;
}

wsf_record *wsf_core_detach_record(wsf_record *record, wsf_trash *trash)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    int attached = wsf_record_attached(record);
    if (attached)
        detach_locked(shard, record, trash);
    WSF_UNLOCK(&shard->lock);
    return attached ? record : NULL;
}

void wsf_core_forget(wsf_record *record, wsf_trash *trash)
{
    wsf_index_forget(&record->shard->core->index, record, trash);
}

/* ---- routes and lookups ---------------------------------------------------------------------------------------------- */

/* FNV over the UTF-8 form of a text that is stored with 1, 2 or 4 bytes a character, without making that form. */
static int fnv1a_of_characters(PyObject *text, uint32_t *fnv1a, int64_t *utf8_bytes)
{
    uint32_t hash = WSF_FNV32_OFFSET_BASIS;
    int64_t bytes = 0;
    Py_ssize_t length = PyUnicode_GET_LENGTH(text);
    int kind = (int)PyUnicode_KIND(text);
    const void *data = PyUnicode_DATA(text);
    for (Py_ssize_t i = 0; i < length; i++) {
        uint32_t c = PyUnicode_READ(kind, data, i);
        if (c < 0x80) {
            hash = wsf_fnv1a_32_step(hash, (uint8_t)c);
            bytes += 1;
        } else if (c < 0x800) {
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0xC0 | c >> 6));
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0x80 | (c & 0x3F)));
            bytes += 2;
        } else if (c < 0x10000) {
            if (c >= 0xD800 && c <= 0xDFFF)
                return -1;
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0xE0 | c >> 12));
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0x80 | (c >> 6 & 0x3F)));
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0x80 | (c & 0x3F)));
            bytes += 3;
        } else {
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0xF0 | c >> 18));
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0x80 | (c >> 12 & 0x3F)));
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0x80 | (c >> 6 & 0x3F)));
            hash = wsf_fnv1a_32_step(hash, (uint8_t)(0x80 | (c & 0x3F)));
            bytes += 4;
        }
    }
    *fnv1a = hash;
    *utf8_bytes = bytes;
    return 0;
}

int wsf_text_fnv1a(PyObject *text, uint32_t *fnv1a, int64_t *utf8_bytes)
{
    if (!PyUnicode_IS_ASCII(text))
        return fnv1a_of_characters(text, fnv1a, utf8_bytes);
    *utf8_bytes = PyUnicode_GET_LENGTH(text);
    *fnv1a = wsf_fnv1a_32((const uint8_t *)PyUnicode_DATA(text), (size_t)*utf8_bytes);
    return 0;
}

/* Routes are remembered by the id's cached keyed hash, because hashing an id with FNV takes longer than all the rest of
 * a lookup. A remembered route is a guess (its entry holds 48 bits of the hash): a lookup that misses on it asks FNV, so
 * every answer is exact. Entries are single words, read and written without a lock. */
static inline uint64_t *route_entry(wsf_core *core, uint64_t hash)
{
    return &core->routes[(hash >> 16) & (WSF_ROUTES - 1)];
}

static inline int route_remembered(uint64_t entry, uint64_t hash) { return (entry ^ hash) >> 16 == 0; }

static wsf_shard *route(wsf_core *core, PyObject *client_id)
{
    uint32_t fnv1a;
    int64_t utf8_bytes;
    if (wsf_text_fnv1a(client_id, &fnv1a, &utf8_bytes) != 0)
        return NULL;
    return &core->shards[wsf_route(fnv1a, core->shard_count - 1)];
}

static inline void remember_route(wsf_core *core, uint64_t hash, const wsf_shard *shard)
{
    if (shard != NULL)
        WSF_STORE64(route_entry(core, hash), (hash & ~UINT64_C(0xFFFF)) | shard->number);
}

/* Call with the shard's lock held. New reference or NULL. */
static inline PyObject *take_locked(wsf_shard *shard, PyObject *client_id, uint32_t hash)
{
    wsf_record *record = wsf_table_find(&shard->table, hash, client_id, wsf_record_equals);
    return record == NULL ? NULL : Py_NewRef(wsf_record_object(record));
}

static inline PyObject *take(wsf_shard *shard, PyObject *client_id, uint32_t hash)
{
    WSF_LOCK(&shard->lock);
    PyObject *object = take_locked(shard, client_id, hash);
    WSF_UNLOCK(&shard->lock);
    return object;
}

PyObject *wsf_core_get(wsf_core *core, PyObject *client_id)
{
    uint64_t hash = wsf_text_hash(client_id), entry = WSF_LOAD64(route_entry(core, hash));
    wsf_shard *guess = NULL;
    if (route_remembered(entry, hash)) {
        guess = &core->shards[(entry & 0xFFFF) & (core->shard_count - 1)];
        PyObject *object = take(guess, client_id, wsf_fold_hash(hash));
        if (object != NULL)
            return object;
    }
    wsf_shard *shard = route(core, client_id);
    remember_route(core, hash, shard);
    return shard == NULL || shard == guess ? NULL : take(shard, client_id, wsf_fold_hash(hash));
}

int wsf_core_contains(wsf_core *core, PyObject *client_id)
{
    uint64_t hash = wsf_text_hash(client_id);
    wsf_shard *shard = route(core, client_id);
    if (shard == NULL)
        return 0;
    WSF_LOCK(&shard->lock);
    int found = wsf_table_find(&shard->table, wsf_fold_hash(hash), client_id, wsf_record_equals) != NULL;
    WSF_UNLOCK(&shard->lock);
    return found;
}

/* ---- many lookups at once ---------------------------------------------------------------------------------------------
 *
 * Each lookup waits for memory three times: the id, its table entry, the record. The waits of many lookups overlap when
 * each step is done for all of them before the next step: a chunk (WSF_CHUNK)
 * keeps the first-level cache busy without overflowing it. With locks, the chunk is ordered by shard, so that one lock serves all its ids of a shard. */

typedef struct {
    wsf_shard *shard; /* NULL: the id has no UTF-8 form */
    uint32_t hash;
    uint32_t is_guess; /* the shard is a remembered route */
} pending;

size_t wsf_ids_prepare(PyObject *const *ids, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (i + AHEAD < count) {
            WSF_PREFETCH(ids[i + AHEAD]);
            WSF_PREFETCH((uintptr_t)ids[i + AHEAD] + 64);
        }
        if (!PyUnicode_CheckExact(ids[i]) || PyObject_Hash(ids[i]) == -1)
            return i;
    }
    return count;
}

static inline void prefetch_entry(const pending *lookup)
{
    /* Read without the lock: a stale pointer costs a useless prefetch, nothing else. */
    const uint64_t *entries = WSF_LOAD_POINTER(&lookup->shard->table.entries);
    uint32_t capacity = WSF_LOAD32(&lookup->shard->table.capacity);
    WSF_PREFETCH((uintptr_t)entries + sizeof *entries * wsf_table_home(capacity, lookup->hash));
}

/* Call with the lock held. The first entry with the right tag is nearly always the record. */
static inline void prefetch_record(const pending *lookup)
{
    const wsf_table *table = &lookup->shard->table;
    if (table->used == 0)
        return;
    uint32_t at = wsf_table_home(table->capacity, lookup->hash), tag = wsf_hash_tag(lookup->hash);
    for (uint64_t entry; (entry = table->entries[at]) != 0;) {
        if (wsf_entry_tag(entry) == tag) {
            wsf_record_prefetch(wsf_entry_item(entry));
            return;
        }
        if (++at == table->capacity)
            at = 0;
    }
}

static void start_lookups(wsf_core *core, PyObject *const *ids, pending *lookups, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t hash = wsf_text_hash(ids[i]);
        uint64_t entry = WSF_LOAD64(route_entry(core, hash));
        lookups[i].hash = wsf_fold_hash(hash);
        lookups[i].is_guess = (uint32_t)route_remembered(entry, hash);
        if (lookups[i].is_guess) {
            lookups[i].shard = &core->shards[(entry & 0xFFFF) & (core->shard_count - 1)];
        } else {
            lookups[i].shard = route(core, ids[i]);
#ifndef Py_GIL_DISABLED
            /* Threads that all remember what they look up take the cache lines of the routes from each other. */
            remember_route(core, hash, lookups[i].shard);
#endif
        }
        if (lookups[i].shard != NULL)
            prefetch_entry(&lookups[i]);
    }
}

#ifdef Py_GIL_DISABLED
/* order: the lookups of each shard side by side. Counting them in a table of all shards would cost more than it saves
 * for many shards, so they are counted by the low bits of the shard's number. */
#define BUCKETS 64
static void order_by_shard(const pending *lookups, size_t count, uint16_t *order)
{
    uint16_t starts[BUCKETS + 1] = {0};
    for (size_t i = 0; i < count; i++)
        starts[(lookups[i].shard == NULL ? 0 : lookups[i].shard->number % BUCKETS) + 1]++;
    for (size_t bucket = 0; bucket < BUCKETS; bucket++)
        starts[bucket + 1] = (uint16_t)(starts[bucket + 1] + starts[bucket]);
    for (size_t i = 0; i < count; i++)
        order[starts[lookups[i].shard == NULL ? 0 : lookups[i].shard->number % BUCKETS]++] = (uint16_t)i;
}

static void finish_lookups(PyObject *const *ids, PyObject **out, const pending *lookups, size_t count)
{
    uint16_t order[WSF_CHUNK];
    order_by_shard(lookups, count, order);
    for (size_t begin = 0, end; begin < count; begin = end) {
        wsf_shard *shard = lookups[order[begin]].shard;
        for (end = begin + 1; end < count && lookups[order[end]].shard == shard; end++)
            continue;
        if (end < count && lookups[order[end]].shard != NULL)
            WSF_PREFETCH_WRITE(lookups[order[end]].shard); /* the next lock; another thread may have had it last */
        if (shard == NULL) {
            for (size_t i = begin; i < end; i++)
                out[order[i]] = NULL;
            continue;
        }
        WSF_LOCK(&shard->lock);
        for (size_t i = begin; i < end; i++)
            prefetch_record(&lookups[order[i]]);
        for (size_t i = begin; i < end; i++)
            out[order[i]] = take_locked(shard, ids[order[i]], lookups[order[i]].hash);
        WSF_UNLOCK(&shard->lock);
    }
}
#else
static void finish_lookups(PyObject *const *ids, PyObject **out, const pending *lookups, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (lookups[i].shard != NULL)
            prefetch_record(&lookups[i]);
    for (size_t i = 0; i < count; i++)
        out[i] = lookups[i].shard == NULL ? NULL : take_locked(lookups[i].shard, ids[i], lookups[i].hash);
}
#endif

void wsf_core_get_many(wsf_core *core, PyObject *const *ids, PyObject **out, size_t count)
{
    pending lookups[WSF_CHUNK];
    for (size_t begin = 0; begin < count; begin += WSF_CHUNK) {
        size_t chunk = count - begin < WSF_CHUNK ? count - begin : WSF_CHUNK;
        start_lookups(core, ids + begin, lookups, chunk);
        finish_lookups(ids + begin, out + begin, lookups, chunk);
        for (size_t i = 0; i < chunk; i++)
            if (out[begin + i] == NULL && lookups[i].is_guess)
                out[begin + i] = wsf_core_get(core, ids[begin + i]);
    }
}

/* ---- slots and counters -------------------------------------------------------------------------------------------------- */

int wsf_record_set_deadline(wsf_record *record, int64_t deadline_ns)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    int attached = wsf_record_attached(record);
    if (attached) {
        int64_t *earliest_ns = &shard->earliest_ns[slot_of(record) / WSF_BLOCK_SLOTS];
        block_of(record)->deadline_ns[at_of(record)] = deadline_ns;
        if (deadline_ns < *earliest_ns)
            *earliest_ns = deadline_ns;
    }
    WSF_UNLOCK(&shard->lock);
    return attached;
}

int64_t wsf_record_deadline(wsf_record *record)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    int64_t deadline_ns = wsf_record_attached(record) ? block_of(record)->deadline_ns[at_of(record)] : WSF_NEVER;
    WSF_UNLOCK(&shard->lock);
    return deadline_ns;
}

int wsf_record_set_status(wsf_record *record, uint8_t status)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    int attached = wsf_record_attached(record);
    if (attached && wsf_record_status(record) != status) {
        uint32_t slot = slot_of(record);
        count_status(shard, (uint8_t)wsf_record_status(record), UINT32_MAX);
        note_status(shard, slot / WSF_BLOCK_SLOTS, status);
        block_of(record)->status[at_of(record)] = status;
        WSF_STORE32(&record->place, place_of(slot, status));
    }
    WSF_UNLOCK(&shard->lock);
    return attached;
}

void wsf_record_expect(wsf_record *record)
{
#ifndef Py_GIL_DISABLED /* where there is a lock, nothing may be read without it */
    if (!wsf_record_attached(record))
        return;
    const wsf_block *block = block_of(record);
    uint32_t at = at_of(record);
    WSF_PREFETCH(&block->active_ns[at]);
    WSF_PREFETCH(&block->status[at]);
    WSF_PREFETCH_WRITE(&block->deadline_ns[at]);
#else
    (void)record;
#endif
}

int64_t wsf_record_active(wsf_record *record)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    int64_t active_ns =
        wsf_record_attached(record) ? block_of(record)->active_ns[at_of(record)] : record->detached_active_ns;
    WSF_UNLOCK(&shard->lock);
    return active_ns;
}

void wsf_record_touch(wsf_record *record, int64_t now_ns, int is_heartbeat)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    if (wsf_record_attached(record)) {
        block_of(record)->active_ns[at_of(record)] = now_ns;
        if (is_heartbeat) {
            record->heartbeat_ns = now_ns;
            record->has_heartbeat = 1;
        }
    }
    WSF_UNLOCK(&shard->lock);
}

void wsf_record_received(wsf_record *record, int64_t now_ns, uint64_t messages, uint64_t bytes)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    if (wsf_record_attached(record)) {
        block_of(record)->active_ns[at_of(record)] = now_ns;
        record->messages_in += messages;
        record->bytes_in += bytes;
        shard->counters.messages_in += messages;
        shard->counters.bytes_in += bytes;
    }
    WSF_UNLOCK(&shard->lock);
}

void wsf_record_sent(wsf_record *record, uint64_t messages, uint64_t bytes)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    if (wsf_record_attached(record)) {
        record->messages_out += messages;
        record->bytes_out += bytes;
        shard->counters.messages_out += messages;
        shard->counters.bytes_out += bytes;
    }
    WSF_UNLOCK(&shard->lock);
}

void wsf_record_failed(wsf_record *record, int is_inbound)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    if (wsf_record_attached(record) && is_inbound) {
        record->errors_in += record->errors_in < WSF_MOST_ERRORS;
        shard->counters.errors_in++;
    } else if (wsf_record_attached(record)) {
        if (record->errors_out < WSF_MOST_ERRORS)
            record->errors_out++;
        shard->counters.errors_out++;
    }
    WSF_UNLOCK(&shard->lock);
}

int wsf_record_set_quality(wsf_record *record, float latency, float jitter, float loss)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    int attached = wsf_record_attached(record);
    if (attached) {
        record->latency = latency;
        record->jitter = jitter;
        record->loss = loss;
    }
    WSF_UNLOCK(&shard->lock);
    return attached;
}

void wsf_record_snapshot(wsf_record *record, wsf_record *copy)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    copy->heartbeat_ns = record->heartbeat_ns;
    copy->has_heartbeat = record->has_heartbeat;
    copy->messages_in = record->messages_in;
    copy->messages_out = record->messages_out;
    copy->bytes_in = record->bytes_in;
    copy->bytes_out = record->bytes_out;
    copy->errors_in = record->errors_in;
    copy->errors_out = record->errors_out;
    copy->latency = record->latency;
    copy->jitter = record->jitter;
    copy->loss = record->loss;
    WSF_UNLOCK(&shard->lock);
}

int wsf_record_swap(wsf_record *record, PyObject **field, PyObject *value, PyObject **old)
{
    wsf_shard *shard = record->shard;
    *old = NULL;
    WSF_LOCK(&shard->lock);
    int attached = wsf_record_attached(record);
    if (attached) {
        *old = *field;
        *field = value;
    }
    WSF_UNLOCK(&shard->lock);
    return attached;
}

int wsf_record_replace(wsf_record *record, PyObject **field, PyObject *expected, PyObject *value, PyObject **old)
{
    wsf_shard *shard = record->shard;
    *old = NULL;
    WSF_LOCK(&shard->lock);
    int outcome = wsf_record_attached(record);
    if (outcome && *field != expected) {
        outcome = -1;
    } else if (outcome) {
        *old = *field;
        *field = value;
    }
    WSF_UNLOCK(&shard->lock);
    return outcome;
}

PyObject *wsf_record_read(wsf_record *record, PyObject **field)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    PyObject *value = Py_XNewRef(*field);
    WSF_UNLOCK(&shard->lock);
    return value;
}

PyObject *wsf_record_read_conn(wsf_record *record)
{
    wsf_shard *shard = record->shard;
    WSF_LOCK(&shard->lock);
    PyObject *conn = wsf_record_attached(record) ? Py_XNewRef(record->conn) : NULL;
    WSF_UNLOCK(&shard->lock);
    return conn;
}

/* ---- walks ------------------------------------------------------------------------------------------------------------------ */

/* The slots of a block whose records have one of these statuses. What is known of the block is exact after this. */
static uint64_t slots_with(wsf_shard *shard, uint32_t number, uint32_t statuses)
{
    const wsf_block *block = shard->blocks[number]; /* NULL: nothing is taken */
    uint64_t found = 0;
    uint32_t present = 0;
    for (uint64_t taken = shard->occupied[number]; taken != 0; taken &= taken - 1) {
        uint32_t at = wsf_lowest_bit(taken), its = UINT32_C(1) << block->status[at];
        present |= its;
        found |= (uint64_t)((its & statuses) != 0) << at;
    }
    for (uint32_t each = 0; each < WSF_STATUSES; each++)
        if ((present >> each & 1) == 0)
            shard->may_have[number / 64][each] &= ~bit(number);
    return found;
}

/* The first block from `number` on that may hold a record with one of these statuses; block_count: none does. */
static uint32_t block_with(const wsf_shard *shard, uint32_t number, uint32_t statuses)
{
    uint64_t wanted = UINT64_MAX << (number & 63);
    if (statuses == WSF_ANY_STATUS)
        return number;
    for (uint32_t word = number / 64; word < (shard->block_count + 63) / 64; word++, wanted = UINT64_MAX) {
        uint64_t may_have = 0;
        for (uint32_t each = 0; each < WSF_STATUSES; each++)
            if (statuses >> each & 1)
                may_have |= shard->may_have[word][each];
        if ((may_have & wanted) != 0)
            return word * 64 + wsf_lowest_bit(may_have & wanted);
    }
    return shard->block_count;
}

/* How many records have one of these statuses; without the lock, about how many. */
static uint64_t count_with(wsf_shard *shard, uint32_t statuses)
{
    uint64_t count = 0;
    for (uint32_t each = 0; each < WSF_STATUSES; each++)
        if (statuses >> each & 1)
            count += WSF_LOAD32(&shard->by_status[each]);
    return count;
}

/* The part of a walk that lies in one shard, without references. Call with the lock held. */
static size_t collect_locked(wsf_shard *shard, uint32_t *slot, uint32_t statuses, PyObject **out, size_t room)
{
    const uint64_t most = count_with(shard, statuses); /* when so many are found, blocks that only may hold one do not */
    size_t used = 0;
    uint32_t number = *slot / WSF_BLOCK_SLOTS;
    uint64_t wanted = UINT64_MAX << *slot % WSF_BLOCK_SLOTS;
    if (most != 0 && wanted == UINT64_MAX)
        number = block_with(shard, number, statuses);
    while (number < shard->block_count && used < room && used < most) {
        const wsf_block *block = shard->blocks[number];
        uint32_t next = block_with(shard, number + 1, statuses);
        if (statuses != WSF_ANY_STATUS && next < shard->block_count)
            WSF_PREFETCH(shard->blocks[next]->status);
        uint64_t found = statuses == WSF_ANY_STATUS ? shard->occupied[number] : slots_with(shard, number, statuses);
        for (found &= wanted; found != 0; found &= found - 1) {
            uint32_t at = wsf_lowest_bit(found);
            if (used == room) {
                *slot = number * WSF_BLOCK_SLOTS + at;
                return used;
            }
            wsf_record_prefetch(block->records[at]);
            out[used++] = wsf_record_object(block->records[at]);
        }
        number = next;
        wanted = UINT64_MAX;
    }
    *slot = number * WSF_BLOCK_SLOTS;
    return used;
}

size_t wsf_core_collect(wsf_core *core, wsf_cursor *cursor, uint32_t statuses, PyObject **out, size_t room)
{
    size_t used = 0;
    while (cursor->shard < core->shard_count && used < room) {
        wsf_shard *shard = &core->shards[cursor->shard];
        WSF_LOCK(&shard->lock);
        size_t before = used;
        used += collect_locked(shard, &cursor->slot, statuses, out + used, room - used);
        for (size_t i = before; i < used; i++)
            Py_INCREF(out[i]); /* the heads of all of them are on their way by now */
        int finished = used < room;
        WSF_UNLOCK(&shard->lock);
        if (finished) {
            cursor->shard++;
            cursor->slot = 0;
        }
    }
    return used;
}

/* ---- all at once */

/* How many records are looked at between two locks, and how many references wait for a test: few enough that they stay
 * in the caches. */
#define PIECE 512

static void release_all(PyObject **objects, size_t begin, size_t end)
{
    for (size_t i = begin; i < end; i++)
        Py_DECREF(objects[i]);
}

/* Of the records that the index selected, keep those with the statuses. Returns how many. */
static int64_t keep_statuses(PyObject **objects, int64_t count, uint32_t statuses)
{
    size_t kept = 0, n = (size_t)count;
    for (size_t i = 0; i < n; i++) {
        PyObject *object = objects[i];
        if (i + AHEAD < n)
            WSF_PREFETCH(wsf_object_record(objects[i + AHEAD]));
        int status = wsf_record_status(wsf_object_record(object));
        if (status >= 0 && (statuses >> status & 1) != 0) {
            objects[i] = objects[kept];
            objects[kept++] = object;
        }
    }
    release_all(objects, kept, n);
    return (int64_t)kept;
}

/* Make room for one more piece, the first time for `expected` objects too. */
static int reserve_piece(PyObject ***objects, size_t used, size_t *capacity, size_t expected)
{
    if (*capacity - used >= PIECE)
        return WSF_OK;
    size_t larger = PIECE + (*capacity == 0 ? expected : *capacity + *capacity / 2);
    PyObject **moved = PyMem_Realloc(*objects, larger * sizeof *moved);
    if (moved == NULL)
        return WSF_NO_MEMORY;
    *objects = moved;
    *capacity = larger;
    return WSF_OK;
}

/* expected: about how many records have the statuses. */
static int64_t select_from_slots(wsf_core *core, const wsf_term *terms, uint32_t count, uint32_t statuses,
                                 uint64_t expected, PyObject ***out)
{
    wsf_cursor cursor = {0, 0};
    size_t used = 0, capacity = 0, found = PIECE;
    int64_t kept = 0;
    while (found == PIECE) {
        kept = reserve_piece(out, used, &capacity, count == 0 ? (size_t)expected : 0);
        if (kept < 0)
            break;
        PyObject **piece = *out + used;
        found = wsf_core_collect(core, &cursor, statuses, piece, PIECE);
        kept = count == 0 ? (int64_t)found : wsf_index_keep(&core->index, terms, count, piece, found);
        release_all(piece, kept < 0 ? 0 : (size_t)kept, found);
        if (kept < 0)
            break;
        used += (size_t)kept;
    }
    if (kept >= 0)
        return (int64_t)used;
    release_all(*out, 0, used);
    PyMem_Free(*out);
    *out = NULL;
    return kept;
}

int64_t wsf_core_select(wsf_core *core, const wsf_term *terms, uint32_t count, uint32_t statuses, PyObject ***out)
{
    uint64_t most = 0;
    *out = NULL;
    for (uint32_t i = 0; i < core->shard_count; i++)
        most += count_with(&core->shards[i], statuses);
    if (most == 0)
        return 0;
    int64_t selected = WSF_TOO_MANY;
    if (count != 0)
        selected = wsf_index_select(&core->index, terms, count, statuses == WSF_ANY_STATUS ? UINT64_MAX : most, out);
    if (selected == WSF_TOO_MANY)
        return select_from_slots(core, terms, count, statuses, most, out);
    return selected <= 0 || statuses == WSF_ANY_STATUS ? selected : keep_statuses(*out, selected, statuses);
}

static int later(const wsf_due_entry *a, const wsf_due_entry *b) { return a->deadline_ns > b->deadline_ns; }

/* Sift the entry at the top of a heap with the latest deadline on top down to its place. */
static void sift_down(wsf_due_entry *heap, size_t size)
{
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && later(&heap[child + 1], &heap[child]))
            child++;
        if (!later(&heap[child], &heap[at]))
            return;
        wsf_due_entry entry = heap[at];
        heap[at] = heap[child];
        heap[child] = entry;
    }
}

static void sift_up(wsf_due_entry *heap, size_t at)
{
    for (size_t parent; at > 0 && later(&heap[at], &heap[parent = (at - 1) / 2]); at = parent) {
        wsf_due_entry entry = heap[at];
        heap[at] = heap[parent];
        heap[parent] = entry;
    }
}

/* Keep the `room` earliest of all that is offered. Returns the new size. */
static size_t offer(wsf_due_entry *heap, size_t size, size_t room, wsf_due_entry entry)
{
    if (size < room) {
        heap[size] = entry;
        sift_up(heap, size);
        return size + 1;
    }
    if (later(&heap[0], &entry)) {
        heap[0] = entry;
        sift_down(heap, size);
    }
    return size;
}

static int by_deadline(const void *left, const void *right)
{
    int64_t a = ((const wsf_due_entry *)left)->deadline_ns, b = ((const wsf_due_entry *)right)->deadline_ns;
    return (a > b) - (a < b);
}

/* How many blocks ahead a search for deadlines asks for memory. */
#define BLOCKS_AHEAD 4

static void expect_deadlines(const wsf_block *block)
{
    for (uint32_t at = 0; at < WSF_BLOCK_SLOTS; at += 64 / sizeof *block->deadline_ns)
        WSF_PREFETCH_WRITE(&block->deadline_ns[at]);
}

static size_t due_locked(wsf_shard *shard, int64_t now_ns, wsf_due_entry *out, size_t room)
{
    size_t used = 0;
    for (uint32_t number = 0; number < shard->block_count; number++) {
        uint32_t ahead = number + BLOCKS_AHEAD;
        if (ahead < shard->block_count && shard->earliest_ns[ahead] <= now_ns)
            expect_deadlines(shard->blocks[ahead]);
        if (shard->earliest_ns[number] > now_ns)
            continue;
        const wsf_block *block = shard->blocks[number];
        int64_t earliest_ns = WSF_NEVER;
        for (uint32_t at = 0; at < WSF_BLOCK_SLOTS; at++) {
            int64_t deadline_ns = block->deadline_ns[at];
            if (deadline_ns < earliest_ns)
                earliest_ns = deadline_ns;
            if (deadline_ns <= now_ns) {
                wsf_record_prefetch(block->records[at]);
                used = offer(out, used, room, (wsf_due_entry){deadline_ns, wsf_record_object(block->records[at])});
            }
        }
        shard->earliest_ns[number] = earliest_ns;
    }
    return used;
}

size_t wsf_shard_due(wsf_shard *shard, int64_t now_ns, wsf_due_entry *out, size_t room)
{
    if (now_ns == WSF_NEVER)
        now_ns--; /* never stays never */
    WSF_LOCK(&shard->lock);
    size_t used = due_locked(shard, now_ns, out, room);
    for (size_t i = 0; i < used; i++)
        Py_INCREF(out[i].object);
    WSF_UNLOCK(&shard->lock);
    qsort(out, used, sizeof *out, by_deadline);
    return used;
}

/* ---- figures ---------------------------------------------------------------------------------------------------------- */

void wsf_shard_measure(wsf_shard *shard, wsf_shard_figures *figures)
{
    WSF_LOCK(&shard->lock);
    figures->connections = shard->table.used;
    figures->longest_probe = wsf_table_longest_probe(&shard->table, wsf_record_hash);
    figures->counters = shard->counters;
    WSF_UNLOCK(&shard->lock);
}

uint64_t wsf_core_size(wsf_core *core)
{
    uint64_t size = 0;
    for (uint32_t i = 0; i < core->shard_count; i++)
        size += WSF_LOAD32(&core->shards[i].table.used);
    return size;
}

int64_t wsf_core_bytes(wsf_core *core)
{
    int64_t bytes = (int64_t)core_bytes(core->shard_count);
    for (uint32_t i = 0; i < core->shard_count; i++) {
        WSF_LOCK(&core->shards[i].lock);
        bytes += core->shards[i].account;
        WSF_UNLOCK(&core->shards[i].lock);
    }
    WSF_LOCK(&core->index.lock);
    bytes += core->index.account;
    WSF_UNLOCK(&core->index.lock);
    return bytes;
}

#ifdef WSF_DEBUG
static void check_shard(const wsf_shard *shard)
{
    uint32_t found = 0, by_status[WSF_STATUSES] = {0};
    for (uint32_t number = 0; number < shard->block_count; number++) {
        WSF_ASSERT((shard->blocks[number] == NULL) == (shard->occupied[number] == 0));
        WSF_ASSERT(((shard->has_room[number / 64] & bit(number)) != 0) == (shard->occupied[number] != UINT64_MAX));
        for (uint64_t taken = shard->occupied[number]; taken != 0; taken &= taken - 1) {
            uint32_t at = wsf_lowest_bit(taken);
            wsf_record *record = shard->blocks[number]->records[at];
            WSF_ASSERT(record->shard == shard && slot_of(record) == number * WSF_BLOCK_SLOTS + at);
            WSF_ASSERT(wsf_record_status(record) == shard->blocks[number]->status[at]);
            WSF_ASSERT(wsf_table_find(&shard->table, wsf_record_hash(record), record->client_id, wsf_record_equals) ==
                       record);
            WSF_ASSERT(shard->earliest_ns[number] <= shard->blocks[number]->deadline_ns[at]);
            uint8_t status = shard->blocks[number]->status[at];
            WSF_ASSERT(status < WSF_STATUSES && (shard->may_have[number / 64][status] & bit(number)) != 0);
            by_status[status]++;
            found++;
        }
    }
    WSF_ASSERT(found == shard->table.used);
    WSF_ASSERT(memcmp(by_status, shard->by_status, sizeof by_status) == 0);
    for (uint32_t number = 0; number < shard->block_capacity; number++)
        for (uint32_t status = 0; status < WSF_STATUSES; status++)
            WSF_ASSERT((number < shard->block_count && shard->blocks[number] != NULL) ||
                       (shard->may_have[number / 64][status] & bit(number)) == 0);
}

void wsf_core_check(wsf_core *core)
{
    for (uint32_t i = 0; i < core->shard_count; i++)
        check_shard(&core->shards[i]);
    wsf_index_check(&core->index);
}

int64_t *wsf_live_counters(void) { return wsf_live; }
#else
void wsf_core_check(wsf_core *core) { (void)core; }
int64_t *wsf_live_counters(void) { return NULL; }
#endif
