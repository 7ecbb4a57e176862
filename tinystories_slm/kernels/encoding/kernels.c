// Byte-level BPE with the pre-tokenization of GPT-2, for texts of ASCII bytes.
//
// A corpus of stories has few distinct pieces (words with the blank before them), so each piece is merged once and
// its ids are kept in a hash table. Texts with other bytes, or with a very long piece, are left to the caller.
//
// The second half counts the distinct chunks of texts, of any characters, for the training of a vocabulary.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PIECE 128
#define MAX_PIECES (1 << 20)

typedef struct {
    uint64_t pair;  // left id and right id; EMPTY if the slot is free
    int32_t rank;
    int32_t id;
} Merge;

typedef struct {
    uint64_t hash;
    uint32_t start, ids;  // offsets into `bytes` and `tokens`
    uint16_t length, num_ids;  // length 0: the slot is free
} Piece;

typedef struct {
    Merge *merges;
    uint64_t merge_mask;
    int32_t byte_ids[256];
    Piece *pieces;
    uint64_t piece_mask, num_pieces;
    uint8_t *bytes;
    uint64_t num_bytes, max_bytes;
    int32_t *tokens;
    uint64_t num_tokens, max_tokens;
} Encoder;

#define EMPTY UINT64_MAX

static uint64_t mix(uint64_t value) {
    value ^= value >> 32;
    value *= 0x9E3779B97F4A7C15u;
    return value ^ (value >> 29);
}

static uint64_t hash_bytes(const uint8_t *text, int length) {
    uint64_t hash = 0xCBF29CE484222325u ^ (uint64_t)length;
    while (length >= 8) {
        uint64_t word;
        memcpy(&word, text, 8);
        hash = mix(hash ^ word);
        text += 8, length -= 8;
    }
    uint64_t word = 0;
    memcpy(&word, text, (size_t)length);
    return mix(mix(hash ^ word));
}

void free_encoder(Encoder *encoder) {
    if (!encoder) return;
    free(encoder->merges), free(encoder->pieces), free(encoder->bytes), free(encoder->tokens), free(encoder);
}

// Merges in the order of their ranks. Returns NULL without memory.
Encoder *new_encoder(const int32_t *byte_ids, const int32_t *left, const int32_t *right, const int32_t *ids,
                     int64_t num_merges) {
    Encoder *encoder = calloc(1, sizeof *encoder);
    if (!encoder) return NULL;
    uint64_t size = 16;
    while (size < 2 * (uint64_t)num_merges) size *= 2;
    encoder->merge_mask = size - 1;
    encoder->merges = malloc(size * sizeof(Merge));
    encoder->piece_mask = (1 << 12) - 1;
    encoder->pieces = calloc(encoder->piece_mask + 1, sizeof(Piece));
    if (!encoder->merges || !encoder->pieces) return free_encoder(encoder), NULL;
    for (uint64_t i = 0; i < size; i++) encoder->merges[i].pair = EMPTY;
    memcpy(encoder->byte_ids, byte_ids, sizeof encoder->byte_ids);
    for (int64_t rank = 0; rank < num_merges; rank++) {
        uint64_t pair = (uint64_t)(uint32_t)left[rank] << 32 | (uint32_t)right[rank];
        uint64_t slot = mix(pair) & encoder->merge_mask;
        while (encoder->merges[slot].pair != EMPTY && encoder->merges[slot].pair != pair)
            slot = (slot + 1) & encoder->merge_mask;
        encoder->merges[slot] = (Merge){pair, (int32_t)rank, ids[rank]};
    }
    return encoder;
}

static const Merge *find_merge(const Encoder *encoder, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (uint64_t slot = mix(pair) & encoder->merge_mask;; slot = (slot + 1) & encoder->merge_mask) {
        if (encoder->merges[slot].pair == pair) return &encoder->merges[slot];
        if (encoder->merges[slot].pair == EMPTY) return NULL;
    }
}

// Merge the pair of the lowest rank, the leftmost first, until there is none. Returns the number of ids.
static int merge_piece(const Encoder *encoder, const uint8_t *text, int length, int32_t *ids) {
    for (int i = 0; i < length; i++) ids[i] = encoder->byte_ids[text[i]];
    for (;;) {
        const Merge *best = NULL;
        int at = 0;
        for (int i = 0; i + 1 < length; i++) {
            const Merge *merge = find_merge(encoder, ids[i], ids[i + 1]);
            if (merge && (!best || merge->rank < best->rank)) best = merge, at = i;
        }
        if (!best) return length;
        ids[at] = best->id;
        memmove(ids + at + 1, ids + at + 2, (size_t)(length - at - 2) * sizeof *ids);
        length--;
    }
}

static int grow(void **memory, uint64_t used, uint64_t more, uint64_t *size, size_t item) {
    if (used + more <= *size) return 1;
    uint64_t larger = 2 * (*size + more) + 4096;
    void *moved = realloc(*memory, larger * item);
    if (!moved) return 0;
    *memory = moved, *size = larger;
    return 1;
}

static int double_pieces(Encoder *encoder) {
    uint64_t mask = 2 * encoder->piece_mask + 1;
    Piece *pieces = calloc(mask + 1, sizeof(Piece));
    if (!pieces) return 0;
    for (uint64_t i = 0; i <= encoder->piece_mask; i++) {
        if (!encoder->pieces[i].length) continue;
        uint64_t slot = encoder->pieces[i].hash & mask;
        while (pieces[slot].length) slot = (slot + 1) & mask;
        pieces[slot] = encoder->pieces[i];
    }
    free(encoder->pieces);
    encoder->pieces = pieces, encoder->piece_mask = mask;
    return 1;
}

// Write the ids of one piece, at most `length` of them, and return their number.
static int encode_piece(Encoder *encoder, const uint8_t *text, int length, int32_t *out) {
    uint64_t hash = hash_bytes(text, length), slot = hash & encoder->piece_mask;
    for (; encoder->pieces[slot].length; slot = (slot + 1) & encoder->piece_mask) {
        const Piece *piece = &encoder->pieces[slot];
        if (piece->hash == hash && piece->length == length && !memcmp(encoder->bytes + piece->start, text, length)) {
            for (int i = 0; i < piece->num_ids; i++) out[i] = encoder->tokens[piece->ids + i];
            return piece->num_ids;
        }
    }
    int num_ids = merge_piece(encoder, text, length, out);
    int is_kept = encoder->num_pieces < MAX_PIECES &&
                  grow((void **)&encoder->bytes, encoder->num_bytes, length, &encoder->max_bytes, 1) &&
                  grow((void **)&encoder->tokens, encoder->num_tokens, num_ids, &encoder->max_tokens, sizeof(int32_t));
    if (!is_kept) return num_ids;
    memcpy(encoder->bytes + encoder->num_bytes, text, length);
    memcpy(encoder->tokens + encoder->num_tokens, out, num_ids * sizeof *out);
    encoder->pieces[slot] = (Piece){hash, encoder->num_bytes, encoder->num_tokens, length, num_ids};
    encoder->num_bytes += length, encoder->num_tokens += num_ids, encoder->num_pieces++;
    if (2 * encoder->num_pieces > encoder->piece_mask) double_pieces(encoder);
    return num_ids;
}

enum { OTHER, LETTER, DIGIT, SPACE };

static int kind_of(uint8_t byte) {
    if ((byte | 32) >= 'a' && (byte | 32) <= 'z') return LETTER;
    if (byte >= '0' && byte <= '9') return DIGIT;
    return byte == ' ' || (byte >= '\t' && byte <= '\r') ? SPACE : OTHER;
}

// End of the piece at the start of [text, end), by the pattern of GPT-2:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static const uint8_t *piece_end(const uint8_t *text, const uint8_t *end) {
    if (*text == '\'' && text + 1 < end) {
        uint8_t one = text[1], two = text + 2 < end ? text[2] : 0;
        if (one == 's' || one == 't' || one == 'm' || one == 'd') return text + 2;
        if ((one == 'r' && two == 'e') || (one == 'v' && two == 'e') || (one == 'l' && two == 'l')) return text + 3;
    }
    const uint8_t *at = text + (*text == ' ' && text + 1 < end);
    int kind = kind_of(*at);
    if (kind == SPACE) at = text, kind = kind_of(*at);
    const uint8_t *stop = at + 1;
    while (stop < end && kind_of(*stop) == kind) stop++;
    // White space before a word leaves its last character to the word.
    return kind == SPACE && stop < end && stop - text > 1 ? stop - 1 : stop;
}

static int is_ascii(const uint8_t *text, int64_t length) {
    uint8_t all = 0;
    for (int64_t i = 0; i < length; i++) all |= text[i];
    return all < 128;
}

// Encode texts `offsets[i]` to `offsets[i + 1]` of `data`. `out` has room for one id per byte. `ends[i]` is the
// end of the ids of text i in `out`; `is_left[i]` is 1, and it has no ids, if the caller is to encode it.
void encode(Encoder *encoder, const uint8_t *data, const int64_t *offsets, int64_t num_texts, int32_t *out,
            int64_t *ends, uint8_t *is_left) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_texts; i++) {
        const uint8_t *at = data + offsets[i], *end = data + offsets[i + 1];
        int64_t start = total;
        is_left[i] = !is_ascii(at, end - at);
        while (at < end && !is_left[i]) {
            const uint8_t *stop = piece_end(at, end);
            if (stop - at > MAX_PIECE) {
                is_left[i] = 1;  // merging is quadratic in the length
            } else {
                total += encode_piece(encoder, at, (int)(stop - at), out + total);
            }
            at = stop;
        }
        if (is_left[i]) total = start;
        ends[i] = total;
    }
}

typedef struct {
    uint64_t hash, start;  // offset into `bytes`
    int64_t count;         // 0: the slot is free
    uint32_t length;
} Chunk;

typedef struct {
    Chunk *chunks;
    uint64_t mask, num_chunks;
    uint8_t *bytes;
    uint64_t num_bytes, max_bytes;
} Counter;

void free_counter(Counter *counter) {
    if (!counter) return;
    free(counter->chunks), free(counter->bytes), free(counter);
}

Counter *new_counter(void) {
    Counter *counter = calloc(1, sizeof *counter);
    if (!counter) return NULL;
    counter->mask = (1 << 16) - 1;
    counter->chunks = calloc(counter->mask + 1, sizeof(Chunk));
    if (!counter->chunks) return free_counter(counter), NULL;
    return counter;
}

// Bytes of the white space (Unicode's White_Space, the \s of GPT-2's pattern) at the start of [text, end), or 0.
static int space_length(const uint8_t *text, const uint8_t *end) {
    if (*text < 0xC2) return *text == ' ' || (*text >= '\t' && *text <= '\r');
    if (*text > 0xE3 || end - text < 2) return 0;
    if (*text == 0xC2) return text[1] == 0x85 || text[1] == 0xA0 ? 2 : 0;
    if (*text < 0xE1 || end - text < 3) return 0;
    uint32_t character = (uint32_t)(*text & 15) << 12 | (text[1] & 63) << 6 | (text[2] & 63);
    return character == 0x1680 || (character >= 0x2000 && character <= 0x200A) || character == 0x2028 ||
                   character == 0x2029 || character == 0x202F || character == 0x205F || character == 0x3000
               ? 3
               : 0;
}

// End of the chunk at the start of [text, end): ` ?\S+|\s+(?!\S)|\s+`. GPT-2's pattern ends a piece at each chunk's
// end, whatever stands before and behind it.
static const uint8_t *chunk_end(const uint8_t *text, const uint8_t *end) {
    if (space_length(text, end) && !(*text == ' ' && text + 1 < end && !space_length(text + 1, end))) {
        const uint8_t *at = text, *last = text;
        for (int size; at < end && (size = space_length(at, end)); at += size) last = at;
        return at == end || last == text ? at : last;  // the last one before a word belongs to the word
    }
    do text++;
    while (text < end && !space_length(text, end));
    return text;
}

static int double_chunks(Counter *counter) {
    uint64_t mask = 2 * counter->mask + 1;
    Chunk *chunks = calloc(mask + 1, sizeof(Chunk));
    if (!chunks) return 0;
    for (uint64_t i = 0; i <= counter->mask; i++) {
        if (!counter->chunks[i].count) continue;
        uint64_t slot = counter->chunks[i].hash & mask;
        while (chunks[slot].count) slot = (slot + 1) & mask;
        chunks[slot] = counter->chunks[i];
    }
    free(counter->chunks);
    counter->chunks = chunks, counter->mask = mask;
    return 1;
}

static int count_chunk(Counter *counter, const uint8_t *text, uint32_t length) {
    uint64_t hash = hash_bytes(text, (int)length), slot = hash & counter->mask;
    for (; counter->chunks[slot].count; slot = (slot + 1) & counter->mask) {
        Chunk *chunk = &counter->chunks[slot];
        if (chunk->hash == hash && chunk->length == length && !memcmp(counter->bytes + chunk->start, text, length))
            return chunk->count++, 1;
    }
    if (!grow((void **)&counter->bytes, counter->num_bytes, length, &counter->max_bytes, 1)) return 0;
    memcpy(counter->bytes + counter->num_bytes, text, length);
    counter->chunks[slot] = (Chunk){hash, counter->num_bytes, 1, length};
    counter->num_bytes += length, counter->num_chunks++;
    return 2 * counter->num_chunks <= counter->mask || double_chunks(counter);
}

// Count the chunks of texts `offsets[i]` to `offsets[i + 1]` of `data`, each shorter than 2 GiB. Returns 0 without
// memory.
int count_chunks(Counter *counter, const uint8_t *data, const int64_t *offsets, int64_t num_texts) {
    for (int64_t i = 0; i < num_texts; i++) {
        const uint8_t *at = data + offsets[i], *end = data + offsets[i + 1];
        while (at < end) {
            const uint8_t *stop = chunk_end(at, end);
            if (!count_chunk(counter, at, (uint32_t)(stop - at))) return 0;
            at = stop;
        }
    }
    return 1;
}

int64_t num_chunks(const Counter *counter) { return (int64_t)counter->num_chunks; }

int64_t num_chunk_bytes(const Counter *counter) { return (int64_t)counter->num_bytes; }

// Write the bytes of all chunks, and where each starts and ends in them, and its count.
void read_chunks(const Counter *counter, uint8_t *bytes, int64_t *starts, int64_t *ends, int64_t *counts) {
    memcpy(bytes, counter->bytes, counter->num_bytes);
    for (uint64_t i = 0, at = 0; i <= counter->mask; i++) {
        const Chunk *chunk = &counter->chunks[i];
        if (!chunk->count) continue;
        starts[at] = (int64_t)chunk->start, ends[at] = (int64_t)(chunk->start + chunk->length);
        counts[at++] = chunk->count;
    }
}
