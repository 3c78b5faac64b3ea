/* Groups, users and tags: which records carry which name.
 *
 * A set is a dense array of records, and each record knows its position in each of its sets, so joining and leaving are
 * O(1) (the last member moves into the gap) and walking a set is a walk over an array. Names are stored once: the first
 * str that named a set is the one that all its members share.
 *
 * users   name -> the record itself while the user has one connection, else a set. A million users with one connection
 *         each would otherwise pay for a million sets.
 * groups  name -> set. A record lists its groups in a small table of (set, position).
 * tags    Records with equal tags share one tag set, so a connection pays for one membership however many tags it has.
 *         Each tag set lists its (key, value) pairs, each pair lists the tag sets that have it, each key its pairs.
 *
 * The index holds no reference to a record: whoever detaches a record takes it out here before giving up the reference.
 * One lock guards all of it. A record is put in only while it is attached, which is tested under that lock: detaching
 * comes first and forgetting second, so either the test fails or the record is forgotten again.
 */
#ifndef WSF_INDEX_H
#define WSF_INDEX_H

#include "record.h"
#include "table.h"

/* A dense array of pointers that grows by doubling at first and by an eighth when it is large. */
typedef struct {
    void **items;
    uint32_t size, capacity;
} wsf_bag;

typedef struct wsf_set {
    uint32_t mark; /* WSF_SET_MARK */
    PyObject *name;
    wsf_bag records;
} wsf_set;

/* The groups of a record: a plain array up to SMALL entries, an open-addressing table keyed by set beyond. */
typedef struct {
    wsf_set *set;
    uint32_t position; /* of the record in the set */
} wsf_membership;

typedef struct wsf_memberships {
    uint32_t used, capacity;
    wsf_membership entries[];
} wsf_memberships;

typedef struct wsf_tag_key {
    PyObject *key;
    wsf_bag tags;
} wsf_tag_key;

typedef struct wsf_tag {
    PyObject *key, *value;
    wsf_tag_key *owner;
    uint32_t position; /* in the owner */
    wsf_bag tagsets;
} wsf_tag;

typedef struct wsf_tagset {
    PyObject *mapping; /* owned dict of the tags, never changed */
    uint32_t hash, count;
    wsf_bag records;
    struct {
        wsf_tag *tag;
        uint32_t position; /* in the tag */
    } tags[]; /* ordered by address */
} wsf_tagset;

typedef struct {
    wsf_lock lock;
    wsf_table users, groups, tags, tag_keys, tagsets;
    int64_t account; /* bytes */
} wsf_index;

enum { WSF_DETACHED = -3, WSF_TOO_MANY = -4, WSF_NEEDS_MAPPING = -5 };

/* Names passed in: borrowed, exact str, hash computed. `trash` takes references that were given up. */

/* 1: joined; 0: was a member; or WSF_NO_MEMORY, WSF_DETACHED, WSF_TOO_MANY. */
int wsf_index_join(wsf_index *index, wsf_record *record, PyObject *group, uint32_t max_groups);
/* 1: left; 0: was no member; or WSF_DETACHED. */
int wsf_index_leave(wsf_index *index, wsf_record *record, PyObject *group, wsf_trash *trash);
/* Give the record a user, or none (NULL). WSF_OK, WSF_NO_MEMORY, WSF_DETACHED. */
int wsf_index_set_user(wsf_index *index, wsf_record *record, PyObject *user, wsf_trash *trash);
/* Give the record these tags. mapping: dict of them, a new reference is taken where it is needed, or NULL: then the
 * answer may be WSF_NEEDS_MAPPING, and the caller makes one and asks again. Or WSF_OK, WSF_NO_MEMORY, WSF_DETACHED. */
int wsf_index_set_tags(wsf_index *index, wsf_record *record, PyObject *const *keys, PyObject *const *values,
                       uint32_t count, PyObject *mapping, wsf_trash *trash);
/* Take a detached record out of everything; its user and a mapping of its tags stay readable. */
void wsf_index_forget(wsf_index *index, wsf_record *record, wsf_trash *trash);

/* Give up the mapping of a record that is about to be freed. */
void wsf_index_release_tags(wsf_record *record);

/* New reference or NULL. */
PyObject *wsf_index_user_of(wsf_index *index, wsf_record *record);
PyObject *wsf_index_tags_of(wsf_index *index, wsf_record *record);

/* ---- queries -------------------------------------------------------------------------------------------------- */

/* Members of all the sets that are asked for; NULL: not asked for. tag_value NULL: any value of tag_key. */
typedef struct {
    PyObject *group, *user, *tag_key, *tag_value;
} wsf_query;

/* New references in malloc'd memory that the caller frees with PyMem_Free; walks the smallest set asked for.
 * -1: no memory. */
int64_t wsf_index_select(wsf_index *index, const wsf_query *query, PyObject ***out);
/* The same for the names of the groups of a record, and for all groups with their sizes. -1: no memory. */
int64_t wsf_index_groups_of(wsf_index *index, wsf_record *record, PyObject ***names);
int64_t wsf_index_groups(wsf_index *index, PyObject ***names, uint32_t **sizes);

void wsf_index_sizes(wsf_index *index, uint32_t *groups, uint32_t *users, uint32_t *tags);
void wsf_index_free(wsf_index *index);
#ifdef WSF_DEBUG
void wsf_index_check(wsf_index *index);
#endif

#endif
