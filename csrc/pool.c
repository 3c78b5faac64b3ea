/* Helper threads; see pool.h. */
#include "pool.h"

#if defined(_WIN32)

struct wsf_pool {
    char unused;
};

wsf_pool *wsf_pool_new(unsigned helpers)
{
    (void)helpers;
    return PyMem_RawMalloc(sizeof(wsf_pool));
}

void wsf_pool_run(wsf_pool *pool, wsf_work work, void *argument)
{
    (void)pool;
    work(argument);
}

unsigned wsf_pool_helpers(const wsf_pool *pool)
{
    (void)pool;
    return 0;
}

void wsf_pool_free(wsf_pool *pool) { PyMem_RawFree(pool); }

#else

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

struct wsf_pool {
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t wake, idle;
    wsf_work work; /* NULL: closed */
    void *argument;
    uint64_t number;  /* of the piece of work */
    unsigned at_work; /* helpers */
    int ends;
    unsigned helpers; /* fixed */
    pid_t process;    /* that has them */
    pthread_t threads[WSF_MAX_HELPERS];
};

static void *help(void *argument)
{
    wsf_pool *pool = argument;
    uint64_t done = 0;
    pthread_mutex_lock(&pool->mutex);
    while (!pool->ends) {
        if (pool->work == NULL || pool->number == done) {
            pthread_cond_wait(&pool->wake, &pool->mutex);
            continue;
        }
        done = pool->number;
        wsf_work work = pool->work;
        void *work_argument = pool->argument;
        pool->at_work++;
        pthread_mutex_unlock(&pool->mutex);
        work(work_argument);
        pthread_mutex_lock(&pool->mutex);
        if (--pool->at_work == 0)
            pthread_cond_signal(&pool->idle);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static void start_helpers(wsf_pool *pool, unsigned helpers)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->helpers < helpers && pthread_create(&pool->threads[pool->helpers], NULL, help, pool) == 0)
        pool->helpers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

wsf_pool *wsf_pool_new(unsigned helpers)
{
    wsf_pool *pool = PyMem_RawMalloc(sizeof *pool);
    if (pool == NULL)
        return NULL;
    memset(pool, 0, sizeof *pool);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->idle, NULL);
    pool->process = getpid();
    start_helpers(pool, helpers < WSF_MAX_HELPERS ? helpers : WSF_MAX_HELPERS);
    return pool;
}

void wsf_pool_run(wsf_pool *pool, wsf_work work, void *argument)
{
    if (wsf_pool_helpers(pool) == 0) {
        work(argument);
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->work = work;
    pool->argument = argument;
    pool->number++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    work(argument);
    pthread_mutex_lock(&pool->mutex);
    pool->work = NULL;
    while (pool->at_work != 0)
        pthread_cond_wait(&pool->idle, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
}

unsigned wsf_pool_helpers(const wsf_pool *pool) { return pool->process == getpid() ? pool->helpers : 0; }

void wsf_pool_free(wsf_pool *pool)
{
    if (pool->process == getpid()) {
        pthread_mutex_lock(&pool->mutex);
        pool->ends = 1;
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
        for (unsigned i = 0; i < pool->helpers; i++)
            pthread_join(pool->threads[i], NULL);
        pthread_cond_destroy(&pool->wake);
        pthread_cond_destroy(&pool->idle);
        pthread_mutex_destroy(&pool->mutex);
    }
    PyMem_RawFree(pool);
}

#endif
