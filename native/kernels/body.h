// Products, norms and element-wise kernels, written once over a vector class `V`; attention is in attention.h.
//
// A file kernels/NAME.cpp defines `V` and includes this inside an anonymous namespace, so that no function compiled for
// one instruction set can be linked into another. For the same reason nothing here may call an inline function of the
// standard library. `V` offers: kLanes (W), F (W floats), the functions used below, kRows (activation rows that share
// the registers of one tile) and kIntegers. With kIntegers also I (W int32) and either Codes4, Codes8 and their dot
// products or, with kSideBySide (a whole tile a vector, 32 registers), `codes4`, `codes8`, `dot` and `joined`.

template <class V>
struct Body {
    using F = typename V::F;
    static constexpr int W = V::kLanes;
    // How far ahead of its use a weight is asked for, in bytes.
    static constexpr size_t kAhead = 2048;
    // Prepared rows that are taken through the tiles at a time.
    static constexpr size_t kPortionBytes = size_t{256} << 10;

    // ---- element-wise ----------------------------------------------------------------------------------------------

    // e^x with a relative error of about 1e-7, clamped to the range of normal numbers.
    MINICPM_INLINE static F exp(F x) {
        constexpr float kRound = 12582912.0f;  // 1.5 × 2^23: adding it leaves the nearest integer in the low bits
        x = V::min(V::max(x, V::set1(-87.3f)), V::set1(88.3f));
        const F shifted = V::fma(x, V::set1(1.44269504f), V::set1(kRound));
        const F n = V::sub(shifted, V::set1(kRound));
        F r = V::fma(n, V::set1(-0.693145752f), x);
        r = V::fma(n, V::set1(-1.42860677e-6f), r);
        F p = V::set1(1.98412698e-4f);
        p = V::fma(p, r, V::set1(1.38888889e-3f));
        p = V::fma(p, r, V::set1(8.33333333e-3f));
        p = V::fma(p, r, V::set1(4.16666667e-2f));
        p = V::fma(p, r, V::set1(1.66666667e-1f));
        p = V::fma(p, r, V::set1(0.5f));
        p = V::fma(p, r, V::set1(1.0f));
        p = V::fma(p, r, V::set1(1.0f));
        return V::scale_by_power(p, shifted);
    }

    static void rms_norm(const float* x, const float* weight, int n, float epsilon, float* out) {
        F squares = V::zero();
        for (int i = 0; i < n; i += W) {
            const F v = V::load_first(x + i, n - i);
            squares = V::fma(v, v, squares);
        }
        const F factor = V::set1(1.0f / __builtin_sqrtf(V::sum(squares) / static_cast<float>(n) + epsilon));
        for (int i = 0; i < n; i += W) {
            const F v = V::mul(V::load_first(x + i, n - i), factor);
            V::store_first(out + i, V::mul(v, V::load_first(weight + i, n - i)), n - i);
        }
    }

    static void swiglu(const float* gate, size_t gate_stride, float* up, size_t up_stride, int rows, int columns) {
        for (int row = 0; row < rows; ++row, gate += gate_stride, up += up_stride) {
            for (int i = 0; i < columns; i += W) {
                const F g = V::load_first(gate + i, columns - i);
                const F u = V::load_first(up + i, columns - i);
                const F one_plus = V::add(V::set1(1.0f), exp(V::sub(V::zero(), g)));
                V::store_first(up + i, V::mul(V::div(g, one_plus), u), columns - i);
            }
        }
    }

    static void rotate(float* head, const float* cosines, const float* sines, int head_dim, float scale) {
        const int half = head_dim / 2;
        const F s = V::set1(scale);
        for (int i = 0; i < half; i += W) {
            const int n = half - i;
            const F a = V::load_first(head + i, n), b = V::load_first(head + half + i, n);
            const F cosine = V::load_first(cosines + i, n), sine = V::load_first(sines + i, n);
            V::store_first(head + i, V::mul(s, V::sub(V::mul(a, cosine), V::mul(b, sine))), n);
            V::store_first(head + half + i, V::mul(s, V::fma(b, cosine, V::mul(a, sine))), n);
        }
    }

    // ---- preparing activations -------------------------------------------------------------------------------------

    static Form form(Packing packing) {
        if constexpr (V::kIntegers) {
            if (is_float(packing)) return Form::kFloat;
            return is_four_bit(packing) ? Form::kHalves : V::kCodes8Form;
        }
        return Form::kFloat;
    }

    static void prepare(Form form, const float* x, int inputs, uint8_t* out) {
        const int padded = (inputs + kBlockInputs - 1) / kBlockInputs * kBlockInputs;
        if (form == Form::kFloat) {
            float* row = reinterpret_cast<float*>(out);
            for (int i = 0; i < padded; i += W) V::store(row + i, V::load_first(x + i, inputs - i));
            return;
        }
        if constexpr (V::kIntegers) {
            const int groups = padded / kGroupInputs;
            auto* meta = reinterpret_cast<GroupMeta*>(out + groups * 64);
            for (int first = 0; first < groups; first += 4) {
                const int count = groups - first < 4 ? groups - first : 4, at = first * kGroupInputs;
                if constexpr (V::kSideBySide) {
                    if (V::prepare_halves(x + at, inputs - at, count, out + first * 64, meta + first)) continue;
                }
                for (int g = first; g < first + count; ++g) {
                    prepare_group(form, x + g * kGroupInputs, inputs - g * kGroupInputs, out + g * 64, meta[g]);
                }
            }
        }
    }

    // Integers reach ±32512 = ±127 × 256, so that both halves fit a signed byte.
    static void prepare_group(Form form, const float* x, int left, uint8_t* codes, GroupMeta& meta) {
        constexpr float kLargest = 32512.0f;
        alignas(64) int32_t q[kGroupInputs];
        F largest = V::zero(), poison = V::zero();
        for (int i = 0; i < kGroupInputs; i += W) {
            const F v = V::load_first(x + i, left - i);
            largest = V::max(largest, V::abs(v));
            poison = V::add(poison, V::sub(v, v));  // NaN where v is not finite: it must not be rounded away
        }
        const float amax = V::largest(largest), broken = V::sum(poison);
        const F inverse = V::set1(amax > 1e-30f ? kLargest / amax : 0.0f);
        for (int i = 0; i < kGroupInputs; i += W) {
            // What is not finite has no integer; the scale, which is NaN then, speaks for the group.
            const F v = broken == 0.0f ? V::load_first(x + i, left - i) : V::zero();
            V::store_rounded(q + i, V::mul(v, inverse));
        }
        int32_t sums[2] = {0, 0};
        for (int i = 0; i < 16; ++i) sums[0] += q[i];
        for (int i = 16; i < 32; ++i) sums[1] += q[i];
        meta.scale = amax / kLargest + broken;
        meta.sum = static_cast<float>(sums[0] + sums[1]) * meta.scale;
        meta.offset16[0] = -128 * sums[0];
        meta.offset16[1] = -128 * sums[1];
        meta.offset = meta.offset16[0] + meta.offset16[1];
        meta.offset4 = -8 * (sums[0] + sums[1]);
        if (form == Form::kHalves) {
            for (int i = 0; i < kGroupInputs; ++i) codes[i] = static_cast<uint8_t>((q[i] + 128) >> 8);
            for (int i = 0; i < kGroupInputs; ++i) codes[32 + i] = static_cast<uint8_t>(q[i]);
        } else {
            auto* words = reinterpret_cast<int16_t*>(codes);
            for (int i = 0; i < kGroupInputs; i += 4) {
                words[i] = static_cast<int16_t>(q[i]);
                words[i + 1] = static_cast<int16_t>(q[i + 2]);
                words[i + 2] = static_cast<int16_t>(q[i + 1]);
                words[i + 3] = static_cast<int16_t>(q[i + 3]);
            }
        }
    }

    // ---- scales ----------------------------------------------------------------------------------------------------

    // Whether integer products leave the minimum to be added; the zero of Q4_0 is taken off the integers.
    static constexpr bool has_min(Packing p) {
        return p != Packing::kU4Scale && p != Packing::kS8Scale && p != Packing::kS8Super16;
    }

    struct Scale {
        F factor, min;
    };

    // Factor and minimum of the W rows from `lane` on, for group `g` (0, 1) of a block; `half` for groups of 16.
    template <Packing P>
    MINICPM_INLINE static Scale scales(const uint8_t* block, int g, int half, int lane) {
        const auto* halves = reinterpret_cast<const uint16_t*>(block) + lane;
        if constexpr (P == Packing::kU4Scale) {
            const F factor = V::load_f16(halves + g * 16);
            return {factor, V::mul(factor, V::set1(-8.0f))};
        } else if constexpr (P == Packing::kS8Scale) {
            return {V::load_f16(halves + g * 16), V::zero()};
        } else if constexpr (P == Packing::kU4ScaleMin || P == Packing::kS8ScaleMin) {
            return {V::load_f16(halves + g * 16), V::load_f16(halves + 32 + g * 16)};
        } else if constexpr (P == Packing::kU4Super || P == Packing::kS8Super) {
            const F d = V::load_f16(halves), e = V::load_f16(halves + 16);
            const F a = V::load_bytes(block + 64 + g * 16 + lane), b = V::load_bytes(block + 96 + g * 16 + lane);
            return {V::mul(d, a), V::sub(V::zero(), V::mul(e, b))};
        } else {
            return {V::mul(V::load_f16(halves), V::load_signed_bytes(block + 64 + (2 * g + half) * 16 + lane)),
                    V::zero()};
        }
    }

    // ---- products --------------------------------------------------------------------------------------------------

    // One activation row's contribution of one group, in integers.
    template <Packing P, int M, class Codes>
    MINICPM_INLINE static void multiply_group(const uint8_t* block, int g, int lane, const Codes& codes,
                                              const uint8_t* const* rows, size_t group, size_t meta_offset, F* sums) {
        const Scale s = scales<P>(block, g, 0, lane);
        Scale upper = s;
        if constexpr (P == Packing::kS8Super16) upper = scales<P>(block, g, 1, lane);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const uint8_t* x = rows[m] + group * 64;
            const auto& meta = reinterpret_cast<const GroupMeta*>(rows[m] + meta_offset)[group];
            const F scale = V::broadcast(&meta.scale);
            if constexpr (P == Packing::kS8Super16) {
                const F low = V::to_float(V::template dot8<0, 4>(codes, x, &meta.offset16[0]));
                const F high = V::to_float(V::template dot8<4, 8>(codes, x, &meta.offset16[1]));
                sums[m] = V::fma(V::mul(low, scale), s.factor, sums[m]);
                sums[m] = V::fma(V::mul(high, scale), upper.factor, sums[m]);
            } else if constexpr (is_four_bit(P)) {
                const F dot = V::to_float(V::template dot4<P == Packing::kU4Scale>(codes, x, &meta.offset4));
                sums[m] = V::fma(V::mul(dot, scale), s.factor, sums[m]);
            } else {
                const F dot = V::to_float(V::template dot8<0, 8>(codes, x, &meta.offset));
                sums[m] = V::fma(V::mul(dot, scale), s.factor, sums[m]);
            }
            if constexpr (has_min(P)) sums[m] = V::fma(V::broadcast(&meta.sum), s.min, sums[m]);
        }
    }

    // Adds the products with inputs 4 kBegin .. 4 kEnd of a group. The integer sums of all rows grow side by side: so
    // many that none waits for its own last addition, and each code is in a register only while it is used.
    template <Packing P, int M, int kBegin, int kEnd>
    MINICPM_INLINE static void add_products(const uint8_t* codes, const uint8_t* const* rows, size_t group,
                                            size_t meta_offset, F factor, F* sums) {
        typename V::I high[M], low[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const auto& meta = reinterpret_cast<const GroupMeta*>(rows[m] + meta_offset)[group];
            high[m] = low[m] = V::integer_zero();
            if constexpr (P == Packing::kU4Scale) low[m] = V::broadcast4(&meta.offset4);
            if constexpr (!is_four_bit(P)) {
                low[m] = V::broadcast4(P == Packing::kS8Super16 ? &meta.offset16[kBegin ? 1 : 0] : &meta.offset);
            }
        }
#pragma GCC unroll 8
        for (int i = kBegin; i < kEnd; ++i) {
            const auto four = is_four_bit(P) ? V::codes4(codes, i) : V::codes8(codes, i);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const uint8_t* x = rows[m] + group * 64 + 4 * i;
                high[m] = V::dot(high[m], four, x);
                low[m] = V::dot(low[m], four, x + 32);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const auto& meta = reinterpret_cast<const GroupMeta*>(rows[m] + meta_offset)[group];
            const F dot = V::to_float(V::joined(high[m], low[m]));
            sums[m] = V::fma(V::mul(dot, V::broadcast(&meta.scale)), factor, sums[m]);
        }
    }

    // What multiply_group does, for a `V` with so many registers.
    template <Packing P, int M>
    MINICPM_INLINE static void multiply_side_by_side(const uint8_t* block, int g, const uint8_t* codes,
                                                     const uint8_t* const* rows, size_t group, size_t meta_offset,
                                                     F* sums) {
        const Scale s = scales<P>(block, g, 0, 0);
        if constexpr (P == Packing::kS8Super16) {
            add_products<P, M, 0, 4>(codes, rows, group, meta_offset, s.factor, sums);
            add_products<P, M, 4, 8>(codes, rows, group, meta_offset, scales<P>(block, g, 1, 0).factor, sums);
        } else {
            add_products<P, M, 0, 8>(codes, rows, group, meta_offset, s.factor, sums);
        }
        if constexpr (has_min(P)) {
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const auto& meta = reinterpret_cast<const GroupMeta*>(rows[m] + meta_offset)[group];
                sums[m] = V::fma(V::broadcast(&meta.sum), s.min, sums[m]);
            }
        }
    }

    template <Packing P, int M>
    MINICPM_INLINE static void integer_tile(const uint8_t* tile, int num_blocks, int lane, const uint8_t* const* rows,
                                            F* sums) {
        const size_t meta_offset = size_t(num_blocks) * 2 * 64;
        constexpr size_t kCodes = size_t{kGroupInputs} * kTileRows / (is_four_bit(P) ? 2 : 1);
        for (int b = 0; b < num_blocks; ++b) {
            const uint8_t* block = tile + b * block_bytes(P);
            if (M == 1 || lane == 0) {
                for (size_t line = 0; line < block_bytes(P); line += 64)
                    __builtin_prefetch(block + kAhead + line, 0, 3);
            }
#pragma GCC unroll 2
            for (int g = 0; g < 2; ++g) {
                const uint8_t* codes = block + block_header_bytes(P) + g * kCodes;
                if constexpr (V::kSideBySide) {
                    multiply_side_by_side<P, M>(block, g, codes, rows, 2 * b + g, meta_offset, sums);
                } else if constexpr (is_four_bit(P)) {
                    multiply_group<P, M>(block, g, lane, V::load4(codes + lane * 4), rows, 2 * b + g, meta_offset,
                                         sums);
                } else {
                    multiply_group<P, M>(block, g, lane, V::load8(codes + lane * 4), rows, 2 * b + g, meta_offset,
                                         sums);
                }
            }
        }
    }

    // The W weights of rows from `lane` on for input `k` of a group.
    template <Packing P>
    MINICPM_INLINE static F weight(const uint8_t* block, int g, int k, int lane, const Scale& s) {
        const int input = g * kGroupInputs + k;
        if constexpr (P == Packing::kF32) return V::load(reinterpret_cast<const float*>(block) + input * 16 + lane);
        const auto* halves = reinterpret_cast<const uint16_t*>(block) + input * 16 + lane;
        if constexpr (P == Packing::kF16) return V::load_f16(halves);
        if constexpr (P == Packing::kBF16) return V::load_bf16(halves);
        if constexpr (!is_float(P)) {
            const uint8_t* codes = block + block_header_bytes(P);
            if constexpr (is_four_bit(P)) {
                const F q = V::nibbles(codes + input / 8 * 64 + lane * 4 + input % 4, input % 8 / 4);
                return V::fma(q, s.factor, s.min);
            }
            const F q = V::spread_bytes(codes + input / 4 * 64 + lane * 4 + input % 4);
            return V::fma(q, s.factor, s.min);
        }
    }

    // Two sums a group, of even and odd inputs, shorten the chain of additions and its rounding error.
    template <Packing P, int M>
    MINICPM_INLINE static void float_tile(const uint8_t* tile, int num_blocks, int lane, const uint8_t* const* rows,
                                          F* sums) {
        for (int b = 0; b < num_blocks; ++b) {
            const uint8_t* block = tile + b * block_bytes(P);
            for (int g = 0; g < 2; ++g) {
                F even[M], odd[M];
                for (int m = 0; m < M; ++m) even[m] = odd[m] = V::zero();
                Scale s{V::zero(), V::zero()};
                if constexpr (!is_float(P)) s = scales<P>(block, g, 0, lane);
                for (int k = 0; k < kGroupInputs; k += 2) {
                    if constexpr (P == Packing::kS8Super16) {
                        if (k == 16) s = scales<P>(block, g, 1, lane);
                    }
                    const F w0 = weight<P>(block, g, k, lane, s);
                    const F w1 = weight<P>(block, g, k + 1, lane, s);
                    if constexpr (is_float(P)) {
                        __builtin_prefetch(block + kAhead + (g * kGroupInputs + k) * (block_bytes(P) / kBlockInputs));
                    }
#pragma GCC unroll 16
                    for (int m = 0; m < M; ++m) {
                        const auto* x = reinterpret_cast<const float*>(rows[m]) + b * kBlockInputs + g * kGroupInputs;
                        even[m] = V::fma(w0, V::broadcast(x + k), even[m]);
                        odd[m] = V::fma(w1, V::broadcast(x + k + 1), odd[m]);
                    }
                }
                for (int m = 0; m < M; ++m) sums[m] = V::add(sums[m], V::add(even[m], odd[m]));
            }
        }
    }

    MINICPM_INLINE static void write(const Output& y, int row, int output, int left, F sum) {
        if (left <= 0) return;
        float* at = y.data + row * y.stride + output;
        const F scaled = V::mul(sum, V::set1(y.scale));
        V::store_first(at, y.accumulate ? V::add(V::load_first(at, left), scaled) : scaled, left);
    }

    template <Packing P, int M>
    static void tile_rows(const Matrix& w, int tile, const Prepared& x, int first, const Output& y) {
        const uint8_t* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = x.data + (first + m) * x.stride;
        for (int lane = 0; lane < kTileRows; lane += W) {
            F sums[M];
            for (int m = 0; m < M; ++m) sums[m] = V::zero();
            if constexpr (V::kIntegers && !is_float(P)) {
                integer_tile<P, M>(w.tile(tile), w.num_blocks(), lane, rows, sums);
            } else {
                float_tile<P, M>(w.tile(tile), w.num_blocks(), lane, rows, sums);
            }
            const int output = tile * kTileRows + lane;
            for (int m = 0; m < M; ++m) write(y, first + m, output, w.rows - output, sums[m]);
        }
    }

    // Runs the last `count` < kRows rows with a function made for exactly that many.
    template <Packing P, int M>
    static void remaining_rows(const Matrix& w, int tile, const Prepared& x, int first, int count, const Output& y) {
        if constexpr (M > 0) {
            if (count == M) {
                tile_rows<P, M>(w, tile, x, first, y);
            } else {
                remaining_rows<P, M - 1>(w, tile, x, first, count, y);
            }
        }
    }

    template <Packing P>
    static void multiply_packed(const Matrix& w, int tile_begin, int tile_end, const Prepared& x, const Output& y) {
        // Rows are taken in portions that stay in the second-level cache while the tiles pass by.
        const int whole = x.rows / V::kRows, fitting = static_cast<int>(kPortionBytes / (x.stride * V::kRows));
        const int portion = (fitting > 1 ? fitting : 1) * V::kRows;
        for (int begin = 0; begin < whole * V::kRows; begin += portion) {
            const int end = begin + portion < whole * V::kRows ? begin + portion : whole * V::kRows;
            for (int tile = tile_begin; tile < tile_end; ++tile) {
                for (int first = begin; first < end; first += V::kRows) tile_rows<P, V::kRows>(w, tile, x, first, y);
            }
        }
        const int first = whole * V::kRows;
        for (int tile = tile_begin; first < x.rows && tile < tile_end; ++tile) {
            remaining_rows<P, V::kRows - 1>(w, tile, x, first, x.rows - first, y);
        }
    }

    static void multiply(const Matrix& w, int tile_begin, int tile_end, const Prepared& x, const Output& y) {
        switch (w.packing) {
            case Packing::kF32:
                return multiply_packed<Packing::kF32>(w, tile_begin, tile_end, x, y);
            case Packing::kF16:
                return multiply_packed<Packing::kF16>(w, tile_begin, tile_end, x, y);
            case Packing::kBF16:
                return multiply_packed<Packing::kBF16>(w, tile_begin, tile_end, x, y);
            case Packing::kU4Scale:
                return multiply_packed<Packing::kU4Scale>(w, tile_begin, tile_end, x, y);
            case Packing::kU4ScaleMin:
                return multiply_packed<Packing::kU4ScaleMin>(w, tile_begin, tile_end, x, y);
            case Packing::kU4Super:
                return multiply_packed<Packing::kU4Super>(w, tile_begin, tile_end, x, y);
            case Packing::kS8Scale:
                return multiply_packed<Packing::kS8Scale>(w, tile_begin, tile_end, x, y);
            case Packing::kS8ScaleMin:
                return multiply_packed<Packing::kS8ScaleMin>(w, tile_begin, tile_end, x, y);
            case Packing::kS8Super:
                return multiply_packed<Packing::kS8Super>(w, tile_begin, tile_end, x, y);
            case Packing::kS8Super16:
                return multiply_packed<Packing::kS8Super16>(w, tile_begin, tile_end, x, y);
        }
    }
};
