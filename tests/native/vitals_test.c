/* What the kernel tells of a connection, and what follows for its health, without an interpreter: vitals_test [MULTIPLIER]
 * [PART] [SEED]; see harness.h.
 *
 * Parts: facts (the kernel's structure in every length); sockets (of every kind); clock (the health clock against a list of
 * all stalls); find; random (programs with ordinary settings on a clock that only goes forward, and hostile ones); aged
 * (pings and figures that outlive what is remembered).
 *
 * The actions themselves are compared with the reference, to the bit, where there is an interpreter. What is looked at here
 * is what must hold whatever comes: of values that no kernel and no peer would send, too.
 */
#define WSF_SHIM_IMPLEMENTATION
#include "harness.h"
#include "vitals.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#if WSF_HAS_TCP_INFO
#include <linux/tcp.h>
#endif

#define LENGTH(array) (sizeof(array) / sizeof *(array))
#define MS INT64_C(1000000)
#define SECOND INT64_C(1000000000)
#define HOUR (3600 * SECOND)
#define YEAR (8766 * HOUR)

/* ---- facts -------------------------------------------------------------------------------------------------------- */

#if WSF_HAS_TCP_INFO
#define END_OF(field) (offsetof(struct tcp_info, field) + sizeof(((struct tcp_info *)0)->field))
#define FIELD(fact, field, group) \
    {offsetof(wsf_tcp_facts, fact), sizeof(((wsf_tcp_facts *)0)->fact), offsetof(struct tcp_info, field), \
     sizeof(((struct tcp_info *)0)->field), group}

/* By the kernel's own header. */
static const struct {
    size_t to, to_size, from, from_size;
    uint32_t group;
} fields[] = {
    FIELD(unacked, tcpi_unacked, WSF_KNOWS_BASE),
    FIELD(retransmits, tcpi_retransmits, WSF_KNOWS_BASE),
    FIELD(rto_us, tcpi_rto, WSF_KNOWS_BASE),
    FIELD(rtt_us, tcpi_rtt, WSF_KNOWS_BASE),
    FIELD(rttvar_us, tcpi_rttvar, WSF_KNOWS_BASE),
    FIELD(last_sent_ms, tcpi_last_data_sent, WSF_KNOWS_BASE),
    FIELD(last_ack_ms, tcpi_last_ack_recv, WSF_KNOWS_BASE),
    FIELD(notsent, tcpi_notsent_bytes, WSF_KNOWS_MIN_RTT),
    FIELD(bytes_acked, tcpi_bytes_acked, WSF_KNOWS_ACKED),
    FIELD(min_rtt_us, tcpi_min_rtt, WSF_KNOWS_MIN_RTT),
    FIELD(bytes_sent, tcpi_bytes_sent, WSF_KNOWS_BYTES),
    FIELD(bytes_retrans, tcpi_bytes_retrans, WSF_KNOWS_BYTES),
};

static uint32_t known_of(size_t size)
{
    return (size >= END_OF(tcpi_total_retrans) ? WSF_KNOWS_BASE : 0U) |
           (size >= END_OF(tcpi_bytes_acked) ? WSF_KNOWS_ACKED : 0U) |
           (size >= END_OF(tcpi_min_rtt) ? WSF_KNOWS_MIN_RTT : 0U) |
           (size >= END_OF(tcpi_bytes_retrans) ? WSF_KNOWS_BYTES : 0U);
}

static uint64_t number_at(const void *from, size_t at, size_t size)
{
    const uint8_t *bytes = (const uint8_t *)from + at;
    uint32_t word;
    uint64_t number = *bytes;
    if (size == sizeof word) {
        memcpy(&word, bytes, sizeof word);
        number = word;
    } else if (size == sizeof number) {
        memcpy(&number, bytes, sizeof number);
    }
    return number;
}

static void check_parse(const uint8_t *info, size_t size)
{
    uint8_t *copy = malloc(size); /* exactly, so that the sanitizer sees a look beyond it */
    wsf_tcp_facts facts;
    SHIM_REQUIRE(copy != NULL || size == 0);
    if (size != 0)
        memcpy(copy, info, size);
    memset(&facts, 0xAA, sizeof facts);
    wsf_tcp_facts_parse(copy, size, &facts);
    CHECK(facts.known == known_of(size));
    for (size_t i = 0; i < LENGTH(fields); i++) {
        const bool is_known = (facts.known & fields[i].group) != 0;
        CHECK(number_at(&facts, fields[i].to, fields[i].to_size) ==
              (is_known ? number_at(info, fields[i].from, fields[i].from_size) : 0));
    }
    free(copy);
}

static void test_facts(uint64_t seed)
{
    chance random = {seed};
    uint8_t info[300];
    current_seed = seed;
    for (uint32_t round = 0; round < 20; round++) {
        for (size_t i = 0; i < sizeof info; i++)
            info[i] = round == 0 ? 0xFF : (uint8_t)draw(&random);
        for (current_step = 0; current_step <= sizeof info; current_step++)
            check_parse(info, (size_t)current_step);
    }
}
#else
static void test_facts(uint64_t seed) { current_seed = seed; }
#endif

/* ---- sockets ------------------------------------------------------------------------------------------------------ */

static void open_tcp_pair(int *ends)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    SHIM_REQUIRE(listener >= 0 && bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 1) == 0);
    SHIM_REQUIRE(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    ends[0] = socket(AF_INET, SOCK_STREAM, 0);
    SHIM_REQUIRE(ends[0] >= 0 && connect(ends[0], (struct sockaddr *)&address, length) == 0);
    ends[1] = accept(listener, NULL, NULL);
    SHIM_REQUIRE(ends[1] >= 0);
    close(listener);
}

static void limit_rto_anyhow(int fd, bool is_tcp)
{
    static const uint32_t limits[] = {0, 1, 1000, 60000, 120000, 120001, INT32_MAX, UINT32_MAX};
    for (size_t i = 0; i < LENGTH(limits); i++) {
        int is_limited = wsf_tcp_limit_rto(fd, limits[i]);
        CHECK(is_limited == 0 || (is_limited == 1 && is_tcp));
    }
}

static void check_unknown(int fd)
{
    static const wsf_tcp_facts nothing;
    wsf_tcp_facts facts;
    memset(&facts, 0xAA, sizeof facts);
    wsf_tcp_facts_read(fd, &facts);
    CHECK(memcmp(&facts, &nothing, sizeof facts) == 0);
    limit_rto_anyhow(fd, false);
}

static void write_all(int fd, size_t size)
{
    static const uint8_t data[1000];
    SHIM_REQUIRE(size <= sizeof data && write(fd, data, size) == (ssize_t)size);
}

static void check_unread(int from, int to)
{
    uint8_t buffer[1000];
    struct pollfd wanted = {to, POLLIN, 0};
    CHECK(wsf_socket_unread(to) == 0);
    write_all(from, 300);
    CHECK(poll(&wanted, 1, 20000) == 1 && wsf_socket_unread(to) == 300);
    SHIM_REQUIRE(read(to, buffer, 100) == 100);
    CHECK(wsf_socket_unread(to) == 200);
    SHIM_REQUIRE(read(to, buffer, sizeof buffer) == 200);
    CHECK(wsf_socket_unread(to) == 0);
}

static void test_sockets(uint64_t seed)
{
    int tcp[2], local[2], channel[2];
    wsf_tcp_facts before, after;
    current_seed = seed;
    open_tcp_pair(tcp);
    SHIM_REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, local) == 0 && pipe(channel) == 0);
    wsf_tcp_facts_read(tcp[0], &before);
    check_unread(tcp[0], tcp[1]);
    wsf_tcp_facts_read(tcp[0], &after);
    CHECK(((before.known & WSF_KNOWS_BASE) != 0) == WSF_HAS_TCP_INFO && after.known == before.known);
    if (after.known & WSF_KNOWS_BYTES)
        CHECK(after.bytes_sent - before.bytes_sent == 300 && after.bytes_retrans <= after.bytes_sent);
    limit_rto_anyhow(tcp[0], true);
    check_unread(local[0], local[1]);
    check_unread(channel[1], channel[0]);
    for (int end = 0; end < 2; end++) {
        check_unknown(local[end]);
        check_unknown(channel[end]);
        close(tcp[end]);
        close(local[end]);
        close(channel[end]);
    }
    check_unknown(-1);
    CHECK(wsf_socket_unread(-1) == 0);
}

/* ---- settings ----------------------------------------------------------------------------------------------------- */

static wsf_health_settings usual_settings(chance *random)
{
    wsf_health_settings settings = {
        .silence_ns = SECOND * (5 + below(random, 60)),
        .timeout_ns = SECOND * (5 + below(random, 60)),
        .answer_ns = SECOND * (1 + below(random, 5)),
        .write_ns = SECOND * (1 + below(random, 10)),
        .interval_ns = SECOND * (5 + below(random, 60)),
        .interval_poor_ns = SECOND * (2 + below(random, 20)),
        .interval_min_ns = SECOND * (1 + below(random, 4)),
        .interval_learn_ns = SECOND * (1 + below(random, 20)),
        .learn_ns = SECOND * below(random, 600),
        .by_acks_ns = SECOND * below(random, 600),
        .late_ns = MS * (100 + below(random, 3000)),
        .probe_ns = SECOND * (1 + below(random, 4)),
        .prior_wait_ns = SECOND * (1 + below(random, 10)),
        .peak_half_ns = SECOND * (1 + below(random, 600)),
        .tick_ns = MS * (50 + below(random, 1000)),
        .slack_ns = MS * below(random, 200),
        .probes = below(random, 5),
        .bad_factor = 1 + below(random, 3),
        .poor_latency_us = 300000,
        .poor_loss = 50,
        .bad_loss = 200,
        .limits = {{100000, 30000, 10, 10}, {300000, 100000, 50, 50}, {1000000, 300000, 200, 200}},
        .calm = below(random, 5),
        .trace = below(random, 20),
        .risk_per_1000h = 30,
        .pings_per_h = one_in(random, 3) ? 0 : 100,
    };
    return settings;
}

static int64_t extreme_time(chance *random)
{
    static const int64_t times[] = {1, 1000, MS, SECOND, 60 * SECOND, HOUR, YEAR};
    return times[below(random, LENGTH(times))];
}

static uint32_t extreme_number(chance *random)
{
    switch (below(random, 5)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return UINT32_MAX;
    case 3: return below(random, 2000);
    default: return (uint32_t)draw(random);
    }
}

static wsf_health_settings extreme_settings(chance *random)
{
    static const double figures[] = {0, 1e-9, 1, 100, 1e18};
    wsf_health_settings settings = usual_settings(random);
    int64_t *const times[] = {
        &settings.silence_ns,        &settings.timeout_ns, &settings.answer_ns,  &settings.write_ns,
        &settings.interval_ns,       &settings.learn_ns,   &settings.by_acks_ns, &settings.interval_poor_ns,
        &settings.interval_learn_ns, &settings.late_ns,    &settings.probe_ns,   &settings.interval_min_ns,
        &settings.prior_wait_ns,     &settings.tick_ns,    &settings.slack_ns,   &settings.peak_half_ns};
    uint32_t *const numbers[] = {&settings.probes, &settings.poor_latency_us, &settings.poor_loss, &settings.bad_loss,
                                 &settings.calm};
    for (size_t i = 0; i < LENGTH(times); i++)
        if (one_in(random, 2))
            *times[i] = extreme_time(random);
    for (size_t i = 0; i < LENGTH(numbers); i++)
        if (one_in(random, 2))
            *numbers[i] = extreme_number(random);
    for (int grade = 0; grade < WSF_GRADES - 1; grade++)
        for (int measure = 0; measure < WSF_MEASURES; measure++)
            if (one_in(random, 3))
                settings.limits[grade][measure] = extreme_number(random);
    settings.bad_factor = one_in(random, 3) ? 64 : settings.bad_factor;
    settings.risk_per_1000h = figures[below(random, LENGTH(figures))];
    settings.pings_per_h = figures[below(random, LENGTH(figures))];
    return settings;
}

/* ---- the clock ---------------------------------------------------------------------------------------------------- */

enum { MOST_STALLS = 300 };

typedef struct {
    int64_t begin_ns, end_ns;
} stall;

/* All time before now_ns in which the loop was not late. */
static int64_t time_without(const stall *stalls, uint32_t count, int64_t until_ns, int64_t now_ns)
{
    int64_t late_ns = 0;
    now_ns = now_ns < until_ns ? now_ns : until_ns;
    for (uint32_t i = 0; i < count; i++)
        if (now_ns > stalls[i].begin_ns)
            late_ns += (now_ns < stalls[i].end_ns ? now_ns : stalls[i].end_ns) - stalls[i].begin_ns;
    return now_ns - late_ns;
}

static void check_clock(const wsf_health *health, const stall *stalls, uint32_t count, int64_t now_ns, chance *random)
{
    const int64_t oldest_ns = count == 0 ? 0 : stalls[count > WSF_STALLS ? count - WSF_STALLS : 0].begin_ns;
    int64_t before_ns = oldest_ns, before_h = wsf_health_at(health, oldest_ns), at_ns = oldest_ns;
    for (uint32_t i = 0; i < 40; i++, at_ns += (int64_t)(draw(random) >> 1) % (2 + (now_ns - oldest_ns) / 15)) {
        int64_t at_h = wsf_health_at(health, at_ns);
        CHECK(at_h == time_without(stalls, count, health->until_ns, at_ns));
        CHECK(at_h >= before_h && at_h - before_h <= at_ns - before_ns);
        before_ns = at_ns, before_h = at_h;
    }
    for (uint32_t i = count > WSF_STALLS ? count - WSF_STALLS : 0; i < count; i++)
        for (int64_t aside = -1; aside <= 1; aside++) {
            CHECK(wsf_health_at(health, stalls[i].begin_ns + aside) ==
                  time_without(stalls, count, health->until_ns, stalls[i].begin_ns + aside));
            CHECK(wsf_health_at(health, stalls[i].end_ns + aside) ==
                  time_without(stalls, count, health->until_ns, stalls[i].end_ns + aside));
        }
}

static void run_clock(uint64_t seed)
{
    chance random = {seed};
    wsf_health *health = must_alloc(1, sizeof *health);
    static stall stalls[MOST_STALLS];
    uint32_t count = 0;
    int64_t now_ns = 1 + (int64_t)below(&random, UINT32_MAX), until_ns;
    const wsf_health_settings settings = one_in(&random, 2) ? extreme_settings(&random) : usual_settings(&random);
    current_seed = seed;
    wsf_health_init(health, &settings, now_ns);
    until_ns = now_ns + settings.tick_ns;
    for (current_step = 0; current_step < 600 && count < MOST_STALLS && now_ns < 90 * YEAR; current_step++) {
        int64_t before_h = wsf_health_at(health, now_ns);
        now_ns += one_in(&random, 8) ? (int64_t)(draw(&random) % (uint64_t)(5 * HOUR))
                                     : (int64_t)(draw(&random) % (uint64_t)(2 * settings.tick_ns));
        CHECK(wsf_health_at(health, now_ns) >= before_h);
        before_h = wsf_health_at(health, now_ns);
        if (one_in(&random, 3))
            continue;
        const bool is_late = now_ns - until_ns > settings.slack_ns;
        CHECK(wsf_health_tick(health, now_ns) == (is_late ? now_ns - until_ns : 0));
        if (is_late)
            stalls[count++] = (stall){until_ns, now_ns};
        until_ns = now_ns + settings.tick_ns > until_ns ? now_ns + settings.tick_ns : until_ns;
        CHECK(health->until_ns == until_ns);
        CHECK(wsf_health_at(health, now_ns) >= before_h);
        CHECK(!is_late || wsf_health_at(health, now_ns) == before_h);
        check_clock(health, stalls, count, now_ns, &random);
    }
    free(health);
}

static void test_clock(uint64_t seed)
{
    for (uint64_t i = 0; i < 40; i++)
        run_clock(seed * 40 + i);
}

/* ---- connections -------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject record;
    wsf_vitals *vitals; /* NULL: nothing is known of it */
    int64_t active_ns, byte_h;
    bool is_dead;
} patient;

typedef struct {
    chance random;
    wsf_health *health;
    patient *patients;
    uint32_t count;
    int64_t now_ns, first_ns, last_ns; /* the earliest and the latest that it ever was */
    int64_t seen_ns, seen_h;           /* when the clock was looked at, and what it said */
    bool is_hostile;
} ward;

static void admit(ward *w, patient *p)
{
    wsf_vitals *vitals = wsf_vitals_new(w->health);
    const int64_t now_h = wsf_health_at(w->health, w->now_ns);
    SHIM_REQUIRE(vitals != NULL);
    vitals->record = &p->record;
    vitals->fd = -1;
    CHECK(wsf_table_insert(&w->health->table, &w->health->account, wsf_vitals_hash(vitals), vitals, wsf_vitals_hash) ==
          WSF_OK);
    int64_t next_h = wsf_vitals_init(vitals, w->health, w->now_ns, below(&w->random, 65536));
    CHECK(next_h >= now_h && next_h <= now_h + vitals->interval_ns);
    *p = (patient){.record = p->record, .vitals = vitals, .active_ns = w->now_ns, .byte_h = now_h};
}

static void discharge(ward *w, patient *p)
{
    wsf_vitals *vitals = p->vitals;
    wsf_table_remove(&w->health->table, &w->health->account, wsf_vitals_hash(vitals), vitals, wsf_vitals_hash);
    wsf_vitals_free(vitals, w->health);
    p->vitals = NULL;
}

static ward *open_ward(uint64_t seed, uint32_t count, const wsf_health_settings *settings)
{
    ward *w = must_alloc(1, sizeof *w);
    w->random.state = seed;
    w->health = must_alloc(1, sizeof *w->health);
    w->patients = must_alloc(count, sizeof *w->patients);
    w->count = count;
    w->now_ns = w->first_ns = w->last_ns = w->seen_ns = 100 * HOUR;
    w->seen_h = INT64_MIN;
    wsf_health_init(w->health, settings, w->now_ns);
    return w;
}

static void close_ward(ward *w)
{
    for (uint32_t i = 0; i < w->count; i++)
        if (w->patients[i].vitals != NULL)
            discharge(w, &w->patients[i]);
    CHECK(w->health->account == 0 && w->health->table.used == 0);
    free(w->health);
    free(w->patients);
    free(w);
    check_nothing_lives();
}

/* ---- find --------------------------------------------------------------------------------------------------------- */

static void check_found(ward *w)
{
    PyObject **records = must_alloc(w->count, sizeof *records);
    wsf_vitals **found = must_alloc(w->count, sizeof *found);
    const uint32_t first = below(&w->random, w->count), count = below(&w->random, w->count + 1);
    for (uint32_t i = 0; i < count; i++)
        records[i] = &w->patients[(first + i) % w->count].record;
    memset(found, 0xAA, w->count * sizeof *found);
    wsf_health_find(w->health, records, count, found);
    for (uint32_t i = 0; i < count; i++)
        CHECK(found[i] == w->patients[(first + i) % w->count].vitals);
    for (uint32_t i = count; i < w->count; i++)
        CHECK((uintptr_t)found[i] == (uintptr_t)0xAAAAAAAAAAAAAAAA);
    free(records);
    free(found);
}

static void run_find(uint64_t seed, uint32_t count, uint32_t steps)
{
    chance random = {seed};
    const wsf_health_settings settings = usual_settings(&random);
    current_seed = seed;
    ward *w = open_ward(seed, count, &settings);
    uint32_t known = 0, aim = 0;
    for (current_step = 0; current_step < steps; current_step++) {
        aim = one_in(&random, 60) ? below(&random, count + 1) : aim;
        patient *p = &w->patients[below(&random, count)];
        if (p->vitals == NULL && known < aim) {
            admit(w, p);
            known++;
        } else if (p->vitals != NULL && known > aim) {
            discharge(w, p);
            known--;
        }
        CHECK(w->health->table.used == known);
        if (one_in(&random, 4))
            check_found(w);
    }
    close_ward(w);
}

static void test_find(uint64_t seed)
{
    for (uint64_t i = 0; i < 20; i++)
        run_find(seed * 20 + i, 1 + (uint32_t)i * 7, 600);
    run_find(seed, 3000, 20000);
}

/* ---- random programs ---------------------------------------------------------------------------------------------- */

static void check_clock_runs(ward *w)
{
    int64_t now_h = wsf_health_at(w->health, w->now_ns);
    CHECK(w->now_ns < w->seen_ns || now_h >= w->seen_h);
    w->seen_ns = w->now_ns;
    w->seen_h = now_h;
}

static void check_trace(const wsf_vitals *vitals, uint32_t room)
{
    uint32_t kept = vitals->trace_count < room ? vitals->trace_count : room;
    CHECK(vitals->trace_count == 0 || vitals->trace != NULL);
    for (uint32_t i = 0; i < kept; i++)
        CHECK(vitals->trace[i].what != WSF_TRACE_NOTHING && vitals->trace[i].what < WSF_TRACE_KINDS);
}

static void check_patient(ward *w, const patient *p)
{
    const wsf_vitals *vitals = p->vitals;
    const wsf_health_settings *settings = &w->health->settings;
    const int64_t longest_us = (w->last_ns - w->first_ns) / 1000 + 1;
    CHECK(vitals->state <= WSF_ENDED && vitals->grade < WSF_GRADES && vitals->link_class < WSF_CLASSES);
    CHECK((vitals->state == WSF_ENDED) == p->is_dead);
    CHECK(wsf_vitals_loss(vitals) <= 1000 && vitals->retransmitted <= 1000);
    CHECK(vitals->ping_count <= WSF_PINGS);
    CHECK(vitals->late_total <= vitals->ping_total && vitals->probes <= settings->probes);
    CHECK(vitals->last_rtt_us <= longest_us && vitals->srtt_us <= longest_us && vitals->jitter_us <= longest_us);
    CHECK(vitals->min_rtt_us <= vitals->last_rtt_us && vitals->rttvar_us <= longest_us);
    CHECK(vitals->peak_ns >= 0 && vitals->peak_ns <= w->last_ns - w->first_ns);
    CHECK(vitals->interval_ns >= settings->interval_min_ns);
    CHECK(vitals->interval_ns <= settings->interval_ns || vitals->interval_ns == settings->interval_min_ns);
    CHECK(p->is_dead || vitals->byte_h == p->byte_h);
    check_trace(vitals, settings->trace);
}

static void check_ward(ward *w)
{
    check_clock_runs(w);
    for (uint32_t i = 0; i < w->count; i++)
        if (w->patients[i].vitals != NULL)
            check_patient(w, &w->patients[i]);
    for (int c = 0; c < WSF_CLASSES; c++) {
        CHECK(w->health->wait_ns[c] >= -1 && w->health->wait_ns[c] <= WSF_WAIT_BINS * WSF_WAIT_BIN_NS);
        CHECK(w->is_hostile || w->health->watched_ns[c] >= 0);
    }
    CHECK(w->health->spent_ns >= 0 || w->is_hostile);
}

static void byte_comes(patient *p, int64_t at_h) { p->byte_h = at_h > p->byte_h ? at_h : p->byte_h; }

static void activity_is_seen(const ward *w, patient *p, int64_t active_ns)
{
    int64_t active_h = wsf_health_at(w->health, active_ns);
    if (!p->is_dead)
        byte_comes(p, active_h);
}

/* Where the clock never went back: who was heard within the silence that is allowed has not ended by silence. */
static void check_verdict(ward *w, patient *p, uint32_t found)
{
    const wsf_health_settings *settings = &w->health->settings;
    const int64_t silent_ns = wsf_health_at(w->health, w->now_ns) - p->byte_h;
    CHECK(!p->is_dead || !(found & (WSF_IS_DEAD | WSF_IS_SUSPECT | WSF_IS_CLEARED | WSF_DO_PING | WSF_PING_FAILED)));
    CHECK(!(found & WSF_IS_CLEARED) || !p->is_dead);
    if (!(found & WSF_IS_DEAD))
        return;
    CHECK(!p->is_dead && !(found & WSF_DO_PING));
    p->is_dead = true;
    uint32_t cause = p->vitals->cause;
    CHECK(cause == WSF_BY_SILENCE || cause == WSF_BY_NO_PONG);
    if (w->is_hostile)
        return;
    CHECK(cause != WSF_BY_SILENCE || wsf_vitals_silent_ns(p->vitals, w->health, w->now_ns) >= settings->silence_ns);
    if (cause == WSF_BY_SILENCE)
        CHECK(silent_ns >= settings->silence_ns);
    else
        CHECK(silent_ns >= settings->timeout_ns || silent_ns >= settings->silence_ns);
}

static wsf_tcp_facts some_facts(ward *w)
{
    chance *random = &w->random;
    wsf_tcp_facts facts = {.known = one_in(random, 3) ? 0 : 15U >> below(random, 4)};
    if (w->is_hostile && one_in(random, 2)) {
        uint8_t *bytes = (uint8_t *)&facts;
        for (size_t i = 0; i < sizeof facts; i++)
            bytes[i] = (uint8_t)(one_in(random, 3) ? 0xFF : draw(random));
        return facts;
    }
    facts.unacked = below(random, 3);
    facts.retransmits = one_in(random, 3) ? below(random, 6) : 0;
    facts.rtt_us = one_in(random, 2) ? 1U << below(random, 22) : 1;
    facts.last_sent_ms = below(random, one_in(random, 4) ? 100000 : 2000);
    facts.last_ack_ms = below(random, one_in(random, 4) ? 100000 : 2000);
    facts.bytes_acked = below(random, 3);
    facts.notsent = one_in(random, 3) ? below(random, 3) : 0;
    facts.bytes_sent = draw(random) >> below(random, 64);
    facts.bytes_retrans = facts.bytes_sent >> below(random, 10);
    return facts;
}

static void look(ward *w, patient *p)
{
    const wsf_tcp_facts facts = some_facts(w);
    const int64_t now_h = wsf_health_at(w->health, w->now_ns);
    const uint64_t pings = p->vitals->ping_total;
    int64_t next_h = INT64_MIN;
    if (wsf_vitals_is_overdue(p->vitals, w->health, w->now_ns) && one_in(&w->random, 4)) {
        uint32_t unread = one_in(&w->random, 3) ? UINT32_MAX : below(&w->random, 3);
        if (unread != 0 && unread != p->vitals->unread)
            byte_comes(p, now_h);
        wsf_vitals_unread(p->vitals, w->health, w->now_ns, unread);
    }
    activity_is_seen(w, p, p->active_ns);
    inject_fault(one_in(&w->random, 4), true);
    uint32_t found = wsf_vitals_look(p->vitals, w->health, w->now_ns, p->active_ns, &facts, &next_h);
    (void)end_faults();
    CHECK(next_h > now_h); /* nobody is looked at for ever */
    CHECK(p->vitals->ping_total == pings + ((found & WSF_DO_PING) != 0));
    CHECK(!(found & (WSF_WAS_LATE | WSF_UNASKED)));
    check_verdict(w, p, found);
}

static void pong(ward *w, patient *p)
{
    chance *random = &w->random;
    const wsf_vitals *vitals = p->vitals;
    uint32_t number = w->health->sweep - below(random, 6);
    int64_t left_ns = one_in(random, 3) ? 0 : w->now_ns - below(random, 1000) * MS, next_h = INT64_MIN;
    if (vitals->ping_count != 0 && !one_in(random, 4))
        number = vitals->pings[below(random, vitals->ping_count)];
    else if (one_in(random, 4))
        number = one_in(random, 2) ? 0 : (uint32_t)draw(random);
    if (w->is_hostile && one_in(random, 4))
        left_ns = one_in(random, 2) ? (int64_t)draw(random) : w->now_ns + HOUR;
    bool is_asked = false;
    for (int at = 0; at < vitals->ping_count; at++)
        is_asked = is_asked || (vitals->pings[at] == number && number != 0 && w->health->sweep - number < WSF_SWEEPS);
    byte_comes(p, wsf_health_at(w->health, w->now_ns));
    uint32_t found = wsf_vitals_pong(p->vitals, w->health, number, left_ns, w->now_ns, &next_h);
    CHECK(next_h > wsf_health_at(w->health, w->now_ns));
    CHECK(((found & WSF_UNASKED) != 0) == !is_asked && !(found & (WSF_IS_DEAD | WSF_DO_PING)));
    CHECK(p->is_dead || p->vitals->state != WSF_SUSPECTED);
    check_verdict(w, p, found);
}

/* However late the loop is: who is looked at then is judged as at the moment when its tick was due. */
static void stall_and_look(ward *w, patient *p)
{
    wsf_health *health = must_alloc(1, sizeof *health);
    const int64_t due_ns = w->health->until_ns, active_ns = p->active_ns < due_ns ? p->active_ns : due_ns;
    const int64_t jump_ms = 1 + w->health->settings.slack_ns / MS + below(&w->random, 5 * 3600 * 1000);
    wsf_vitals at_once = *p->vitals;
    int64_t next_h, expected_h;
    if (w->health->settings.slack_ns > HOUR || due_ns < w->now_ns || due_ns > w->now_ns + HOUR ||
        w->health->stall_count >= WSF_STALLS - 1) {
        free(health);
        return;
    }
    w->is_hostile = !w->is_hostile; /* facts that can be made older */
    wsf_tcp_facts facts = some_facts(w);
    w->is_hostile = !w->is_hostile;
    facts.last_ack_ms %= 1000000, facts.last_sent_ms %= 1000000;
    *health = *w->health;
    health->settings.trace = 0;
    uint32_t expected = wsf_vitals_look(&at_once, health, due_ns, active_ns, &facts, &expected_h);
    w->now_ns = due_ns + jump_ms * MS;
    w->last_ns = w->now_ns > w->last_ns ? w->now_ns : w->last_ns;
    CHECK(wsf_health_tick(w->health, w->now_ns) == jump_ms * MS);
    facts.last_ack_ms += (uint32_t)jump_ms, facts.last_sent_ms += (uint32_t)jump_ms;
    activity_is_seen(w, p, active_ns);
    uint32_t found = wsf_vitals_look(p->vitals, w->health, w->now_ns, active_ns, &facts, &next_h);
    CHECK(found == expected && next_h == expected_h);
    CHECK(at_once.state == p->vitals->state && at_once.grade == p->vitals->grade && at_once.byte_h == p->vitals->byte_h);
    CHECK(at_once.ack_h == p->vitals->ack_h && at_once.ping_h == p->vitals->ping_h);
    CHECK(at_once.asked_h == p->vitals->asked_h && at_once.unacked_h == p->vitals->unacked_h);
    CHECK(at_once.stuck_h == p->vitals->stuck_h && at_once.probes == p->vitals->probes);
    check_verdict(w, p, found);
    free(health);
}

static void advance(ward *w)
{
    chance *random = &w->random;
    const int64_t tick_ns = w->health->settings.tick_ns < 10 * SECOND ? w->health->settings.tick_ns : 10 * SECOND;
    w->now_ns += (int64_t)(draw(random) % (uint64_t)(2 * tick_ns));
    if (one_in(random, 30))
        w->now_ns += (int64_t)(draw(random) % (uint64_t)(3 * HOUR));
    if (w->is_hostile && one_in(random, 20))
        w->now_ns -= (int64_t)(draw(random) % (uint64_t)(one_in(random, 2) ? 10 * SECOND : 2 * HOUR));
    w->now_ns = w->now_ns < HOUR ? HOUR : w->now_ns;
    w->first_ns = w->now_ns < w->first_ns ? w->now_ns : w->first_ns;
    w->last_ns = w->now_ns > w->last_ns ? w->now_ns : w->last_ns;
}

static void some_operation_on(ward *w, patient *p)
{
    chance *random = &w->random;
    if (p->vitals == NULL) {
        admit(w, p);
        return;
    }
    switch (below(random, 12)) {
    case 0:
    case 1:
    case 2:
    case 3:
    case 4: look(w, p); return;
    case 5:
    case 6: pong(w, p); return;
    case 7:
        p->active_ns = !w->is_hostile || one_in(random, 2) ? w->now_ns : one_in(random, 2) ? w->now_ns + HOUR : 0;
        return;
    case 8: wsf_vitals_stuck(p->vitals, w->health, w->now_ns, one_in(random, 3), extreme_number(random)); return;
    case 9: stall_and_look(w, p); return;
    default:
        if (one_in(random, p->is_dead ? 4 : 60))
            discharge(w, p);
    }
}

static void run_ward(uint64_t seed, bool is_hostile)
{
    chance random = {seed};
    const wsf_health_settings settings = is_hostile ? extreme_settings(&random) : usual_settings(&random);
    current_seed = seed;
    ward *w = open_ward(seed, 1 + below(&random, 8), &settings);
    w->is_hostile = is_hostile;
    for (current_step = 0; current_step < 3000; current_step++) {
        uint32_t what = below(&w->random, 8);
        if (what < 3) {
            advance(w);
            check_clock_runs(w);
            if (!one_in(&w->random, 4))
                (void)wsf_health_tick(w->health, w->now_ns);
        } else if (what == 3) {
            w->health->sweep = one_in(&w->random, 500) ? UINT32_MAX - 2 : w->health->sweep;
            const uint32_t before = w->health->sweep, number = wsf_health_begin_sweep(w->health, w->now_ns);
            CHECK(number == w->health->sweep && number == (before == UINT32_MAX ? 1 : before + 1));
        } else {
            some_operation_on(w, &w->patients[below(&w->random, w->count)]);
        }
        check_ward(w);
    }
    close_ward(w);
}

static void test_random(uint64_t seed)
{
    for (uint64_t i = 0; i < 60; i++)
        run_ward(seed * 60 + i, i % 2 != 0);
}

/* ---- what outlives what is remembered ----------------------------------------------------------------------------- */

static void pass(ward *w, int64_t time_ns)
{
    w->now_ns += time_ns;
    w->last_ns = w->now_ns;
    (void)wsf_health_tick(w->health, w->now_ns);
}

static uint32_t look_without_kernel(ward *w, patient *p)
{
    static const wsf_tcp_facts nothing;
    int64_t next_h;
    return wsf_vitals_look(p->vitals, w->health, w->now_ns, p->active_ns, &nothing, &next_h);
}

/* A ping whose sweep is forgotten is late when a newer one is answered. */
static void run_old_ping(chance *random)
{
    wsf_health_settings settings = usual_settings(random);
    settings.tick_ns = 100 * MS;
    settings.interval_ns = settings.interval_min_ns = settings.interval_learn_ns = SECOND;
    ward *w = open_ward(1, 1, &settings);
    patient *p = w->patients;
    int64_t next_h;
    admit(w, p);
    for (uint32_t asked = 0; asked < 2; asked++) {
        for (uint32_t i = 0; i < 5; i++)
            for (uint32_t tick = 0; tick < 10; tick++)
                pass(w, 100 * MS);
        (void)wsf_health_begin_sweep(w->health, w->now_ns);
        CHECK(look_without_kernel(w, p) & WSF_DO_PING);
        for (uint32_t i = 0; asked == 0 && i < WSF_SWEEPS - 1; i++) {
            pass(w, 100 * MS);
            (void)wsf_health_begin_sweep(w->health, w->now_ns);
        }
        p->active_ns = w->now_ns;
        if (asked == 0)
            (void)look_without_kernel(w, p);
    }
    CHECK(p->vitals->ping_count == 2 && p->vitals->late_total == 0);
    CHECK(!(wsf_vitals_pong(p->vitals, w->health, p->vitals->pings[1], 0, w->now_ns, &next_h) & WSF_UNASKED));
    CHECK(p->vitals->ping_count == 0 && p->vitals->late_total == 1);
    close_ward(w);
}

/* The clock is back at a time before the ping: that tells nothing of the path. */
static void run_clock_back(chance *random)
{
    const wsf_health_settings settings = usual_settings(random);
    ward *w = open_ward(1, 1, &settings);
    patient *p = w->patients;
    int64_t next_h;
    admit(w, p);
    for (int64_t silent_ns = 0; silent_ns <= settings.silence_ns; silent_ns += settings.tick_ns)
        pass(w, settings.tick_ns);
    (void)wsf_health_begin_sweep(w->health, w->now_ns);
    CHECK(look_without_kernel(w, p) & WSF_DO_PING);
    w->now_ns -= SECOND;
    CHECK(!(wsf_vitals_pong(p->vitals, w->health, p->vitals->pings[0], 0, w->now_ns, &next_h) & WSF_UNASKED));
    CHECK(p->vitals->ping_count == 0 && p->vitals->srtt_us == 0 && p->vitals->late_total == 0);
    close_ward(w);
}

/* Connections are counted for longer than the nanoseconds of one would fit. */
static void run_long_watch(chance *random, double pings_per_h)
{
    wsf_health_settings settings = usual_settings(random);
    settings.tick_ns = YEAR;
    settings.pings_per_h = pings_per_h;
    ward *w = open_ward(1, 40, &settings);
    for (uint32_t i = 0; i < w->count; i++)
        admit(w, &w->patients[i]);
    for (uint32_t year = 0; year < 100; year++)
        for (uint32_t part = 0; part < 10; part++) {
            pass(w, YEAR / 10);
            (void)wsf_health_begin_sweep(w->health, w->now_ns);
            CHECK(w->health->spent_ns >= 0);
        }
    CHECK(pings_per_h == 0 ? w->health->risk - settings.risk_per_1000h == 0 : w->health->risk <= 1);
    close_ward(w);
}

/* Connections teach for so long that what they taught is halved, and the waits of their class follow from it. */
static void run_long_lessons(chance *random)
{
    wsf_health_settings settings = usual_settings(random);
    settings.silence_ns = 60 * SECOND;
    settings.tick_ns = settings.interval_ns = settings.interval_learn_ns = 20 * SECOND;
    settings.interval_min_ns = SECOND;
    settings.learn_ns = YEAR;
    settings.late_ns = SECOND;
    settings.pings_per_h = 1e9; /* the risk becomes as small as it may */
    ward *w = open_ward(1, 6, &settings);
    int64_t next_h, most_ns = 0;
    bool has_chosen = false;
    for (uint32_t i = 0; i < w->count; i++)
        admit(w, &w->patients[i]);
    for (uint32_t round = 0; round < 16000; round++) {
        pass(w, 18 * SECOND);
        (void)wsf_health_begin_sweep(w->health, w->now_ns);
        for (uint32_t i = 0; i < w->count; i++)
            (void)look_without_kernel(w, &w->patients[i]);
        pass(w, one_in(random, 500) ? (int64_t)below(random, 18000) * MS : MS * (1 + below(random, 4)));
        for (uint32_t i = 0; i < w->count; i++) {
            patient *p = &w->patients[i];
            if (p->vitals->ping_count != 0)
                (void)wsf_vitals_pong(p->vitals, w->health, w->health->sweep, 0, w->now_ns, &next_h);
            byte_comes(p, p->vitals->byte_h);
        }
        check_ward(w);
        most_ns = w->health->watched_ns[0] > most_ns ? w->health->watched_ns[0] : most_ns;
        has_chosen = has_chosen || w->health->wait_ns[0] >= 0;
    }
    CHECK(most_ns > 390 * HOUR && most_ns < 401 * HOUR && w->health->watched_ns[0] < most_ns && has_chosen);
    close_ward(w);
}

static void test_aged(uint64_t seed)
{
    chance random = {seed};
    current_seed = seed;
    run_old_ping(&random);
    run_clock_back(&random);
    run_long_lessons(&random);
    run_long_watch(&random, 100);
    run_long_watch(&random, 0);
}

/* ---- main --------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    static const test_part parts[] = {
        {"facts", test_facts, 1},
        {"sockets", test_sockets, 1},
        {"clock", test_clock, 1},
        {"find", test_find, 1},
        {"random", test_random, 2},
        {"aged", test_aged, 1},
    };
    return run_parts(parts, LENGTH(parts), argc, argv);
}
