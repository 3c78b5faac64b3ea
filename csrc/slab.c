/* Chunks of equal pieces; see slab.h. */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* madvise */
#include <sys/mman.h>
#endif

#include "slab.h"

#ifdef WSF_DEBUG

void *wsf_slab_take(wsf_slab *slab, int64_t *account) { return wsf_alloc(account, slab->piece_bytes); }
void wsf_slab_give(wsf_slab *slab, int64_t *account, void *piece) { wsf_free(account, piece, slab->piece_bytes); }

#else

#include <stdlib.h>

#if defined(_WIN32)
#include <malloc.h>
#define ALIGNED_NEW() _aligned_malloc(WSF_CHUNK_BYTES, WSF_CHUNK_BYTES)
#define ALIGNED_FREE(memory) _aligned_free(memory)
#else
#define ALIGNED_NEW() aligned_alloc(WSF_CHUNK_BYTES, WSF_CHUNK_BYTES)
#define ALIGNED_FREE(memory) free(memory)
#endif

static void link_in(wsf_slab *slab, wsf_chunk *chunk)
{
    chunk->previous = NULL;
    chunk->next = slab->roomy;
    if (slab->roomy != NULL)
        slab->roomy->previous = chunk;
    slab->roomy = chunk;
}

static void link_out(wsf_slab *slab, wsf_chunk *chunk)
{
    if (chunk->next != NULL)
        chunk->next->previous = chunk->previous;
    if (chunk->previous != NULL)
        chunk->previous->next = chunk->next;
    else
        slab->roomy = chunk->next;
}

/* The head of a chunk takes the place of its first pieces. */
static size_t first_piece(const wsf_slab *slab)
{
    return (sizeof(wsf_chunk) + slab->piece_bytes - 1) / slab->piece_bytes;
}

static int is_full(const wsf_slab *slab, const wsf_chunk *chunk)
{
    return chunk->free == NULL && (first_piece(slab) + chunk->begun + 1) * slab->piece_bytes > WSF_CHUNK_BYTES;
}

static wsf_chunk *new_chunk(wsf_slab *slab, int64_t *account)
{
    wsf_chunk *chunk = ALIGNED_NEW();
    if (chunk == NULL)
        return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (slab->chunks != 0)
        (void)madvise(chunk, WSF_CHUNK_BYTES, MADV_HUGEPAGE); /* it does without */
#endif
    memset(chunk, 0, sizeof *chunk);
    slab->chunks++;
    *account += (int64_t)WSF_CHUNK_BYTES;
    link_in(slab, chunk);
    return chunk;
}

void *wsf_slab_take(wsf_slab *slab, int64_t *account)
{
    wsf_chunk *chunk = slab->roomy != NULL ? slab->roomy : new_chunk(slab, account);
    if (chunk == NULL)
        return NULL;
    void *piece = chunk->free;
    if (piece != NULL)
        chunk->free = *(void **)piece;
    else
        piece = (char *)chunk + (first_piece(slab) + chunk->begun++) * slab->piece_bytes;
    chunk->used++;
    if (is_full(slab, chunk))
        link_out(slab, chunk);
    return piece;
}

void wsf_slab_give(wsf_slab *slab, int64_t *account, void *piece)
{
    wsf_chunk *chunk = (wsf_chunk *)((uintptr_t)piece & ~(uintptr_t)(WSF_CHUNK_BYTES - 1));
    if (is_full(slab, chunk))
        link_in(slab, chunk);
    *(void **)piece = chunk->free;
    chunk->free = piece;
    if (--chunk->used != 0)
        return;
    link_out(slab, chunk);
    slab->chunks--;
    *account -= (int64_t)WSF_CHUNK_BYTES;
    ALIGNED_FREE(chunk);
}

#endif
