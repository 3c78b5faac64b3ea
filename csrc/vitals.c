/* What follows from what is known of a connection; see vitals.h. */
#include "vitals.h"

#define MS INT64_C(1000000)
#define HOUR_NS (3600 * INT64_C(1000000000))

static void note(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t what, uint32_t value, uint32_t number);

/* ---- the clock ------------------------------------------------------------------------------------------------------------ */

void wsf_health_init(wsf_health *health, const wsf_health_settings *settings, int64_t now_ns)
{
    memset(health, 0, sizeof *health);
    health->settings = *settings;
    health->slab.piece_bytes = (sizeof(wsf_vitals) + 63) / 64 * 64;
    health->until_ns = now_ns + settings->tick_ns;
    health->counted_h = now_ns;
    health->risk = settings->risk_per_1000h;
    for (int c = 0; c < WSF_CLASSES; c++)
        health->wait_ns[c] = -1;
}

int64_t wsf_health_at(const wsf_health *health, int64_t now_ns)
{
    if (now_ns > health->until_ns)
        now_ns = health->until_ns; /* the next tick is overdue: the loop is late just now */
    for (uint32_t i = health->stall_count; i != 0; i--) {
        const wsf_stall *stall = &health->stalls[(i - 1) % WSF_STALLS];
        if (now_ns >= stall->end_ns)
            return now_ns - stall->credit_ns;
        if (now_ns > stall->begin_ns)
            return stall->end_ns - stall->credit_ns; /* as at its begin */
        if (health->stall_count - i == WSF_STALLS - 1)
            return now_ns - (stall->credit_ns - (stall->end_ns - stall->begin_ns));
    }
    return now_ns;
}

int64_t wsf_health_tick(wsf_health *health, int64_t now_ns)
{
    int64_t late_ns = now_ns - health->until_ns;
    if (late_ns > health->settings.slack_ns) {
        health->credit_ns += late_ns;
        health->stalls[health->stall_count++ % WSF_STALLS] = (wsf_stall){health->until_ns, now_ns, health->credit_ns};
    } else {
        late_ns = 0;
    }
    if (now_ns + health->settings.tick_ns > health->until_ns)
        health->until_ns = now_ns + health->settings.tick_ns;
    return late_ns;
}

/* ---- finding -------------------------------------------------------------------------------------------------------------- */

static int is_of_record(const void *vitals, const void *record) { return ((const wsf_vitals *)vitals)->record == record; }

uint32_t wsf_vitals_hash(const void *vitals) { return wsf_pointer_hash(((const wsf_vitals *)vitals)->record); }

/* How many records ahead of the search its entry is asked for, and then what that leads to. */
#define FAR_AHEAD 16
#define AHEAD 8

/* Ask for what the home of this record leads to: nearly always what is known of it. */
static void expect(const wsf_table *table, const PyObject *record)
{
    const char *vitals = wsf_entry_item(table->entries[wsf_table_home(table->capacity, wsf_pointer_hash(record))]);
    for (size_t at = 0; vitals != NULL && at < offsetof(wsf_vitals, pings); at += 64)
        WSF_PREFETCH_WRITE(vitals + at);
}

void wsf_health_find(const wsf_health *health, PyObject *const *records, size_t count, wsf_vitals **found)
{
    const wsf_table *table = &health->table;
    for (size_t i = 0; i < count; i++)
        found[i] = NULL;
    for (size_t i = 0; table->used != 0 && i < count + FAR_AHEAD; i++) {
        if (i < count)
            WSF_PREFETCH(&table->entries[wsf_table_home(table->capacity, wsf_pointer_hash(records[i]))]);
        if (i >= FAR_AHEAD - AHEAD && i - (FAR_AHEAD - AHEAD) < count)
            expect(table, records[i - (FAR_AHEAD - AHEAD)]);
        if (i >= FAR_AHEAD)
            found[i - FAR_AHEAD] =
                wsf_table_find(table, wsf_pointer_hash(records[i - FAR_AHEAD]), records[i - FAR_AHEAD], is_of_record);
    }
}

/* ---- what the classes teach ------------------------------------------------------------------------------------------------- */

static uint32_t class_of(const wsf_vitals *vitals)
{
    uint32_t found = 0;
    if (vitals->srtt_us == 0)
        return WSF_NO_CLASS;
    while (found < WSF_NO_CLASS - 1 && vitals->srtt_us >= UINT32_C(4000) << found)
        found++;
    return found;
}

/* Every 100 hours of connections the risk that is taken moves towards what the pings allow. */
static void govern(wsf_health *health)
{
    double hours = (double)health->spent_ns / HOUR_NS;
    if (hours < 100)
        return;
    if (health->settings.pings_per_h > 0) {
        health->risk *= (double)health->spent > health->settings.pings_per_h * hours ? 1.4 : 0.8;
        health->risk = health->risk < 1 ? 1 : health->risk > 1000 ? 1000 : health->risk;
    }
    health->spent = health->spent_ns = 0;
    for (int c = 0; c < WSF_CLASSES; c++)
        health->wait_ns[c] = -1;
}

/* What is old counts less: after 400 hours, half. */
static void forget_half(wsf_health *health, uint32_t link_class)
{
    if (health->watched_ns[link_class] < 400 * HOUR_NS)
        return;
    health->watched_ns[link_class] /= 2;
    for (int bin = 0; bin < WSF_WAIT_BINS; bin++)
        health->waits[link_class][bin] /= 2;
}

static void learn(wsf_health *health, uint32_t link_class, int64_t wait_ns, int64_t watched_ns)
{
    int64_t bin = wait_ns / WSF_WAIT_BIN_NS;
    health->watched_ns[link_class] += watched_ns;
    if (wait_ns >= health->settings.late_ns)
        health->waits[link_class][bin < WSF_WAIT_BINS ? bin : WSF_WAIT_BINS - 1]++;
    if ((++health->lessons & 63) == 0 || wait_ns > 2000 * MS) {
        forget_half(health, link_class);
        health->wait_ns[link_class] = -1;
    }
}

/* How long an answer may take in this class. */
static int64_t wait_of_class(wsf_health *health, uint32_t link_class)
{
    if (link_class == WSF_NO_CLASS || health->watched_ns[link_class] < 2 * HOUR_NS)
        return health->settings.prior_wait_ns;
    if (health->wait_ns[link_class] < 0) {
        double left = health->risk / 1000 * ((double)health->watched_ns[link_class] / HOUR_NS);
        int bin = WSF_WAIT_BINS - 1;
        while (bin >= 0 && (left -= health->waits[link_class][bin]) >= 0)
            bin--;
        health->wait_ns[link_class] = (bin + 1) * WSF_WAIT_BIN_NS;
    }
    return health->wait_ns[link_class];
}

/* While little is known of a class, all of its connections teach, later some. */
static int is_to_teach(wsf_health *health, uint32_t link_class)
{
    int64_t hours = health->watched_ns[link_class] / HOUR_NS;
    return health->newcomers++ % (hours < 20 ? 1 : hours < 200 ? 4 : 16) == 0;
}

/* ---- quality ------------------------------------------------------------------------------------------------------------------ */

uint32_t wsf_vitals_loss(const wsf_vitals *vitals)
{
    uint32_t late = 0;
    for (uint32_t bits = vitals->history; bits != 0; bits &= bits - 1)
        late++;
    return late * 1000 / WSF_HISTORY;
}

static void remember(wsf_vitals *vitals, int is_late)
{
    vitals->history = vitals->history << 1 | (uint32_t)is_late;
    vitals->late_total += (uint64_t)is_late;
}

static uint32_t distance(uint32_t a, uint32_t b) { return a < b ? b - a : a - b; }

/* RFC 6298, 2.2 and 2.3; RFC 3550, 6.4.1. */
static void smooth(wsf_vitals *vitals, uint32_t rtt_us)
{
    rtt_us = rtt_us == 0 ? 1 : rtt_us;
    if (vitals->srtt_us == 0) {
        vitals->srtt_us = vitals->min_rtt_us = rtt_us;
        vitals->rttvar_us = rtt_us / 2;
    } else {
        vitals->rttvar_us = (uint32_t)((3 * (uint64_t)vitals->rttvar_us + distance(vitals->srtt_us, rtt_us)) / 4);
        vitals->srtt_us = (uint32_t)((7 * (uint64_t)vitals->srtt_us + rtt_us) / 8);
        vitals->srtt_us = vitals->srtt_us == 0 ? 1 : vitals->srtt_us;
        vitals->jitter_us = (uint32_t)((15 * (uint64_t)vitals->jitter_us + distance(vitals->last_rtt_us, rtt_us)) / 16);
        vitals->min_rtt_us = rtt_us < vitals->min_rtt_us ? rtt_us : vitals->min_rtt_us;
    }
    vitals->last_rtt_us = rtt_us;
}

/* The worst grade whose limits, of which `tenths` are used, a measure is above. */
static uint8_t grade_by(const wsf_vitals *vitals, const wsf_health_settings *settings, uint32_t tenths)
{
    const uint64_t measures[WSF_MEASURES] = {vitals->srtt_us, vitals->jitter_us, wsf_vitals_loss(vitals),
                                             vitals->retransmitted};
    if (vitals->state == WSF_SUSPECTED)
        return WSF_BAD;
    for (uint8_t grade = WSF_BAD; grade > WSF_GOOD; grade--)
        for (int measure = 0; measure < WSF_MEASURES; measure++)
            if (measures[measure] * 10 > (uint64_t)settings->limits[grade - 1][measure] * tenths)
                return grade;
    return WSF_GOOD;
}

/* Worse at once; better by one, when all measures have been well below the limits for a while. */
static uint32_t judge(wsf_vitals *vitals, wsf_health *health, int64_t now_ns)
{
    uint8_t before = vitals->grade, worst = grade_by(vitals, &health->settings, 10);
    if (worst > before) {
        vitals->grade = worst;
        vitals->calm = 0;
    } else if (grade_by(vitals, &health->settings, 8) >= before) {
        vitals->calm = 0;
    } else if (++vitals->calm >= health->settings.calm) {
        vitals->grade--;
        vitals->calm = 0;
    }
    if (vitals->grade == before)
        return 0;
    vitals->former_grade = before;
    note(vitals, health, now_ns, WSF_TRACE_GRADE, vitals->grade, 0);
    return WSF_NEW_GRADE;
}

/* ---- the plan ------------------------------------------------------------------------------------------------------------------ */

static int64_t late_after_ns(const wsf_vitals *vitals, const wsf_health *health)
{
    int64_t expected_ns = ((int64_t)vitals->srtt_us + 4 * (int64_t)vitals->rttvar_us) * 1000;
    return expected_ns > health->settings.late_ns ? expected_ns : health->settings.late_ns;
}

/* Its own longest wait, which counts half after each half-life. */
static int64_t peak_ns(wsf_vitals *vitals, const wsf_health *health, int64_t now_h)
{
    int64_t halves = (now_h - vitals->peak_h) / health->settings.peak_half_ns;
    if (halves > 0) {
        vitals->peak_ns = halves < 63 ? vitals->peak_ns >> halves : 0;
        vitals->peak_h += halves * health->settings.peak_half_ns;
    }
    return vitals->peak_ns;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static void plan(wsf_vitals *vitals, wsf_health *health, int64_t now_h)
{
    const wsf_health_settings *settings = &health->settings;
    uint32_t loss = wsf_vitals_loss(vitals);
    int64_t wait_ns = peak_ns(vitals, health, now_h) * 3 / 2 +
                      ((int64_t)vitals->srtt_us + 4 * (int64_t)vitals->rttvar_us) * 1000;
    int64_t longest_ns = settings->interval_ns;
    vitals->link_class = (uint8_t)class_of(vitals);
    wait_ns = most(wait_ns, wait_of_class(health, vitals->link_class));
    if (loss > settings->poor_loss || vitals->srtt_us > settings->poor_latency_us)
        longest_ns = least(longest_ns, settings->interval_poor_ns);
    if (vitals->teaches && now_h - vitals->born_h < settings->learn_ns)
        longest_ns = least(longest_ns, settings->interval_learn_ns);
    vitals->interval_ns = most(least(settings->silence_ns - wait_ns, longest_ns), settings->interval_min_ns);
}

int64_t wsf_vitals_init(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t chance)
{
    int64_t now_h = wsf_health_at(health, now_ns);
    vitals->born_h = vitals->byte_h = vitals->ack_h = vitals->learned_h = vitals->peak_h = vitals->asked_h = now_h;
    vitals->credit_ns = health->credit_ns;
    plan(vitals, health, now_h);
    vitals->first_h = now_h + vitals->interval_ns / 65536 * chance;
    return vitals->first_h;
}

/* ---- signs of life ------------------------------------------------------------------------------------------------------------- */

static void take_byte(wsf_vitals *vitals, int64_t at_h)
{
    vitals->byte_h = most(vitals->byte_h, at_h);
    if (vitals->ping_h != 0 && vitals->byte_h >= vitals->ping_h)
        vitals->ping_h = 0;
}

/* Neither in doubt nor dead. */
static uint32_t clear(wsf_vitals *vitals, wsf_health *health, int64_t now_ns)
{
    int was_suspect = vitals->state == WSF_SUSPECTED;
    vitals->state = vitals->ping_h != 0 ? WSF_ASKED : WSF_QUIET;
    vitals->probes = 0;
    if (!was_suspect)
        return 0;
    note(vitals, health, now_ns, WSF_TRACE_CLEARED, 0, 0);
    return WSF_IS_CLEARED | judge(vitals, health, now_ns);
}

static uint32_t share(uint64_t part, uint64_t whole) { return part >= whole ? 1000 : (uint32_t)(part * 1000 / whole); }

/* What the kernel knows. A proxy's kernel answers sooner than the peer itself: then it tells nothing of the peer's life. */
static int is_believable(const wsf_vitals *vitals, const wsf_tcp_facts *facts)
{
    uint64_t factor = vitals->trusts_kernel ? 8 : 4;
    return (facts->known & WSF_KNOWS_BASE) && vitals->srtt_us != 0 &&
           vitals->min_rtt_us <= factor * ((uint64_t)facts->rtt_us + 5000);
}

static void read_kernel(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, const wsf_tcp_facts *facts)
{
    int trusted = vitals->trusts_kernel;
    vitals->trusts_kernel = (uint8_t)is_believable(vitals, facts);
    if (trusted && !vitals->trusts_kernel)
        vitals->doubted_h = wsf_health_at(health, now_ns);
    if (!(facts->known & WSF_KNOWS_BASE))
        return;
    vitals->kernel_rtt_us = facts->rtt_us;
    vitals->unacked = facts->unacked;
    if ((facts->known & WSF_KNOWS_MIN_RTT) && facts->notsent != 0 && facts->bytes_acked != vitals->seen_acked)
        vitals->behind_h = wsf_health_at(health, now_ns);
    vitals->seen_acked = facts->bytes_acked;
    if (facts->known & WSF_KNOWS_BYTES) {
        uint64_t sent = facts->bytes_sent - vitals->bytes_sent, again = facts->bytes_retrans - vitals->bytes_retrans;
        if (facts->bytes_sent > vitals->bytes_sent)
            vitals->retransmitted = (7 * vitals->retransmitted + share(again, sent)) / 8;
        vitals->bytes_sent = facts->bytes_sent;
        vitals->bytes_retrans = facts->bytes_retrans;
    }
    if (!vitals->trusts_kernel)
        return;
    vitals->ack_h = most(vitals->ack_h, wsf_health_at(health, now_ns - facts->last_ack_ms * MS));
    if (facts->unacked == 0)
        vitals->unacked_h = 0;
    else if (vitals->unacked_h == 0 || vitals->ack_h > vitals->unacked_h)
        vitals->unacked_h = wsf_health_at(health, now_ns - facts->last_sent_ms * MS);
}

/* ---- looking ------------------------------------------------------------------------------------------------------------------- */

#define NOTHING INT64_MAX

static int64_t last_sign_h(const wsf_vitals *vitals)
{
    return vitals->trusts_kernel ? most(vitals->byte_h, vitals->ack_h) : vitals->byte_h;
}

int64_t wsf_vitals_silent_ns(const wsf_vitals *vitals, const wsf_health *health, int64_t now_ns)
{
    return wsf_health_at(health, now_ns) - last_sign_h(vitals);
}

/* The path has carried something since the ping. What is on its way besides is a question of its own. */
static int is_acknowledged(const wsf_vitals *vitals)
{
    return vitals->trusts_kernel && vitals->ack_h >= vitals->ping_h;
}

/* Whether something of ours is not acknowledged in time. */
static int is_unacknowledged(const wsf_vitals *vitals, const wsf_health *health, int64_t now_h, const wsf_tcp_facts *facts)
{
    return vitals->trusts_kernel && vitals->unacked_h != 0 &&
           (facts->retransmits >= 2 || now_h - vitals->unacked_h > late_after_ns(vitals, health));
}

/* Since when the path is in question, or NOTHING. */
static int64_t in_question_since_h(const wsf_vitals *vitals, const wsf_health *health, int64_t now_h,
                                   const wsf_tcp_facts *facts)
{
    int64_t since_h = is_unacknowledged(vitals, health, now_h, facts) ? vitals->unacked_h : NOTHING;
    if (vitals->ping_h != 0 && !is_acknowledged(vitals))
        since_h = least(since_h, most(vitals->ping_h, most(vitals->doubted_h, vitals->behind_h)));
    return since_h;
}

static void forget_pings(wsf_vitals *vitals, int count)
{
    vitals->ping_count = (uint8_t)(vitals->ping_count - count);
    vitals->counted = (uint8_t)(vitals->counted >> count);
    memmove(vitals->pings, vitals->pings + count, vitals->ping_count * sizeof *vitals->pings);
}

/* A ping goes out now: with the sweep that has begun. Of one slow spell, the probes do not count as late pings again. */
static uint32_t ask(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int64_t now_h, int is_probe)
{
    if (vitals->ping_count == WSF_PINGS) { /* the oldest will not be answered any more */
        if (!(vitals->counted & 1))
            remember(vitals, 1);
        forget_pings(vitals, 1);
    }
    vitals->counted |= (uint8_t)(is_probe << vitals->ping_count);
    vitals->pings[vitals->ping_count++] = health->sweep;
    vitals->asked_h = now_h;
    if (vitals->ping_h == 0)
        vitals->ping_h = now_h;
    vitals->ping_total++;
    health->spent++;
    note(vitals, health, now_ns, WSF_TRACE_PING, 0, health->sweep);
    return WSF_DO_PING;
}

static uint32_t suspect(wsf_vitals *vitals, wsf_health *health, int64_t now_ns)
{
    if (vitals->state == WSF_SUSPECTED)
        return 0;
    vitals->state = WSF_SUSPECTED;
    vitals->probes = 0;
    for (int at = 0; at < vitals->ping_count; at++)
        if (!(vitals->counted >> at & 1))
            remember(vitals, 1);
    vitals->counted = (uint8_t)((1 << vitals->ping_count) - 1);
    note(vitals, health, now_ns, WSF_TRACE_SUSPECT, (uint32_t)(wsf_vitals_silent_ns(vitals, health, now_ns) / MS), 0);
    return WSF_IS_SUSPECT | judge(vitals, health, now_ns);
}

static uint32_t end(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t cause)
{
    uint32_t found = suspect(vitals, health, now_ns);
    vitals->state = WSF_ENDED;
    vitals->cause = (uint8_t)cause;
    note(vitals, health, now_ns, WSF_TRACE_DEAD, cause, 0);
    return found | WSF_IS_DEAD;
}

/* What is missed may lie among what we have not read. */
static int is_to_blame(const wsf_vitals *vitals, int64_t since_h)
{
    return vitals->unread == 0 || (vitals->trusts_kernel && since_h == vitals->unacked_h);
}

/* In doubt since since_h: dead at dead_h, suspect as soon as an answer is late, and asked again then. */
static uint32_t doubt(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int64_t since_h, int64_t dead_h,
                      uint32_t cause, int64_t *next_h)
{
    const wsf_health_settings *settings = &health->settings;
    int64_t now_h = wsf_health_at(health, now_ns), late_h = since_h + late_after_ns(vitals, health);
    uint32_t found;
    if (!is_to_blame(vitals, since_h))
        dead_h = most(dead_h, now_h + 1);
    if (now_h >= dead_h)
        return end(vitals, health, now_ns, cause);
    if (now_h < late_h) {
        if (vitals->state != WSF_SUSPECTED)
            vitals->state = WSF_ASKED;
        *next_h = least(*next_h, least(late_h, dead_h));
        return 0;
    }
    found = suspect(vitals, health, now_ns);
    if (vitals->probes < settings->probes && !vitals->is_stuck &&
        (found || now_h - vitals->asked_h >= settings->probe_ns)) {
        vitals->probes++;
        found |= ask(vitals, health, now_ns, now_h, 1);
    }
    *next_h = least(*next_h, is_to_blame(vitals, since_h) ? least(dead_h, now_h + settings->probe_ns)
                                                          : now_h + settings->probe_ns);
    return found;
}

/* A ping of ours waits to leave: it is no question yet. It ends the connection only if the peer takes nothing at all. */
static uint32_t look_at_stuck(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, const wsf_tcp_facts *facts,
                              int64_t timeout_ns, int64_t *next_h)
{
    int64_t now_h = wsf_health_at(health, now_ns), dead_h;
    uint32_t found = 0;
    if (facts->known & WSF_KNOWS_ACKED) {
        if (facts->bytes_acked != vitals->bytes_acked)
            vitals->stuck_h = now_h;
        vitals->bytes_acked = facts->bytes_acked;
    }
    dead_h = most(vitals->stuck_h, vitals->byte_h) + timeout_ns;
    if (!vitals->has_reported_stuck && now_h - vitals->asked_h >= health->settings.write_ns) {
        vitals->has_reported_stuck = 1;
        found = WSF_PING_FAILED;
        found |= suspect(vitals, health, now_ns);
    }
    if (vitals->unread != 0)
        dead_h = NOTHING; /* each may wait for the other to read */
    if (now_h >= dead_h)
        return found | end(vitals, health, now_ns, WSF_BY_NO_PONG);
    *next_h = least(*next_h, least(dead_h, vitals->has_reported_stuck ? now_h + health->settings.write_ns
                                                                      : vitals->asked_h + health->settings.write_ns));
    return found;
}

uint32_t wsf_vitals_look(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int64_t active_ns,
                         const wsf_tcp_facts *facts, int64_t *next_h)
{
    const wsf_health_settings *settings = &health->settings;
    int64_t now_h = wsf_health_at(health, now_ns), since_h, due_h;
    int64_t factor = wsf_vitals_loss(vitals) > settings->bad_loss ? settings->bad_factor : 1;
    uint32_t found = 0;
    *next_h = now_h + settings->silence_ns;
    if (vitals->state == WSF_ENDED)
        return 0;
    if (health->credit_ns != vitals->credit_ns) {
        note(vitals, health, now_ns, WSF_TRACE_LAG, (uint32_t)((health->credit_ns - vitals->credit_ns) / MS), 0);
        vitals->credit_ns = health->credit_ns;
    }
    read_kernel(vitals, health, now_ns, facts);
    active_ns = wsf_health_at(health, active_ns);
    if (active_ns > vitals->byte_h) {
        take_byte(vitals, active_ns);
        if (!is_unacknowledged(vitals, health, now_h, facts)) /* or it would be suspect again at once */
            found = clear(vitals, health, now_ns);
    }
    if (vitals->is_stuck) {
        found |= look_at_stuck(vitals, health, now_ns, facts, factor * settings->timeout_ns, next_h);
        if (vitals->state == WSF_ENDED)
            return found;
    }
    since_h = in_question_since_h(vitals, health, now_h, facts);
    if (since_h != NOTHING)
        return found | doubt(vitals, health, now_ns, since_h,
                             most(last_sign_h(vitals) + factor * settings->silence_ns, since_h + settings->answer_ns),
                             WSF_BY_SILENCE, next_h);
    if (vitals->ping_h != 0) {
        since_h = most(vitals->ping_h, vitals->behind_h);
        return found | doubt(vitals, health, now_ns, since_h, since_h + factor * settings->timeout_ns, WSF_BY_NO_PONG,
                             next_h);
    }
    if (vitals->is_stuck)
        return found;
    found |= clear(vitals, health, now_ns);
    due_h = last_sign_h(vitals) + vitals->interval_ns;
    due_h = least(due_h, vitals->byte_h + most(settings->by_acks_ns, vitals->interval_ns));
    if (vitals->ping_total == 0 && vitals->byte_h == vitals->born_h)
        due_h = vitals->first_h;
    if (now_h < due_h) {
        *next_h = due_h;
        return found & WSF_IS_CLEARED ? found : found | judge(vitals, health, now_ns);
    }
    found |= ask(vitals, health, now_ns, now_h, 0);
    vitals->state = WSF_ASKED;
    *next_h = now_h + late_after_ns(vitals, health);
    return found;
}

void wsf_vitals_rest(wsf_vitals *vitals, wsf_health *health, int64_t now_ns)
{
    vitals->byte_h = most(vitals->byte_h, wsf_health_at(health, now_ns));
    vitals->ping_h = 0;
    vitals->state = WSF_QUIET;
    forget_pings(vitals, vitals->ping_count);
}

int wsf_vitals_is_overdue(const wsf_vitals *vitals, const wsf_health *health, int64_t now_ns)
{
    return vitals->state == WSF_SUSPECTED || vitals->is_stuck || (vitals->trusts_kernel && vitals->unacked_h != 0) ||
           (vitals->ping_h != 0 &&
            wsf_health_at(health, now_ns) - vitals->ping_h >= late_after_ns(vitals, health));
}

void wsf_vitals_unread(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t unread)
{
    uint32_t before = vitals->unread;
    vitals->unread = unread;
    if (unread == 0 || unread == before)
        return;
    note(vitals, health, now_ns, WSF_TRACE_UNREAD, unread, 0);
    take_byte(vitals, wsf_health_at(health, now_ns));
}

/* ---- pongs --------------------------------------------------------------------------------------------------------------------- */

static int is_remembered(const wsf_health *health, uint32_t number)
{
    return number != 0 && health->sweep - number < WSF_SWEEPS;
}

static int64_t sweep_at_ns(const wsf_health *health, uint32_t number) { return health->sweep_ns[number % WSF_SWEEPS]; }

/* The place of this ping among those that may be answered, or -1. */
static int find_ping(const wsf_vitals *vitals, const wsf_health *health, uint32_t number)
{
    if (!is_remembered(health, number))
        return -1;
    for (int at = 0; at < vitals->ping_count; at++)
        if (vitals->pings[at] == number)
            return at;
    return -1;
}

/* A pong answers its ping and all before it (RFC 6455, 5.5.3). */
static void settle_pings(wsf_vitals *vitals, wsf_health *health, int answered, int64_t now_h, int is_late)
{
    for (int at = 0; at < answered; at++)
        if (!(vitals->counted >> at & 1))
            remember(vitals, !is_remembered(health, vitals->pings[at]) ||
                             now_h - wsf_health_at(health, sweep_at_ns(health, vitals->pings[at])) >
                                 late_after_ns(vitals, health));
    if (!(vitals->counted >> answered & 1))
        remember(vitals, is_late);
    forget_pings(vitals, answered + 1);
}

static void answer_in_trace(wsf_vitals *vitals, const wsf_health *health, uint32_t number, int is_late, uint32_t rtt_us)
{
    uint32_t room = health->settings.trace, kept = vitals->trace_count < room ? vitals->trace_count : room;
    for (uint32_t back = 1; vitals->trace != NULL && back <= kept; back++) {
        wsf_trace_entry *entry = &vitals->trace[(vitals->trace_count - back) % room];
        if (entry->what == WSF_TRACE_PING && entry->number == (uint16_t)number) {
            entry->what = is_late ? WSF_TRACE_LATE : WSF_TRACE_PONG;
            entry->value = rtt_us;
            return;
        }
    }
}

/* A newer ping may still be waiting to leave. */
static int64_t next_after_pong_h(const wsf_vitals *vitals, const wsf_health *health, int64_t now_h)
{
    int64_t next_h = now_h + vitals->interval_ns;
    if (!vitals->is_stuck)
        return next_h;
    return most(now_h + 1, least(next_h, vitals->asked_h + health->settings.write_ns));
}

uint32_t wsf_vitals_pong(wsf_vitals *vitals, wsf_health *health, uint32_t number, int64_t left_ns, int64_t now_ns,
                         int64_t *next_h)
{
    int64_t now_h = wsf_health_at(health, now_ns), heard_h = vitals->byte_h, begun_ns, wait_h;
    int at = find_ping(vitals, health, number), is_late, is_clean, is_news;
    uint32_t found, rtt_us;
    take_byte(vitals, now_h);
    if (at < 0) {
        found = vitals->state == WSF_ENDED ? 0 : clear(vitals, health, now_ns);
        *next_h = next_after_pong_h(vitals, health, now_h);
        return found | WSF_UNASKED;
    }
    begun_ns = sweep_at_ns(health, number);
    if (at == vitals->ping_count - 1)
        begun_ns = most(begun_ns, least(left_ns, now_ns));
    wait_h = most(now_h - wsf_health_at(health, begun_ns), 0); /* less, where the clock has gone back: then it is not clean */
    is_clean = wait_h == now_ns - begun_ns; /* our own loop was not late meanwhile */
    is_late = wait_h > late_after_ns(vitals, health);
    rtt_us = wait_h / 1000 < UINT32_MAX ? (uint32_t)(wait_h / 1000) : UINT32_MAX;
    settle_pings(vitals, health, at, now_h, is_late);
    answer_in_trace(vitals, health, number, is_late, rtt_us);
    /* Of several late answers that come together, the first has said it. */
    is_news = !is_late || wsf_health_at(health, begun_ns) > heard_h;
    if (is_news)
        vitals->late_in_a_row = !is_late ? 0 : vitals->late_in_a_row < 255 ? vitals->late_in_a_row + 1 : 255;
    if (is_clean && is_news && (!is_late || vitals->late_in_a_row >= 3)) {
        int is_first = vitals->srtt_us == 0;
        smooth(vitals, rtt_us);
        if (is_first)
            vitals->teaches = (uint8_t)is_to_teach(health, class_of(vitals));
    }
    if (is_late) {
        vitals->peak_ns = most(wait_h, peak_ns(vitals, health, now_h));
        vitals->peak_h = now_h;
    }
    if (vitals->teaches && is_news && vitals->interval_ns <= health->settings.interval_learn_ns)
        learn(health, class_of(vitals), wait_h, least(now_h - vitals->learned_h, 4 * vitals->interval_ns));
    vitals->learned_h = now_h;
    found = vitals->state == WSF_ENDED ? 0 : clear(vitals, health, now_ns);
    plan(vitals, health, now_h);
    if (is_news && !(found & WSF_IS_CLEARED)) /* by which it has been judged */
        found |= judge(vitals, health, now_ns);
    *next_h = next_after_pong_h(vitals, health, now_h);
    return found | (is_late ? WSF_WAS_LATE : 0);
}

void wsf_vitals_stuck(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int is_stuck, uint32_t bytes)
{
    int64_t now_h = wsf_health_at(health, now_ns);
    if (is_stuck && bytes < vitals->stuck_bytes)
        vitals->stuck_h = now_h;
    vitals->stuck_bytes = bytes;
    if (vitals->is_stuck == is_stuck)
        return;
    vitals->is_stuck = (uint8_t)is_stuck;
    vitals->has_reported_stuck = 0;
    if (is_stuck) {
        vitals->stuck_h = now_h;
        vitals->ping_h = 0;
        note(vitals, health, now_ns, WSF_TRACE_STUCK, bytes, 0);
    } else {
        vitals->ping_h = now_h;
        note(vitals, health, now_ns, WSF_TRACE_LEFT, (uint32_t)((now_h - vitals->asked_h) / MS), 0);
    }
}

uint32_t wsf_health_begin_sweep(wsf_health *health, int64_t now_ns)
{
    int64_t now_h = wsf_health_at(health, now_ns);
    health->spent_ns += (int64_t)health->table.used * (now_h - health->counted_h);
    health->counted_h = now_h;
    govern(health);
    if (++health->sweep == 0)
        health->sweep = 1;
    health->sweep_ns[health->sweep % WSF_SWEEPS] = now_ns;
    return health->sweep;
}

/* ---- traces -------------------------------------------------------------------------------------------------------------------- */

static void note(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t what, uint32_t value, uint32_t number)
{
    uint32_t room = health->settings.trace;
    if (room == 0)
        return;
    if (vitals->trace == NULL) {
        vitals->trace = wsf_alloc(&health->account, room * sizeof *vitals->trace);
        if (vitals->trace == NULL)
            return;
        memset(vitals->trace, 0, room * sizeof *vitals->trace);
    }
    wsf_trace_entry *last = &vitals->trace[(vitals->trace_count - 1) % room];
    if (what == WSF_TRACE_LAG && vitals->trace_count != 0 && last->what == WSF_TRACE_LAG) {
        last->value += value;
        last->at_ns = now_ns;
        return;
    }
    vitals->trace[vitals->trace_count++ % room] = (wsf_trace_entry){now_ns, value, (uint16_t)what, (uint16_t)number};
}

/* ---- memory ---------------------------------------------------------------------------------------------------------------------- */

wsf_vitals *wsf_vitals_new(wsf_health *health)
{
    wsf_vitals *vitals = wsf_slab_take(&health->slab, &health->account);
    if (vitals != NULL)
        memset(vitals, 0, sizeof *vitals);
    return vitals;
}

void wsf_vitals_free(wsf_vitals *vitals, wsf_health *health)
{
    wsf_free(&health->account, vitals->trace, health->settings.trace * sizeof *vitals->trace);
    wsf_slab_give(&health->slab, &health->account, vitals);
}
