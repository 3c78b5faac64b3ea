/* The structures of csrc/ without an interpreter, for the sanitizers: core_test [MULTIPLIER] [PART] [SEED].
 *
 * Parts: fnv, table, random (sequences of operations against a model, with allocations that fail), users (more of them
 * than a table knows by their tags) and threads (only where locks are real). MULTIPLIER: how many times as long as by
 * default.
 *
 * The model of a connection lies in its object, behind the record. After a call that fails for want of memory the core
 * must be exactly as the model was before it. A broken invariant ends a part, and names the seed that shows it again.
 */
#define WSF_SHIM_IMPLEMENTATION
#include "core.h"
#include "harness.h"

/* ---- names -------------------------------------------------------------------------------------------------------- */

/* Equal texts as two objects, so that comparing objects is not enough. */
typedef struct {
    PyObject **one, **twin;
    uint32_t size;
} names;

/* Engineered collisions only among the first: finding one of n equal hashes passes n entries. */
#define MOST_COLLIDING 256

static PyObject *make_name(uint32_t kind, uint32_t number)
{
    static const uint32_t first[] = {0, 0, SHIM_EQUAL_HASH, SHIM_EQUAL_FOLD, 0xE9, 0x5B57, 0x1F600, 0x3B1};
    uint32_t characters[16], length = 0, flavour = first[number % 8];
    if ((flavour == SHIM_EQUAL_HASH || flavour == SHIM_EQUAL_FOLD) && number >= MOST_COLLIDING)
        flavour = 0;
    if (flavour != 0)
        characters[length++] = flavour;
    characters[length++] = kind;
    for (uint32_t rest = number; length < 15; rest /= 10) {
        characters[length++] = '0' + rest % 10;
        if (rest < 10)
            break;
    }
    PyObject *name = shim_text_new(characters, (Py_ssize_t)length, (int32_t)number);
    (void)PyObject_Hash(name);
    return name;
}

static names make_names(uint32_t kind, uint32_t size)
{
    names made = {must_alloc(size, sizeof(PyObject *)), must_alloc(size, sizeof(PyObject *)), size};
    for (uint32_t i = 0; i < size; i++) {
        made.one[i] = make_name(kind, i);
        made.twin[i] = make_name(kind, i);
    }
    return made;
}

static PyObject *either(chance *random, const names *from, uint32_t number)
{
    return one_in(random, 2) ? from->one[number] : from->twin[number];
}

static uint32_t number_of(const PyObject *name) { return (uint32_t)shim_as_text(name)->number; }

/* Nothing else may refer to a name any longer. */
static void free_names(names *gone)
{
    for (uint32_t i = 0; i < gone->size; i++) {
        CHECK(shim_references(gone->one[i]) == 1 && shim_references(gone->twin[i]) == 1);
        Py_DECREF(gone->one[i]);
        Py_DECREF(gone->twin[i]);
    }
    free(gone->one);
    free(gone->twin);
}

/* ---- objects ------------------------------------------------------------------------------------------------------ */

static void free_object(PyObject *object) { free(object); }

/* What a program may keep in a field: freeing it could run any code. */
static const shim_type thing_type = {"thing", 0, free_object};

static PyObject *make_thing(void)
{
    PyObject *thing = must_alloc(1, sizeof *thing);
    shim_object_init(thing, &thing_type);
    return thing;
}

enum { TAG_KEYS = 20, TAG_VALUES = 4, NO_TAG = -1 };

typedef struct {
    int8_t value[TAG_KEYS]; /* NO_TAG: the key is not there */
} tag_choice;

/* A dict of tags. It holds str objects only, so freeing it runs no code. */
typedef struct {
    PyObject head;
    tag_choice tags;
} mapping;

static const shim_type mapping_type = {"mapping", 1, free_object};

static PyObject *make_mapping(const tag_choice *tags)
{
    mapping *made = must_alloc(1, sizeof *made);
    shim_object_init(&made->head, &mapping_type);
    made->tags = *tags;
    return &made->head;
}

static bool has_no_tags(const tag_choice *tags)
{
    for (int key = 0; key < TAG_KEYS; key++)
        if (tags->value[key] != NO_TAG)
            return false;
    return true;
}

enum { MOST_GROUPS = 4096, NOBODY = -1, DEVICE_TYPES = 5 };

typedef struct connection {
    PyObject head;
    wsf_record r;
    /* The model, which only tests with one thread use. */
    int32_t id, user, device_type; /* NOBODY: none */
    bool attached, in_index; /* the latter is false once it was forgotten */
    tag_choice tags;
    uint64_t groups[MOST_GROUPS / 64];
    uint32_t group_count;
    int status;
    int64_t deadline_ns, active_ns, heartbeat_ns;
    uint64_t messages_in, messages_out, bytes_in, bytes_out, errors_in, errors_out;
    float latency;
    PyObject *conn, *objects[WSF_OBJECT_FIELDS]; /* borrowed from the record */
    uint32_t seen;
    bool resident; /* attached, with one status, since a walk began */
} connection;

_Static_assert(offsetof(connection, r) == sizeof(PyObject), "a record lies right behind the head of its object");

/* As ConnectionMeta.__dealloc__. */
static void free_connection(PyObject *object)
{
    connection *gone = (connection *)object;
    SHIM_REQUIRE(!wsf_record_attached(&gone->r) && gone->r.groups == NULL);
    for (int field = 0; field < WSF_OBJECT_FIELDS; field++)
        Py_XDECREF(gone->r.objects[field]);
    Py_XDECREF(gone->r.user);
    Py_XDECREF(gone->r.client_id);
    wsf_index_release_tags(&gone->r);
    wsf_shard_release(gone->r.shard);
    WSF_COUNT_LIVE(WSF_LIVE_RECORD, -1);
    free(gone);
}

static const shim_type connection_type = {"connection", 0, free_connection};

static connection *make_connection(wsf_core *core, PyObject *client_id, int64_t now_ns)
{
    connection *made = must_alloc(1, sizeof *made);
    uint32_t fnv1a;
    int64_t utf8_bytes;
    shim_object_init(&made->head, &connection_type);
    made->r.place = WSF_NO_PLACE;
    SHIM_REQUIRE(wsf_text_fnv1a(client_id, &fnv1a, &utf8_bytes) == 0);
    made->r.client_id = Py_NewRef(client_id);
    made->r.shard = &core->shards[wsf_route(fnv1a, core->shard_count - 1)];
    made->r.created_ns = now_ns;
    wsf_shard_retain(made->r.shard);
    WSF_COUNT_LIVE(WSF_LIVE_RECORD, 1);
    return made;
}

static connection *as_connection(PyObject *object)
{
    CHECK(object->type == &connection_type);
    return (connection *)object;
}

static connection *of_record(wsf_record *record) { return as_connection(wsf_record_object(record)); }

/* The caller's arrays of the keys and values of a choice of tags; returns how many. */
static uint32_t spell_tags(chance *random, const names *keys, const names *values, const tag_choice *tags,
                           PyObject **spelt_keys, PyObject **spelt_values)
{
    uint32_t count = 0, start = below(random, TAG_KEYS);
    for (uint32_t i = 0; i < TAG_KEYS; i++) {
        uint32_t key = (start + i) % TAG_KEYS; /* any order, as in a dict */
        if (tags->value[key] == NO_TAG)
            continue;
        spelt_keys[count] = either(random, keys, key);
        spelt_values[count++] = either(random, values, (uint32_t)tags->value[key]);
    }
    return count;
}

static tag_choice choose_tags(chance *random)
{
    tag_choice tags;
    /* Mostly few; sometimes more than fit on the stack of wsf_index_set_tags. */
    uint32_t wanted = one_in(random, 8) ? 17 + below(random, 4) : below(random, 4);
    memset(&tags, NO_TAG, sizeof tags);
    for (uint32_t i = 0; i < wanted; i++) {
        uint32_t key = wanted > 16 ? i : below(random, 5);
        tags.value[key] = (int8_t)below(random, wanted > 16 ? 2 : TAG_VALUES);
    }
    return tags;
}

/* ---- FNV ------------------------------------------------------------------------------------------------------------ */

static void check_fnv_of_text(const uint32_t *characters, Py_ssize_t length, const char *utf8)
{
    uint32_t fnv1a;
    int64_t bytes;
    PyObject *text = shim_text_new(characters, length, 0);
    CHECK(wsf_text_fnv1a(text, &fnv1a, &bytes) == 0);
    CHECK(bytes == (int64_t)strlen(utf8) && fnv1a == wsf_fnv1a_32((const uint8_t *)utf8, strlen(utf8)));
    Py_DECREF(text);
}

static void test_fnv(uint64_t seed)
{
    /* From test_fnv.c of the reference code by Landon Curt Noll (github.com/lcn2/fnv). */
    static const struct {
        const char *input;
        uint32_t fnv1, fnv1a;
    } vectors[] = {
        {"", 0x811C9DC5, 0x811C9DC5},       {"a", 0x050C5D7E, 0xE40C292C},      {"b", 0x050C5D7D, 0xE70C2DE5},
        {"foo", 0x408F5E13, 0xA9F37ED7},    {"foobar", 0x31F0B262, 0xBF9CF968}, {"hello", 0xB6FA7167, 0x4F9F2CAB},
        {"chongo was here!\n", 0xDD002F35, 0xD49930D5},
    };
    (void)seed;
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        const uint8_t *input = (const uint8_t *)vectors[i].input;
        size_t size = strlen(vectors[i].input);
        uint32_t wide[32];
        CHECK(wsf_fnv1_32(input, size) == vectors[i].fnv1);
        CHECK(wsf_fnv1a_32(input, size) == vectors[i].fnv1a);
        for (size_t at = 0; at < size; at++)
            wide[at] = input[at];
        check_fnv_of_text(wide, (Py_ssize_t)size, vectors[i].input);
    }
    /* The edges of each length in UTF-8, in each way a str is stored. */
    check_fnv_of_text((const uint32_t[]){0x7F, 0x80, 0xFF}, 3, "\x7F\xC2\x80\xC3\xBF");
    check_fnv_of_text((const uint32_t[]){'a', 0x7FF, 0x800, 0xFFFF}, 4, "a\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF");
    check_fnv_of_text((const uint32_t[]){0xD7FF, 0xE000, 0x10000, 0x10FFFF}, 4,
                      "\xED\x9F\xBF\xEE\x80\x80\xF0\x90\x80\x80\xF4\x8F\xBF\xBF");
    for (uint32_t surrogate = 0xD800; surrogate <= 0xDFFF; surrogate += 0x7FF) {
        uint32_t fnv1a;
        int64_t bytes;
        PyObject *text = shim_text_new((const uint32_t[]){'a', surrogate}, 2, 0);
        CHECK(wsf_text_fnv1a(text, &fnv1a, &bytes) == -1);
        Py_DECREF(text);
    }
    CHECK(wsf_route(0xE40C292C, 0xFFFF) == 0xCD20 && wsf_route(0xE40C292C, 0) == 0);
    check_nothing_lives();
}

/* ---- table ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    _Alignas(16) uint32_t hash;
    uint32_t key;
    bool present;
} item;

static int item_equals(const void *each, const void *key) { return ((const item *)each)->key == *(const uint32_t *)key; }

static uint32_t item_hash(const void *each) { return ((const item *)each)->hash; }

typedef struct {
    chance random;
    wsf_table table;
    int64_t account;
    item *items;
    uint32_t count, present;
} table_model;

/* Entries that finding the item passes, found out the slow way. */
static uint32_t probe_of(const wsf_table *table, const item *wanted)
{
    uint32_t at = wsf_table_home(table->capacity, wanted->hash), passed = 1;
    for (; wsf_entry_item(table->entries[at]) != wanted; passed++)
        at = (at + 1) % table->capacity;
    return passed;
}

static void check_table(table_model *model)
{
    const wsf_table *table = &model->table;
    uint32_t longest = 0;
    CHECK(table->used == model->present);
    CHECK(model->account == (int64_t)(table->capacity * sizeof *table->entries));
    CHECK((uint64_t)table->used * 5 <= (uint64_t)table->capacity * 4);
    for (uint32_t i = 0; i < model->count; i++) {
        item *each = &model->items[i];
        CHECK(wsf_table_find(table, each->hash, &each->key, item_equals) == (each->present ? each : NULL));
        uint32_t passed = each->present ? probe_of(table, each) : 0;
        longest = passed > longest ? passed : longest;
    }
    CHECK(wsf_table_longest_probe(table, item_hash) == longest);
}

static void table_insert(table_model *model, item *each)
{
    wsf_table before = model->table;
    bool faulty = one_in(&model->random, 4);
    inject_fault(faulty, false);
    int outcome = wsf_table_insert(&model->table, &model->account, each->hash, each, item_hash);
    if (end_faults()) {
        CHECK(outcome == WSF_NO_MEMORY && memcmp(&before, &model->table, sizeof before) == 0);
        outcome = wsf_table_insert(&model->table, &model->account, each->hash, each, item_hash);
    }
    CHECK(outcome == WSF_OK);
    each->present = true;
    model->present++;
}

static void table_remove(table_model *model, item *each)
{
    inject_fault(one_in(&model->random, 4), false);
    wsf_table_remove(&model->table, &model->account, each->hash, each, item_hash);
    bool could_shrink = !end_faults();
    each->present = false;
    model->present--;
    const wsf_table *table = &model->table;
    CHECK(!could_shrink || table->capacity <= 8 || (uint64_t)table->used * 10 >= (uint64_t)table->capacity * 3);
}

/* Another item with the same hash takes the place of this one, and back. */
static void table_swap(table_model *model, item *each)
{
    item other = {each->hash, each->key, true};
    wsf_table_swap(&model->table, each->hash, each, &other);
    CHECK(wsf_table_find(&model->table, each->hash, &each->key, item_equals) == &other);
    wsf_table_swap(&model->table, each->hash, &other, each);
}

static uint32_t adversarial_hash(chance *random, int kind)
{
    switch (kind) {
    case 0: return (uint32_t)draw(random);
    case 1: return 0xDEADBEEF;                                       /* all equal */
    case 2: return 0xABCDE000 | (uint32_t)(draw(random) & 0xFFF);    /* equal tags */
    case 3: return 0xFFFFF000 + below(random, 0x1000);               /* all at the end: probes wrap around */
    default: return below(random, 64) << 26;
    }
}

static void run_table(uint64_t seed, int kind, uint32_t count, uint32_t rounds)
{
    table_model model = {.random = {seed}, .items = must_alloc(count, sizeof(item)), .count = count};
    current_seed = seed;
    for (uint32_t i = 0; i < count; i++)
        model.items[i] = (item){adversarial_hash(&model.random, kind), i, false};
    for (uint32_t round = 0; round < rounds; round++) {
        /* Mostly inserting, then mostly removing, so that each capacity is passed in both directions. */
        uint32_t inserts_of_8 = round % 2 == 0 ? 7 : 1;
        for (uint32_t i = 0; i < 2 * count; i++) {
            item *each = &model.items[below(&model.random, count)];
            current_step = i;
            if (below(&model.random, 8) < inserts_of_8) {
                if (!each->present)
                    table_insert(&model, each);
                else if (one_in(&model.random, 4))
                    table_swap(&model, each);
            } else if (each->present) {
                table_remove(&model, each);
            }
            if (count <= 64)
                check_table(&model);
        }
        check_table(&model);
    }
    for (uint32_t i = 0; i < count; i++)
        if (model.items[i].present)
            table_remove(&model, &model.items[i]);
    CHECK(model.table.capacity == 0 && model.table.entries == NULL && model.account == 0);
    free(model.items);
    check_nothing_lives();
}

static void test_table(uint64_t seed)
{
    for (int kind = 0; kind < 5; kind++)
        for (uint32_t i = 0; i < 20; i++)
            run_table(seed + i, kind, 4 + 3 * i, 4);
    for (int kind = 0; kind < 5; kind++)
        run_table(seed, kind, 600, 4);
    run_table(seed, 0, 150000, 2); /* both rules of the home position, and the step from one to the other */
}

/* ---- the model of a core ---------------------------------------------------------------------------------------------- */

enum { MOST_HELD = 24 };

typedef struct {
    uint32_t shards, ids, users, groups, steps, check_every, faults_one_in, max_groups;
} scale;

static uint8_t any_status(chance *random) { return (uint8_t)below(random, WSF_STATUSES); }

/* One, several, all or none. */
static uint32_t some_statuses(chance *random)
{
    return one_in(random, 3)   ? UINT32_C(1) << any_status(random)
           : one_in(random, 3) ? WSF_ANY_STATUS
                               : below(random, WSF_ANY_STATUS + 1);
}

typedef struct {
    chance random;
    const scale *size;
    names ids, users, groups, keys, values, device_types;
    PyObject *surrogate; /* no UTF-8 form, so nobody's id, and no other name either */
    PyObject *settings;
    wsf_core *core;
    connection **by_id;
    connection *held[MOST_HELD]; /* detached; owned */
    uint32_t held_count;
    wsf_counters total;
    bool in_limbo, walking; /* a record is detached and not forgotten yet; a walk is under way */
    uint64_t faults;
} world;

static const int32_t *checked_group_counts(const world *w)
{
    static int32_t counts[MOST_GROUPS];
    memset(counts, 0, sizeof counts);
    for (uint32_t i = 0; i < w->size->ids; i++) {
        if (w->by_id[i] == NULL || w->by_id[i]->group_count == 0)
            continue;
        for (uint32_t word = 0; word < (w->size->groups + 63) / 64; word++)
            for (uint64_t bits = w->by_id[i]->groups[word]; bits != 0; bits &= bits - 1)
                counts[word * 64 + wsf_lowest_bit(bits)]++;
    }
    return counts;
}

static bool in_group(const connection *c, uint32_t group) { return c->groups[group / 64] >> (group % 64) & 1; }

static void release_list(PyObject **list, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        Py_DECREF(list[i]);
    PyMem_Free(list);
}

static void check_object(PyObject *found, const PyObject *expected)
{
    CHECK(found == expected);
    Py_XDECREF(found);
}

static void check_groups_of(world *w, connection *c)
{
    PyObject **found;
    uint64_t met[MOST_GROUPS / 64] = {0};
    int64_t count = wsf_index_groups_of(&w->core->index, &c->r, &found);
    CHECK(count == (int64_t)c->group_count);
    for (int64_t i = 0; i < count; i++) {
        uint32_t group = number_of(found[i]);
        met[group / 64] |= UINT64_C(1) << (group % 64);
    }
    CHECK(memcmp(met, c->groups, sizeof met) == 0);
    release_list(found, count);
}

/* What holds for a record whether it is attached or not. */
static void check_connection(world *w, connection *c)
{
    wsf_index *index = &w->core->index;
    wsf_record copy;
    CHECK(wsf_record_attached(&c->r) == c->attached);
    CHECK(wsf_record_status(&c->r) == (c->attached ? c->status : -1));
    CHECK(wsf_record_deadline(&c->r) == (c->attached ? c->deadline_ns : WSF_NEVER));
    CHECK(wsf_record_active(&c->r) == c->active_ns);
    wsf_record_snapshot(&c->r, &copy);
    CHECK(copy.messages_in == c->messages_in && copy.messages_out == c->messages_out);
    CHECK(copy.bytes_in == c->bytes_in && copy.bytes_out == c->bytes_out);
    CHECK(copy.errors_in == c->errors_in && copy.errors_out == c->errors_out);
    CHECK(copy.heartbeat_ns == c->heartbeat_ns && copy.has_heartbeat == (c->heartbeat_ns != 0));
    CHECK(copy.latency == c->latency);
    check_object(wsf_record_read_conn(&c->r), c->conn);
    for (int field = 0; field < WSF_OBJECT_FIELDS; field++)
        check_object(wsf_record_read(&c->r, &c->r.objects[field]), c->objects[field]);
    PyObject *user = wsf_index_user_of(index, &c->r);
    CHECK(user == NULL ? c->user == NOBODY : (int32_t)number_of(user) == c->user);
    Py_XDECREF(user);
    PyObject *tags = wsf_index_tags_of(index, &c->r);
    CHECK((tags == NULL) == has_no_tags(&c->tags));
    CHECK(tags == NULL || memcmp(&((mapping *)tags)->tags, &c->tags, sizeof c->tags) == 0);
    Py_XDECREF(tags);
    PyObject *device_type = wsf_index_device_type_of(index, &c->r);
    CHECK(device_type == NULL ? c->device_type == NOBODY : (int32_t)number_of(device_type) == c->device_type);
    Py_XDECREF(device_type);
    check_groups_of(w, c);
}

static void check_figures(world *w, uint64_t attached)
{
    wsf_counters total = {0};
    uint64_t connections = 0;
    for (uint32_t i = 0; i < w->core->shard_count; i++) {
        wsf_shard_figures figures;
        wsf_shard_measure(&w->core->shards[i], &figures);
        connections += figures.connections;
        CHECK((figures.longest_probe == 0) == (figures.connections == 0));
        uint64_t *sum = (uint64_t *)&total;
        const uint64_t *part = (const uint64_t *)&figures.counters;
        for (size_t at = 0; at < sizeof total / sizeof *sum; at++)
            sum[at] += part[at];
    }
    CHECK(connections == attached && wsf_core_size(w->core) == attached);
    CHECK(memcmp(&total, &w->total, sizeof total) == 0);
    CHECK(total.adds - total.removes == attached);
}

static void check_index_figures(world *w)
{
    PyObject **found;
    uint32_t *sizes, groups, users, tags, expected = 0;
    const int32_t *counts = checked_group_counts(w);
    int64_t count = wsf_index_groups(&w->core->index, &found, &sizes);
    wsf_index_sizes(&w->core->index, &groups, &users, &tags);
    for (uint32_t i = 0; i < w->size->groups; i++)
        expected += counts[i] != 0;
    CHECK(count == (int64_t)expected && groups == expected);
    for (int64_t i = 0; i < count; i++)
        CHECK((int32_t)sizes[i] == counts[number_of(found[i])]);
    release_list(found, count);
    PyMem_Free(sizes);
    bool *used = must_alloc(w->size->users + 1, sizeof *used), tag_used[TAG_KEYS][TAG_VALUES] = {{false}};
    bool device_type_used[DEVICE_TYPES] = {false};
    uint32_t device_types = w->core->index.device_types.used;
    for (uint32_t i = 0; i < w->size->ids; i++) {
        if (w->by_id[i] == NULL)
            continue;
        if (w->by_id[i]->user != NOBODY)
            used[w->by_id[i]->user] = true;
        if (w->by_id[i]->device_type != NOBODY)
            device_type_used[w->by_id[i]->device_type] = true;
        for (int key = 0; key < TAG_KEYS; key++)
            if (w->by_id[i]->tags.value[key] != NO_TAG)
                tag_used[key][w->by_id[i]->tags.value[key]] = true;
    }
    for (uint32_t i = 0; i < w->size->users; i++)
        users -= used[i];
    for (int i = 0; i < TAG_KEYS * TAG_VALUES; i++)
        tags -= tag_used[i / TAG_VALUES][i % TAG_VALUES];
    for (uint32_t i = 0; i < DEVICE_TYPES; i++)
        device_types -= device_type_used[i];
    CHECK(users == 0 && tags == 0 && device_types == 0);
    free(used);
}

/* The core is as the model says. */
static void verify(world *w)
{
    uint64_t attached = 0;
    for (uint32_t i = 0; i < w->size->ids; i++) {
        connection *c = w->by_id[i];
        PyObject *id = either(&w->random, &w->ids, i);
        check_object(wsf_core_get(w->core, id), (PyObject *)c);
        CHECK(wsf_core_contains(w->core, id) == (c != NULL));
        if (c == NULL)
            continue;
        check_connection(w, c);
        CHECK(shim_references(&c->head) == 1); /* the registry's */
        attached++;
    }
    for (uint32_t i = 0; i < w->held_count; i++)
        check_connection(w, w->held[i]);
    check_figures(w, attached);
    CHECK(wsf_core_get(w->core, w->surrogate) == NULL && !wsf_core_contains(w->core, w->surrogate));
    if (!w->in_limbo) {
        wsf_core_check(w->core);
        check_index_figures(w);
    }
}

/* Make a call; sometimes again and again, each time with one allocation more before the first that fails, until memory
 * suffices or the caller gives up. After each failure all must be as before. */
#define WITH_FAULTS(w, outcome, call)                                                                                  \
    do {                                                                                                               \
        int64_t nth = one_in(&(w)->random, (w)->size->faults_one_in);                                                  \
        bool goes_on = one_in(&(w)->random, 2);                                                                        \
        for (;; nth++) {                                                                                               \
            inject_fault(nth, goes_on);                                                                                \
            (outcome) = (call);                                                                                        \
            bool injected = end_faults();                                                                              \
            if ((outcome) != WSF_NO_MEMORY)                                                                            \
                break;                                                                                                 \
            CHECK(injected);                                                                                           \
            (w)->faults++;                                                                                             \
            verify(w);                                                                                                 \
            if (one_in(&(w)->random, 8))                                                                               \
                break;                                                                                                 \
        }                                                                                                              \
    } while (0)

/* For a call that cannot fail: all memory may be wanting. */
static void maybe_no_memory(world *w) { inject_fault(one_in(&w->random, 3), true); }

static connection *anyone(world *w)
{
    for (int tries = 0; tries < 8; tries++) {
        connection *c = w->by_id[below(&w->random, w->size->ids)];
        if (c != NULL)
            return c;
    }
    return NULL;
}

/* Someone attached, or now and then someone who is not any more; NULL: there is nobody. */
static connection *someone(world *w)
{
    if (w->held_count != 0 && one_in(&w->random, 12))
        return w->held[below(&w->random, w->held_count)];
    return anyone(w);
}

static int64_t some_time(world *w) { return (int64_t)below(&w->random, 60); }

/* ---- operations on the model --------------------------------------------------------------------------------------------- */

static void op_join(world *w);
static void op_set_user(world *w);
static void op_set_tags(world *w);
static void op_set_device_type(world *w);
static void op_select(world *w);
static void op_select_all(world *w);
static void op_keep(world *w);
static void op_leave(world *w);

/* The caller has taken it out of the core and owns the reference. */
static void model_detach(world *w, connection *c)
{
    CHECK(w->by_id[c->id] == c);
    w->by_id[c->id] = NULL;
    w->total.removes++;
    c->attached = c->resident = false;
    c->conn = NULL;
    for (int field = 0; field < WSF_DROPPED_FIELDS; field++)
        c->objects[field] = NULL;
}

/* Forget a detached record, perhaps after other operations have met it in the index, and keep or release it. */
static void finish(world *w, connection *c, wsf_trash *trash)
{
    bool outer = w->in_limbo;
    if (!outer && one_in(&w->random, 4)) {
        w->in_limbo = true;
        for (uint32_t i = below(&w->random, 6); i > 0; i--) {
            static void (*const meanwhile[])(world *) = {op_join,   op_set_user,   op_set_tags, op_set_device_type,
                                                         op_select, op_select_all, op_keep,     op_leave};
            meanwhile[below(&w->random, 8)](w);
        }
        w->in_limbo = false;
    }
    maybe_no_memory(w);
    wsf_core_forget(&c->r, trash);
    wsf_trash_release(trash);
    (void)end_faults();
    c->in_index = false;
    memset(c->groups, 0, sizeof c->groups);
    c->group_count = 0;
    check_connection(w, c);
    if (w->held_count < MOST_HELD && one_in(&w->random, 2))
        w->held[w->held_count++] = c;
    else
        Py_DECREF(&c->head);
}

static connection *new_connection(world *w, uint32_t id)
{
    connection *c = make_connection(w->core, either(&w->random, &w->ids, id), some_time(w));
    c->id = (int32_t)id;
    c->user = c->device_type = NOBODY;
    memset(&c->tags, NO_TAG, sizeof c->tags);
    c->deadline_ns = WSF_NEVER;
    c->active_ns = c->r.created_ns;
    c->status = any_status(&w->random);
    if (one_in(&w->random, 2))
        c->conn = c->r.conn = make_thing();
    for (int field = 0; field < WSF_OBJECT_FIELDS; field++)
        if (one_in(&w->random, 3))
            c->objects[field] = c->r.objects[field] = make_thing();
    return c;
}

static void attach(world *w, uint32_t id, int replace)
{
    connection *c = new_connection(w, id), *old = w->by_id[id];
    wsf_record *replaced = NULL;
    wsf_trash trash;
    int outcome;
    wsf_trash_init(&trash);
    WITH_FAULTS(w, outcome, wsf_core_attach(&c->r, (uint8_t)c->status, replace, &replaced, &trash));
    if (outcome != WSF_OK) {
        CHECK(outcome == WSF_NO_MEMORY || (outcome == WSF_DUPLICATE && old != NULL && !replace));
        CHECK(replaced == NULL && trash.used == 0);
        Py_XDECREF(c->r.conn);
        c->r.conn = NULL;
        Py_DECREF(&c->head);
        return;
    }
    CHECK(old == NULL || replace);
    CHECK(replaced == (old == NULL ? NULL : &old->r));
    if (old != NULL)
        model_detach(w, old);
    w->by_id[id] = c;
    w->total.adds++;
    c->attached = c->in_index = true;
    CHECK(shim_references(&c->head) == 2);
    Py_DECREF(&c->head);
    if (old != NULL)
        finish(w, old, &trash);
}

static void op_attach(world *w) { attach(w, below(&w->random, w->size->ids), one_in(&w->random, 2)); }

static void op_detach_id(world *w)
{
    uint32_t id = below(&w->random, w->size->ids);
    wsf_trash trash;
    wsf_trash_init(&trash);
    maybe_no_memory(w);
    wsf_record *record = wsf_core_detach_id(w->core, either(&w->random, &w->ids, id), &trash);
    (void)end_faults();
    CHECK(record == (w->by_id[id] == NULL ? NULL : &w->by_id[id]->r));
    CHECK(wsf_core_detach_id(w->core, w->surrogate, &trash) == NULL);
    if (record != NULL) {
        model_detach(w, of_record(record));
        finish(w, of_record(record), &trash);
    }
}

static void detach(world *w, connection *c)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    maybe_no_memory(w);
    wsf_record *record = wsf_core_detach_record(&c->r, &trash);
    (void)end_faults();
    CHECK(record == (c->attached ? &c->r : NULL));
    if (record != NULL) {
        model_detach(w, c);
        finish(w, c, &trash);
    }
}

static void op_detach_record(world *w)
{
    connection *c = someone(w);
    if (c != NULL)
        detach(w, c);
}

static void join(world *w, connection *c, uint32_t group)
{
    int outcome;
    bool member = in_group(c, group);
    WITH_FAULTS(w, outcome,
                wsf_index_join(&w->core->index, &c->r, either(&w->random, &w->groups, group), w->size->max_groups));
    if (outcome == WSF_NO_MEMORY)
        return;
    if (!c->attached) {
        CHECK(outcome == WSF_DETACHED);
    } else if (member || c->group_count >= w->size->max_groups) {
        CHECK(outcome == (member ? 0 : WSF_TOO_MANY));
    } else {
        CHECK(outcome == 1);
        c->groups[group / 64] |= UINT64_C(1) << (group % 64);
        c->group_count++;
    }
}

static void leave(world *w, connection *c, uint32_t group)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    maybe_no_memory(w);
    int outcome = wsf_index_leave(&w->core->index, &c->r, either(&w->random, &w->groups, group), &trash);
    (void)end_faults();
    wsf_trash_release(&trash);
    CHECK(outcome == (c->attached ? in_group(c, group) : WSF_DETACHED));
    if (outcome == 1) {
        c->groups[group / 64] &= ~(UINT64_C(1) << (group % 64));
        c->group_count--;
    }
}

static void op_join(world *w)
{
    connection *c = someone(w);
    if (c != NULL)
        join(w, c, below(&w->random, w->size->groups));
}

static void op_leave(world *w)
{
    connection *c = someone(w);
    if (c != NULL)
        leave(w, c, below(&w->random, w->size->groups));
}

/* One record comes to be in nearly all groups, or leaves most of them. */
static void op_many_groups(world *w)
{
    connection *c = anyone(w);
    if (c == NULL || !one_in(&w->random, 8))
        return;
    bool joins = one_in(&w->random, 2);
    for (uint32_t i = 0; i < w->size->groups; i++)
        if (!one_in(&w->random, 10))
            (joins ? join : leave)(w, c, i);
}

static void op_set_user(world *w)
{
    connection *c = someone(w);
    if (c == NULL)
        return;
    int32_t user = one_in(&w->random, 4) ? NOBODY : (int32_t)below(&w->random, w->size->users);
    PyObject *name = user == NOBODY ? NULL : either(&w->random, &w->users, (uint32_t)user);
    wsf_trash trash;
    int outcome;
    wsf_trash_init(&trash);
    WITH_FAULTS(w, outcome, wsf_index_set_user(&w->core->index, &c->r, name, &trash));
    wsf_trash_release(&trash);
    if (outcome == WSF_NO_MEMORY)
        return;
    CHECK(outcome == (c->attached ? WSF_OK : WSF_DETACHED));
    if (c->attached)
        c->user = user;
}

/* Whether the index has these tags with this device type already, so that it needs no mapping. Not asked in limbo. */
static bool tags_are_known(world *w, const tag_choice *tags, int32_t device_type)
{
    for (uint32_t i = 0; i < w->size->ids; i++) {
        const connection *c = w->by_id[i];
        if (c != NULL && c->device_type == device_type && memcmp(&c->tags, tags, sizeof *tags) == 0)
            return true;
    }
    return has_no_tags(tags);
}

static int32_t some_device_type(world *w) { return (int32_t)below(&w->random, DEVICE_TYPES + 1) - 1; }

static PyObject *device_type_name(world *w, int32_t device_type)
{
    return device_type == NOBODY ? NULL : either(&w->random, &w->device_types, (uint32_t)device_type);
}

static int call_set_tags(world *w, connection *c, const wsf_tag_names *tags, bool with_device_type,
                         PyObject *device_type, wsf_trash *trash)
{
    if (with_device_type)
        return wsf_index_set_tags_and_device_type(&w->core->index, &c->r, tags, device_type, trash);
    return wsf_index_set_tags(&w->core->index, &c->r, tags, trash);
}

static void set_tags(world *w, bool with_device_type)
{
    connection *c = someone(w);
    tag_choice tags = choose_tags(&w->random);
    PyObject *keys[TAG_KEYS], *values[TAG_KEYS];
    if (c == NULL)
        return;
    int32_t device_type = with_device_type ? some_device_type(w) : c->device_type;
    PyObject *name = device_type_name(w, device_type);
    wsf_tag_names spelt = {keys, values, 0, NULL};
    spelt.count = spell_tags(&w->random, &w->keys, &w->values, &tags, keys, values);
    wsf_trash trash;
    int outcome = WSF_NEEDS_MAPPING;
    wsf_trash_init(&trash);
    if (!one_in(&w->random, 4)) {
        WITH_FAULTS(w, outcome, call_set_tags(w, c, &spelt, with_device_type, name, &trash));
        if (c->attached && !w->in_limbo && outcome != WSF_NO_MEMORY)
            CHECK(outcome == (tags_are_known(w, &tags, device_type) ? WSF_OK : WSF_NEEDS_MAPPING));
    }
    if (outcome == WSF_NEEDS_MAPPING) {
        spelt.mapping = make_mapping(&tags);
        WITH_FAULTS(w, outcome, call_set_tags(w, c, &spelt, with_device_type, name, &trash));
    }
    wsf_trash_release(&trash);
    Py_XDECREF(spelt.mapping);
    if (outcome == WSF_NO_MEMORY)
        return;
    CHECK(outcome == (c->attached ? WSF_OK : WSF_DETACHED));
    if (c->attached) {
        c->tags = tags;
        c->device_type = device_type;
    }
}

static void op_set_tags(world *w) { set_tags(w, false); }

static void op_set_tags_and_device_type(world *w) { set_tags(w, true); }

static void op_set_device_type(world *w)
{
    connection *c = someone(w);
    if (c == NULL)
        return;
    int32_t device_type = some_device_type(w);
    PyObject *name = device_type_name(w, device_type);
    wsf_trash trash;
    int outcome;
    wsf_trash_init(&trash);
    WITH_FAULTS(w, outcome, wsf_index_set_device_type(&w->core->index, &c->r, name, &trash));
    wsf_trash_release(&trash);
    if (outcome == WSF_NO_MEMORY)
        return;
    CHECK(outcome == (c->attached ? WSF_OK : WSF_DETACHED));
    if (c->attached)
        c->device_type = device_type;
}

static void op_set_deadline(world *w)
{
    connection *c = someone(w);
    if (c == NULL)
        return;
    int64_t deadline_ns = one_in(&w->random, 6) ? WSF_NEVER : one_in(&w->random, 9) ? INT64_MIN : some_time(w);
    CHECK(wsf_record_set_deadline(&c->r, deadline_ns) == c->attached);
    if (c->attached)
        c->deadline_ns = deadline_ns;
}

static void op_set_status(world *w)
{
    connection *c = someone(w);
    if (c == NULL)
        return;
    uint8_t status = any_status(&w->random);
    CHECK(wsf_record_set_status(&c->r, status) == c->attached);
    if (c->attached) {
        c->resident = c->resident && status == c->status;
        c->status = status;
    }
}

static void op_count(world *w)
{
    connection *c = someone(w);
    if (c == NULL)
        return;
    const uint64_t messages = below(&w->random, 5), bytes = below(&w->random, 1000), is = c->attached;
    const int64_t now_ns = 1 + some_time(w);
    const uint32_t what = below(&w->random, 6);
    if (is && one_in(&w->random, 50))
        c->errors_in = c->errors_out = c->r.errors_in = c->r.errors_out = WSF_MOST_ERRORS - 1;
    if (what == 0) {
        wsf_record_received(&c->r, now_ns, messages, bytes);
        c->messages_in += is * messages, w->total.messages_in += is * messages;
        c->bytes_in += is * bytes, w->total.bytes_in += is * bytes;
    } else if (what == 1) {
        wsf_record_sent(&c->r, messages, bytes);
        c->messages_out += is * messages, w->total.messages_out += is * messages;
        c->bytes_out += is * bytes, w->total.bytes_out += is * bytes;
    } else if (what == 2) {
        wsf_record_failed(&c->r, 1);
        c->errors_in += is && c->errors_in < WSF_MOST_ERRORS, w->total.errors_in += is;
    } else if (what == 3) {
        wsf_record_failed(&c->r, 0);
        c->errors_out += is && c->errors_out < WSF_MOST_ERRORS, w->total.errors_out += is;
    } else if (what == 4) {
        CHECK(wsf_record_set_quality(&c->r, (float)bytes, 0, 0) == (int)is);
        c->latency = is ? (float)bytes : c->latency;
    } else {
        wsf_record_touch(&c->r, now_ns, messages != 0);
        c->heartbeat_ns = is && messages != 0 ? now_ns : c->heartbeat_ns;
    }
    if (is && (what == 0 || what == 5))
        c->active_ns = now_ns;
}

static void op_swap_field(world *w)
{
    connection *c = someone(w);
    if (c == NULL)
        return;
    uint32_t field = below(&w->random, WSF_OBJECT_FIELDS);
    PyObject **at = &c->r.objects[field], *value = one_in(&w->random, 3) ? NULL : make_thing(), *old;
    int outcome, expected = c->attached;
    if (one_in(&w->random, 2)) {
        outcome = wsf_record_swap(&c->r, at, value, &old);
    } else {
        bool right = one_in(&w->random, 2);
        expected = c->attached && !right ? -1 : expected;
        outcome = wsf_record_replace(&c->r, at, right ? c->objects[field] : w->settings, value, &old);
    }
    CHECK(outcome == expected && old == (outcome == 1 ? c->objects[field] : NULL));
    if (outcome == 1)
        c->objects[field] = value;
    else
        Py_XDECREF(value);
    Py_XDECREF(old);
}

/* ---- filters */

enum { MOST_TERMS = 12 }; /* more than lie on the stack of the index */

/* A term as the model understands it. Numbers are NOBODY for a name that nobody has. */
typedef struct {
    int kind;
    bool negated;
    int32_t name, value;
} choice;

typedef struct {
    choice terms[MOST_TERMS];
    wsf_term spelt[MOST_TERMS];
    uint32_t count;
} filter;

static bool term_holds(const connection *c, const choice *term)
{
    if (term->name == NOBODY || (term->kind == WSF_HAS_TAG && term->value == NOBODY))
        return false;
    switch (term->kind) {
    case WSF_IN_GROUP: return in_group(c, (uint32_t)term->name);
    case WSF_OF_USER: return c->user == term->name;
    case WSF_HAS_TAG: return c->tags.value[term->name] == term->value;
    case WSF_HAS_TAG_KEY: return c->tags.value[term->name] != NO_TAG;
    default: return c->device_type == term->name;
    }
}

static bool selected(const connection *c, const filter *wanted)
{
    for (uint32_t i = 0; i < wanted->count; i++)
        if (term_holds(c, &wanted->terms[i]) == wanted->terms[i].negated)
            return false;
    return c->attached;
}

static bool has_status(const connection *c, uint32_t statuses) { return statuses >> c->status & 1; }

static PyObject *spell(world *w, const names *from, int32_t number)
{
    return number == NOBODY ? w->surrogate : either(&w->random, from, (uint32_t)number);
}

/* Names of those in use at the start of each kind are chosen more often, so that filters find something. */
static int32_t some_name(world *w, uint32_t bound)
{
    return one_in(&w->random, 12) ? NOBODY : (int32_t)below(&w->random, one_in(&w->random, 2) && bound > 3 ? 3 : bound);
}

static void add_term(world *w, filter *wanted)
{
    const uint32_t bounds[] = {w->size->groups, w->size->users, 6, 6, DEVICE_TYPES};
    const names *kinds[] = {&w->groups, &w->users, &w->keys, &w->keys, &w->device_types};
    choice term = {(int)below(&w->random, 5), one_in(&w->random, 2), 0, 0};
    term.name = some_name(w, bounds[term.kind]);
    term.value = some_name(w, TAG_VALUES);
    wanted->terms[wanted->count] = term;
    wanted->spelt[wanted->count++] =
        (wsf_term){term.kind, term.negated, spell(w, kinds[term.kind], term.name),
                   term.kind == WSF_HAS_TAG ? spell(w, &w->values, term.value) : NULL};
}

static filter some_filter(world *w)
{
    filter wanted = {.count = 0};
    for (uint32_t i = one_in(&w->random, 8) ? MOST_TERMS : below(&w->random, 5); i > 0; i--)
        add_term(w, &wanted);
    return wanted;
}

/* Members of the smallest set that a term names; UINT64_MAX: none does. */
static uint64_t smallest_set(const world *w, const filter *wanted)
{
    uint64_t least = UINT64_MAX;
    for (uint32_t i = 0; i < wanted->count; i++) {
        uint64_t size = 0;
        for (uint32_t id = 0; id < w->size->ids; id++)
            size += w->by_id[id] != NULL && term_holds(w->by_id[id], &wanted->terms[i]);
        least = !wanted->terms[i].negated && size < least ? size : least;
    }
    return least;
}

static void check_selection(world *w, const filter *wanted, uint32_t statuses, PyObject **found, int64_t count)
{
    int64_t expected = 0;
    for (uint32_t i = 0; i < w->size->ids; i++)
        expected += w->by_id[i] != NULL && selected(w->by_id[i], wanted) && has_status(w->by_id[i], statuses);
    CHECK(count == expected);
    for (int64_t i = 0; i < count; i++) {
        connection *c = as_connection(found[i]);
        CHECK(selected(c, wanted) && has_status(c, statuses));
        CHECK(shim_references(found[i]) == 2); /* and no other in this list */
    }
    release_list(found, count);
}

static void op_select(world *w)
{
    const filter wanted = some_filter(w);
    const uint64_t most = one_in(&w->random, 2) ? UINT64_MAX : below(&w->random, 12), least = smallest_set(w, &wanted);
    PyObject **found;
    int64_t count;
    WITH_FAULTS(w, count, wsf_index_select(&w->core->index, wanted.spelt, wanted.count, most, &found));
    if (count == WSF_NO_MEMORY)
        return;
    if (!w->in_limbo) /* else there may be detached ones in the sets */
        CHECK((count == WSF_TOO_MANY) == (least == UINT64_MAX || least > most));
    if (count != WSF_TOO_MANY)
        check_selection(w, &wanted, WSF_ANY_STATUS, found, count);
}

static void op_select_all(world *w)
{
    const filter wanted = some_filter(w);
    const uint32_t statuses = some_statuses(&w->random);
    PyObject **found;
    int64_t count;
    WITH_FAULTS(w, count, wsf_core_select(w->core, wanted.spelt, wanted.count, statuses, &found));
    if (count != WSF_NO_MEMORY)
        check_selection(w, &wanted, statuses, found, count);
}

static void op_keep(world *w)
{
    enum { MANY = 40 };
    const filter wanted = some_filter(w);
    connection *offered[MANY];
    PyObject *objects[MANY];
    size_t n = 0, at = 0;
    for (uint32_t tries = below(&w->random, MANY); tries > 0; tries--)
        if ((offered[n] = someone(w)) != NULL)
            n++;
    for (size_t i = 0; i < n; i++)
        objects[i] = Py_NewRef(&offered[i]->head);
    int64_t kept;
    inject_fault(one_in(&w->random, 4), false);
    kept = wsf_index_keep(&w->core->index, wanted.spelt, wanted.count, objects, n);
    if (end_faults()) {
        CHECK(kept == WSF_NO_MEMORY && wanted.count > 8);
        for (size_t i = 0; i < n; i++)
            CHECK(objects[i] == &offered[i]->head);
    } else {
        for (size_t i = 0; i < n; i++)
            if (selected(offered[i], &wanted))
                CHECK((int64_t)at < kept && objects[at++] == &offered[i]->head);
        CHECK((int64_t)at == kept);
    }
    for (size_t i = 0; i < n; i++)
        Py_DECREF(objects[i]); /* the wrong ones would show in the counts of references */
}

static int by_value(const void *left, const void *right)
{
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

static void op_due(world *w)
{
    wsf_shard *shard = &w->core->shards[below(&w->random, w->core->shard_count)];
    const int64_t now_ns = one_in(&w->random, 8) ? WSF_NEVER : some_time(w);
    const size_t room = 1 + below(&w->random, one_in(&w->random, 2) ? 5 : w->size->ids);
    int64_t *expected = must_alloc(w->size->ids, sizeof *expected);
    wsf_due_entry *found = must_alloc(room, sizeof *found); /* no more: the sanitizer sees an overrun */
    size_t due = 0;
    for (uint32_t i = 0; i < w->size->ids; i++) {
        connection *c = w->by_id[i];
        if (c != NULL && c->r.shard == shard && c->deadline_ns <= now_ns && c->deadline_ns != WSF_NEVER)
            expected[due++] = c->deadline_ns;
    }
    qsort(expected, due, sizeof *expected, by_value);
    size_t count = wsf_shard_due(shard, now_ns, found, room);
    CHECK(count == (due < room ? due : room));
    for (size_t i = 0; i < count; i++) {
        connection *c = as_connection(found[i].object);
        CHECK(c->attached && c->r.shard == shard && c->deadline_ns == found[i].deadline_ns);
        CHECK(found[i].deadline_ns == expected[i] && shim_references(&c->head) == 2);
    }
    for (size_t i = 0; i < count; i++)
        Py_DECREF(found[i].object);
    free(found);
    free(expected);
}

/* Remember a wrong route for an id, as an id with the same 48 bits of hash would. */
static void mislead(world *w, PyObject *id)
{
    uint64_t hash = wsf_text_hash(id);
    w->core->routes[hash >> 16 & (WSF_ROUTES - 1)] = (hash & ~UINT64_C(0xFFFF)) | below(&w->random, 0x10000);
}

static void op_get_many(world *w)
{
    enum { MANY = 2 * WSF_CHUNK + 100 };
    PyObject *ids[MANY] = {NULL}, *found[MANY];
    const size_t count = below(&w->random, one_in(&w->random, 8) ? MANY : 12);
    for (size_t i = 0; i < count; i++) {
        uint32_t id = below(&w->random, w->size->ids);
        ids[i] = one_in(&w->random, 20) ? w->surrogate : either(&w->random, &w->ids, id);
        if (one_in(&w->random, 4))
            mislead(w, ids[i]);
    }
    CHECK(wsf_ids_prepare(ids, count) == count);
    wsf_core_get_many(w->core, ids, found, count);
    for (size_t i = 0; i < count; i++)
        check_object(found[i], ids[i] == w->surrogate ? NULL : (PyObject *)w->by_id[number_of(ids[i])]);
    if (count != 0) {
        size_t odd = below(&w->random, (uint32_t)count);
        ids[odd] = w->settings;
        CHECK(wsf_ids_prepare(ids, count) == odd);
    }
}

static void op_get(world *w)
{
    uint32_t id = below(&w->random, w->size->ids);
    PyObject *name = either(&w->random, &w->ids, id);
    if (one_in(&w->random, 2))
        mislead(w, name);
    check_object(wsf_core_get(w->core, name), (PyObject *)w->by_id[id]);
}

static void op_release_held(world *w)
{
    if (w->held_count != 0)
        Py_DECREF(&w->held[--w->held_count]->head);
}

static void random_step(world *w);

/* Whoever stays is met once, and nobody twice, whatever comes and goes between the parts of a walk. */
static void op_walk(world *w)
{
    if (w->walking || w->in_limbo)
        return;
    const uint32_t statuses = one_in(&w->random, 2) ? WSF_ANY_STATUS : some_statuses(&w->random);
    const size_t room = 1 + below(&w->random, one_in(&w->random, 2) ? 4 : 100);
    PyObject *found[100];
    wsf_cursor cursor = {0, 0};
    w->walking = true;
    for (uint32_t i = 0; i < w->size->ids; i++)
        if (w->by_id[i] != NULL)
            w->by_id[i]->resident = true, w->by_id[i]->seen = 0;
    for (size_t count; (count = wsf_core_collect(w->core, &cursor, statuses, found, room)) != 0;) {
        for (size_t i = 0; i < count; i++) {
            connection *c = as_connection(found[i]);
            CHECK(c->attached && c->seen++ == 0 && has_status(c, statuses));
            Py_DECREF(found[i]);
        }
        for (uint32_t i = below(&w->random, 8); i > 0; i--)
            random_step(w);
    }
    for (uint32_t i = 0; i < w->size->ids; i++) {
        const connection *c = w->by_id[i];
        if (c != NULL && c->resident)
            CHECK(c->seen == has_status(c, statuses));
    }
    w->walking = false;
}

/* Everybody gets one status, and perhaps some another: what blocks may have is far from what they have. */
static void op_many_statuses(world *w)
{
    if (!one_in(&w->random, 10))
        return;
    const uint8_t status = any_status(&w->random), other = any_status(&w->random);
    for (uint32_t i = 0; i < w->size->ids; i++) {
        connection *c = w->by_id[i];
        if (c == NULL)
            continue;
        uint8_t its = one_in(&w->random, 50) ? other : status;
        CHECK(wsf_record_set_status(&c->r, its));
        c->resident = c->resident && its == c->status;
        c->status = its;
    }
}

static void op_fill_or_clear(world *w)
{
    if (!one_in(&w->random, 40))
        return;
    const bool fills = one_in(&w->random, 2);
    for (uint32_t i = 0; i < w->size->ids; i++) {
        if (fills && w->by_id[i] == NULL)
            attach(w, i, 0);
        else if (!fills && w->by_id[i] != NULL)
            detach(w, w->by_id[i]);
    }
}

static void random_step(world *w)
{
    static void (*const operations[])(world *) = {
        op_attach,    op_attach,     op_attach,   op_attach,  op_detach_id, op_detach_record, op_join,
        op_join,      op_join,       op_leave,    op_leave,   op_set_user,  op_set_user,      op_set_tags,
        op_set_tags,  op_select,     op_select,   op_due,     op_get_many,  op_get,           op_set_deadline,
        op_set_status, op_count,     op_count,    op_swap_field, op_walk,   op_release_held,  op_many_groups,
        op_set_deadline, op_fill_or_clear, op_set_device_type, op_set_device_type, op_set_tags_and_device_type,
        op_select_all, op_select_all, op_keep,    op_many_statuses, op_set_status,
    };
    operations[below(&w->random, sizeof operations / sizeof *operations)](w);
}

/* ---- random: sequences of operations ---------------------------------------------------------------------------------------- */

static void open_world(world *w, const scale *size, uint64_t seed)
{
    *w = (world){.random = {seed}, .size = size};
    w->ids = make_names('i', size->ids);
    w->users = make_names('u', size->users);
    w->groups = make_names('g', size->groups);
    w->keys = make_names('k', TAG_KEYS);
    w->values = make_names('v', TAG_VALUES);
    w->device_types = make_names('d', DEVICE_TYPES);
    w->surrogate = shim_text_new((const uint32_t[]){'s', 0xD800}, 2, -1);
    (void)PyObject_Hash(w->surrogate);
    w->settings = make_thing();
    w->by_id = must_alloc(size->ids, sizeof *w->by_id);
    inject_fault(1, false);
    CHECK(wsf_core_new(size->shards, w->settings, 0) == NULL && end_faults());
    w->core = wsf_core_new(size->shards, w->settings, 0);
    CHECK(w->core != NULL && !wsf_core_is_shared(w->core));
    check_object(wsf_core_settings(w->core), w->settings);
}

static void close_world(world *w)
{
    for (uint32_t i = 0; i < w->size->ids; i++)
        if (w->by_id[i] != NULL)
            detach(w, w->by_id[i]);
    verify(w);
    CHECK(w->core->index.account == 0);
    wsf_core_orphan(w->core);
    CHECK(wsf_core_settings(w->core) == NULL);
    if (w->held_count != 0) { /* records outlive their registry */
        CHECK(wsf_core_is_shared(w->core));
        wsf_core_release(w->core);
        check_connection(w, w->held[0]);
        while (w->held_count != 0)
            op_release_held(w);
    } else {
        wsf_core_release(w->core);
    }
    CHECK(shim_references(w->settings) == 1);
    Py_DECREF(w->settings);
    Py_DECREF(w->surrogate);
    free_names(&w->ids);
    free_names(&w->users);
    free_names(&w->groups);
    free_names(&w->keys);
    free_names(&w->values);
    free_names(&w->device_types);
    free(w->by_id);
    check_nothing_lives();
}

static uint64_t run_random(uint64_t seed, const scale *size)
{
    world w;
    current_seed = seed;
    open_world(&w, size, seed);
    for (uint32_t step = 0; step < size->steps; step++) {
        current_step = step;
        random_step(&w);
        if (step % size->check_every == 0)
            verify(&w);
    }
    close_world(&w);
    return w.faults;
}

static void test_random(uint64_t seed)
{
    static const scale scales[] = {
        /* shards, ids, users, groups, steps, check_every, faults_one_in, max_groups */
        {1, 8, 3, 4, 1500, 1, 2, 3},
        {4, 24, 5, 12, 1500, 1, 3, 1000},
        {2, 90, 12, 80, 2500, 5, 8, 60},
        {16, 320, 24, 200, 3000, 25, 20, 1000},
    };
    uint64_t faults = 0;
    for (uint64_t i = 0; i < 16; i++)
        faults += run_random(seed * 1000 + i, &scales[i % 4]);
    CHECK(faults > 1000);
}

/* Blocks enough for more than one word of each bitmap of a shard, and thousands of groups on one record. */
static void test_large(uint64_t seed)
{
    static const scale large = {1, 5000, 300, MOST_GROUPS, 2500, 500, 4000, MOST_GROUPS};
    (void)run_random(seed, &large);
}

/* ---- users: more than 2**16 of them, each alone under a name ------------------------------------------------------------------- */

static void set_user(connection *c, PyObject *name)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    CHECK(wsf_index_set_user(&c->r.shard->core->index, &c->r, name, &trash) == WSF_OK);
    wsf_trash_release(&trash);
}

static void drop(connection *c)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    CHECK(wsf_core_detach_record(&c->r, &trash) == &c->r);
    wsf_core_forget(&c->r, &trash);
    wsf_trash_release(&trash);
    Py_DECREF(&c->head);
}

static void test_users(uint64_t seed)
{
    enum { MANY = 70000 };
    chance random = {seed};
    names all = make_names('m', MANY);
    wsf_core *core = wsf_core_new(1, NULL, 0);
    connection **everyone = must_alloc(MANY, sizeof *everyone);
    wsf_record *replaced;
    wsf_trash trash;
    current_seed = seed;
    wsf_trash_init(&trash);
    for (uint32_t i = 0; i < MANY; i++) {
        everyone[i] = make_connection(core, all.one[i], 0);
        CHECK(wsf_core_attach(&everyone[i]->r, 0, 0, &replaced, &trash) == WSF_OK);
        Py_DECREF(&everyone[i]->head);
        set_user(everyone[i], all.twin[i]);
    }
    CHECK(core->shards[0].table.capacity > WSF_TABLE_HOME_IN_TAG);
    CHECK(core->index.users.capacity > WSF_TABLE_HOME_IN_TAG);
    wsf_core_check(core);
    /* Others' names, so that lone records become sets and sets stay with one; and names nobody has yet. */
    for (uint32_t i = 0; i < MANY; i++)
        set_user(everyone[below(&random, MANY)], either(&random, &all, below(&random, MANY)));
    wsf_core_check(core);
    for (uint32_t left = MANY; left > 0; left--) {
        uint32_t at = below(&random, left);
        drop(everyone[at]);
        everyone[at] = everyone[left - 1];
        if (left % 16384 == 0)
            wsf_core_check(core);
    }
    wsf_core_release(core);
    free(everyone);
    free_names(&all);
    check_nothing_lives();
}

/* ---- threads ------------------------------------------------------------------------------------------------------------------- */

#ifdef Py_GIL_DISABLED
enum { WORKERS = 4, SHARED_IDS = 64, RESIDENTS = 4, SHARED_USERS = 40, SHARED_GROUPS = 24 };

typedef struct {
    wsf_core *core;
    names ids, users, groups, keys, values, device_types;
    connection *residents[RESIDENTS];
    pthread_barrier_t start;
    uint32_t steps;
    int failed;
} arena;

typedef struct {
    arena *shared;
    chance random;
    uint64_t received; /* messages counted for residents */
    bool lacks_memory; /* now and then */
    pthread_t thread;
} worker;

static void forget_and_release(wsf_record *record, wsf_trash *trash)
{
    wsf_core_forget(record, trash);
    wsf_trash_release(trash);
    Py_DECREF(wsf_record_object(record));
}

/* New reference or NULL; never a resident. */
static connection *thread_take(worker *me)
{
    uint32_t id = RESIDENTS + below(&me->random, SHARED_IDS - RESIDENTS);
    return (connection *)wsf_core_get(me->shared->core, either(&me->random, &me->shared->ids, id));
}

static void thread_set_user(worker *me, connection *c)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    uint32_t user = below(&me->random, SHARED_USERS + 1);
    PyObject *name = user == SHARED_USERS ? NULL : either(&me->random, &me->shared->users, user);
    int outcome = wsf_index_set_user(&me->shared->core->index, &c->r, name, &trash);
    wsf_trash_release(&trash);
    CHECK(outcome == WSF_OK || outcome == WSF_DETACHED || (outcome == WSF_NO_MEMORY && me->lacks_memory));
}

static void thread_set_tags(worker *me, connection *c)
{
    arena *shared = me->shared;
    tag_choice tags = choose_tags(&me->random);
    PyObject *keys[TAG_KEYS], *values[TAG_KEYS];
    wsf_trash trash;
    wsf_trash_init(&trash);
    wsf_index *index = &shared->core->index;
    wsf_tag_names spelt = {keys, values, 0, NULL};
    spelt.count = spell_tags(&me->random, &shared->keys, &shared->values, &tags, keys, values);
    int outcome = wsf_index_set_tags(index, &c->r, &spelt, &trash);
    if (outcome == WSF_NEEDS_MAPPING) {
        spelt.mapping = make_mapping(&tags);
        outcome = wsf_index_set_tags_and_device_type(index, &c->r, &spelt, shared->device_types.one[0], &trash);
        Py_DECREF(spelt.mapping);
    }
    wsf_trash_release(&trash);
    CHECK(outcome == WSF_OK || outcome == WSF_DETACHED || (outcome == WSF_NO_MEMORY && me->lacks_memory));
}

static void thread_set_device_type(worker *me, connection *c)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    uint32_t number = below(&me->random, DEVICE_TYPES + 1);
    PyObject *name = number == DEVICE_TYPES ? NULL : either(&me->random, &me->shared->device_types, number);
    int outcome = wsf_index_set_device_type(&me->shared->core->index, &c->r, name, &trash);
    wsf_trash_release(&trash);
    CHECK(outcome == WSF_OK || outcome == WSF_DETACHED || (outcome == WSF_NO_MEMORY && me->lacks_memory));
}

static void thread_join(worker *me, connection *c)
{
    PyObject *group = either(&me->random, &me->shared->groups, below(&me->random, SHARED_GROUPS));
    int outcome = wsf_index_join(&me->shared->core->index, &c->r, group, 20);
    CHECK(outcome != WSF_NO_MEMORY || me->lacks_memory);
}

static void thread_leave(worker *me, connection *c)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    PyObject *group = either(&me->random, &me->shared->groups, below(&me->random, SHARED_GROUPS));
    (void)wsf_index_leave(&me->shared->core->index, &c->r, group, &trash);
    wsf_trash_release(&trash);
}

static void thread_attach(worker *me, uint32_t id)
{
    wsf_core *core = me->shared->core;
    connection *c = make_connection(core, either(&me->random, &me->shared->ids, id), 1);
    wsf_record *replaced = NULL;
    wsf_trash trash;
    wsf_trash_init(&trash);
    c->r.conn = make_thing();
    c->r.objects[WSF_SESSION] = make_thing();
    c->r.objects[WSF_PERMISSIONS] = make_thing();
    if (wsf_core_attach(&c->r, 1, one_in(&me->random, 2), &replaced, &trash) == WSF_OK) {
        if (replaced != NULL)
            forget_and_release(replaced, &trash);
        thread_set_user(me, c);
        thread_set_tags(me, c);
        for (uint32_t i = below(&me->random, 12); i > 0; i--)
            thread_join(me, c);
    } else {
        Py_DECREF(c->r.conn);
        c->r.conn = NULL;
    }
    Py_DECREF(&c->head);
}

static void thread_detach(worker *me, connection *c)
{
    wsf_trash trash;
    wsf_trash_init(&trash);
    wsf_record *record = NULL;
    if (c != NULL)
        record = wsf_core_detach_record(&c->r, &trash);
    else
        record = wsf_core_detach_id(
            me->shared->core,
            either(&me->random, &me->shared->ids, RESIDENTS + below(&me->random, SHARED_IDS - RESIDENTS)), &trash);
    if (record != NULL)
        forget_and_release(record, &trash);
}

static void thread_change(worker *me, connection *c)
{
    PyObject *old = NULL, *value = make_thing(), **field = &c->r.objects[WSF_EXTRAS];
    wsf_record copy;
    (void)wsf_record_set_deadline(&c->r, (int64_t)below(&me->random, 100));
    (void)wsf_record_set_status(&c->r, any_status(&me->random));
    (void)wsf_record_set_quality(&c->r, 1, 2, 3);
    wsf_record_touch(&c->r, (int64_t)below(&me->random, 100), 1);
    wsf_record_sent(&c->r, 1, 2);
    wsf_record_failed(&c->r, one_in(&me->random, 2));
    wsf_record_snapshot(&c->r, &copy);
    PyObject *expected = wsf_record_read(&c->r, field);
    if (wsf_record_replace(&c->r, field, expected, value, &old) != 1)
        Py_DECREF(value);
    Py_XDECREF(old);
    Py_XDECREF(expected);
    value = make_thing();
    if (wsf_record_swap(&c->r, &c->r.objects[WSF_SESSION], value, &old) != 1)
        Py_DECREF(value);
    Py_XDECREF(old);
}

static void thread_read(worker *me, connection *c)
{
    wsf_index *index = &me->shared->core->index;
    PyObject **found;
    Py_XDECREF(wsf_record_read_conn(&c->r));
    Py_XDECREF(wsf_index_user_of(index, &c->r));
    Py_XDECREF(wsf_index_tags_of(index, &c->r));
    Py_XDECREF(wsf_index_device_type_of(index, &c->r));
    (void)wsf_record_status(&c->r);
    (void)wsf_record_deadline(&c->r);
    (void)wsf_record_active(&c->r);
    int64_t count = wsf_index_groups_of(index, &c->r, &found);
    CHECK(count <= 20 && (count >= 0 || me->lacks_memory));
    release_list(found, count);
}

static wsf_term thread_term(worker *me)
{
    arena *shared = me->shared;
    const names *kinds[] = {&shared->groups, &shared->users, &shared->keys, &shared->keys, &shared->device_types};
    const uint32_t bounds[] = {SHARED_GROUPS, SHARED_USERS, 5, 5, DEVICE_TYPES}, kind = below(&me->random, 5);
    wsf_term term = {(int)kind, one_in(&me->random, 3), NULL, NULL};
    term.name = either(&me->random, kinds[kind], below(&me->random, bounds[kind]));
    if (term.kind == WSF_HAS_TAG)
        term.value = either(&me->random, &shared->values, below(&me->random, TAG_VALUES));
    return term;
}

/* As Registry.select, and then as a walk does with what it has collected. */
static void thread_select(worker *me)
{
    wsf_term terms[3];
    const uint32_t count = below(&me->random, 4);
    PyObject **found;
    for (uint32_t i = 0; i < count; i++)
        terms[i] = thread_term(me);
    int64_t selected = wsf_core_select(me->shared->core, terms, count, some_statuses(&me->random), &found);
    CHECK(selected <= SHARED_IDS && (selected >= 0 || me->lacks_memory));
    const wsf_term other = thread_term(me);
    if (selected > 0)
        CHECK(wsf_index_keep(&me->shared->core->index, &other, 1, found, (size_t)selected) <= selected);
    release_list(found, selected);
}

static void thread_due(worker *me)
{
    wsf_due_entry found[8];
    wsf_shard *shard = &me->shared->core->shards[below(&me->random, me->shared->core->shard_count)];
    size_t count = wsf_shard_due(shard, (int64_t)below(&me->random, 100), found, 8);
    for (size_t i = 0; i < count; i++) {
        CHECK(i == 0 || found[i - 1].deadline_ns <= found[i].deadline_ns);
        Py_DECREF(found[i].object);
    }
}

static void thread_get_many(worker *me)
{
    enum { IDS = 300 };
    PyObject *ids[IDS], *found[IDS];
    for (int i = 0; i < IDS; i++)
        ids[i] = either(&me->random, &me->shared->ids, below(&me->random, SHARED_IDS));
    CHECK(wsf_ids_prepare(ids, IDS) == IDS);
    wsf_core_get_many(me->shared->core, ids, found, IDS);
    for (int i = 0; i < IDS; i++) {
        uint32_t id = number_of(ids[i]);
        CHECK(found[i] != NULL || id >= RESIDENTS);
        if (found[i] == NULL)
            continue;
        CHECK(number_of(((connection *)found[i])->r.client_id) == id);
        Py_DECREF(found[i]);
    }
}

/* Residents once each, and nobody twice. All references are kept to the end, so that no address is used again. */
static void thread_walk(worker *me)
{
    enum { MOST = 4096 };
    PyObject *found[MOST];
    size_t used = 0;
    uint32_t residents = 0;
    wsf_cursor cursor = {0, 0};
    for (size_t count, room; used < MOST; used += count) {
        room = MOST - used < 7 ? MOST - used : 7;
        count = wsf_core_collect(me->shared->core, &cursor, WSF_ANY_STATUS, found + used, room);
        if (count == 0)
            break;
    }
    for (size_t i = 0; i < used; i++) {
        residents += number_of(((connection *)found[i])->r.client_id) < RESIDENTS;
        for (size_t j = 0; j < i; j++)
            CHECK(found[i] != found[j]);
    }
    for (size_t i = 0; i < used; i++)
        Py_DECREF(found[i]);
    CHECK(residents == RESIDENTS || used == MOST);
}

static void thread_figures(worker *me)
{
    wsf_core *core = me->shared->core;
    PyObject **found;
    uint32_t *sizes, groups, users, tags;
    wsf_shard_figures figures;
    int64_t count = wsf_index_groups(&core->index, &found, &sizes);
    CHECK(count >= 0 || me->lacks_memory);
    release_list(found, count);
    PyMem_Free(sizes);
    wsf_index_sizes(&core->index, &groups, &users, &tags);
    CHECK(groups <= SHARED_GROUPS && users <= SHARED_USERS);
    wsf_shard_measure(&core->shards[below(&me->random, core->shard_count)], &figures);
    CHECK(wsf_core_size(core) >= RESIDENTS && wsf_core_bytes(core) > 0);
    CHECK(wsf_core_contains(core, me->shared->ids.one[below(&me->random, RESIDENTS)]));
}

static void thread_step(worker *me)
{
    static void (*const alone[])(worker *) = {thread_select, thread_due, thread_get_many, thread_walk, thread_figures};
    static void (*const with_one[])(worker *, connection *) = {
        thread_detach,   thread_join,     thread_join,            thread_leave,  thread_set_user,
        thread_set_tags, thread_set_tags, thread_set_device_type, thread_change, thread_read,
    };
    uint32_t what = below(&me->random, 20);
    if (what < 5) {
        alone[what](me);
    } else if (what < 9) {
        thread_attach(me, RESIDENTS + below(&me->random, SHARED_IDS - RESIDENTS));
    } else if (what == 9) {
        thread_detach(me, NULL);
    } else if (what == 10) {
        wsf_record_received(&me->shared->residents[below(&me->random, RESIDENTS)]->r, 1, 1, 3);
        me->received++;
    } else {
        connection *c = thread_take(me);
        if (c == NULL)
            return;
        with_one[below(&me->random, 10)](me, c);
        Py_DECREF(&c->head);
    }
}

static void *thread_main(void *argument)
{
    worker *me = argument;
    jmp_buf failure;
    on_failure = &failure;
    current_seed = me->random.state;
    shim_fault.random = me->random.state;
    shim_fault.chance = me->lacks_memory ? UINT32_MAX / 64 : 0;
    pthread_barrier_wait(&me->shared->start);
    if (setjmp(failure) == 0) {
        for (; current_step < me->shared->steps; current_step++)
            thread_step(me);
    } else {
        __atomic_store_n(&me->shared->failed, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void open_arena(arena *shared, uint32_t shards, uint32_t steps)
{
    *shared = (arena){.core = wsf_core_new(shards, NULL, 0), .steps = steps};
    shared->ids = make_names('i', SHARED_IDS);
    shared->users = make_names('u', SHARED_USERS);
    shared->groups = make_names('g', SHARED_GROUPS);
    shared->keys = make_names('k', TAG_KEYS);
    shared->values = make_names('v', TAG_VALUES);
    shared->device_types = make_names('d', DEVICE_TYPES);
    for (uint32_t i = 0; i < RESIDENTS; i++) {
        wsf_record *replaced;
        wsf_trash trash;
        wsf_trash_init(&trash);
        shared->residents[i] = make_connection(shared->core, shared->ids.one[i], 0);
        CHECK(wsf_core_attach(&shared->residents[i]->r, 0, 0, &replaced, &trash) == WSF_OK);
        Py_DECREF(&shared->residents[i]->head);
    }
    CHECK(pthread_barrier_init(&shared->start, NULL, WORKERS) == 0);
}

static void close_arena(arena *shared)
{
    PyObject *found[SHARED_IDS];
    wsf_cursor cursor = {0, 0};
    wsf_core_check(shared->core);
    size_t count = wsf_core_collect(shared->core, &cursor, WSF_ANY_STATUS, found, SHARED_IDS);
    CHECK(count == wsf_core_size(shared->core));
    for (size_t i = 0; i < count; i++) {
        CHECK(shim_references(found[i]) == 2);
        Py_DECREF(found[i]);
        drop((connection *)found[i]);
    }
    CHECK(shared->core->index.account == 0);
    CHECK(!wsf_core_is_shared(shared->core));
    wsf_core_release(shared->core);
    free_names(&shared->ids);
    free_names(&shared->users);
    free_names(&shared->groups);
    free_names(&shared->keys);
    free_names(&shared->values);
    free_names(&shared->device_types);
    pthread_barrier_destroy(&shared->start);
    check_nothing_lives();
}

static void test_threads(uint64_t seed)
{
    for (uint32_t shards = 1; shards <= 8; shards *= 8) {
        arena shared;
        worker workers[WORKERS];
        uint64_t received = 0, counted = 0;
        current_seed = seed;
        open_arena(&shared, shards, 12000);
        for (uint32_t i = 0; i < WORKERS; i++) {
            workers[i] = (worker){.shared = &shared, .random = {seed * WORKERS + i}, .lacks_memory = i == 0};
            CHECK(pthread_create(&workers[i].thread, NULL, thread_main, &workers[i]) == 0);
        }
        for (uint32_t i = 0; i < WORKERS; i++) {
            pthread_join(workers[i].thread, NULL);
            received += workers[i].received;
        }
        CHECK(!shared.failed);
        for (uint32_t i = 0; i < RESIDENTS; i++)
            counted += shared.residents[i]->r.messages_in;
        CHECK(counted == received);
        close_arena(&shared);
    }
}
#endif

/* ---- main ------------------------------------------------------------------------------------------------------------------------ */

int main(int argc, char **argv)
{
    static const test_part parts[] = {
        {"fnv", test_fnv, 1},     {"table", test_table, 1}, {"random", test_random, 4},
        {"random-large", test_large, 1}, {"users", test_users, 1},
#ifdef Py_GIL_DISABLED
        {"threads", test_threads, 3},
#endif
    };
    return run_parts(parts, sizeof parts / sizeof *parts, argc, argv);
}
