/* Messages on their way out, and their frames (RFC 6455, 5.2): encoded once, shared by every outbox that holds them.
 *
 * A message is what one call sends to any number of connections. It has a frame for each variant that a target needs:
 * plain, or deflated in the way that some connections negotiated. Server frames are not masked, so a frame is the same
 * bytes for all of them. The message also keeps the tally of what became of it: each target is in exactly one of
 * pending, sent, queued, dropped, failed and away.
 *
 * Both are counted references in memory that is not the interpreter's. A frame keeps its message; whoever makes a frame
 * owns one reference to it. Their size is charged to an account for as long as they live, which must be as long as the
 * account does.
 *
 * Threads: counts and the account are atomic; the tally is the event loop's.
 */
#ifndef WSF_FRAME_H
#define WSF_FRAME_H

#include "platform.h"

enum { WSF_TEXT = 1, WSF_BINARY = 2, WSF_PING = 9 }; /* opcodes */
#define WSF_RSV1 0x40
#define WSF_MAX_HEADER 10

typedef struct {
    uint32_t targets; /* the sum of pending, sent, queued, dropped, failed and away */
    uint32_t pending; /* to be sent at the next flush */
    uint32_t sent;    /* taken by the kernel as a whole */
    uint32_t queued;  /* waits for a peer that is slow, here or in the transport */
    uint32_t dropped;
    uint32_t failed;
    uint32_t displaced;    /* older messages that were dropped or replaced to make room for this one */
    uint32_t disconnected; /* connections that were given up when this one came; they are in `dropped`, or in `away` */
    uint32_t away;         /* is kept for a client that is not there now, or that has not caught up */
} wsf_tally;

typedef struct wsf_message {
    int64_t references;
    int64_t *account;
    int64_t created_ns;
    PyObject *key;         /* owned, exact str, hash computed; NULL: has none. See wsf_outbox_find */
    uint64_t payload_size; /* as the application sees it: before compression */
    wsf_tally tally;
    PyObject *waiter;           /* owned: who waits until nothing is pending; NULL: nobody. Its owner's business */
    struct wsf_message *next; /* see wsf_fanout.decided */
    /* Where it is in a log; see backlog.h. A number of 0: nowhere. */
    struct wsf_log *log; /* borrowed while its number is not behind */
    uint64_t log_place, log_number;
} wsf_message;

typedef struct {
    int64_t references;
    wsf_message *message; /* owned */
    PyObject *bytes;      /* owned: all of data as an object, see wsf_frame_keep; NULL until somebody needs that */
    size_t size;          /* of data */
    uint32_t header_size;
    uint8_t data[];
} wsf_frame;

/* key: exact str with its hash computed, or NULL; a reference is taken. NULL: no memory. */
wsf_message *wsf_message_new(int64_t *account, int64_t created_ns, PyObject *key, uint64_t payload_size);
void wsf_message_release(wsf_message *message);
static inline wsf_message *wsf_message_retain(wsf_message *message)
{
    (void)WSF_ADD64(&message->references, 1);
    return message;
}

/* A frame with FIN set. first_bits: the opcode, and WSF_RSV1 if the payload is deflated. The payload is copied. NULL: no
 * memory. */
wsf_frame *wsf_frame_new(wsf_message *message, uint8_t first_bits, const void *payload, size_t size);
void wsf_frame_free(wsf_frame *frame);
/* Keep this object in `bytes`. A reference is taken, and its size charged. */
void wsf_frame_keep(wsf_frame *frame, PyObject *bytes);
static inline void wsf_frame_retain(wsf_frame *frame, int64_t references)
{
    (void)WSF_ADD64(&frame->references, references);
}
static inline void wsf_frame_release(wsf_frame *frame)
{
    if (WSF_ADD64(&frame->references, -1) == 0)
        wsf_frame_free(frame);
}

/* The header of an unmasked frame into `out`; its size, at most WSF_MAX_HEADER. */
uint32_t wsf_frame_header(uint8_t first_bits, uint64_t payload_size, uint8_t *out);

#endif
