// Attention over the paged cache, written once over a vector class `V`; see body.h for how it is included.

template <class V>
struct Attention {
    using F = typename V::F;
    static constexpr int W = V::kLanes;
    static constexpr int kQueries = V::kQueries;

    template <CacheType T>
    MINICPM_INLINE static F load(const uint8_t* at) {
        if constexpr (T == CacheType::kF32) return V::load(reinterpret_cast<const float*>(at));
        if constexpr (T == CacheType::kF16) return V::load_f16(reinterpret_cast<const uint16_t*>(at));
        if constexpr (T == CacheType::kBF16) return V::load_bf16(reinterpret_cast<const uint16_t*>(at));
        if constexpr (T == CacheType::kQ8) return V::load_signed_bytes(at);
    }

    template <CacheType T>
    MINICPM_INLINE static void write(uint8_t* at, F x) {
        if constexpr (T == CacheType::kF32) V::store(reinterpret_cast<float*>(at), x);
        if constexpr (T == CacheType::kF16) V::store_f16(reinterpret_cast<uint16_t*>(at), x);
        if constexpr (T == CacheType::kBF16) V::store_bf16(reinterpret_cast<uint16_t*>(at), x);
    }

    template <CacheType T, class Value>
    static void store_as(const LayerCache& cache, int block, int head, int offset, const float* key,
                         const float* value) {
        auto* keys = reinterpret_cast<Value*>(cache.keys(block, head)) + offset;
        auto* values = reinterpret_cast<Value*>(cache.values(block, head)) + size_t(offset) * cache.head_width;
        alignas(64) Value line[W];
        for (int i = 0; i < cache.head_width; i += W) {
            write<T>(reinterpret_cast<uint8_t*>(values + i), V::load(value + i));
            write<T>(reinterpret_cast<uint8_t*>(line), V::load(key + i));
            for (int j = 0; j < W; ++j) keys[size_t(i + j) * cache.block_tokens] = line[j];
        }
    }

    // Rounds a head to signed bytes, `stride` apart, and returns the real value of code 1: NaN where x is not finite.
    static float quantize(const float* x, int width, uint8_t* codes, size_t stride) {
        constexpr float kRound = 12582912.0f;  // 1.5 × 2^23: adding it leaves the nearest integer in the low bits
        constexpr float kLargest = 127.0f;
        F largest = V::zero(), poison = V::zero();
        for (int i = 0; i < width; i += W) {
            const F v = V::load(x + i);
            largest = V::max(largest, V::max(v, V::sub(V::zero(), v)));
            poison = V::add(poison, V::sub(v, v));
        }
        const float amax = V::largest(largest);
        const F inverse = V::set1(amax > 1e-30f ? kLargest / amax : 0.0f);
        alignas(64) uint8_t line[W * sizeof(float)];
        for (int i = 0; i < width; i += W) {
            V::store(reinterpret_cast<float*>(line), V::fma(V::load(x + i), inverse, V::set1(kRound)));
            for (int j = 0; j < W; ++j) codes[(i + j) * stride] = line[j * sizeof(float)];
        }
        return amax / kLargest + V::sum(poison);
    }

    static void store_q8(const LayerCache& cache, int block, int head, int offset, const float* key,
                         const float* value) {
        uint8_t *keys = cache.keys(block, head), *values = cache.values(block, head);
        cache.scales(keys)[offset] = quantize(key, cache.head_width, keys + offset, cache.block_tokens);
        cache.scales(values)[offset] = quantize(value, cache.head_width, values + size_t(offset) * cache.head_width, 1);
    }

    static void store(const LayerCache& cache, int block, int head, int offset, const float* key, const float* value) {
        switch (cache.type) {
            case CacheType::kF16:
                return store_as<CacheType::kF16, uint16_t>(cache, block, head, offset, key, value);
            case CacheType::kBF16:
                return store_as<CacheType::kBF16, uint16_t>(cache, block, head, offset, key, value);
            case CacheType::kF32:
                return store_as<CacheType::kF32, uint32_t>(cache, block, head, offset, key, value);
            case CacheType::kQ8:
                return store_q8(cache, block, head, offset, key, value);
        }
    }

    // Asks for the pieces of an `Ahead` line by line. The lines come to the second-level cache: a piece is used after
    // as many others as fill the first.
    class Fetcher {
      public:
        explicit Fetcher(const Ahead& ahead) : ahead_(ahead) {}
        template <int kLines>
        MINICPM_INLINE void fetch() {
            if (at_ >= end_) {
                if (piece_ == ahead_.num_pieces) return;
                at_ = ahead_.pieces[piece_++];
                end_ = at_ + ahead_.piece_bytes;
            }
#pragma GCC unroll 8
            for (int i = 0; i < kLines; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
            at_ += kLines * kLine;
        }
        // About as many lines as `bytes` of this call's own.
        template <size_t kBytes>
        MINICPM_INLINE void fetch_beside() {
            fetch<kBytes <= kLine ? 1 : static_cast<int>(kBytes / kLine)>();
        }

      private:
        static constexpr size_t kLine = 64;
        const Ahead& ahead_;
        int piece_ = 0;
        const uint8_t *at_ = nullptr, *end_ = nullptr;
    };

    using Scores = float[kQueries][kChunkPositions];

    // q·k of R queries with S strips of two vectors of positions, from `position` on; strips are so many that enough
    // sums are under way to hide how long one addition takes.
    template <CacheType T, int R, int S>
    MINICPM_INLINE static void score_strips(const LayerCache& cache, const int32_t* table, int head, int begin,
                                            int position, const float* const* queries, Fetcher& fetcher,
                                            Scores& scores) {
        constexpr size_t kValue = cache_value_bytes(T);
        const size_t row = cache.block_tokens * kValue;
        const uint8_t* keys[S];
        const float* scales[S];
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            const int at = position + s * 2 * W, offset = at % cache.block_tokens;
            uint8_t* block = cache.keys(table[at / cache.block_tokens], head);
            keys[s] = block + offset * kValue;
            scales[s] = cache.scales(block) + offset;
        }
        F low[S][R], high[S][R];
        for (int s = 0; s < S; ++s) {
            for (int r = 0; r < R; ++r) low[s][r] = high[s][r] = V::zero();
        }
        for (int d = 0; d < cache.head_width; ++d) {
            fetcher.template fetch_beside<S * 2 * W * kValue>();
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) {
                const F k0 = load<T>(keys[s]), k1 = load<T>(keys[s] + W * kValue);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const F q = V::broadcast(queries[r] + d);
                    low[s][r] = V::fma(q, k0, low[s][r]);
                    high[s][r] = V::fma(q, k1, high[s][r]);
                }
                keys[s] += row;
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            for (int r = 0; r < R; ++r) {
                if constexpr (T == CacheType::kQ8) {
                    low[s][r] = V::mul(low[s][r], V::load(scales[s]));
                    high[s][r] = V::mul(high[s][r], V::load(scales[s] + W));
                }
                V::store(scores[r] + position - begin + s * 2 * W, low[s][r]);
                V::store(scores[r] + position - begin + s * 2 * W + W, high[s][r]);
            }
        }
    }

    template <CacheType T, int R>
    static void score(const LayerCache& cache, const int32_t* table, int head, int begin, int end,
                      const float* const* queries, Fetcher& fetcher, Scores& scores) {
        constexpr int kStrips = R * 8 <= V::kAccumulators ? 4 : (R * 4 <= V::kAccumulators ? 2 : 1);
        int position = begin;
        for (; position + (kStrips - 1) * 2 * W < end; position += kStrips * 2 * W) {
            score_strips<T, R, kStrips>(cache, table, head, begin, position, queries, fetcher, scores);
        }
        for (; position < end; position += 2 * W) {
            score_strips<T, R, 1>(cache, table, head, begin, position, queries, fetcher, scores);
        }
    }

    // Turns the first `visible` of `length` scores into exponentials and the rest into zeros.
    static void exponentiate(float* scores, int visible, int length, Fetcher& fetcher, Partial& out) {
        const int padded = (length + 2 * W - 1) / (2 * W) * (2 * W);
        for (int i = visible; i < padded; ++i) scores[i] = -__builtin_inff();
        F largest = V::set1(-__builtin_inff());
        for (int i = 0; i < visible; i += W) {
            fetcher.template fetch<2>();
            largest = V::max(largest, V::load(scores + i));
        }
        out.largest = V::largest(largest);
        const F shift = V::set1(out.largest);
        for (int i = 0; i < visible; i += W) {
            fetcher.template fetch<2>();
            V::store(scores + i, Body<V>::exp(V::sub(V::load(scores + i), shift)));
        }
        for (int i = visible; i < padded; ++i) scores[i] = 0.0f;
        F total = V::zero();
        for (int i = 0; i < visible; i += W) {
            fetcher.template fetch<2>();
            total = V::add(total, V::load(scores + i));
        }
        out.total = V::sum(total);
    }

    // Takes the scales of values into the first `visible` weights; the rest are zeros and stay so whatever is there.
    static void scale_weights(const LayerCache& cache, const int32_t* table, int head, int begin, int visible,
                              float* weights) {
        for (int i = 0; i < visible; i += W) {
            const int block = table[(begin + i) / cache.block_tokens], offset = (begin + i) % cache.block_tokens;
            const F scales = V::load_first(cache.scales(cache.values(block, head)) + offset, visible - i);
            V::store(weights + i, V::mul(V::load(weights + i), scales));
        }
    }

    // Σ weight × value of R queries over positions [begin, end), C vectors of the head at a time.
    template <CacheType T, int R, int C>
    static void weigh(const LayerCache& cache, const int32_t* table, int head, int begin, int end, int column,
                      const Scores& weights, Fetcher& fetcher, Partial* out) {
        constexpr size_t kValue = cache_value_bytes(T);
        const size_t row = cache.head_width * kValue;
        F sums[R][C];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) sums[r][c] = V::zero();
        }
        for (int position = begin; position < end;) {
            const int offset = position % cache.block_tokens;
            const int count =
                end - position < cache.block_tokens - offset ? end - position : cache.block_tokens - offset;
            const uint8_t* values = cache.values(table[position / cache.block_tokens], head) + offset * row;
            values += column * kValue;
            for (int i = 0; i < count; ++i, values += row) {
                fetcher.template fetch_beside<C * W * kValue>();
                F v[C];
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) v[c] = load<T>(values + c * W * kValue);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const F p = V::broadcast(weights[r] + (position - begin) + i);
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) sums[r][c] = V::fma(p, v[c], sums[r][c]);
                }
            }
            position += count;
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) V::store(out[r].values + column + c * W, sums[r][c]);
        }
    }

    template <CacheType T, int R>
    static void attend_rows(const LayerCache& cache, const int32_t* table, int head, int begin, int end,
                            const float* const* queries, const int* limits, Fetcher& fetcher, Partial* out) {
        alignas(64) Scores scores;
        int last = begin;
        for (int r = 0; r < R; ++r) {
            const int limit = limits[r] < end ? limits[r] : end;
            last = limit > last ? limit : last;
        }
        score<T, R>(cache, table, head, begin, last, queries, fetcher, scores);
        for (int r = 0; r < R; ++r) {
            const int limit = limits[r] < end ? limits[r] : end;
            const int visible = limit > begin ? limit - begin : 0;
            exponentiate(scores[r], visible, last - begin, fetcher, out[r]);
            if constexpr (T == CacheType::kQ8) scale_weights(cache, table, head, begin, visible, scores[r]);
        }
        constexpr int kColumns = R * 4 <= V::kAccumulators ? 4 : (R * 2 <= V::kAccumulators ? 2 : 1);
        int column = 0;
        for (; column + kColumns * W <= cache.head_width; column += kColumns * W) {
            weigh<T, R, kColumns>(cache, table, head, begin, last, column, scores, fetcher, out);
        }
        for (; column < cache.head_width; column += W) {
            weigh<T, R, 1>(cache, table, head, begin, last, column, scores, fetcher, out);
        }
    }

    template <CacheType T, int R>
    static void attend_some(const LayerCache& cache, const int32_t* table, int head, int begin, int end,
                            const float* const* queries, const int* limits, int count, Fetcher& fetcher, Partial* out) {
        if constexpr (R > 0) {
            if (count == R) {
                attend_rows<T, R>(cache, table, head, begin, end, queries, limits, fetcher, out);
            } else {
                attend_some<T, R - 1>(cache, table, head, begin, end, queries, limits, count, fetcher, out);
            }
        }
    }

    template <CacheType T>
    static void attend_as(const LayerCache& cache, const int32_t* table, int head, int begin, int end,
                          const float* const* queries, const int* limits, int count, const Ahead& ahead, Partial* out) {
        Fetcher fetcher(ahead);
        for (int i = 0; i < count; i += kQueries) {
            const int n = count - i < kQueries ? count - i : kQueries;
            attend_some<T, kQueries>(cache, table, head, begin, end, queries + i, limits + i, n, fetcher, out + i);
        }
    }

    static void attend(const LayerCache& cache, const int32_t* table, int head, int begin, int end,
                       const float* const* queries, const int* limits, int count, const Ahead& ahead, Partial* out) {
        switch (cache.type) {
            case CacheType::kF16:
                return attend_as<CacheType::kF16>(cache, table, head, begin, end, queries, limits, count, ahead, out);
            case CacheType::kBF16:
                return attend_as<CacheType::kBF16>(cache, table, head, begin, end, queries, limits, count, ahead, out);
            case CacheType::kF32:
                return attend_as<CacheType::kF32>(cache, table, head, begin, end, queries, limits, count, ahead, out);
            case CacheType::kQ8:
                return attend_as<CacheType::kQ8>(cache, table, head, begin, end, queries, limits, count, ahead, out);
        }
    }

    static void join(Partial& sum, const Partial& next, int head_width) {
        if (next.total == 0.0f) return;
        if (sum.total == 0.0f) {
            for (int i = 0; i < head_width; i += W) V::store(sum.values + i, V::load(next.values + i));
            sum.largest = next.largest;
            sum.total = next.total;
            return;
        }
        const float largest = next.largest > sum.largest ? next.largest : sum.largest;
        const F keep = Body<V>::exp(V::set1(sum.largest - largest));
        const F take = Body<V>::exp(V::set1(next.largest - largest));
        for (int i = 0; i < head_width; i += W) {
            const F kept = V::mul(V::load(sum.values + i), keep);
            V::store(sum.values + i, V::fma(V::load(next.values + i), take, kept));
        }
        sum.total = V::first(V::fma(V::set1(next.total), take, V::mul(V::set1(sum.total), keep)));
        sum.largest = largest;
    }
};

template <class V>
constexpr Kernels make_kernels(const char* name, bool (*runs_here)()) {
    using B = Body<V>;
    using A = Attention<V>;
    return Kernels{name,      runs_here, B::form,  B::prepare, B::multiply, B::rms_norm,
                   B::swiglu, B::rotate, A::store, A::attend,  A::join};
}
