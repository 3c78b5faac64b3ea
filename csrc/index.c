/* Groups, users, tags and device types; see index.h. */
#include "index.h"

#include <stdlib.h>

/* ---- bags ------------------------------------------------------------------------------------------------------- */

static int bag_reserve(wsf_bag *bag, int64_t *account)
{
    if (bag->size < bag->capacity)
        return WSF_OK;
    if (bag->capacity >= UINT32_C(3) << 30)
        return WSF_NO_MEMORY;
    uint32_t capacity = bag->capacity < 4 ? 4 : bag->capacity < 1024 ? 2 * bag->capacity
                                                                     : bag->capacity + bag->capacity / 8;
    void **items = wsf_resize(account, bag->items, bag->capacity * sizeof *items, capacity * sizeof *items);
    if (items == NULL)
        return WSF_NO_MEMORY;
    bag->items = items;
    bag->capacity = capacity;
    return WSF_OK;
}

static void bag_free(wsf_bag *bag, int64_t *account)
{
    wsf_free(account, bag->items, bag->capacity * sizeof *bag->items);
    bag->items = NULL;
    bag->size = bag->capacity = 0;
}

/* Room was reserved. Returns the position. */
static uint32_t bag_push(wsf_bag *bag, void *item)
{
    WSF_ASSERT(bag->size < bag->capacity);
    bag->items[bag->size] = item;
    return bag->size++;
}

/* Returns the item that now is at `position`, or NULL if none moved. */
static void *bag_remove(wsf_bag *bag, int64_t *account, uint32_t position)
{
    WSF_ASSERT(position < bag->size);
    void *moved = NULL;
    if (position != --bag->size)
        moved = bag->items[position] = bag->items[bag->size];
    if (bag->size == 0) {
        bag_free(bag, account);
    } else if (bag->capacity > 8 && bag->size < bag->capacity / 4) {
        uint32_t capacity = bag->capacity / 2;
        void **items = wsf_resize(account, bag->items, bag->capacity * sizeof *items, capacity * sizeof *items);
        if (items != NULL) {
            bag->items = items;
            bag->capacity = capacity;
        }
    }
    return moved;
}

/* ---- memberships of one record ------------------------------------------------------------------------------------ */

/* Up to here a scan of the entries (two cache lines) is as fast as hashing. */
#define SMALL_MEMBERSHIPS 8

static size_t memberships_bytes(uint32_t capacity)
{
    return sizeof(wsf_memberships) + capacity * sizeof(wsf_membership);
}

static uint32_t membership_home(const wsf_set *set, uint32_t capacity)
{
    return (uint32_t)(((uint64_t)(uintptr_t)set >> 4) * UINT64_C(0x9E3779B97F4A7C15) >> 32) & (capacity - 1);
}

static wsf_membership *membership_find(const wsf_record *record, const wsf_set *set)
{
    wsf_memberships *all = record->groups;
    if (all == NULL)
        return NULL;
    if (all->capacity <= SMALL_MEMBERSHIPS) {
        for (uint32_t i = 0; i < all->used; i++)
            if (all->entries[i].set == set)
                return &all->entries[i];
        return NULL;
    }
    uint32_t at = membership_home(set, all->capacity);
    while (all->entries[at].set != NULL) {
        if (all->entries[at].set == set)
            return &all->entries[at];
        at = (at + 1) & (all->capacity - 1);
    }
    return NULL;
}

static void membership_place(wsf_memberships *all, wsf_membership entry)
{
    uint32_t at = all->used;
    if (all->capacity > SMALL_MEMBERSHIPS) {
        at = membership_home(entry.set, all->capacity);
        while (all->entries[at].set != NULL)
            at = (at + 1) & (all->capacity - 1);
    }
    all->entries[at] = entry;
    all->used++;
}

static int memberships_resize(wsf_record *record, int64_t *account, uint32_t capacity)
{
    wsf_memberships *old = record->groups, *all = wsf_alloc(account, memberships_bytes(capacity));
    if (all == NULL)
        return WSF_NO_MEMORY;
    memset(all, 0, memberships_bytes(capacity));
    all->capacity = capacity;
    record->groups = all;
    if (old != NULL) {
        for (uint32_t i = 0; i < old->capacity; i++)
            if (old->entries[i].set != NULL)
                membership_place(all, old->entries[i]);
        wsf_free(account, old, memberships_bytes(old->capacity));
    }
    return WSF_OK;
}

static int memberships_reserve(wsf_record *record, int64_t *account)
{
    wsf_memberships *all = record->groups;
    if (all == NULL)
        return memberships_resize(record, account, 1);
    uint32_t room = all->capacity <= SMALL_MEMBERSHIPS ? all->capacity : all->capacity / 4 * 3;
    return all->used < room ? WSF_OK : memberships_resize(record, account, 2 * all->capacity);
}

static void membership_remove(wsf_record *record, int64_t *account, wsf_membership *entry)
{
    wsf_memberships *all = record->groups;
    all->used--;
    if (all->used == 0) {
        wsf_free(account, all, memberships_bytes(all->capacity));
        record->groups = NULL;
        return;
    }
    if (all->capacity <= SMALL_MEMBERSHIPS) {
        *entry = all->entries[all->used];
        all->entries[all->used].set = NULL;
        return;
    }
    uint32_t mask = all->capacity - 1, hole = (uint32_t)(entry - all->entries), at = hole;
    for (;;) {
        at = (at + 1) & mask;
        if (all->entries[at].set == NULL)
            break;
        uint32_t home = membership_home(all->entries[at].set, all->capacity);
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            all->entries[hole] = all->entries[at];
            hole = at;
        }
    }
    all->entries[hole].set = NULL;
    if (all->used < all->capacity / 4)
        (void)memberships_resize(record, account, all->capacity / 2);
}

/* ---- sets of records by name ------------------------------------------------------------------------------------------ */

/* The word may be the place of a record, which another thread changes under its shard's lock. */
static int is_set(const void *item) { return WSF_LOAD32((uint32_t *)(uintptr_t)item) == WSF_SET_MARK; }

/* What the user table holds is a set or a lone record; what the group table holds is always a set. */
static PyObject *item_name(const void *item)
{
    return is_set(item) ? ((const wsf_set *)item)->name : ((const wsf_record *)item)->user;
}

static int name_equals(const void *item, const void *name)
{
    return wsf_text_equal(item_name(item), (PyObject *)name);
}

static uint32_t text_fold(PyObject *text) { return wsf_fold_hash(wsf_text_hash(text)); }

static uint32_t name_hash(const void *item) { return text_fold(item_name(item)); }

/* Not in a table yet. name: a reference is taken. */
static wsf_set *set_new(int64_t *account, PyObject *name)
{
    wsf_set *set = wsf_alloc(account, sizeof *set);
    if (set == NULL)
        return NULL;
    memset(set, 0, sizeof *set);
    set->mark = WSF_SET_MARK;
    set->name = Py_NewRef(name);
    WSF_COUNT_LIVE(WSF_LIVE_SET, 1);
    return set;
}

static void set_free(wsf_set *set, int64_t *account, wsf_trash *trash)
{
    wsf_trash_add(trash, set->name);
    bag_free(&set->records, account);
    wsf_free(account, set, sizeof *set);
    WSF_COUNT_LIVE(WSF_LIVE_SET, -1);
}

/* ---- groups --------------------------------------------------------------------------------------------------------------- */

static int join_locked(wsf_index *index, wsf_record *record, PyObject *group, uint32_t max_groups, wsf_trash *trash)
{
    int64_t *account = &index->account;
    uint32_t hash = text_fold(group);
    wsf_set *set = wsf_table_find(&index->groups, hash, group, name_equals);
    if (set != NULL && membership_find(record, set) != NULL)
        return 0;
    if (record->groups != NULL ? record->groups->used >= max_groups : max_groups == 0)
        return WSF_TOO_MANY;
    int is_new = set == NULL;
    if (is_new) {
        set = set_new(account, group);
        if (set == NULL)
            return WSF_NO_MEMORY;
    }
    if (memberships_reserve(record, account) == WSF_OK && bag_reserve(&set->records, account) == WSF_OK &&
        (!is_new || wsf_table_insert(&index->groups, account, hash, set, name_hash) == WSF_OK)) {
        membership_place(record->groups, (wsf_membership){set, bag_push(&set->records, record)});
        return 1;
    }
    if (is_new)
        set_free(set, account, trash);
    if (record->groups != NULL && record->groups->used == 0) {
        wsf_free(account, record->groups, memberships_bytes(record->groups->capacity));
        record->groups = NULL;
    }
    return WSF_NO_MEMORY;
}

int wsf_index_join(wsf_index *index, wsf_record *record, PyObject *group, uint32_t max_groups)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    wsf_record_announce(record);
    WSF_LOCK(&index->lock);
    int outcome =
        wsf_record_attached(record) ? join_locked(index, record, group, max_groups, &trash) : WSF_DETACHED;
    WSF_UNLOCK(&index->lock);
    wsf_trash_release(&trash);
    return outcome;
}

static void leave_locked(wsf_index *index, wsf_record *record, wsf_membership *entry, wsf_trash *trash)
{
    wsf_set *set = entry->set;
    uint32_t position = entry->position;
    wsf_record *moved = bag_remove(&set->records, &index->account, position);
    if (moved != NULL)
        membership_find(moved, set)->position = position;
    membership_remove(record, &index->account, entry);
    if (set->records.size == 0) {
        wsf_table_remove(&index->groups, &index->account, text_fold(set->name), set, name_hash);
        set_free(set, &index->account, trash);
    }
}

int wsf_index_leave(wsf_index *index, wsf_record *record, PyObject *group, wsf_trash *trash)
{
    int outcome = 0;
    WSF_LOCK(&index->lock);
    if (!wsf_record_attached(record)) {
        outcome = WSF_DETACHED;
    } else {
        wsf_set *set = wsf_table_find(&index->groups, text_fold(group), group, name_equals);
        wsf_membership *entry = set == NULL ? NULL : membership_find(record, set);
        if (entry != NULL) {
            leave_locked(index, record, entry, trash);
            outcome = 1;
        }
    }
    WSF_UNLOCK(&index->lock);
    return outcome;
}

/* ---- users ------------------------------------------------------------------------------------------------------------------ */

/* The record is in the user table; its `user` stays as it is. */
static void user_drop(wsf_index *index, wsf_record *record, wsf_trash *trash)
{
    uint32_t hash = text_fold(record->user);
    void *item = wsf_table_find(&index->users, hash, record->user, name_equals);
    WSF_ASSERT(item != NULL);
    if (!is_set(item)) {
        wsf_table_remove(&index->users, &index->account, hash, item, name_hash);
        return;
    }
    wsf_set *set = item;
    wsf_record *moved = bag_remove(&set->records, &index->account, record->user_pos);
    if (moved != NULL)
        moved->user_pos = record->user_pos;
    if (set->records.size == 0) {
        wsf_table_remove(&index->users, &index->account, hash, set, name_hash);
        set_free(set, &index->account, trash);
    }
}

/* A set in the place of the lone record, with room for a second one; NULL: no memory. */
static wsf_set *user_promote(wsf_index *index, wsf_record *lone, uint32_t hash, wsf_trash *trash)
{
    wsf_set *set = set_new(&index->account, lone->user);
    if (set == NULL)
        return NULL;
    if (bag_reserve(&set->records, &index->account) != WSF_OK) {
        set_free(set, &index->account, trash);
        return NULL;
    }
    lone->user_pos = bag_push(&set->records, lone);
    wsf_table_swap(&index->users, hash, lone, set);
    return set;
}

/* The set of `user` with room for one more record; where `item`, the present one, is NULL, a set without room that is to
 * make way for the record itself. NULL: no memory. */
static wsf_set *user_set(wsf_index *index, PyObject *user, uint32_t hash, void *item, wsf_trash *trash)
{
    int64_t *account = &index->account;
    if (item == NULL) {
        wsf_set *set = set_new(account, user);
        if (set != NULL && wsf_table_insert(&index->users, account, hash, set, name_hash) != WSF_OK) {
            set_free(set, account, trash);
            return NULL;
        }
        return set;
    }
    wsf_set *set = is_set(item) ? item : user_promote(index, item, hash, trash);
    return set != NULL && bag_reserve(&set->records, account) == WSF_OK ? set : NULL;
}

static void user_join(wsf_index *index, wsf_record *record, wsf_set *set, uint32_t hash, wsf_trash *trash)
{
    record->user = Py_NewRef(set->name);
    record->user_pos = 0;
    if (set->records.capacity != 0) {
        record->user_pos = bag_push(&set->records, record);
        return;
    }
    wsf_table_swap(&index->users, hash, set, record);
    set_free(set, &index->account, trash);
}

static int set_user_locked(wsf_index *index, wsf_record *record, PyObject *user, wsf_trash *trash)
{
    PyObject *former = record->user;
    if (!wsf_record_attached(record))
        return WSF_DETACHED;
    if (former == user || (former != NULL && user != NULL && wsf_text_equal(former, user)))
        return WSF_OK;
    if (user == NULL) {
        user_drop(index, record, trash);
        record->user = NULL;
        wsf_trash_add(trash, former);
        return WSF_OK;
    }
    uint32_t hash = text_fold(user);
    void *item = wsf_table_find(&index->users, hash, user, name_equals);
    if (former == NULL && item == NULL) {
        if (wsf_table_insert(&index->users, &index->account, hash, record, name_hash) != WSF_OK)
            return WSF_NO_MEMORY;
        record->user = Py_NewRef(user);
        record->user_pos = 0;
        return WSF_OK;
    }
    /* A lone record is found by its own `user`, so it cannot be in the table under two names at once. A set stands in
     * for it while it leaves the former name: all that can fail comes before that. */
    wsf_set *set = user_set(index, user, hash, item, trash);
    if (set == NULL)
        return WSF_NO_MEMORY;
    if (former != NULL)
        user_drop(index, record, trash);
    user_join(index, record, set, hash, trash);
    wsf_trash_add(trash, former);
    return WSF_OK;
}

int wsf_index_set_user(wsf_index *index, wsf_record *record, PyObject *user, wsf_trash *trash)
{
    wsf_record_announce(record);
    WSF_LOCK(&index->lock);
    int outcome = set_user_locked(index, record, user, trash);
    WSF_UNLOCK(&index->lock);
    return outcome;
}

PyObject *wsf_index_user_of(wsf_index *index, wsf_record *record)
{
    WSF_LOCK(&index->lock);
    PyObject *user = Py_XNewRef(record->user);
    WSF_UNLOCK(&index->lock);
    return user;
}

/* ---- tags --------------------------------------------------------------------------------------------------------------------- */

/* tag_pos of a record whose tags are a mapping, because it was forgotten. */
#define TAGS_ARE_MAPPING UINT32_MAX

typedef struct {
    PyObject *key, *value;
} tag_name;

static uint32_t tag_fold(PyObject *key, PyObject *value)
{
    return wsf_fold_hash(wsf_text_hash(key) * UINT64_C(0x9E3779B97F4A7C15) + wsf_text_hash(value));
}

static int tag_equals(const void *item, const void *name)
{
    const wsf_tag *tag = item;
    const tag_name *wanted = name;
    return wsf_text_equal(tag->key, wanted->key) && wsf_text_equal(tag->value, wanted->value);
}

static uint32_t tag_hash(const void *item)
{
    const wsf_tag *tag = item;
    return tag_fold(tag->key, tag->value);
}

static int tag_key_equals(const void *item, const void *key)
{
    return wsf_text_equal(((const wsf_tag_key *)item)->key, (PyObject *)key);
}

static uint32_t tag_key_hash(const void *item) { return text_fold(((const wsf_tag_key *)item)->key); }

static wsf_tag *tag_find(wsf_index *index, PyObject *key, PyObject *value)
{
    tag_name name = {key, value};
    return wsf_table_find(&index->tags, tag_fold(key, value), &name, tag_equals);
}

static void tag_key_free_if_empty(wsf_index *index, wsf_tag_key *owner, wsf_trash *trash)
{
    if (owner->tags.size != 0)
        return;
    wsf_table_remove(&index->tag_keys, &index->account, tag_key_hash(owner), owner, tag_key_hash);
    wsf_trash_add(trash, owner->key);
    bag_free(&owner->tags, &index->account);
    wsf_free(&index->account, owner, sizeof *owner);
}

static int device_type_equals(const void *item, const void *name)
{
    return wsf_text_equal(((const wsf_tag *)item)->value, (PyObject *)name);
}

static uint32_t device_type_hash(const void *item) { return text_fold(((const wsf_tag *)item)->value); }

static wsf_tag *device_type_find(const wsf_index *index, PyObject *name)
{
    return wsf_table_find(&index->device_types, text_fold(name), name, device_type_equals);
}

/* The same for a device type as tag_get does for a tag. */
static wsf_tag *device_type_get(wsf_index *index, PyObject *name)
{
    wsf_tag *tag = device_type_find(index, name);
    if (tag != NULL || (tag = wsf_alloc(&index->account, sizeof *tag)) == NULL)
        return tag;
    memset(tag, 0, sizeof *tag);
    tag->value = name;
    if (wsf_table_insert(&index->device_types, &index->account, text_fold(name), tag, device_type_hash) != WSF_OK) {
        wsf_free(&index->account, tag, sizeof *tag);
        return NULL;
    }
    Py_INCREF(name);
    return tag;
}

static void device_type_free(wsf_index *index, wsf_tag *tag, wsf_trash *trash)
{
    wsf_table_remove(&index->device_types, &index->account, device_type_hash(tag), tag, device_type_hash);
    wsf_trash_add(trash, tag->value);
    bag_free(&tag->tagsets, &index->account);
    wsf_free(&index->account, tag, sizeof *tag);
}

static void tag_free_if_empty(wsf_index *index, wsf_tag *tag, wsf_trash *trash)
{
    if (tag->tagsets.size != 0)
        return;
    if (tag->owner == NULL) {
        device_type_free(index, tag, trash);
        return;
    }
    wsf_tag_key *owner = tag->owner;
    wsf_tag *moved = bag_remove(&owner->tags, &index->account, tag->position);
    if (moved != NULL)
        moved->position = tag->position;
    wsf_table_remove(&index->tags, &index->account, tag_hash(tag), tag, tag_hash);
    wsf_trash_add(trash, tag->key);
    wsf_trash_add(trash, tag->value);
    bag_free(&tag->tagsets, &index->account);
    wsf_free(&index->account, tag, sizeof *tag);
    tag_key_free_if_empty(index, owner, trash);
}

static wsf_tag_key *tag_key_get(wsf_index *index, PyObject *key)
{
    uint32_t hash = text_fold(key);
    wsf_tag_key *owner = wsf_table_find(&index->tag_keys, hash, key, tag_key_equals);
    if (owner != NULL)
        return owner;
    owner = wsf_alloc(&index->account, sizeof *owner);
    if (owner == NULL)
        return NULL;
    memset(owner, 0, sizeof *owner);
    owner->key = key;
    if (wsf_table_insert(&index->tag_keys, &index->account, hash, owner, tag_key_hash) != WSF_OK) {
        wsf_free(&index->account, owner, sizeof *owner);
        return NULL;
    }
    Py_INCREF(key);
    return owner;
}

/* The tag, made if need be; NULL: no memory. A tag without tag sets is for the caller to free. */
static wsf_tag *tag_get(wsf_index *index, PyObject *key, PyObject *value, wsf_trash *trash)
{
    wsf_tag *tag = tag_find(index, key, value);
    if (tag != NULL)
        return tag;
    wsf_tag_key *owner = tag_key_get(index, key);
    if (owner == NULL)
        return NULL;
    tag = wsf_alloc(&index->account, sizeof *tag);
    if (tag != NULL) {
        memset(tag, 0, sizeof *tag);
        tag->key = owner->key;
        tag->value = value;
        tag->owner = owner;
        if (bag_reserve(&owner->tags, &index->account) == WSF_OK &&
            wsf_table_insert(&index->tags, &index->account, tag_hash(tag), tag, tag_hash) == WSF_OK) {
            Py_INCREF(tag->key);
            Py_INCREF(value);
            tag->position = bag_push(&owner->tags, tag);
            return tag;
        }
        wsf_free(&index->account, tag, sizeof *tag);
    }
    tag_key_free_if_empty(index, owner, trash);
    return NULL;
}

typedef struct {
    wsf_tag **tags;
    uint32_t count;
} tag_list;

static int tagset_equals(const void *item, const void *wanted)
{
    const wsf_tagset *set = item;
    const tag_list *list = wanted;
    if (set->count != list->count)
        return 0;
    for (uint32_t i = 0; i < set->count; i++)
        if (set->tags[i].tag != list->tags[i])
            return 0;
    return 1;
}

static uint32_t tagset_hash(const void *item) { return ((const wsf_tagset *)item)->hash; }

static uint32_t tag_list_hash(const tag_list *list)
{
    uint64_t hash = list->count;
    for (uint32_t i = 0; i < list->count; i++)
        hash = (hash ^ ((uint64_t)(uintptr_t)list->tags[i] >> 4)) * UINT64_C(0x9E3779B97F4A7C15);
    return wsf_fold_hash(hash);
}

static int by_address(const void *left, const void *right)
{
    uintptr_t a = (uintptr_t) * (wsf_tag *const *)left, b = (uintptr_t) * (wsf_tag *const *)right;
    return (a > b) - (a < b);
}

static size_t tagset_bytes(uint32_t count)
{
    return offsetof(wsf_tagset, tags) + count * sizeof(((wsf_tagset *)0)->tags[0]);
}

/* The set's device type, borrowed, or NULL. set: may be NULL. */
static wsf_tag *tagset_device_type(const wsf_tagset *set)
{
    return set == NULL || set->tags[0].tag->owner != NULL ? NULL : set->tags[0].tag;
}

static uint32_t tagset_find_tag(const wsf_tagset *set, const wsf_tag *tag)
{
    for (uint32_t i = 0; i < set->count; i++)
        if (set->tags[i].tag == tag)
            return i;
    return UINT32_MAX;
}

/* Take the tag set out of its first `linked` tags and free it; it has no records. */
static void tagset_free(wsf_index *index, wsf_tagset *set, uint32_t linked, wsf_trash *trash)
{
    for (uint32_t i = 0; i < linked; i++) {
        wsf_tag *tag = set->tags[i].tag;
        wsf_tagset *moved = bag_remove(&tag->tagsets, &index->account, set->tags[i].position);
        if (moved != NULL)
            moved->tags[tagset_find_tag(moved, tag)].position = set->tags[i].position;
        tag_free_if_empty(index, tag, trash);
    }
    wsf_trash_add(trash, set->mapping);
    bag_free(&set->records, &index->account);
    wsf_free(&index->account, set, tagset_bytes(set->count));
    WSF_COUNT_LIVE(WSF_LIVE_TAGSET, -1);
}

/* A new tag set of these tags, in the index; NULL: no memory. mapping: a reference is taken; may be NULL. */
static wsf_tagset *tagset_new(wsf_index *index, const tag_list *list, PyObject *mapping, wsf_trash *trash)
{
    wsf_tagset *set = wsf_alloc(&index->account, tagset_bytes(list->count));
    if (set == NULL)
        return NULL;
    memset(set, 0, tagset_bytes(list->count));
    WSF_COUNT_LIVE(WSF_LIVE_TAGSET, 1);
    set->count = list->count;
    set->hash = tag_list_hash(list);
    set->mapping = Py_XNewRef(mapping);
    uint32_t linked = 0;
    for (; linked < list->count; linked++) {
        wsf_tag *tag = list->tags[linked];
        if (bag_reserve(&tag->tagsets, &index->account) != WSF_OK)
            break;
        set->tags[linked].tag = tag;
        set->tags[linked].position = bag_push(&tag->tagsets, set);
    }
    if (linked == list->count && bag_reserve(&set->records, &index->account) == WSF_OK &&
        wsf_table_insert(&index->tagsets, &index->account, set->hash, set, tagset_hash) == WSF_OK)
        return set;
    /* The tags themselves are the caller's to free: keep tagset_free from doing so by leaving its loop empty. */
    while (linked > 0) {
        linked--;
        (void)bag_remove(&set->tags[linked].tag->tagsets, &index->account, set->tags[linked].position);
    }
    tagset_free(index, set, 0, trash);
    return NULL;
}

static void tags_drop(wsf_index *index, wsf_record *record, wsf_trash *trash)
{
    wsf_tagset *set = record->tags.set;
    if (set == NULL)
        return;
    wsf_record *moved = bag_remove(&set->records, &index->account, record->tag_pos);
    if (moved != NULL)
        moved->tag_pos = record->tag_pos;
    record->tags.set = NULL;
    if (set->records.size == 0) {
        wsf_table_remove(&index->tagsets, &index->account, set->hash, set, tagset_hash);
        tagset_free(index, set, set->count, trash);
    }
}

/* What a record is to have for its tag set. */
typedef struct {
    const wsf_tag_names *tags; /* NULL: as it is */
    PyObject *device_type;     /* NULL: none */
    int keeps_device_type;     /* as it is */
} tagset_wish;

/* Find the tags that are wished for, or make them if `makes` is set; 0: not all are there. list has room. */
static int list_tags(wsf_index *index, const wsf_tagset *former, const tagset_wish *wish, int makes, tag_list *list,
                     wsf_trash *trash)
{
    wsf_tag *tag = tagset_device_type(former);
    uint32_t former_first = tag != NULL;
    if (!wish->keeps_device_type)
        tag = wish->device_type == NULL ? NULL
              : makes                   ? device_type_get(index, wish->device_type)
                                        : device_type_find(index, wish->device_type);
    if (tag != NULL)
        list->tags[list->count++] = tag;
    else if (!wish->keeps_device_type && wish->device_type != NULL)
        return 0;
    if (wish->tags == NULL) {
        for (uint32_t i = former_first; former != NULL && i < former->count; i++)
            list->tags[list->count++] = former->tags[i].tag; /* in order already */
        return 1;
    }
    uint32_t first = list->count;
    for (uint32_t i = 0; i < wish->tags->count; i++) {
        PyObject *key = wish->tags->keys[i], *value = wish->tags->values[i];
        tag = makes ? tag_get(index, key, value, trash) : tag_find(index, key, value);
        if (tag == NULL)
            return 0;
        list->tags[list->count++] = tag;
    }
    qsort(list->tags + first, list->count - first, sizeof *list->tags, by_address);
    return 1;
}

/* The tag set that is wished for, made if need be; *set stays NULL for no tags and no device type. list: empty. */
static int tagset_get(wsf_index *index, const wsf_tagset *former, const tagset_wish *wish, tag_list *list,
                      wsf_tagset **set, wsf_trash *trash)
{
    PyObject *mapping = wish->tags != NULL ? wish->tags->mapping : former != NULL ? former->mapping : NULL;
    /* Tags that are as they were have their mapping, and no tags need none. */
    int makes = mapping != NULL || wish->tags == NULL || wish->tags->count == 0;
    int outcome = makes ? WSF_NO_MEMORY : WSF_NEEDS_MAPPING;
    if (list_tags(index, former, wish, makes, list, trash)) {
        if (list->count == 0)
            return WSF_OK;
        *set = wsf_table_find(&index->tagsets, tag_list_hash(list), list, tagset_equals);
        if (*set == NULL && makes)
            *set = tagset_new(index, list, wish->tags != NULL && wish->tags->count == 0 ? NULL : mapping, trash);
        if (*set != NULL)
            return WSF_OK;
    }
    for (uint32_t i = 0; i < list->count; i++)
        tag_free_if_empty(index, list->tags[i], trash);
    return outcome;
}

static int change_tagset_locked(wsf_index *index, wsf_record *record, const tagset_wish *wish, tag_list *list,
                                wsf_trash *trash)
{
    wsf_tagset *set = NULL;
    int outcome = tagset_get(index, record->tags.set, wish, list, &set, trash);
    if (outcome != WSF_OK || set == record->tags.set)
        return outcome;
    if (set != NULL && bag_reserve(&set->records, &index->account) != WSF_OK)
        return WSF_NO_MEMORY; /* a set that is new has room: this one has other records */
    tags_drop(index, record, trash);
    if (set != NULL) {
        record->tags.set = set;
        record->tag_pos = bag_push(&set->records, record);
    }
    return WSF_OK;
}

static int change_tagset(wsf_index *index, wsf_record *record, const tagset_wish *wish, wsf_trash *trash)
{
    wsf_tag *few[16];
    tag_list list = {few, 0};
    int outcome = WSF_DETACHED;
    wsf_record_announce(record);
    WSF_LOCK(&index->lock);
    if (wsf_record_attached(record)) {
        const wsf_tagset *former = record->tags.set;
        size_t most = 1 + (size_t)(wish->tags != NULL ? wish->tags->count : former != NULL ? former->count : 0);
        if (most > sizeof few / sizeof *few)
            list.tags = PyMem_Malloc(most * sizeof *list.tags);
        outcome = list.tags == NULL ? WSF_NO_MEMORY : change_tagset_locked(index, record, wish, &list, trash);
    }
    WSF_UNLOCK(&index->lock);
    if (list.tags != few)
        PyMem_Free(list.tags);
    return outcome;
}

int wsf_index_set_tags(wsf_index *index, wsf_record *record, const wsf_tag_names *tags, wsf_trash *trash)
{
    const tagset_wish wish = {tags, NULL, 1};
    return change_tagset(index, record, &wish, trash);
}

int wsf_index_set_device_type(wsf_index *index, wsf_record *record, PyObject *device_type, wsf_trash *trash)
{
    const tagset_wish wish = {NULL, device_type, 0};
    return change_tagset(index, record, &wish, trash);
}

int wsf_index_set_tags_and_device_type(wsf_index *index, wsf_record *record, const wsf_tag_names *tags,
                                       PyObject *device_type, wsf_trash *trash)
{
    const tagset_wish wish = {tags, device_type, 0};
    return change_tagset(index, record, &wish, trash);
}

PyObject *wsf_index_device_type_of(wsf_index *index, wsf_record *record)
{
    WSF_LOCK(&index->lock);
    PyObject *device_type = record->device_type;
    if (record->tags.set != NULL && record->tag_pos != TAGS_ARE_MAPPING) {
        const wsf_tag *tag = tagset_device_type(record->tags.set);
        device_type = tag == NULL ? NULL : tag->value;
    }
    device_type = Py_XNewRef(device_type);
    WSF_UNLOCK(&index->lock);
    return device_type;
}

PyObject *wsf_index_tags_of(wsf_index *index, wsf_record *record)
{
    WSF_LOCK(&index->lock);
    PyObject *mapping = NULL;
    if (record->tags.set != NULL)
        mapping = Py_XNewRef(record->tag_pos == TAGS_ARE_MAPPING ? record->tags.mapping : record->tags.set->mapping);
    WSF_UNLOCK(&index->lock);
    return mapping;
}

/* ---- leaving ------------------------------------------------------------------------------------------------------------------- */

void wsf_index_forget(wsf_index *index, wsf_record *record, wsf_trash *trash)
{
    if (!wsf_record_announced(record))
        return;
    WSF_LOCK(&index->lock);
    WSF_ASSERT(!wsf_record_attached(record));
    if (record->user != NULL)
        user_drop(index, record, trash);
    if (record->tags.set != NULL) {
        PyObject *mapping = Py_XNewRef(record->tags.set->mapping);
        const wsf_tag *device_type = tagset_device_type(record->tags.set);
        record->device_type = device_type == NULL ? NULL : Py_NewRef(device_type->value);
        tags_drop(index, record, trash);
        record->tags.mapping = mapping;
        record->tag_pos = TAGS_ARE_MAPPING;
    }
    while (record->groups != NULL) {
        wsf_memberships *all = record->groups;
        uint32_t at = 0;
        if (all->capacity <= SMALL_MEMBERSHIPS) {
            at = all->used - 1;
        } else {
            /* Leave all at once, without shifting entries for each. */
            for (; at < all->capacity; at++) {
                if (all->entries[at].set == NULL)
                    continue;
                wsf_set *set = all->entries[at].set;
                wsf_record *moved = bag_remove(&set->records, &index->account, all->entries[at].position);
                if (moved != NULL)
                    membership_find(moved, set)->position = all->entries[at].position;
                if (set->records.size == 0) {
                    wsf_table_remove(&index->groups, &index->account, text_fold(set->name), set, name_hash);
                    set_free(set, &index->account, trash);
                }
            }
            wsf_free(&index->account, all, memberships_bytes(all->capacity));
            record->groups = NULL;
            break;
        }
        leave_locked(index, record, &all->entries[at], trash);
    }
    WSF_UNLOCK(&index->lock);
}

void wsf_index_release_tags(wsf_record *record)
{
    WSF_ASSERT(record->tags.set == NULL || record->tag_pos == TAGS_ARE_MAPPING);
    Py_XDECREF(record->tags.mapping);
    Py_XDECREF(record->device_type);
    record->tags.mapping = record->device_type = NULL;
}

/* ---- queries -------------------------------------------------------------------------------------------------------------------- */

/* How many candidates a walk is ahead of the one it tests when it asks for a record, and for what its test reads. */
#define FAR_AHEAD 16
#define NEAR_AHEAD 8
/* Candidates that are tested before references to those that match are taken: few enough that their heads, which were
 * asked for at the test, are still in the caches, and enough that they have arrived. */
#define CHUNK 32

/* A term whose name was found. */
typedef struct {
    int kind, negated;
    void *what; /* wsf_set; for a user it or the lone record; wsf_tag; wsf_tag_key */
} found_term;

/* A query whose names were found. First the terms that hold for all records of a tag set or for none, last the others. */
typedef struct {
    found_term few[8], *terms;
    uint32_t of_tagsets, first_of_records, count;
    found_term *smallest; /* of those that are not negated; NULL: there is none */
    uint64_t least;             /* its members */
} found_query;

static void *find_name(wsf_index *index, const wsf_term *term)
{
    PyObject *name = term->name;
    switch (term->kind) {
    case WSF_IN_GROUP: return wsf_table_find(&index->groups, text_fold(name), name, name_equals);
    case WSF_OF_USER: return wsf_table_find(&index->users, text_fold(name), name, name_equals);
    case WSF_HAS_TAG: return tag_find(index, name, term->value);
    case WSF_HAS_TAG_KEY: return wsf_table_find(&index->tag_keys, text_fold(name), name, tag_key_equals);
    default: return device_type_find(index, name);
    }
}

/* Find the names; 0: one that must be there is not, so nothing matches. What nobody has restricts nothing if negated. */
static int resolve(wsf_index *index, const wsf_term *terms, uint32_t count, found_query *query)
{
    query->of_tagsets = 0;
    query->first_of_records = query->count = count;
    for (uint32_t i = 0; i < count; i++) {
        found_term found = {terms[i].kind, terms[i].negated, find_name(index, &terms[i])};
        if (found.what == NULL) {
            if (!found.negated)
                return 0;
        } else if (found.kind == WSF_IN_GROUP || found.kind == WSF_OF_USER) {
            query->terms[--query->first_of_records] = found;
        } else {
            query->terms[query->of_tagsets++] = found;
        }
    }
    return 1;
}

/* Room for that many terms. WSF_OK or WSF_NO_MEMORY; then close_query. Not under the lock. */
static int open_query(found_query *query, uint32_t count)
{
    query->terms = query->few;
    if (count > sizeof query->few / sizeof *query->few)
        query->terms = PyMem_Malloc(count * sizeof *query->terms);
    return query->terms == NULL ? WSF_NO_MEMORY : WSF_OK;
}

static void close_query(found_query *query)
{
    if (query->terms != query->few)
        PyMem_Free(query->terms);
}

/* ---- tests */

static int tagset_has(const wsf_tagset *set, const found_term *term)
{
    for (uint32_t i = 0; set != NULL && i < set->count; i++)
        if (term->kind == WSF_HAS_TAG_KEY ? set->tags[i].tag->owner == term->what : set->tags[i].tag == term->what)
            return 1;
    return 0;
}

/* set: NULL for records without any. */
static int tagset_suits(const found_query *query, const wsf_tagset *set)
{
    for (uint32_t i = 0; i < query->of_tagsets; i++)
        if (tagset_has(set, &query->terms[i]) == query->terms[i].negated)
            return 0;
    return 1;
}

static int is_user(const wsf_record *record, const void *user)
{
    return record == user || (is_set(user) && record->user == ((const wsf_set *)user)->name);
}

static int record_suits(const found_query *query, const wsf_record *record)
{
    for (uint32_t i = query->first_of_records; i < query->count; i++) {
        const found_term *term = &query->terms[i];
        int holds = term->kind == WSF_OF_USER ? is_user(record, term->what)
                                              : membership_find(record, term->what) != NULL;
        if (holds == term->negated)
            return 0;
    }
    return 1;
}

/* is_tagset_tested: its tag set suits. */
static inline int suits(const found_query *query, const wsf_record *record, int is_tagset_tested)
{
    return wsf_record_attached(record) && (is_tagset_tested || tagset_suits(query, record->tags.set)) &&
           record_suits(query, record);
}

/* Ask for what a test will read behind the record, which must have arrived itself. A record that is not attached may
 * have something else there: it is asked for in vain. */
static inline void expect_test(const found_query *query, const wsf_record *record)
{
    if (query->of_tagsets != 0)
        WSF_PREFETCH((uintptr_t)record->tags.set + offsetof(wsf_tagset, tags));
    if (query->first_of_records != query->count)
        WSF_PREFETCH(record->groups);
}

/* ---- the smallest set */

/* Records under the tag; a count that reaches `enough` need not be exact, here and below. */
static uint64_t tag_size(const wsf_tag *tag, uint64_t enough)
{
    const wsf_bag *tagsets = &tag->tagsets;
    if (tagsets->size >= enough)
        return tagsets->size; /* none of them is empty */
    uint64_t size = 0;
    for (uint32_t i = 0; i < tagsets->size && size < enough; i++) {
        if (i + NEAR_AHEAD < tagsets->size)
            WSF_PREFETCH(tagsets->items[i + NEAR_AHEAD]);
        size += ((const wsf_tagset *)tagsets->items[i])->records.size;
    }
    return size;
}

/* Records for which the term holds. */
static uint64_t term_size(const found_term *term, uint64_t enough)
{
    if (term->kind == WSF_IN_GROUP || term->kind == WSF_OF_USER)
        return is_set(term->what) ? ((const wsf_set *)term->what)->records.size : 1;
    if (term->kind != WSF_HAS_TAG_KEY)
        return tag_size(term->what, enough);
    const wsf_tag_key *key = term->what;
    if (key->tags.size >= enough)
        return key->tags.size;
    uint64_t size = 0;
    for (uint32_t i = 0; i < key->tags.size && size < enough; i++)
        size += tag_size(key->tags.items[i], enough - size);
    return size;
}

/* Remember the smallest of these terms, if it is smaller than the one so far and than `bound`. Returns how many are not
 * negated. */
static uint32_t compare_sizes(found_query *query, uint32_t begin, uint32_t end, uint64_t bound)
{
    uint32_t compared = 0;
    for (uint32_t i = begin; i < end; i++) {
        if (query->terms[i].negated)
            continue;
        uint64_t enough = bound < query->least ? bound : query->least;
        uint64_t size = term_size(&query->terms[i], enough);
        if (size < enough) {
            query->smallest = &query->terms[i];
            query->least = size;
        }
        compared++;
    }
    return compared;
}

/* Counting the records of a tag takes a step for each of its tag sets, so all are counted up to a bound, which rises
 * until nothing below it is unknown: that takes no longer than to walk the smallest, or `most` records. */
static void find_smallest(found_query *query, uint64_t most)
{
    query->smallest = NULL;
    query->least = UINT64_MAX;
    (void)compare_sizes(query, query->first_of_records, query->count, UINT64_MAX);
    for (uint64_t bound = 64; compare_sizes(query, 0, query->of_tagsets, bound) != 0; bound *= 8)
        if (query->least <= bound || bound > most)
            return;
}

/* ---- walking it */

typedef struct {
    const found_query *query;
    PyObject **out;
    size_t used;
    int is_tagset_tested; /* all candidates are of a tag set that suits */
} selection;

static void test_chunk(selection *to, wsf_record *const *records, uint32_t begin, uint32_t end, uint32_t count)
{
    const found_query *query = to->query;
    int matches = 1;
    for (uint32_t i = begin; i < end; i++) {
        wsf_record *record = records[i];
        if (i + FAR_AHEAD < count) {
            WSF_PREFETCH(records[i + FAR_AHEAD]);
            if (matches) /* then others will probably too, and their heads be needed */
                wsf_record_prefetch(records[i + FAR_AHEAD]);
        }
        if (i + NEAR_AHEAD < count)
            expect_test(query, records[i + NEAR_AHEAD]);
        matches = suits(query, record, to->is_tagset_tested);
        if (matches) {
            wsf_record_prefetch(record);
            to->out[to->used++] = wsf_record_object(record);
        }
    }
}

static void select_from(selection *to, wsf_record *const *records, uint32_t count)
{
    for (uint32_t begin = 0; begin < count; begin += CHUNK) {
        size_t i = to->used;
        test_chunk(to, records, begin, count - begin < CHUNK ? count : begin + CHUNK, count);
        for (; i < to->used; i++)
            Py_INCREF(to->out[i]);
    }
}

/* Many tag sets have one record, and each is in memory of its own: ask for the set, its list and the record in time. */
static void expect_tagsets(const wsf_bag *tagsets, uint32_t at)
{
    if (at + 3 * NEAR_AHEAD < tagsets->size)
        WSF_PREFETCH(tagsets->items[at + 3 * NEAR_AHEAD]);
    if (at + 2 * NEAR_AHEAD < tagsets->size)
        WSF_PREFETCH(((const wsf_tagset *)tagsets->items[at + 2 * NEAR_AHEAD])->records.items);
    if (at + NEAR_AHEAD < tagsets->size)
        WSF_PREFETCH(((const wsf_tagset *)tagsets->items[at + NEAR_AHEAD])->records.items[0]);
}

static void select_from_tag(selection *to, const wsf_tag *tag)
{
    for (uint32_t i = 0; i < tag->tagsets.size; i++) {
        const wsf_tagset *set = tag->tagsets.items[i];
        expect_tagsets(&tag->tagsets, i);
        if (tagset_suits(to->query, set))
            select_from(to, (wsf_record *const *)set->records.items, set->records.size);
    }
}

/* Its members need not be tested for it. */
static found_term take_smallest(found_query *query)
{
    found_term walked = *query->smallest;
    if (walked.kind == WSF_IN_GROUP || walked.kind == WSF_OF_USER)
        *query->smallest = query->terms[query->first_of_records++];
    else
        *query->smallest = query->terms[--query->of_tagsets];
    return walked;
}

static void select_members(selection *to, const found_term *term)
{
    if (term->kind == WSF_HAS_TAG || term->kind == WSF_OF_DEVICE_TYPE) {
        to->is_tagset_tested = 1;
        select_from_tag(to, term->what);
    } else if (term->kind == WSF_HAS_TAG_KEY) {
        const wsf_tag_key *key = term->what;
        to->is_tagset_tested = 1;
        for (uint32_t i = 0; i < key->tags.size; i++)
            select_from_tag(to, key->tags.items[i]);
    } else if (is_set(term->what)) {
        const wsf_set *set = term->what;
        select_from(to, (wsf_record *const *)set->records.items, set->records.size);
    } else {
        wsf_record *lone = term->what;
        select_from(to, &lone, 1);
    }
}

static int64_t select_locked(wsf_index *index, const wsf_term *terms, uint32_t count, uint64_t most, found_query *query,
                             PyObject ***out)
{
    if (!resolve(index, terms, count, query))
        return 0;
    find_smallest(query, most);
    if (query->smallest == NULL || query->least > most)
        return WSF_TOO_MANY;
    *out = PyMem_Malloc(query->least * sizeof **out);
    if (*out == NULL)
        return WSF_NO_MEMORY;
    selection to = {query, *out, 0, 0};
    const found_term walked = take_smallest(query);
    select_members(&to, &walked);
    return (int64_t)to.used;
}

int64_t wsf_index_select(wsf_index *index, const wsf_term *terms, uint32_t count, uint64_t most, PyObject ***out)
{
    found_query query;
    *out = NULL;
    if (open_query(&query, count) != WSF_OK)
        return WSF_NO_MEMORY;
    WSF_LOCK(&index->lock);
    int64_t selected = select_locked(index, terms, count, most, &query, out);
    WSF_UNLOCK(&index->lock);
    close_query(&query);
    return selected;
}

static size_t keep_locked(const found_query *query, PyObject **objects, size_t n)
{
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        PyObject *object = objects[i];
        if (i + FAR_AHEAD < n)
            WSF_PREFETCH(wsf_object_record(objects[i + FAR_AHEAD]));
        if (i + NEAR_AHEAD < n)
            expect_test(query, wsf_object_record(objects[i + NEAR_AHEAD]));
        if (suits(query, wsf_object_record(object), 0)) {
            objects[i] = objects[kept];
            objects[kept++] = object;
        }
    }
    return kept;
}

int64_t wsf_index_keep(wsf_index *index, const wsf_term *terms, uint32_t count, PyObject **objects, size_t n)
{
    found_query query;
    if (open_query(&query, count) != WSF_OK)
        return WSF_NO_MEMORY;
    WSF_LOCK(&index->lock);
    size_t kept = resolve(index, terms, count, &query) ? keep_locked(&query, objects, n) : 0;
    WSF_UNLOCK(&index->lock);
    close_query(&query);
    return (int64_t)kept;
}

int64_t wsf_index_groups_of(wsf_index *index, wsf_record *record, PyObject ***names)
{
    int64_t count = 0;
    *names = NULL;
    WSF_LOCK(&index->lock);
    wsf_memberships *all = record->groups;
    if (all != NULL) {
        *names = PyMem_Malloc(all->used * sizeof **names);
        if (*names == NULL)
            count = WSF_NO_MEMORY;
        for (uint32_t i = 0; *names != NULL && i < all->capacity; i++)
            if (all->entries[i].set != NULL)
                (*names)[count++] = Py_NewRef(all->entries[i].set->name);
    }
    WSF_UNLOCK(&index->lock);
    return count;
}

int64_t wsf_index_groups(wsf_index *index, PyObject ***names, uint32_t **sizes)
{
    int64_t count = 0;
    WSF_LOCK(&index->lock);
    size_t used = index->groups.used;
    *names = PyMem_Malloc(used * sizeof **names);
    *sizes = PyMem_Malloc(used * sizeof **sizes);
    if (*names == NULL || *sizes == NULL) {
        count = WSF_NO_MEMORY;
    } else {
        for (uint32_t i = 0; i < index->groups.capacity; i++) {
            if (index->groups.entries[i] == 0)
                continue;
            const wsf_set *set = wsf_entry_item(index->groups.entries[i]);
            (*names)[count] = Py_NewRef(set->name);
            (*sizes)[count++] = set->records.size;
        }
    }
    WSF_UNLOCK(&index->lock);
    return count;
}

void wsf_index_sizes(wsf_index *index, uint32_t *groups, uint32_t *users, uint32_t *tags)
{
    WSF_LOCK(&index->lock);
    *groups = index->groups.used;
    *users = index->users.used;
    *tags = index->tags.used;
    WSF_UNLOCK(&index->lock);
}

void wsf_index_free(wsf_index *index)
{
    WSF_ASSERT(index->users.used == 0 && index->groups.used == 0 && index->tags.used == 0);
    WSF_ASSERT(index->tag_keys.used == 0 && index->device_types.used == 0 && index->tagsets.used == 0);
    wsf_table_free(&index->users, &index->account);
    wsf_table_free(&index->groups, &index->account);
    wsf_table_free(&index->tags, &index->account);
    wsf_table_free(&index->tag_keys, &index->account);
    wsf_table_free(&index->device_types, &index->account);
    wsf_table_free(&index->tagsets, &index->account);
    WSF_ASSERT(index->account == 0);
}

/* ---- debug build ------------------------------------------------------------------------------------------------------------- */

#ifdef WSF_DEBUG
static void check_set_of_records(const wsf_table *table, int may_be_lone)
{
    for (uint32_t i = 0; i < table->capacity; i++) {
        if (table->entries[i] == 0)
            continue;
        void *item = wsf_entry_item(table->entries[i]);
        WSF_ASSERT(wsf_table_find(table, name_hash(item), item_name(item), name_equals) == item);
        if (!is_set(item)) {
            WSF_ASSERT(may_be_lone && wsf_record_attached(item));
            continue;
        }
        const wsf_set *set = item;
        WSF_ASSERT(set->records.size > 0 && set->records.size <= set->records.capacity);
        for (uint32_t j = 0; j < set->records.size; j++) {
            const wsf_record *record = set->records.items[j];
            WSF_ASSERT(wsf_record_attached(record));
            if (may_be_lone)
                WSF_ASSERT(record->user == set->name && record->user_pos == j);
            else
                WSF_ASSERT(membership_find(record, set)->position == j);
        }
    }
}

static void check_tagset(const wsf_index *index, const wsf_tagset *set)
{
    uint32_t has_device_type = tagset_device_type(set) != NULL;
    WSF_ASSERT(set->records.size > 0 && set->count > 0);
    WSF_ASSERT((set->mapping != NULL) == (set->count > has_device_type));
    for (uint32_t j = 0; j < set->records.size; j++) {
        const wsf_record *record = set->records.items[j];
        WSF_ASSERT(record->tags.set == set && record->tag_pos == j && record->device_type == NULL);
    }
    for (uint32_t j = 0; j < set->count; j++) {
        const wsf_tag *tag = set->tags[j].tag;
        WSF_ASSERT(tag->tagsets.items[set->tags[j].position] == set);
        WSF_ASSERT(j <= has_device_type || (uintptr_t)set->tags[j - 1].tag < (uintptr_t)tag);
        if (j < has_device_type)
            WSF_ASSERT(tag->key == NULL && device_type_find(index, tag->value) == tag);
        else
            WSF_ASSERT(tag->owner->tags.items[tag->position] == tag && tag->key == tag->owner->key);
    }
}

static void check_no_empty_tags(const wsf_table *table)
{
    for (uint32_t i = 0; i < table->capacity; i++)
        if (table->entries[i] != 0)
            WSF_ASSERT(((const wsf_tag *)wsf_entry_item(table->entries[i]))->tagsets.size != 0);
}

void wsf_index_check(wsf_index *index)
{
    check_set_of_records(&index->users, 1);
    check_set_of_records(&index->groups, 0);
    check_no_empty_tags(&index->tags);
    check_no_empty_tags(&index->device_types);
    for (uint32_t i = 0; i < index->tagsets.capacity; i++)
        if (index->tagsets.entries[i] != 0)
            check_tagset(index, wsf_entry_item(index->tagsets.entries[i]));
}
#endif
