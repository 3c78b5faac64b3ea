/* Memory accounts, deferred releases and the counters of the debug build; see platform.h. */
#include "platform.h"

#ifdef WSF_DEBUG
#include <stdio.h>
#include <stdlib.h>

int64_t wsf_live[WSF_LIVE_KINDS];

void wsf_assert_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "wsfast: %s:%d: assertion failed: %s\n", file, line, condition);
    abort();
}
#endif

void *wsf_alloc(int64_t *account, size_t size)
{
    void *memory = PyMem_Malloc(size);
    if (memory != NULL) {
        *account += (int64_t)size;
        WSF_COUNT_LIVE(WSF_LIVE_ALLOCATION, 1);
    }
    return memory;
}

void *wsf_resize(int64_t *account, void *memory, size_t old_size, size_t size)
{
    void *moved = PyMem_Realloc(memory, size);
    if (moved != NULL) {
        *account += (int64_t)size - (int64_t)old_size;
        WSF_COUNT_LIVE(WSF_LIVE_ALLOCATION, memory == NULL);
    }
    return moved;
}

void wsf_free(int64_t *account, void *memory, size_t size)
{
    if (memory == NULL)
        return;
    *account -= (int64_t)size;
    WSF_COUNT_LIVE(WSF_LIVE_ALLOCATION, -1);
    PyMem_Free(memory);
}

void wsf_trash_add(wsf_trash *trash, PyObject *object)
{
    const size_t direct = sizeof trash->first / sizeof *trash->first;
    if (object == NULL)
        return;
    if (trash->used < direct) {
        trash->first[trash->used++] = object;
        return;
    }
    size_t spilled = trash->used - direct;
    if (spilled == trash->more_capacity) {
        size_t capacity = spilled == 0 ? 64 : 2 * spilled;
        PyObject **more = PyMem_Realloc(trash->more, capacity * sizeof *more);
        if (more == NULL) {
            /* Only names (exact str) come in such numbers, and freeing those runs no Python code. */
            Py_DECREF(object);
            return;
        }
        trash->more = more;
        trash->more_capacity = capacity;
    }
    trash->more[spilled] = object;
    trash->used++;
}

void wsf_trash_release(wsf_trash *trash)
{
    const size_t direct = sizeof trash->first / sizeof *trash->first;
    for (size_t i = 0; i < trash->used; i++)
        Py_DECREF(i < direct ? trash->first[i] : trash->more[i - direct]);
    PyMem_Free(trash->more);
    wsf_trash_init(trash);
}
