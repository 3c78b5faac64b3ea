/* Groups, users and tags; see index.h. */
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

/* The word may be the slot of a record, which another thread changes under its shard's lock. */
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

static void tag_free_if_empty(wsf_index *index, wsf_tag *tag, wsf_trash *trash)
{
    if (tag->tagsets.size != 0)
        return;
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

/* A new tag set of these tags, in the index; NULL: no memory. mapping: a reference is taken. */
static wsf_tagset *tagset_new(wsf_index *index, const tag_list *list, PyObject *mapping, wsf_trash *trash)
{
    wsf_tagset *set = wsf_alloc(&index->account, tagset_bytes(list->count));
    if (set == NULL)
        return NULL;
    memset(set, 0, tagset_bytes(list->count));
    WSF_COUNT_LIVE(WSF_LIVE_TAGSET, 1);
    set->count = list->count;
    set->hash = tag_list_hash(list);
    set->mapping = Py_NewRef(mapping);
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

/* The tag set of these names, made if there is a mapping for it. *set stays NULL where one would be needed. */
static int tagset_get(wsf_index *index, PyObject *const *keys, PyObject *const *values, tag_list *list,
                      PyObject *mapping, wsf_tagset **set, wsf_trash *trash)
{
    uint32_t wanted = list->count, found = 0;
    for (uint32_t i = 0; i < wanted; i++) {
        wsf_tag *tag = mapping == NULL ? tag_find(index, keys[i], values[i]) : tag_get(index, keys[i], values[i], trash);
        if (tag != NULL)
            list->tags[found++] = tag;
        else
            break;
    }
    int outcome = WSF_OK;
    if (found == wanted) {
        qsort(list->tags, wanted, sizeof *list->tags, by_address);
        *set = wsf_table_find(&index->tagsets, tag_list_hash(list), list, tagset_equals);
        if (*set == NULL && mapping != NULL)
            *set = tagset_new(index, list, mapping, trash);
    }
    if (*set == NULL) {
        outcome = mapping == NULL ? WSF_NEEDS_MAPPING : WSF_NO_MEMORY;
        for (uint32_t i = 0; mapping != NULL && i < found; i++)
            tag_free_if_empty(index, list->tags[i], trash);
    }
    return outcome;
}

static int set_tags_locked(wsf_index *index, wsf_record *record, PyObject *const *keys, PyObject *const *values,
                           tag_list *list, PyObject *mapping, wsf_trash *trash)
{
    wsf_tagset *set = NULL;
    if (!wsf_record_attached(record))
        return WSF_DETACHED;
    if (list->count != 0) {
        int outcome = tagset_get(index, keys, values, list, mapping, &set, trash);
        if (outcome != WSF_OK)
            return outcome;
        if (set == record->tags.set)
            return WSF_OK;
        if (bag_reserve(&set->records, &index->account) != WSF_OK)
            return WSF_NO_MEMORY; /* a set that is new has room: this one has other records */
    }
    tags_drop(index, record, trash);
    if (set != NULL) {
        record->tags.set = set;
        record->tag_pos = bag_push(&set->records, record);
    }
    return WSF_OK;
}

int wsf_index_set_tags(wsf_index *index, wsf_record *record, PyObject *const *keys, PyObject *const *values,
                       uint32_t count, PyObject *mapping, wsf_trash *trash)
{
    wsf_tag *few[16];
    tag_list list = {few, count};
    if (count > sizeof few / sizeof *few && (list.tags = PyMem_Malloc(count * sizeof *list.tags)) == NULL)
        return WSF_NO_MEMORY;
    wsf_record_announce(record);
    WSF_LOCK(&index->lock);
    int outcome = set_tags_locked(index, record, keys, values, &list, mapping, trash);
    WSF_UNLOCK(&index->lock);
    if (list.tags != few)
        PyMem_Free(list.tags);
    return outcome;
}

PyObject *wsf_index_tags_of(wsf_index *index, wsf_record *record)
{
    WSF_LOCK(&index->lock);
    PyObject *mapping = NULL;
    if (record->tags.set != NULL)
        mapping = Py_NewRef(record->tag_pos == TAGS_ARE_MAPPING ? record->tags.mapping : record->tags.set->mapping);
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
        PyObject *mapping = Py_NewRef(record->tags.set->mapping);
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
    record->tags.mapping = NULL;
}

/* ---- queries -------------------------------------------------------------------------------------------------------------------- */

/* What a query names, found; a NULL that was asked for means that nothing matches. */
typedef struct {
    wsf_set *group;
    void *user; /* set or lone record */
    wsf_tag *tag;
    wsf_tag_key *tag_key;
} resolved_query;

static int resolve(wsf_index *index, const wsf_query *query, resolved_query *found)
{
    memset(found, 0, sizeof *found);
    if (query->group != NULL) {
        found->group = wsf_table_find(&index->groups, text_fold(query->group), query->group, name_equals);
        if (found->group == NULL)
            return 0;
    }
    if (query->user != NULL) {
        found->user = wsf_table_find(&index->users, text_fold(query->user), query->user, name_equals);
        if (found->user == NULL)
            return 0;
    }
    if (query->tag_key != NULL && query->tag_value != NULL) {
        found->tag = tag_find(index, query->tag_key, query->tag_value);
        return found->tag != NULL;
    }
    if (query->tag_key != NULL) {
        found->tag_key =
            wsf_table_find(&index->tag_keys, text_fold(query->tag_key), query->tag_key, tag_key_equals);
        return found->tag_key != NULL;
    }
    return 1;
}

static int has_tag(const wsf_tagset *set, const resolved_query *found)
{
    if (set == NULL)
        return 0;
    for (uint32_t i = 0; i < set->count; i++)
        if (found->tag != NULL ? set->tags[i].tag == found->tag : set->tags[i].tag->owner == found->tag_key)
            return 1;
    return 0;
}

static int is_user(const wsf_record *record, const void *user)
{
    return record == user || (is_set(user) && record->user == ((const wsf_set *)user)->name);
}

static int matches(const wsf_record *record, const resolved_query *found)
{
    return wsf_record_attached(record) && (found->group == NULL || membership_find(record, found->group) != NULL) &&
           (found->user == NULL || is_user(record, found->user)) &&
           ((found->tag == NULL && found->tag_key == NULL) || has_tag(record->tags.set, found));
}

static uint64_t tag_size(const wsf_tag *tag, uint64_t enough)
{
    uint64_t size = 0;
    for (uint32_t i = 0; i < tag->tagsets.size && size < enough; i++)
        size += ((wsf_tagset *)tag->tagsets.items[i])->records.size;
    return size;
}

/* Records under the tag or the tag key; a count that reaches `enough` need not be exact. */
static uint64_t tags_size(const resolved_query *found, uint64_t enough)
{
    if (found->tag != NULL)
        return tag_size(found->tag, enough);
    uint64_t size = 0;
    for (uint32_t i = 0; i < found->tag_key->tags.size && size < enough; i++)
        size += tag_size(found->tag_key->tags.items[i], enough - size);
    return size;
}

typedef struct {
    const resolved_query *found;
    PyObject **out;
    size_t used;
} selection;

static void select_from(selection *to, wsf_record *const *records, uint32_t count)
{
    const uint32_t ahead = 8; /* enough loads under way to hide most of a cache miss */
    for (uint32_t i = 0; i < count; i++) {
        if (i + ahead < count)
            WSF_PREFETCH(wsf_record_object(records[i + ahead]));
        if (matches(records[i], to->found))
            to->out[to->used++] = Py_NewRef(wsf_record_object(records[i]));
    }
}

static void select_from_tag(selection *to, const wsf_tag *tag)
{
    for (uint32_t i = 0; i < tag->tagsets.size; i++) {
        const wsf_tagset *set = tag->tagsets.items[i];
        select_from(to, (wsf_record *const *)set->records.items, set->records.size);
    }
}

static int64_t select_locked(wsf_index *index, const wsf_query *query, PyObject ***out)
{
    resolved_query found;
    if (!resolve(index, query, &found))
        return 0;
    uint64_t by_group = found.group == NULL ? UINT64_MAX : found.group->records.size;
    uint64_t by_user = found.user == NULL ? UINT64_MAX : is_set(found.user) ? ((wsf_set *)found.user)->records.size : 1;
    uint64_t least = by_group < by_user ? by_group : by_user;
    uint64_t by_tag = query->tag_key == NULL ? UINT64_MAX : tags_size(&found, least);
    if (by_tag < least)
        least = by_tag;
    *out = PyMem_Malloc(least * sizeof **out);
    if (*out == NULL)
        return WSF_NO_MEMORY;
    selection to = {&found, *out, 0};
    if (least == by_tag) {
        for (uint32_t i = 0; found.tag == NULL && i < found.tag_key->tags.size; i++)
            select_from_tag(&to, found.tag_key->tags.items[i]);
        if (found.tag != NULL)
            select_from_tag(&to, found.tag);
    } else if (least == by_user) {
        wsf_record *lone = found.user;
        if (is_set(found.user))
            select_from(&to, (wsf_record *const *)((wsf_set *)found.user)->records.items, (uint32_t)by_user);
        else
            select_from(&to, &lone, 1);
    } else {
        select_from(&to, (wsf_record *const *)found.group->records.items, found.group->records.size);
    }
    return (int64_t)to.used;
}

int64_t wsf_index_select(wsf_index *index, const wsf_query *query, PyObject ***out)
{
    *out = NULL;
    WSF_LOCK(&index->lock);
    int64_t count = select_locked(index, query, out);
    WSF_UNLOCK(&index->lock);
    return count;
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
    WSF_ASSERT(index->tag_keys.used == 0 && index->tagsets.used == 0);
    wsf_table_free(&index->users, &index->account);
    wsf_table_free(&index->groups, &index->account);
    wsf_table_free(&index->tags, &index->account);
    wsf_table_free(&index->tag_keys, &index->account);
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

void wsf_index_check(wsf_index *index)
{
    check_set_of_records(&index->users, 1);
    check_set_of_records(&index->groups, 0);
    for (uint32_t i = 0; i < index->tagsets.capacity; i++) {
        if (index->tagsets.entries[i] == 0)
            continue;
        const wsf_tagset *set = wsf_entry_item(index->tagsets.entries[i]);
        WSF_ASSERT(set->records.size > 0);
        for (uint32_t j = 0; j < set->records.size; j++) {
            const wsf_record *record = set->records.items[j];
            WSF_ASSERT(record->tags.set == set && record->tag_pos == j);
        }
        for (uint32_t j = 0; j < set->count; j++) {
            const wsf_tag *tag = set->tags[j].tag;
            WSF_ASSERT(tag->tagsets.items[set->tags[j].position] == set);
            WSF_ASSERT(tag->owner->tags.items[tag->position] == tag);
        }
    }
}
#endif
