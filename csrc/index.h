/* Groups, users, tags and device types: which records carry which name.
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
 * device types
 *         A device type is a tag without a key, so it is part of the tag set and costs a connection nothing more, and
 *         one that has none nothing at all. It is in a table of its own: it is no pair, and no filter for tags finds it.
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
    wsf_tag_key *owner; /* NULL, as the key: a device type */
    uint32_t position;  /* in the owner */
    wsf_bag tagsets;
} wsf_tag;

typedef struct wsf_tagset {
    PyObject *mapping; /* owned dict of the tags, never changed; NULL: there are none, only a device type */
    uint32_t hash, count;
    wsf_bag records;
    struct {
        wsf_tag *tag;
        uint32_t position; /* in the tag */
    } tags[]; /* the device type first, if there is one; then ordered by address */
} wsf_tagset;

typedef struct {
    wsf_lock lock;
    wsf_table users, groups, tags, tag_keys, device_types, tagsets;
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

typedef struct {
    PyObject *const *keys, *const *values;
    uint32_t count;
    PyObject *mapping; /* dict of them, to which a new reference is taken where it is needed; or NULL */
} wsf_tag_names;

/* Give the record these tags; it keeps its device type. Without a mapping the answer may be WSF_NEEDS_MAPPING, and the
 * caller makes one and asks again. Or WSF_OK, WSF_NO_MEMORY, WSF_DETACHED. */
int wsf_index_set_tags(wsf_index *index, wsf_record *record, const wsf_tag_names *tags, wsf_trash *trash);
/* Give the record a device type, or none (NULL); it keeps its tags. WSF_OK, WSF_NO_MEMORY, WSF_DETACHED. */
int wsf_index_set_device_type(wsf_index *index, wsf_record *record, PyObject *device_type, wsf_trash *trash);
/* Both at once; outcomes as of wsf_index_set_tags. */
int wsf_index_set_tags_and_device_type(wsf_index *index, wsf_record *record, const wsf_tag_names *tags,
                                       PyObject *device_type, wsf_trash *trash);
/* Take a detached record out of everything; its user, a mapping of its tags and its device type stay readable. */
void wsf_index_forget(wsf_index *index, wsf_record *record, wsf_trash *trash);

/* Give up the mapping and the device type of a record that is about to be freed. */
void wsf_index_release_tags(wsf_record *record);

/* New reference or NULL. */
PyObject *wsf_index_user_of(wsf_index *index, wsf_record *record);
PyObject *wsf_index_tags_of(wsf_index *index, wsf_record *record);
PyObject *wsf_index_device_type_of(wsf_index *index, wsf_record *record);

/* ---- queries -------------------------------------------------------------------------------------------------- */

/* Something that holds for a record or, if it is negated, does not. */
enum { WSF_IN_GROUP, WSF_OF_USER, WSF_HAS_TAG, WSF_HAS_TAG_KEY, WSF_OF_DEVICE_TYPE };
typedef struct {
    int kind;
    int negated;
    PyObject *name, *value; /* value: of a tag only, whose key is `name` */
} wsf_term;

/* All attached records for which every term holds: new references in malloc'd memory that the caller frees with
 * PyMem_Free. The smallest of the sets that the terms which are not negated name is walked, and the other terms are tested.
 * If it has more than `most` members, or there is no such set, the answer is WSF_TOO_MANY, which takes no longer than to
 * find `most` members. Or WSF_NO_MEMORY. */
int64_t wsf_index_select(wsf_index *index, const wsf_term *terms, uint32_t count, uint64_t most, PyObject ***out);
/* Move those of n objects of records, to which the caller has references, that are attached and for which every term
 * holds to the front, in their order; the others come behind in no order. Returns how many, or WSF_NO_MEMORY, which
 * changes nothing. */
int64_t wsf_index_keep(wsf_index *index, const wsf_term *terms, uint32_t count, PyObject **objects, size_t n);
/* As wsf_index_select for the names of the groups of a record, and for all groups with their sizes. -1: no memory. */
int64_t wsf_index_groups_of(wsf_index *index, wsf_record *record, PyObject ***names);
int64_t wsf_index_groups(wsf_index *index, PyObject ***names, uint32_t **sizes);

void wsf_index_sizes(wsf_index *index, uint32_t *groups, uint32_t *users, uint32_t *tags);
void wsf_index_free(wsf_index *index);
#ifdef WSF_DEBUG
void wsf_index_check(wsf_index *index);
#endif

#endif
