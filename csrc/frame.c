/* Messages and their frames; see frame.h. */
#include "frame.h"

static void charge(int64_t *account, size_t size) { (void)WSF_ADD64(account, (int64_t)size); }

wsf_message *wsf_message_new(int64_t *account, int64_t created_ns, PyObject *key, uint64_t payload_size)
{
    wsf_message *message = PyMem_RawMalloc(sizeof *message);
    if (message == NULL)
        return NULL;
    memset(message, 0, sizeof *message);
    message->references = 1;
    message->account = account;
    message->created_ns = created_ns;
    message->key = Py_XNewRef(key);
    message->payload_size = payload_size;
    charge(account, sizeof *message);
    WSF_COUNT_LIVE(WSF_LIVE_MESSAGE, 1);
    return message;
}

void wsf_message_release(wsf_message *message)
{
    if (WSF_ADD64(&message->references, -1) != 0)
        return;
    WSF_ASSERT(message->waiter == NULL);
    (void)WSF_ADD64(message->account, -(int64_t)sizeof *message);
    Py_XDECREF(message->key);
    PyMem_RawFree(message);
    WSF_COUNT_LIVE(WSF_LIVE_MESSAGE, -1);
}

uint32_t wsf_frame_header(uint8_t first_bits, uint64_t payload_size, uint8_t *out)
{
    uint32_t size = 2, shift = 0;
    out[0] = (uint8_t)(0x80 | first_bits);
    if (payload_size < 126) {
        out[1] = (uint8_t)payload_size;
    } else if (payload_size <= 0xFFFF) {
        out[1] = 126;
        shift = 16;
    } else {
        out[1] = 127;
        shift = 64;
    }
    while (shift > 0) {
        shift -= 8;
        out[size++] = (uint8_t)(payload_size >> shift);
    }
    return size;
}

wsf_frame *wsf_frame_new(wsf_message *message, uint8_t first_bits, const void *payload, size_t size)
{
    uint8_t header[WSF_MAX_HEADER];
    uint32_t header_size = wsf_frame_header(first_bits, size, header);
    wsf_frame *frame = PyMem_RawMalloc(sizeof *frame + header_size + size);
    if (frame == NULL)
        return NULL;
    frame->references = 1;
    frame->message = wsf_message_retain(message);
    frame->bytes = NULL;
    frame->size = header_size + size;
    frame->header_size = header_size;
    memcpy(frame->data, header, header_size);
    if (size != 0)
        memcpy(frame->data + header_size, payload, size);
    charge(message->account, sizeof *frame + frame->size);
    WSF_COUNT_LIVE(WSF_LIVE_FRAME, 1);
    return frame;
}

void wsf_frame_keep(wsf_frame *frame, PyObject *bytes)
{
    frame->bytes = Py_NewRef(bytes);
    charge(frame->message->account, frame->size);
}

void wsf_frame_free(wsf_frame *frame)
{
    wsf_message *message = frame->message;
    (void)WSF_ADD64(message->account, -(int64_t)(sizeof *frame + (frame->bytes == NULL ? 1 : 2) * frame->size));
    Py_XDECREF(frame->bytes);
    PyMem_RawFree(frame);
    wsf_message_release(message);
    WSF_COUNT_LIVE(WSF_LIVE_FRAME, -1);
}
