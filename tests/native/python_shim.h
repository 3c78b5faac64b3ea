/* The little of Python that csrc/ uses, without an interpreter: objects with a reference count and a destructor, exact
 * str objects, memory that can be made to fail, and the mutex of a free-threaded build.
 *
 * csrc/platform.h includes this where WSF_WITHOUT_PYTHON is defined. One file of the program defines
 * WSF_SHIM_IMPLEMENTATION before it includes anything of csrc/, and so holds the state. With Py_GIL_DISABLED the locks
 * are real; without, the program may use one thread only, as the holder of a GIL.
 *
 * It also watches what csrc/ promises: no reference is taken to an object that has none left, at most one lock is held
 * at a time, and no destructor that could run Python code starts under a lock. A broken promise aborts.
 *
 * Not supplied: the garbage collector, weak references, exceptions, subclasses. PyMutex lies in zeroed memory, which is
 * an unlocked pthread_mutex_t on Linux and the BSDs, but not on macOS.
 */
#ifndef WSF_PYTHON_SHIM_H
#define WSF_PYTHON_SHIM_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* clock_gettime, pthread_barrier_t */
#endif

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- objects -------------------------------------------------------------------------------------------------- */

typedef ptrdiff_t Py_ssize_t;
typedef ptrdiff_t Py_hash_t;
struct shim_type;

/* 16 bytes aligned to 16, as the head of an object is in CPython: a wsf_record right behind it can go into a table. */
typedef struct {
    _Alignas(16) int64_t references;
    const struct shim_type *type;
} PyObject;

typedef struct shim_type {
    const char *name;
    int runs_no_code; /* freeing one cannot run Python code, so it may happen under a lock */
    void (*free)(PyObject *object);
} shim_type;

extern int64_t shim_live_objects, shim_live_blocks;
extern _Thread_local int shim_locks_held;

#define SHIM_REQUIRE(condition) ((condition) ? (void)0 : shim_broken(#condition, __LINE__))
_Noreturn void shim_broken(const char *condition, int line);

static inline void shim_object_init(PyObject *object, const shim_type *type)
{
    object->references = 1;
    object->type = type;
    (void)__atomic_add_fetch(&shim_live_objects, 1, __ATOMIC_RELAXED);
}

static inline int64_t shim_references(const PyObject *object)
{
    return __atomic_load_n(&object->references, __ATOMIC_ACQUIRE);
}

static inline void Py_INCREF(PyObject *object)
{
    SHIM_REQUIRE(__atomic_fetch_add(&object->references, 1, __ATOMIC_RELAXED) > 0);
}

static inline void Py_DECREF(PyObject *object)
{
    int64_t left = __atomic_sub_fetch(&object->references, 1, __ATOMIC_ACQ_REL);
    SHIM_REQUIRE(left >= 0);
    if (left != 0)
        return;
    SHIM_REQUIRE(object->type->runs_no_code || shim_locks_held == 0);
    (void)__atomic_sub_fetch(&shim_live_objects, 1, __ATOMIC_RELAXED);
    object->type->free(object);
}

static inline void Py_XDECREF(PyObject *object)
{
    if (object != NULL)
        Py_DECREF(object);
}

static inline PyObject *Py_NewRef(PyObject *object)
{
    Py_INCREF(object);
    return object;
}

static inline PyObject *Py_XNewRef(PyObject *object) { return object == NULL ? NULL : Py_NewRef(object); }

/* ---- str ------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject head;
    uint64_t hash; /* SHIM_NO_HASH until it is computed */
    Py_ssize_t length;
    uint16_t kind; /* bytes a character */
    uint16_t is_ascii;
    int32_t number; /* of the test */
    unsigned char data[];
} shim_text;

#define SHIM_NO_HASH UINT64_MAX /* -1, as in CPython */
extern const shim_type shim_text_type;

/* Texts that begin with one of these are engineered to collide: all with equal hashes, or with hashes that differ but
 * fold to the same 32 bits. */
#define SHIM_EQUAL_HASH '='
#define SHIM_EQUAL_FOLD '~'

/* A str with as few bytes a character as its characters need; the hash is not computed yet. Never fails. */
PyObject *shim_text_new(const uint32_t *characters, Py_ssize_t length, int32_t number);
uint64_t shim_hash(const PyObject *text);

static inline const shim_text *shim_as_text(const PyObject *object) { return (const shim_text *)object; }

#define PyUnicode_CheckExact(object) ((object)->type == &shim_text_type)
#define PyUnicode_GET_LENGTH(text) (shim_as_text(text)->length)
#define PyUnicode_KIND(text) ((unsigned)shim_as_text(text)->kind)
#define PyUnicode_DATA(text) ((const void *)shim_as_text(text)->data)
#define PyUnicode_IS_ASCII(text) (shim_as_text(text)->is_ascii)

static inline uint32_t PyUnicode_READ(int kind, const void *data, Py_ssize_t i)
{
    return kind == 1 ? ((const uint8_t *)data)[i] : kind == 2 ? ((const uint16_t *)data)[i] : ((const uint32_t *)data)[i];
}

static inline uint64_t wsf_text_hash(PyObject *text)
{
    uint64_t hash = __atomic_load_n(&((shim_text *)text)->hash, __ATOMIC_RELAXED);
    SHIM_REQUIRE(hash != SHIM_NO_HASH);
    return hash;
}

static inline Py_hash_t PyObject_Hash(PyObject *text)
{
    uint64_t hash = shim_hash(text);
    __atomic_store_n(&((shim_text *)text)->hash, hash, __ATOMIC_RELAXED);
    return (Py_hash_t)hash;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* Faults of the calling thread. */
typedef struct {
    int64_t countdown; /* 1: the next allocation fails; 0: none does by count */
    int goes_on;       /* all after that one fail too */
    uint32_t chance;   /* of 2**32: any allocation fails */
    uint64_t random;   /* state */
    uint64_t injected;
} shim_faults;
extern _Thread_local shim_faults shim_fault;

int shim_allocation_fails(void);

static inline void *PyMem_Malloc(size_t size)
{
    void *memory = shim_allocation_fails() ? NULL : malloc(size == 0 ? 1 : size);
    if (memory != NULL)
        (void)__atomic_add_fetch(&shim_live_blocks, 1, __ATOMIC_RELAXED);
    return memory;
}

static inline void *PyMem_Realloc(void *memory, size_t size)
{
    if (memory == NULL)
        return PyMem_Malloc(size);
    return shim_allocation_fails() ? NULL : realloc(memory, size == 0 ? 1 : size);
}

static inline void PyMem_Free(void *memory)
{
    if (memory != NULL)
        (void)__atomic_sub_fetch(&shim_live_blocks, 1, __ATOMIC_RELAXED);
    free(memory);
}

#define PyMem_RawMalloc PyMem_Malloc
#define PyMem_RawRealloc PyMem_Realloc
#define PyMem_RawFree PyMem_Free

/* ---- locks -------------------------------------------------------------------------------------------------------- */

#ifdef Py_GIL_DISABLED
typedef pthread_mutex_t PyMutex;

static inline void PyMutex_Lock(PyMutex *mutex)
{
    SHIM_REQUIRE(shim_locks_held == 0);
    SHIM_REQUIRE(pthread_mutex_lock(mutex) == 0);
    shim_locks_held = 1;
}

static inline void PyMutex_Unlock(PyMutex *mutex)
{
    SHIM_REQUIRE(shim_locks_held == 1);
    shim_locks_held = 0;
    SHIM_REQUIRE(pthread_mutex_unlock(mutex) == 0);
}
#endif

/* ---- state --------------------------------------------------------------------------------------------------------- */

#ifdef WSF_SHIM_IMPLEMENTATION
int64_t shim_live_objects, shim_live_blocks;
_Thread_local int shim_locks_held;
_Thread_local shim_faults shim_fault;

void shim_broken(const char *condition, int line)
{
    fprintf(stderr, "python_shim.h:%d: broken: %s\n", line, condition);
    abort();
}

static void shim_text_free(PyObject *object) { free(object); }

const shim_type shim_text_type = {"str", 1, shim_text_free};

PyObject *shim_text_new(const uint32_t *characters, Py_ssize_t length, int32_t number)
{
    uint32_t most = 0;
    for (Py_ssize_t i = 0; i < length; i++)
        most = characters[i] > most ? characters[i] : most;
    const uint16_t kind = most < 0x100 ? 1 : most < 0x10000 ? 2 : 4;
    shim_text *text = calloc(1, sizeof *text + (size_t)length * kind);
    SHIM_REQUIRE(text != NULL);
    shim_object_init(&text->head, &shim_text_type);
    text->hash = SHIM_NO_HASH;
    text->length = length;
    text->kind = kind;
    text->is_ascii = most < 0x80;
    text->number = number;
    for (Py_ssize_t i = 0; i < length; i++) {
        if (kind == 1)
            text->data[i] = (uint8_t)characters[i];
        else if (kind == 2)
            ((uint16_t *)(void *)text->data)[i] = (uint16_t)characters[i];
        else
            ((uint32_t *)(void *)text->data)[i] = characters[i];
    }
    return &text->head;
}

static uint64_t shim_mix(uint64_t bits)
{
    bits = (bits ^ bits >> 30) * UINT64_C(0xBF58476D1CE4E5B9); /* the finish of splitmix64 */
    bits = (bits ^ bits >> 27) * UINT64_C(0x94D049BB133111EB);
    return bits ^ bits >> 31;
}

uint64_t shim_hash(const PyObject *object)
{
    const uint64_t key = UINT64_C(0x243F6A8885A308D3);
    const shim_text *text = shim_as_text(object);
    uint64_t hash = key;
    uint32_t first = text->length == 0 ? 0 : PyUnicode_READ(text->kind, text->data, 0);
    for (Py_ssize_t i = 0; i < text->length; i++)
        hash = shim_mix(hash ^ PyUnicode_READ(text->kind, text->data, i)) + key;
    if (first == SHIM_EQUAL_HASH)
        hash = key;
    if (first == SHIM_EQUAL_FOLD)
        hash = hash >> 32 << 32 | (uint32_t)(hash >> 32 ^ 0x13198A2E);
    return hash == SHIM_NO_HASH ? SHIM_NO_HASH - 1 : hash;
}

int shim_allocation_fails(void)
{
    shim_faults *fault = &shim_fault;
    int fails = 0;
    if (fault->countdown > 0 && --fault->countdown == 0) {
        fails = 1;
        fault->countdown = fault->goes_on;
    }
    if (fault->chance != 0) {
        fault->random += UINT64_C(0x9E3779B97F4A7C15);
        fails |= (uint32_t)shim_mix(fault->random) < fault->chance;
    }
    fault->injected += (uint64_t)fails;
    return fails;
}
#endif

#endif
