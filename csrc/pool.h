/* A few threads that help the caller with one piece of work at a time, and are never waited for in vain.
 *
 * A helper that has not woken up by the time the work is done is not waited for: it finds the work closed. So on a busy
 * machine the caller does all of it alone, no later than without a pool.
 *
 * Helpers block all signals, touch no Python object and hold no thread state. Where there are no POSIX threads, and in a
 * process that was forked after the start, the pool has no helpers.
 */
#ifndef WSF_POOL_H
#define WSF_POOL_H

#include "platform.h"

#define WSF_MAX_HELPERS 15

typedef void (*wsf_work)(void *argument);
typedef struct wsf_pool wsf_pool;

/* Up to this many helpers; fewer if the system refuses more. NULL: no memory. */
wsf_pool *wsf_pool_new(unsigned helpers);
/* work(argument) on the caller's thread and on each helper that is free, side by side; returns when all have returned.
 * One call at a time. */
void wsf_pool_run(wsf_pool *pool, wsf_work work, void *argument);
unsigned wsf_pool_helpers(const wsf_pool *pool);
/* Wait for the helpers to end. */
void wsf_pool_free(wsf_pool *pool);

#endif
