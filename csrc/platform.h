/* What differs between builds: the interpreter, locks, atomics, prefetch, memory, live-object counters.
 *
 * Everything below this header is plain C11 that touches Python objects in four ways only: it takes and releases
 * references, and reads the cached hash and the characters of exact `str` objects. A test that defines
 * WSF_WITHOUT_PYTHON supplies these four itself (tests/native/python_shim.h) and runs the structures under
 * sanitizers without an interpreter.
 *
 * Locks. Where the GIL exists it is the lock: every function here runs attached and never gives it up, so wsf_lock
 * is empty. On a free-threaded build it is a PyMutex. Never is more than one held, but for the queue of metadata
 * (_metadata.pyx), under whose lock that of a shard is taken.
 * Nothing that could run Python code happens under one:
 * references are taken under a lock and released after it (wsf_trash).
 */
#ifndef WSF_PLATFORM_H
#define WSF_PLATFORM_H

#ifdef WSF_WITHOUT_PYTHON
#include "python_shim.h"
#else
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ---- locks and atomics ------------------------------------------------------------------------------------- */

#ifdef Py_GIL_DISABLED
typedef PyMutex wsf_lock;
#define WSF_LOCK(lock) PyMutex_Lock(lock)
#define WSF_UNLOCK(lock) PyMutex_Unlock(lock)
#else
typedef char wsf_lock;
#define WSF_LOCK(lock) ((void)(lock))
#define WSF_UNLOCK(lock) ((void)(lock))
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
/* Aligned loads and stores of a word are atomic on every Windows target; volatile keeps the compiler from caching. */
#define WSF_LOAD32(p) (*(volatile uint32_t *)(p))
#define WSF_STORE32(p, v) (*(volatile uint32_t *)(p) = (v))
#define WSF_LOAD64(p) (*(volatile uint64_t *)(p))
#define WSF_STORE64(p, v) (*(volatile uint64_t *)(p) = (v))
#define WSF_LOAD_POINTER(p) (*(void *volatile *)(p))
#define WSF_STORE_POINTER(p, v) (*(void *volatile *)(p) = (v))
#define WSF_ADD64(p, n) ((int64_t)_InterlockedExchangeAdd64((volatile long long *)(p), (n)) + (n))
#define WSF_PUBLISH32(p, v) ((void)_InterlockedExchange((volatile long *)(p), (long)(v)))
#define WSF_OBSERVE32(p) ((uint32_t)_InterlockedOr((volatile long *)(p), 0))
#define WSF_PREFETCH(p) _mm_prefetch_or_nothing(p)
#define WSF_PREFETCH_WRITE(p) WSF_PREFETCH(p)
#if defined(_M_X64)
#define _mm_prefetch_or_nothing(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#else
#define _mm_prefetch_or_nothing(p) __prefetch(p)
#endif
static inline unsigned wsf_lowest_bit(uint64_t bits)
{
    unsigned long at;
    _BitScanForward64(&at, bits);
    return (unsigned)at;
}
#else
#define WSF_LOAD32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define WSF_STORE32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define WSF_LOAD64(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define WSF_STORE64(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define WSF_LOAD_POINTER(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define WSF_STORE_POINTER(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define WSF_ADD64(p, n) __atomic_add_fetch((p), (n), __ATOMIC_ACQ_REL)
/* Sequentially consistent: of two threads that publish one word and then observe the other's, one sees the other. */
#define WSF_PUBLISH32(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
#define WSF_OBSERVE32(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define WSF_PREFETCH(p) __builtin_prefetch((const void *)(p))
#define WSF_PREFETCH_WRITE(p) __builtin_prefetch((const void *)(p), 1)
/* Position of the lowest set bit; bits is not 0. */
static inline unsigned wsf_lowest_bit(uint64_t bits) { return (unsigned)__builtin_ctzll(bits); }
#endif

/* ---- time -------------------------------------------------------------------------------------------------- */

/* The clock of time.monotonic_ns, or -1 where only the interpreter knows how to read it. */
#if defined(__APPLE__)
#include <time.h>
static inline int64_t wsf_monotonic_ns(void) { return (int64_t)clock_gettime_nsec_np(CLOCK_UPTIME_RAW); }
#elif !defined(_WIN32)
#include <time.h>
static inline int64_t wsf_monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
#elif !defined(WSF_WITHOUT_PYTHON) && PY_VERSION_HEX >= 0x030D0000
static inline int64_t wsf_monotonic_ns(void)
{
    PyTime_t now;
    return PyTime_Monotonic(&now) < 0 ? -1 : now;
}
#else
static inline int64_t wsf_monotonic_ns(void) { return -1; }
#endif

/* ---- debug build ------------------------------------------------------------------------------------------- */

/* Live objects by kind. A debug build (WSFAST_DEBUG=1) counts them, and every test ends where it began. */
enum { WSF_LIVE_RECORD, WSF_LIVE_CORE, WSF_LIVE_BLOCK, WSF_LIVE_SET, WSF_LIVE_TAGSET, WSF_LIVE_ALLOCATION,
       WSF_LIVE_MESSAGE, WSF_LIVE_FRAME, WSF_LIVE_LINK, WSF_LIVE_LOG, WSF_LIVE_KINDS };

#ifdef WSF_DEBUG
extern int64_t wsf_live[WSF_LIVE_KINDS];
#define WSF_COUNT_LIVE(kind, n) ((void)WSF_ADD64(&wsf_live[kind], (n)))
#define WSF_ASSERT(condition) ((condition) ? (void)0 : wsf_assert_failed(#condition, __FILE__, __LINE__))
void wsf_assert_failed(const char *condition, const char *file, int line);
#else
#define WSF_COUNT_LIVE(kind, n) ((void)0)
#define WSF_ASSERT(condition) ((void)0)
#endif

/* ---- memory ------------------------------------------------------------------------------------------------ */

/* Outcomes of functions that can fail. */
enum { WSF_OK = 0, WSF_NO_MEMORY = -1 };

/* Allocations are charged to a counter of their owner, which its lock guards: Registry.__sizeof__ reports them. */
void *wsf_alloc(int64_t *account, size_t size);                                /* NULL: no memory */
void *wsf_resize(int64_t *account, void *memory, size_t old_size, size_t size); /* NULL: memory is as it was */
void wsf_free(int64_t *account, void *memory, size_t size);

/* References to release once no lock is held. Nearly always a handful; more spill to the heap. */
typedef struct {
    PyObject *first[16];
    PyObject **more;
    size_t used, more_capacity;
} wsf_trash;

static inline void wsf_trash_init(wsf_trash *trash)
{
    trash->more = NULL;
    trash->used = trash->more_capacity = 0;
}
/* object: stolen; may be NULL. */
void wsf_trash_add(wsf_trash *trash, PyObject *object);
/* Runs arbitrary Python code: hold no lock. */
void wsf_trash_release(wsf_trash *trash);

/* ---- text: exact str objects whose hash has been computed ---------------------------------------------------- */

#ifndef WSF_WITHOUT_PYTHON
static inline uint64_t wsf_text_hash(PyObject *text)
{
#ifdef Py_GIL_DISABLED
    return WSF_LOAD64((uint64_t *)&((PyASCIIObject *)text)->hash);
#else
    return (uint64_t)((PyASCIIObject *)text)->hash;
#endif
}
#endif

static inline int wsf_text_equal(PyObject *a, PyObject *b)
{
    if (a == b)
        return 1;
    if (wsf_text_hash(a) != wsf_text_hash(b) || PyUnicode_GET_LENGTH(a) != PyUnicode_GET_LENGTH(b) ||
        PyUnicode_KIND(a) != PyUnicode_KIND(b))
        return 0;
    return memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b), (size_t)PyUnicode_GET_LENGTH(a) * PyUnicode_KIND(a)) == 0;
}

/* The 32 bits of a keyed 64-bit string hash that tables use. */
static inline uint32_t wsf_fold_hash(uint64_t hash) { return (uint32_t)(hash >> 32) ^ (uint32_t)hash; }

#endif
