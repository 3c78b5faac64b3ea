/* What the test programs of csrc/ share: checks that end a part and name its seed, chance, memory that fails, the closing
 * account of what lives, and main. Included by the one file of a program, which defines WSF_SHIM_IMPLEMENTATION before. */
#ifndef WSF_HARNESS_H
#define WSF_HARNESS_H

#include "platform.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <unistd.h>

/* ---- checks and chance -------------------------------------------------------------------------------------------- */

static _Thread_local jmp_buf *on_failure;
static _Thread_local uint64_t current_seed, current_step;

#define CHECK(condition) ((condition) ? (void)0 : check_failed(#condition, __FILE__, __LINE__))

static _Noreturn void check_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "%s:%d: not so: %s (seed %llu, step %llu)\n", file, line, condition, (unsigned long long)current_seed,
            (unsigned long long)current_step);
    longjmp(*on_failure, 1);
}

typedef struct {
    uint64_t state;
} chance;

static uint64_t draw(chance *random)
{
    random->state += UINT64_C(0x9E3779B97F4A7C15);
    return shim_mix(random->state);
}

/* 0 to bound - 1. */
static uint32_t below(chance *random, uint32_t bound) { return (uint32_t)((draw(random) >> 32) * bound >> 32); }

static bool one_in(chance *random, uint32_t bound) { return below(random, bound) == 0; }

static void *must_alloc(size_t count, size_t size)
{
    void *memory = calloc(count == 0 ? 1 : count, size);
    SHIM_REQUIRE(memory != NULL);
    return memory;
}

/* Calls of this thread lack memory at the nth allocation, and if `goes_on` at all later ones. 0: never. */
static void inject_fault(int64_t nth, bool goes_on)
{
    shim_fault.countdown = nth;
    shim_fault.goes_on = goes_on;
    shim_fault.injected = 0;
}

/* Returns whether there was a fault. */
static bool end_faults(void)
{
    shim_fault.countdown = 0;
    return shim_fault.injected != 0;
}

/* ---- what lives --------------------------------------------------------------------------------------------------- */

/* Every counter of live objects is at zero. */
static void check_nothing_lives(void)
{
    for (int kind = 0; kind < WSF_LIVE_KINDS; kind++)
        CHECK(wsf_live[kind] == 0);
    CHECK(shim_live_objects == 0);
    CHECK(shim_live_blocks == 0);
}

/* A part that failed leaves its objects behind: let the next one begin at zero. */
static void forget_what_lives(void)
{
    memset(wsf_live, 0, sizeof wsf_live);
    shim_live_objects = shim_live_blocks = 0;
}

/* ---- main --------------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    void (*test)(uint64_t seed);
    uint32_t rounds;
} test_part;

static struct {
    unsigned passed, failed;
} outcome;
static const char *running = "";

static void run(const test_part *part, uint64_t seed, uint32_t rounds)
{
    jmp_buf failure;
    volatile uint32_t round = 0;
    running = part->name;
    on_failure = &failure;
    if (setjmp(failure) != 0) {
        (void)end_faults();
        forget_what_lives();
        outcome.failed++;
        printf("FAILED %s, seed %llu\n", part->name, (unsigned long long)(seed + round));
        return;
    }
    for (; round < rounds; round++)
        part->test(seed + round);
    outcome.passed++;
    printf("passed %s, %u rounds from seed %llu\n", part->name, (unsigned)rounds, (unsigned long long)seed);
    fflush(stdout);
}

/* An assertion of the debug build aborts: say so in the closing line too. */
static void aborted(int number)
{
    char line[160];
    (void)number;
    int length = snprintf(line, sizeof line, "FAILED %s, seed %llu, step %llu\n%u passed, %u failed\n", running,
                          (unsigned long long)current_seed, (unsigned long long)current_step, outcome.passed,
                          outcome.failed + 1);
    if (write(STDOUT_FILENO, line, (size_t)length) < 0)
        _exit(2);
    _exit(1);
}

/* PROGRAM [MULTIPLIER] [PART] [SEED]: the parts whose names begin with PART. */
static int run_parts(const test_part *parts, size_t count, int argc, char **argv)
{
    const uint32_t multiplier = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1;
    const char *only = argc > 2 ? argv[2] : "";
    const uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    signal(SIGABRT, aborted);
    for (size_t i = 0; i < count; i++)
        if (strncmp(parts[i].name, only, strlen(only)) == 0)
            run(&parts[i], seed, parts[i].rounds * (multiplier == 0 ? 1 : multiplier));
    printf("%u passed, %u failed\n", outcome.passed, outcome.failed);
    return outcome.failed != 0 || outcome.passed == 0;
}

#endif
