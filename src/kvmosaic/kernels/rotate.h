// The rotation of codecs/rotated.py over one row of numbers. Its matrix is [D, D]; where D is a power of two it is a
// Hadamard matrix (Sylvester's order) whose rows carry a factor each, the entries of its first column.

// One of the log2(size) rounds of the fast transform: in each, the two halves meet and their results lie side by side.
INLINE void NAME(meet)(const float *restrict from, float *restrict to, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        to[2 * i] = from[i] + from[half + i];
        to[2 * i + 1] = from[i] - from[half + i];
    }
}

FN void NAME(hadamard)(float *x, int64_t size) {
    float other[MOST_CHANNELS];
    int64_t done = 1;
    for (; done * 4 <= size; done *= 4) {
        NAME(meet)(x, other, size / 2);
        NAME(meet)(other, x, size / 2);
    }
    if (done == size) return;
    NAME(meet)(x, other, size / 2);
    memcpy(x, other, size * sizeof *x);
}

// x @ rotation, in place.
FN void NAME(rotate)(const float *rotation, int64_t channels, float *x) {
    if (channels & (channels - 1)) {
        float sum[MOST_CHANNELS] = {0};
        for (int64_t d = 0; d < channels; d++)
            for (int64_t i = 0; i < channels; i++) sum[i] += x[d] * rotation[d * channels + i];
        memcpy(x, sum, channels * sizeof *x);
        return;
    }
    for (int64_t d = 0; d < channels; d++) x[d] *= rotation[d * channels];
    NAME(hadamard)(x, channels);
}

// out += x @ rotation transposed; x is spent.
FN void NAME(add_unrotated)(const float *rotation, int64_t channels, float *x, float *out) {
    if (channels & (channels - 1)) {
        for (int64_t d = 0; d < channels; d++)
            for (int64_t i = 0; i < channels; i++) out[d] += x[i] * rotation[d * channels + i];
        return;
    }
    NAME(hadamard)(x, channels);
    for (int64_t d = 0; d < channels; d++) out[d] += x[d] * rotation[d * channels];
}
