/* Memory for very many equal pieces that are visited in no order, as a sweep over connections does.
 *
 * Pieces lie in chunks of 2 MiB, aligned to that. From the second chunk on the system is asked for large pages, where it
 * has them: a visit to a piece of hundreds of megabytes costs a walk through page tables otherwise, which takes longer than
 * the cache miss. Of the first chunk only those pages take memory that are used. A chunk that becomes empty is given back.
 *
 * A debug build takes each piece from the interpreter's allocator instead, so that sanitizers watch it.
 */
#ifndef WSF_SLAB_H
#define WSF_SLAB_H

#include "platform.h"

#define WSF_CHUNK_BYTES ((size_t)2 << 20)

typedef struct wsf_chunk {
    struct wsf_chunk *next, *previous; /* of those that have room */
    void *free;                        /* pieces that were given back; each begins with the next */
    uint32_t used, begun;              /* pieces in use, and pieces that ever were */
} wsf_chunk;

typedef struct {
    size_t piece_bytes; /* a multiple of 64 */
    wsf_chunk *roomy;
    uint32_t chunks;
} wsf_slab;

/* A piece, aligned to 64 bytes; its content is undefined. NULL: no memory. account: what the chunks take is charged to it. */
void *wsf_slab_take(wsf_slab *slab, int64_t *account);
void wsf_slab_give(wsf_slab *slab, int64_t *account, void *piece);

#endif
